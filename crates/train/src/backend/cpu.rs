//! The CPU: vectors of f32, kernels of `mmfree-kernels`, threads of one pool.

use std::num::NonZeroUsize;
use std::ops::Range;

use mmfree::engine::{BACKEND_VARIABLE, TokenScore};
use mmfree::error::{Error, Result};
use mmfree_kernels::activations::QuantizedRows;
use mmfree_kernels::attention::{self, AttentionScratch};
use mmfree_kernels::bit_linear::{self, BitLinear, BitLinearScratch};
use mmfree_kernels::column_sum::ColumnScratch;
use mmfree_kernels::gemm::{self, Matrix};
use mmfree_kernels::memory::WeightArena;
use mmfree_kernels::pool::Pool;
use mmfree_kernels::rope::RopeTable;
use mmfree_kernels::ternary::TernaryMatrix;
use mmfree_kernels::ternary_gemm::{self, LookupScratch, Product};
use mmfree_kernels::tier::Backend as Tier;
use mmfree_kernels::{adamw, cross_entropy, embedding, mlgru, norm_gate, rms_norm, swiglu};

use super::numbers::{self, FACTOR, LOSSES, NORM};
use super::{
    AdamW, AttentionShape, Backend, BatchShape, Head, IGNORED, Memory, Norm, Parameters, Precision,
    Projection,
};

/// ε of the norm inside a BitLinear.
const INNER_EPS: f32 = 1e-6;
/// More threads than this are surely a mistake.
const MAX_THREADS: usize = 1024;

/// Trains on the CPU.
#[derive(Debug)]
pub struct CpuBackend {
    tier: Tier,
    pool: Pool,
    lookup: LookupScratch,
    attention: AttentionScratch,
    rope: RopeTable,
    bit_linear: BitLinearScratch,
    columns: ColumnScratch,
    quantized: Vec<QuantizedRows>,
    /// The normalised input of projections and its gradient, [M, K].
    normed: Vec<f32>,
    d_normed: Vec<f32>,
    /// Logits of a chunk of tokens, and the gradient of their input.
    logits: Vec<f32>,
    head_input: Vec<f32>,
    d_head_input: Vec<f32>,
    losses: Vec<f64>,
    /// Last states [B, D], or their gradient.
    states: Vec<f32>,
    loss: f64,
}

/// The weights of a projection as the forward pass streams them.
#[derive(Debug)]
pub enum CpuWeights {
    /// Packed trits.
    Ternary(TernaryMatrix),
    /// The master weights themselves.
    FullPrecision,
}

impl CpuBackend {
    /// A backend with `threads` threads (`None`: one for each core) and kernels of a tier by name (`None`:
    /// what the environment variable [`BACKEND_VARIABLE`] names, or the fastest that this CPU runs).
    ///
    /// # Errors
    /// An unknown or unavailable tier, an impossible number of threads.
    pub fn new(threads: Option<usize>, tier: Option<&str>) -> Result<Self> {
        let threads = match threads {
            None => std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN),
            Some(threads) => NonZeroUsize::new(threads)
                .filter(|threads| threads.get() <= MAX_THREADS)
                .ok_or_else(|| {
                    Error::Invalid(format!("{threads} threads: expected 1 to {MAX_THREADS}"))
                })?,
        };
        let from_environment = std::env::var(BACKEND_VARIABLE).ok();
        let tier = Tier::from_name(tier.or(from_environment.as_deref()).unwrap_or("auto"))
            .map_err(|reason| Error::Invalid(reason.to_string()))?;
        let pool = Pool::new(threads);
        Ok(Self {
            tier,
            lookup: LookupScratch::new(pool.threads()),
            attention: AttentionScratch::new(pool.threads()),
            rope: RopeTable::new(),
            bit_linear: BitLinearScratch::new(),
            columns: ColumnScratch::new(),
            quantized: Vec::new(),
            normed: Vec::new(),
            d_normed: Vec::new(),
            logits: Vec::new(),
            head_input: Vec::new(),
            d_head_input: Vec::new(),
            losses: Vec::new(),
            states: Vec::new(),
            loss: 0.0,
            pool,
        })
    }

    /// Threads that work, the caller included.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// Products of an input with several projections; a residual is added to the output if given.
    fn multiply(
        &mut self,
        parameters: Parameters<'_, Self>,
        x: &[f32],
        projections: &[&Projection],
        outputs: &mut [&mut [f32]],
    ) {
        self.quantized.resize_with(projections.len().max(self.quantized.len()), Default::default);
        let mut inputs = self.quantized.iter_mut();
        let mut products = Vec::with_capacity(projections.len());
        for (projection, output) in projections.iter().zip(outputs) {
            match (&parameters.weights[projection.index], &projection.inner_norm) {
                (CpuWeights::Ternary(weights), Some(norm)) => {
                    let input = inputs.next().expect("a buffer for each projection");
                    let norm = &parameters.flat[norm.clone()];
                    input.assign_rms_norm(self.tier, &self.pool, x, norm, INNER_EPS);
                    products.push(Product { weights, input, output });
                }
                _ => {
                    let weight = matrix(parameters.flat, projection);
                    let x = Matrix::new(x, x.len() / projection.inputs, projection.inputs);
                    gemm::multiply(&self.pool, x, weight.transposed(), 1.0, false, output);
                }
            }
        }
        for products in products.chunks_mut(ternary_gemm::MAX_PRODUCTS) {
            ternary_gemm::multiply(self.tier, &self.pool, &mut self.lookup, products);
        }
    }

    /// Gradients of [`multiply`](Self::multiply): adds to `dx`.
    fn multiply_backward(
        &mut self,
        parameters: Parameters<'_, Self>,
        x: &[f32],
        projection: &Projection,
        dy: &[f32],
        dx: &mut [f32],
        gradients: &mut [f32],
    ) {
        match (&parameters.weights[projection.index], &projection.inner_norm) {
            (CpuWeights::Ternary(weights), Some(norm)) => {
                let layer = BitLinear {
                    norm: &parameters.flat[norm.clone()],
                    eps: INNER_EPS,
                    weight: &parameters.flat[projection.weight.clone()],
                    scale: weights.scale(),
                };
                let [d_norm, d_weight] = gradients
                    .get_disjoint_mut([norm.clone(), projection.weight.clone()])
                    .expect("parameters do not overlap");
                bit_linear::backward(
                    self.tier,
                    &self.pool,
                    &mut self.bit_linear,
                    layer,
                    x,
                    dy,
                    dx,
                    d_norm,
                    d_weight,
                );
            }
            _ => {
                let tokens = x.len() / projection.inputs;
                let dy = Matrix::new(dy, tokens, projection.outputs);
                let x = Matrix::new(x, tokens, projection.inputs);
                let d_weight = &mut gradients[projection.weight.clone()];
                gemm::multiply(&self.pool, dy.transposed(), x, 1.0, true, d_weight);
                let weight = matrix(parameters.flat, projection);
                gemm::multiply(&self.pool, dy, weight, 1.0, true, dx);
            }
        }
    }

    /// The head over chunks of tokens; with `gradients` also its backward pass.
    #[allow(clippy::too_many_arguments)]
    fn head(
        &mut self,
        parameters: Parameters<'_, Self>,
        head: &Head,
        x: &[f32],
        targets: &[u32],
        scale: f32,
        mut gradients: Option<(&mut [f32], &mut [f32])>,
    ) {
        let Projection { inputs: width, outputs: vocabulary, .. } = head.projection;
        let norm = &parameters.flat[head.norm.weight.clone()];
        if let Some((dx, _)) = &mut gradients {
            dx.fill(0.0);
        }
        for first in (0..targets.len()).step_by(head.chunk) {
            let targets = &targets[first..targets.len().min(first + head.chunk)];
            let part = first * width..(first + targets.len()) * width;
            let x = &x[part.clone()];
            let (input, mut logits) = self.chunk_logits(parameters, head, x);
            let (u, z) = (&input[..x.len()], &mut logits[..targets.len() * vocabulary]);
            self.losses.resize(targets.len(), 0.0);
            let gradient_scale = gradients.is_some().then_some(scale);
            cross_entropy::forward_backward(
                self.tier,
                &self.pool,
                z,
                targets,
                gradient_scale,
                &mut self.losses,
            );
            self.loss += f64::from(scale) * self.losses.iter().sum::<f64>();
            if let Some((dx, gradients)) = &mut gradients {
                let mut d_input = std::mem::take(&mut self.d_head_input);
                let du = grow(&mut d_input, x.len());
                du.fill(0.0);
                self.multiply_backward(parameters, u, &head.projection, z, du, gradients);
                rms_norm::backward(
                    self.tier,
                    &self.pool,
                    &mut self.columns,
                    x,
                    norm,
                    head.norm.eps,
                    du,
                    &mut dx[part],
                    &mut gradients[head.norm.weight.clone()],
                );
                self.d_head_input = d_input;
            }
            (self.head_input, self.logits) = (input, logits);
        }
    }

    /// What the head reads of some tokens, and their logits: at the beginnings of buffers that are to be given back.
    fn chunk_logits(
        &mut self,
        parameters: Parameters<'_, Self>,
        head: &Head,
        x: &[f32],
    ) -> (Vec<f32>, Vec<f32>) {
        let Projection { inputs: width, outputs: vocabulary, .. } = head.projection;
        let norm = &parameters.flat[head.norm.weight.clone()];
        let mut input = std::mem::take(&mut self.head_input);
        let mut logits = std::mem::take(&mut self.logits);
        let u = grow(&mut input, x.len());
        rms_norm::forward(self.tier, &self.pool, x, norm, head.norm.eps, u);
        let z = grow(&mut logits, x.len() / width * vocabulary);
        self.multiply(parameters, u, &[&head.projection], &mut [z]);
        (input, logits)
    }
}

/// The master weights of a projection.
fn matrix<'a>(flat: &'a [f32], projection: &Projection) -> Matrix<'a> {
    Matrix::new(&flat[projection.weight.clone()], projection.outputs, projection.inputs)
}

fn grow(memory: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if memory.len() < len {
        memory.resize(len, 0.0);
    }
    &mut memory[..len]
}

/// Memory of floats, or an error instead of an abort.
fn allocate(len: usize) -> Result<Vec<f32>> {
    let mut memory = Vec::new();
    memory.try_reserve_exact(len).map_err(|_| {
        Error::Invalid(format!("no memory for {} MiB of activations or parameters", len >> 18))
    })?;
    memory.resize(len, 0.0);
    Ok(memory)
}

impl Memory for CpuBackend {
    type Flat = Vec<f32>;
    type Tensor = Vec<f32>;
    type Tokens = Vec<u32>;
    type Weights = Vec<CpuWeights>;
    type HostCopy = Vec<f32>;

    fn flat_zeros(&mut self, len: usize) -> Result<Vec<f32>> {
        allocate(len)
    }

    fn host_copy(&mut self, len: usize) -> Result<Vec<f32>> {
        allocate(len)
    }

    fn tensor(&mut self, len: usize, _: Precision) -> Result<Vec<f32>> {
        allocate(len)
    }

    fn clear(&mut self, tensor: &mut Vec<f32>) -> Result<()> {
        tensor.fill(0.0);
        Ok(())
    }

    fn tokens(&mut self, len: usize) -> Result<Vec<u32>> {
        Ok(vec![0; len])
    }

    fn weights(&mut self, projections: &[Projection]) -> Result<Vec<CpuWeights>> {
        let arena = WeightArena::new();
        let weights = |projection: &Projection| match projection.inner_norm {
            Some(_) => TernaryMatrix::new(&arena, projection.outputs, projection.inputs)
                .map(CpuWeights::Ternary)
                .map_err(|reason| Error::Invalid(reason.to_string())),
            None => Ok(CpuWeights::FullPrecision),
        };
        projections.iter().map(weights).collect()
    }

    fn reserve(
        &mut self,
        projections: &[Projection],
        shape: BatchShape,
        head: &Head,
        _: Option<AttentionShape>,
    ) -> Result<()> {
        let tokens = shape.tokens();
        let blocks = projections.iter().filter(|p| p.index != head.projection.index);
        for (projection, tokens) in
            blocks.map(|p| (p, tokens)).chain([(&head.projection, head.chunk)])
        {
            grow(&mut self.normed, tokens * projection.inputs);
            grow(&mut self.d_normed, tokens * projection.inputs);
            if projection.inner_norm.is_some() {
                self.bit_linear.reserve(tokens, projection.outputs, projection.inputs);
            }
        }
        grow(&mut self.head_input, head.chunk * head.projection.inputs);
        grow(&mut self.d_head_input, head.chunk * head.projection.inputs);
        grow(&mut self.logits, head.chunk * head.projection.outputs);
        Ok(())
    }
}

impl Backend for CpuBackend {
    fn describe(&self) -> String {
        let threads = self.threads();
        let plural = if threads == 1 { "" } else { "s" };
        format!("cpu {}, {threads} thread{plural}", self.tier.tier())
    }

    fn flat_from(&mut self, values: &[f32]) -> Result<Vec<f32>> {
        Ok(values.to_vec())
    }

    fn begin_copy(&mut self, flat: &Vec<f32>, copy: &mut Vec<f32>) -> Result<()> {
        let len = copy.len();
        copy.copy_from_slice(&flat[..len]);
        Ok(())
    }

    fn is_copied(&mut self, _: &Vec<f32>) -> Result<bool> {
        Ok(true)
    }

    fn copied<'a>(&mut self, copy: &'a mut Vec<f32>) -> Result<&'a [f32]> {
        Ok(copy)
    }

    fn read_flat(&mut self, flat: &Vec<f32>, from: usize, values: &mut [f32]) -> Result<()> {
        values.copy_from_slice(&flat[from..from + values.len()]);
        Ok(())
    }

    fn write_flat(&mut self, flat: &mut Vec<f32>, from: usize, values: &[f32]) -> Result<()> {
        flat[from..from + values.len()].copy_from_slice(values);
        Ok(())
    }

    fn clear_flat(&mut self, flat: &mut Vec<f32>, range: Range<usize>) -> Result<()> {
        flat[range].fill(0.0);
        Ok(())
    }

    fn read(&mut self, tensor: &Vec<f32>, values: &mut [f32]) -> Result<()> {
        values.copy_from_slice(tensor);
        Ok(())
    }

    fn write_tokens(&mut self, tokens: &mut Vec<u32>, ids: &[u32]) -> Result<()> {
        tokens.copy_from_slice(ids);
        Ok(())
    }

    fn prepare(
        &mut self,
        projections: &[Projection],
        flat: &Vec<f32>,
        weights: &mut Vec<CpuWeights>,
    ) -> Result<()> {
        for projection in projections {
            if let CpuWeights::Ternary(matrix) = &mut weights[projection.index] {
                let values = &flat[projection.weight.clone()];
                matrix.assign(self.tier, &self.pool, values).map_err(|reason| {
                    Error::Invalid(format!("weights cannot be made ternary: {reason}"))
                })?;
            }
        }
        Ok(())
    }

    fn embed(
        &mut self,
        flat: &Vec<f32>,
        table: Range<usize>,
        tokens: &Vec<u32>,
        x: &mut Vec<f32>,
    ) -> Result<()> {
        embedding::forward(&self.pool, &flat[table], tokens, x);
        Ok(())
    }

    fn embed_backward(
        &mut self,
        tokens: &Vec<u32>,
        dx: &Vec<f32>,
        table: Range<usize>,
        gradients: &mut Vec<f32>,
    ) -> Result<()> {
        embedding::backward(&self.pool, tokens, dx, &mut gradients[table]);
        Ok(())
    }

    fn project(
        &mut self,
        parameters: Parameters<'_, Self>,
        norm: &Norm,
        x: &Vec<f32>,
        projections: &[&Projection],
        outputs: &mut [&mut Vec<f32>],
    ) -> Result<()> {
        let mut normed = std::mem::take(&mut self.normed);
        let u = grow(&mut normed, x.len());
        let weight = &parameters.flat[norm.weight.clone()];
        rms_norm::forward(self.tier, &self.pool, x, weight, norm.eps, u);
        let mut outputs: Vec<&mut [f32]> =
            outputs.iter_mut().map(|output| output.as_mut_slice()).collect();
        self.multiply(parameters, u, projections, &mut outputs);
        self.normed = normed;
        Ok(())
    }

    fn project_backward(
        &mut self,
        parameters: Parameters<'_, Self>,
        norm: &Norm,
        x: &Vec<f32>,
        projections: &[&Projection],
        d_outputs: &[&Vec<f32>],
        dx: &mut Vec<f32>,
        gradients: &mut Vec<f32>,
    ) -> Result<()> {
        let mut normed = std::mem::take(&mut self.normed);
        let mut d_normed = std::mem::take(&mut self.d_normed);
        let (u, du) = (grow(&mut normed, x.len()), grow(&mut d_normed, x.len()));
        let weight = &parameters.flat[norm.weight.clone()];
        rms_norm::forward(self.tier, &self.pool, x, weight, norm.eps, u);
        du.fill(0.0);
        for (projection, dy) in projections.iter().zip(d_outputs) {
            self.multiply_backward(parameters, u, projection, dy, du, gradients);
        }
        rms_norm::backward(
            self.tier,
            &self.pool,
            &mut self.columns,
            x,
            weight,
            norm.eps,
            du,
            dx,
            &mut gradients[norm.weight.clone()],
        );
        (self.normed, self.d_normed) = (normed, d_normed);
        Ok(())
    }

    fn project_residual(
        &mut self,
        parameters: Parameters<'_, Self>,
        projection: &Projection,
        input: &Vec<f32>,
        residual: &Vec<f32>,
        output: &mut Vec<f32>,
    ) -> Result<()> {
        self.multiply(parameters, input, &[projection], &mut [output]);
        self.pool.for_each_chunk(output, 1 << 14, &|_, chunk, output| {
            for (output, residual) in output.iter_mut().zip(&residual[chunk << 14..]) {
                *output += residual;
            }
        });
        Ok(())
    }

    fn project_residual_backward(
        &mut self,
        parameters: Parameters<'_, Self>,
        projection: &Projection,
        input: &Vec<f32>,
        d_output: &Vec<f32>,
        d_input: &mut Vec<f32>,
        gradients: &mut Vec<f32>,
    ) -> Result<()> {
        d_input.fill(0.0);
        self.multiply_backward(parameters, input, projection, d_output, d_input, gradients);
        Ok(())
    }

    fn swiglu(&mut self, ab: &Vec<f32>, inner: usize, y: &mut Vec<f32>) -> Result<()> {
        swiglu::forward(self.tier, &self.pool, ab, inner, y);
        Ok(())
    }

    fn swiglu_backward(
        &mut self,
        ab: &Vec<f32>,
        dy: &Vec<f32>,
        inner: usize,
        d_ab: &mut Vec<f32>,
    ) -> Result<()> {
        swiglu::backward(self.tier, &self.pool, ab, inner, dy, d_ab);
        Ok(())
    }

    fn cross_entropy(
        &mut self,
        parameters: Parameters<'_, Self>,
        head: &Head,
        x: &Vec<f32>,
        targets: &Vec<u32>,
        scale: f32,
    ) -> Result<()> {
        self.head(parameters, head, x, targets, scale, None);
        Ok(())
    }

    fn cross_entropy_backward(
        &mut self,
        parameters: Parameters<'_, Self>,
        head: &Head,
        x: &Vec<f32>,
        targets: &Vec<u32>,
        scale: f32,
        dx: &mut Vec<f32>,
        gradients: &mut Vec<f32>,
    ) -> Result<()> {
        self.head(parameters, head, x, targets, scale, Some((dx, gradients)));
        Ok(())
    }

    fn token_scores(
        &mut self,
        parameters: Parameters<'_, Self>,
        head: &Head,
        x: &Vec<f32>,
        targets: &Vec<u32>,
    ) -> Result<Vec<TokenScore>> {
        let Projection { inputs: width, outputs: vocabulary, .. } = head.projection;
        let mut scores = Vec::new();
        for (x, targets) in x.chunks(head.chunk * width).zip(targets.chunks(head.chunk)) {
            let (input, logits) = self.chunk_logits(parameters, head, x);
            let rows = targets.iter().zip(logits.chunks_exact(vocabulary));
            let wanted: Vec<_> = rows.filter(|(target, _)| **target != IGNORED).collect();
            let first = scores.len();
            scores.resize(first + wanted.len(), TokenScore::default());
            self.pool.for_each_chunk(&mut scores[first..], 1, &|_, row, score| {
                let (&target, logits) = wanted[row];
                score[0] = TokenScore::of(logits, target);
            });
            (self.head_input, self.logits) = (input, logits);
        }
        Ok(scores)
    }

    fn take_loss(&mut self) -> Result<f64> {
        Ok(std::mem::take(&mut self.loss))
    }

    fn lower_bounds(
        &mut self,
        flat: &Vec<f32>,
        bounds: Range<usize>,
        layers: usize,
        betas: &mut Vec<f32>,
    ) -> Result<()> {
        let channels = bounds.len() / layers;
        betas.copy_from_slice(&mlgru::lower_bounds(&flat[bounds], channels));
        Ok(())
    }

    fn lower_bounds_backward(
        &mut self,
        flat: &Vec<f32>,
        bounds: Range<usize>,
        layers: usize,
        d_betas: &Vec<f32>,
        gradients: &mut Vec<f32>,
    ) -> Result<()> {
        let channels = bounds.len() / layers;
        let d_bounds = &mut gradients[bounds.clone()];
        mlgru::lower_bounds_backward(&flat[bounds], channels, d_betas, d_bounds);
        Ok(())
    }

    fn mlgru(
        &mut self,
        batch: BatchShape,
        i: &Vec<f32>,
        f: &Vec<f32>,
        betas: &Vec<f32>,
        layer: usize,
        h: &mut Vec<f32>,
    ) -> Result<()> {
        let width = i.len() / batch.tokens();
        let beta = &betas[layer * width..][..width];
        let states = grow(&mut self.states, batch.sequences * width);
        mlgru::forward_batch(self.tier, &self.pool, i, f, beta, None, h, states);
        Ok(())
    }

    fn mlgru_backward(
        &mut self,
        batch: BatchShape,
        i: &Vec<f32>,
        f: &Vec<f32>,
        betas: &Vec<f32>,
        layer: usize,
        h: &Vec<f32>,
        dh: &Vec<f32>,
        di: &mut Vec<f32>,
        df: &mut Vec<f32>,
        d_betas: &mut Vec<f32>,
    ) -> Result<()> {
        let width = i.len() / batch.tokens();
        let part = layer * width..(layer + 1) * width;
        let states = grow(&mut self.states, batch.sequences * width);
        states.fill(0.0);
        mlgru::backward_batch(
            self.tier,
            &self.pool,
            &mut self.columns,
            i,
            f,
            &betas[part.clone()],
            None,
            h,
            dh,
            di,
            df,
            &mut d_betas[part],
            states,
        );
        Ok(())
    }

    fn norm_gate(
        &mut self,
        flat: &Vec<f32>,
        norm: &Norm,
        g: &Vec<f32>,
        h: &Vec<f32>,
        y: &mut Vec<f32>,
    ) -> Result<()> {
        y.copy_from_slice(g);
        let weight = &flat[norm.weight.clone()];
        norm_gate::forward(self.tier, &self.pool, y, h, weight, norm.eps);
        Ok(())
    }

    fn norm_gate_backward(
        &mut self,
        flat: &Vec<f32>,
        norm: &Norm,
        g: &Vec<f32>,
        h: &Vec<f32>,
        dy: &Vec<f32>,
        dg: &mut Vec<f32>,
        dh: &mut Vec<f32>,
        gradients: &mut Vec<f32>,
    ) -> Result<()> {
        let (weight, d_weight) = (&flat[norm.weight.clone()], &mut gradients[norm.weight.clone()]);
        let columns = &mut self.columns;
        let (tier, pool, eps) = (self.tier, &self.pool, norm.eps);
        norm_gate::backward(tier, pool, columns, g, h, weight, eps, dy, dg, dh, d_weight);
        Ok(())
    }

    fn rope(
        &mut self,
        shape: AttentionShape,
        theta: f32,
        qkv: &mut Vec<f32>,
        inverse: bool,
    ) -> Result<()> {
        let width = shape.heads * shape.head_size;
        self.rope.assign(shape.batch.length, shape.head_size, theta);
        self.rope.rotate(&self.pool, qkv, 3 * width, 2 * width, inverse);
        Ok(())
    }

    fn attention(
        &mut self,
        shape: AttentionShape,
        qkv: &Vec<f32>,
        y: &mut Vec<f32>,
        log_sums: &mut Vec<f32>,
    ) -> Result<()> {
        let scratch = &self.attention;
        attention::forward(self.tier, &self.pool, scratch, shape.into(), qkv, y, log_sums);
        Ok(())
    }

    fn attention_backward(
        &mut self,
        shape: AttentionShape,
        qkv: &Vec<f32>,
        y: &Vec<f32>,
        log_sums: &Vec<f32>,
        dy: &Vec<f32>,
        d_qkv: &mut Vec<f32>,
    ) -> Result<()> {
        let (tier, pool, scratch) = (self.tier, &self.pool, &self.attention);
        attention::backward(tier, pool, scratch, shape.into(), qkv, y, log_sums, dy, d_qkv);
        Ok(())
    }

    fn move_loss(&mut self, into: &mut Vec<f32>, at: usize) -> Result<()> {
        numbers::set(into, at, &[std::mem::take(&mut self.loss)]);
        Ok(())
    }

    fn sums_of_squares(
        &mut self,
        flat: &Vec<f32>,
        range: Range<usize>,
        unit: usize,
        into: &mut Vec<f32>,
        at: usize,
    ) -> Result<()> {
        let units = flat[range].chunks(unit);
        let sums: Vec<f64> =
            units.map(|x| adamw::sum_of_squares(self.tier, &self.pool, x)).collect();
        numbers::set(into, at, &sums);
        Ok(())
    }

    fn clip(&mut self, flat: &mut Vec<f32>, losses: usize, max_norm: f64) -> Result<()> {
        let all = numbers::all(flat);
        let (losses, squares) = all[LOSSES..].split_at(losses);
        let (norm, factor) = adamw::clip(all[FACTOR], losses, squares, max_norm);
        numbers::set(flat, NORM, &[norm]);
        numbers::set(flat, FACTOR, &[factor]);
        Ok(())
    }

    fn adamw(
        &mut self,
        step: &AdamW,
        clipping: &Vec<f32>,
        range: Range<usize>,
        parameters: &mut Vec<f32>,
        gradients: &Vec<f32>,
        moments_from: usize,
        first_moment: &mut Vec<f32>,
        second_moment: &mut Vec<f32>,
    ) -> Result<()> {
        let moments = moments_from..moments_from + range.len();
        let factor = numbers::get(clipping, FACTOR);
        if factor.is_nan() {
            return Ok(());
        }
        adamw::step(
            self.tier,
            &self.pool,
            step,
            factor as f32,
            &mut parameters[range.clone()],
            &gradients[range],
            &mut first_moment[moments.clone()],
            &mut second_moment[moments],
        );
        Ok(())
    }
}

impl From<AttentionShape> for attention::Shape {
    fn from(shape: AttentionShape) -> Self {
        let AttentionShape { batch, heads, head_size } = shape;
        Self { sequences: batch.sequences, length: batch.length, heads, head_size }
    }
}
