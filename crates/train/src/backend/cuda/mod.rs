//! A GPU: activations in bf16, sums in f32, kernels of `mmfree_kernels::training`.
//!
//! The outputs of BitLinear layers are kept as their integer sums, rounded to bf16, with one factor `γ / s` a token.
//! The gradient of the residual stream is kept in f32 and in bf16, as products take it.

mod plan;
mod products;
mod tensors;
mod update;

use std::ops::Range;
use std::sync::Arc;

use mmfree::engine::TokenScore;
use mmfree::error::Result;
use mmfree_kernels::cuda::{Buffer, Device, Pinned};
use mmfree_kernels::training::{NormBackward, Recurrence, Rows, Training, View, ViewMut};

pub use self::plan::CudaPlan;
use self::plan::{Lengths, byte_elements, weight_places};
use self::products::{
    Norms, RowsGradient, Scratch, check_kinds, norm_gate_rows, operand_len, swiglu_rows,
};
pub use self::tensors::{CudaTensor, CudaTokens, CudaWeights};
use self::tensors::{flat_view, flat_view_mut, numbers_mut, rows_by_token};
use super::numbers::{ELEMENTS, FACTOR};
use super::{
    AdamW, AttentionShape, Backend, BatchShape, Head, Lookout, Memory, Norm, Parameters, Precision,
    Projection, Update,
};

/// Layers that can share an input.
const MAX_SHARED: usize = 3;
/// Tokens whose logits exist at a time.
const HEAD_CHUNK: usize = 4096;

/// Trains on an NVIDIA GPU.
#[derive(Debug)]
pub struct CudaBackend {
    device: Arc<Device>,
    ops: Training,
    scratch: Scratch,
    /// A product before it is added to the residual stream, [M, D], and the factor of each row.
    product: Buffer<u16>,
    factors: Buffer<f32>,
    logits: Buffer<f32>,
    d_logits: Buffer<u16>,
    losses: Buffer<f64>,
    loss: Buffer<f64>,
}

impl CudaBackend {
    /// A backend on the GPU of a number, from 0.
    ///
    /// # Errors
    /// No driver, no such GPU, no cuBLASLt.
    pub fn new(ordinal: usize) -> Result<Self> {
        let device = Device::open(ordinal)?;
        let half = || Buffer::zeros(&device, 1);
        Ok(Self {
            ops: Training::new(&device)?,
            scratch: Scratch {
                operands: [half()?, half()?, half()?],
                d_operands: [half()?, half()?, half()?],
            },
            product: half()?,
            factors: Buffer::zeros(&device, 1)?,
            logits: Buffer::zeros(&device, 1)?,
            d_logits: half()?,
            losses: Buffer::zeros(&device, 1)?,
            loss: Buffer::zeros(&device, 1)?,
            device,
        })
    }

    /// How many GPUs there are.
    ///
    /// # Errors
    /// No driver.
    pub fn devices() -> Result<usize> {
        Ok(Device::count()?)
    }

    /// The device.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }
}

impl Memory for CudaBackend {
    type Flat = Buffer<f32>;
    type Tensor = CudaTensor;
    type Tokens = CudaTokens;
    type Weights = CudaWeights;
    type HostCopy = Pinned<f32>;

    fn flat_zeros(&mut self, len: usize) -> Result<Buffer<f32>> {
        Ok(Buffer::zeros(&self.device, len)?)
    }

    fn host_copy(&mut self, len: usize) -> Result<Pinned<f32>> {
        Ok(Pinned::zeros(&self.device, len)?)
    }

    fn tensor(&mut self, len: usize, precision: Precision) -> Result<CudaTensor> {
        CudaTensor::new(&self.device, len, precision == Precision::Full, 0)
    }

    fn product_tensor(&mut self, rows: usize, width: usize) -> Result<CudaTensor> {
        CudaTensor::new(&self.device, rows * width, false, rows)
    }

    fn clear(&mut self, tensor: &mut CudaTensor) -> Result<()> {
        tensor.half.clear()?;
        if let Some(full) = &mut tensor.full {
            full.clear()?;
        }
        Ok(())
    }

    fn tokens(&mut self, len: usize) -> Result<CudaTokens> {
        CudaTokens::new(&self.device, len)
    }

    fn weights(&mut self, projections: &[Projection]) -> Result<CudaWeights> {
        let (starts, len) = weight_places(projections);
        Ok(CudaWeights {
            values: Buffer::zeros(&self.device, len)?,
            bytes: Buffer::zeros(&self.device, byte_elements(projections))?,
            starts,
            gammas: Buffer::zeros(&self.device, projections.len())?,
        })
    }

    fn reserve(
        &mut self,
        projections: &[Projection],
        shape: BatchShape,
        head: &Head,
        attention: Option<AttentionShape>,
    ) -> Result<()> {
        let lengths = Lengths::new(projections, shape, head, attention);
        let scratch = &mut self.scratch;
        for (buffers, lengths) in
            [(&mut scratch.operands, lengths.operands), (&mut scratch.d_operands, lengths.operands)]
        {
            for (buffer, len) in buffers.iter_mut().zip(lengths) {
                buffer.reserve(len)?;
            }
        }
        self.product.reserve(lengths.product)?;
        self.factors.reserve(lengths.factors)?;
        self.logits.reserve(lengths.logits)?;
        self.d_logits.reserve(lengths.logits)?;
        self.losses.reserve(lengths.losses)?;
        Ok(self.ops.reserve(&lengths.operations)?)
    }
}

impl Backend for CudaBackend {
    fn describe(&self) -> String {
        format!("cuda:{} {}, bf16 with f32 sums", self.device.ordinal(), self.device.name())
    }

    fn head_chunk(&self) -> usize {
        HEAD_CHUNK
    }

    fn device_bytes(&self) -> Result<Option<(usize, usize)>> {
        Ok(Some(self.device.memory()?))
    }

    fn peak_device_bytes(&self) -> Option<usize> {
        Some(self.device.peak_bytes())
    }

    fn is_asynchronous(&self) -> bool {
        true
    }

    fn synchronize(&mut self) -> Result<()> {
        Ok(self.device.synchronize()?)
    }

    fn set_lookout(&mut self, lookout: Option<Lookout>) {
        self.ops.set_lookout(lookout);
    }

    fn begin_timeline(&mut self) -> Result<()> {
        Ok(self.ops.begin_timeline()?)
    }

    fn end_timeline(&mut self) -> Result<Vec<(&'static str, f64)>> {
        Ok(self.ops.end_timeline()?)
    }

    fn begin_submission(&mut self) -> Result<()> {
        Ok(self.ops.begin_submission()?)
    }

    fn end_submission(&mut self) -> Option<(usize, f64)> {
        self.ops.end_submission()
    }

    fn flat_from(&mut self, values: &[f32]) -> Result<Buffer<f32>> {
        Ok(Buffer::from_slice(&self.device, values)?)
    }

    fn read_flat(&mut self, flat: &Buffer<f32>, from: usize, values: &mut [f32]) -> Result<()> {
        Ok(flat.read(from, values)?)
    }

    fn begin_copy(&mut self, flat: &Buffer<f32>, copy: &mut Pinned<f32>) -> Result<()> {
        Ok(copy.fetch(flat)?)
    }

    fn is_copied(&mut self, copy: &Pinned<f32>) -> Result<bool> {
        Ok(copy.is_done()?)
    }

    fn copied<'a>(&mut self, copy: &'a mut Pinned<f32>) -> Result<&'a [f32]> {
        Ok(copy.wait()?)
    }

    fn write_flat(&mut self, flat: &mut Buffer<f32>, from: usize, values: &[f32]) -> Result<()> {
        Ok(flat.write(from, values)?)
    }

    fn clear_flat(&mut self, flat: &mut Buffer<f32>, range: Range<usize>) -> Result<()> {
        Ok(flat.clear_range(range)?)
    }

    fn add_flat(
        &mut self,
        from: &Buffer<f32>,
        into: &mut Buffer<f32>,
        range: Range<usize>,
    ) -> Result<()> {
        Ok(self.ops.add(flat_view(from, &range), flat_view_mut(into, &range))?)
    }

    fn read(&mut self, tensor: &CudaTensor, values: &mut [f32]) -> Result<()> {
        tensor.read(values)
    }

    fn write_tokens(&mut self, tokens: &mut CudaTokens, ids: &[u32]) -> Result<()> {
        self.ops.wait(&mut || tokens.is_free())?;
        tokens.write(ids, Some(rows_by_token(ids)))
    }

    fn write_targets(&mut self, targets: &mut CudaTokens, ids: &[u32]) -> Result<()> {
        self.ops.wait(&mut || targets.is_free())?;
        targets.write(ids, None)
    }

    fn prepare(
        &mut self,
        projections: &[Projection],
        flat: &Buffer<f32>,
        weights: &mut CudaWeights,
    ) -> Result<()> {
        self.prepare_each(projections, flat, weights)
    }

    fn embed(
        &mut self,
        flat: &Buffer<f32>,
        table: Range<usize>,
        tokens: &CudaTokens,
        x: &mut CudaTensor,
    ) -> Result<()> {
        Ok(self.ops.embed(flat_view(flat, &table), tokens.ids(), x.view_mut())?)
    }

    fn embed_backward(
        &mut self,
        tokens: &CudaTokens,
        dx: &CudaTensor,
        table: Range<usize>,
        gradients: &mut Buffer<f32>,
    ) -> Result<()> {
        Ok(self.ops.embed_backward(
            View::new(dx.full()?, 0, dx.len),
            tokens.ids(),
            tokens.order(),
            tokens.starts(),
            flat_view_mut(gradients, &table),
        )?)
    }

    fn project(
        &mut self,
        parameters: Parameters<'_, Self>,
        norm: &Norm,
        x: &CudaTensor,
        projections: &[&Projection],
        outputs: &mut [&mut CudaTensor],
    ) -> Result<()> {
        check_kinds(projections)?;
        let norms = Norms::new(parameters, Some(norm), projections);
        let quantised = !norms.inner.is_empty();
        let rows = x.len / projections[0].inputs;
        if quantised {
            let mut factors = Vec::with_capacity(outputs.len());
            for output in outputs.iter_mut() {
                if output.factors.is_none() {
                    output.factors = Some(Buffer::zeros(&self.device, rows)?);
                }
                factors.extend(output.factors.as_mut().map(|f| ViewMut::new(f, 0, rows)));
            }
            let form = self.form(projections);
            let len = operand_len(form, x.len);
            let q = self.scratch.operands.iter_mut().take(projections.len());
            let q = q.map(|buffer| ViewMut::new(buffer, 0, len)).collect();
            self.ops.norm_quantize(norms.of(Rows::Plain(x.view())), form, q, factors)?;
            for (j, (projection, output)) in projections.iter().zip(outputs).enumerate() {
                output.scaled = true;
                let y = ViewMut::new(&mut output.half, 0, output.len);
                let operand = View::new(&self.scratch.operands[j], 0, len);
                products::integers(
                    &mut self.ops,
                    form,
                    parameters.weights,
                    projection,
                    operand,
                    y,
                )?;
            }
        } else {
            let weight = flat_view(parameters.flat, &norm.weight);
            let operand = ViewMut::new(&mut self.scratch.operands[0], 0, x.len);
            self.ops.norm(x.view(), weight, norm.eps, operand)?;
            for (projection, output) in projections.iter().zip(outputs) {
                let operand = View::new(&self.scratch.operands[0], 0, x.len);
                let weight = parameters.weights.of(projection);
                self.ops.multiply(operand, weight, projection.outputs, None, output.view_mut())?;
            }
        }
        Ok(())
    }

    fn project_backward(
        &mut self,
        parameters: Parameters<'_, Self>,
        norm: &Norm,
        x: &CudaTensor,
        projections: &[&Projection],
        d_outputs: &[&CudaTensor],
        dx: &mut CudaTensor,
        gradients: &mut Buffer<f32>,
    ) -> Result<()> {
        check_kinds(projections)?;
        let norms = Norms::new(parameters, Some(norm), projections);
        let d_outputs: Vec<_> = d_outputs.iter().map(|d| d.view()).collect();
        let (rows, len) = (Rows::Plain(x.view()), x.len);
        self.scratch.products_backward(
            &mut self.ops,
            parameters.weights,
            &norms,
            rows,
            len,
            projections,
            &d_outputs,
            gradients,
        )?;
        let (full, half) = dx.full_mut()?;
        let d_products: Vec<_> = self
            .scratch
            .d_operands
            .iter()
            .take(norms.inner.len().max(1))
            .map(|buffer| View::new(buffer, 0, len))
            .collect();
        let backward = NormBackward {
            norms: norms.of(rows),
            d_products: &d_products,
            dx: Some(ViewMut::new(full, 0, len)),
            dx_half: ViewMut::new(half, 0, len),
            dh: None,
            add: true,
            d_weights: &norms.places,
        };
        Ok(self.ops.norm_backward(backward, gradients)?)
    }

    fn project_residual(
        &mut self,
        parameters: Parameters<'_, Self>,
        projection: &Projection,
        input: &CudaTensor,
        residual: &CudaTensor,
        output: &mut CudaTensor,
    ) -> Result<()> {
        let weight = parameters.weights.of(projection);
        if projection.inner_norm.is_none() {
            let residual = Some(residual.view());
            let y = output.view_mut();
            return Ok(self.ops.multiply(input.view(), weight, projection.outputs, residual, y)?);
        }
        let norms = Norms::new(parameters, None, &[projection]);
        let rows = norms.of(Rows::Plain(input.view()));
        self.quantised_residual(parameters.weights, projection, rows, residual, output)
    }

    fn project_residual_backward(
        &mut self,
        parameters: Parameters<'_, Self>,
        projection: &Projection,
        input: &CudaTensor,
        d_output: &CudaTensor,
        d_input: &mut CudaTensor,
        gradients: &mut Buffer<f32>,
    ) -> Result<()> {
        let weights = parameters.weights;
        if projection.inner_norm.is_none() {
            let (dy, outputs) = (d_output.view(), projection.outputs);
            let gradient = flat_view_mut(gradients, &projection.weight);
            self.ops.multiply_weights(dy, input.view(), outputs, gradient)?;
            let weight = weights.of(projection);
            return Ok(self.ops.multiply_inputs(dy, weight, outputs, false, d_input.view_mut())?);
        }
        let norms = Norms::new(parameters, None, &[projection]);
        let rows = Rows::Plain(input.view());
        let d_rows = RowsGradient { first: d_input.view_mut(), h: None };
        self.quantised_residual_backward(
            weights, projection, &norms, rows, d_output, d_rows, gradients,
        )
    }

    fn project_swiglu(
        &mut self,
        parameters: Parameters<'_, Self>,
        projection: &Projection,
        ab: &CudaTensor,
        residual: &CudaTensor,
        z: &mut CudaTensor,
        output: &mut CudaTensor,
    ) -> Result<()> {
        let norms = Norms::new(parameters, None, &[projection]);
        let rows = norms.of(swiglu_rows(ab));
        if !rows.is_fused() {
            self.swiglu(ab, projection.inputs, z)?;
            return self.project_residual(parameters, projection, z, residual, output);
        }
        self.quantised_residual(parameters.weights, projection, rows, residual, output)
    }

    fn project_swiglu_backward(
        &mut self,
        parameters: Parameters<'_, Self>,
        projection: &Projection,
        ab: &CudaTensor,
        d_output: &CudaTensor,
        z: &mut CudaTensor,
        dz: &mut CudaTensor,
        d_ab: &mut CudaTensor,
        gradients: &mut Buffer<f32>,
    ) -> Result<()> {
        let (weights, rows) = (parameters.weights, swiglu_rows(ab));
        let norms = Norms::new(parameters, None, &[projection]);
        if !norms.of(rows).is_fused() {
            self.swiglu(ab, projection.inputs, z)?;
            self.project_residual_backward(parameters, projection, z, d_output, dz, gradients)?;
            return self.swiglu_backward(ab, dz, projection.inputs, d_ab);
        }
        let d_rows = RowsGradient { first: d_ab.view_mut(), h: None };
        self.quantised_residual_backward(
            weights, projection, &norms, rows, d_output, d_rows, gradients,
        )
    }

    fn swiglu(&mut self, ab: &CudaTensor, inner: usize, y: &mut CudaTensor) -> Result<()> {
        Ok(self.ops.swiglu(ab.scaled_view(), inner, y.view_mut())?)
    }

    fn swiglu_backward(
        &mut self,
        ab: &CudaTensor,
        dy: &CudaTensor,
        inner: usize,
        d_ab: &mut CudaTensor,
    ) -> Result<()> {
        Ok(self.ops.swiglu_backward(ab.scaled_view(), dy.view(), inner, d_ab.view_mut())?)
    }

    fn cross_entropy(
        &mut self,
        parameters: Parameters<'_, Self>,
        head: &Head,
        x: &CudaTensor,
        targets: &CudaTokens,
        scale: f32,
    ) -> Result<()> {
        self.head(parameters, head, x, targets, scale, None)
    }

    fn cross_entropy_backward(
        &mut self,
        parameters: Parameters<'_, Self>,
        head: &Head,
        x: &CudaTensor,
        targets: &CudaTokens,
        scale: f32,
        dx: &mut CudaTensor,
        gradients: &mut Buffer<f32>,
    ) -> Result<()> {
        self.head(parameters, head, x, targets, scale, Some((dx, gradients)))
    }

    fn token_scores(
        &mut self,
        parameters: Parameters<'_, Self>,
        head: &Head,
        x: &CudaTensor,
        targets: &CudaTokens,
    ) -> Result<Vec<TokenScore>> {
        self.scores(parameters, head, x, targets)
    }

    fn take_loss(&mut self) -> Result<f64> {
        let mut loss = [0.0];
        self.loss.read(0, &mut loss)?;
        self.loss.clear()?;
        Ok(loss[0])
    }

    fn lower_bounds(
        &mut self,
        flat: &Buffer<f32>,
        bounds: Range<usize>,
        layers: usize,
        betas: &mut CudaTensor,
    ) -> Result<()> {
        let len = betas.len;
        let (full, _) = betas.full_mut()?;
        let betas = ViewMut::new(full, 0, len);
        Ok(self.ops.lower_bounds(flat_view(flat, &bounds), layers, betas)?)
    }

    fn lower_bounds_backward(
        &mut self,
        flat: &Buffer<f32>,
        bounds: Range<usize>,
        layers: usize,
        d_betas: &CudaTensor,
        gradients: &mut Buffer<f32>,
    ) -> Result<()> {
        Ok(self.ops.lower_bounds_backward(
            flat_view(flat, &bounds),
            layers,
            View::new(d_betas.full()?, 0, d_betas.len),
            flat_view_mut(gradients, &bounds),
        )?)
    }

    fn mlgru(
        &mut self,
        batch: BatchShape,
        i: &CudaTensor,
        f: &CudaTensor,
        betas: &CudaTensor,
        layer: usize,
        h: &mut CudaTensor,
    ) -> Result<()> {
        Ok(self.ops.recurrence(recurrence(batch, i, f, betas, layer)?, h.view_mut())?)
    }

    fn mlgru_backward(
        &mut self,
        batch: BatchShape,
        i: &CudaTensor,
        f: &CudaTensor,
        betas: &CudaTensor,
        layer: usize,
        h: &CudaTensor,
        dh: &CudaTensor,
        di: &mut CudaTensor,
        df: &mut CudaTensor,
        d_betas: &mut CudaTensor,
    ) -> Result<()> {
        let inputs = recurrence(batch, i, f, betas, layer)?;
        let width = i.len / batch.tokens();
        let (full, _) = d_betas.full_mut()?;
        let d_beta = ViewMut::new(full, layer * width, width);
        let (h, dh) = (h.view(), dh.view());
        let (di, df) = (di.view_mut(), df.view_mut());
        Ok(self.ops.recurrence_backward(inputs, h, dh, di, df, d_beta)?)
    }

    fn norm_gate(
        &mut self,
        flat: &Buffer<f32>,
        norm: &Norm,
        g: &CudaTensor,
        h: &CudaTensor,
        y: &mut CudaTensor,
    ) -> Result<()> {
        let weight = (flat_view(flat, &norm.weight), norm.eps);
        Ok(self.ops.norm_gate(g.scaled_view(), h.view(), weight, y.view_mut())?)
    }

    fn norm_gate_backward(
        &mut self,
        flat: &Buffer<f32>,
        norm: &Norm,
        g: &CudaTensor,
        h: &CudaTensor,
        dy: &CudaTensor,
        dg: &mut CudaTensor,
        dh: &mut CudaTensor,
        gradients: &mut Buffer<f32>,
    ) -> Result<()> {
        Ok(self.ops.norm_gate_backward(
            g.scaled_view(),
            h.view(),
            (flat_view(flat, &norm.weight), norm.eps),
            dy.view(),
            dg.view_mut(),
            dh.view_mut(),
            flat_view_mut(gradients, &norm.weight),
        )?)
    }

    fn project_norm_gate(
        &mut self,
        parameters: Parameters<'_, Self>,
        norm: &Norm,
        projection: &Projection,
        g: &CudaTensor,
        h: &CudaTensor,
        residual: &CudaTensor,
        y: &mut CudaTensor,
        output: &mut CudaTensor,
    ) -> Result<()> {
        let norms = Norms::new(parameters, Some(norm), &[projection]);
        let rows = norms.of(norm_gate_rows(g, h));
        if !rows.is_fused() {
            self.norm_gate(parameters.flat, norm, g, h, y)?;
            return self.project_residual(parameters, projection, y, residual, output);
        }
        self.quantised_residual(parameters.weights, projection, rows, residual, output)
    }

    fn project_norm_gate_backward(
        &mut self,
        parameters: Parameters<'_, Self>,
        norm: &Norm,
        projection: &Projection,
        g: &CudaTensor,
        h: &CudaTensor,
        d_output: &CudaTensor,
        y: &mut CudaTensor,
        dy: &mut CudaTensor,
        dg: &mut CudaTensor,
        dh: &mut CudaTensor,
        gradients: &mut Buffer<f32>,
    ) -> Result<()> {
        let (weights, rows) = (parameters.weights, norm_gate_rows(g, h));
        let norms = Norms::new(parameters, Some(norm), &[projection]);
        if !norms.of(rows).is_fused() {
            self.norm_gate(parameters.flat, norm, g, h, y)?;
            self.project_residual_backward(parameters, projection, y, d_output, dy, gradients)?;
            return self.norm_gate_backward(parameters.flat, norm, g, h, dy, dg, dh, gradients);
        }
        let d_rows = RowsGradient { first: dg.view_mut(), h: Some(dh.view_mut()) };
        self.quantised_residual_backward(
            weights, projection, &norms, rows, d_output, d_rows, gradients,
        )
    }

    fn rope(
        &mut self,
        shape: AttentionShape,
        theta: f32,
        qkv: &mut CudaTensor,
        inverse: bool,
    ) -> Result<()> {
        Ok(self.ops.rope(shape.into(), theta, qkv.view_mut(), inverse)?)
    }

    fn attention(
        &mut self,
        shape: AttentionShape,
        qkv: &CudaTensor,
        y: &mut CudaTensor,
        log_sums: &mut CudaTensor,
    ) -> Result<()> {
        let len = log_sums.len;
        let (full, _) = log_sums.full_mut()?;
        let log_sums = ViewMut::new(full, 0, len);
        Ok(self.ops.attention(shape.into(), qkv.view(), y.view_mut(), log_sums)?)
    }

    fn attention_backward(
        &mut self,
        shape: AttentionShape,
        qkv: &CudaTensor,
        y: &CudaTensor,
        log_sums: &CudaTensor,
        dy: &CudaTensor,
        d_qkv: &mut CudaTensor,
    ) -> Result<()> {
        let log_sums = View::new(log_sums.full()?, 0, log_sums.len);
        let (qkv, y, dy) = (qkv.view(), y.view(), dy.view());
        let d_qkv = d_qkv.view_mut();
        Ok(self.ops.attention_backward(shape.into(), qkv, y, log_sums, dy, d_qkv)?)
    }

    fn move_loss(&mut self, numbers: &mut Buffer<f32>, at: usize) -> Result<()> {
        let into = numbers_mut(numbers, at, 1);
        Ok(self.ops.move_number(ViewMut::new(&mut self.loss, 0, 1), into)?)
    }

    fn sums_of_squares(
        &mut self,
        flat: &Buffer<f32>,
        range: Range<usize>,
        unit: usize,
        numbers: &mut Buffer<f32>,
        at: usize,
    ) -> Result<()> {
        let into = numbers_mut(numbers, at, range.len().div_ceil(unit));
        Ok(self.ops.sums_of_squares(flat_view(flat, &range), unit, into)?)
    }

    fn clip(&mut self, numbers: &mut Buffer<f32>, losses: usize, max_norm: f64) -> Result<()> {
        let count = numbers.len() / ELEMENTS;
        Ok(self.ops.clip(numbers_mut(numbers, 0, count), losses, max_norm)?)
    }

    fn adamw(
        &mut self,
        step: &AdamW,
        numbers: &Buffer<f32>,
        range: Range<usize>,
        parameters: &mut Buffer<f32>,
        gradients: &Buffer<f32>,
        moments_from: usize,
        first_moment: &mut Buffer<f32>,
        second_moment: &mut Buffer<f32>,
    ) -> Result<()> {
        let moments = moments_from..moments_from + range.len();
        Ok(self.ops.adamw(
            step,
            View::new(numbers, FACTOR * ELEMENTS, ELEMENTS),
            flat_view_mut(parameters, &range),
            flat_view(gradients, &range),
            flat_view_mut(first_moment, &moments),
            flat_view_mut(second_moment, &moments),
        )?)
    }

    fn update(
        &mut self,
        update: Update<'_, Buffer<f32>>,
        projections: &[Projection],
        weights: &mut CudaWeights,
    ) -> Result<()> {
        self.update_shard(update, projections, weights)
    }
}

fn recurrence<'a>(
    batch: BatchShape,
    i: &'a CudaTensor,
    f: &'a CudaTensor,
    betas: &'a CudaTensor,
    layer: usize,
) -> Result<Recurrence<'a>> {
    let width = i.len / batch.tokens();
    Ok(Recurrence {
        sequences: batch.sequences,
        length: batch.length,
        i: i.scaled_view(),
        f: f.scaled_view(),
        beta: View::new(betas.full()?, layer * width, width),
    })
}
