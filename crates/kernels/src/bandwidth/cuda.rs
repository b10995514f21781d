//! The yardstick on a GPU.

use std::sync::Arc;

use crate::cuda::{Buffer, CudaError, Device, Kernel, Launch, Source};

pub(crate) const SOURCE: Source = Source {
    name: "bandwidth",
    text: include_str!("read.cu"),
    hopper_only: false,
    contracts: false,
};

const THREADS: usize = 512;
/// Blocks that one multiprocessor runs at a time.
const BLOCKS_PER_MULTIPROCESSOR: usize = 2;

#[repr(C)]
struct Args {
    memory: u64,
    count: u64,
    result: u64,
}

/// Device memory to read from.
#[derive(Debug)]
pub struct DeviceReadBuffer {
    kernel: Kernel,
    memory: Buffer<u32>,
    result: Buffer<u32>,
}

impl DeviceReadBuffer {
    /// A buffer of a given size, which should be a multiple of the L2 cache's.
    ///
    /// # Errors
    /// No memory; no compiler, or its or the driver's complaints.
    pub fn new(device: &Arc<Device>, bytes: usize) -> Result<Self, CudaError> {
        Ok(Self {
            kernel: device.kernel(SOURCE, "read_all", 0)?,
            memory: Buffer::zeros(device, (bytes / 4).next_multiple_of(4))?,
            result: Buffer::zeros(device, 1)?,
        })
    }

    /// Bytes per second of one pass over the buffer.
    ///
    /// # Errors
    /// The driver's.
    pub fn measure(&self) -> Result<f64, CudaError> {
        let device = self.memory.device();
        let args = Args {
            memory: self.memory.address(0),
            count: (self.memory.bytes() / 16) as u64,
            result: self.result.address(0),
        };
        let blocks = device.multiprocessors() * BLOCKS_PER_MULTIPROCESSOR;
        let launch = Launch::new([blocks, 1, 1], THREADS, 0);
        // SAFETY: the kernel reads the buffer, and writes one word of the result at most.
        let seconds = device.time(|| unsafe { self.kernel.launch(launch, &args) })?;
        Ok(self.memory.bytes() as f64 / seconds)
    }
}
