//! AVX2: a panel is two registers of eight rows; byte products are summed in 16 bits for as long as
//! they fit.

use std::arch::x86_64::*;

use super::Kernels;
use super::lookup::Lanes;
use crate::ternary::{PANEL_ROWS, PanelVector, WORD_TRITS};

/// Words whose products fit 16-bit sums: four fields of two products of at most `2 · 128`, so at most
/// 2,048 a word.
const WORDS_IN_16_BITS: usize = 15;

/// Kernels with these instructions.
pub(super) struct Avx2;

impl Kernels for Avx2 {
    type Lanes = Lanes16;
    const LOOKUP_MIN_ROWS: usize = 64;
    const LOOKUP_MIN_TOKENS: usize = 11;

    #[inline(always)]
    unsafe fn word_dots<const M: usize>(
        words: &[PanelVector],
        inputs: [&[i8]; M],
    ) -> [[i32; PANEL_ROWS]; M] {
        // SAFETY: the caller runs with this tier's features.
        unsafe { dots(words, inputs) }
    }
}

#[target_feature(enable = "avx2")]
#[inline]
fn dots<const M: usize>(words: &[PanelVector], inputs: [&[i8]; M]) -> [[i32; PANEL_ROWS]; M] {
    assert!(inputs.iter().all(|input| input.len() >= words.len() * WORD_TRITS));
    let field_mask = _mm256_set1_epi8(3);
    let ones = _mm256_set1_epi16(1);
    let mut sums = [[_mm256_setzero_si256(); 2]; M];
    let mut at = 0;
    while at < words.len() {
        let end = words.len().min(at + WORDS_IN_16_BITS);
        let mut short_sums = [[_mm256_setzero_si256(); 2]; M];
        while at < end {
            for half in 0..2 {
                // SAFETY: eight of the sixteen words at 0 or 8.
                let mut codes =
                    unsafe { _mm256_loadu_si256(words[at].as_ptr().add(8 * half).cast()) };
                for field in 0..4 {
                    let trits = _mm256_and_si256(codes, field_mask);
                    // Bits that cross from one byte into the next are masked away.
                    codes = _mm256_srli_epi16::<2>(codes);
                    for (short_sums, input) in short_sums.iter_mut().zip(inputs) {
                        // SAFETY: the assertion above leaves 16 activations for every word.
                        let four = unsafe {
                            input
                                .as_ptr()
                                .add(at * WORD_TRITS + 4 * field)
                                .cast::<i32>()
                                .read_unaligned()
                        };
                        let products = _mm256_maddubs_epi16(trits, _mm256_set1_epi32(four));
                        short_sums[half] = _mm256_add_epi16(short_sums[half], products);
                    }
                }
            }
            at += 1;
        }
        for (sums, short_sums) in sums.iter_mut().zip(short_sums) {
            for (sum, short_sum) in sums.iter_mut().zip(short_sums) {
                *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(short_sum, ones));
            }
        }
    }
    // A loop and no `map`: its closure would not be compiled with these features.
    let mut out = [[0; PANEL_ROWS]; M];
    for (out, halves) in out.iter_mut().zip(sums) {
        for (half, sum) in halves.into_iter().enumerate() {
            // SAFETY: eight i32 fit at 0 and at 8 of the sixteen.
            unsafe { _mm256_storeu_si256(out.as_mut_ptr().add(8 * half).cast(), sum) };
        }
    }
    out
}

/// Sixteen tokens: one register of 16-bit sums.
#[derive(Clone, Copy)]
pub(super) struct Lanes16(__m256i);

impl Lanes for Lanes16 {
    const TOKENS: usize = 16;

    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: the caller runs with this tier's features.
        Self(unsafe { _mm256_setzero_si256() })
    }

    #[inline(always)]
    unsafe fn load(from: *const i16) -> Self {
        // SAFETY: 16 lanes are readable by the caller's promise, and it runs with this tier's features.
        Self(unsafe { _mm256_loadu_si256(from.cast()) })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut i16) {
        // SAFETY: as in `load`, writable.
        unsafe { _mm256_storeu_si256(to.cast(), self.0) }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: the caller runs with this tier's features.
        Self(unsafe { _mm256_add_epi16(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        // SAFETY: the caller runs with this tier's features.
        Self(unsafe { _mm256_sub_epi16(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn add_to<const INIT: bool>(self, sums: *mut i32) {
        // SAFETY: 16 sums are readable and writable by the caller's promise, and it runs with this
        // tier's features.
        unsafe {
            let mut low = _mm256_cvtepi16_epi32(_mm256_castsi256_si128(self.0));
            let mut high = _mm256_cvtepi16_epi32(_mm256_extracti128_si256::<1>(self.0));
            if !INIT {
                low = _mm256_add_epi32(low, _mm256_loadu_si256(sums.cast()));
                high = _mm256_add_epi32(high, _mm256_loadu_si256(sums.add(8).cast()));
            }
            _mm256_storeu_si256(sums.cast(), low);
            _mm256_storeu_si256(sums.add(8).cast(), high);
        }
    }
}
