//! The recurrence on a GPU. Reads the i and f projections' sums as the products leave them.

use std::sync::Arc;

use crate::cuda::{Buffer, CudaError, Device, Kernel, Launch, Source};
use crate::ternary_gemm::cuda::{Quantized, SPLIT_MAX_TOKENS, Sums};

pub(crate) const SOURCE: Source =
    Source { name: "mlgru", text: include_str!("mlgru.cu"), hopper_only: false, contracts: false };

/// Sequences of at most this many tokens are walked through by threads of their own.
const STEP_MAX_TOKENS: usize = 8;

#[repr(C)]
struct Args {
    sums: u64,
    scales: u64,
    h: u64,
    first_rows: u64,
    states: u64,
    beta: u64,
    state_offset: u64,
    gamma_i: f32,
    gamma_f: f32,
    width: u32,
    stride: u32,
    f_offset: u32,
    rows: u32,
    clear: u32,
}

/// Sequences that a pass steps, in device memory.
#[derive(Debug)]
pub struct Sequences {
    /// Addresses of the states.
    pub(crate) states: Buffer<u64>,
    /// First row of each sequence, and the number of rows.
    first_rows: Buffer<u32>,
    count: usize,
    pub(crate) rows: usize,
    longest: usize,
    /// Elements of the smallest state.
    pub(crate) state_len: usize,
}

impl Sequences {
    /// None yet.
    ///
    /// # Errors
    /// The driver's.
    pub fn new(device: &Arc<Device>) -> Result<Self, CudaError> {
        Ok(Self {
            states: Buffer::zeros(device, 1)?,
            first_rows: Buffer::zeros(device, 1)?,
            count: 0,
            rows: 0,
            longest: 0,
            state_len: 0,
        })
    }

    /// Whether every sequence has one token.
    pub fn are_single_tokens(&self) -> bool {
        self.longest == 1 && self.rows == self.count
    }

    /// Takes states and the number of tokens of each. The states are borrowed mutably by every
    /// [`Recurrence::forward`] that follows, so they must be the same then.
    ///
    /// # Errors
    /// No memory.
    pub fn assign(&mut self, states: &[(&Buffer<f32>, usize)]) -> Result<(), CudaError> {
        let mut first = vec![0u32];
        first.extend(states.iter().scan(0, |end, (_, tokens)| {
            *end += *tokens as u32;
            Some(*end)
        }));
        let addresses: Vec<u64> = states.iter().map(|(state, _)| state.address(0)).collect();
        self.states.reserve(addresses.len())?;
        self.first_rows.reserve(first.len())?;
        self.states.write(0, &addresses)?;
        self.first_rows.write(0, &first)?;
        self.count = states.len();
        self.rows = first.last().map_or(0, |&rows| rows as usize);
        self.longest = states.iter().map(|(_, tokens)| *tokens).max().unwrap_or(0);
        self.state_len = states.iter().map(|(state, _)| state.len()).min().unwrap_or(0);
        Ok(())
    }
}

/// What one layer brings to the recurrence.
#[derive(Clone, Copy, Debug)]
pub struct Layer<'a> {
    /// Vectors of the model.
    pub vectors: &'a Buffer<f32>,
    /// Where β `[D]` begins among them.
    pub beta: usize,
    /// γ of the i projection.
    pub gamma_i: f32,
    /// γ of the f projection.
    pub gamma_f: f32,
    /// Where the layer's h begins in a state.
    pub state_offset: usize,
    /// Columns from the i projection's sums to the f projection's.
    pub f_offset: usize,
    /// D.
    pub width: usize,
}

/// The kernels.
#[derive(Debug)]
pub struct Recurrence {
    device: Arc<Device>,
    step: Kernel,
    /// Channels and threads of a block, and how many of those a multiprocessor has room for.
    scans: [(usize, usize, usize, Kernel); 4],
}

impl Recurrence {
    /// Compiles and loads.
    ///
    /// # Errors
    /// No compiler, or its or the driver's complaints.
    pub fn new(device: &Arc<Device>) -> Result<Self, CudaError> {
        Ok(Self {
            device: Arc::clone(device),
            step: device.kernel(SOURCE, "mlgru_step", 0)?,
            scans: [
                (8, 512, 2, device.kernel(SOURCE, "mlgru_scan_8_384", 0)?),
                // Even for widths near 20 channels a multiprocessor, where there would be two or three blocks.
                (20, 640, 1, device.kernel(SOURCE, "mlgru_scan_20_480", 0)?),
                (8, 256, 4, device.kernel(SOURCE, "mlgru_scan_8_192", 0)?),
                (16, 288, 4, device.kernel(SOURCE, "mlgru_scan_16_256", 0)?),
            ],
        })
    }

    /// Steps all sequences through one layer: `h` [M, D] after each token, and the states behind the last.
    /// `q` are the inputs of the projections whose sums are given.
    ///
    /// # Errors
    /// Shapes that do not fit together; the driver's.
    pub fn forward(
        &self,
        layer: Layer<'_>,
        q: &Quantized,
        sums: &mut Sums,
        sequences: &Sequences,
        h: &mut Buffer<f32>,
    ) -> Result<(), CudaError> {
        let width = layer.width;
        let fits = layer.beta + width <= layer.vectors.len()
            && [layer.beta, width, layer.f_offset, sums.stride].iter().all(|n| n.is_multiple_of(4))
            && q.layers >= 2
            && q.rows == sequences.rows
            && layer.f_offset + width <= sums.stride
            && q.rows * sums.stride <= sums.values.len()
            && q.rows * width <= h.len()
            && layer.state_offset + width <= sequences.state_len;
        if !fits {
            return Err(CudaError::Shape(format!("a recurrence of {} rows of {width}", q.rows)));
        }
        let args = Args {
            sums: sums.values.address(0),
            scales: q.scales.address(0),
            h: h.address(0),
            first_rows: sequences.first_rows.address(0),
            states: sequences.states.address(0),
            beta: layer.vectors.address(layer.beta),
            state_offset: layer.state_offset as u64,
            gamma_i: layer.gamma_i,
            gamma_f: layer.gamma_f,
            width: width as u32,
            stride: sums.stride as u32,
            f_offset: layer.f_offset as u32,
            rows: q.capacity as u32,
            clear: sums.adds.into(),
        };
        let (channels, threads, kernel) = if sequences.longest <= STEP_MAX_TOKENS {
            (128, 128, &self.step)
        } else {
            let runs_at_once = |&&(channels, _, blocks, _): &&(usize, usize, usize, _)| {
                width.div_ceil(channels) * sequences.count <= blocks * self.device.multiprocessors()
            };
            let scan = self.scans.iter().find(runs_at_once).unwrap_or(&self.scans[3]);
            (scan.0, scan.1, &scan.3)
        };
        let grid = [width.div_ceil(channels), sequences.count, 1];
        let launch = Launch::new(grid, threads, 0);
        // Not among the kernels of many rows, see there.
        let launch = if q.rows <= SPLIT_MAX_TOKENS { launch.overlapping() } else { launch };
        // SAFETY: the buffers were checked to hold the rows; the states belong to the sequences and hold the
        // layer.
        unsafe { kernel.launch(launch, &args) }
    }
}
