//! The channel mixer's gated linear unit.
//!
//! ```text
//! y = silu(a) ⊙ b                               [a b] [M, 2F], y [M, F]
//! ```

use crate::lanes::silu;
use crate::pool::Pool;
use crate::tier::{Backend, compiled_for_each_tier};

/// Writes `silu(a) ⊙ b` to `y`, with `a` the first and `b` the second half of each row of `ab`.
///
/// # Panics
/// If the shapes do not fit together.
pub fn forward(backend: Backend, pool: &Pool, ab: &[f32], width: usize, y: &mut [f32]) {
    assert!(ab.len() == 2 * y.len() && y.len().is_multiple_of(width));
    pool.for_each_chunk(y, width, &|_, row, y| {
        let (a, b) = ab[2 * width * row..][..2 * width].split_at(width);
        rows(backend, a, b, y);
    });
}

compiled_for_each_tier! {
    fn rows(a: &[f32], b: &[f32], y: &mut [f32]) = body
}

#[inline(always)]
fn body(a: &[f32], b: &[f32], y: &mut [f32]) {
    for ((y, &a), &b) in y.iter_mut().zip(a).zip(b) {
        *y = silu(a) * b;
    }
}
