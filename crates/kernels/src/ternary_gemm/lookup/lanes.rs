//! What a tier brings to look-ups: a register of sums, and the turning of packed weights into indices.

use std::marker::PhantomData;
use std::ops::Range;

use super::dots::Dots;
use super::{ENTRIES, PASS_TABLES};
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

    /// Of 64 panels, how many meet their activations by dot products that are woven into the look-ups of the
    /// others (measured): multiplication uses units that look-ups leave idle.
    const DOTS_OF_64: usize = 0;

    /// Adds one pass to the sums of every row. `FIRST`: the 16-bit sums start at zero; `LAST`: they are
    /// added to the 32-bit sums, or set these if `INITIAL`. Works on dot products meanwhile.
    #[inline(always)]
    unsafe fn sweep<const FIRST: bool, const LAST: bool, const INITIAL: bool>(
        sweep: Sweep<'_, Self>,
        _: &mut Dots<'_>,
    ) {
        for row in 0..sweep.rows {
            // SAFETY: one of the rows; the caller's promise.
            unsafe { sweep.row::<FIRST, LAST, INITIAL>(row) };
        }
    }

    /// Computes the dot products that are left.
    #[inline(always)]
    unsafe fn finish_dots(_: &mut Dots<'_>) {}

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
    /// are zero. Tiers with dot products write `[input / 4][token]` as well. Rows are padded to at least the
    /// inputs that `out` has room for.
    #[inline(always)]
    unsafe fn transpose_inputs(
        input: &QuantizedRows,
        tokens: Range<usize>,
        out: &mut [i16],
        _: &mut [i32],
    ) {
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

    /// The two words of a pass of a panel's rows, `[word][row]`, for dot products.
    #[inline(always)]
    unsafe fn pass_words(
        layout: Layout,
        units: &[PanelVector],
        words: usize,
        first: usize,
    ) -> PassIndices {
        let word = |at: usize| if at < words { layout.word(units, at) } else { [0; PANEL_ROWS] };
        bytemuck::cast([word(first), word(first + 1)])
    }
}

/// The sums of one pass and what they are made from.
pub(in crate::ternary_gemm) struct Sweep<'a, V> {
    pub rows: usize,
    indices: &'a [u64],
    tables: *const i16,
    short_sums: *mut i16,
    sums: *mut i32,
    lanes: PhantomData<(V, &'a mut [i16])>,
}

impl<'a, V: Lanes> Sweep<'a, V> {
    pub(super) fn new(
        indices: &'a [u64],
        tables: &'a [i16],
        short_sums: &'a mut [i16],
        sums: &'a mut [i32],
    ) -> Self {
        assert!(tables.len() == PASS_TABLES * ENTRIES * V::TOKENS);
        assert!(short_sums.len() >= indices.len() * V::TOKENS);
        assert!(sums.len() >= indices.len() * V::TOKENS);
        Self {
            rows: indices.len(),
            indices,
            tables: tables.as_ptr(),
            short_sums: short_sums.as_mut_ptr(),
            sums: sums.as_mut_ptr(),
            lanes: PhantomData,
        }
    }

    /// Adds the pass to the sums of one row.
    ///
    /// # Safety
    /// As for [`Lanes`]; the row is one of `rows`, and all indices are below [`ENTRIES`].
    #[inline(always)]
    pub unsafe fn row<const FIRST: bool, const LAST: bool, const INITIAL: bool>(&self, row: usize) {
        let lane = row * V::TOKENS;
        // SAFETY: `lane` has `TOKENS` sums behind it by the assertions in `new`. Indices are in bounds by the
        // caller's promise, so every look-up stays inside its table; features likewise.
        unsafe {
            let indices = *self.indices.get_unchecked(row);
            let mut sum = if FIRST { V::zero() } else { V::load(self.short_sums.add(lane)) };
            for byte in 0..PASS_TABLES {
                let table = self.tables.add(byte * ENTRIES * V::TOKENS);
                sum = sum.add(V::load(table.byte_add(entry_offset::<V>(indices, byte))));
            }
            if LAST {
                sum.add_to::<INITIAL>(self.sums.add(lane));
            } else {
                sum.store(self.short_sums.add(lane));
            }
        }
    }
}

/// Bytes before the entry that a byte of `indices` selects: one shift and one mask.
#[inline(always)]
fn entry_offset<V: Lanes>(indices: u64, byte: usize) -> usize {
    let shift = (size_of::<i16>() * V::TOKENS).trailing_zeros();
    let at = 8 * byte as u32;
    let moved = if at < shift { indices << (shift - at) } else { indices >> (at - shift) };
    moved as usize & (0xff << shift)
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
