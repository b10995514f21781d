//! Steps of a batch of sequences, a token of each, in one launch: a persistent grid that walks through all layers.
//!
//! The sources tell how it works. Floats are multiplied in another order than by the kernels that take a launch for each product,
//! and the CPU: logits differ as those of two correct evaluations do (docs/gpu.md).

mod division;

use std::ops::RangeInclusive;
use std::sync::Arc;

use crate::cuda::{Buffer, CudaError, Device, Kernel, Launch, Source};
use crate::decode::{Shape, Weights};
use crate::mlgru::cuda::Sequences;
use crate::sampling::{Next, Sampling};
use crate::ternary_gemm::cuda::{TILE_COLS, TILE_ROWS};

use division::{Division, WARPS};

pub(crate) const SOURCE: Source = Source {
    name: "batch",
    text: concat!(
        include_str!("../decode/messages.cuh"),
        include_str!("plan.cuh"),
        include_str!("worker.cuh"),
        include_str!("batch.cu")
    ),
    hopper_only: true,
    contracts: false,
};

/// Sequences of a step, if they fit: one alone is decoded otherwise, more take a launch for each product.
pub const SEQUENCES: RangeInclusive<usize> = 2..=256;

// As in the source.
const PHASES: usize = 5;
/// Steps of one launch, so that it ends in reasonable time.
const MAX_STEPS: usize = 64;

#[repr(C)]
struct Args {
    weights: u64,
    vectors: u64,
    gammas: u64,
    embeddings: u64,
    states: u64,
    tokens: u64,
    history: u64,
    logits: u64,
    not_finite: u64,
    messages: u64,
    rows: u64,
    keys: u64,
    spare_state: u64,
    tile_at: [u64; PHASES],
    layer_tiles: u64,
    m: u32,
    layers: u32,
    steps: u32,
    embedding_type: u32,
    segment_tiles: u32,
    steps_before: u32,
    eps: f32,
}

/// A kernel, and what its blocks send each other.
#[derive(Debug)]
struct BatchKernel {
    kernel: Kernel,
    messages: Buffer<f32>,
    rows: Buffer<u32>,
    keys: Buffer<u64>,
    /// Of a sequence that only fills a cluster up.
    spare_state: Buffer<f32>,
    /// Steps that it has made: the source tells rounds apart by it.
    steps: u64,
}

/// The kernels and what they work with.
#[derive(Debug)]
pub struct BatchDecoder {
    device: Arc<Device>,
    shape: Shape,
    eps: f32,
    /// For more and more sequences; kernels are compiled at their first use.
    kernels: Vec<(Division, Option<BatchKernel>)>,
    tokens: Buffer<u32>,
    /// Tokens that each step chose, [steps, M].
    history: Buffer<u32>,
    logits: Buffer<f32>,
    not_finite: Buffer<u32>,
}

impl BatchDecoder {
    /// For a model; nothing is compiled yet. `None` if the device or the model's widths are not those that the kernels
    /// are for: Hopper, widths of whole tiles, rows that fit into shared memory.
    ///
    /// # Errors
    /// No memory.
    pub fn new(
        device: &Arc<Device>,
        weights: &Weights,
        eps: f32,
    ) -> Result<Option<Self>, CudaError> {
        let shape = weights.shape();
        let (multiprocessors, shared_bytes) = (device.multiprocessors(), device.shared_bytes());
        let divisions = Division::all(shape, multiprocessors, shared_bytes);
        let kernels: Vec<_> = divisions.into_iter().map(|division| (division, None)).collect();
        let has_whole_tiles =
            shape.width.is_multiple_of(TILE_COLS) && shape.inner.is_multiple_of(TILE_ROWS);
        if device.capability() != (9, 0) || !has_whole_tiles || kernels.is_empty() {
            return Ok(None);
        }
        Ok(Some(Self {
            device: Arc::clone(device),
            shape,
            eps,
            kernels,
            tokens: Buffer::zeros(device, 1)?,
            history: Buffer::zeros(device, 1)?,
            logits: Buffer::zeros(device, 1)?,
            not_finite: Buffer::zeros(device, 1)?,
        }))
    }

    /// Whether it is for so many sequences.
    pub fn takes(&self, count: usize) -> bool {
        let has_room = |(division, _): &(Division, _)| count <= division.sequences();
        SEQUENCES.contains(&count) && self.kernels.iter().any(has_room)
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
        self.submit_step(weights, sequences, tokens.len())
    }

    /// Feeds a token to each sequence and then those that `sampling` draws, `count` steps in all, without a look from the host.
    /// `sampling` must have begun with as many draws from each row.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn sampled(
        &mut self,
        weights: &Weights,
        sequences: &Sequences,
        tokens: &[u32],
        count: usize,
        sampling: &mut Sampling,
    ) -> Result<(), CudaError> {
        self.prepare(tokens, 1)?;
        self.logits.reserve(tokens.len() * self.shape.vocab)?;
        for step in 0..count {
            self.submit_step(weights, sequences, tokens.len())?;
            sampling.draw(&mut self.logits, step, Next::Tokens(&mut self.tokens))?;
        }
        Ok(())
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
            let steps = MAX_STEPS.min(count - first);
            let history = self.history.address(first * tokens.len());
            self.submit(weights, sequences, tokens.len(), steps, history, 0)?;
        }
        let (mut history, mut not_finite) = (vec![0; count * tokens.len()], [0]);
        self.history.read(0, &mut history)?;
        self.not_finite.read(0, &mut not_finite)?;
        Ok((not_finite[0] == 0).then_some(history))
    }

    /// Makes room for so many steps that begin with some tokens, and compiles at the first use.
    fn prepare(&mut self, tokens: &[u32], steps: usize) -> Result<(), CudaError> {
        let (count, shape) = (tokens.len(), self.shape);
        if !self.takes(count) {
            return Err(CudaError::Shape(format!("a step of {count} sequences")));
        }
        if let Some(token) = tokens.iter().find(|&&token| token as usize >= shape.vocab) {
            return Err(CudaError::Shape(format!("a step of token {token}")));
        }
        let Some((division, kernel)) = kernel_for(&mut self.kernels, count) else {
            return Err(CudaError::Shape(format!("a step of {count} sequences")));
        };
        if kernel.is_none() {
            let constants = division.constants(shape);
            let bytes = division.shared_bytes;
            *kernel = Some(BatchKernel {
                kernel: self.device.kernel_for(SOURCE, &constants, "batch_step", bytes)?,
                messages: Buffer::zeros(&self.device, division.messages())?,
                rows: Buffer::from_slice(&self.device, &division.rows(shape))?,
                keys: Buffer::zeros(&self.device, division.keys())?,
                spare_state: Buffer::zeros(&self.device, shape.layers * shape.width)?,
                steps: 0,
            });
        }
        self.history.reserve(steps * count)?;
        self.tokens.reserve(count)?;
        self.tokens.write(0, tokens)
    }

    /// Submits one step of so many sequences, with logits.
    fn submit_step(
        &mut self,
        weights: &Weights,
        sequences: &Sequences,
        count: usize,
    ) -> Result<(), CudaError> {
        let (history, logits) = (self.history.address(0), self.logits.address(0));
        self.submit(weights, sequences, count, 1, history, logits)
    }

    /// Submits steps of so many sequences; what they choose goes to the address of the history, the last step's logits to
    /// theirs, unless it is zero.
    fn submit(
        &mut self,
        weights: &Weights,
        sequences: &Sequences,
        count: usize,
        steps: usize,
        history: u64,
        logits: u64,
    ) -> Result<(), CudaError> {
        let Shape { layers, width, .. } = self.shape;
        let fits = weights.shape() == self.shape
            && sequences.are_single_tokens()
            && count <= sequences.rows
            && sequences.state_len >= layers * width;
        let Some((division, Some(kernel))) = kernel_for(&mut self.kernels, count).filter(|_| fits)
        else {
            return Err(CudaError::Shape(format!("a step of {count} sequences")));
        };
        let args = Args {
            weights: weights.tiles.address(0),
            vectors: weights.vectors.address(0),
            gammas: weights.gammas.address(0),
            embeddings: weights.embeddings.address(0),
            states: sequences.states.address(0),
            tokens: self.tokens.address(0),
            history,
            logits,
            not_finite: self.not_finite.address(0),
            messages: kernel.messages.address(0),
            rows: kernel.rows.address(0),
            keys: kernel.keys.address(0),
            spare_state: kernel.spare_state.address(0),
            tile_at: weights.phases().map(|phase| phase.first as u64),
            layer_tiles: weights.layer_tiles() as u64,
            m: count as u32,
            layers: layers as u32,
            steps: steps as u32,
            embedding_type: weights.embedding_type.code(),
            segment_tiles: weights.mix(0).segment_tiles as u32,
            steps_before: kernel.steps as u32,
            eps: self.eps,
        };
        let launch = Launch {
            cooperative: true,
            cluster: division.size.sharing(),
            ..Launch::new([division.blocks(), 1, 1], 32 * WARPS, division.shared_bytes)
        };
        // SAFETY: the buffers were made for, or checked against, the model's shape and the number of sequences.
        unsafe { kernel.kernel.launch(launch, &args)? };
        kernel.steps += steps as u64;
        Ok(())
    }
}

/// The first kernel that has room for so many sequences.
fn kernel_for(
    kernels: &mut [(Division, Option<BatchKernel>)],
    count: usize,
) -> Option<&mut (Division, Option<BatchKernel>)> {
    kernels.iter_mut().find(|(division, _)| count <= division.sequences())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::{compile_with, is_compiler_present};

    #[test]
    fn every_size_compiles_without_much_spilling_or_serialising() {
        if !is_compiler_present() {
            assert!(std::env::var_os("MMFREE_REQUIRE_NVRTC").is_none(), "libnvrtc is not there");
            eprintln!("!!! SKIPPED, batches NOT COMPILED: no libnvrtc");
            return;
        }
        for (width, inner) in [(256, 336), (2048, 5632), (5120, 13824)] {
            let shape = Shape { layers: 2, width, inner, vocab: 32000 };
            // Of an H100 or H200.
            for division in Division::all(shape, 132, 232_448) {
                let compiled = compile_with(SOURCE, &division.constants(shape), "sm_90a");
                let log = compiled.expect("compiles").log;
                let (before, _) = log.split_once(" bytes spill stores").expect("a line of spills");
                let spilled: usize =
                    before.rsplit(' ').next().and_then(|n| n.parse().ok()).expect("a number");
                // Outside of the loops over tiles: channels that a warp keeps while it multiplies others.
                let most = if division.sequences() <= 64 { 120 } else { 600 };
                assert!(spilled <= most, "{width}, {division:?}: {log}");
                assert!(!log.contains("serialized"), "{width}, {division:?}: {log}");
            }
        }
    }
}
