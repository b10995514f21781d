//! AVX-512 with VNNI: one load brings a code word of sixteen rows, four masks and four
//! byte-dot-product instructions consume its 256 trits.

use std::arch::x86_64::*;

use super::Kernels;
use super::lookup::Lanes;
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
}
