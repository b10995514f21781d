//! Blocks of the Transformer++.
//!
//! ```text
//! q, k, v = Linear_{q,k,v}(RMSNorm(x));   q, k = RoPE(q, k)
//! m = x + Linear_o(attention(q, k, v))
//! a, b = Linear_{gate,up}(RMSNorm(m))
//! output = m + Linear_down(silu(a) ⊙ b)
//! ```

use mmfree::config::TransformerConfig;
use mmfree::error::Result;

use super::{Blocks, Builder};
use crate::backend::{
    AttentionShape, Backend, BatchShape, Memory, Norm, Parameters, Precision, Projection,
};

pub(super) struct Transformer<B: Memory> {
    layers: Vec<Layer>,
    shape: AttentionShape,
    theta: f32,
    slots: Vec<Activations<B>>,
    scratch: Scratch<B>,
}

struct Layer {
    attention_norm: Norm,
    qkv: Projection,
    o_proj: Projection,
    mlp_norm: Norm,
    gate_up: Projection,
    down_proj: Projection,
}

/// What the backward pass of a block needs.
struct Activations<B: Memory> {
    /// Rotated queries and keys, and values, [M, 3D].
    qkv: B::Tensor,
    /// Output of the attention [M, D].
    y: B::Tensor,
    /// [M, H]
    log_sums: B::Tensor,
    /// The residual stream between the mixers.
    middle: B::Tensor,
    ab: B::Tensor,
}

struct Scratch<B: Memory> {
    dy: B::Tensor,
    d_qkv: B::Tensor,
    /// Output of the gated linear unit [M, F].
    z: B::Tensor,
    dz: B::Tensor,
    d_ab: B::Tensor,
}

impl<B: Memory> Transformer<B> {
    /// Heads and sizes of the attention.
    pub(super) fn attention(&self) -> AttentionShape {
        self.shape
    }

    pub(super) fn new(
        backend: &mut B,
        builder: &mut Builder<'_>,
        config: &TransformerConfig,
        shape: BatchShape,
        slots: usize,
    ) -> Result<Self> {
        let eps = config.rms_norm_eps;
        let layers = (0..config.num_hidden_layers)
            .map(|layer| {
                let name = |part: &str| format!("model.layers.{layer}.{part}");
                let [q, k, v] = ["q", "k", "v"].map(|p| name(&format!("self_attn.{p}_proj")));
                Layer {
                    attention_norm: builder.norm(&name("input_layernorm"), eps),
                    qkv: builder.linear(&[&q, &k, &v]),
                    o_proj: builder.linear(&[&name("self_attn.o_proj")]),
                    mlp_norm: builder.norm(&name("post_attention_layernorm"), eps),
                    gate_up: builder.linear(&[&name("mlp.gate_proj"), &name("mlp.up_proj")]),
                    down_proj: builder.linear(&[&name("mlp.down_proj")]),
                }
            })
            .collect();
        let (d, inner) = (config.hidden_size, config.intermediate_size);
        let heads = config.num_attention_heads;
        let tokens = shape.tokens();
        let slots = (0..slots)
            .map(|_| {
                Ok(Activations {
                    qkv: backend.product_tensor(tokens, 3 * d)?,
                    y: backend.tensor(tokens * d, Precision::Activation)?,
                    log_sums: backend.tensor(tokens * heads, Precision::Full)?,
                    middle: backend.tensor(tokens * d, Precision::Activation)?,
                    ab: backend.product_tensor(tokens, 2 * inner)?,
                })
            })
            .collect::<Result<_>>()?;
        let mut tensor = |width| backend.tensor(tokens * width, Precision::Activation);
        let scratch = Scratch {
            dy: tensor(d)?,
            d_qkv: tensor(3 * d)?,
            z: tensor(inner)?,
            dz: tensor(inner)?,
            d_ab: tensor(2 * inner)?,
        };
        let shape = AttentionShape { batch: shape, heads, head_size: d / heads };
        Ok(Self { layers, shape, theta: config.rope_theta, slots, scratch })
    }
}

impl<B: Backend> Blocks<B> for Transformer<B> {
    fn begin(&mut self, _: &mut B, _: Parameters<'_, B>) -> Result<()> {
        Ok(())
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
        let layer = &self.layers[layer];
        let Activations { qkv, y, log_sums, middle, ab } = &mut self.slots[slot];
        let z = &mut self.scratch.z;
        backend.project(parameters, &layer.attention_norm, x, &[&layer.qkv], &mut [qkv])?;
        backend.rope(self.shape, self.theta, qkv, false)?;
        backend.attention(self.shape, qkv, y, log_sums)?;
        backend.project_residual(parameters, &layer.o_proj, y, x, middle)?;
        backend.project(parameters, &layer.mlp_norm, middle, &[&layer.gate_up], &mut [ab])?;
        let Some(output) = output else { return Ok(()) };
        backend.project_swiglu(parameters, &layer.down_proj, ab, middle, z, output)
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
        let layer = &self.layers[layer];
        let Activations { qkv, y, log_sums, middle, ab } = &self.slots[slot];
        let Scratch { dy, d_qkv, z, dz, d_ab } = &mut self.scratch;
        let down = &layer.down_proj;
        backend.project_swiglu_backward(parameters, down, ab, dx, z, dz, d_ab, gradients)?;
        let (norm, projections) = (&layer.mlp_norm, [&layer.gate_up]);
        backend.project_backward(parameters, norm, middle, &projections, &[d_ab], dx, gradients)?;

        backend.project_residual_backward(parameters, &layer.o_proj, y, dx, dy, gradients)?;
        backend.attention_backward(self.shape, qkv, y, log_sums, dy, d_qkv)?;
        backend.rope(self.shape, self.theta, d_qkv, true)?;
        let (norm, projections) = (&layer.attention_norm, [&layer.qkv]);
        backend.project_backward(parameters, norm, x, &projections, &[d_qkv], dx, gradients)
    }

    fn finish(&mut self, _: &mut B, _: Parameters<'_, B>, _: &mut B::Flat) -> Result<()> {
        Ok(())
    }
}
