//! The channel mixer's gated linear unit.
//!
//! ```text
//! y = silu(a) ⊙ b                               [a b] [M, 2F], y [M, F]
//! ```

use crate::lanes::{sigmoid, silu, silu_derivative};
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

/// Gradients: sets `d_ab` [M, 2F].
///
/// ```text
/// da = dy ⊙ b ⊙ silu'(a)        db = dy ⊙ silu(a)
/// ```
///
/// # Panics
/// If the shapes do not fit together.
pub fn backward(
    backend: Backend,
    pool: &Pool,
    ab: &[f32],
    width: usize,
    dy: &[f32],
    d_ab: &mut [f32],
) {
    assert!(ab.len() == 2 * dy.len() && dy.len().is_multiple_of(width) && d_ab.len() == ab.len());
    pool.for_each_chunk(d_ab, 2 * width, &|_, row, d_ab| {
        let (a, b) = ab[2 * width * row..][..2 * width].split_at(width);
        let (da, db) = d_ab.split_at_mut(width);
        backward_row(backend, a, b, &dy[width * row..][..width], da, db);
    });
}

compiled_for_each_tier! {
    fn backward_row(a: &[f32], b: &[f32], dy: &[f32], da: &mut [f32], db: &mut [f32])
        = backward_body
}

#[inline(always)]
fn backward_body(a: &[f32], b: &[f32], dy: &[f32], da: &mut [f32], db: &mut [f32]) {
    for (((&a, &b), &dy), (da, db)) in a.iter().zip(b).zip(dy).zip(da.iter_mut().zip(db)) {
        let gate = sigmoid(a);
        *da = dy * b * silu_derivative(a, gate);
        *db = dy * (a * gate);
    }
}
