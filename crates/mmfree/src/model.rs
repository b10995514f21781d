//! The model: weights in the layout that the engine runs.

use std::hash::Hasher;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock};
use std::{fmt, thread};

use mmfree_kernels::memory::WeightArena;
use mmfree_kernels::mlgru;
use mmfree_kernels::ternary::{Layout, TernaryMatrix};
use twox_hash::XxHash3_64;

use crate::checkpoint::{Checkpoint, EmbeddingTable, layout};
use crate::config::ModelConfig;
use crate::engine::EngineOptions;
use crate::error::{Error, Result};

/// A dense layer: `BitLinear(x) = (Σ q · t) · γ / s` with `q, s = Q8(RMSNorm(x; norm, 1e-6))`.
#[derive(Debug)]
pub(crate) struct BitLinear {
    /// `[K]`
    pub norm: Vec<f32>,
    /// [N, K]
    pub weights: TernaryMatrix,
}

/// One block: token mixer and channel mixer.
#[derive(Debug)]
pub(crate) struct Block {
    pub attn_norm: Vec<f32>,
    pub i_proj: BitLinear,
    pub f_proj: BitLinear,
    pub g_proj: BitLinear,
    pub g_norm: Vec<f32>,
    pub o_proj: BitLinear,
    /// β of this layer, `[D]`.
    pub lower_bound: Vec<f32>,
    pub mlp_norm: Vec<f32>,
    pub gate_proj: BitLinear,
    pub down_proj: BitLinear,
}

/// A loaded model, immutable and shared by engines.
pub struct Model {
    config: ModelConfig,
    pub(crate) embeddings: EmbeddingTable,
    pub(crate) blocks: Vec<Block>,
    /// The last norm, `[D]`.
    pub(crate) norm: Vec<f32>,
    pub(crate) lm_head: BitLinear,
    fingerprint: OnceLock<u64>,
}

/// Where weights come from when a model is put together.
trait WeightSource: Sync {
    fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>>;
    fn ternary(&self, name: &str, rows: usize, cols: usize) -> Result<TernaryMatrix>;

    fn bit_linear(&self, name: &str, rows: usize, cols: usize) -> Result<BitLinear> {
        Ok(BitLinear {
            norm: self.vector(&format!("{name}.norm.weight"), cols)?,
            weights: self.ternary(name, rows, cols)?,
        })
    }

    fn block(&self, config: &ModelConfig, layer: usize, lower_bound: Vec<f32>) -> Result<Block> {
        let (d, f) = (config.hidden_size, config.intermediate_size);
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        Ok(Block {
            attn_norm: self.vector(&name("attn_norm.weight"), d)?,
            i_proj: self.bit_linear(&name("attn.i_proj"), d, d)?,
            f_proj: self.bit_linear(&name("attn.f_proj"), d, d)?,
            g_proj: self.bit_linear(&name("attn.g_proj"), d, d)?,
            g_norm: self.vector(&name("attn.g_norm.weight"), d)?,
            o_proj: self.bit_linear(&name("attn.o_proj"), d, d)?,
            lower_bound,
            mlp_norm: self.vector(&name("mlp_norm.weight"), d)?,
            gate_proj: self.bit_linear(&name("mlp.gate_proj"), 2 * f, d)?,
            down_proj: self.bit_linear(&name("mlp.down_proj"), d, f)?,
        })
    }
}

struct FromCheckpoint<'a> {
    checkpoint: &'a Checkpoint,
    layout: Layout,
    arena: WeightArena,
}

impl WeightSource for FromCheckpoint<'_> {
    fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        self.checkpoint.vector(name, len)
    }

    fn ternary(&self, name: &str, rows: usize, cols: usize) -> Result<TernaryMatrix> {
        self.checkpoint.ternary_in(name, rows, cols, self.layout, &self.arena)
    }
}

struct Random {
    layout: Layout,
    arena: WeightArena,
    seed: u64,
}

impl WeightSource for Random {
    fn vector(&self, _name: &str, len: usize) -> Result<Vec<f32>> {
        Ok(vec![1.0; len])
    }

    fn ternary(&self, name: &str, rows: usize, cols: usize) -> Result<TernaryMatrix> {
        let seed = XxHash3_64::oneshot_with_seed(self.seed, name.as_bytes());
        // Keeps outputs near unit variance: a third of the trits is zero.
        let scale = (1.5 / cols as f32).sqrt();
        TernaryMatrix::random(&self.arena, self.layout, rows, cols, scale, seed).map_err(|reason| {
            Error::Ternary { file: "random weights".to_owned(), tensor: name.to_owned(), reason }
        })
    }
}

impl Model {
    /// [`load_in`](Self::load_in), in the layout that suits engines with default options.
    ///
    /// # Errors
    /// As there, and an unknown or unavailable backend in the environment.
    pub fn load(checkpoint: &Checkpoint) -> Result<Self> {
        Self::load_in(checkpoint, EngineOptions::default().layout()?)
    }

    /// Loads every weight of a checkpoint, quantising full-precision ones, and packs them in a layout.
    /// Every engine runs every layout and computes the same; [`EngineOptions::layout`] says which is
    /// fastest.
    ///
    /// # Errors
    /// Non-finite or invalid weights, by file and tensor; no memory.
    pub fn load_in(checkpoint: &Checkpoint, layout: Layout) -> Result<Self> {
        let config = checkpoint.config();
        let (d, layers) = (config.hidden_size, config.num_hidden_layers);
        let lower_bounds = if config.use_lower_bound {
            let bounds = checkpoint.matrix_f32(layout::LOWER_BOUNDS, layers, d)?;
            mlgru::lower_bounds(&bounds, d)
        } else {
            vec![0.0; layers * d]
        };
        let source = FromCheckpoint { checkpoint, layout, arena: WeightArena::new() };
        Self::assemble(config, checkpoint.embeddings()?, &lower_bounds, &source)
    }

    /// A model of random weights, the same for the same seed, for benchmarks. Only the embeddings of
    /// the first `tokens` ids are filled; the others are zero and take no memory.
    ///
    /// # Errors
    /// No memory.
    pub fn random(config: &ModelConfig, layout: Layout, tokens: usize, seed: u64) -> Result<Self> {
        let (d, layers) = (config.hidden_size, config.num_hidden_layers);
        let lower_bounds: Vec<f32> =
            (0..layers).flat_map(|layer| vec![layer as f32 / layers as f32; d]).collect();
        let embeddings = EmbeddingTable::random(config.vocab_size, d, tokens, seed)?;
        let source = Random { layout, arena: WeightArena::new(), seed };
        Self::assemble(config, embeddings, &lower_bounds, &source)
    }

    fn assemble(
        config: &ModelConfig,
        embeddings: EmbeddingTable,
        lower_bounds: &[f32],
        source: &impl WeightSource,
    ) -> Result<Self> {
        let (d, layers) = (config.hidden_size, config.num_hidden_layers);
        let blocks = in_parallel(layers, |layer| {
            source.block(config, layer, lower_bounds[layer * d..(layer + 1) * d].to_vec())
        })?;
        Ok(Self {
            embeddings,
            blocks,
            norm: source.vector("model.norm.weight", d)?,
            lm_head: source.bit_linear("lm_head", config.vocab_size, d)?,
            config: config.clone(),
            fingerprint: OnceLock::new(),
        })
    }

    /// The configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// A hash of configuration and weights: a saved state belongs to the model with the same one, be it
    /// loaded from full-precision or packed weights. Of the embeddings, which stay on disk, a sample counts.
    pub fn fingerprint(&self) -> u64 {
        *self.fingerprint.get_or_init(|| {
            let mut hash = Fingerprint(XxHash3_64::with_seed(0));
            let config = &self.config;
            for size in [
                config.vocab_size,
                config.hidden_size,
                config.intermediate_size,
                config.num_hidden_layers,
            ] {
                hash.0.write(&(size as u64).to_le_bytes());
            }
            hash.floats(&[config.rms_norm_eps]);
            let mut row = vec![0.0; config.hidden_size];
            for id in (0..config.vocab_size).step_by(config.vocab_size.div_ceil(64)) {
                // A row that cannot be read makes every forward pass that needs it fail.
                if self.embeddings.row_into(id as u32, &mut row).is_ok() {
                    hash.floats(&row);
                }
            }
            for block in &self.blocks {
                for vector in [&block.attn_norm, &block.g_norm, &block.lower_bound, &block.mlp_norm]
                {
                    hash.floats(vector);
                }
                block.bit_linears().into_iter().for_each(|layer| hash.bit_linear(layer));
            }
            hash.floats(&self.norm);
            hash.bit_linear(&self.lm_head);
            hash.0.finish()
        })
    }

    /// Packed weights that decoding one token streams, in bytes.
    pub fn streamed_bytes(&self) -> usize {
        let blocks = self.blocks.iter().flat_map(Block::bit_linears);
        blocks.chain([&self.lm_head]).map(|layer| layer.weights.packed_bytes()).sum()
    }
}

impl Block {
    fn bit_linears(&self) -> [&BitLinear; 6] {
        let Self { i_proj, f_proj, g_proj, o_proj, gate_proj, down_proj, .. } = self;
        [i_proj, f_proj, g_proj, o_proj, gate_proj, down_proj]
    }
}

impl fmt::Debug for Model {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Model").field("config", &self.config).finish_non_exhaustive()
    }
}

struct Fingerprint(XxHash3_64);

impl Fingerprint {
    fn floats(&mut self, values: &[f32]) {
        self.0.write(bytemuck::cast_slice(values));
    }

    fn bit_linear(&mut self, layer: &BitLinear) {
        self.floats(&layer.norm);
        self.floats(&[layer.weights.scale()]);
        layer.weights.for_each_word(|words| self.0.write(bytemuck::bytes_of(words)));
    }
}

/// `[work(0), …, work(count − 1)]`, computed on all cores; the first error wins.
fn in_parallel<T: Send>(count: usize, work: impl Fn(usize) -> Result<T> + Sync) -> Result<Vec<T>> {
    let threads = thread::available_parallelism().map_or(1, NonZeroUsize::get).min(count);
    let next = AtomicUsize::new(0);
    let results: Vec<Mutex<Option<Result<T>>>> = (0..count).map(|_| Mutex::new(None)).collect();
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some(slot) = results.get(index) else { return };
                    *slot.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) =
                        Some(work(index));
                }
            });
        }
    });
    results
        .into_iter()
        .filter_map(|slot| slot.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner()))
        .collect()
}
