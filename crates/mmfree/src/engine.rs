//! Runs a model on the CPU: many independent sequences, prefill and decode by the same code.
//!
//! ```text
//! x = embeddings[token]
//! for each block:
//!   u = RMSNorm(x; attn_norm)
//!   i, f, g = BitLinear_i(u), BitLinear_f(u), BitLinear_g(u)
//!   h = MLGRU(i, f; β, state)
//!   x = x + BitLinear_o(RMSNorm(g; g_norm) ⊙ silu(h))
//!   a, b = split(BitLinear_gate(RMSNorm(x; mlp_norm)), 2)
//!   x = x + BitLinear_down(silu(a) ⊙ b)
//! logits = BitLinear_lm_head(RMSNorm(x; norm))
//! ```
//!
//! Every operation treats its rows (tokens) independently, in an order of operations that does not
//! depend on the number of rows or threads, and the recurrence walks through time one step after the
//! other. So a prompt gives the same bits at once, token by token, in any chunks, and beside any other
//! sequences.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use mmfree_kernels::activations::QuantizedRows;
use mmfree_kernels::bandwidth::ReadBuffer;
use mmfree_kernels::pool::Pool;
use mmfree_kernels::ternary::Layout;
use mmfree_kernels::ternary_gemm::{LookupScratch, Product, multiply};
use mmfree_kernels::tier::Backend;
use mmfree_kernels::{mlgru, norm_gate, rms_norm, swiglu};

use crate::error::{Error, Result};
use crate::model::{BitLinear, Block, Model};
use crate::state::State;

/// Environment variable that names the kernel tier where the options do not.
pub const BACKEND_VARIABLE: &str = "MMFREE_BACKEND";
/// ε of the norm inside a BitLinear, whatever the configuration says (the released kernels fix it).
const BIT_LINEAR_EPS: f32 = 1e-6;
/// Rows that one pass through the blocks takes: long prompts are cut into chunks of this many.
const CHUNK_ROWS: usize = 256;
/// Rows whose logits are computed together when all positions are wanted.
const LOGIT_ROWS: usize = 32;
/// More threads than this are surely a mistake.
const MAX_THREADS: usize = 1024;

/// How an engine is built. `Default` chooses for this machine.
#[derive(Clone, Debug, Default)]
pub struct EngineOptions {
    /// Worker threads; `None` is one for each core.
    pub threads: Option<usize>,
    /// Kernel tier by name (`auto`, `scalar`, `avx2`, `avx512`, `avx512vbmi`, `neon`); `None` is what the
    /// environment variable [`BACKEND_VARIABLE`] names, or the fastest that this CPU runs.
    pub backend: Option<String>,
}

impl EngineOptions {
    fn backend(&self) -> Result<Backend> {
        let from_environment = || std::env::var(BACKEND_VARIABLE).ok();
        match self.backend.clone().or_else(from_environment) {
            None => Ok(Backend::detect()),
            Some(name) => {
                Backend::from_name(&name).map_err(|reason| Error::Invalid(reason.to_string()))
            }
        }
    }

    /// The layout of weights that the engine runs fastest.
    ///
    /// # Errors
    /// An unknown or unavailable backend.
    pub fn layout(&self) -> Result<Layout> {
        Ok(Layout::preferred(self.backend()?))
    }
}

/// Some tokens to feed to one sequence.
#[derive(Debug)]
pub struct Sequence<'a> {
    /// State before the tokens; after the call, behind them.
    pub state: &'a mut State,
    /// At least one token.
    pub tokens: &'a [u32],
}

/// A tensor inside a forward pass, for those who want to look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// What the token mixer adds to the residual stream, [rows, D].
    TokenMixerOutput,
    /// What the channel mixer adds to the residual stream, [rows, D].
    ChannelMixerOutput,
    /// The residual stream after the block, [rows, D].
    BlockOutput,
}

/// Called with layer, tensor and its values.
pub type Observer<'a> = dyn FnMut(usize, Activation, &[f32]) + 'a;

/// Scratch memory and threads to run one model.
#[derive(Debug)]
pub struct Engine {
    model: Arc<Model>,
    backend: Backend,
    pool: Pool,
    buffers: Buffers,
    /// Logits of the last call, [rows, V].
    logits: Vec<f32>,
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

impl Engine {
    /// Builds an engine.
    ///
    /// # Errors
    /// An unknown or unavailable backend, or an impossible number of threads.
    pub fn new(model: Arc<Model>, options: &EngineOptions) -> Result<Self> {
        let threads = match options.threads {
            None => thread::available_parallelism().unwrap_or(NonZeroUsize::MIN),
            Some(threads) => NonZeroUsize::new(threads)
                .filter(|threads| threads.get() <= MAX_THREADS)
                .ok_or_else(|| {
                    Error::Invalid(format!("{threads} threads: expected 1 to {MAX_THREADS}"))
                })?,
        };
        let backend = options.backend()?;
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
        Ok(Self { model, backend, pool, buffers, logits: Vec::new() })
    }

    /// The model.
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// The kernel tier's name.
    pub fn backend(&self) -> &'static str {
        self.backend.tier().name()
    }

    /// Threads that work, the caller included.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// Kernel tier and threads: one line for a run header.
    pub fn describe(&self) -> String {
        let plural = if self.threads() == 1 { "" } else { "s" };
        format!("cpu {}, {} thread{plural}", self.backend(), self.threads())
    }

    /// Feeds tokens, in chunks, and returns the logits `[V]` after the last one. Checks `cancel` between
    /// chunks; a cancelled prefill leaves the state after the last whole chunk.
    ///
    /// # Errors
    /// An empty prompt or an id outside the vocabulary (the state is then unchanged), cancellation,
    /// logits that are not finite.
    pub fn prefill(
        &mut self,
        state: &mut State,
        tokens: &[u32],
        cancel: &AtomicBool,
    ) -> Result<&mut [f32]> {
        self.check_tokens(tokens)?;
        for chunk in tokens.chunks(CHUNK_ROWS) {
            if cancel.load(Ordering::Relaxed) {
                return Err(Error::Cancelled);
            }
            self.run_blocks(&mut [Sequence { state, tokens: chunk }], None)?;
        }
        let rows = self.buffers.x.len() / self.model.config().hidden_size;
        self.head(rows - 1..rows)?;
        Ok(&mut self.logits)
    }

    /// Feeds one token and returns the logits `[V]` after it.
    ///
    /// # Errors
    /// An id outside the vocabulary, logits that are not finite.
    pub fn decode(&mut self, state: &mut State, token: u32) -> Result<&mut [f32]> {
        self.forward(&mut [Sequence { state, tokens: &[token] }])
    }

    /// Feeds each sequence its tokens, all in one pass, and returns the logits [B, V] after each
    /// sequence's last token. Sequences may have different numbers of tokens: prompts and single steps
    /// mix freely. The working memory is proportional to the total number of tokens.
    ///
    /// # Errors
    /// A sequence without tokens or an id outside the vocabulary (all states are then unchanged), logits
    /// that are not finite.
    pub fn forward(&mut self, batch: &mut [Sequence<'_>]) -> Result<&mut [f32]> {
        batch.iter().try_for_each(|sequence| self.check_tokens(sequence.tokens))?;
        self.run_blocks(batch, None)?;
        // Brings each sequence's last row to the front.
        let width = self.model.config().hidden_size;
        let mut end = 0;
        for (at, sequence) in batch.iter().enumerate() {
            end += sequence.tokens.len();
            self.buffers.x.copy_within((end - 1) * width..end * width, at * width);
        }
        self.head(0..batch.len())?;
        Ok(&mut self.logits)
    }

    /// Feeds tokens and hands the logits `[V]` of every position to `sink(position, logits)`.
    ///
    /// # Errors
    /// As [`prefill`](Self::prefill), and whatever the sink reports.
    pub fn logits(
        &mut self,
        state: &mut State,
        tokens: &[u32],
        sink: &mut dyn FnMut(usize, &[f32]) -> Result<()>,
    ) -> Result<()> {
        self.check_tokens(tokens)?;
        let vocab_size = self.model.config().vocab_size;
        let mut position = 0;
        for chunk in tokens.chunks(CHUNK_ROWS) {
            self.run_blocks(&mut [Sequence { state, tokens: chunk }], None)?;
            for first in (0..chunk.len()).step_by(LOGIT_ROWS) {
                self.head(first..chunk.len().min(first + LOGIT_ROWS))?;
                for logits in self.logits.chunks_exact(vocab_size) {
                    sink(position, logits)?;
                    position += 1;
                }
            }
        }
        Ok(())
    }

    /// Feeds tokens in one pass and shows the tensors inside to an observer.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn observe(
        &mut self,
        state: &mut State,
        tokens: &[u32],
        observer: &mut Observer<'_>,
    ) -> Result<()> {
        self.check_tokens(tokens)?;
        self.run_blocks(&mut [Sequence { state, tokens }], Some(observer))
    }

    /// Reads a buffer once with this engine's threads, as a yardstick for decoding.
    pub(crate) fn read(&self, buffer: &ReadBuffer) -> u64 {
        buffer.read(self.backend, &self.pool)
    }

    fn check_tokens(&self, tokens: &[u32]) -> Result<()> {
        if tokens.is_empty() {
            return Err(Error::Invalid("no tokens: a forward pass needs at least one".to_owned()));
        }
        let vocab_size = self.model.config().vocab_size;
        match tokens.iter().find(|&&id| id as usize >= vocab_size) {
            None => Ok(()),
            Some(&id) => Err(Error::TokenId { id, vocab_size }),
        }
    }

    /// Runs all tokens through all blocks and leaves the residual stream in `buffers.x`.
    fn run_blocks(
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
                    let mut first = 0;
                    for sequence in batch.iter_mut() {
                        let part = first * width..(first + sequence.tokens.len()) * width;
                        first += sequence.tokens.len();
                        let state = sequence.state.layer_mut(layer, width);
                        mlgru::forward(
                            self.backend,
                            pool,
                            &mut i[part.clone()],
                            &f[part],
                            &block.lower_bound,
                            state,
                        );
                    }
                },
            );
            show(Activation::TokenMixerOutput, &self.buffers.u);
            add_assign(&mut self.buffers.x, &self.buffers.u);
            self.buffers.mix_channels(self.backend, &self.pool, block, config.rms_norm_eps);
            show(Activation::ChannelMixerOutput, &self.buffers.u);
            add_assign(&mut self.buffers.x, &self.buffers.u);
            show(Activation::BlockOutput, &self.buffers.x);
        }
        for sequence in batch {
            sequence.state.count_tokens(sequence.tokens.len());
        }
        Ok(())
    }

    /// Logits of some rows of the residual stream.
    fn head(&mut self, rows: std::ops::Range<usize>) -> Result<()> {
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
        if self.logits.iter().all(|logit| logit.is_finite()) {
            return Ok(());
        }
        Err(Error::Invalid(
            "the model produced logits that are not finite; its weights are damaged or diverged"
                .to_owned(),
        ))
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

fn add_assign(x: &mut [f32], y: &[f32]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x += y;
    }
}
