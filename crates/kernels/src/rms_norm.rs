//! Root-mean-square norm.
//!
//! ```text
//! y = x · (1 / sqrt(mean(x²) + ε)) · w          x, y [M, D], w [D]
//! ```

use crate::activations::inverse_rms;
use crate::pool::Pool;
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
