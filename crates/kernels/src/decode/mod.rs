//! One token of one sequence in one launch: a persistent grid that walks through all layers.
//!
//! The source tells how it works. The same bits as the other kernels, and as the CPU's.

mod weights;

use std::sync::Arc;

use crate::cuda::{Buffer, CudaError, Device, Kernel, Launch, Source};
use crate::ternary_gemm::cuda::{TILE_COLS, TILE_ROWS};

pub use weights::{Projection, Shape, Vector, Weights};

pub(crate) const SOURCE: Source = Source {
    name: "decode",
    text: include_str!("decode.cu"),
    hopper_only: false,
    contracts: false,
};

// As in the source.
const THREADS: usize = 512;
const WARPS: usize = THREADS / 32;
const CHUNK_BYTES: usize = 1024;
const PHASES: usize = 5;
/// Grid barriers of a layer.
const LAYER_BARRIERS: usize = 4;
/// Static shared memory of the kernel, and what the driver keeps for itself.
const OTHER_SHARED_BYTES: usize = 4096;
/// A ring longer than this brings nothing.
const MAX_SLOTS: usize = 16;

#[repr(C)]
struct Args {
    weights: u64,
    vectors: u64,
    gammas: u64,
    embeddings: u64,
    state: u64,
    exchange: u64,
    logits: u64,
    best: u64,
    not_finite: u64,
    history: u64,
    barrier: u64,
    tile_at: [u64; PHASES],
    layer_tiles: u64,
    row_tiles: [u32; PHASES],
    col_tiles: [u32; PHASES],
    layers: u32,
    width: u32,
    inner: u32,
    vocab: u32,
    segment_tiles: u32,
    embedding_type: u32,
    slots: u32,
    row_floats: u32,
    vector_floats: u32,
    q_bytes: u32,
    block_sums: u32,
    barrier_base: u32,
    token: i32,
    eps: f32,
}

/// The token that a step feeds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Token {
    /// This one.
    Id(u32),
    /// The most likely one after the last step.
    Best,
}

/// How a block's shared memory is divided, as the source does it.
#[derive(Debug)]
struct SharedMemory {
    /// Chunks of a warp's ring.
    slots: usize,
    row_floats: usize,
    vector_floats: usize,
    q_bytes: usize,
    /// 32-bit sums of the rows that a block owns.
    block_sums: usize,
    bytes: usize,
}

impl SharedMemory {
    /// `None` if a model's rows do not fit, or a block would own more channels of the width than it has threads.
    fn new(device: &Device, shape: Shape, blocks: usize) -> Option<Self> {
        let Shape { width: d, inner, vocab, .. } = shape;
        let padded = |n: usize| n.next_multiple_of(TILE_COLS);
        let owned = |n: usize| n.div_ceil(TILE_ROWS).div_ceil(blocks) * TILE_ROWS;
        let row_floats = (2 * d).max(inner);
        let vector_floats = (4 * d).max(inner);
        let q_bytes = (3 * padded(d)).max(padded(inner));
        // The second half of the gate projection may begin within a tile.
        let block_sums = (3 * owned(d)).max(2 * owned(inner) + TILE_ROWS).max(owned(vocab));
        let fixed = 4 * (row_floats + vector_floats + block_sums) + q_bytes;
        let available = device.shared_bytes().saturating_sub(OTHER_SHARED_BYTES);
        let has_ring = device.capability().0 >= 9;
        let slots = if has_ring {
            (available.saturating_sub(fixed) / (WARPS * (CHUNK_BYTES + 8))).min(MAX_SLOTS)
        } else {
            0
        };
        if has_ring && slots < 2 || fixed > available || owned(d) > THREADS {
            return None;
        }
        let bytes = fixed + WARPS * slots * (CHUNK_BYTES + 8);
        Some(Self { slots, row_floats, vector_floats, q_bytes, block_sums, bytes })
    }
}

/// The kernel and what it keeps between tokens.
#[derive(Debug)]
pub struct Decoder {
    kernel: Kernel,
    shape: Shape,
    blocks: usize,
    shared: SharedMemory,
    eps: f32,
    /// What blocks tell each other.
    exchange: Buffer<f32>,
    logits: Buffer<f32>,
    /// Key of the most likely token; whether a logit was not finite; arrivals at barriers.
    control: Buffer<u64>,
    arrivals: u32,
    /// Tokens that [`greedy`](Self::greedy) fed.
    history: Buffer<u32>,
}

impl Decoder {
    /// Compiles and loads for a model. `None` if its rows do not fit into shared memory.
    ///
    /// # Errors
    /// No compiler, or its or the driver's complaints; no memory.
    pub fn new(
        device: &Arc<Device>,
        weights: &Weights,
        eps: f32,
    ) -> Result<Option<Self>, CudaError> {
        let shape = weights.shape();
        let (d, blocks) = (shape.width, device.multiprocessors());
        let Some(shared) = SharedMemory::new(device, shape, blocks) else { return Ok(None) };
        Ok(Some(Self {
            kernel: device.kernel(SOURCE, "decode", shared.bytes)?,
            shape,
            blocks,
            shared,
            eps,
            exchange: Buffer::zeros(device, 3 * d + shape.inner)?,
            logits: Buffer::zeros(device, shape.vocab)?,
            control: Buffer::zeros(device, 3)?,
            arrivals: 0,
            history: Buffer::zeros(device, 1)?,
        }))
    }

    /// Submits one step: feeds a token to the state [L, D]. The logits are then in [`logits`](Self::logits).
    ///
    /// # Errors
    /// Shapes or a token that do not fit the model; the driver's.
    pub fn step(
        &mut self,
        weights: &Weights,
        state: &mut Buffer<f32>,
        token: u32,
    ) -> Result<(), CudaError> {
        self.submit(weights, state, Token::Id(token), 0)
    }

    /// Feeds a token and then, one after the other, the most likely next ones, `count` steps in all, without
    /// a look from the host. Returns the most likely token after each step; `None` if a logit was not finite.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn greedy(
        &mut self,
        weights: &Weights,
        state: &mut Buffer<f32>,
        token: u32,
        count: usize,
    ) -> Result<Option<Vec<u32>>, CudaError> {
        self.history.reserve(count)?;
        let mut token = Token::Id(token);
        for step in 0..count {
            self.submit(weights, state, token, self.history.address(step))?;
            token = Token::Best;
        }
        let mut tokens = vec![0; count + 1];
        self.history.read(0, &mut tokens[..count])?;
        let Some(last) = self.best()? else { return Ok(None) };
        tokens[count] = last;
        tokens.remove(0);
        Ok(Some(tokens))
    }

    fn submit(
        &mut self,
        weights: &Weights,
        state: &mut Buffer<f32>,
        token: Token,
        history: u64,
    ) -> Result<(), CudaError> {
        let Shape { layers, width, inner, vocab } = self.shape;
        let is_known = match token {
            Token::Id(id) => (id as usize) < vocab,
            Token::Best => self.arrivals != 0,
        };
        if weights.shape() != self.shape || state.len() < layers * width || !is_known {
            return Err(CudaError::Shape(format!("a step of {token:?}")));
        }
        let phases = phases(weights);
        let args = Args {
            weights: weights.tiles.address(0),
            vectors: weights.vectors.address(0),
            gammas: weights.gammas.address(0),
            embeddings: weights.embeddings.address(0),
            state: state.address(0),
            exchange: self.exchange.address(0),
            logits: self.logits.address(0),
            best: self.control.address(0),
            not_finite: self.control.address(1),
            history,
            barrier: self.control.address(2),
            tile_at: phases.map(|phase| phase.first as u64),
            layer_tiles: weights.layer_tiles() as u64,
            row_tiles: phases.map(|phase| phase.row_tiles as u32),
            col_tiles: phases.map(|phase| phase.col_tiles as u32),
            layers: layers as u32,
            width: width as u32,
            inner: inner as u32,
            vocab: vocab as u32,
            segment_tiles: weights.mix(0).segment_tiles as u32,
            embedding_type: weights.embedding_type.code(),
            slots: self.shared.slots as u32,
            row_floats: self.shared.row_floats as u32,
            vector_floats: self.shared.vector_floats as u32,
            q_bytes: self.shared.q_bytes as u32,
            block_sums: self.shared.block_sums as u32,
            barrier_base: self.arrivals,
            token: match token {
                Token::Id(id) => id as i32,
                Token::Best => -1,
            },
            eps: self.eps,
        };
        let launch = Launch {
            overlapping: false,
            grid: [self.blocks, 1, 1],
            threads: THREADS,
            shared_bytes: self.shared.bytes,
            cooperative: true,
        };
        // SAFETY: the buffers were made for, or checked against, the model's shape.
        unsafe { self.kernel.launch(launch, &args)? };
        let barriers = layers * LAYER_BARRIERS;
        self.arrivals = self.arrivals.wrapping_add((barriers * self.blocks) as u32);
        Ok(())
    }

    /// The logits `[V]` of the last step.
    pub fn logits(&self) -> &Buffer<f32> {
        &self.logits
    }

    /// The most likely token after the last step, of equals the lowest; `None` if a logit was not finite.
    ///
    /// # Errors
    /// The driver's, also those of the step.
    pub fn best(&mut self) -> Result<Option<u32>, CudaError> {
        let mut control = [0; 2];
        self.control.read(0, &mut control)?;
        if control[1] != 0 {
            self.control.write(1, &[0])?;
            return Ok(None);
        }
        Ok(Some(!(control[0] as u32)))
    }
}

/// The products of a layer, and the head's, in the order of the source's phases.
fn phases(weights: &Weights) -> [crate::ternary_gemm::cuda::TileMatrix; PHASES] {
    [weights.mix(0), weights.out(0), weights.glu(0), weights.down(0), weights.head()]
}
