//! Steps of many sequences, a token of each, in one launch: a persistent grid that walks through all layers.
//!
//! The source tells how it works. The same bits as the kernels that take a launch for each product, and as the CPU.

use std::ops::RangeInclusive;
use std::sync::Arc;

use crate::cuda::{Buffer, Constant, CudaError, Device, Kernel, Launch, Source};
use crate::decode::{Shape, Weights};
use crate::mlgru::cuda::Sequences;
use crate::ternary_gemm::cuda::{BLOCK_ROW_TILES, Quantized, TILE_COLS, TILE_ROWS};

pub(crate) const SOURCE: Source = Source {
    name: "batch",
    text: concat!(
        include_str!("consumers.cuh"),
        include_str!("../ternary_gemm/warpgroup.cuh"),
        include_str!("../fused_rows/row.cuh"),
        include_str!("batch.cu")
    ),
    hopper_only: true,
    contracts: false,
};

/// Sequences of a batch. Fewer are faster as a stream of weights, more with a launch for each product.
pub const SEQUENCES: RangeInclusive<usize> = 9..=128;

// As in the source.
const PHASES: usize = 5;
const TOKENS: usize = 64;
const TILE_BYTES: usize = TOKENS * TILE_COLS;
const WEIGHT_BYTES: usize = BLOCK_ROW_TILES * 512;
const MOST_STAGES: usize = 32;
const MOST_ROWS: usize = 2;
const THREADS: usize = 256 + 128;
/// The widest row: a thread holds eight fours of it.
const WIDEST: usize = 256 * 4 * 8;
/// Shared memory beside rows and rings, and what the driver keeps.
const OTHER_SHARED_BYTES: usize = 3072;
/// Words of the counters.
const COUNTERS: usize = 96;
/// Steps of one launch, so that it ends in reasonable time.
const MAX_STEPS: usize = 64;

/// For batches of so many tiles of tokens, and stages of activations on their way.
const KERNELS: [(usize, usize); 2] = [(1, 8), (2, 5)];

#[repr(C)]
struct Args {
    weights: u64,
    vectors: u64,
    gammas: u64,
    embeddings: u64,
    x: u64,
    states: u64,
    tokens: u64,
    history: u64,
    logits: u64,
    not_finite: u64,
    sums: u64,
    q: [u64; PHASES],
    counters: u64,
    sums_at: [u64; PHASES],
    splits: [u32; PHASES],
    m: u32,
    capacity: u32,
    layers: u32,
    steps: u32,
    embedding_type: u32,
    input_stages: u32,
    weight_stages: u32,
    eps: f32,
}

/// A kernel for batches of a size, and its shared memory.
#[derive(Debug)]
struct BatchKernel {
    token_tiles: usize,
    input_stages: usize,
    weight_stages: usize,
    shared_bytes: usize,
    /// Compiled at its first use.
    kernel: Option<Kernel>,
}

impl BatchKernel {
    /// `None` if rows are too wide, or there is too little shared memory.
    fn new(
        shape: Shape,
        (token_tiles, input_stages): (usize, usize),
        shared_bytes: usize,
    ) -> Option<Self> {
        let row_bytes = (4 * shape.width.max(shape.inner)).next_multiple_of(128);
        let is_narrow = shape.width.max(shape.inner) <= WIDEST;
        let fixed = row_bytes + input_stages * token_tiles * TILE_BYTES;
        let available = shared_bytes.checked_sub(OTHER_SHARED_BYTES + fixed)?;
        let weight_stages = (available / WEIGHT_BYTES).min(MOST_STAGES);
        (is_narrow && weight_stages >= 2).then_some(Self {
            token_tiles,
            input_stages,
            weight_stages,
            shared_bytes: fixed + weight_stages * WEIGHT_BYTES,
            kernel: None,
        })
    }

    fn constants(&self, shape: Shape) -> [Constant; 4] {
        [
            ("WIDTH", shape.width),
            ("INNER", shape.inner),
            ("VOCAB", shape.vocab),
            ("TOKEN_TILES", self.token_tiles),
        ]
    }
}

/// The kernels and what they work with.
#[derive(Debug)]
pub struct BatchDecoder {
    device: Arc<Device>,
    shape: Shape,
    eps: f32,
    kernels: Vec<BatchKernel>,
    /// Residual stream [M, D].
    x: Buffer<f32>,
    /// Inputs of the products.
    inputs: [Quantized; PHASES],
    /// Of each product [M, columns]; zeros, between steps, where parts of K are added.
    sums: Buffer<i32>,
    counters: Buffer<u32>,
    tokens: Buffer<u32>,
    /// Tokens that each step chose, [steps, M].
    history: Buffer<u32>,
    logits: Buffer<f32>,
    not_finite: Buffer<u32>,
}

/// A product of a step, as the source cuts it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Product {
    columns: usize,
    /// Parts of K, whose sums are added in memory.
    splits: usize,
}

/// The products of a step, for so many blocks.
fn products(Shape { width, inner, vocab, .. }: Shape, blocks: usize) -> [Product; PHASES] {
    let products = [
        (3 * width, width),
        (width, width),
        (2 * inner, width),
        (width, inner),
        (vocab.next_multiple_of(TILE_ROWS), width),
    ];
    let mut products = products.map(|(columns, inputs): (usize, usize)| {
        let row_blocks = columns.div_ceil(BLOCK_ROW_TILES * TILE_ROWS);
        Product {
            columns,
            splits: (blocks / row_blocks).clamp(1, inputs.div_ceil(TILE_COLS).min(8)),
        }
    });
    // Nobody puts zeros where the head's sums were.
    products[PHASES - 1].splits = 1;
    products
}

impl BatchDecoder {
    /// For a model; nothing is compiled yet. `None` if the device or the model's widths are not those that the kernels
    /// are for: Hopper, widths of whole tiles.
    ///
    /// # Errors
    /// No memory.
    pub fn new(
        device: &Arc<Device>,
        weights: &Weights,
        eps: f32,
    ) -> Result<Option<Self>, CudaError> {
        let shape = weights.shape();
        let kernels: Vec<_> = KERNELS
            .into_iter()
            .filter_map(|kernel| BatchKernel::new(shape, kernel, device.shared_bytes()))
            .collect();
        let has_whole_tiles =
            shape.width.is_multiple_of(TILE_COLS) && shape.inner.is_multiple_of(TILE_ROWS / 2);
        if device.capability() != (9, 0) || !has_whole_tiles || kernels.is_empty() {
            return Ok(None);
        }
        let quantized = || Quantized::new(device);
        Ok(Some(Self {
            device: Arc::clone(device),
            shape,
            eps,
            kernels,
            x: Buffer::zeros(device, 1)?,
            inputs: [quantized()?, quantized()?, quantized()?, quantized()?, quantized()?],
            sums: Buffer::zeros(device, 1)?,
            counters: Buffer::zeros(device, COUNTERS)?,
            tokens: Buffer::zeros(device, 1)?,
            history: Buffer::zeros(device, 1)?,
            logits: Buffer::zeros(device, 1)?,
            not_finite: Buffer::zeros(device, 1)?,
        }))
    }

    /// The kernel for so many sequences.
    fn kernel_at(&self, count: usize) -> Option<usize> {
        let is_batch =
            SEQUENCES.contains(&count) && count <= MOST_ROWS * self.device.multiprocessors();
        let fits = |kernel: &BatchKernel| count <= kernel.token_tiles * TOKENS;
        self.kernels.iter().position(fits).filter(|_| is_batch)
    }

    /// Whether there is a kernel for so many sequences.
    pub fn takes(&self, count: usize) -> bool {
        self.kernel_at(count).is_some()
    }

    /// Submits one step: feeds a token to each sequence. [`logits`](Self::logits) are then those behind it.
    ///
    /// # Errors
    /// A number of sequences that it does not [take](Self::takes), or shapes that do not fit the model; no compiler, or its or
    /// the driver's complaints; no memory.
    pub fn step(
        &mut self,
        weights: &Weights,
        sequences: &Sequences,
        tokens: &[u32],
    ) -> Result<(), CudaError> {
        self.prepare(tokens, 1)?;
        self.logits.reserve(tokens.len() * self.shape.vocab)?;
        self.submit(weights, sequences, 0, 1, true)
    }

    /// The logits [M, V] of the last step.
    pub fn logits(&mut self) -> &mut Buffer<f32> {
        &mut self.logits
    }

    /// Feeds a token to each sequence and then, `count` steps in all, the most likely next ones, of equals the lowest, without
    /// a look from the host. Returns what each step chose, [count, M]; `None` if a logit was not finite.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn greedy(
        &mut self,
        weights: &Weights,
        sequences: &Sequences,
        tokens: &[u32],
        count: usize,
    ) -> Result<Option<Vec<u32>>, CudaError> {
        self.prepare(tokens, count)?;
        self.not_finite.clear()?;
        for first in (0..count).step_by(MAX_STEPS) {
            self.submit(weights, sequences, first, MAX_STEPS.min(count - first), false)?;
        }
        let (mut chosen, mut not_finite) = (vec![0; count * tokens.len()], [0]);
        self.history.read(0, &mut chosen)?;
        self.not_finite.read(0, &mut not_finite)?;
        Ok((not_finite[0] == 0).then_some(chosen))
    }

    /// Makes room for so many steps that begin with some tokens, and compiles at the first use.
    fn prepare(&mut self, tokens: &[u32], steps: usize) -> Result<(), CudaError> {
        let count = tokens.len();
        let Shape { width, inner, vocab, .. } = self.shape;
        let Some(at) = self.kernel_at(count) else {
            return Err(CudaError::Shape(format!("a step of {count} sequences")));
        };
        if let Some(token) = tokens.iter().find(|&&token| token as usize >= vocab) {
            return Err(CudaError::Shape(format!("a step of token {token}")));
        }
        let kernel = &mut self.kernels[at];
        if kernel.kernel.is_none() {
            let constants = kernel.constants(self.shape);
            let compiled =
                self.device.kernel_for(SOURCE, &constants, "batch_step", kernel.shared_bytes)?;
            kernel.kernel = Some(compiled);
        }
        let before = self.inputs[0].capacity;
        let [mix, out, glu, down, head] = &mut self.inputs;
        mix.reshape(3, count, width)?;
        out.reshape(1, count, width)?;
        glu.reshape(1, count, width)?;
        down.reshape(1, count, inner)?;
        head.reshape(1, count, width)?;
        self.x.reserve(count * width)?;
        let products = products(self.shape, self.device.multiprocessors());
        let columns: usize = products.iter().map(|product| product.columns).sum();
        self.sums.reserve(columns * head.capacity)?;
        if head.capacity != before {
            // They lie elsewhere than those of the last steps.
            self.sums.clear()?;
        }
        self.history.reserve(steps * count)?;
        self.tokens.reserve(count)?;
        self.tokens.write(0, tokens)
    }

    /// Submits steps; what they choose goes to `history` from step `first` on.
    fn submit(
        &mut self,
        weights: &Weights,
        sequences: &Sequences,
        first: usize,
        steps: usize,
        wants_logits: bool,
    ) -> Result<(), CudaError> {
        let Shape { layers, width, .. } = self.shape;
        let input = &self.inputs[0];
        let (count, capacity) = (input.rows, input.capacity);
        let kernel = self.kernel_at(count).map(|at| &self.kernels[at]);
        let fits = weights.shape() == self.shape
            && sequences.are_single_tokens()
            && sequences.rows == count
            && sequences.state_len >= layers * width
            && input.tile_tokens == TOKENS;
        let Some((parts, kernel)) =
            kernel.and_then(|parts| Some((parts, parts.kernel.as_ref()?))).filter(|_| fits)
        else {
            return Err(CudaError::Shape(format!("a step of {count} sequences")));
        };
        let products = products(self.shape, self.device.multiprocessors());
        let mut end = 0;
        let sums_at = products.map(|product| {
            let at = end;
            end += (capacity * product.columns) as u64;
            at
        });
        let args = Args {
            weights: weights.tiles.address(0),
            vectors: weights.vectors.address(0),
            gammas: weights.gammas.address(0),
            embeddings: weights.embeddings.address(0),
            x: self.x.address(0),
            states: sequences.states.address(0),
            tokens: self.tokens.address(0),
            history: self.history.address(first * count),
            logits: if wants_logits { self.logits.address(0) } else { 0 },
            not_finite: self.not_finite.address(0),
            sums: self.sums.address(0),
            q: self.inputs.each_ref().map(|input| input.values.address(0)),
            counters: self.counters.address(0),
            sums_at,
            splits: products.map(|product| product.splits as u32),
            m: count as u32,
            capacity: capacity as u32,
            layers: layers as u32,
            steps: steps as u32,
            embedding_type: weights.embedding_type.code(),
            input_stages: parts.input_stages as u32,
            weight_stages: parts.weight_stages as u32,
            eps: self.eps,
        };
        let launch = Launch {
            cooperative: true,
            ..Launch::new([self.device.multiprocessors(), 1, 1], THREADS, parts.shared_bytes)
        };
        // SAFETY: the buffers were made for, or checked against, the model's shape and the number of sequences.
        unsafe { kernel.launch(launch, &args) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::{compile_with, is_compiler_present};

    /// Bytes of shared memory of an H100 or H200.
    const SHARED_BYTES: usize = 232_448;

    fn shape(width: usize, inner: usize) -> Shape {
        Shape { layers: 2, width, inner, vocab: 32000 }
    }

    #[test]
    fn published_sizes_keep_the_next_products_weights_in_shared_memory() {
        for (width, inner) in [(1024, 2816), (2048, 5632), (2560, 6912)] {
            for kernel in KERNELS {
                let parts = BatchKernel::new(shape(width, inner), kernel, SHARED_BYTES);
                let parts = parts.expect("fits");
                assert!(parts.shared_bytes + OTHER_SHARED_BYTES <= SHARED_BYTES);
                assert!(parts.weight_stages >= 12, "{width}: {parts:?}");
            }
        }
        assert!(BatchKernel::new(shape(5120, 13824), KERNELS[0], SHARED_BYTES).is_none());
        assert!(BatchKernel::new(shape(2048, 5632), KERNELS[0], 1 << 16).is_none());
    }

    #[test]
    fn every_size_compiles_without_spilling_or_serialising() {
        if !is_compiler_present() {
            assert!(std::env::var_os("MMFREE_REQUIRE_NVRTC").is_none(), "libnvrtc is not there");
            eprintln!("!!! SKIPPED, batches NOT COMPILED: no libnvrtc");
            return;
        }
        for (width, inner) in [(256, 328), (1024, 2816), (2048, 5632), (2560, 6912)] {
            for kernel in KERNELS {
                let shape = shape(width, inner);
                let parts = BatchKernel::new(shape, kernel, SHARED_BYTES).expect("fits");
                let compiled = compile_with(SOURCE, &parts.constants(shape), "sm_90a");
                let log = compiled.expect("compiles").log;
                assert!(log.contains(" 0 bytes spill stores"), "{width} {kernel:?}: {log}");
                assert!(!log.contains("serialized"), "{width} {kernel:?}: {log}");
            }
        }
    }
}
