//! AVX-512 with VNNI: one load brings a code word of sixteen rows, four masks and four
//! byte-dot-product instructions consume its 256 trits.

use std::arch::x86_64::*;

use super::Kernels;
use super::lookup::{Aligned, Lanes, Offsets, PassWords};
use crate::ternary::{PANEL_ROWS, WORD_TRITS};

/// Kernels with these instructions.
pub(super) struct Avx512;

impl Kernels for Avx512 {
    type Lanes = Lanes32;
    const LOOKUP_MIN_ROWS: usize = 512;
    const LOOKUP_MIN_TOKENS: usize = 28;

    #[inline(always)]
    unsafe fn panel_dots<const M: usize>(
        words: &[u32],
        inputs: [&[i8]; M],
    ) -> [[i32; PANEL_ROWS]; M] {
        // SAFETY: the caller runs with this tier's features.
        unsafe { dots(words, inputs) }
    }
}

/// Field `f` of the codes is used where it stands, as `(t + 1) · 4^f`, in a sum of its own that is
/// shifted down at the end: exact, and cheaper than shifting every word. A sum stays below
/// `2 · 64 · 4 · 127` = 65,024 a unit, so below 2^31 for any K up to half a million.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
#[inline]
fn dots<const M: usize>(words: &[u32], inputs: [&[i8]; M]) -> [[i32; PANEL_ROWS]; M] {
    let units = words.len() / PANEL_ROWS;
    assert!(inputs.iter().all(|input| input.len() >= units * WORD_TRITS));
    let masks = [0x0303_0303, 0x0c0c_0c0c, 0x3030_3030, 0xc0c0_c0c0_u32 as i32]
        .map(|mask| _mm512_set1_epi32(mask));
    let mut sums = [[_mm512_setzero_si512(); 4]; M];
    for unit in 0..units {
        // SAFETY: `unit` is below `words.len() / 16`, so sixteen words follow.
        let codes = unsafe { _mm512_loadu_si512(words.as_ptr().add(unit * PANEL_ROWS).cast()) };
        for field in 0..4 {
            let trits = _mm512_and_si512(codes, masks[field]);
            for (sums, input) in sums.iter_mut().zip(inputs) {
                // SAFETY: the assertion above leaves 16 activations for every unit.
                let four = unsafe {
                    input.as_ptr().add(unit * WORD_TRITS + 4 * field).cast::<i32>().read_unaligned()
                };
                sums[field] = _mm512_dpbusd_epi32(sums[field], trits, _mm512_set1_epi32(four));
            }
        }
    }
    sums.map(|[one, four, sixteen, sixty_four]| {
        let low = _mm512_add_epi32(one, _mm512_srai_epi32::<2>(four));
        let high =
            _mm512_add_epi32(_mm512_srai_epi32::<4>(sixteen), _mm512_srai_epi32::<6>(sixty_four));
        let mut out = [0; PANEL_ROWS];
        // SAFETY: the array is sixteen i32 long.
        unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), _mm512_add_epi32(low, high)) };
        out
    })
}

/// Thirty-two tokens: one register of 16-bit sums.
#[derive(Clone, Copy)]
pub(super) struct Lanes32(__m512i);

impl Lanes for Lanes32 {
    const TOKENS: usize = 32;

    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: the caller runs with this tier's features.
        Self(unsafe { _mm512_setzero_si512() })
    }

    #[inline(always)]
    unsafe fn load(from: *const i16) -> Self {
        // SAFETY: 32 lanes are readable by the caller's promise, and it runs with this tier's features.
        Self(unsafe { _mm512_loadu_si512(from.cast()) })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut i16) {
        // SAFETY: as in `load`, writable.
        unsafe { _mm512_storeu_si512(to.cast(), self.0) }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: the caller runs with this tier's features.
        Self(unsafe { _mm512_add_epi16(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        // SAFETY: the caller runs with this tier's features.
        Self(unsafe { _mm512_sub_epi16(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn add_to<const INIT: bool>(self, sums: *mut i32) {
        // SAFETY: 32 sums are readable and writable by the caller's promise, and it runs with this
        // tier's features.
        unsafe {
            let mut low = _mm512_cvtepi16_epi32(_mm512_castsi512_si256(self.0));
            let mut high = _mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64::<1>(self.0));
            if !INIT {
                low = _mm512_add_epi32(low, _mm512_loadu_si512(sums.cast()));
                high = _mm512_add_epi32(high, _mm512_loadu_si512(sums.add(16).cast()));
            }
            _mm512_storeu_si512(sums.cast(), low);
            _mm512_storeu_si512(sums.add(16).cast(), high);
        }
    }

    #[inline(always)]
    unsafe fn transpose_panel(sums: &[i32], out: &mut [i32]) {
        assert!(sums.len() == 16 * 32 && out.len() == 32 * 16);
        for half in 0..2 {
            // SAFETY: sixteen rows of sixteen lanes, 32 apart in `sums` and side by side in `out`, lie
            // inside the slices by the assertion; features by the caller's promise.
            unsafe {
                let rows = std::array::from_fn(|row| {
                    _mm512_loadu_si512(sums.as_ptr().add(32 * row + 16 * half).cast())
                });
                let out = out.as_mut_ptr().add(256 * half);
                for (token, lanes) in transpose_16x16(rows).into_iter().enumerate() {
                    _mm512_storeu_si512(out.add(16 * token).cast(), lanes);
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn table_offsets(words: &PassWords) -> Offsets {
        let mut offsets = Aligned([0u64; 32]);
        for word in 0..2 {
            // SAFETY: sixteen of the 32 words are read, sixteen of the 32 offsets written; features by
            // the caller's promise.
            unsafe {
                let codes = _mm512_loadu_si512(words.as_ptr().add(16 * word).cast());
                let pairs = _mm512_set1_epi8(0x33);
                let low = _mm512_and_si512(codes, pairs);
                let high = _mm512_and_si512(_mm512_srli_epi16::<2>(codes), pairs);
                // Two base-3 digits to each nibble, 0 to 8.
                let nibbles =
                    _mm512_add_epi8(low, _mm512_add_epi8(high, _mm512_add_epi8(high, high)));
                let out = offsets.0.as_mut_ptr().add(16 * word);
                let halves =
                    [_mm512_castsi512_si256(nibbles), _mm512_extracti64x4_epi64::<1>(nibbles)];
                for (i, half) in halves.into_iter().enumerate() {
                    // 8 · (low + 9 · high) of each byte n = low + 16 · high, as 8 · n − 56 · high.
                    let n = _mm512_cvtepu8_epi16(half);
                    let high = _mm512_mullo_epi16(_mm512_srli_epi16::<4>(n), _mm512_set1_epi16(56));
                    let offset = _mm512_sub_epi16(_mm512_slli_epi16::<3>(n), high);
                    // A broken packing invariant must not leave the table.
                    let offset = _mm512_min_epu16(offset, _mm512_set1_epi16(80 * 8));
                    _mm512_store_si512(out.add(8 * i).cast(), offset);
                }
            }
        }
        offsets
    }
}

/// Transposes sixteen rows of sixteen 32-bit values.
#[target_feature(enable = "avx512f")]
#[inline]
fn transpose_16x16(rows: [__m512i; 16]) -> [__m512i; 16] {
    // Pairs of rows, then fours, within 128-bit parts; then the parts themselves.
    let pairs: [__m512i; 16] = std::array::from_fn(|i| {
        let (a, b) = (rows[i & !1], rows[i | 1]);
        if i % 2 == 0 { _mm512_unpacklo_epi32(a, b) } else { _mm512_unpackhi_epi32(a, b) }
    });
    // fours[4g + c] holds column c of rows 4g .. 4g + 4 in each part.
    let fours: [__m512i; 16] = std::array::from_fn(|i| {
        let (group, column) = (i & !3, i & 3);
        let (a, b) = (pairs[group + column / 2], pairs[group + 2 + column / 2]);
        if column % 2 == 0 { _mm512_unpacklo_epi64(a, b) } else { _mm512_unpackhi_epi64(a, b) }
    });
    std::array::from_fn(|column| {
        let (part, c) = (column / 4, column % 4);
        let pick = |a, b| match part {
            0 => _mm512_shuffle_i32x4::<0b00_00_00_00>(a, b),
            1 => _mm512_shuffle_i32x4::<0b01_01_01_01>(a, b),
            2 => _mm512_shuffle_i32x4::<0b10_10_10_10>(a, b),
            _ => _mm512_shuffle_i32x4::<0b11_11_11_11>(a, b),
        };
        let low = pick(fours[c], fours[4 + c]);
        let high = pick(fours[8 + c], fours[12 + c]);
        // low is [rows 0-3, same, rows 4-7, same]; high likewise for rows 8-15.
        _mm512_shuffle_i32x4::<0b10_00_10_00>(low, high)
    })
}
