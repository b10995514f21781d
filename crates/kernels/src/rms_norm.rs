//! Root-mean-square norm.
//!
//! ```text
//! y = x · (1 / sqrt(mean(x²) + ε)) · w          x, y [M, D], w [D]
//! ```

use crate::activations::inverse_rms;
use crate::column_sum::ColumnScratch;
use crate::lanes::lane_sum3;
use crate::pool::{Pool, SharedMut};
use crate::tier::{Backend, compiled_for_each_tier};

/// Writes `RMSNorm(x; weight, eps)` to `y`.
///
/// # Panics
/// If the shapes do not fit together.
pub fn forward(backend: Backend, pool: &Pool, x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
    assert!(x.len() == y.len() && x.len().is_multiple_of(weight.len()));
    pool.for_each_chunk(y, weight.len(), &|_, row, y| {
        rows(backend, &x[row * weight.len()..][..weight.len()], weight, eps, y);
    });
}

compiled_for_each_tier! {
    fn rows(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) = body
}

#[inline(always)]
fn body(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
    let inverse_rms = inverse_rms(x, eps);
    for ((y, &x), &w) in y.iter_mut().zip(x).zip(weight) {
        *y = x * inverse_rms * w;
    }
}

/// Gradients: **adds** to `dx` [M, D] and to `d_weight` `[D]`.
///
/// ```text
/// r = 1 / sqrt(mean(x²) + ε)
/// dx = r · (dy ⊙ w − x · r² · mean(dy ⊙ w ⊙ x))
/// dw = Σ_m dy ⊙ x · r
/// ```
///
/// # Panics
/// If the shapes do not fit together.
#[allow(clippy::too_many_arguments)]
pub fn backward(
    backend: Backend,
    pool: &Pool,
    scratch: &mut ColumnScratch,
    x: &[f32],
    weight: &[f32],
    eps: f32,
    dy: &[f32],
    dx: &mut [f32],
    d_weight: &mut [f32],
) {
    let width = weight.len();
    assert!(x.len().is_multiple_of(width) && dy.len() == x.len());
    assert!(dx.len() == x.len() && d_weight.len() == width);
    let rows = x.len() / width;
    let dx = SharedMut::new(dx);
    scratch.accumulate(pool, rows, d_weight, &|row, d_weight| {
        let part = row * width..(row + 1) * width;
        // SAFETY: each row is one task's alone, and `dx` stays borrowed until all are done.
        let dx = unsafe { dx.slice(part.start, width) };
        backward_row(backend, &x[part.clone()], weight, eps, &dy[part], dx, d_weight);
    });
}

compiled_for_each_tier! {
    fn backward_row(
        x: &[f32],
        weight: &[f32],
        eps: f32,
        dy: &[f32],
        dx: &mut [f32],
        d_weight: &mut [f32],
    ) = backward_body
}

#[inline(always)]
fn backward_body(
    x: &[f32],
    weight: &[f32],
    eps: f32,
    dy: &[f32],
    dx: &mut [f32],
    d_weight: &mut [f32],
) {
    let inverse_rms = inverse_rms(x, eps);
    let dot = lane_sum3(x, weight, dy, |x, w, dy| dy * w * x);
    let slope = inverse_rms * inverse_rms * (dot / x.len() as f32);
    let inputs = x.iter().zip(weight).zip(dy);
    for (((&x, &w), &dy), (dx, dw)) in inputs.zip(dx.iter_mut().zip(d_weight)) {
        *dx += inverse_rms * (dy * w - x * slope);
        *dw += dy * (x * inverse_rms);
    }
}
