//! Blocks of the MatMul-free model.
//!
//! ```text
//! i, f, g = BitLinear_{i,f,g}(RMSNorm(x))
//! h = MLGRU(i, f; β)
//! m = x + BitLinear_o(RMSNorm(g) ⊙ silu(h))
//! a, b = BitLinear_gate(RMSNorm(m))
//! output = m + BitLinear_down(silu(a) ⊙ b)
//! ```

use std::ops::Range;

use mmfree::config::ModelConfig;
use mmfree::error::Result;

use super::{Blocks, Builder};
use crate::backend::{Backend, BatchShape, Memory, Norm, Parameters, Precision, Projection};

pub(super) struct MatMulFree<B: Memory> {
    layers: Vec<Layer>,
    shape: BatchShape,
    /// Place of the learned lower bounds, if there are any.
    bounds: Option<Range<usize>>,
    /// β of every layer, [L, D], and its gradient.
    betas: B::Tensor,
    d_betas: B::Tensor,
    slots: Vec<Activations<B>>,
    scratch: Scratch<B>,
}

struct Layer {
    attn_norm: Norm,
    i_proj: Projection,
    f_proj: Projection,
    g_proj: Projection,
    g_norm: Norm,
    o_proj: Projection,
    mlp_norm: Norm,
    gate_proj: Projection,
    down_proj: Projection,
}

/// What the backward pass of a block needs.
struct Activations<B: Memory> {
    i: B::Tensor,
    f: B::Tensor,
    g: B::Tensor,
    h: B::Tensor,
    /// The residual stream between the mixers.
    middle: B::Tensor,
    /// Input of the gated linear unit [M, 2F], or nothing where it is computed again.
    ab: Option<B::Tensor>,
}

struct Scratch<B: Memory> {
    /// Output of the norm gate [M, D]; in the backward pass also that of dy and di.
    y: B::Tensor,
    dy: B::Tensor,
    df: B::Tensor,
    dg: B::Tensor,
    dh: B::Tensor,
    /// Output of the gated linear unit [M, F].
    z: B::Tensor,
    dz: B::Tensor,
    d_ab: B::Tensor,
    /// [a b] of the block at hand, where it is not kept.
    ab: Option<B::Tensor>,
}

impl<B: Memory> MatMulFree<B> {
    pub(super) fn new(
        backend: &mut B,
        builder: &mut Builder<'_>,
        config: &ModelConfig,
        shape: BatchShape,
        slots: usize,
        recompute_gates: usize,
    ) -> Result<Self> {
        let eps = config.rms_norm_eps;
        let layers = (0..config.num_hidden_layers)
            .map(|layer| {
                let name = |part: &str| format!("model.layers.{layer}.{part}");
                Layer {
                    attn_norm: builder.norm(&name("attn_norm"), eps),
                    i_proj: builder.bit_linear(&name("attn.i_proj")),
                    f_proj: builder.bit_linear(&name("attn.f_proj")),
                    g_proj: builder.bit_linear(&name("attn.g_proj")),
                    g_norm: builder.norm(&name("attn.g_norm"), eps),
                    o_proj: builder.bit_linear(&name("attn.o_proj")),
                    mlp_norm: builder.norm(&name("mlp_norm"), eps),
                    gate_proj: builder.bit_linear(&name("mlp.gate_proj")),
                    down_proj: builder.bit_linear(&name("mlp.down_proj")),
                }
            })
            .collect::<Vec<_>>();
        let (d, inner) = (config.hidden_size, config.intermediate_size);
        let bounds = config.use_lower_bound.then(|| builder.layout.range("model.lower_bounds"));
        let tokens = shape.tokens();
        let mut betas = backend.tensor(layers.len() * d, Precision::Full)?;
        backend.clear(&mut betas)?;
        let slots = (0..slots)
            .map(|slot| {
                let keeps_ab = slot >= recompute_gates;
                Ok(Activations {
                    i: backend.product_tensor(tokens, d)?,
                    f: backend.product_tensor(tokens, d)?,
                    g: backend.product_tensor(tokens, d)?,
                    h: backend.tensor(tokens * d, Precision::Activation)?,
                    middle: backend.tensor(tokens * d, Precision::Activation)?,
                    ab: keeps_ab.then(|| backend.product_tensor(tokens, 2 * inner)).transpose()?,
                })
            })
            .collect::<Result<_>>()?;
        let shared =
            (recompute_gates > 0).then(|| backend.product_tensor(tokens, 2 * inner)).transpose()?;
        let mut tensor = |width| backend.tensor(tokens * width, Precision::Activation);
        let scratch = Scratch {
            y: tensor(d)?,
            dy: tensor(d)?,
            df: tensor(d)?,
            dg: tensor(d)?,
            dh: tensor(d)?,
            z: tensor(inner)?,
            dz: tensor(inner)?,
            d_ab: tensor(2 * inner)?,
            ab: shared,
        };
        let d_betas = backend.tensor(layers.len() * d, Precision::Full)?;
        Ok(Self { layers, shape, bounds, betas, d_betas, slots, scratch })
    }
}

impl<B: Backend> Blocks<B> for MatMulFree<B> {
    fn begin(&mut self, backend: &mut B, parameters: Parameters<'_, B>) -> Result<()> {
        backend.clear(&mut self.d_betas)?;
        match self.bounds.clone() {
            None => Ok(()),
            Some(bounds) => {
                let layers = self.layers.len();
                backend.lower_bounds(parameters.flat, bounds, layers, &mut self.betas)
            }
        }
    }

    fn forward(
        &mut self,
        backend: &mut B,
        parameters: Parameters<'_, B>,
        layer: usize,
        slot: usize,
        x: &B::Tensor,
        output: Option<&mut B::Tensor>,
    ) -> Result<()> {
        let (index, layer) = (layer, &self.layers[layer]);
        let (kept, scratch) = (&mut self.slots[slot], &mut self.scratch);
        let Activations { i, f, g, h, middle, ab } = kept;
        let projections = [&layer.i_proj, &layer.f_proj, &layer.g_proj];
        backend.project(parameters, &layer.attn_norm, x, &projections, &mut [i, f, g])?;
        backend.mlgru(self.shape, i, f, &self.betas, index, h)?;
        let (norm, y) = (&layer.g_norm, &mut scratch.y);
        backend.project_norm_gate(parameters, norm, &layer.o_proj, g, h, x, y, middle)?;
        let ab = ab.as_mut().or(scratch.ab.as_mut()).expect("kept, or made again");
        backend.project(parameters, &layer.mlp_norm, middle, &[&layer.gate_proj], &mut [ab])?;
        let Some(output) = output else { return Ok(()) };
        backend.project_swiglu(parameters, &layer.down_proj, ab, middle, &mut scratch.z, output)
    }

    fn backward(
        &mut self,
        backend: &mut B,
        parameters: Parameters<'_, B>,
        layer: usize,
        slot: usize,
        x: &B::Tensor,
        dx: &mut B::Tensor,
        gradients: &mut B::Flat,
    ) -> Result<()> {
        let (index, layer) = (layer, &self.layers[layer]);
        let Activations { i, f, g, h, middle, ab } = &self.slots[slot];
        let Scratch { y, dy, df, dg, dh, z, dz, d_ab, ab: shared } = &mut self.scratch;
        let ab = match (ab, shared) {
            (Some(ab), _) => ab,
            (None, Some(ab)) => {
                let (norm, projections) = (&layer.mlp_norm, [&layer.gate_proj]);
                backend.project(parameters, norm, middle, &projections, &mut [&mut *ab])?;
                ab
            }
            (None, None) => unreachable!("kept, or made again"),
        };
        let down = &layer.down_proj;
        backend.project_swiglu_backward(parameters, down, ab, dx, z, dz, d_ab, gradients)?;
        let projections = [&layer.gate_proj];
        let norm = &layer.mlp_norm;
        backend.project_backward(parameters, norm, middle, &projections, &[d_ab], dx, gradients)?;

        let (norm, o) = (&layer.g_norm, &layer.o_proj);
        backend
            .project_norm_gate_backward(parameters, norm, o, g, h, dx, y, dy, dg, dh, gradients)?;
        // The gradient of y is used up: its memory takes that of i.
        let di = dy;
        let d_betas = &mut self.d_betas;
        backend.mlgru_backward(self.shape, i, f, &self.betas, index, h, dh, di, df, d_betas)?;
        let projections = [&layer.i_proj, &layer.f_proj, &layer.g_proj];
        let d_outputs = [&*di, &*df, &*dg];
        let norm = &layer.attn_norm;
        backend.project_backward(parameters, norm, x, &projections, &d_outputs, dx, gradients)
    }

    fn finish(
        &mut self,
        backend: &mut B,
        parameters: Parameters<'_, B>,
        gradients: &mut B::Flat,
    ) -> Result<()> {
        match self.bounds.clone() {
            None => Ok(()),
            Some(bounds) => backend.lower_bounds_backward(
                parameters.flat,
                bounds,
                self.layers.len(),
                &self.d_betas,
                gradients,
            ),
        }
    }
}
