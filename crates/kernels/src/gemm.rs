//! Dense products in f32, through the `gemm` crate.
//!
//! ```text
//! C = factor · A B   or   C += factor · A B          A [M, K], B [K, N], C [M, N]
//! ```
//!
//! Rows of C are cut into blocks that depend on the shape alone, each computed by one thread, so results are
//! the same bits on any number of threads. They are not the same bits on every processor: the crate chooses
//! its instructions (with fused multiply-add) and its blocking by itself. Budget: `4 · 2⁻²⁴ · Σ |a b|`
//! for each element of shapes up to thousands, tested.

use crate::pool::Pool;

/// Rows of one task.
const TASK_ROWS: usize = 128;
/// Below this many multiplications one thread is faster than sharing.
const SHARED_MIN_WORK: usize = 1 << 18;

/// A matrix in a slice, of any strides.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    values: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Matrix<'a> {
    /// A row-major matrix that fills the slice.
    ///
    /// # Panics
    /// If the slice has another length.
    pub fn new(values: &'a [f32], rows: usize, cols: usize) -> Self {
        assert!(values.len() == rows * cols, "{} values for {rows} x {cols}", values.len());
        Self { values, rows, cols, row_stride: cols, col_stride: 1 }
    }

    /// The transpose, of the same values.
    pub fn transposed(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }

    /// The element at (row, col).
    ///
    /// # Panics
    /// If the position lies outside the matrix.
    pub fn get(&self, row: usize, col: usize) -> f32 {
        assert!(row < self.rows && col < self.cols, "({row}, {col}) lies outside the matrix");
        self.values[row * self.row_stride + col * self.col_stride]
    }

    /// Rows `first .. first + rows`.
    fn rows(self, first: usize, rows: usize) -> Self {
        assert!(first + rows <= self.rows);
        let values =
            if self.cols == 0 || rows == 0 { &[] } else { &self.values[first * self.row_stride..] };
        Self { values, rows, ..self }
    }
}

/// Writes `factor · A B` to `out`, row-major, or adds it if `accumulate`.
///
/// # Panics
/// If the shapes do not fit together.
pub fn multiply(
    pool: &Pool,
    a: Matrix<'_>,
    b: Matrix<'_>,
    factor: f32,
    accumulate: bool,
    out: &mut [f32],
) {
    assert!(a.cols == b.rows && out.len() == a.rows * b.cols, "shapes of a product do not fit");
    if out.is_empty() {
        return;
    }
    if a.rows * a.cols * b.cols < SHARED_MIN_WORK {
        return multiply_alone(a, b, factor, accumulate, out);
    }
    let cols = b.cols;
    pool.for_each_chunk(out, TASK_ROWS * cols, &|_, block, out| {
        let rows = a.rows(block * TASK_ROWS, out.len() / cols);
        multiply_alone(rows, b, factor, accumulate, out);
    });
}

/// [`multiply`] on the calling thread, in one piece.
///
/// # Panics
/// If the shapes do not fit together.
pub fn multiply_alone(
    a: Matrix<'_>,
    b: Matrix<'_>,
    factor: f32,
    accumulate: bool,
    out: &mut [f32],
) {
    assert!(a.cols == b.rows && out.len() == a.rows * b.cols, "shapes of a product do not fit");
    let stride = |stride: usize| isize::try_from(stride).expect("strides lie inside a slice");
    // The crate wants columns of C to be contiguous, so it computes Cᵀ = Bᵀ Aᵀ.
    let (lhs, rhs) = (b.transposed(), a.transposed());
    // SAFETY: `Matrix` is only made of slices that hold all its elements (`new` checks the length,
    // transposing keeps the set of elements, `rows` stays inside), and `out` has M N elements.
    // `out` is borrowed mutably, so it overlaps neither input.
    unsafe {
        gemm_f32::gemm::f32::get_gemm_fn()(
            lhs.rows,
            rhs.cols,
            lhs.cols,
            out.as_mut_ptr(),
            stride(b.cols),
            1,
            accumulate,
            lhs.values.as_ptr(),
            stride(lhs.col_stride),
            stride(lhs.row_stride),
            rhs.values.as_ptr(),
            stride(rhs.col_stride),
            stride(rhs.row_stride),
            1.0,
            factor,
            false,
            false,
            false,
            gemm_common::Parallelism::None,
        );
    }
}
