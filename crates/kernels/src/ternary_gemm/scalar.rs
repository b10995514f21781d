//! The reference: one trit after the other.

use super::Kernels;
use super::lookup::PlainLanes;
use crate::ternary::{PANEL_ROWS, PanelVector, WORD_TRITS, decode_trit};

/// Plain Rust for any processor.
pub(super) struct Scalar;

impl Kernels for Scalar {
    type Lanes = PlainLanes;
    const LOOKUP_MIN_ROWS: usize = 64;
    const LOOKUP_MIN_TOKENS: usize = 4;

    #[inline(always)]
    unsafe fn word_dots<const M: usize>(
        words: &[PanelVector],
        inputs: [&[i8]; M],
    ) -> [[i32; PANEL_ROWS]; M] {
        let mut sums = [[0; PANEL_ROWS]; M];
        for (at, words) in words.iter().enumerate() {
            for (sums, input) in sums.iter_mut().zip(inputs) {
                let input = &input[at * WORD_TRITS..][..WORD_TRITS];
                // Rows innermost: a compiler can compute them side by side.
                for (k, &q) in input.iter().enumerate() {
                    for (sum, &word) in sums.iter_mut().zip(words) {
                        *sum += i32::from(q) * i32::from(decode_trit(word, k) + 1);
                    }
                }
            }
        }
        sums
    }
}
