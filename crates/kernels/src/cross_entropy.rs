//! Cross-entropy of logits, and its gradient in their place.
//!
//! ```text
//! loss[m] = ln Σ_v exp(z[m, v]) − z[m, target[m]]
//! dz[m, v] = scale · (exp(z[m, v]) / Σ_v exp(z[m, v]) − [v = target[m]])
//! ```

use crate::lanes::{exp, lane_sum};
use crate::pool::{Pool, SharedMut};
use crate::tier::{Backend, compiled_for_each_tier};

/// Target of a row without one: its loss and gradient are zero.
pub const IGNORED: u32 = u32::MAX;

/// Writes the losses `[M]` of logits [M, V]. With `scale` the logits become their gradients, without
/// they are undefined afterwards.
///
/// # Panics
/// If the shapes do not fit together or a target is outside the vocabulary.
pub fn forward_backward(
    backend: Backend,
    pool: &Pool,
    logits: &mut [f32],
    targets: &[u32],
    scale: Option<f32>,
    losses: &mut [f64],
) {
    assert!(losses.len() == targets.len());
    if targets.is_empty() {
        return;
    }
    assert!(logits.len().is_multiple_of(targets.len()), "logits are no whole rows");
    let vocabulary = logits.len() / targets.len();
    assert!(targets.iter().all(|&id| id == IGNORED || (id as usize) < vocabulary));
    let losses = SharedMut::new(losses);
    pool.for_each_chunk(logits, vocabulary, &|_, row, logits| {
        // SAFETY: each row has its own loss, and the slice stays borrowed until all are done.
        let loss = unsafe { &mut losses.slice(row, 1)[0] };
        if targets[row] == IGNORED {
            *loss = 0.0;
            if scale.is_some() {
                logits.fill(0.0);
            }
            return;
        }
        let target = targets[row] as usize;
        let expected = logits[target];
        let (largest, sum) = exponentials(backend, logits);
        *loss = f64::from(sum).ln() + f64::from(largest) - f64::from(expected);
        if let Some(scale) = scale {
            multiply(backend, logits, scale / sum);
            logits[target] -= scale;
        }
    });
}

compiled_for_each_tier! {
    /// Replaces a row by `exp(z − max z)`; returns the maximum and the sum.
    fn exponentials(logits: &mut [f32]) -> (f32, f32) = exponentials_body
}

#[inline(always)]
fn exponentials_body(logits: &mut [f32]) -> (f32, f32) {
    let mut lanes = [f32::NEG_INFINITY; 32];
    for chunk in logits.chunks(lanes.len()) {
        for (lane, &z) in lanes.iter_mut().zip(chunk) {
            *lane = if z > *lane { z } else { *lane };
        }
    }
    let largest = lanes.into_iter().fold(f32::NEG_INFINITY, f32::max);
    for z in logits.iter_mut() {
        *z = exp(*z - largest);
    }
    (largest, lane_sum(logits, |e| e))
}

compiled_for_each_tier! {
    fn multiply(x: &mut [f32], factor: f32) = multiply_body
}

#[inline(always)]
fn multiply_body(x: &mut [f32], factor: f32) {
    for x in x {
        *x *= factor;
    }
}
