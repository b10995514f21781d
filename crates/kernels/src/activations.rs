//! Activations as the ternary products take them: 8-bit integers with one scale a token.
//!
//! ```text
//! RMSNorm(x; w, ε) = x · (1 / sqrt(mean(x²) + ε)) · w
//! Q8(y):  s = 127 / max(max |y|, 1e-5);  q = clamp(round_half_even(y · s), −127, 127);  y ≈ q / s
//! ```
//!
//! `|y · s|` exceeds 127 by no more than a rounding error, so −128 never occurs, and the sums of the
//! look-up kernels rely on that.

use bytemuck::{Pod, Zeroable};

use crate::lanes::{lane_max, lane_sum};
use crate::pool::{Pool, SharedMut};
use crate::tier::{Backend, compiled_for_each_tier};

/// A cache line of values. Rows are padded with zeros to an odd number of them: sixteen neighbouring rows
/// then lie in different sets of a cache, whatever their length.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
struct Line([i8; LINE]);

const LINE: usize = 64;

// SAFETY: an array of integers, without padding: its size is its alignment.
unsafe impl Zeroable for Line {}
// SAFETY: as above; any bits are valid integers.
unsafe impl Pod for Line {}

/// Quantised activations [M, K] with a scale and a sum a row.
#[derive(Clone, Debug, Default)]
pub struct QuantizedRows {
    rows: usize,
    cols: usize,
    /// Lines of a row.
    lines: usize,
    values: Vec<Line>,
    scales: Vec<f32>,
    sums: Vec<i32>,
}

impl QuantizedRows {
    /// An empty matrix.
    pub fn new() -> Self {
        Self::default()
    }

    /// A matrix of given integers [M, K] and scales `[M]` (divide), for tests and tools.
    ///
    /// Returns `None` if the lengths do not fit the shape or a value is −128.
    pub fn from_parts(rows: usize, cols: usize, values: &[i8], scales: &[f32]) -> Option<Self> {
        if values.len() != rows.checked_mul(cols)? || scales.len() != rows || values.contains(&-128)
        {
            return None;
        }
        let mut quantized = Self::new();
        quantized.resize(rows, cols);
        quantized.scales.copy_from_slice(scales);
        for row in 0..rows {
            let from = &values[row * cols..][..cols];
            quantized.padded_row_mut(row)[..cols].copy_from_slice(from);
            quantized.sums[row] = from.iter().map(|&q| i32::from(q)).sum();
        }
        Some(quantized)
    }

    /// M.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// K.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The integers of a row `[K]`.
    pub fn row(&self, row: usize) -> &[i8] {
        &self.padded_row(row)[..self.cols]
    }

    /// s of a row; divides.
    pub fn scale(&self, row: usize) -> f32 {
        self.scales[row]
    }

    /// Sum of a row's integers.
    pub(crate) fn sum(&self, row: usize) -> i32 {
        self.sums[row]
    }

    /// A row with its padding of zeros.
    pub(crate) fn padded_row(&self, row: usize) -> &[i8] {
        assert!(row < self.rows);
        bytemuck::cast_slice(&self.values[row * self.lines..][..self.lines])
    }

    fn padded_row_mut(&mut self, row: usize) -> &mut [i8] {
        bytemuck::cast_slice_mut(&mut self.values[row * self.lines..][..self.lines])
    }

    /// Bytes from a row to the next. Rows begin on cache lines.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn stride(&self) -> usize {
        self.lines * LINE
    }

    /// Gives the matrix a shape. Allocates only when it grows beyond what it ever was.
    fn resize(&mut self, rows: usize, cols: usize) {
        if (rows, cols) == (self.rows, self.cols) {
            return;
        }
        let lines = cols.div_ceil(LINE) | 1;
        if lines != self.lines || cols < self.cols {
            // What is padding now may have held values.
            self.values.clear();
        }
        self.values.resize(rows * lines, Line::zeroed());
        self.scales.resize(rows, 1.0);
        self.sums.resize(rows, 0);
        (self.rows, self.cols, self.lines) = (rows, cols, lines);
    }

    /// Becomes `Q8(RMSNorm(x; weight, eps))` for every row of `x` [M, K], the input of a BitLinear.
    ///
    /// # Panics
    /// If `x` is not a whole number of rows of the weight's length.
    pub fn assign_rms_norm(
        &mut self,
        backend: Backend,
        pool: &Pool,
        x: &[f32],
        weight: &[f32],
        eps: f32,
    ) {
        let cols = weight.len();
        assert!(cols > 0 && x.len().is_multiple_of(cols), "{} is no multiple of {cols}", x.len());
        self.resize(x.len() / cols, cols);
        let lines = self.lines;
        let scales = SharedMut::new(&mut self.scales);
        let sums = SharedMut::new(&mut self.sums);
        pool.for_each_chunk(&mut self.values, lines, &|_, row, values| {
            let values: &mut [i8] = bytemuck::cast_slice_mut(values);
            let x = &x[row * cols..][..cols];
            let (scale, sum) = rms_norm_quantize(backend, x, weight, eps, &mut values[..cols]);
            // SAFETY: each row is one task's alone.
            unsafe {
                scales.slice(row, 1)[0] = scale;
                sums.slice(row, 1)[0] = sum;
            }
        });
    }
}

compiled_for_each_tier! {
    /// One row: norm, scale, integers. Returns the scale and the integers' sum.
    fn rms_norm_quantize(x: &[f32], weight: &[f32], eps: f32, q: &mut [i8]) -> (f32, i32)
        = rms_norm_quantize_body
}

#[inline(always)]
fn rms_norm_quantize_body(x: &[f32], weight: &[f32], eps: f32, q: &mut [i8]) -> (f32, i32) {
    let inverse_rms = inverse_rms(x, eps);
    let largest = lane_max(x, weight, |x, w| (x * inverse_rms * w).abs());
    let scale = 127.0 / largest.max(1e-5);
    for ((q, &x), &w) in q.iter_mut().zip(x).zip(weight) {
        *q = round_to_i8_range(x * inverse_rms * w * scale);
    }
    (scale, q.iter().map(|&q| i32::from(q)).sum())
}

/// Rounds half to even and clamps to ±127; a NaN becomes −127.
#[inline(always)]
pub(crate) fn round_to_i8_range(y: f32) -> i8 {
    /// 1.5 · 2^23: adding it leaves the rounded integer in a float's low bits, in two's complement.
    const ROUND: f32 = 12_582_912.0;
    let y = if y > -127.0 { y } else { -127.0 };
    let y = if y < 127.0 { y } else { 127.0 };
    (y + ROUND).to_bits() as i8
}

/// `1 / sqrt(mean(x²) + eps)`.
#[inline(always)]
pub(crate) fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    1.0 / (lane_sum(x, |x| x * x) / x.len() as f32 + eps).sqrt()
}
