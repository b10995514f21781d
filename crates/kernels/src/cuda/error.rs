//! What can go wrong on the way to the GPU and on it.

use cudarc::driver::DriverError;

/// Why something could not be done on a GPU.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CudaError {
    /// The driver's library is not installed.
    #[error(
        "no NVIDIA driver: libcuda.so.1 (nvcuda.dll) cannot be loaded; install the driver, or use --backend cpu"
    )]
    NoDriver,
    /// The run-time compiler's library is not installed.
    #[error(
        "libnvrtc (NVIDIA's run-time compiler, part of the CUDA toolkit 12 or 13) cannot be loaded, and kernel \
         {kernel} is not in the cache; install it and put its folder on LD_LIBRARY_PATH, or use --backend cpu"
    )]
    NoCompiler {
        /// The module that was to be compiled.
        kernel: &'static str,
    },
    /// The library of dense products is not installed.
    #[error(
        "libcublasLt (NVIDIA's library of matrix products, part of the CUDA toolkit 13) cannot be loaded; \
         training needs it: install it and put its folder on LD_LIBRARY_PATH, or use --backend cpu"
    )]
    NoBlas,
    /// The library of exchanges between GPUs is not installed, or too old.
    #[error(
        "NCCL (libnccl.so.2, NVIDIA's library of exchanges between GPUs) cannot be used: {reason}; training on \
         several GPUs needs it: install it and put its folder on LD_LIBRARY_PATH, or start one process"
    )]
    NoNccl {
        /// What the loader says, or what is missing in it.
        reason: String,
    },
    /// NCCL reports a failure.
    #[error("NCCL, {what}: {reason}")]
    Nccl {
        /// What was attempted.
        what: &'static str,
        /// NCCL's reason.
        reason: String,
    },
    /// There is no device of this number.
    #[error("there is no GPU {wanted}: the driver shows {count} (numbers begin with 0)")]
    NoDevice {
        /// The number asked for.
        wanted: usize,
        /// How many there are.
        count: usize,
    },
    /// The device lacks instructions that the kernels need.
    #[error(
        "{name} has compute capability {}.{}; {}.{} or later is needed",
        capability.0, capability.1, needed.0, needed.1
    )]
    OldDevice {
        /// The device.
        name: String,
        /// What it has.
        capability: (i32, i32),
        /// What it should have.
        needed: (i32, i32),
    },
    /// A kernel could not be compiled.
    #[error("kernel {kernel} does not compile for {target}: {log}")]
    Compile {
        /// The module.
        kernel: &'static str,
        /// The architecture.
        target: String,
        /// What the compiler says.
        log: String,
    },
    /// A kernel could not be found or launched.
    #[error("CUDA kernel {kernel}: {reason}")]
    Kernel {
        /// The kernel.
        kernel: String,
        /// The driver's reason.
        reason: String,
    },
    /// The driver reports a failure; of earlier work, perhaps.
    #[error("CUDA, {what}: {reason}")]
    Driver {
        /// What was attempted.
        what: &'static str,
        /// The driver's reason.
        reason: String,
    },
    /// Device memory is exhausted.
    #[error("the GPU has no memory for {bytes} bytes more: {free} of {total} bytes are free")]
    OutOfMemory {
        /// Bytes asked for.
        bytes: usize,
        /// Bytes free.
        free: usize,
        /// All bytes.
        total: usize,
    },
    /// A model's weights are larger than the memory that is free.
    #[error(
        "the model takes {bytes} bytes of GPU memory, and {free} of {total} bytes are free; use a larger GPU, or \
         --backend cpu"
    )]
    ModelTooLarge {
        /// Bytes of weights.
        bytes: usize,
        /// Bytes free.
        free: usize,
        /// All bytes.
        total: usize,
    },
    /// What the host waits for will not come.
    #[error("{0}")]
    Abandoned(String),
    /// Shapes that the kernels do not handle.
    #[error("{0}")]
    Shape(String),
}

impl CudaError {
    pub(crate) fn driver(what: &'static str, error: DriverError) -> Self {
        Self::Driver { what, reason: Self::describe(error) }
    }

    /// The driver's name of an error and its explanation.
    pub(super) fn describe(error: DriverError) -> String {
        match (error.error_name(), error.error_string()) {
            (Ok(name), Ok(text)) => {
                format!("{} ({})", name.to_string_lossy(), text.to_string_lossy())
            }
            _ => format!("error {}", error.0 as u32),
        }
    }
}
