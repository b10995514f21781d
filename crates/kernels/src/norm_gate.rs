//! The token mixer's output gate: the gate is normalised, the recurrent state is its swish factor.
//!
//! ```text
//! y = RMSNorm(g; w, ε) ⊙ silu(h)                g, h, y [M, D], w [D]
//! ```

use crate::activations::inverse_rms;
use crate::lanes::silu;
use crate::pool::Pool;
use crate::tier::{Backend, compiled_for_each_tier};

/// Replaces `g` by `RMSNorm(g; weight, eps) ⊙ silu(h)`.
///
/// # Panics
/// If the shapes do not fit together.
pub fn forward(backend: Backend, pool: &Pool, g: &mut [f32], h: &[f32], weight: &[f32], eps: f32) {
    assert!(g.len() == h.len() && g.len().is_multiple_of(weight.len()));
    pool.for_each_chunk(g, weight.len(), &|_, row, g| {
        rows(backend, g, &h[row * weight.len()..][..weight.len()], weight, eps);
    });
}

compiled_for_each_tier! {
    fn rows(g: &mut [f32], h: &[f32], weight: &[f32], eps: f32) = body
}

#[inline(always)]
fn body(g: &mut [f32], h: &[f32], weight: &[f32], eps: f32) {
    let inverse_rms = inverse_rms(g, eps);
    for ((g, &h), &w) in g.iter_mut().zip(h).zip(weight) {
        *g = *g * inverse_rms * w * silu(h);
    }
}
