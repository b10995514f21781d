//! Runs a model, on the processor or on a GPU: many independent sequences, prefill and decode alike.
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
//! A prompt gives the same bits at once, token by token, in any chunks, and beside any other sequences, with
//! any kernel tier, and in one piece on a GPU.

mod cpu;
mod cuda;
mod likelihood;
mod sampling;

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use mmfree_kernels::bandwidth::ReadBuffer;
use mmfree_kernels::cuda::Device;
use mmfree_kernels::pool::Pool;
use mmfree_kernels::ternary::Layout;
use mmfree_kernels::tier::Backend;

use crate::error::{Error, Result};
use crate::model::Model;
use crate::sampler::most_likely;
use crate::state::State;

use cpu::CpuEngine;
use cuda::CudaEngine;
pub use likelihood::{TokenScore, WantedRow};
pub use sampling::{Draw, Want};

/// Environment variable that names the kernel tier where the options do not.
pub const BACKEND_VARIABLE: &str = "MMFREE_BACKEND";
/// ε of the norm inside a BitLinear, whatever the configuration says (the released kernels fix it).
const BIT_LINEAR_EPS: f32 = 1e-6;
/// Rows whose logits are computed together when all positions are wanted.
const LOGIT_ROWS: usize = 32;
/// More threads than this are surely a mistake.
const MAX_THREADS: usize = 1024;

/// How an engine is built. `Default` chooses for this machine.
#[derive(Clone, Debug, Default)]
pub struct EngineOptions {
    /// Worker threads; `None` is one for each core.
    pub threads: Option<usize>,
    /// Where and how the model runs: `auto` (a GPU if one is usable, otherwise the CPU), `cuda` (GPU 0),
    /// `cuda:N`, `cpu` (the fastest tier that this CPU runs), or a tier by name (`scalar`, `avx2`, `avx512`,
    /// `avx512vbmi`, `amx`, `neon`). `None` is what the environment variable [`BACKEND_VARIABLE`] names, or `auto`.
    pub backend: Option<String>,
}

impl EngineOptions {
    /// The backend's name, from the options or the environment; `None` is `auto`.
    fn backend_name(&self) -> Option<String> {
        let name = self.backend.clone().or_else(|| std::env::var(BACKEND_VARIABLE).ok());
        name.filter(|name| name != "auto")
    }

    /// The layout of weights that the engine runs fastest.
    ///
    /// # Errors
    /// An unknown or unavailable backend.
    pub fn layout(&self) -> Result<Layout> {
        Ok(match self.backend_name() {
            Some(name) if cuda_ordinal(&name)?.is_some() => Layout::TwoBit,
            name => Layout::preferred(cpu_backend(name.as_deref())?),
        })
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

/// Runs one model.
#[derive(Debug)]
pub struct Engine {
    model: Arc<Model>,
    executor: Executor,
    /// Why `auto` did not choose a GPU that is there.
    fallback: Option<String>,
    /// Threads of the processor for what is done with a GPU's logits, once needed.
    host_pool: Option<Pool>,
}

/// Scratch memory and kernels.
#[derive(Debug)]
enum Executor {
    Cpu(Box<CpuEngine>),
    Cuda(Box<CudaEngine>),
}

impl Engine {
    /// Builds an engine.
    ///
    /// # Errors
    /// An unknown or unavailable backend, a model that does not fit into the GPU's memory, or an impossible
    /// number of threads.
    pub fn new(model: Arc<Model>, options: &EngineOptions) -> Result<Self> {
        let threads = match options.threads {
            None => thread::available_parallelism().unwrap_or(NonZeroUsize::MIN),
            Some(threads) => NonZeroUsize::new(threads)
                .filter(|threads| threads.get() <= MAX_THREADS)
                .ok_or_else(|| {
                    Error::Invalid(format!("{threads} threads: expected 1 to {MAX_THREADS}"))
                })?,
        };
        let name = options.backend_name();
        let cpu =
            |backend| Executor::Cpu(Box::new(CpuEngine::new(Arc::clone(&model), backend, threads)));
        let mut fallback = None;
        let executor = match &name {
            None => match CudaEngine::if_there_is_a_gpu(&model) {
                Some(Ok(engine)) => Executor::Cuda(Box::new(engine)),
                Some(Err(reason)) => {
                    fallback = Some(reason.to_string());
                    cpu(cpu_backend(None)?)
                }
                None => cpu(cpu_backend(None)?),
            },
            Some(name) => match cuda_ordinal(name)? {
                Some(ordinal) => {
                    Executor::Cuda(Box::new(CudaEngine::new(Arc::clone(&model), ordinal)?))
                }
                None => cpu(cpu_backend(Some(name))?),
            },
        };
        Ok(Self { model, executor, fallback, host_pool: None })
    }

    /// The model.
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// `cuda`, or the CPU's kernel tier.
    pub fn backend(&self) -> &'static str {
        match &self.executor {
            Executor::Cpu(engine) => engine.tier(),
            Executor::Cuda(_) => "cuda",
        }
    }

    /// Threads of this process that work, the caller included.
    pub fn threads(&self) -> usize {
        match &self.executor {
            Executor::Cpu(engine) => engine.threads(),
            Executor::Cuda(_) => 1,
        }
    }

    /// Where the model runs: one line for a run header.
    pub fn describe(&self) -> String {
        match &self.executor {
            Executor::Cpu(engine) => {
                let plural = if engine.threads() == 1 { "" } else { "s" };
                let why = self.fallback.as_ref();
                let why = why.map_or_else(String::new, |why| format!(" (not on the GPU: {why})"));
                format!("cpu {}, {} thread{plural}{why}", engine.tier(), engine.threads())
            }
            Executor::Cuda(engine) => engine.describe(),
        }
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
        let mut rows = 0;
        for chunk in tokens.chunks(self.chunk_rows()) {
            if cancel.load(Ordering::Relaxed) {
                return Err(Error::Cancelled);
            }
            self.run_blocks(&mut [Sequence { state, tokens: chunk }], None)?;
            rows = chunk.len();
        }
        self.head(rows - 1..rows)?;
        Ok(self.last_logits())
    }

    /// Feeds one token and returns the logits `[V]` after it.
    ///
    /// # Errors
    /// An id outside the vocabulary, logits that are not finite.
    pub fn decode(&mut self, state: &mut State, token: u32) -> Result<&mut [f32]> {
        self.forward(&mut [Sequence { state, tokens: &[token] }])
    }

    /// Feeds a token and then, one after the other, the most likely next ones, `count` steps in all. Returns
    /// the most likely token after each step, of equals the lowest id. On a GPU no step waits for the host.
    ///
    /// # Errors
    /// As [`decode`](Self::decode).
    pub fn greedy(&mut self, state: &mut State, token: u32, count: usize) -> Result<Vec<u32>> {
        self.check_tokens(&[token])?;
        if let Executor::Cuda(engine) = &mut self.executor
            && count > 0
            && let Some(tokens) = engine.greedy(state, token, count)?
        {
            return Ok(tokens);
        }
        let mut tokens: Vec<u32> = Vec::with_capacity(count);
        for _ in 0..count {
            let next = *tokens.last().unwrap_or(&token);
            let best = most_likely(self.decode(state, next)?).ok_or_else(not_finite)?;
            tokens.push(best.0);
        }
        Ok(tokens)
    }

    /// [`greedy`](Self::greedy) for a batch: each state has its first token. Returns the most likely tokens
    /// after each step, [count, B].
    ///
    /// # Errors
    /// As [`forward`](Self::forward), and different numbers of states and tokens.
    pub fn greedy_batch(
        &mut self,
        states: &mut [&mut State],
        tokens: &[u32],
        count: usize,
    ) -> Result<Vec<u32>> {
        self.check_tokens(tokens)?;
        if states.len() != tokens.len() {
            return Err(Error::Invalid(format!(
                "{} states and {} tokens",
                states.len(),
                tokens.len()
            )));
        }
        if let Executor::Cuda(engine) = &mut self.executor {
            return engine.decode_batch(states, tokens, count, None);
        }
        let mut found: Vec<u32> = Vec::with_capacity(count * tokens.len());
        for _ in 0..count {
            let from = found.len().saturating_sub(tokens.len());
            let next = if found.is_empty() { tokens } else { &found[from..] }.to_vec();
            self.forward(&mut steps_of(states, &next))?;
            let mut best = vec![None; states.len()];
            self.for_each_row(&mut best, &|best, logits| *best = most_likely(logits));
            for best in best {
                found.push(best.ok_or_else(not_finite)?.0);
            }
        }
        Ok(found)
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
        match &mut self.executor {
            Executor::Cpu(engine) => {
                engine.run_blocks(batch, None)?;
                engine.gather_last_rows(batch);
                engine.head(0..batch.len())?;
            }
            Executor::Cuda(engine) => engine.forward(batch)?,
        }
        Ok(self.last_logits())
    }

    /// Calls `task` with every item and its row of the logits [B, V] of the last [`forward`](Self::forward): the
    /// first item has the first row. On all of the engine's threads; with a GPU on the caller's. Returns the rows
    /// that are left.
    ///
    /// # Panics
    /// If there are more items than rows, or if a task panicked.
    pub fn for_each_row<T: Send>(
        &mut self,
        items: &mut [T],
        task: &(dyn Fn(&mut T, &mut [f32]) + Sync),
    ) -> &mut [f32] {
        let vocab_size = self.model.config().vocab_size;
        let (pool, logits) = match &mut self.executor {
            Executor::Cpu(engine) => {
                let (_, pool, logits) = engine.logits_and_pool();
                (Some(pool), logits)
            }
            Executor::Cuda(engine) => (None, &mut engine.logits[..]),
        };
        let (rows, rest) = logits.split_at_mut(items.len() * vocab_size);
        let mut pairs: Vec<_> = items.iter_mut().zip(rows.chunks_exact_mut(vocab_size)).collect();
        match pool {
            Some(pool) => pool.for_each_chunk(&mut pairs, 1, &|_, _, pairs| {
                pairs.iter_mut().for_each(|(item, row)| task(item, row));
            }),
            None => pairs.iter_mut().for_each(|(item, row)| task(item, row)),
        }
        rest
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
        for chunk in tokens.chunks(self.chunk_rows()) {
            self.run_blocks(&mut [Sequence { state, tokens: chunk }], None)?;
            for first in (0..chunk.len()).step_by(LOGIT_ROWS) {
                self.head(first..chunk.len().min(first + LOGIT_ROWS))?;
                for logits in self.last_logits().chunks_exact(vocab_size) {
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
        match &self.executor {
            Executor::Cpu(engine) => engine.read(buffer),
            Executor::Cuda(_) => 0,
        }
    }

    /// The GPU that the model runs on, and the packed weights that a decoded token streams there, in bytes.
    pub(crate) fn gpu(&self) -> Option<(&Arc<Device>, usize)> {
        match &self.executor {
            Executor::Cpu(_) => None,
            Executor::Cuda(engine) => Some((engine.device(), engine.streamed_bytes())),
        }
    }

    /// Rows of one pass that keep the machine busy in bounded memory.
    pub(crate) fn chunk_rows(&self) -> usize {
        match &self.executor {
            Executor::Cpu(_) => cpu::CHUNK_ROWS,
            Executor::Cuda(engine) => engine.chunk_rows(),
        }
    }

    fn run_blocks(
        &mut self,
        batch: &mut [Sequence<'_>],
        observer: Option<&mut Observer<'_>>,
    ) -> Result<()> {
        match &mut self.executor {
            Executor::Cpu(engine) => engine.run_blocks(batch, observer),
            Executor::Cuda(engine) => engine.run_blocks(batch, observer),
        }
    }

    /// Computes the logits of some rows of the last pass.
    fn head(&mut self, rows: std::ops::Range<usize>) -> Result<()> {
        match &mut self.executor {
            Executor::Cpu(engine) => engine.head(rows),
            Executor::Cuda(engine) => engine.head(rows),
        }
    }

    fn last_logits(&mut self) -> &mut [f32] {
        match &mut self.executor {
            Executor::Cpu(engine) => &mut engine.logits,
            Executor::Cuda(engine) => &mut engine.logits,
        }
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
}

/// The CPU's kernels of a name; `None` and `cpu` mean the fastest.
fn cpu_backend(name: Option<&str>) -> Result<Backend> {
    match name {
        None | Some("cpu") => Ok(Backend::detect()),
        Some(name) => Backend::from_name(name)
            .map_err(|reason| Error::Invalid(format!("{reason}, or auto, cpu, cuda, cuda:N"))),
    }
}

/// The GPU that a backend's name means; `None` if it means none.
fn cuda_ordinal(name: &str) -> Result<Option<usize>> {
    if name == "cuda" {
        return Ok(Some(0));
    }
    let Some(ordinal) = name.strip_prefix("cuda:") else { return Ok(None) };
    ordinal.parse().map(Some).map_err(|_| {
        Error::Invalid(format!("backend '{name}': expected cuda:N with the number of a GPU"))
    })
}

fn check_finite(logits: &[f32]) -> Result<()> {
    // Without a branch for each, which compiles to vector code.
    if logits.iter().fold(true, |all, logit| all & logit.is_finite()) {
        return Ok(());
    }
    Err(not_finite())
}

/// A token for each state.
fn steps_of<'a>(states: &'a mut [&mut State], tokens: &'a [u32]) -> Vec<Sequence<'a>> {
    let pairs = states.iter_mut().zip(tokens);
    pairs.map(|(state, token)| Sequence { state, tokens: std::slice::from_ref(token) }).collect()
}

fn not_finite() -> Error {
    Error::Invalid(
        "the model produced logits that are not finite; its weights are damaged or diverged"
            .to_owned(),
    )
}
