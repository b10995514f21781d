//! The MLGRU recurrence, parallel over channels, sequences and chunks of time, and its lower bounds.

use super::{RECURRENCE, Training, View, ViewMut, address_or_null, quotient, require};
use crate::cuda::{CudaError, Launch};

/// Threads, or channels, of a block.
const CHANNELS: usize = 128;
/// Shared memory of a block whose warps have rings of so many tensors: see `Ring` in the kernels.
const fn ring_bytes(tensors: usize) -> usize {
    const STAGES: usize = 4;
    CHANNELS / 32 * STAGES * STEPS * (tensors * 32 * size_of::<u16>() + 2 * size_of::<f32>())
}
/// Sequences times channels from which on time is not cut: cut time is read twice. With fewer, so many threads are wanted.
const ENOUGH_CHANNELS: usize = 3 << 13;
const THREADS_OF_CHUNKS: usize = 7 << 13;
/// Steps of a tile.
const STEPS: usize = 16;
/// Steps that a chunk of time has at least.
const MIN_CHUNK: usize = 64;

/// Inputs of a recurrence over B sequences of T steps.
#[derive(Clone, Copy, Debug)]
pub struct Recurrence<'a> {
    /// B.
    pub sequences: usize,
    /// T.
    pub length: usize,
    /// [B, T, D], and the factor of each row.
    pub i: (View<'a, u16>, Option<View<'a, f32>>),
    /// [B, T, D], and the factor of each row.
    pub f: (View<'a, u16>, Option<View<'a, f32>>),
    /// β `[D]`.
    pub beta: View<'a, f32>,
}

#[repr(C)]
#[derive(Default)]
struct RecurrenceArgs {
    i: u64,
    f: u64,
    i_factors: u64,
    f_factors: u64,
    beta: u64,
    h: u64,
    dh: u64,
    di: u64,
    df: u64,
    carries: u64,
    partials: u64,
    sequences: u32,
    length: u32,
    width: u32,
    chunks: u32,
    chunk_length: u32,
    vectors: u32,
}

impl RecurrenceArgs {
    /// Says whether rows can be copied 16 bytes at a time.
    fn align(&mut self) {
        let pointers = [self.i, self.f, self.h, self.dh, self.di, self.df];
        let aligned = pointers.iter().all(|address| address.is_multiple_of(16));
        self.vectors = (aligned && self.width.is_multiple_of(8)).into();
    }
}

#[repr(C)]
struct BoundsArgs {
    bounds: u64,
    betas: u64,
    d_betas: u64,
    d_bounds: u64,
    layers: u32,
    width: u32,
}

impl Training {
    /// `h_t = r ⊙ h_{t−1} + silu(i) ⊙ (1 − r)`, from zero.
    ///
    /// # Errors
    /// Shapes that do not fit; the driver's.
    pub fn recurrence(
        &mut self,
        inputs: Recurrence<'_>,
        h: ViewMut<'_, u16>,
    ) -> Result<(), CudaError> {
        let mut args = self.recurrence_args(inputs)?;
        require(h.len == inputs.i.0.len, "h")?;
        args.h = h.address();
        args.align();
        self.mark("recurrence")?;
        let launch = launch_of(&args, 2, args.chunks);
        let across = Launch::new([launch.grid[0], 1, launch.grid[2]], CHANNELS, 0);
        // SAFETY: the views lie in live buffers and have the sizes that were checked.
        unsafe {
            if args.chunks > 1 {
                let launch = launch_of(&args, 2, args.chunks - 1);
                self.launch(RECURRENCE, "recurrence_chunks", launch, &args)?;
                self.launch(RECURRENCE, "recurrence_join", across, &args)?;
            }
            self.launch(RECURRENCE, "recurrence_forward", launch, &args)
        }
    }

    /// Gradients of [`recurrence`](Self::recurrence). Sets `di` and `df`, **adds** to `d_beta`.
    ///
    /// # Errors
    /// Shapes that do not fit; the driver's.
    pub fn recurrence_backward(
        &mut self,
        inputs: Recurrence<'_>,
        h: View<'_, u16>,
        dh: View<'_, u16>,
        di: ViewMut<'_, u16>,
        df: ViewMut<'_, u16>,
        d_beta: ViewMut<'_, f32>,
    ) -> Result<(), CudaError> {
        let mut args = self.recurrence_args(inputs)?;
        let len = inputs.i.0.len;
        require([h.len, dh.len, di.len, df.len].iter().all(|&other| other == len), "a tensor")?;
        require(d_beta.len == inputs.beta.len, "d_beta")?;
        (args.h, args.dh) = (h.address(), dh.address());
        (args.di, args.df) = (di.address(), df.address());
        let parts = inputs.sequences * args.chunks as usize;
        self.partials.reserve(parts * inputs.beta.len)?;
        args.partials = self.partials.address(0);
        args.align();
        self.mark("recurrence, backward")?;
        let launch = launch_of(&args, 4, args.chunks);
        let across = Launch::new([launch.grid[0], 1, launch.grid[2]], CHANNELS, 0);
        // SAFETY: the views lie in live buffers and have the sizes that were checked.
        unsafe {
            if args.chunks > 1 {
                let launch = launch_of(&args, 2, args.chunks - 1);
                self.launch(RECURRENCE, "recurrence_chunks_back", launch, &args)?;
                self.launch(RECURRENCE, "recurrence_join_back", across, &args)?;
            }
            self.launch(RECURRENCE, "recurrence_backward", launch, &args)?;
        }
        self.reduce(parts, inputs.beta.len, &[d_beta.address()])
    }

    fn recurrence_args(&mut self, inputs: Recurrence<'_>) -> Result<RecurrenceArgs, CudaError> {
        let Recurrence { sequences, length, i, f, beta } = inputs;
        let (rows, width) = (sequences * length, beta.len);
        require(i.0.len == rows * width && f.0.len == i.0.len && rows > 0, "i or f")?;
        let factors = [i.1, f.1];
        require(factors.iter().flatten().all(|factors| factors.len >= rows), "factors")?;
        require(sequences <= 65_535, "the number of sequences (at most 65,535)")?;
        let (chunks, chunk_length) = chunks(sequences, length, width);
        self.carries.reserve(2 * sequences * chunks * width)?;
        Ok(RecurrenceArgs {
            i: i.0.address(),
            f: f.0.address(),
            i_factors: address_or_null(i.1),
            f_factors: address_or_null(f.1),
            beta: beta.address(),
            carries: self.carries.address(0),
            sequences: sequences as u32,
            length: length as u32,
            width: width as u32,
            chunks: chunks as u32,
            chunk_length: chunk_length as u32,
            ..RecurrenceArgs::default()
        })
    }

    /// β of every layer of learned lower bounds, [L, D].
    ///
    /// # Errors
    /// Shapes that do not fit; the driver's.
    pub fn lower_bounds(
        &mut self,
        bounds: View<'_, f32>,
        layers: usize,
        betas: ViewMut<'_, f32>,
    ) -> Result<(), CudaError> {
        let width = quotient(bounds.len, layers)?;
        require(betas.len == bounds.len, "betas")?;
        let args = BoundsArgs {
            bounds: bounds.address(),
            betas: betas.address(),
            d_betas: 0,
            d_bounds: 0,
            layers: layers as u32,
            width: width as u32,
        };
        self.mark("recurrence")?;
        let launch = Launch::new([width.div_ceil(CHANNELS), 1, 1], CHANNELS, 0);
        // SAFETY: the views lie in live buffers and have the sizes that were checked.
        unsafe { self.launch(RECURRENCE, "lower_bounds", launch, &args) }
    }

    /// Gradients of [`lower_bounds`](Self::lower_bounds): **adds** to `d_bounds`.
    ///
    /// # Errors
    /// Shapes that do not fit; the driver's.
    pub fn lower_bounds_backward(
        &mut self,
        bounds: View<'_, f32>,
        layers: usize,
        d_betas: View<'_, f32>,
        d_bounds: ViewMut<'_, f32>,
    ) -> Result<(), CudaError> {
        let width = quotient(bounds.len, layers)?;
        require(d_betas.len == bounds.len && d_bounds.len == bounds.len, "gradients")?;
        let args = BoundsArgs {
            bounds: bounds.address(),
            betas: 0,
            d_betas: d_betas.address(),
            d_bounds: d_bounds.address(),
            layers: layers as u32,
            width: width as u32,
        };
        self.mark("recurrence, backward")?;
        let launch = Launch::new([width.div_ceil(CHANNELS), 1, 1], CHANNELS, 0);
        // SAFETY: the views lie in live buffers and have the sizes that were checked.
        unsafe { self.launch(RECURRENCE, "lower_bounds_backward", launch, &args) }
    }
}

/// Number and length of the chunks of time: enough threads for a GPU, whichever it is.
pub(super) fn chunks(sequences: usize, length: usize, width: usize) -> (usize, usize) {
    let channels = (sequences * width).max(1);
    let wanted = if channels < ENOUGH_CHANNELS { THREADS_OF_CHUNKS.div_ceil(channels) } else { 1 };
    let most = (length / MIN_CHUNK).clamp(1, 1024);
    let chunk_length = length.div_ceil(wanted.clamp(1, most)).next_multiple_of(STEPS);
    (length.div_ceil(chunk_length), chunk_length)
}

/// Blocks of so many of the chunks.
fn launch_of(args: &RecurrenceArgs, tensors: usize, chunks: u32) -> Launch {
    let grid = [(args.width as usize).div_ceil(CHANNELS), chunks as usize, args.sequences as usize];
    Launch::new(grid, CHANNELS, ring_bytes(tensors))
}
