//! Training on a GPU: the operations of a step, forward and backward.
//!
//! Activations are bf16, sums f32, weights and gradients f32. The integers of a BitLinear (up to 127) and its
//! trits are exact in bf16, and their products' sums exact in f32; a product's result is rounded to bf16 once,
//! as an integer, and multiplied by its row's factor `γ / s` where it is used. No kernel adds floats atomically: a
//! step gives the same bits every time.
//!
//! Dense products are cuBLASLt's, everything else is compiled at first use.

mod attention;
mod blas;
mod exchange;
mod gates;
mod integers;
mod loss;
mod nccl;
mod norms;
mod optimizer;
mod pace;
mod products;
mod recurrence;
mod rows;
mod timeline;
mod update;

use std::collections::HashMap;
use std::sync::Arc;

use crate::cuda::{Buffer, CudaError, Device, Element, Kernel, Launch, Source};
use blas::{Blas, Product};
pub use exchange::{GpuGroup, UniqueId};
pub use norms::{Integers, NormBackward, NormQuantize, Rows};
pub use pace::{Lookout, wait_until};
use pace::{Pace, Start};
pub use recurrence::Recurrence;
pub use timeline::Timeline;
pub use update::{Prepared, Update, UpdatePart};

/// A module of training: the common part of training and its files.
macro_rules! source {
    ($name:literal, contracts: $contracts:literal, $($file:literal),+) => {
        Source {
            name: $name,
            text: concat!(include_str!("training.cuh"), $(include_str!($file)),+),
            hopper_only: false,
            contracts: $contracts,
        }
    };
}

pub(crate) const NORMS: Source =
    source!("training-norms", contracts: true, "norms.cu", "norms_vectors.cu");
pub(crate) const GATES: Source = source!("training-gates", contracts: true, "gates.cu");
pub(crate) const RECURRENCE: Source =
    source!("training-recurrence", contracts: true, "recurrence.cu");
pub(crate) const LOSS: Source = source!("training-loss", contracts: true, "loss.cu");
pub(crate) const INTEGERS: Source =
    Source { hopper_only: true, ..source!("training-integers", contracts: true, "integers.cu") };
pub(crate) const ATTENTION: Source = source!("training-attention", contracts: true, "attention.cu");
pub(crate) const OPTIMIZER: Source =
    source!("training-optimizer", contracts: false, "optimizer.cu", "update.cu");

/// Threads of most kernels.
const THREADS: usize = 256;
/// Static shared memory of the kernels, at most.
const STATIC_SHARED_BYTES: usize = 2048;

/// A part of a buffer that an operation reads.
#[derive(Debug)]
pub struct View<'a, T: Element> {
    buffer: &'a Buffer<T>,
    at: usize,
    len: usize,
}

impl<T: Element> Clone for View<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T: Element> Copy for View<'_, T> {}

impl<'a, T: Element> View<'a, T> {
    /// `len` elements from `at` on.
    ///
    /// # Panics
    /// If they are outside the buffer.
    pub fn new(buffer: &'a Buffer<T>, at: usize, len: usize) -> Self {
        assert!(at.checked_add(len).is_some_and(|end| end <= buffer.len()), "outside the buffer");
        Self { buffer, at, len }
    }

    fn address(self) -> u64 {
        self.buffer.address(self.at)
    }
}

/// A part of a buffer that an operation writes.
#[derive(Debug)]
pub struct ViewMut<'a, T: Element> {
    buffer: &'a mut Buffer<T>,
    at: usize,
    len: usize,
}

impl<'a, T: Element> ViewMut<'a, T> {
    /// `len` elements from `at` on.
    ///
    /// # Panics
    /// If they are outside the buffer.
    pub fn new(buffer: &'a mut Buffer<T>, at: usize, len: usize) -> Self {
        assert!(at.checked_add(len).is_some_and(|end| end <= buffer.len()), "outside the buffer");
        Self { buffer, at, len }
    }

    fn address(&self) -> u64 {
        self.buffer.address(self.at)
    }
}

/// What the scratch memory of the operations has to be enough for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reserve {
    /// The widest rows.
    pub width: usize,
    /// Sequences of a batch.
    pub sequences: usize,
    /// Their length.
    pub length: usize,
    /// Heads and their size, if there is attention.
    pub heads: Option<(usize, usize)>,
}

/// Elements of each scratch buffer.
struct Lengths {
    partials: usize,
    carries: usize,
    deltas: usize,
    rope_table: usize,
}

impl Reserve {
    fn lengths(&self) -> Lengths {
        let Self { width, sequences, length, heads } = *self;
        let (chunks, _) = recurrence::chunks(sequences, length, width);
        let (heads, head_size) = heads.unwrap_or((0, 0));
        Lengths {
            partials: (4 * rows::partial_elements(width)).max(sequences * chunks * width),
            carries: 2 * sequences * chunks * width,
            deltas: sequences * length * heads,
            rope_table: length * head_size,
        }
    }

    /// Bytes that [`Training::reserve`] allocates.
    pub fn bytes(&self) -> usize {
        let Lengths { partials, carries, deltas, rope_table } = self.lengths();
        (partials + carries + deltas + rope_table) * size_of::<f32>()
    }
}

/// The operations on one device.
pub struct Training {
    device: Arc<Device>,
    kernels: HashMap<&'static str, Kernel>,
    blas: Blas,
    /// Sums of blocks for vectors.
    partials: Buffer<f32>,
    /// Sums of blocks for scales of weights.
    weight_partials: Buffer<f64>,
    /// What the blocks of an update count with.
    update_counters: Buffer<u32>,
    /// States between chunks of time.
    carries: Buffer<f32>,
    /// Sums of the attention's backward pass.
    deltas: Buffer<f32>,
    /// Cosines and sines, and the length, head size and bits of theta that they are for.
    rope_table: Buffer<f32>,
    rope_key: Option<(usize, usize, u32)>,
    timeline: Option<Timeline>,
    pace: Pace,
    submission: Option<Start>,
}

impl Training {
    /// Loads the library of products.
    ///
    /// # Errors
    /// No cuBLASLt; the driver's.
    pub fn new(device: &Arc<Device>) -> Result<Self, CudaError> {
        Ok(Self {
            device: Arc::clone(device),
            kernels: HashMap::new(),
            blas: Blas::new(device)?,
            partials: Buffer::zeros(device, 1)?,
            weight_partials: Buffer::zeros(device, update::MOST_PARTS * optimizer::WEIGHT_BLOCKS)?,
            update_counters: Buffer::zeros(device, update::COUNTERS)?,
            carries: Buffer::zeros(device, 1)?,
            deltas: Buffer::zeros(device, 1)?,
            rope_table: Buffer::zeros(device, 1)?,
            rope_key: None,
            timeline: None,
            pace: Pace::default(),
            submission: None,
        })
    }

    /// The device.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// Grows scratch memory ahead of the first step.
    ///
    /// # Errors
    /// No memory.
    pub fn reserve(&mut self, batch: &Reserve) -> Result<(), CudaError> {
        let Lengths { partials, carries, deltas, rope_table } = batch.lengths();
        self.partials.reserve(partials)?;
        self.carries.reserve(carries)?;
        self.deltas.reserve(deltas)?;
        self.rope_table.reserve(rope_table).map(drop)
    }

    /// Begins to take the time of operations by their kind. It costs an event for each change of kind.
    ///
    /// # Errors
    /// The driver's.
    pub fn begin_timeline(&mut self) -> Result<(), CudaError> {
        self.timeline = Some(Timeline::new(&self.device)?);
        Ok(())
    }

    /// Seconds by kind of operation since [`begin_timeline`](Self::begin_timeline). Waits for the device.
    ///
    /// # Errors
    /// The driver's.
    pub fn end_timeline(&mut self) -> Result<Vec<(&'static str, f64)>, CudaError> {
        self.timeline.take().map_or(Ok(Vec::new()), |timeline| timeline.finish(&self.device))
    }

    /// Begins to count launches and the host's time for them. Waits for the device.
    ///
    /// # Errors
    /// The driver's.
    pub fn begin_submission(&mut self) -> Result<(), CudaError> {
        self.device.synchronize()?;
        self.submission = Some(self.pace.start());
        Ok(())
    }

    /// Kernels and products since [`begin_submission`](Self::begin_submission), and the seconds that the host took, without
    /// waiting for the device.
    pub fn end_submission(&mut self) -> Option<(usize, f64)> {
        self.submission.take().map(|start| self.pace.since(&start))
    }

    /// What looks, whenever the host waits for the device, whether there is still something to wait for.
    pub fn set_lookout(&mut self, lookout: Option<Lookout>) {
        self.pace.set_lookout(lookout);
    }

    /// Waits until work of the device is done, as `done` says.
    ///
    /// # Errors
    /// Those of `done` and of the lookout.
    pub fn wait(
        &mut self,
        done: &mut dyn FnMut() -> Result<bool, CudaError>,
    ) -> Result<(), CudaError> {
        self.pace.wait(done)
    }

    /// Something was submitted.
    fn submitted(&mut self) -> Result<(), CudaError> {
        self.pace.count(self.device.stream())
    }

    /// What follows is work of a kind.
    fn mark(&mut self, kind: &'static str) -> Result<(), CudaError> {
        match &mut self.timeline {
            Some(timeline) => timeline.mark(&self.device, kind),
            None => Ok(()),
        }
    }

    /// Submits a kernel.
    ///
    /// # Safety
    /// As [`Kernel::launch`].
    unsafe fn launch<A>(
        &mut self,
        source: Source,
        name: &'static str,
        launch: Launch,
        args: &A,
    ) -> Result<(), CudaError> {
        if launch.grid.contains(&0) {
            return Ok(());
        }
        let most = self.device.shared_bytes() - STATIC_SHARED_BYTES;
        if launch.shared_bytes > most {
            return Err(CudaError::Shape(format!(
                "{name} needs {} bytes of shared memory a block, this GPU has {most}: the model is too wide \
                 for training on it",
                launch.shared_bytes
            )));
        }
        let kernel = match self.kernels.get(name) {
            Some(kernel) => kernel,
            None => {
                let kernel = self.device.kernel(source, name, most)?;
                self.kernels.entry(name).or_insert(kernel)
            }
        };
        // SAFETY: the caller's promise.
        unsafe { kernel.launch(launch, args)? };
        self.submitted()
    }

    /// Submits a product: see [`Blas::multiply`].
    ///
    /// # Safety
    /// As there.
    unsafe fn product(&mut self, product: &Product) -> Result<(), CudaError> {
        // SAFETY: the caller's promise.
        unsafe { self.blas.multiply(product)? };
        self.submitted()
    }
}

impl std::fmt::Debug for Training {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Training").field("device", &self.device).finish_non_exhaustive()
    }
}

fn address_or_null(view: Option<View<'_, f32>>) -> u64 {
    view.map_or(0, View::address)
}

fn quotient(len: usize, width: usize) -> Result<usize, CudaError> {
    if width == 0 || len == 0 || !len.is_multiple_of(width) {
        return Err(CudaError::Shape(format!("{len} elements are no whole rows of {width}")));
    }
    Ok(len / width)
}

fn require(fits: bool, what: &str) -> Result<(), CudaError> {
    if fits { Ok(()) } else { Err(CudaError::Shape(format!("{what} has another size"))) }
}
