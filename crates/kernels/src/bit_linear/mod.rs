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

mod input_gradient;

use self::input_gradient::InputGradientScratch;
use crate::activations::{inverse_rms, round_to_i8_range};
use crate::column_sum::ColumnScratch;
use crate::gemm::{self, Matrix};
use crate::lanes::lane_max;
use crate::pool::Pool;
use crate::rms_norm;
use crate::tier::{Backend, compiled_for_each_tier};

/// Working memory. Grows to the largest layer and batch.
#[derive(Debug)]
pub struct BitLinearScratch {
    /// q / s, [M, K].
    inputs: Vec<f32>,
    /// Gradient of the normalised input, [M, K].
    d_normed: Vec<f32>,
    columns: ColumnScratch,
    products: InputGradientScratch,
}

impl BitLinearScratch {
    /// Empty scratch for a pool of `threads` threads.
    pub fn new(threads: usize) -> Self {
        Self {
            inputs: Vec::new(),
            d_normed: Vec::new(),
            columns: ColumnScratch::new(),
            products: InputGradientScratch::new(threads),
        }
    }

    /// Grows for a layer and a batch, so that [`backward`] need not allocate.
    pub fn reserve(&mut self, tokens: usize, outputs: usize, inputs: usize) {
        grow(&mut self.inputs, tokens * inputs);
        grow(&mut self.d_normed, tokens * inputs);
        self.products.reserve(outputs, inputs);
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
    let inputs = Matrix::new(inputs, rows, cols);
    let d_outputs = Matrix::new(dy, rows, outputs).transposed();
    gemm::multiply(pool, d_outputs, inputs, 1.0, true, d_weight);

    let d_normed = grow(&mut scratch.d_normed, rows * cols);
    let products = &mut scratch.products;
    let BitLinear { weight, scale, .. } = layer;
    input_gradient::multiply(backend, pool, products, dy, weight, scale, cols, d_normed);
    let columns = &mut scratch.columns;
    rms_norm::backward(backend, pool, columns, x, layer.norm, layer.eps, d_normed, dx, d_norm);
}

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
