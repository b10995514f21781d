//! The engine on the processor.
//!
//! Every operation treats its rows (tokens) independently, in an order of operations that does not
//! depend on the number of rows or threads, and the recurrence walks through time one step after the
//! other. So a prompt gives the same bits at once, token by token, in any chunks, and beside any other
//! sequences.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use mmfree_kernels::activations::QuantizedRows;
use mmfree_kernels::bandwidth::ReadBuffer;
use mmfree_kernels::pool::Pool;
use mmfree_kernels::ternary_gemm::{LookupScratch, Product, multiply};
use mmfree_kernels::tier::Backend;
use mmfree_kernels::{mlgru, norm_gate, rms_norm, swiglu};

use super::{Activation, BIT_LINEAR_EPS, Observer, Sequence};
use crate::error::Result;
use crate::model::{BitLinear, Block, Model};

/// Rows that one pass through the blocks takes: long prompts are cut into chunks of this many.
pub(super) const CHUNK_ROWS: usize = 256;

/// Sequences whose states one task steps.
const STEP_TASK: usize = 4;
/// Values that one task adds: fewer are not worth a second thread.
const ADD_TASK: usize = 8 << 10;

/// Threads and scratch memory.
#[derive(Debug)]
pub(super) struct CpuEngine {
    model: Arc<Model>,
    backend: Backend,
    pool: Pool,
    buffers: Buffers,
    /// Logits of the last call, [rows, V].
    pub logits: Vec<f32>,
}

/// Activations of one pass. Vectors grow to the largest pass and are then reused.
#[derive(Debug)]
struct Buffers {
    lookup: LookupScratch,
    /// Quantised inputs [rows, D] of up to three layers that run together.
    quantized: [QuantizedRows; 3],
    /// Quantised input [rows, F] of the last layer of a block. Apart, so that buffers keep their shape.
    quantized_inner: [QuantizedRows; 1],
    /// Residual stream, [rows, D].
    x: Vec<f32>,
    /// Normalised residual stream; later a mixer's output, [rows, D].
    u: Vec<f32>,
    /// [rows, D] each.
    i: Vec<f32>,
    f: Vec<f32>,
    g: Vec<f32>,
    /// [rows, 2F]
    ab: Vec<f32>,
    /// [rows, F]
    y: Vec<f32>,
}

impl CpuEngine {
    pub fn new(model: Arc<Model>, backend: Backend, threads: NonZeroUsize) -> Self {
        let pool = Pool::new(threads);
        let buffers = Buffers {
            lookup: LookupScratch::new(pool.threads()),
            quantized: Default::default(),
            quantized_inner: Default::default(),
            x: Vec::new(),
            u: Vec::new(),
            i: Vec::new(),
            f: Vec::new(),
            g: Vec::new(),
            ab: Vec::new(),
            y: Vec::new(),
        };
        Self { model, backend, pool, buffers, logits: Vec::new() }
    }

    /// The kernel tier's name.
    pub fn tier(&self) -> &'static str {
        self.backend.tier().name()
    }

    /// Threads that work, the caller included.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// Reads a buffer once with this engine's threads, as a yardstick for decoding.
    pub fn read(&self, buffer: &ReadBuffer) -> u64 {
        buffer.read(self.backend, &self.pool)
    }

    /// Brings each sequence's last row to the front.
    pub fn gather_last_rows(&mut self, batch: &[Sequence<'_>]) {
        let ends = batch.iter().scan(0, |end, sequence| {
            *end += sequence.tokens.len();
            Some(*end - 1)
        });
        self.gather(ends);
    }

    /// Brings rows, named in rising order, to the front.
    pub fn gather(&mut self, rows: impl Iterator<Item = usize>) {
        let width = self.model.config().hidden_size;
        for (at, row) in rows.enumerate() {
            self.buffers.x.copy_within(row * width..(row + 1) * width, at * width);
        }
    }

    /// Kernels and threads, for work on the logits.
    pub fn logits_and_pool(&mut self) -> (Backend, &Pool, &mut [f32]) {
        (self.backend, &self.pool, &mut self.logits)
    }

    /// Runs all tokens through all blocks and leaves the residual stream in `buffers.x`.
    pub fn run_blocks(
        &mut self,
        batch: &mut [Sequence<'_>],
        mut observer: Option<&mut Observer<'_>>,
    ) -> Result<()> {
        let model = &*self.model;
        let config = model.config();
        let (width, inner) = (config.hidden_size, config.intermediate_size);
        let rows: usize = batch.iter().map(|sequence| sequence.tokens.len()).sum();
        self.buffers.resize(rows, width, inner);
        let tokens = batch.iter().flat_map(|sequence| sequence.tokens);
        for (x, &token) in self.buffers.x.chunks_exact_mut(width).zip(tokens) {
            model.embeddings.row_into(token, x)?;
        }
        for (layer, block) in model.blocks.iter().enumerate() {
            let mut show = |what, values: &[f32]| {
                if let Some(observer) = &mut observer {
                    observer(layer, what, values);
                }
            };
            self.buffers.mix_tokens(
                self.backend,
                &self.pool,
                block,
                config.rms_norm_eps,
                &mut |i, f, pool| {
                    let (backend, beta) = (self.backend, &block.lower_bound);
                    if rows == batch.len() && rows > 1 {
                        // A step of each sequence.
                        let mut steps: Vec<_> = batch
                            .iter_mut()
                            .zip(i.chunks_exact_mut(width))
                            .zip(f.chunks_exact(width))
                            .collect();
                        pool.for_each_chunk(&mut steps, STEP_TASK, &|_, _, steps| {
                            for ((sequence, i), f) in steps {
                                let state = sequence.state.layer_mut(layer, width);
                                mlgru::step(backend, i, f, beta, state);
                            }
                        });
                        return;
                    }
                    let mut first = 0;
                    for sequence in batch.iter_mut() {
                        let part = first * width..(first + sequence.tokens.len()) * width;
                        first += sequence.tokens.len();
                        let state = sequence.state.layer_mut(layer, width);
                        mlgru::forward(backend, pool, &mut i[part.clone()], &f[part], beta, state);
                    }
                },
            );
            show(Activation::TokenMixerOutput, &self.buffers.u);
            add_assign(&self.pool, &mut self.buffers.x, &self.buffers.u);
            self.buffers.mix_channels(self.backend, &self.pool, block, config.rms_norm_eps);
            show(Activation::ChannelMixerOutput, &self.buffers.u);
            add_assign(&self.pool, &mut self.buffers.x, &self.buffers.u);
            show(Activation::BlockOutput, &self.buffers.x);
        }
        for sequence in batch {
            sequence.state.count_tokens(sequence.tokens.len());
        }
        Ok(())
    }

    /// Logits of some rows of the residual stream.
    pub fn head(&mut self, rows: std::ops::Range<usize>) -> Result<()> {
        let model = &*self.model;
        let config = model.config();
        let width = config.hidden_size;
        let buffers = &mut self.buffers;
        let count = rows.len();
        let x = &buffers.x[rows.start * width..rows.end * width];
        let u = &mut buffers.u[..count * width];
        rms_norm::forward(self.backend, &self.pool, x, &model.norm, config.rms_norm_eps, u);
        self.logits.resize(count * config.vocab_size, 0.0);
        let layers = [(&model.lm_head, &mut self.logits[..])];
        bit_linears(
            self.backend,
            &self.pool,
            &mut buffers.lookup,
            &mut buffers.quantized,
            u,
            layers,
        );
        let is_finite = AtomicBool::new(true);
        self.pool.for_each_chunk(&mut self.logits, config.vocab_size, &|_, _, logits| {
            if super::check_finite(logits).is_err() {
                is_finite.store(false, Ordering::Relaxed);
            }
        });
        if is_finite.into_inner() { Ok(()) } else { Err(super::not_finite()) }
    }
}

/// Turns the inputs [rows, D] into states, given the forget gates [rows, D].
type Recurrence<'a> = dyn FnMut(&mut [f32], &[f32], &Pool) + 'a;

impl Buffers {
    fn resize(&mut self, rows: usize, width: usize, inner: usize) {
        for buffer in [&mut self.x, &mut self.u, &mut self.i, &mut self.f, &mut self.g] {
            buffer.resize(rows * width, 0.0);
        }
        self.ab.resize(rows * 2 * inner, 0.0);
        self.y.resize(rows * inner, 0.0);
    }

    /// Leaves the token mixer's output in `u`.
    fn mix_tokens(
        &mut self,
        backend: Backend,
        pool: &Pool,
        block: &Block,
        eps: f32,
        recur: &mut Recurrence<'_>,
    ) {
        rms_norm::forward(backend, pool, &self.x, &block.attn_norm, eps, &mut self.u);
        let layers = [
            (&block.i_proj, &mut self.i[..]),
            (&block.f_proj, &mut self.f[..]),
            (&block.g_proj, &mut self.g[..]),
        ];
        bit_linears(backend, pool, &mut self.lookup, &mut self.quantized, &self.u, layers);
        recur(&mut self.i, &self.f, pool);
        norm_gate::forward(backend, pool, &mut self.g, &self.i, &block.g_norm, eps);
        let layers = [(&block.o_proj, &mut self.u[..])];
        bit_linears(backend, pool, &mut self.lookup, &mut self.quantized, &self.g, layers);
    }

    /// Leaves the channel mixer's output in `u`.
    fn mix_channels(&mut self, backend: Backend, pool: &Pool, block: &Block, eps: f32) {
        rms_norm::forward(backend, pool, &self.x, &block.mlp_norm, eps, &mut self.u);
        let layers = [(&block.gate_proj, &mut self.ab[..])];
        bit_linears(backend, pool, &mut self.lookup, &mut self.quantized, &self.u, layers);
        let inner = block.down_proj.norm.len();
        swiglu::forward(backend, pool, &self.ab, inner, &mut self.y);
        let layers = [(&block.down_proj, &mut self.u[..])];
        bit_linears(backend, pool, &mut self.lookup, &mut self.quantized_inner, &self.y, layers);
    }
}

/// Applies up to three BitLinear layers to the same input, in one parallel section.
fn bit_linears<const LAYERS: usize>(
    backend: Backend,
    pool: &Pool,
    lookup: &mut LookupScratch,
    quantized: &mut [QuantizedRows],
    x: &[f32],
    layers: [(&BitLinear, &mut [f32]); LAYERS],
) {
    let mut quantized = quantized.iter_mut();
    let mut products = layers.map(|(layer, output)| {
        let input = quantized.next().expect("a buffer for each layer");
        input.assign_rms_norm(backend, pool, x, &layer.norm, BIT_LINEAR_EPS);
        Product { weights: &layer.weights, input, output }
    });
    multiply(backend, pool, lookup, &mut products);
}

fn add_assign(pool: &Pool, x: &mut [f32], y: &[f32]) {
    pool.for_each_chunk(x, ADD_TASK, &|_, task, x| {
        for (x, y) in x.iter_mut().zip(&y[task * ADD_TASK..]) {
            *x += y;
        }
    });
}
