//! AdamW as PyTorch computes it, the norm of gradients and the factor that clips them.
//!
//! ```text
//! g = gradient · gradient_scale
//! p = p · (1 − lr · weight_decay)
//! m = m + (1 − β₁) (g − m)        v = β₂ v + (1 − β₂) g²
//! p = p − lr / (1 − β₁ᵗ) · m / (sqrt(v) / sqrt(1 − β₂ᵗ) + ε)
//! ```

use crate::pool::{Pool, SharedMut};
use crate::tier::{Backend, compiled_for_each_tier};

/// Elements of one task.
const TASK: usize = 1 << 14;

/// The constants of one step for one group of parameters.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// lr.
    pub learning_rate: f64,
    /// β₁.
    pub beta1: f64,
    /// β₂.
    pub beta2: f64,
    /// ε.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// t, 1 for the first step.
    pub step: u64,
}

/// The constants as every element uses them.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Factors {
    pub keep: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    /// 1 / sqrt(1 − β₂ᵗ)
    correction2: f32,
    eps: f32,
    /// lr / (1 − β₁ᵗ)
    step_size: f32,
}

impl AdamW {
    /// What every element is multiplied with.
    pub(crate) fn factors(&self) -> Factors {
        let Self { learning_rate, beta1, beta2, eps, weight_decay, step } = *self;
        let power = |beta: f64| beta.powf(step as f64);
        Factors {
            keep: (1.0 - learning_rate * weight_decay) as f32,
            one_minus_beta1: (1.0 - beta1) as f32,
            beta2: beta2 as f32,
            one_minus_beta2: (1.0 - beta2) as f32,
            correction2: (1.0 / (1.0 - power(beta2)).sqrt()) as f32,
            eps: eps as f32,
            step_size: (learning_rate / (1.0 - power(beta1))) as f32,
        }
    }
}

/// What a global gradient norm asks gradients to be multiplied by: `max_norm / (norm + 1e-6)`, at most 1, as
/// PyTorch has it. `max_norm` 0 does not clip.
pub fn clip_factor(norm: f64, max_norm: f64) -> f32 {
    if max_norm > 0.0 { (max_norm / (norm + 1e-6)).min(1.0) as f32 } else { 1.0 }
}

/// The norm of gradients and the factor that clips them, of a step: from the last factor, all losses and sums of squares.
///
/// The factor is NaN, for a step that changes nothing, if the norm or a loss is not finite or the last factor was NaN:
/// the steps that follow such a one change nothing, either.
pub fn clip(factor: f64, losses: &[f64], squares: &[f64], max_norm: f64) -> (f64, f64) {
    let norm = squares.iter().sum::<f64>().sqrt();
    let usable = norm.is_finite() && !factor.is_nan() && losses.iter().all(|loss| loss.is_finite());
    (norm, if usable { f64::from(clip_factor(norm, max_norm)) } else { f64::NAN })
}

/// Updates parameters and both moments, all of one length. `gradient_scale` multiplies gradients first.
///
/// # Panics
/// If the lengths differ.
#[allow(clippy::too_many_arguments)]
pub fn step(
    backend: Backend,
    pool: &Pool,
    constants: &AdamW,
    gradient_scale: f32,
    parameters: &mut [f32],
    gradients: &[f32],
    first_moment: &mut [f32],
    second_moment: &mut [f32],
) {
    let len = parameters.len();
    assert!([gradients.len(), first_moment.len(), second_moment.len()] == [len; 3]);
    let factors = constants.factors();
    let (m, v) = (SharedMut::new(first_moment), SharedMut::new(second_moment));
    pool.for_each_chunk(parameters, TASK, &|_, task, parameters| {
        let (from, len) = (task * TASK, parameters.len());
        // SAFETY: tasks have disjoint parts, and both stay borrowed until all are done.
        let (m, v) = unsafe { (m.slice(from, len), v.slice(from, len)) };
        update(backend, factors, gradient_scale, parameters, &gradients[from..from + len], m, v);
    });
}

compiled_for_each_tier! {
    fn update(factors: Factors, scale: f32, p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32])
        = update_body
}

#[inline(always)]
fn update_body(
    factors: Factors,
    scale: f32,
    p: &mut [f32],
    g: &[f32],
    m: &mut [f32],
    v: &mut [f32],
) {
    for (((p, &g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
        let g = g * scale;
        *m += factors.one_minus_beta1 * (g - *m);
        *v = factors.beta2 * *v + factors.one_minus_beta2 * (g * g);
        let denominator = v.sqrt() * factors.correction2 + factors.eps;
        *p = *p * factors.keep - factors.step_size * (*m / denominator);
    }
}

/// `Σ x²` in f64, in an order that depends on the length alone.
pub fn sum_of_squares(backend: Backend, pool: &Pool, x: &[f32]) -> f64 {
    let mut sums = vec![0.0f64; x.len().div_ceil(TASK)];
    pool.for_each_chunk(&mut sums, 1, &|_, task, sum| {
        let from = task * TASK;
        sum[0] = squares(backend, &x[from..x.len().min(from + TASK)]);
    });
    sums.into_iter().sum()
}

compiled_for_each_tier! {
    fn squares(x: &[f32]) -> f64 = squares_body
}

#[inline(always)]
fn squares_body(x: &[f32]) -> f64 {
    let mut lanes = [0.0f64; 16];
    for chunk in x.chunks(lanes.len()) {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(x) * f64::from(x);
        }
    }
    lanes.into_iter().sum()
}
