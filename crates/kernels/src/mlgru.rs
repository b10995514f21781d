//! The gated recurrence that replaces attention (MLGRU).
//!
//! ```text
//! f_t = β + (1 − β) · sigmoid(f_t)
//! h_t = f_t ⊙ h_{t−1} + silu(i_t) ⊙ (1 − f_t)      i, f, h [T, D], β and the state h_{t−1} [D]
//! ```
//!
//! Channels are independent, so threads share the channels and each walks through time.

pub mod cuda;

use std::ops::Range;

use crate::column_sum::ColumnScratch;
use crate::lanes::{sigmoid, silu, silu_derivative};
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

/// One step of one sequence, on the calling thread: [`forward`] with T = 1.
///
/// # Panics
/// If the shapes do not fit together.
pub fn step(backend: Backend, i: &mut [f32], f: &[f32], lower_bound: &[f32], state: &mut [f32]) {
    assert!(i.len() == state.len() && f.len() == state.len() && lower_bound.len() == state.len());
    step_channels(backend, i, f, lower_bound, state);
}

/// Steps B sequences and keeps every state: `i`, `f`, `h` [B, T, D], `initial` and `last` [B, D].
/// Without `initial` the states begin at zero. `last` becomes `h_T`.
///
/// # Panics
/// If the shapes do not fit together.
#[allow(clippy::too_many_arguments)]
pub fn forward_batch(
    backend: Backend,
    pool: &Pool,
    i: &[f32],
    f: &[f32],
    lower_bound: &[f32],
    initial: Option<&[f32]>,
    h: &mut [f32],
    last: &mut [f32],
) {
    let tasks = Tasks::new(i, last, lower_bound);
    assert!(f.len() == i.len() && h.len() == i.len());
    assert!(initial.is_none_or(|initial| initial.len() == last.len()));
    let (h, last) = (SharedMut::new(h), SharedMut::new(last));
    pool.run(tasks.count(), &|_, task| {
        let Task { state, channels, first } = tasks.get(task);
        let width = channels.len();
        // SAFETY: tasks have disjoint channels of disjoint sequences, and all stays borrowed until they
        // are done.
        let state_now = unsafe { last.slice(state, width) };
        match initial {
            Some(initial) => state_now.copy_from_slice(&initial[state..][..width]),
            None => state_now.fill(0.0),
        }
        for step in 0..tasks.steps {
            let at = first + step * tasks.width;
            // SAFETY: as above.
            let h = unsafe { h.slice(at, width) };
            h.copy_from_slice(&i[at..][..width]);
            step_channels(backend, h, &f[at..][..width], &lower_bound[channels.clone()], state_now);
        }
    });
}

/// Gradients of [`forward_batch`]: sets `di` and `df` [B, T, D], **adds** to `d_lower_bound` `[D]`.
/// `d_state` [B, D] is the gradient of the last states when called and of the initial ones afterwards.
///
/// ```text
/// s = sigmoid(f_t)    r = β + (1 − β) s    e = dh_t + (carry from t + 1)
/// dr = e ⊙ (h_{t−1} − silu(i_t))           di = e ⊙ (1 − r) ⊙ silu'(i_t)
/// df = dr ⊙ (1 − β) ⊙ s ⊙ (1 − s)          dβ = Σ dr ⊙ (1 − s)          carry = e ⊙ r
/// ```
///
/// # Panics
/// If the shapes do not fit together.
#[allow(clippy::too_many_arguments)]
pub fn backward_batch(
    backend: Backend,
    pool: &Pool,
    scratch: &mut ColumnScratch,
    i: &[f32],
    f: &[f32],
    lower_bound: &[f32],
    initial: Option<&[f32]>,
    h: &[f32],
    dh: &[f32],
    di: &mut [f32],
    df: &mut [f32],
    d_lower_bound: &mut [f32],
    d_state: &mut [f32],
) {
    let tasks = Tasks::new(i, d_state, lower_bound);
    assert!([f, h, dh, di, df].iter().all(|x| x.len() == i.len()));
    assert!(d_lower_bound.len() == tasks.width);
    assert!(initial.is_none_or(|initial| initial.len() == d_state.len()));
    let (di, df, carry) = (SharedMut::new(di), SharedMut::new(df), SharedMut::new(d_state));
    let zeros = [0.0; CHANNELS];
    scratch.accumulate_parts(
        pool,
        tasks.count(),
        tasks.sequences,
        d_lower_bound,
        &|task, partials| {
            let Task { state, channels, first } = tasks.get(task);
            let width = channels.len();
            // SAFETY: tasks have disjoint channels of disjoint sequences, and all stays borrowed until they
            // are done.
            let carry = unsafe { carry.slice(state, width) };
            let sequence = task / tasks.blocks();
            // SAFETY: as above; each sequence has a partial sum of its own.
            let d_beta = unsafe { partials.slice(sequence * tasks.width + channels.start, width) };
            for step in (0..tasks.steps).rev() {
                let at = first + step * tasks.width;
                let before = match (step, initial) {
                    (1.., _) => &h[at - tasks.width..][..width],
                    (0, Some(initial)) => &initial[state..][..width],
                    (0, None) => &zeros[..width],
                };
                // SAFETY: as above.
                let (di, df) = unsafe { (di.slice(at, width), df.slice(at, width)) };
                let part = at..at + width;
                step_back(
                    backend,
                    &i[part.clone()],
                    &f[part.clone()],
                    &lower_bound[channels.clone()],
                    before,
                    &dh[part],
                    di,
                    df,
                    d_beta,
                    carry,
                );
            }
        },
    );
}

compiled_for_each_tier! {
    fn step_back(
        i: &[f32],
        f: &[f32],
        lower_bound: &[f32],
        before: &[f32],
        dh: &[f32],
        di: &mut [f32],
        df: &mut [f32],
        d_beta: &mut [f32],
        carry: &mut [f32],
    ) = step_back_body
}

#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn step_back_body(
    i: &[f32],
    f: &[f32],
    lower_bound: &[f32],
    before: &[f32],
    dh: &[f32],
    di: &mut [f32],
    df: &mut [f32],
    d_beta: &mut [f32],
    carry: &mut [f32],
) {
    let inputs = i.iter().zip(f).zip(lower_bound).zip(before).zip(dh);
    let outputs = di.iter_mut().zip(df).zip(d_beta).zip(carry);
    for (((((&i, &f), &beta), &before), &dh), (((di, df), d_beta), carry)) in inputs.zip(outputs) {
        let (input_gate, s) = (sigmoid(i), sigmoid(f));
        let forget = beta + (1.0 - beta) * s;
        let e = dh + *carry;
        let d_forget = e * (before - i * input_gate);
        *di = e * (1.0 - forget) * silu_derivative(i, input_gate);
        *df = d_forget * (1.0 - beta) * (s * (1.0 - s));
        *d_beta += d_forget * (1.0 - s);
        *carry = e * forget;
    }
}

/// A batch of recurrences cut into tasks: some channels of one sequence.
struct Tasks {
    sequences: usize,
    steps: usize,
    /// D.
    width: usize,
}

struct Task {
    /// Where the task's part of the state [B, D] begins.
    state: usize,
    channels: Range<usize>,
    /// Where the task's part of the first step begins.
    first: usize,
}

impl Tasks {
    fn new(i: &[f32], state: &[f32], lower_bound: &[f32]) -> Self {
        let (width, states) = (lower_bound.len(), state.len());
        assert!(width > 0 && states.is_multiple_of(width), "{states} states of {width} channels");
        let sequences = states / width;
        assert!(i.len().is_multiple_of(states.max(1)), "inputs are no whole steps");
        Self { sequences, steps: i.len().checked_div(states).unwrap_or(0), width }
    }

    /// Tasks of a sequence.
    fn blocks(&self) -> usize {
        self.width.div_ceil(CHANNELS)
    }

    fn count(&self) -> usize {
        self.sequences * self.blocks()
    }

    fn get(&self, task: usize) -> Task {
        let (sequence, block) = (task / self.blocks(), task % self.blocks());
        let channels = block * CHANNELS..self.width.min((block + 1) * CHANNELS);
        Task {
            state: sequence * self.width + channels.start,
            first: sequence * self.steps * self.width + channels.start,
            channels,
        }
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

/// Gradients of [`lower_bounds`]: **adds** to `d_bounds` [L, D]. With `p = softmax_layers(bounds)` and
/// `G_k = Σ_{l ≥ k} dβ_l` for k ≥ 1, `G_0 = 0`:
///
/// ```text
/// d bounds_k = p_k · (G_k − Σ_j p_j G_j)
/// ```
///
/// # Panics
/// If the shapes do not fit together.
pub fn lower_bounds_backward(
    bounds: &[f32],
    channels: usize,
    d_betas: &[f32],
    d_bounds: &mut [f32],
) {
    assert!(channels > 0 && bounds.len().is_multiple_of(channels));
    assert!(d_betas.len() == bounds.len() && d_bounds.len() == bounds.len());
    let layers = bounds.len() / channels;
    let (mut p, mut g) = (vec![0.0f64; layers], vec![0.0f64; layers]);
    for channel in 0..channels {
        let at = |layer: usize| layer * channels + channel;
        let largest = (0..layers).fold(f64::NEG_INFINITY, |a, k| a.max(f64::from(bounds[at(k)])));
        for (k, p) in p.iter_mut().enumerate() {
            *p = (f64::from(bounds[at(k)]) - largest).exp();
        }
        let total: f64 = p.iter().sum();
        p.iter_mut().for_each(|p| *p /= total);
        let mut sum = 0.0;
        for k in (1..layers).rev() {
            sum += f64::from(d_betas[at(k)]);
            g[k] = sum;
        }
        let mean: f64 = p.iter().zip(&g).map(|(p, g)| p * g).sum();
        for k in 0..layers {
            d_bounds[at(k)] += (p[k] * (g[k] - mean)) as f32;
        }
    }
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
