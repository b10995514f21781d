//! The fused operations that training is written over, forward and backward.
//!
//! A backend owns its memory: parameters, gradients and moments are [`Flat`](Memory::Flat) buffers in
//! f32, activations are [`Tensor`](Memory::Tensor)s in whatever precision it computes with. Nothing but
//! [`take_loss`](Backend::take_loss) and reads and writes of flat buffers waits for the device, as long as the host is not
//! several hundred operations ahead. [`reserve`](Memory::reserve) allocates scratch memory before the first step; on the CPU
//! some of it still grows at first use, and small vectors are made in each call.
//!
//! Every operation is deterministic: the same inputs give the same bits on any number of threads.
//! Backward operations take the forward's inputs and recompute what is cheap. They **add** to
//! gradients of parameters, and say of each other output whether they set it or add to it.
//!
//! Dimension letters: B sequences, T steps, M = B T tokens, D hidden size, F intermediate size, L layers,
//! V vocabulary; N outputs and K inputs of a projection.

use std::ops::Range;

use mmfree::engine::TokenScore;
use mmfree::error::Result;
pub use mmfree_kernels::adamw::AdamW;
pub use mmfree_kernels::cross_entropy::IGNORED;
pub use mmfree_kernels::training::Lookout;

mod cpu;
mod cuda;
pub mod numbers;

pub use cpu::{CpuBackend, CpuWeights};
pub use cuda::{CudaBackend, CudaPlan, CudaTensor, CudaTokens, CudaWeights};

/// Sequences of one batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchShape {
    /// B.
    pub sequences: usize,
    /// T.
    pub length: usize,
}

impl BatchShape {
    /// M = B T.
    pub fn tokens(self) -> usize {
        self.sequences * self.length
    }
}

/// An RMSNorm: `x · (1 / sqrt(mean(x²) + eps)) · weight`.
#[derive(Clone, Debug)]
pub struct Norm {
    /// Place of the weight in the parameters.
    pub weight: Range<usize>,
    /// ε.
    pub eps: f32,
}

/// A dense layer `y = x Wᵀ` without bias.
///
/// With an inner norm it is a BitLinear: `W` becomes trits `t · γ`, its input `q / s` with
/// `q, s = Q8(RMSNorm(x; norm, 1e-6))`, and gradients pass both quantisers unchanged
/// (straight-through estimator):
///
/// ```text
/// y = (Σ q t) γ / s        d RMSNorm(x) = dy · (t γ)        dW = dyᵀ · (q / s)
/// ```
#[derive(Clone, Debug)]
pub struct Projection {
    /// Place of the weight [N, K] in the parameters.
    pub weight: Range<usize>,
    /// N.
    pub outputs: usize,
    /// K.
    pub inputs: usize,
    /// Place of the inner norm's weight `[K]`; none for full-precision layers.
    pub inner_norm: Option<Range<usize>>,
    /// Number among the projections of the model.
    pub index: usize,
}

impl Projection {
    /// Whether all of its weights lie in a part of the parameters.
    pub fn lies_in(&self, part: &Range<usize>) -> bool {
        part.start <= self.weight.start && self.weight.end <= part.end
    }
}

/// Heads and sizes of causal attention.
#[derive(Clone, Copy, Debug)]
pub struct AttentionShape {
    /// B and T.
    pub batch: BatchShape,
    /// H.
    pub heads: usize,
    /// D / H, even.
    pub head_size: usize,
}

/// What the parameters are to an operation: master values and the form in which products stream them.
#[derive(Debug)]
pub struct Parameters<'a, B: Backend + ?Sized> {
    /// Master weights.
    pub flat: &'a B::Flat,
    /// Made of `flat` by [`Backend::prepare`].
    pub weights: &'a B::Weights,
}

impl<B: Backend + ?Sized> Clone for Parameters<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: Backend + ?Sized> Copy for Parameters<'_, B> {}

/// Parameters that follow each other and have one weight decay.
#[derive(Clone, Debug, PartialEq)]
pub struct Group {
    /// Their place.
    pub range: Range<usize>,
    /// As in [`AdamW::weight_decay`].
    pub weight_decay: f64,
}

/// A step of the optimiser for a part of the parameters.
#[derive(Debug)]
pub struct Update<'a, F> {
    /// The constants, but for the weight decay.
    pub step: AdamW,
    /// The part, whose moments there are.
    pub shard: Range<usize>,
    /// Its parameters, in their order.
    pub groups: &'a [Group],
    /// What [`Backend::clip`] has computed.
    pub numbers: &'a F,
    /// All parameters.
    pub parameters: &'a mut F,
    /// All gradients.
    pub gradients: &'a F,
    /// First and second moment of the part.
    pub moments: &'a mut [F; 2],
}

/// The output layer: final norm, head and how many tokens' logits exist at a time.
#[derive(Clone, Debug)]
pub struct Head {
    /// The final norm.
    pub norm: Norm,
    /// The head [V, D].
    pub projection: Projection,
    /// Tokens whose logits are computed together.
    pub chunk: usize,
}

/// How important the precision of a tensor is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// f32 on every backend: the residual stream's gradient, recurrent states, β.
    Full,
    /// The backend's precision of activations.
    Activation,
}

/// Where the memory of a model comes from: a device, or a count of what it would take.
pub trait Memory {
    /// f32 values in the layout of the parameters: parameters, gradients, moments.
    type Flat;
    /// Activations.
    type Tensor;
    /// Token ids.
    type Tokens;
    /// Weights of all projections in the form in which products stream them.
    type Weights;
    /// Memory of the host that the device copies to by itself.
    type HostCopy;

    /// A flat buffer of zeros.
    fn flat_zeros(&mut self, len: usize) -> Result<Self::Flat>;
    /// Memory of the host for the first `len` elements of a flat buffer.
    fn host_copy(&mut self, len: usize) -> Result<Self::HostCopy>;
    /// A tensor of `len` elements, contents undefined.
    fn tensor(&mut self, len: usize, precision: Precision) -> Result<Self::Tensor>;
    /// A tensor [rows, width] that [`Backend::project`] writes, contents undefined.
    fn product_tensor(&mut self, rows: usize, width: usize) -> Result<Self::Tensor> {
        self.tensor(rows * width, Precision::Activation)
    }
    /// Sets a tensor to zero.
    fn clear(&mut self, tensor: &mut Self::Tensor) -> Result<()>;
    /// Memory for `len` token ids.
    fn tokens(&mut self, len: usize) -> Result<Self::Tokens>;
    /// Memory for the prepared weights of a model's projections.
    fn weights(&mut self, projections: &[Projection]) -> Result<Self::Weights>;
    /// Allocates the scratch memory of every operation of a model: projections, shape of a batch, head, attention.
    fn reserve(
        &mut self,
        projections: &[Projection],
        shape: BatchShape,
        head: &Head,
        attention: Option<AttentionShape>,
    ) -> Result<()>;
}

/// A device that trains.
pub trait Backend: Memory {
    /// Name of the device and how it computes, for the header of a run.
    fn describe(&self) -> String;

    /// How many tokens' logits should exist at a time.
    fn head_chunk(&self) -> usize {
        512
    }

    /// Device memory that is free and all of it, in bytes, where the device has its own.
    fn device_bytes(&self) -> Result<Option<(usize, usize)>> {
        Ok(None)
    }

    /// The most device memory that was in use at one time, where the device has its own.
    fn peak_device_bytes(&self) -> Option<usize> {
        None
    }

    /// Whether what is submitted is done later, while the host goes on.
    fn is_asynchronous(&self) -> bool {
        false
    }

    /// Waits until everything that was submitted is done.
    fn synchronize(&mut self) -> Result<()> {
        Ok(())
    }

    /// What looks, whenever the host waits for room on the device, whether there is still something to wait for.
    fn set_lookout(&mut self, _: Option<Lookout>) {}

    /// Begins to take the time of operations by their kind, where the device can.
    fn begin_timeline(&mut self) -> Result<()> {
        Ok(())
    }

    /// Seconds by kind of operation since [`begin_timeline`](Self::begin_timeline). Waits for the device.
    fn end_timeline(&mut self) -> Result<Vec<(&'static str, f64)>> {
        Ok(Vec::new())
    }

    /// Begins to count launches and the host's time for them, where there is a device.
    fn begin_submission(&mut self) -> Result<()> {
        Ok(())
    }

    /// Launches since [`begin_submission`](Self::begin_submission), and seconds of the host without waiting for the
    /// device.
    fn end_submission(&mut self) -> Option<(usize, f64)> {
        None
    }

    // Memory.

    /// A flat buffer with given values.
    fn flat_from(&mut self, values: &[f32]) -> Result<Self::Flat>;
    /// Copies a part of a flat buffer to the host. Waits for the device.
    fn read_flat(&mut self, flat: &Self::Flat, from: usize, values: &mut [f32]) -> Result<()>;
    /// Begins to copy the first elements of a flat buffer to the host, after all that was submitted before. Does not wait
    /// for the device.
    fn begin_copy(&mut self, flat: &Self::Flat, copy: &mut Self::HostCopy) -> Result<()>;
    /// Whether a copy is done. Does not wait.
    fn is_copied(&mut self, copy: &Self::HostCopy) -> Result<bool>;
    /// The elements that were copied. Waits for the device.
    fn copied<'a>(&mut self, copy: &'a mut Self::HostCopy) -> Result<&'a [f32]>;
    /// Copies values from the host to a part of a flat buffer.
    fn write_flat(&mut self, flat: &mut Self::Flat, from: usize, values: &[f32]) -> Result<()>;
    /// Sets a part of a flat buffer to zero.
    fn clear_flat(&mut self, flat: &mut Self::Flat, range: Range<usize>) -> Result<()>;
    /// `into += from`, over a part of both. As it is written here it goes through the host: a device does better.
    fn add_flat(
        &mut self,
        from: &Self::Flat,
        into: &mut Self::Flat,
        range: Range<usize>,
    ) -> Result<()> {
        const BLOCK: usize = 1 << 16;
        let (mut sum, mut addend) = (vec![0.0; BLOCK], vec![0.0; BLOCK]);
        for start in range.clone().step_by(BLOCK) {
            let n = BLOCK.min(range.end - start);
            self.read_flat(into, start, &mut sum[..n])?;
            self.read_flat(from, start, &mut addend[..n])?;
            sum.iter_mut().zip(&addend[..n]).for_each(|(sum, addend)| *sum += addend);
            self.write_flat(into, start, &sum[..n])?;
        }
        Ok(())
    }
    /// Copies a tensor to the host in f32. Waits for the device; for tests and tools.
    fn read(&mut self, tensor: &Self::Tensor, values: &mut [f32]) -> Result<()>;
    /// Copies token ids to the device.
    fn write_tokens(&mut self, tokens: &mut Self::Tokens, ids: &[u32]) -> Result<()>;
    /// Copies targets to the device: tokens that nothing is embedded for.
    fn write_targets(&mut self, targets: &mut Self::Tokens, ids: &[u32]) -> Result<()> {
        self.write_tokens(targets, ids)
    }

    // Weights.

    /// Brings the prepared weights of some projections up to date with the parameters. Quantises the weights of BitLinear
    /// layers.
    fn prepare(
        &mut self,
        projections: &[Projection],
        flat: &Self::Flat,
        weights: &mut Self::Weights,
    ) -> Result<()>;

    // Operations of both architectures.

    /// `x[m] = table[tokens[m]]`, [M, D].
    fn embed(
        &mut self,
        flat: &Self::Flat,
        table: Range<usize>,
        tokens: &Self::Tokens,
        x: &mut Self::Tensor,
    ) -> Result<()>;

    /// `d table[tokens[m]] += dx[m]`, in the order of m.
    fn embed_backward(
        &mut self,
        tokens: &Self::Tokens,
        dx: &Self::Tensor,
        table: Range<usize>,
        gradients: &mut Self::Flat,
    ) -> Result<()>;

    /// Several projections of one normalised input: `outputs[j] = Projection_j(RMSNorm(x; norm))`.
    /// x [M, K], outputs [M, N_j].
    fn project(
        &mut self,
        parameters: Parameters<'_, Self>,
        norm: &Norm,
        x: &Self::Tensor,
        projections: &[&Projection],
        outputs: &mut [&mut Self::Tensor],
    ) -> Result<()>;

    /// Gradients of [`project`](Self::project). Adds to `dx`.
    #[allow(clippy::too_many_arguments)]
    fn project_backward(
        &mut self,
        parameters: Parameters<'_, Self>,
        norm: &Norm,
        x: &Self::Tensor,
        projections: &[&Projection],
        d_outputs: &[&Self::Tensor],
        dx: &mut Self::Tensor,
        gradients: &mut Self::Flat,
    ) -> Result<()>;

    /// A projection that writes to the residual stream: `output = residual + Projection(input)`.
    fn project_residual(
        &mut self,
        parameters: Parameters<'_, Self>,
        projection: &Projection,
        input: &Self::Tensor,
        residual: &Self::Tensor,
        output: &mut Self::Tensor,
    ) -> Result<()>;

    /// Gradients of [`project_residual`](Self::project_residual). Sets `d_input`; the gradient of
    /// `residual` is `d_output` itself.
    fn project_residual_backward(
        &mut self,
        parameters: Parameters<'_, Self>,
        projection: &Projection,
        input: &Self::Tensor,
        d_output: &Self::Tensor,
        d_input: &mut Self::Tensor,
        gradients: &mut Self::Flat,
    ) -> Result<()>;

    /// `y = silu(a) ⊙ b`, [a b] [M, 2F], y [M, F].
    fn swiglu(&mut self, ab: &Self::Tensor, inner: usize, y: &mut Self::Tensor) -> Result<()>;

    /// Gradients of [`swiglu`](Self::swiglu). Sets `d_ab`.
    fn swiglu_backward(
        &mut self,
        ab: &Self::Tensor,
        dy: &Self::Tensor,
        inner: usize,
        d_ab: &mut Self::Tensor,
    ) -> Result<()>;

    /// A projection of a gated linear unit onto the residual stream: `output = residual + Projection(silu(a) ⊙ b)`.
    /// `z` [M, F] is scratch memory: a device that fuses gate and projection leaves it alone.
    fn project_swiglu(
        &mut self,
        parameters: Parameters<'_, Self>,
        projection: &Projection,
        ab: &Self::Tensor,
        residual: &Self::Tensor,
        z: &mut Self::Tensor,
        output: &mut Self::Tensor,
    ) -> Result<()> {
        self.swiglu(ab, projection.inputs, z)?;
        self.project_residual(parameters, projection, z, residual, output)
    }

    /// Gradients of [`project_swiglu`](Self::project_swiglu). Sets `d_ab`; `z` and `dz` are scratch memory.
    #[allow(clippy::too_many_arguments)]
    fn project_swiglu_backward(
        &mut self,
        parameters: Parameters<'_, Self>,
        projection: &Projection,
        ab: &Self::Tensor,
        d_output: &Self::Tensor,
        z: &mut Self::Tensor,
        dz: &mut Self::Tensor,
        d_ab: &mut Self::Tensor,
        gradients: &mut Self::Flat,
    ) -> Result<()> {
        self.swiglu(ab, projection.inputs, z)?;
        self.project_residual_backward(parameters, projection, z, d_output, dz, gradients)?;
        self.swiglu_backward(ab, dz, projection.inputs, d_ab)
    }

    /// Adds `scale · Σ_m −ln softmax(logits[m])[targets[m]]` to the loss, with
    /// `logits = Projection(RMSNorm(x; norm))`. Tokens with target [`IGNORED`] count nothing.
    fn cross_entropy(
        &mut self,
        parameters: Parameters<'_, Self>,
        head: &Head,
        x: &Self::Tensor,
        targets: &Self::Tokens,
        scale: f32,
    ) -> Result<()>;

    /// [`cross_entropy`](Self::cross_entropy) and its gradients, chunk by chunk. Sets `dx`.
    #[allow(clippy::too_many_arguments)]
    fn cross_entropy_backward(
        &mut self,
        parameters: Parameters<'_, Self>,
        head: &Head,
        x: &Self::Tensor,
        targets: &Self::Tokens,
        scale: f32,
        dx: &mut Self::Tensor,
        gradients: &mut Self::Flat,
    ) -> Result<()>;

    /// `ln softmax(logits[m])[targets[m]]`, with logits as in [`cross_entropy`](Self::cross_entropy), and whether no
    /// token is more likely, of each token whose target is not [`IGNORED`], in order. Waits for the device.
    fn token_scores(
        &mut self,
        parameters: Parameters<'_, Self>,
        head: &Head,
        x: &Self::Tensor,
        targets: &Self::Tokens,
    ) -> Result<Vec<TokenScore>>;

    /// The loss that has been added up since the last call. Waits for the device.
    fn take_loss(&mut self) -> Result<f64>;

    // Operations of the MatMul-free model.

    /// `β = cumsum_layers(softmax_layers(bounds)) − softmax_layers(bounds)[0]`, [L, D].
    fn lower_bounds(
        &mut self,
        flat: &Self::Flat,
        bounds: Range<usize>,
        layers: usize,
        betas: &mut Self::Tensor,
    ) -> Result<()>;

    /// Gradients of [`lower_bounds`](Self::lower_bounds).
    fn lower_bounds_backward(
        &mut self,
        flat: &Self::Flat,
        bounds: Range<usize>,
        layers: usize,
        d_betas: &Self::Tensor,
        gradients: &mut Self::Flat,
    ) -> Result<()>;

    /// The recurrence, from a state of zero, with `β = betas[layer]` and i, f, h [B, T, D]:
    ///
    /// ```text
    /// r = β + (1 − β) sigmoid(f)        h_t = r ⊙ h_{t−1} + silu(i) ⊙ (1 − r)
    /// ```
    fn mlgru(
        &mut self,
        batch: BatchShape,
        i: &Self::Tensor,
        f: &Self::Tensor,
        betas: &Self::Tensor,
        layer: usize,
        h: &mut Self::Tensor,
    ) -> Result<()>;

    /// Gradients of [`mlgru`](Self::mlgru). Sets `di` and `df`, adds to row `layer` of `d_betas`.
    #[allow(clippy::too_many_arguments)]
    fn mlgru_backward(
        &mut self,
        batch: BatchShape,
        i: &Self::Tensor,
        f: &Self::Tensor,
        betas: &Self::Tensor,
        layer: usize,
        h: &Self::Tensor,
        dh: &Self::Tensor,
        di: &mut Self::Tensor,
        df: &mut Self::Tensor,
        d_betas: &mut Self::Tensor,
    ) -> Result<()>;

    /// `y = RMSNorm(g; norm) ⊙ silu(h)`.
    fn norm_gate(
        &mut self,
        flat: &Self::Flat,
        norm: &Norm,
        g: &Self::Tensor,
        h: &Self::Tensor,
        y: &mut Self::Tensor,
    ) -> Result<()>;

    /// Gradients of [`norm_gate`](Self::norm_gate). Sets `dg` and `dh`.
    #[allow(clippy::too_many_arguments)]
    fn norm_gate_backward(
        &mut self,
        flat: &Self::Flat,
        norm: &Norm,
        g: &Self::Tensor,
        h: &Self::Tensor,
        dy: &Self::Tensor,
        dg: &mut Self::Tensor,
        dh: &mut Self::Tensor,
        gradients: &mut Self::Flat,
    ) -> Result<()>;

    /// `output = residual + Projection(RMSNorm(g; norm) ⊙ silu(h))`. `y` [M, D] is scratch memory.
    #[allow(clippy::too_many_arguments)]
    fn project_norm_gate(
        &mut self,
        parameters: Parameters<'_, Self>,
        norm: &Norm,
        projection: &Projection,
        g: &Self::Tensor,
        h: &Self::Tensor,
        residual: &Self::Tensor,
        y: &mut Self::Tensor,
        output: &mut Self::Tensor,
    ) -> Result<()> {
        self.norm_gate(parameters.flat, norm, g, h, y)?;
        self.project_residual(parameters, projection, y, residual, output)
    }

    /// Gradients of [`project_norm_gate`](Self::project_norm_gate). Sets `dg` and `dh`; `y` and `dy` are scratch memory.
    #[allow(clippy::too_many_arguments)]
    fn project_norm_gate_backward(
        &mut self,
        parameters: Parameters<'_, Self>,
        norm: &Norm,
        projection: &Projection,
        g: &Self::Tensor,
        h: &Self::Tensor,
        d_output: &Self::Tensor,
        y: &mut Self::Tensor,
        dy: &mut Self::Tensor,
        dg: &mut Self::Tensor,
        dh: &mut Self::Tensor,
        gradients: &mut Self::Flat,
    ) -> Result<()> {
        self.norm_gate(parameters.flat, norm, g, h, y)?;
        self.project_residual_backward(parameters, projection, y, d_output, dy, gradients)?;
        self.norm_gate_backward(parameters.flat, norm, g, h, dy, dg, dh, gradients)
    }

    // Operations of the Transformer++.

    /// Rotates queries and keys of `qkv` [M, 3D] in place by their position (RoPE, halves paired):
    /// pair (j, j + head_size / 2) turns by `position · theta^(−2j / head_size)`. `inverse` turns
    /// backward, which is the gradient.
    fn rope(
        &mut self,
        shape: AttentionShape,
        theta: f32,
        qkv: &mut Self::Tensor,
        inverse: bool,
    ) -> Result<()>;

    /// Causal softmax attention of `qkv` [M, 3D], `y` [M, D]; `log_sums` [M, H] is what the backward
    /// needs: `ln Σ exp(q·k / sqrt(head_size))`.
    fn attention(
        &mut self,
        shape: AttentionShape,
        qkv: &Self::Tensor,
        y: &mut Self::Tensor,
        log_sums: &mut Self::Tensor,
    ) -> Result<()>;

    /// Gradients of [`attention`](Self::attention). Sets `d_qkv`.
    fn attention_backward(
        &mut self,
        shape: AttentionShape,
        qkv: &Self::Tensor,
        y: &Self::Tensor,
        log_sums: &Self::Tensor,
        dy: &Self::Tensor,
        d_qkv: &mut Self::Tensor,
    ) -> Result<()>;

    // The optimiser.

    /// Moves the loss that has been added up since the last call to number `at` of a flat buffer of [`numbers`].
    fn move_loss(&mut self, numbers: &mut Self::Flat, at: usize) -> Result<()>;

    /// Σ x² of each `unit` elements of a part of a flat buffer, to the numbers from `at` on.
    fn sums_of_squares(
        &mut self,
        flat: &Self::Flat,
        range: Range<usize>,
        unit: usize,
        numbers: &mut Self::Flat,
        at: usize,
    ) -> Result<()>;

    /// Norm and clip factor of numbers `[norm, factor, losses, sums of squares]`, with so many `losses`:
    ///
    /// ```text
    /// norm = sqrt(Σ squares), added one after the other        factor = min(1, max_norm / (norm + 1e-6))
    /// ```
    ///
    /// The factor is 1 with `max_norm` 0, and NaN from the first step on whose norm or losses are not finite.
    fn clip(&mut self, numbers: &mut Self::Flat, losses: usize, max_norm: f64) -> Result<()>;

    /// One step for the parameters `range`, with gradients multiplied by the factor of
    /// [`clip`](Self::clip); nothing if that is NaN. `gradients` are in the parameters' layout; the moments hold
    /// `range` from element `moments_from` on, so that a process may keep only its shard of them.
    #[allow(clippy::too_many_arguments)]
    fn adamw(
        &mut self,
        step: &AdamW,
        numbers: &Self::Flat,
        range: Range<usize>,
        parameters: &mut Self::Flat,
        gradients: &Self::Flat,
        moments_from: usize,
        first_moment: &mut Self::Flat,
        second_moment: &mut Self::Flat,
    ) -> Result<()>;

    /// [`adamw`](Self::adamw) for all groups of a shard, and [`prepare`](Self::prepare) for those of the projections whose
    /// weights all lie in it.
    fn update(
        &mut self,
        update: Update<'_, Self::Flat>,
        projections: &[Projection],
        weights: &mut Self::Weights,
    ) -> Result<()> {
        let Update { step, shard, groups, numbers, parameters, gradients, moments } = update;
        let [first, second] = moments;
        for Group { range, weight_decay } in groups {
            let step = AdamW { weight_decay: *weight_decay, ..step };
            let from = range.start - shard.start;
            let range = range.clone();
            self.adamw(&step, numbers, range, parameters, gradients, from, first, second)?;
        }
        for projection in projections.iter().filter(|projection| projection.lies_in(&shard)) {
            self.prepare(std::slice::from_ref(projection), parameters, weights)?;
        }
        Ok(())
    }
}
