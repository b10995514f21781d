//! Tokens of one sequence, one after the other, in one launch: a persistent grid that walks through all layers.
//!
//! The sources tell how it works. Floats are multiplied in another order than by the other kernels and the CPU: logits
//! differ as those of two correct evaluations do (docs/gpu.md).

mod weights;

use std::sync::Arc;

use crate::cuda::{Buffer, Constant, CudaError, Device, Kernel, Launch, Source};
use crate::sampling::{Next, Sampling};
use crate::ternary_gemm::cuda::{TILE_COLS, TILE_ROWS};

pub use weights::{Projection, Shape, Vector, Weights};

pub(crate) const SOURCE: Source = Source {
    name: "decode",
    text: concat!(
        include_str!("plan.cuh"),
        include_str!("weights.cuh"),
        include_str!("messages.cuh"),
        include_str!("exchange.cuh"),
        include_str!("dots.cuh"),
        include_str!("decode.cu")
    ),
    hopper_only: false,
    contracts: false,
};

// As in the source.
const PHASES: usize = 5;
const TILE_BYTES: usize = 512;
/// The beginning of a block's shared memory.
const SHARED_BYTES: usize = 6656;
/// Vectors of own channels behind a phase, at most, for two phases.
const OWN_VECTORS: usize = 2 * 4;
/// Warps that fetch and serve, beside those that multiply.
const OTHER_WARPS: usize = 2;
/// In a key, tells in which round it was sent.
const ROUND_OF_KEY: u64 = 1 << 31;

/// What the driver keeps for itself of a block's shared memory.
const RESERVED_SHARED_BYTES: usize = 1024;
/// Warps that multiply: one for two columns of tiles (at a width of 2048 one for each is 14 % slower), at most as many as
/// have 168 registers a thread (at a width of 5120 fourteen with 128 are 3 % slower).
const MIN_WARPS: usize = 8;
const MAX_WARPS: usize = 10;
/// Tiles on their way: as many as 2.75 rows of them, at least 32, or 80 where tensor cores multiply. Measured at widths of 1024, 2048,
/// 2560 and 5120: 32 of 32 to 48, 44 of 32 to 96, 80 of 55 to 130 (7 % faster than 55) and 110 of 85 to 160 tiles are best or as
/// good as the best.
const MOVING_TILES: usize = 32;
const MOVING_TENSOR_TILES: usize = 80;
/// Tiles of a phase that a lane takes to registers before it has the activations, at most. They lie together in the ring.
const EARLY_TILES: usize = 6;
const EARLY_TENSOR_TILES: usize = 16;
/// Of weights that arrive together, where more than a row of tiles does.
const STAGE_TILES: usize = 48;
/// A ring longer than this brings nothing.
const MAX_RING_TILES: usize = 420;
/// Columns of tiles that a warp can have: it keeps their activations in registers.
const MAX_COLUMNS: usize = 11;
/// Columns of tiles of a row from which on tensor cores pay on a Hopper device: with 16 they lose 6 %, with 20 and 40 they win
/// 1 and 3 %. Later devices have none for bits.
const MIN_TENSOR_COLUMNS: usize = 20;
/// Steps of one launch, so that it ends in reasonable time.
const MAX_STEPS: usize = 256;

#[repr(C)]
struct Args {
    weights: u64,
    vectors: u64,
    gammas: u64,
    embeddings: u64,
    state: u64,
    exchange: u64,
    logits: u64,
    keys: u64,
    not_finite: u64,
    history: u64,
    tile_at: [u64; PHASES],
    layer_tiles: u64,
    layers: u32,
    vocab: u32,
    segment_tiles: u32,
    glu_row_tiles: u32,
    embedding_type: u32,
    tokens_before: u32,
    count: u32,
    token: i32,
    eps: f32,
}

/// The token that a step feeds first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Token {
    /// This one.
    Id(u32),
    /// The one that the keys tell: the most likely one after the last step, or one that was drawn.
    Best,
}

/// How a model's work is divided among blocks and warps, and a block's shared memory, as the source does it.
#[derive(Debug)]
struct Division {
    blocks: usize,
    warps: usize,
    uses_tensor_cores: bool,
    ring_tiles: usize,
    /// Groups of channels of the width, the inner width and the vocabulary that a block owns at most.
    groups: [usize; 3],
    shared_bytes: usize,
}

impl Division {
    /// For a device of a major compute capability. `None` if a model's rows do not fit.
    fn new(shape: Shape, multiprocessors: usize, shared_bytes: usize, major: i32) -> Option<Self> {
        let has_ring = major >= 9;
        let Shape { width, inner, vocab, .. } = shape;
        let (columns, inner_columns) = (width.div_ceil(TILE_COLS), inner.div_ceil(TILE_COLS));
        let most = columns.div_ceil(2).clamp(MIN_WARPS, MAX_WARPS);
        let warps = columns.div_ceil(columns.div_ceil(most)).max(MIN_WARPS);
        let groups = |n: usize, blocks: usize| n.div_ceil(TILE_ROWS).div_ceil(blocks);
        // The fewest blocks whose busiest one has as few tiles of a layer as with all of them.
        let busiest = |blocks: usize| {
            groups(width, blocks) * (4 * columns + inner_columns)
                + groups(inner, blocks) * 2 * columns
        };
        let blocks = (1..=multiprocessors).min_by_key(|&blocks| (busiest(blocks), blocks))?;
        let owned = |n: usize| groups(n, blocks) * TILE_ROWS;
        let own_floats = owned(width).max(owned(inner));
        let groups_at_most = [groups(width, blocks), groups(inner, blocks), groups(vocab, blocks)];
        // Rows of values begin within a tile.
        let values = 2 * groups_at_most[1] + usize::from(inner % TILE_ROWS != 0);
        let rows = (3 * groups_at_most[0]).max(values).max(groups_at_most[2]);
        let sums = 4 * rows * TILE_ROWS * warps.next_multiple_of(4);
        let words =
            (3 * columns.div_ceil(warps)).max(inner_columns.div_ceil(warps)) * TILE_COLS * warps;
        let fixed = SHARED_BYTES + sums + words + 4 * OWN_VECTORS * own_floats;
        let available = shared_bytes.checked_sub(RESERVED_SHARED_BYTES + fixed)?;
        let ring_tiles = if has_ring { (available / TILE_BYTES).min(MAX_RING_TILES) } else { 0 };
        let uses_tensor_cores = major == 9 && columns >= MIN_TENSOR_COLUMNS;
        let early = if uses_tensor_cores { EARLY_TENSOR_TILES } else { EARLY_TILES };
        // Two stages or phases that lie together, wherever in the ring the first one begins.
        let together = STAGE_TILES.max(columns).max(inner_columns).max(early * warps);
        let has_room = !has_ring || ring_tiles >= 2 * together;
        let is_small = own_floats <= 32 * warps && inner_columns.div_ceil(warps) <= MAX_COLUMNS;
        (has_room && is_small).then_some(Self {
            blocks,
            warps,
            uses_tensor_cores,
            ring_tiles,
            groups: groups_at_most,
            shared_bytes: fixed + ring_tiles * TILE_BYTES,
        })
    }

    fn constants(&self, shape: Shape) -> [Constant; 12] {
        let rows_of_tiles = 11 * shape.width.div_ceil(TILE_COLS) / 4;
        let moving = if self.uses_tensor_cores { MOVING_TENSOR_TILES } else { MOVING_TILES };
        let [groups, inner_groups, head_groups] = self.groups;
        [
            ("WIDTH", shape.width),
            ("INNER", shape.inner),
            ("NUM_BLOCKS", self.blocks),
            ("NUM_WARPS", self.warps),
            ("NUM_TENSOR_CORES", usize::from(self.uses_tensor_cores)),
            ("NUM_RING_TILES", self.ring_tiles),
            ("NUM_MOVING_TILES", rows_of_tiles.max(moving)),
            ("NUM_GROUPS", groups),
            ("NUM_INNER_GROUPS", inner_groups),
            ("NUM_HEAD_GROUPS", head_groups),
            // The source compares these two with its own.
            ("NUM_SHARED_BYTES", self.shared_bytes),
            ("NUM_EXCHANGE_FLOATS", exchange_floats(shape)),
        ]
    }
}

/// Floats that blocks send each other: a row of each product's input, and a sum for each group of its channels.
fn exchange_floats(shape: Shape) -> usize {
    let row = |n: usize| n + n.div_ceil(TILE_ROWS).next_multiple_of(4);
    4 * row(shape.width) + row(shape.inner)
}

/// The kernel and what it keeps between tokens.
#[derive(Debug)]
pub struct Decoder {
    kernel: Kernel,
    shape: Shape,
    division: Division,
    eps: f32,
    /// What blocks send each other.
    exchange: Buffer<f32>,
    logits: Buffer<f32>,
    /// Of each block the key of its most likely token.
    keys: Buffer<u64>,
    /// Whether a logit was not.
    not_finite: Buffer<u32>,
    /// Tokens that were fed in all: the source tells rounds apart by it.
    fed: u64,
    /// Tokens that the last call fed.
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
        let major = device.capability().0;
        let division = Division::new(shape, device.multiprocessors(), device.shared_bytes(), major);
        let Some(division) = division else { return Ok(None) };
        let constants = division.constants(shape);
        Ok(Some(Self {
            kernel: device.kernel_for(SOURCE, &constants, "decode", division.shared_bytes)?,
            shape,
            eps,
            exchange: Buffer::zeros(device, exchange_floats(shape))?,
            logits: Buffer::zeros(device, shape.vocab)?,
            keys: Buffer::zeros(device, division.blocks)?,
            not_finite: Buffer::zeros(device, 1)?,
            fed: 0,
            history: Buffer::zeros(device, 1)?,
            division,
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
        self.submit(weights, state, Token::Id(token), 0, 1)
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
        // Other steps' logits are looked at elsewhere.
        self.not_finite.clear()?;
        let mut token = Token::Id(token);
        for first in (0..count).step_by(MAX_STEPS) {
            self.submit(weights, state, token, first, MAX_STEPS.min(count - first))?;
            token = Token::Best;
        }
        let mut tokens = vec![0; count + 1];
        self.history.read(0, &mut tokens[..count])?;
        let Some(last) = self.best()? else { return Ok(None) };
        tokens[count] = last;
        tokens.remove(0);
        Ok(Some(tokens))
    }

    /// Feeds a token and then, one after the other, those that `sampling` draws, `count` steps in all, without a look from the
    /// host. `sampling` must have begun with as many draws from one row.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn sampled(
        &mut self,
        weights: &Weights,
        state: &mut Buffer<f32>,
        token: u32,
        count: usize,
        sampling: &mut Sampling,
    ) -> Result<(), CudaError> {
        let mut token = Token::Id(token);
        for step in 0..count {
            self.submit(weights, state, token, 0, 1)?;
            let next = Next::Keys { keys: &mut self.keys, round: self.fed };
            sampling.draw(&mut self.logits, step, next)?;
            token = Token::Best;
        }
        Ok(())
    }

    /// Submits `count` steps; the tokens that they feed are noted from `history` on.
    fn submit(
        &mut self,
        weights: &Weights,
        state: &mut Buffer<f32>,
        token: Token,
        history: usize,
        count: usize,
    ) -> Result<(), CudaError> {
        let Shape { layers, width, vocab, .. } = self.shape;
        let is_known = match token {
            Token::Id(id) => (id as usize) < vocab,
            Token::Best => self.fed > 0,
        };
        if weights.shape() != self.shape || state.len() < layers * width || !is_known {
            return Err(CudaError::Shape(format!("a step of {token:?}")));
        }
        let args = Args {
            weights: weights.tiles.address(0),
            vectors: weights.vectors.address(0),
            gammas: weights.gammas.address(0),
            embeddings: weights.embeddings.address(0),
            state: state.address(0),
            exchange: self.exchange.address(0),
            logits: self.logits.address(0),
            keys: self.keys.address(0),
            not_finite: self.not_finite.address(0),
            history: self.history.address(history),
            tile_at: weights.phases().map(|phase| phase.first as u64),
            layer_tiles: weights.layer_tiles() as u64,
            layers: layers as u32,
            vocab: vocab as u32,
            segment_tiles: weights.mix(0).segment_tiles as u32,
            glu_row_tiles: weights.glu(0).row_tiles as u32,
            embedding_type: weights.embedding_type.code(),
            tokens_before: self.fed as u32,
            count: count as u32,
            token: match token {
                Token::Id(id) => id as i32,
                Token::Best => -1,
            },
            eps: self.eps,
        };
        let Division { blocks, warps, shared_bytes, .. } = self.division;
        let launch = Launch::new([blocks, 1, 1], 32 * (warps + OTHER_WARPS), shared_bytes);
        let launch = Launch { cooperative: true, ..launch };
        // SAFETY: the buffers were made for, or checked against, the model's shape.
        unsafe { self.kernel.launch(launch, &args)? };
        self.fed += count as u64;
        Ok(())
    }

    /// The logits `[V]` of the last step.
    pub fn logits(&mut self) -> &mut Buffer<f32> {
        &mut self.logits
    }

    /// The most likely token after the last step, of equals the lowest; `None` if a logit was not finite.
    fn best(&self) -> Result<Option<u32>, CudaError> {
        let (mut not_finite, mut keys) = ([0], vec![0; self.division.blocks]);
        self.not_finite.read(0, &mut not_finite)?;
        if not_finite[0] != 0 {
            return Ok(None);
        }
        self.keys.read(0, &mut keys)?;
        // Blocks without a part in the head leave theirs empty.
        let best = keys.into_iter().filter(|&key| key != 0).map(|key| key | ROUND_OF_KEY).max();
        Ok(best.map(|key| !(key as u32)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::{compile_with, is_compiler_present};

    /// Of an H100 or H200: multiprocessors, bytes of shared memory.
    const HOPPER: (usize, usize) = (132, 232_448);

    fn shape(width: usize, inner: usize, vocab: usize) -> Shape {
        Shape { layers: 2, width, inner, vocab }
    }

    #[test]
    fn published_sizes_are_divided_evenly() {
        for (width, inner, blocks, warps) in [
            (1024, 2816, 88, 8),
            (2048, 5632, 128, 8),
            (2560, 6912, 108, 10),
            (5120, 13824, 124, 10),
        ] {
            let division = Division::new(shape(width, inner, 32000), HOPPER.0, HOPPER.1, 9);
            let division = division.expect("fits");
            assert_eq!((division.blocks, division.warps), (blocks, warps), "{width}");
            assert!(division.shared_bytes <= HOPPER.1);
            assert!(division.ring_tiles >= 320);
        }
    }

    #[test]
    fn sizes_that_do_not_fit_are_refused() {
        assert!(Division::new(shape(5120, 500_000, 32000), HOPPER.0, HOPPER.1, 9).is_none());
        assert!(Division::new(shape(64, 160, 4_000_000), HOPPER.0, HOPPER.1, 9).is_none());
        assert!(Division::new(shape(1024, 2816, 32000), HOPPER.0, 1 << 14, 9).is_none());
    }

    #[test]
    fn every_size_compiles_without_spilling() {
        if !is_compiler_present() {
            assert!(std::env::var_os("MMFREE_REQUIRE_NVRTC").is_none(), "libnvrtc is not there");
            eprintln!("!!! SKIPPED, decoding NOT COMPILED: no libnvrtc");
            return;
        }
        for (width, inner) in [(132, 340), (2048, 5632), (2560, 6912), (4096, 11008), (5120, 13824)]
        {
            let shape = shape(width, inner, 32000);
            for (architecture, major) in [("sm_80", 8), ("sm_90a", 9)] {
                let division = Division::new(shape, HOPPER.0, HOPPER.1, major).expect("fits");
                let compiled = compile_with(SOURCE, &division.constants(shape), architecture);
                let log = compiled.expect("compiles").log;
                assert!(log.contains(" 0 bytes spill stores"), "{width} {architecture}: {log}");
            }
        }
    }
}
