//! The engine on a GPU. The same bits as on the processor, but for tokens whose whole step is one launch.
//!
//! Tokens of one sequence take one launch ([`Decoder`]), and a token of each of several sequences takes one if their rows fit
//! ([`BatchDecoder`]). Everything else goes through the blocks with one launch for each product and one for what lies between two
//! products.

use std::ops::Range;
use std::sync::Arc;

use mmfree_kernels::batch::BatchDecoder;
use mmfree_kernels::cuda::{Buffer, CudaError, Device};
use mmfree_kernels::decode::{Decoder, Projection, Shape, Vector, Weights};
use mmfree_kernels::fused_rows::{EmbeddingType, FusedRows, Norms, Output};
use mmfree_kernels::mlgru::cuda::{Layer, Recurrence, Sequences};
use mmfree_kernels::sampling::{Next, Request, Sampling};
use mmfree_kernels::ternary_gemm::cuda::{Gemm, Products, Quantized, Sums};

use super::{Activation, Draw, Observer, Sequence, Want, check_finite};
use crate::checkpoint::FloatType;
use crate::error::{Error, Result};
use crate::model::Model;
use crate::state::State;

/// Scratch memory of a pass over a prompt, at most; about.
const SCRATCH_BYTES: usize = 288 << 20;
/// Rows of a pass over a prompt.
const CHUNK_ROWS: Range<usize> = 128..2048;

/// Weights, kernels and scratch memory on one GPU.
#[derive(Debug)]
pub(super) struct CudaEngine {
    model: Arc<Model>,
    device: Arc<Device>,
    weights: Weights,
    gemm: Gemm,
    rows: FusedRows,
    recurrence: Recurrence,
    decoder: Option<Decoder>,
    batches: Option<BatchDecoder>,
    sampling: Sampling,
    work: Work,
    /// Logits of the last call, [rows, V].
    pub logits: Vec<f32>,
}

/// Activations of one pass. Buffers grow to the largest pass and are then reused.
#[derive(Debug)]
struct Work {
    tokens: Buffer<u32>,
    /// Tokens that were chosen on the device, [passes, rows], and how many passes there were.
    chosen: Buffer<u32>,
    passes: Buffer<u32>,
    picked: Buffer<u32>,
    sequences: Sequences,
    /// Residual stream and recurrent states, [rows, D] each.
    x: Buffer<f32>,
    h: Buffer<f32>,
    /// Inputs of the products.
    mix: Quantized,
    out: Quantized,
    glu: Quantized,
    down: Quantized,
    head: Quantized,
    sums: Sums,
    head_sums: Sums,
    logits: Buffer<f32>,
    not_finite: Buffer<u32>,
}

/// Where the logits of a pass are.
#[derive(Clone, Copy, Debug)]
enum LogitsPlace {
    Decoder,
    Batches,
    Work,
}

impl CudaEngine {
    /// On the first GPU, if this machine has one.
    pub fn if_there_is_a_gpu(model: &Arc<Model>) -> Option<Result<Self>> {
        match Device::open(0) {
            Err(CudaError::NoDriver | CudaError::NoDevice { .. }) => None,
            Err(reason) => Some(Err(reason.into())),
            Ok(device) => Some(Self::on(Arc::clone(model), device)),
        }
    }

    /// On the GPU of a number.
    pub fn new(model: Arc<Model>, ordinal: usize) -> Result<Self> {
        Self::on(model, Device::open(ordinal)?)
    }

    fn on(model: Arc<Model>, device: Arc<Device>) -> Result<Self> {
        let config = model.config();
        let widest = config.hidden_size.max(config.intermediate_size);
        let rows = FusedRows::new(&device, widest)?;
        let gemm = Gemm::new(&device)?;
        let weights = upload(&model, &device, &gemm)?;
        let recurrence = Recurrence::new(&device)?;
        let decoder = Decoder::new(&device, &weights, config.rms_norm_eps)?;
        let batches = BatchDecoder::new(&device, &weights, config.rms_norm_eps)?;
        let work = Work {
            tokens: Buffer::zeros(&device, 1)?,
            chosen: Buffer::zeros(&device, 1)?,
            passes: Buffer::zeros(&device, 1)?,
            picked: Buffer::zeros(&device, 1)?,
            sequences: Sequences::new(&device)?,
            x: Buffer::zeros(&device, 1)?,
            h: Buffer::zeros(&device, 1)?,
            mix: Quantized::new(&device)?,
            out: Quantized::new(&device)?,
            glu: Quantized::new(&device)?,
            down: Quantized::new(&device)?,
            head: Quantized::new(&device)?,
            sums: Sums::new(&device)?,
            head_sums: Sums::new(&device)?,
            logits: Buffer::zeros(&device, 1)?,
            not_finite: Buffer::zeros(&device, 1)?,
        };
        Ok(Self {
            sampling: Sampling::new(&device)?,
            model,
            device,
            weights,
            gemm,
            rows,
            recurrence,
            decoder,
            batches,
            work,
            logits: Vec::new(),
        })
    }

    /// See [`Engine::greedy`](super::Engine::greedy).
    pub fn greedy(
        &mut self,
        state: &mut State,
        token: u32,
        count: usize,
    ) -> Result<Option<Vec<u32>>> {
        let Some(decoder) = &mut self.decoder else { return Ok(None) };
        let tokens = decoder.greedy(&self.weights, state.on_device(&self.device)?, token, count)?;
        state.count_tokens(count);
        match tokens {
            None => Err(super::not_finite()),
            tokens => Ok(tokens),
        }
    }

    /// Whether tokens of one sequence take one launch each.
    pub fn has_decoder(&self) -> bool {
        self.decoder.is_some()
    }

    /// See [`Engine::sample`](super::Engine::sample).
    pub fn sample(
        &mut self,
        state: &mut State,
        token: u32,
        count: usize,
        draw: &mut Draw<'_>,
    ) -> Result<Option<Vec<u32>>> {
        if self.decoder.is_none() || draw.sampler.on_device().is_none() {
            return Ok(None);
        }
        self.begin_drawing(std::slice::from_mut(draw), count)?;
        let Some(decoder) = &mut self.decoder else { return Ok(None) };
        let on_device = state.on_device(&self.device)?;
        decoder.sampled(&self.weights, on_device, token, count, &mut self.sampling)?;
        state.count_tokens(count);
        self.sampling.drawn()?.ok_or_else(super::not_finite).map(Some)
    }

    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// Packed weights that one decoded token streams, in bytes.
    pub fn streamed_bytes(&self) -> usize {
        self.weights.streamed_bytes()
    }

    pub fn describe(&self) -> String {
        format!("cuda:{} {}", self.device.ordinal(), self.device.name())
    }

    /// Rows of one pass over a prompt, so that memory stays bounded.
    pub fn chunk_rows(&self) -> usize {
        let Shape { width, inner, .. } = self.weights.shape();
        let columns = self.sums_columns(Products::of(&self.device, CHUNK_ROWS.end, width));
        let row_bytes = 4 * (2 * width + columns) + 6 * width + inner;
        (SCRATCH_BYTES / row_bytes / 128 * 128).clamp(CHUNK_ROWS.start, CHUNK_ROWS.end)
    }

    /// Columns of the sums of a pass's widest product.
    fn sums_columns(&self, products: Products) -> usize {
        let (weights, inner) = (&self.weights, self.weights.shape().inner);
        let gated = if products.gate_at_once(inner) { inner } else { weights.glu(0).columns() };
        weights.mix(0).columns().max(gated)
    }

    /// One pass over the batch; the logits after each sequence's last token.
    pub fn forward(&mut self, batch: &mut [Sequence<'_>]) -> Result<()> {
        let (count, vocab) = (batch.len(), self.weights.shape().vocab);
        let (place, _) = self.submit(batch, (0..count).collect())?;
        let logits = logits_in(place, &mut self.decoder, &mut self.batches, &mut self.work);
        self.logits.resize(count * vocab, 0.0);
        logits.read(0, &mut self.logits)?;
        check_finite(&self.logits)
    }

    /// See [`Engine::forward_and_draw`](super::Engine::forward_and_draw).
    pub fn forward_and_draw(
        &mut self,
        batch: &mut [Sequence<'_>],
        wants: &mut [Want<'_>],
    ) -> Result<Vec<Option<u32>>> {
        let (count, vocab) = (batch.len(), self.weights.shape().vocab);
        let is_wanted = |&number: &usize| !matches!(wants[number], Want::Nothing);
        let wanted: Vec<usize> = (0..count).filter(is_wanted).collect();
        let (place, wanted_rows) = self.submit(batch, wanted.clone())?;
        let logits = logits_in(place, &mut self.decoder, &mut self.batches, &mut self.work);
        let (mut requests, mut words, mut of_requests) = (Vec::new(), Vec::new(), Vec::new());
        let mut is_drawn = vec![false; wanted.len()];
        for (at, (&number, &row)) in wanted.iter().zip(&wanted_rows).enumerate() {
            if let Want::Token(Draw { sampler, recent }) = &mut wants[number]
                && let Some(params) = sampler.on_device()
            {
                words.push(sampler.next_word());
                requests.push(Request { row, params, recent, only_finite: true });
                of_requests.push(number);
                is_drawn[at] = true;
            }
        }
        let mut drawn = vec![None; count];
        if !requests.is_empty() {
            self.sampling.begin(&requests, vocab, 1, &words)?;
            self.sampling.draw(logits, 0, Next::Host)?;
            let tokens = self.sampling.drawn()?.ok_or_else(super::not_finite)?;
            of_requests.iter().zip(tokens).for_each(|(&number, token)| drawn[number] = Some(token));
        }
        self.logits.resize(count * vocab, 0.0);
        // Neighbours come together.
        let rows: Vec<(usize, usize)> = wanted_rows
            .into_iter()
            .zip(wanted)
            .zip(is_drawn)
            .filter_map(|(row, is_drawn)| (!is_drawn).then_some(row))
            .collect();
        for run in rows.chunk_by(|a, b| b.0 == a.0 + 1 && b.1 == a.1 + 1) {
            let (row, number) = run[0];
            let to = &mut self.logits[number * vocab..][..run.len() * vocab];
            logits.read(row * vocab, to)?;
            check_finite(to)?;
        }
        Ok(drawn)
    }

    /// Submits one pass over the batch, and the head behind the last tokens of some sequences. Tells where their logits
    /// will be, and in which rows.
    fn submit(
        &mut self,
        batch: &mut [Sequence<'_>],
        wanted: Vec<usize>,
    ) -> Result<(LogitsPlace, Vec<usize>)> {
        if let ([Sequence { state, tokens: [token] }], Some(decoder)) =
            (&mut *batch, &mut self.decoder)
        {
            decoder.step(&self.weights, state.on_device(&self.device)?, *token)?;
            state.count_tokens(1);
            return Ok((LogitsPlace::Decoder, wanted));
        }
        let count = batch.len();
        let batches = self.batches.as_mut().filter(|batches| batches.takes(count));
        let is_step = batch.iter().all(|s| s.tokens.len() == 1);
        if let Some(batches) = batches.filter(|_| is_step) {
            let tokens: Vec<u32> = batch.iter().flat_map(|s| s.tokens).copied().collect();
            let mut states: Vec<_> = batch.iter_mut().map(|s| &mut *s.state).collect();
            assign_steps(&mut self.work.sequences, &mut states, &self.device)?;
            batches.step(&self.weights, &self.work.sequences, &tokens)?;
            for state in states {
                state.count_tokens(1);
            }
            // It has logits of all sequences.
            return Ok((LogitsPlace::Batches, wanted));
        }
        self.run_blocks(batch, None)?;
        let ends = batch.iter().scan(0, |end, sequence| {
            *end += sequence.tokens.len() as u32;
            Some(*end - 1)
        });
        let ends: Vec<u32> = ends.collect();
        let picked: Vec<u32> = wanted.iter().map(|&number| ends[number]).collect();
        if !picked.is_empty() {
            self.prepare_head(&picked)?;
            self.submit_head(picked.len())?;
        }
        let rows = (0..wanted.len()).collect();
        Ok((LogitsPlace::Work, rows))
    }

    /// Runs all tokens through all blocks and leaves the residual stream, without the last block's output,
    /// in `work.x`.
    pub fn run_blocks(
        &mut self,
        batch: &mut [Sequence<'_>],
        observer: Option<&mut Observer<'_>>,
    ) -> Result<()> {
        let tokens: Vec<u32> = batch.iter().flat_map(|s| s.tokens).copied().collect();
        let mut states: Vec<_> =
            batch.iter_mut().map(|s| (&mut *s.state, s.tokens.len())).collect();
        self.prepare(&mut states, tokens.len())?;
        self.work.tokens.reserve(tokens.len())?;
        self.work.tokens.write(0, &tokens)?;
        self.pass(tokens.len(), false, observer)?;
        for sequence in batch {
            sequence.state.count_tokens(sequence.tokens.len());
        }
        Ok(())
    }

    /// Makes room for a pass over `count` tokens of some states, each with its number of tokens.
    fn prepare(&mut self, states: &mut [(&mut State, usize)], count: usize) -> Result<()> {
        let Shape { width, inner, .. } = self.weights.shape();
        let states: Vec<_> = states
            .iter_mut()
            .map(|(state, tokens)| Ok((&*state.on_device(&self.device)?, *tokens)))
            .collect::<Result<_>>()?;
        let products = Products::of(&self.device, count, width);
        let columns = self.sums_columns(products);
        let work = &mut self.work;
        work.sequences.assign(&states)?;
        work.x.reserve(count * width)?;
        work.h.reserve(count * width)?;
        work.sums.begin(products, count, columns)?;
        work.mix.reshape(products, 3, count, width)?;
        work.out.reshape(products, 1, count, width)?;
        work.glu.reshape(products, 1, count, width)?;
        work.down.reshape(products, 1, count, inner)?;
        Ok(())
    }

    /// See [`Engine::sample_batch`](super::Engine::sample_batch), and, without `draws`,
    /// [`Engine::greedy_batch`](super::Engine::greedy_batch). All tokens stay on the device until the end.
    pub fn decode_batch(
        &mut self,
        states: &mut [&mut State],
        tokens: &[u32],
        count: usize,
        draws: Option<&mut [Draw<'_>]>,
    ) -> Result<Vec<u32>> {
        let rows = states.len();
        let is_greedy = draws.is_none();
        let vocab = self.model.config().vocab_size;
        if let Some(draws) = draws {
            self.begin_drawing(draws, count)?;
        }
        if let Some(batches) = self.batches.as_mut().filter(|batches| batches.takes(rows)) {
            assign_steps(&mut self.work.sequences, states, &self.device)?;
            let (weights, sequences) = (&self.weights, &self.work.sequences);
            let chosen = if is_greedy {
                batches.greedy(weights, sequences, tokens, count)?
            } else {
                batches.sampled(weights, sequences, tokens, count, &mut self.sampling)?;
                self.sampling.drawn()?
            };
            for state in states {
                state.count_tokens(count);
            }
            return chosen.ok_or_else(super::not_finite);
        }
        let mut sequences: Vec<_> = states.iter_mut().map(|state| (&mut **state, 1)).collect();
        self.prepare(&mut sequences, rows)?;
        self.work.tokens.reserve(rows)?;
        self.work.tokens.write(0, tokens)?;
        self.work.chosen.reserve(count * rows)?;
        self.work.passes.clear()?;
        let all: Vec<u32> = (0..rows as u32).collect();
        self.prepare_head(&all)?;
        let device = Arc::clone(&self.device);
        device.repeat(count, || {
            self.pass(rows, true, None)?;
            self.submit_head(rows)?;
            let Work { logits, tokens, chosen, passes, not_finite, .. } = &mut self.work;
            if is_greedy {
                self.rows.best(logits, rows, vocab, tokens, (chosen, passes), not_finite)?;
            } else {
                self.sampling.draw_counted(logits, tokens, passes)?;
            }
            Result::Ok(())
        })?;
        for state in states {
            state.count_tokens(count);
        }
        if !is_greedy {
            return self.sampling.drawn()?.ok_or_else(super::not_finite);
        }
        let (mut found, mut not_finite) = (vec![0; count * rows], [0]);
        self.work.chosen.read(0, &mut found)?;
        self.work.not_finite.read(0, &mut not_finite)?;
        if not_finite[0] != 0 {
            self.work.not_finite.clear()?;
            return Err(super::not_finite());
        }
        Ok(found)
    }

    /// Prepares `count` draws from each row of logits by its sampler.
    fn begin_drawing(&mut self, draws: &mut [Draw<'_>], count: usize) -> Result<()> {
        let mut words = vec![0; count * draws.len()];
        let mut requests = Vec::with_capacity(draws.len());
        let rows = draws.len();
        for (row, Draw { sampler, recent }) in draws.iter_mut().enumerate() {
            let params = sampler.on_device().ok_or_else(|| {
                Error::Invalid("a window of the repetition penalty is too long for the GPU".into())
            })?;
            words.iter_mut().skip(row).step_by(rows).for_each(|word| *word = sampler.next_word());
            requests.push(Request { row, params, recent, only_finite: true });
        }
        Ok(self.sampling.begin(&requests, self.weights.shape().vocab, count, &words)?)
    }

    /// All blocks for the first `count` tokens of `work.tokens`; a counted pass is one more of `work.passes`.
    fn pass(
        &mut self,
        count: usize,
        is_counted: bool,
        observer: Option<&mut Observer<'_>>,
    ) -> Result<()> {
        let Shape { layers, width, inner, .. } = self.weights.shape();
        let (work, weights, rows) = (&mut self.work, &self.weights, &self.rows);
        let passes = is_counted.then_some(&mut work.passes);
        let tokens = (&work.tokens, count);
        rows.embed(weights.embeddings(), tokens, passes, width, &mut work.x)?;
        let mut shown = match observer {
            Some(observer) => Some(Shown::new(observer, &work.x, count, width)?),
            None => None,
        };
        let eps = self.model.config().rms_norm_eps;
        let segment = weights.mix(0).segment_tiles * mmfree_kernels::ternary_gemm::cuda::TILE_ROWS;
        for layer in 0..layers {
            let at = |vector| weights.vector(layer, vector);
            let norms = |norm, inner| Norms { vectors: weights.vectors(), norm, inner, eps };
            let last = (layer > 0).then(|| Output {
                sums: &mut work.sums,
                input: &work.down,
                layer: 0,
                gamma: weights.gamma(layer - 1, Projection::Down),
            });
            let inner_norms = [at(Vector::I), at(Vector::F), at(Vector::G)];
            let attn = norms(at(Vector::AttnNorm), &inner_norms);
            rows.residual(&mut work.x, None, last, attn, &mut work.mix)?;
            self.gemm.multiply(weights.tiles(), weights.mix(layer), &work.mix, &mut work.sums)?;
            let recurrence = Layer {
                vectors: weights.vectors(),
                beta: at(Vector::LowerBound),
                gamma_i: weights.gamma(layer, Projection::I),
                gamma_f: weights.gamma(layer, Projection::F),
                state_offset: layer * width,
                f_offset: segment,
                width,
            };
            let steps = work.sequences.are_single_tokens();
            if !steps {
                self.recurrence.forward(
                    recurrence,
                    &work.mix,
                    &mut work.sums,
                    &work.sequences,
                    &mut work.h,
                )?;
            }
            let g = Output {
                sums: &mut work.sums,
                input: &work.mix,
                layer: 2,
                gamma: weights.gamma(layer, Projection::G),
            };
            let inner_norm = [at(Vector::Out)];
            let gate = norms(at(Vector::GNorm), &inner_norm);
            if steps {
                let sequences = &work.sequences;
                rows.step(&g, 2 * segment, recurrence, sequences, gate, &mut work.out)?;
            } else {
                rows.gate(&g, 2 * segment, &work.h, gate, &mut work.out)?;
            }
            self.gemm.multiply(weights.tiles(), weights.out(layer), &work.out, &mut work.sums)?;
            let gamma = weights.gamma(layer, Projection::Out);
            if let Some(shown) = &mut shown {
                shown.mixer(layer, Activation::TokenMixerOutput, &work.sums, &work.out, gamma)?;
            }
            let output = Output { sums: &mut work.sums, input: &work.out, layer: 0, gamma };
            let inner_norm = [at(Vector::Glu)];
            let mlp = norms(at(Vector::MlpNorm), &inner_norm);
            rows.residual(&mut work.x, None, Some(output), mlp, &mut work.glu)?;
            let gamma = weights.gamma(layer, Projection::Glu);
            let matrix = (weights.glu(layer), inner);
            self.gemm.multiply_gated_unit(
                weights.tiles(),
                matrix,
                &work.glu,
                gamma,
                &mut work.sums,
            )?;
            let ab = Output { sums: &mut work.sums, input: &work.glu, layer: 0, gamma };
            rows.glu(&ab, weights.vectors(), at(Vector::Down), &mut work.down)?;
            self.gemm.multiply(weights.tiles(), weights.down(layer), &work.down, &mut work.sums)?;
            if let Some(shown) = &mut shown {
                let gamma = weights.gamma(layer, Projection::Down);
                shown.mixer(
                    layer,
                    Activation::ChannelMixerOutput,
                    &work.sums,
                    &work.down,
                    gamma,
                )?;
                shown.block(layer);
            }
        }
        Ok(())
    }

    /// Logits of some rows of the last pass.
    pub fn head(&mut self, rows: Range<usize>) -> Result<()> {
        let rows: Vec<u32> = rows.map(|row| row as u32).collect();
        self.pick_head(&rows)
    }

    /// Logits of rows of the last pass, in any order.
    pub fn pick_head(&mut self, picked: &[u32]) -> Result<()> {
        self.prepare_head(picked)?;
        self.submit_head(picked.len())?;
        self.logits.resize(picked.len() * self.model.config().vocab_size, 0.0);
        self.work.logits.read(0, &mut self.logits)?;
        check_finite(&self.logits)
    }

    fn prepare_head(&mut self, picked: &[u32]) -> Result<()> {
        let Shape { width, vocab, .. } = self.weights.shape();
        let (work, count) = (&mut self.work, picked.len());
        let products = Products::of(&self.device, count, width);
        work.picked.reserve(count)?;
        work.picked.write(0, picked)?;
        work.head.reshape(products, 1, count, width)?;
        work.head_sums.begin(products, count, self.weights.head().columns())?;
        work.logits.reserve(count * vocab)?;
        Ok(())
    }

    fn submit_head(&mut self, count: usize) -> Result<()> {
        let Shape { layers, vocab, .. } = self.weights.shape();
        let (work, weights) = (&mut self.work, &self.weights);
        let last = Output {
            sums: &mut work.sums,
            input: &work.down,
            layer: 0,
            gamma: weights.gamma(layers - 1, Projection::Down),
        };
        let inner = [weights.head_norm()];
        let norms = Norms {
            vectors: weights.vectors(),
            norm: weights.last_norm(),
            inner: &inner,
            eps: self.model.config().rms_norm_eps,
        };
        self.rows.residual(&mut work.x, Some(&work.picked), Some(last), norms, &mut work.head)?;
        self.gemm.multiply(weights.tiles(), weights.head(), &work.head, &mut work.head_sums)?;
        let gamma = weights.head_gamma();
        let output = Output { sums: &mut work.head_sums, input: &work.head, layer: 0, gamma };
        Ok(self.rows.logits(&output, count, vocab, &mut work.logits)?)
    }
}

/// The logits of a pass.
fn logits_in<'a>(
    place: LogitsPlace,
    decoder: &'a mut Option<Decoder>,
    batches: &'a mut Option<BatchDecoder>,
    work: &'a mut Work,
) -> &'a mut Buffer<f32> {
    match (place, decoder, batches) {
        (LogitsPlace::Decoder, Some(decoder), _) => decoder.logits(),
        (LogitsPlace::Batches, _, Some(batches)) => batches.logits(),
        _ => &mut work.logits,
    }
}

/// Takes sequences of one token each.
fn assign_steps(
    sequences: &mut Sequences,
    states: &mut [&mut State],
    device: &Arc<Device>,
) -> Result<()> {
    let states: Vec<_> = states
        .iter_mut()
        .map(|state| Ok((&*state.on_device(device)?, 1)))
        .collect::<Result<_>>()?;
    Ok(sequences.assign(&states)?)
}

/// Copies a model's weights to the device.
fn upload(model: &Model, device: &Arc<Device>, gemm: &Gemm) -> Result<Weights> {
    let config = model.config();
    let shape = Shape {
        layers: config.num_hidden_layers,
        width: config.hidden_size,
        inner: config.intermediate_size,
        vocab: config.vocab_size,
    };
    let table = &model.embeddings;
    let kind = match table.float_type() {
        FloatType::F32 => EmbeddingType::F32,
        FloatType::F16 => EmbeddingType::F16,
        FloatType::Bf16 => EmbeddingType::Bf16,
    };
    let mut weights = Weights::new(device, shape, (table.bytes(), kind))?;
    for (layer, block) in model.blocks.iter().enumerate() {
        for (projection, vector, linear) in [
            (Projection::I, Vector::I, &block.i_proj),
            (Projection::F, Vector::F, &block.f_proj),
            (Projection::G, Vector::G, &block.g_proj),
            (Projection::Out, Vector::Out, &block.o_proj),
            (Projection::Glu, Vector::Glu, &block.gate_proj),
            (Projection::Down, Vector::Down, &block.down_proj),
        ] {
            weights.set_matrix(gemm, layer, projection, &linear.weights)?;
            weights.set_vector(layer, vector, &linear.norm)?;
        }
        for (vector, values) in [
            (Vector::AttnNorm, &block.attn_norm),
            (Vector::LowerBound, &block.lower_bound),
            (Vector::GNorm, &block.g_norm),
            (Vector::MlpNorm, &block.mlp_norm),
        ] {
            weights.set_vector(layer, vector, values)?;
        }
    }
    let head = &model.lm_head;
    weights.set_head(gemm, &model.norm, &head.norm, &head.weights)?;
    Ok(weights)
}

/// What an observer sees, put together on the host from the products' sums.
struct Shown<'a, 'b> {
    observer: &'a mut Observer<'b>,
    /// Residual stream, [rows, D].
    x: Vec<f32>,
    mixer: Vec<f32>,
    width: usize,
}

impl<'a, 'b> Shown<'a, 'b> {
    fn new(
        observer: &'a mut Observer<'b>,
        x: &Buffer<f32>,
        rows: usize,
        width: usize,
    ) -> Result<Self> {
        let mut values = vec![0.0; rows * width];
        x.read(0, &mut values)?;
        Ok(Self { observer, x: values, mixer: Vec::new(), width })
    }

    /// A mixer's output: shown, and added to the residual stream.
    fn mixer(
        &mut self,
        layer: usize,
        what: Activation,
        sums: &Sums,
        input: &Quantized,
        gamma: f32,
    ) -> Result<()> {
        let rows = self.x.len() / self.width;
        let sums_of = sums.read(rows)?;
        self.mixer.clear();
        for (row, sums_of) in sums_of.chunks_exact(sums.stride()).enumerate() {
            let factor = gamma / input.read_scale(0, row)?;
            self.mixer.extend(sums_of[..self.width].iter().map(|&sum| sum as f32 * factor));
        }
        for (x, y) in self.x.iter_mut().zip(&self.mixer) {
            *x += y;
        }
        (self.observer)(layer, what, &self.mixer);
        Ok(())
    }

    fn block(&mut self, layer: usize) {
        (self.observer)(layer, Activation::BlockOutput, &self.x);
    }
}
