//! What a tier brings to look-ups: a register of sums, and the turning of packed weights into indices.

use std::ops::Range;

use super::ENTRIES;
use crate::activations::QuantizedRows;
use crate::ternary::base3::quad_index;
use crate::ternary::{Layout, PANEL_ROWS, PanelVector};

/// Code words of a row that one pass consumes.
pub(in crate::ternary_gemm) const PASS_WORDS: usize = 2;

/// Table indices of a panel's rows for one pass: a byte for each byte of the pass's two words, that of the
/// first word's first byte lowest. None is [`ENTRIES`] or more.
pub(in crate::ternary_gemm) type PassIndices = [u64; PANEL_ROWS];

/// The 16-bit sums of a tile of tokens, in registers.
///
/// # Safety
/// Every method demands that the calling function is compiled with, and runs on a processor with, the
/// features of the implementing tier, and that pointers have `TOKENS` lanes behind them.
pub(in crate::ternary_gemm) trait Lanes: Copy {
    /// T, the number of lanes.
    const TOKENS: usize;
    unsafe fn zero() -> Self;
    unsafe fn load(from: *const i16) -> Self;
    unsafe fn store(self, to: *mut i16);
    unsafe fn add(self, other: Self) -> Self;
    unsafe fn sub(self, other: Self) -> Self;
    /// Adds the lanes to 32-bit sums, or sets these if `INIT`.
    unsafe fn add_to<const INIT: bool>(self, sums: *mut i32);

    /// Turns the sums of a panel, `[row][token]`, into `[token][row]`. `out` has as many.
    #[inline(always)]
    unsafe fn transpose_panel(sums: &[i32], out: &mut [i32]) {
        for (token, out) in out.chunks_exact_mut(PANEL_ROWS).enumerate() {
            for (row, out) in out.iter_mut().enumerate() {
                *out = sums[row * Self::TOKENS + token];
            }
        }
    }

    /// Activations of some tokens, at most T, from `[token][input]` i8 to `[input][token]` i16; absent tokens
    /// are zero. Rows are padded to at least the inputs that `out` has room for.
    #[inline(always)]
    unsafe fn transpose_inputs(input: &QuantizedRows, tokens: Range<usize>, out: &mut [i16]) {
        if tokens.len() < Self::TOKENS {
            out.fill(0);
        }
        // Eight inputs of every token, then the next eight: the lines that are written stay in the cache.
        for (block, out) in out.chunks_exact_mut(8 * Self::TOKENS).enumerate() {
            for (lane, token) in tokens.clone().enumerate() {
                let row = &input.padded_row(token)[8 * block..][..8];
                for (i, &q) in row.iter().enumerate() {
                    out[i * Self::TOKENS + lane] = i16::from(q);
                }
            }
        }
    }

    /// The table indices of a pass that begins with the word `first` of a panel with `words` words. A word
    /// beyond them has any index that is in bounds.
    #[inline(always)]
    unsafe fn pass_indices(
        layout: Layout,
        units: &[PanelVector],
        words: usize,
        first: usize,
    ) -> PassIndices {
        let mut indices = [0; PANEL_ROWS];
        for at in first..words.min(first + PASS_WORDS) {
            for (indices, word) in indices.iter_mut().zip(layout.word(units, at)) {
                // Fields are at most 2 (a packing invariant); `min` keeps even a broken invariant inside
                // the table.
                let index = |quad| quad_index(quad).min(ENTRIES as u8 - 1);
                let four = u32::from_le_bytes(word.to_le_bytes().map(index));
                *indices |= u64::from(four) << (32 * (at - first));
            }
        }
        indices
    }
}

/// Lanes of the scalar tier.
#[derive(Clone, Copy)]
pub(in crate::ternary_gemm) struct PlainLanes([i16; 16]);

impl Lanes for PlainLanes {
    const TOKENS: usize = 16;

    #[inline(always)]
    unsafe fn zero() -> Self {
        Self([0; 16])
    }

    #[inline(always)]
    unsafe fn load(from: *const i16) -> Self {
        // SAFETY: 16 lanes are readable by the caller's promise.
        Self(unsafe { from.cast::<[i16; 16]>().read_unaligned() })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut i16) {
        // SAFETY: 16 lanes are writable by the caller's promise.
        unsafe { to.cast::<[i16; 16]>().write_unaligned(self.0) }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i].wrapping_add(other.0[i])))
    }

    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i].wrapping_sub(other.0[i])))
    }

    #[inline(always)]
    unsafe fn add_to<const INIT: bool>(self, sums: *mut i32) {
        for (i, lane) in self.0.into_iter().enumerate() {
            // SAFETY: 16 sums are readable and writable by the caller's promise.
            unsafe {
                let before = if INIT { 0 } else { sums.add(i).read() };
                sums.add(i).write(before + i32::from(lane));
            }
        }
    }
}
