//! The token mixer's output gate: the gate is normalised, the recurrent state is its swish factor.
//!
//! ```text
//! y = RMSNorm(g; w, ε) ⊙ silu(h)                g, h, y [M, D], w [D]
//! ```

use crate::activations::inverse_rms;
use crate::column_sum::ColumnScratch;
use crate::lanes::{lane_sum3, sigmoid, silu, silu_derivative};
use crate::pool::{Pool, SharedMut};
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

/// Gradients: sets `dg` and `dh` [M, D], **adds** to `d_weight` `[D]`.
///
/// ```text
/// r = 1 / sqrt(mean(g²) + ε)        n = dy ⊙ silu(h)
/// dg = r · (n ⊙ w − g · r² · mean(n ⊙ w ⊙ g))
/// dh = dy ⊙ g · r ⊙ w ⊙ silu'(h)
/// dw = Σ_m n ⊙ g · r
/// ```
///
/// # Panics
/// If the shapes do not fit together.
#[allow(clippy::too_many_arguments)]
pub fn backward(
    backend: Backend,
    pool: &Pool,
    scratch: &mut ColumnScratch,
    g: &[f32],
    h: &[f32],
    weight: &[f32],
    eps: f32,
    dy: &[f32],
    dg: &mut [f32],
    dh: &mut [f32],
    d_weight: &mut [f32],
) {
    let width = weight.len();
    assert!(g.len().is_multiple_of(width) && h.len() == g.len() && dy.len() == g.len());
    assert!(dg.len() == g.len() && dh.len() == g.len() && d_weight.len() == width);
    let rows = g.len() / width;
    let (dg, dh) = (SharedMut::new(dg), SharedMut::new(dh));
    scratch.accumulate(pool, rows, d_weight, &|row, d_weight| {
        let part = row * width..(row + 1) * width;
        // SAFETY: each row is one task's alone, and both stay borrowed until all are done.
        let (dg, dh) = unsafe { (dg.slice(part.start, width), dh.slice(part.start, width)) };
        let (g, h, dy) = (&g[part.clone()], &h[part.clone()], &dy[part]);
        backward_row(backend, g, h, weight, eps, dy, dg, dh, d_weight);
    });
}

compiled_for_each_tier! {
    fn backward_row(
        g: &[f32],
        h: &[f32],
        weight: &[f32],
        eps: f32,
        dy: &[f32],
        dg: &mut [f32],
        dh: &mut [f32],
        d_weight: &mut [f32],
    ) = backward_body
}

#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn backward_body(
    g: &[f32],
    h: &[f32],
    weight: &[f32],
    eps: f32,
    dy: &[f32],
    dg: &mut [f32],
    dh: &mut [f32],
    d_weight: &mut [f32],
) {
    let inverse_rms = inverse_rms(g, eps);
    // `dg` holds n until the mean is known.
    for (((&g, &h), &dy), (&w, (n, (dh, dw)))) in g
        .iter()
        .zip(h)
        .zip(dy)
        .zip(weight.iter().zip(dg.iter_mut().zip(dh.iter_mut().zip(d_weight))))
    {
        let gate = sigmoid(h);
        let normed = g * inverse_rms;
        *n = dy * (h * gate);
        *dw += *n * normed;
        *dh = dy * (normed * w) * silu_derivative(h, gate);
    }
    let dot = lane_sum3(dg, weight, g, |n, w, g| n * w * g);
    let slope = inverse_rms * inverse_rms * (dot / g.len() as f32);
    for ((dg, &w), &g) in dg.iter_mut().zip(weight).zip(g) {
        *dg = inverse_rms * (*dg * w - g * slope);
    }
}
