//! What the CUDA kernels stand on: device and stream, kernels compiled at first use, memory.
//!
//! The driver and NVRTC are loaded when a [`Device`] is opened, never before: the same binary runs where
//! neither exists. Every failure is a [`CudaError`] that names what is missing.
//!
//! A device has one stream. Work is done in the order in which it is submitted, so buffers need no events, and
//! a buffer may be dropped while work that uses it is under way: its memory is returned in stream order. Exchanges with
//! other GPUs run beside it; before memory is returned, the stream waits for them.

mod buffer;
mod compile;
mod error;
mod pinned;

use std::collections::HashMap;
use std::ffi::c_void;
use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys::{self, CUdevice_attribute, CUfunction_attribute};
use cudarc::driver::{CudaContext, CudaEvent, CudaFunction, CudaModule, CudaStream, result};

pub use buffer::{Buffer, Element};
#[cfg(test)]
pub(crate) use compile::compile_with;
pub use compile::{Compiled, compile_for, is_compiler_present};
pub use error::CudaError;
pub use pinned::Pinned;

/// Put in front of every source.
const COMMON: &str = include_str!("common.cuh");
/// Lowest compute capability: int8 tensor cores with 16 x 32 operands, asynchronous copies.
const MIN_CAPABILITY: (i32, i32) = (8, 0);

/// Recording a graph costs about as much as submitting its launches so many times.
const REPEATS_WORTH_A_GRAPH: usize = 4;

/// A CUDA source file: one module, compiled at first use.
#[derive(Clone, Copy, Debug)]
pub struct Source {
    /// Name in messages and of the cached file.
    pub name: &'static str,
    /// CUDA C++, without the common part.
    pub text: &'static str,
    /// Whether it needs instructions of compute capability 9.0 that later ones do not have.
    pub hopper_only: bool,
    /// Whether products and sums may be contracted: floats need not be the bits that the CPU computes.
    pub contracts: bool,
}

/// A size that a source is compiled for: a macro's name and its value.
pub(crate) type Constant = (&'static str, usize);

/// Modules by their source's name and the sizes that they were compiled for.
type Modules = HashMap<(&'static str, Vec<Constant>), Arc<CudaModule>>;

/// Blocks of a cluster that every device with clusters can have.
const PORTABLE_CLUSTER: usize = 8;

/// Every module of this crate.
pub const SOURCES: [Source; 16] = [
    crate::bandwidth::cuda::SOURCE,
    crate::decode::SOURCE,
    crate::fused_rows::SOURCE,
    crate::mlgru::cuda::SOURCE,
    crate::sampling::SOURCE,
    crate::ternary_gemm::cuda::SOURCE,
    crate::ternary_gemm::cuda::FEW_TOKENS_SOURCE,
    crate::ternary_gemm::cuda::WARPGROUP_SOURCE,
    crate::ternary_gemm::cuda::PROMPT_SOURCE,
    crate::training::ATTENTION,
    crate::training::INTEGERS,
    crate::training::NORMS,
    crate::training::GATES,
    crate::training::RECURRENCE,
    crate::training::LOSS,
    crate::training::OPTIMIZER,
];

/// A GPU, opened: context, stream and compiled modules.
pub struct Device {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    name: String,
    capability: (i32, i32),
    /// Kernels can begin early, and are compiled to wait: not if they are compiled for an older architecture.
    overlaps: bool,
    /// Blocks of a cluster, at most.
    max_cluster: usize,
    multiprocessors: usize,
    shared_bytes: usize,
    driver_version: i32,
    modules: Mutex<Modules>,
    allocated: AtomicUsize,
    peak: AtomicUsize,
    /// End of the newest work that runs beside the stream, if the stream does not wait for it yet.
    beside: Mutex<Option<CudaEvent>>,
}

impl Device {
    /// How many GPUs the driver shows.
    ///
    /// # Errors
    /// A missing or failing driver.
    pub fn count() -> Result<usize, CudaError> {
        // SAFETY: looks for a library by its well-known names.
        if !unsafe { sys::is_culib_present() } {
            return Err(CudaError::NoDriver);
        }
        let failed = |what| move |error| CudaError::driver(what, error);
        result::init().map_err(failed("cuInit"))?;
        let count = CudaContext::device_count().map_err(failed("cuDeviceGetCount"))?;
        Ok(usize::try_from(count).unwrap_or(0))
    }

    /// Opens the GPU of a number, counted as the driver does, from 0.
    ///
    /// # Errors
    /// A missing or failing driver, no such device, or one that is too old.
    pub fn open(ordinal: usize) -> Result<Arc<Self>, CudaError> {
        let failed = |what| move |error| CudaError::driver(what, error);
        let count = Self::count()?;
        if ordinal >= count {
            return Err(CudaError::NoDevice { wanted: ordinal, count });
        }
        let context = CudaContext::new(ordinal).map_err(failed("opening the device"))?;
        let name = context.name().map_err(failed("cuDeviceGetName"))?;
        let capability = context.compute_capability().map_err(failed("compute capability"))?;
        if capability < MIN_CAPABILITY {
            return Err(CudaError::OldDevice { name, capability, needed: MIN_CAPABILITY });
        }
        let attribute = |attribute| {
            context
                .attribute(attribute)
                .map(|n| n.max(0) as usize)
                .map_err(failed("cuDeviceGetAttribute"))
        };
        use CUdevice_attribute::{
            CU_DEVICE_ATTRIBUTE_CLUSTER_LAUNCH as CLUSTERS,
            CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN as SHARED,
            CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT as MULTIPROCESSORS,
        };
        let (multiprocessors, shared_bytes) = (attribute(MULTIPROCESSORS)?, attribute(SHARED)?);
        let overlaps =
            capability.0 >= 9 && std::env::var_os(compile::ARCHITECTURE_VARIABLE).is_none();
        let has_clusters = overlaps && attribute(CLUSTERS)? != 0;
        let mut driver_version = 0;
        // SAFETY: the pointer is to a live integer.
        unsafe { sys::cuDriverGetVersion(&mut driver_version) }
            .result()
            .map_err(failed("cuDriverGetVersion"))?;
        // SAFETY: all buffers of a device are used on its one stream, in order, so no events are needed.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream().map_err(failed("cuStreamCreate"))?;
        Ok(Arc::new(Self {
            context,
            stream,
            name,
            capability,
            overlaps,
            max_cluster: if has_clusters { PORTABLE_CLUSTER } else { 1 },
            multiprocessors,
            shared_bytes,
            driver_version,
            modules: Mutex::default(),
            allocated: AtomicUsize::new(0),
            peak: AtomicUsize::new(0),
            beside: Mutex::default(),
        }))
    }

    /// The product's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Number of the device.
    pub fn ordinal(&self) -> usize {
        self.context.ordinal()
    }

    /// Compute capability, major and minor.
    pub fn capability(&self) -> (i32, i32) {
        self.capability
    }

    /// Streaming multiprocessors.
    pub fn multiprocessors(&self) -> usize {
        self.multiprocessors
    }

    /// Blocks of a cluster, at most.
    pub(crate) fn max_cluster(&self) -> usize {
        self.max_cluster
    }

    /// Shared memory that one block can have.
    pub fn shared_bytes(&self) -> usize {
        self.shared_bytes
    }

    /// The device's universally unique id, as NVML writes it.
    ///
    /// # Errors
    /// The driver's.
    pub fn uuid(&self) -> Result<String, CudaError> {
        let uuid =
            self.context.uuid().map_err(|error| CudaError::driver("cuDeviceGetUuid", error))?;
        let hex: Vec<String> =
            uuid.bytes.iter().map(|byte| format!("{:02x}", byte.to_ne_bytes()[0])).collect();
        let part = |range: std::ops::Range<usize>| hex[range].concat();
        Ok(format!(
            "GPU-{}-{}-{}-{}-{}",
            part(0..4),
            part(4..6),
            part(6..8),
            part(8..10),
            part(10..16)
        ))
    }

    /// Bytes of device memory that are free, and all of them.
    ///
    /// # Errors
    /// The driver's.
    pub fn memory(&self) -> Result<(usize, usize), CudaError> {
        self.context.mem_get_info().map_err(|error| CudaError::driver("cuMemGetInfo", error))
    }

    /// The most bytes that buffers of this device had at one time. The driver's own memory is not in it.
    pub fn peak_bytes(&self) -> usize {
        self.peak.load(Ordering::Relaxed)
    }

    fn count_allocated(&self, bytes: usize) {
        let now = self.allocated.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.peak.fetch_max(now, Ordering::Relaxed);
    }

    fn count_freed(&self, bytes: usize) {
        self.allocated.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Waits for everything that was submitted.
    ///
    /// # Errors
    /// A failure of any of it.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        self.stream
            .synchronize()
            .map_err(|error| CudaError::driver("waiting for the device", error))
    }

    /// Seconds that the device takes for what `work` submits, between two events on the stream.
    ///
    /// # Errors
    /// The work's or the driver's.
    pub fn time(&self, work: impl FnOnce() -> Result<(), CudaError>) -> Result<f64, CudaError> {
        let failed = |error| CudaError::driver("timing", error);
        let record = || self.stream.record_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT));
        let start = record().map_err(failed)?;
        work()?;
        let end = record().map_err(failed)?;
        self.synchronize()?;
        Ok(f64::from(start.elapsed_ms(&end).map_err(failed)?) / 1e3)
    }

    /// Submits what `work` submits `count` times, recorded as a graph: a launch then costs the host nothing and the
    /// device less. `work` runs once and must submit the same every time; it must neither allocate nor wait.
    ///
    /// # Errors
    /// The work's or the driver's.
    pub fn repeat<E: From<CudaError>>(
        &self,
        count: usize,
        mut work: impl FnMut() -> Result<(), E>,
    ) -> Result<(), E> {
        if count < REPEATS_WORTH_A_GRAPH {
            return (0..count).try_for_each(|_| work());
        }
        let failed = |error| CudaError::driver("recording launches", error);
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        self.stream.begin_capture(mode).map_err(failed)?;
        let outcome = work();
        // Whatever the outcome, the stream must be taken out of recording.
        let graph = self.stream.end_capture(sys::CUgraphInstantiate_flags(0));
        outcome?;
        let graph = graph.map_err(failed)?;
        // What the work borrows, it borrows until here: the buffers of the launches are alive.
        let outcome = graph.map_or(Ok(()), |graph| {
            (0..count)
                .try_for_each(|_| graph.launch())
                .and_then(|()| self.stream.synchronize())
                .map_err(|error| CudaError::driver("running recorded launches", error))
        });
        Ok(outcome?)
    }

    /// A kernel, compiled and loaded if this is the first use of its module. It may ask for up to
    /// `shared_bytes` of dynamic shared memory.
    pub(crate) fn kernel(
        self: &Arc<Self>,
        source: Source,
        name: &str,
        shared_bytes: usize,
    ) -> Result<Kernel, CudaError> {
        self.kernel_for(source, &[], name, shared_bytes)
    }

    /// As [`kernel`](Self::kernel), compiled for some sizes.
    pub(crate) fn kernel_for(
        self: &Arc<Self>,
        source: Source,
        constants: &[Constant],
        name: &str,
        shared_bytes: usize,
    ) -> Result<Kernel, CudaError> {
        let mut modules = self.modules.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (source.name, constants.to_vec());
        let module = match modules.get(&key) {
            Some(module) => Arc::clone(module),
            None => {
                let image = compile::load(source, constants, self.capability, self.driver_version)?;
                let module = self
                    .context
                    .load_module(image)
                    .map_err(|error| CudaError::driver("loading a kernel", error))?;
                modules.insert(key, Arc::clone(&module));
                module
            }
        };
        let failed = |error| CudaError::Kernel {
            kernel: name.to_owned(),
            reason: CudaError::describe(error),
        };
        let function = module.load_function(name).map_err(failed)?;
        if shared_bytes > 0 {
            function
                .set_attribute(
                    CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                    shared_bytes as i32,
                )
                .map_err(failed)?;
        }
        Ok(Kernel { device: Arc::clone(self), function, name: name.to_owned() })
    }

    /// Makes the device the calling thread's.
    pub(crate) fn make_current(&self) -> Result<(), CudaError> {
        self.context.bind_to_thread().map_err(|error| CudaError::driver("cuCtxSetCurrent", error))
    }

    pub(crate) fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// A stream beside the device's own, whose work goes first where both want the same multiprocessors.
    pub(crate) fn stream_beside(&self) -> Result<Arc<CudaStream>, CudaError> {
        self.context
            .new_stream_with_priority(i32::MIN)
            .map_err(|error| CudaError::driver("cuStreamCreateWithPriority", error))
    }

    /// Remembers how far a stream beside this device's has come: see [`join`](Self::join).
    pub(crate) fn set_beside(&self, event: CudaEvent) {
        *self.beside.lock().unwrap_or_else(PoisonError::into_inner) = Some(event);
    }

    /// What is submitted from here on waits for the work beside the stream.
    pub(crate) fn join(&self) -> Result<(), CudaError> {
        match self.beside.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(event) => self
                .stream
                .wait(&event)
                .map_err(|error| CudaError::driver("cuStreamWaitEvent", error)),
            None => Ok(()),
        }
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Device").field("name", &self.name).finish_non_exhaustive()
    }
}

/// Blocks, threads of a block and dynamic shared memory of a launch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Launch {
    pub grid: [usize; 3],
    pub threads: usize,
    pub shared_bytes: usize,
    /// All blocks must run at once, because they wait for each other.
    pub cooperative: bool,
    /// May begin before the kernel before it has ended; the kernel itself waits before it touches anything
    /// that earlier ones touch (`wait_for_previous` in `common.cuh`). Without effect before compute capability 9.0.
    pub overlapping: bool,
    /// Blocks of a cluster: neighbours, which reach each other's shared memory. More than one only if
    /// [`Device::max_cluster`] is more.
    pub cluster: usize,
}

impl Launch {
    pub fn new(grid: [usize; 3], threads: usize, shared_bytes: usize) -> Self {
        Self { grid, threads, shared_bytes, cooperative: false, overlapping: false, cluster: 1 }
    }

    /// The same launch, beginning early.
    pub fn overlapping(self) -> Self {
        Self { overlapping: true, ..self }
    }
}

/// A loaded kernel. Every kernel of this crate takes one structure by value.
#[derive(Clone, Debug)]
pub(crate) struct Kernel {
    device: Arc<Device>,
    function: CudaFunction,
    name: String,
}

impl Kernel {
    /// Submits the kernel.
    ///
    /// # Safety
    /// `args` must be the `repr(C)` structure that the kernel takes, and whatever the kernel does with it must
    /// stay inside live buffers of the device.
    pub unsafe fn launch<A>(&self, launch: Launch, args: &A) -> Result<(), CudaError> {
        // SAFETY: the caller's promise.
        unsafe { self.launch_on(&self.device.stream, launch, args) }
    }

    /// Submits the kernel to a stream of the device.
    ///
    /// # Safety
    /// As [`launch`](Self::launch).
    pub unsafe fn launch_on<A>(
        &self,
        stream: &CudaStream,
        launch: Launch,
        args: &A,
    ) -> Result<(), CudaError> {
        let failed = |error| CudaError::Kernel {
            kernel: self.name.clone(),
            reason: CudaError::describe(error),
        };
        let limit = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let grid = launch.grid.map(limit);
        let (grid, block) = ((grid[0], grid[1], grid[2]), (limit(launch.threads), 1, 1));
        let shared = limit(launch.shared_bytes);
        let mut arguments = [std::ptr::from_ref(args).cast::<c_void>().cast_mut()];
        let stream = stream.cu_stream();
        self.device.context.bind_to_thread().map_err(failed)?;
        let attribute = |id, value| sys::CUlaunchAttribute { id, pad: [0; 4], value };
        let x = limit(launch.cluster);
        let size = sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x, y: 1, z: 1 };
        let mut attributes = Vec::with_capacity(3);
        if launch.overlapping && self.device.overlaps {
            attributes.push(attribute(
                sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
                sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
            ));
        }
        if launch.cluster > 1 {
            attributes.push(attribute(
                sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION,
                sys::CUlaunchAttributeValue { clusterDim: size },
            ));
        }
        if launch.cooperative && !attributes.is_empty() {
            attributes.push(attribute(
                sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_COOPERATIVE,
                sys::CUlaunchAttributeValue { cooperative: 1 },
            ));
        }
        if !attributes.is_empty() {
            let config = sys::CUlaunchConfig {
                gridDimX: grid.0,
                gridDimY: grid.1,
                gridDimZ: grid.2,
                blockDimX: block.0,
                blockDimY: block.1,
                blockDimZ: block.2,
                sharedMemBytes: shared,
                hStream: stream,
                attrs: attributes.as_mut_ptr(),
                numAttrs: attributes.len() as u32,
            };
            let function = self.function.cu_function();
            // SAFETY: the caller's promise; configuration and arguments are copied before the call returns.
            let status = unsafe {
                sys::cuLaunchKernelEx(
                    &raw const config,
                    function,
                    arguments.as_mut_ptr(),
                    std::ptr::null_mut(),
                )
            };
            return status.result().map_err(failed);
        }
        // SAFETY: the caller's promise; the arguments are copied before the call returns.
        unsafe {
            let function = self.function.cu_function();
            if launch.cooperative {
                result::launch_cooperative_kernel(
                    function,
                    grid,
                    block,
                    shared,
                    stream,
                    &mut arguments,
                )
            } else {
                result::launch_kernel(function, grid, block, shared, stream, &mut arguments)
            }
        }
        .map_err(failed)
    }
}

/// Tries to launch a kernel with more threads a block than any device has: what a failing launch looks like.
///
/// # Errors
/// Always the driver's.
pub fn launch_impossible(device: &Arc<Device>) -> Result<(), CudaError> {
    let kernel = device.kernel(crate::bandwidth::cuda::SOURCE, "read_all", 0)?;
    // SAFETY: no block of so many threads ever starts, so the arguments are not used.
    unsafe { kernel.launch(Launch::new([1, 1, 1], 4096, 0), &[0u64; 3]) }
}
