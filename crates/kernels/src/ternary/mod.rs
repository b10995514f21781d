//! Ternary weights: the quantiser, the packed formats, and the matrix that the kernels stream.
//!
//! A dense layer's weight `W` [N, K] is replaced by trits and one scale per tensor:
//!
//! ```text
//! γ = max(mean |W|, 1e-5)                      summed in f64, kept as f32
//! t = clamp(round_half_even(W · (1/γ)), -1, 1)
//! W ≈ t · γ                                    γ multiplies
//! ```

mod assign;
pub(crate) mod base3;
mod layout;
pub mod tq;

use std::io;

use crate::memory::{ArenaBox, WeightArena};

pub use layout::{Layout, WORD_TRITS};
pub(crate) use layout::{PanelVector, ZERO_WORD};

/// Rows that are stored side by side: one 512-bit vector holds one code word of each.
pub const PANEL_ROWS: usize = 16;

/// Why a ternary matrix could not be made.
#[derive(Debug, thiserror::Error)]
pub enum TernaryError {
    /// A dimension is zero or the product overflows.
    #[error("a ternary matrix of {rows} x {cols} cannot be stored")]
    Shape {
        /// N.
        rows: usize,
        /// K.
        cols: usize,
    },
    /// The data do not have the length that the shape demands.
    #[error("expected {expected} {what}, found {found}")]
    Length {
        /// What was counted.
        what: &'static str,
        /// What the shape demands.
        expected: usize,
        /// What was given.
        found: usize,
    },
    /// A weight is NaN or infinite.
    #[error("weight {index} is {value}; weights must be finite")]
    NotFinite {
        /// Row-major index of the first offending weight.
        index: usize,
        /// The weight.
        value: f32,
    },
    /// The scale γ is NaN, infinite or not positive.
    #[error("the scale is {0}; it must be finite and positive")]
    Scale(f32),
    /// A packed block holds a code that stands for no trit.
    #[error("byte {offset} holds {value:#04x}, which encodes no trits")]
    Code {
        /// Offset into the packed data.
        offset: usize,
        /// The byte.
        value: u8,
    },
    /// A packed block's own scale is not 1.
    #[error("the block at byte {offset} has scale bits {bits:#06x}; expected 1.0 (0x3c00)")]
    BlockScale {
        /// Offset of the block.
        offset: usize,
        /// The half-precision bits found.
        bits: u16,
    },
    /// Trits that fill a row up to whole blocks are not zero.
    #[error("row {row} of {cols} trits is followed by padding that is not zero")]
    Padding {
        /// The row.
        row: usize,
        /// K.
        cols: usize,
    },
    /// The system refused memory.
    #[error("could not allocate {bytes} bytes for packed weights: {source}")]
    Allocate {
        /// Bytes wanted.
        bytes: usize,
        /// The system's reason.
        source: io::Error,
    },
}

/// The scale γ of a tensor, `max(mean |w|, 1e-5)`, the mean taken in f64.
///
/// # Errors
/// [`TernaryError::NotFinite`] names the first weight that is NaN or infinite.
pub fn absmean_scale(weights: &[f32]) -> Result<f32, TernaryError> {
    let sum: f64 = weights.iter().map(|w| f64::from(w.abs())).sum();
    if !sum.is_finite() {
        let index = weights.iter().position(|w| !w.is_finite()).unwrap_or(0);
        return Err(TernaryError::NotFinite { index, value: weights[index] });
    }
    Ok(((sum / weights.len().max(1) as f64) as f32).max(1e-5))
}

/// Writes `clamp(round_half_even(w · (1/γ)), -1, 1)` for every weight. Quantises: the result is trits.
pub fn quantize_trits(weights: &[f32], scale: f32, trits: &mut [i8]) {
    assert_eq!(weights.len(), trits.len());
    let inverse = 1.0 / scale;
    for (trit, &w) in trits.iter_mut().zip(weights) {
        // Ties at ±0.5 round to the even 0, so a strict comparison is the rounding.
        let scaled = w * inverse;
        *trit = i8::from(scaled > 0.5) - i8::from(scaled < -0.5);
    }
}

/// Ternary weights `t · γ` [N, K] as the kernels stream them, in a [`Layout`].
///
/// Rows and columns beyond the logical shape hold zero trits.
#[derive(Debug)]
pub struct TernaryMatrix {
    rows: usize,
    cols: usize,
    scale: f32,
    layout: Layout,
    storage: ArenaBox,
}

impl TernaryMatrix {
    /// Packs trits [N, K], row-major, that a closure writes one row at a time into a slice of
    /// length K.
    ///
    /// # Errors
    /// An impossible shape or scale, no memory, or whatever the closure reports.
    pub fn from_rows<E: From<TernaryError>>(
        arena: &WeightArena,
        layout: Layout,
        rows: usize,
        cols: usize,
        scale: f32,
        mut write_row: impl FnMut(usize, &mut [i8]) -> Result<(), E>,
    ) -> Result<Self, E> {
        let mut trits = vec![0i8; cols.next_multiple_of(WORD_TRITS)];
        Self::from_panels(arena, layout, rows, cols, scale, |panel, words| {
            let first = panel * PANEL_ROWS;
            for row in first..rows.min(first + PANEL_ROWS) {
                write_row(row, &mut trits[..cols])?;
                for (word, group) in words.iter_mut().zip(trits.chunks_exact(WORD_TRITS)) {
                    word[row - first] = encode_word(group);
                }
            }
            Ok(())
        })
    }

    /// Packs words that a closure writes one panel at a time over zero trits.
    fn from_panels<E: From<TernaryError>>(
        arena: &WeightArena,
        layout: Layout,
        rows: usize,
        cols: usize,
        scale: f32,
        mut write_panel: impl FnMut(usize, &mut [PanelVector]) -> Result<(), E>,
    ) -> Result<Self, E> {
        let mut matrix = Self::uninitialized(arena, layout, rows, cols, scale)?;
        let units = matrix.units();
        let mut words = vec![[ZERO_WORD; PANEL_ROWS]; matrix.words()];
        let storage: &mut [PanelVector] = bytemuck::cast_slice_mut(matrix.storage.bytes_mut());
        for (panel, units) in storage.chunks_exact_mut(units).enumerate() {
            words.fill([ZERO_WORD; PANEL_ROWS]);
            write_panel(panel, &mut words)?;
            layout.pack(&words, units);
        }
        Ok(matrix)
    }

    /// Packs trits [N, K], row-major.
    ///
    /// # Errors
    /// As [`from_rows`](Self::from_rows), and a wrong number of trits.
    pub fn from_trits(
        arena: &WeightArena,
        layout: Layout,
        rows: usize,
        cols: usize,
        scale: f32,
        trits: &[i8],
    ) -> Result<Self, TernaryError> {
        let expected = rows.checked_mul(cols).ok_or(TernaryError::Shape { rows, cols })?;
        if trits.len() != expected {
            return Err(TernaryError::Length { what: "trits", expected, found: trits.len() });
        }
        Self::from_rows(arena, layout, rows, cols, scale, |row, out| {
            out.copy_from_slice(&trits[row * cols..(row + 1) * cols]);
            Ok(())
        })
    }

    /// A matrix of zero trits at two bits a trit, to be [assigned](Self::assign) later.
    ///
    /// # Errors
    /// An impossible shape, or no memory.
    pub fn new(arena: &WeightArena, rows: usize, cols: usize) -> Result<Self, TernaryError> {
        Self::from_panels(arena, Layout::TwoBit, rows, cols, 1.0, |_, _| Ok(()))
    }

    /// Storage for a matrix, all bytes 0, which stands for no trits yet.
    fn uninitialized(
        arena: &WeightArena,
        layout: Layout,
        rows: usize,
        cols: usize,
        scale: f32,
    ) -> Result<Self, TernaryError> {
        if !(scale.is_finite() && scale > 0.0) {
            return Err(TernaryError::Scale(scale));
        }
        let bytes = (rows > 0 && cols > 0)
            .then(|| {
                rows.div_ceil(PANEL_ROWS)
                    .checked_mul(size_of::<PanelVector>())?
                    .checked_mul(layout.units(cols.div_ceil(WORD_TRITS)))
            })
            .flatten()
            .ok_or(TernaryError::Shape { rows, cols })?;
        let storage =
            arena.allocate(bytes).map_err(|source| TernaryError::Allocate { bytes, source })?;
        Ok(Self { rows, cols, scale, layout, storage })
    }

    /// Random trits, roughly a third of each kind, the same for the same seed: weights for benchmarks.
    ///
    /// # Errors
    /// An impossible shape or scale, or no memory.
    pub fn random(
        arena: &WeightArena,
        layout: Layout,
        rows: usize,
        cols: usize,
        scale: f32,
        seed: u64,
    ) -> Result<Self, TernaryError> {
        let mut state = seed;
        let mut word = || {
            // splitmix64
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^= z >> 31;
            // Fields that hold the invalid 3 take those of a second draw, and if these are 3 too, 1.
            let merged = merge_invalid_fields(z as u32, (z >> 32) as u32);
            merge_invalid_fields(merged, ZERO_WORD)
        };
        Self::from_panels(arena, layout, rows, cols, scale, |panel, words| {
            let count = PANEL_ROWS.min(rows - panel * PANEL_ROWS);
            words.iter_mut().for_each(|vector| vector[..count].fill_with(&mut word));
            let Some(last) = words.last_mut() else { return Ok(()) };
            for k in (cols - 1) % WORD_TRITS + 1..WORD_TRITS {
                last.iter_mut().for_each(|word| *word = *word & !(3 << bit_of(k)) | 1 << bit_of(k));
            }
            Ok(())
        })
    }

    /// N, the number of outputs.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// K, the number of inputs.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// γ, which multiplies.
    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// How the trits are packed.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// Words of a row, `ceil(K / 16)`.
    pub fn words(&self) -> usize {
        self.cols.div_ceil(WORD_TRITS)
    }

    /// Stored units of a row, 32 bits each.
    pub fn units(&self) -> usize {
        self.layout.units(self.words())
    }

    /// Groups of sixteen rows, `ceil(N / 16)`.
    pub fn panels(&self) -> usize {
        self.rows.div_ceil(PANEL_ROWS)
    }

    /// Bytes that one pass over the matrix streams.
    pub fn packed_bytes(&self) -> usize {
        self.storage.bytes().len()
    }

    /// The stored units, `[panel][unit][row of the panel]`.
    pub fn codes(&self) -> &[[u32; PANEL_ROWS]] {
        bytemuck::cast_slice(self.storage.bytes())
    }

    /// The units of a panel.
    pub(crate) fn panel(&self, panel: usize) -> &[PanelVector] {
        &self.codes()[panel * self.units()..][..self.units()]
    }

    /// Calls `see` with every word of every panel, `[panel][word][row of the panel]`: the same for every
    /// layout.
    pub fn for_each_word(&self, mut see: impl FnMut(&[u32; PANEL_ROWS])) {
        for panel in 0..self.panels() {
            let units = self.panel(panel);
            (0..self.words()).for_each(|word| see(&self.layout.word(units, word)));
        }
    }

    /// The trit at (row, col).
    ///
    /// # Panics
    /// If the position lies outside the matrix.
    pub fn trit(&self, row: usize, col: usize) -> i8 {
        assert!(row < self.rows && col < self.cols, "({row}, {col}) lies outside the matrix");
        let (panel, lane) = (row / PANEL_ROWS, row % PANEL_ROWS);
        let word = self.layout.word(self.panel(panel), col / WORD_TRITS)[lane];
        decode_trit(word, col % WORD_TRITS)
    }

    /// Writes the trits of a row into a slice of length K.
    ///
    /// # Panics
    /// If the row lies outside the matrix or the slice has another length.
    pub fn read_row(&self, row: usize, trits: &mut [i8]) {
        assert!(row < self.rows && trits.len() == self.cols);
        let (panel, lane) = (row / PANEL_ROWS, row % PANEL_ROWS);
        let units = self.panel(panel);
        for (index, group) in trits.chunks_mut(WORD_TRITS).enumerate() {
            let word = self.layout.word(units, index)[lane];
            for (k, trit) in group.iter_mut().enumerate() {
                *trit = decode_trit(word, k);
            }
        }
    }

    /// How many trits are zero.
    pub fn zeros_count(&self) -> usize {
        // A field holding t + 1 = 1 has its low bit set, and only such a field has.
        let mut ones = 0;
        self.for_each_word(|words| {
            ones +=
                words.iter().map(|word| (word & ZERO_WORD).count_ones() as usize).sum::<usize>();
        });
        let padded = self.panels() * PANEL_ROWS * self.words() * WORD_TRITS;
        ones - (padded - self.rows * self.cols)
    }
}

/// `word`, with those of its 2-bit fields that are 3 taken from `other`.
fn merge_invalid_fields(word: u32, other: u32) -> u32 {
    let low = word & (word >> 1) & ZERO_WORD;
    let invalid = low | low << 1;
    word & !invalid | other & invalid
}

/// Sixteen trits to one word.
fn encode_word(trits: &[i8]) -> u32 {
    let mut word = 0;
    for (k, &trit) in trits.iter().enumerate() {
        debug_assert!((-1..=1).contains(&trit));
        word |= ((trit + 1) as u32 & 3) << bit_of(k);
    }
    word
}

/// Trit `k` of a word.
pub(crate) fn decode_trit(word: u32, k: usize) -> i8 {
    (word >> bit_of(k) & 3) as i8 - 1
}

/// Lowest bit of trit `k` = 4·field + byte in a word.
#[inline(always)]
fn bit_of(k: usize) -> usize {
    8 * (k % 4) + 2 * (k / 4)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAYOUTS: [Layout; 2] = [Layout::TwoBit, Layout::Base3];

    fn pattern(rows: usize, cols: usize) -> Vec<i8> {
        (0..rows * cols).map(|i| ((i * i + 7 * i / 3) % 3) as i8 - 1).collect()
    }

    #[test]
    fn quantiser_rounds_half_to_even_and_clamps() {
        let mut trits = [9i8; 7];
        quantize_trits(&[0.5, -0.5, 0.500_001, -0.500_001, 1.5, -7.0, 0.0], 1.0, &mut trits);
        assert_eq!(trits, [0, 0, 1, -1, 1, -1, 0]);
    }

    #[test]
    fn scale_has_a_floor_and_refuses_nan() {
        assert_eq!(absmean_scale(&[0.0, 0.0]).unwrap(), 1e-5);
        assert_eq!(absmean_scale(&[1.0, -3.0]).unwrap(), 2.0);
        let error = absmean_scale(&[1.0, f32::NAN]).unwrap_err();
        assert!(matches!(error, TernaryError::NotFinite { index: 1, .. }));
    }

    #[test]
    fn trits_survive_packing_at_awkward_shapes() {
        let arena = WeightArena::new();
        for (rows, cols) in [(1, 1), (15, 16), (16, 17), (17, 15), (97, 64), (3, 1031)] {
            let trits = pattern(rows, cols);
            for layout in LAYOUTS {
                let matrix =
                    TernaryMatrix::from_trits(&arena, layout, rows, cols, 0.5, &trits).unwrap();
                let mut row_out = vec![0; cols];
                for (row, expected) in trits.chunks(cols).enumerate() {
                    matrix.read_row(row, &mut row_out);
                    assert_eq!(row_out, expected);
                    assert_eq!(matrix.trit(row, cols - 1), expected[cols - 1]);
                }
                assert_eq!(matrix.zeros_count(), trits.iter().filter(|&&t| t == 0).count());
            }
        }
    }

    #[test]
    fn random_trits_are_balanced_and_leave_the_padding_zero() {
        for layout in LAYOUTS {
            let matrix =
                TernaryMatrix::random(&WeightArena::new(), layout, 333, 1001, 1.0, 7).unwrap();
            let mut counts = [0usize; 3];
            let mut row = vec![0; 1001];
            for n in 0..333 {
                matrix.read_row(n, &mut row);
                row.iter().for_each(|&t| counts[(t + 1) as usize] += 1);
            }
            assert!(counts.iter().all(|&count| count > 333 * 1001 * 3 / 10), "{counts:?}");
            assert_eq!(matrix.zeros_count(), counts[1]);
        }
    }

    #[test]
    fn impossible_matrices_are_refused() {
        let arena = WeightArena::new();
        let make = |rows, cols, scale| {
            TernaryMatrix::from_trits(&arena, Layout::Base3, rows, cols, scale, &[0])
        };
        assert!(matches!(make(0, 1, 1.0), Err(TernaryError::Length { .. })));
        assert!(matches!(make(1, 1, f32::NAN), Err(TernaryError::Scale(_))));
        assert!(matches!(make(usize::MAX, 2, 1.0), Err(TernaryError::Shape { .. })));
    }
}
