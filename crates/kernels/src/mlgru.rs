//! The gated recurrence that replaces attention (MLGRU).
//!
//! ```text
//! f_t = β + (1 − β) · sigmoid(f_t)
//! h_t = f_t ⊙ h_{t−1} + silu(i_t) ⊙ (1 − f_t)      i, f, h [T, D], β and the state h_{t−1} [D]
//! ```
//!
//! Channels are independent, so threads share the channels and each walks through time.

pub mod cuda;

use crate::lanes::{sigmoid, silu};
use crate::pool::{Pool, SharedMut};
use crate::tier::{Backend, compiled_for_each_tier};

/// Channels of one task: enough that a row of them fills vectors, few enough that threads share a
/// layer.
const CHANNELS: usize = 128;
/// Below this many steps times channels, one thread is faster than sharing.
const SHARED_MIN_ELEMENTS: usize = 16 << 10;

/// Steps one sequence: replaces the input `i` [T, D] by the states `h_t`, reads the forget gate before
/// its sigmoid from `f` [T, D], and leaves `state` `[D]` at `h_T`.
///
/// # Panics
/// If the shapes do not fit together.
pub fn forward(
    backend: Backend,
    pool: &Pool,
    i: &mut [f32],
    f: &[f32],
    lower_bound: &[f32],
    state: &mut [f32],
) {
    let channels = state.len();
    assert!(i.len() == f.len() && i.len().is_multiple_of(channels));
    assert!(lower_bound.len() == channels);
    let steps = i.len() / channels;
    let per_task = if i.len() < SHARED_MIN_ELEMENTS { channels } else { CHANNELS };
    let i = SharedMut::new(i);
    pool.for_each_chunk(state, per_task, &|_, task, state| {
        let first = task * per_task;
        for step in 0..steps {
            let at = step * channels + first;
            // SAFETY: tasks have disjoint channels, and `i` stays borrowed until all are done.
            let i = unsafe { i.slice(at, state.len()) };
            step_channels(
                backend,
                i,
                &f[at..][..state.len()],
                &lower_bound[first..][..state.len()],
                state,
            );
        }
    });
}

compiled_for_each_tier! {
    fn step_channels(i: &mut [f32], f: &[f32], lower_bound: &[f32], state: &mut [f32]) = body
}

#[inline(always)]
fn body(i: &mut [f32], f: &[f32], lower_bound: &[f32], state: &mut [f32]) {
    for (((i, &f), &beta), h) in i.iter_mut().zip(f).zip(lower_bound).zip(state) {
        let forget = beta + (1.0 - beta) * sigmoid(f);
        *h = forget * *h + silu(*i) * (1.0 - forget);
        *i = *h;
    }
}

/// `β = cumsum_layers(softmax_layers(bounds)) − softmax_layers(bounds)[0]`, [L, D], so that β of the
/// first layer is 0. Computed in f64 once, when a model is loaded.
///
/// # Panics
/// If `bounds` is not a whole number of rows of `channels`.
pub fn lower_bounds(bounds: &[f32], channels: usize) -> Vec<f32> {
    assert!(channels > 0 && bounds.len().is_multiple_of(channels));
    let mut betas = vec![0.0f32; bounds.len()];
    for channel in 0..channels {
        let column = || bounds[channel..].iter().step_by(channels).map(|&b| f64::from(b));
        let largest = column().fold(f64::NEG_INFINITY, f64::max);
        let total: f64 = column().map(|b| (b - largest).exp()).sum();
        let mut sum = 0.0;
        for (layer, bound) in column().enumerate().skip(1) {
            sum += (bound - largest).exp() / total;
            betas[layer * channels + channel] = sum as f32;
        }
    }
    betas
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lower_bounds_grow_from_zero() {
        let betas = lower_bounds(&[0.0, 1.0, 0.0, 2.0, 0.0, 3.0], 2);
        assert_eq!(betas[..2], [0.0, 0.0]);
        assert!((betas[2] - 1.0 / 3.0).abs() < 1e-7 && (betas[4] - 2.0 / 3.0).abs() < 1e-7);
        let total = 1f64.exp() + 2f64.exp() + 3f64.exp();
        assert!((f64::from(betas[5]) - (2f64.exp() + 3f64.exp()) / total).abs() < 1e-7);
    }
}
