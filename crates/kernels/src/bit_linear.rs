//! Gradients of a BitLinear layer: RMSNorm, 8-bit quantiser and ternary product in one.
//!
//! ```text
//! n = RMSNorm(x; w_n, ε)     q, s = Q8(n)     y = (q · tᵀ) γ / s           x [M, K], W ~ t γ [N, K], y [M, N]
//! dn = dy · t γ              dW = dyᵀ · (q / s)                            straight through both quantisers
//! dx, dw_n = RMSNorm'(x; dn)
//! ```
//!
//! The forward pass is [`QuantizedRows::assign_rms_norm`](crate::activations::QuantizedRows::assign_rms_norm)
//! and [`ternary_gemm::multiply`](crate::ternary_gemm::multiply). Nothing of it is stored: norm, integers and
//! trits are computed again here.

use crate::activations::{inverse_rms, round_to_i8_range};
use crate::column_sum::ColumnScratch;
use crate::gemm::{self, Matrix};
use crate::lanes::lane_max;
use crate::pool::Pool;
use crate::rms_norm;
use crate::tier::{Backend, compiled_for_each_tier};

/// Working memory. Grows to the largest layer and batch.
#[derive(Debug, Default)]
pub struct BitLinearScratch {
    /// q / s, [M, K].
    inputs: Vec<f32>,
    /// t, [N, K].
    trits: Vec<f32>,
    /// Gradient of the normalised input, [M, K].
    d_normed: Vec<f32>,
    columns: ColumnScratch,
}

impl BitLinearScratch {
    /// Empty scratch.
    pub fn new() -> Self {
        Self::default()
    }

    /// Grows for a layer and a batch, so that [`backward`] need not allocate.
    pub fn reserve(&mut self, tokens: usize, outputs: usize, inputs: usize) {
        grow(&mut self.inputs, tokens * inputs);
        grow(&mut self.d_normed, tokens * inputs);
        grow(&mut self.trits, outputs * inputs);
    }
}

fn grow(memory: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if memory.len() < len {
        memory.resize(len, 0.0);
    }
    &mut memory[..len]
}

/// The layer's parameters.
#[derive(Clone, Copy, Debug)]
pub struct BitLinear<'a> {
    /// w_n `[K]`.
    pub norm: &'a [f32],
    /// ε of the inner norm.
    pub eps: f32,
    /// W [N, K] in full precision.
    pub weight: &'a [f32],
    /// γ of W.
    pub scale: f32,
}

/// **Adds** to `dx` [M, K], `d_norm` `[K]` and `d_weight` [N, K].
///
/// # Panics
/// If the shapes do not fit together.
#[allow(clippy::too_many_arguments)]
pub fn backward(
    backend: Backend,
    pool: &Pool,
    scratch: &mut BitLinearScratch,
    layer: BitLinear<'_>,
    x: &[f32],
    dy: &[f32],
    dx: &mut [f32],
    d_norm: &mut [f32],
    d_weight: &mut [f32],
) {
    let cols = layer.norm.len();
    assert!(cols > 0 && x.len().is_multiple_of(cols) && layer.weight.len().is_multiple_of(cols));
    let (rows, outputs) = (x.len() / cols, layer.weight.len() / cols);
    assert!(dy.len() == rows * outputs && dx.len() == x.len());
    assert!(d_norm.len() == cols && d_weight.len() == layer.weight.len());
    let inputs = grow(&mut scratch.inputs, rows * cols);
    pool.for_each_chunk(inputs, cols, &|_, row, out| {
        fake_quantize(backend, &x[row * cols..][..cols], layer.norm, layer.eps, out);
    });
    let dy = Matrix::new(dy, rows, outputs);
    let inputs = Matrix::new(inputs, rows, cols);
    gemm::multiply(pool, dy.transposed(), inputs, 1.0, true, d_weight);

    let trits = grow(&mut scratch.trits, outputs * cols);
    let inverse = 1.0 / layer.scale;
    pool.for_each_chunk(trits, TRITS_TASK, &|_, task, trits| {
        let weight = &layer.weight[task * TRITS_TASK..][..trits.len()];
        float_trits(backend, weight, inverse, trits);
    });
    let d_normed = grow(&mut scratch.d_normed, rows * cols);
    let trits = Matrix::new(trits, outputs, cols);
    gemm::multiply(pool, dy, trits, layer.scale, false, d_normed);
    let columns = &mut scratch.columns;
    rms_norm::backward(backend, pool, columns, x, layer.norm, layer.eps, d_normed, dx, d_norm);
}

/// Weights of one task.
const TRITS_TASK: usize = 1 << 14;

compiled_for_each_tier! {
    /// `q / s` of one row: what the product sees of the normalised input.
    fn fake_quantize(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) = fake_quantize_body
}

#[inline(always)]
fn fake_quantize_body(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let inverse_rms = inverse_rms(x, eps);
    let largest = lane_max(x, weight, |x, w| (x * inverse_rms * w).abs());
    let scale = 127.0 / largest.max(1e-5);
    let step = 1.0 / scale;
    for ((out, &x), &w) in out.iter_mut().zip(x).zip(weight) {
        *out = f32::from(round_to_i8_range(x * inverse_rms * w * scale)) * step;
    }
}

compiled_for_each_tier! {
    /// Trits as floats.
    fn float_trits(weights: &[f32], inverse: f32, trits: &mut [f32]) = float_trits_body
}

#[inline(always)]
fn float_trits_body(weights: &[f32], inverse: f32, trits: &mut [f32]) {
    for (trit, &w) in trits.iter_mut().zip(weights) {
        let scaled = w * inverse;
        let sign = if scaled > 0.0 { 1.0 } else { -1.0 };
        *trit = if scaled.abs() > 0.5 { sign } else { 0.0 };
    }
}
