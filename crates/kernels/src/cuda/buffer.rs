//! Device memory.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use cudarc::driver::result::memset_d8_async;
use cudarc::driver::sys::CUresult;
use cudarc::driver::{CudaSlice, DevicePtr, DeviceRepr, DriverError, ValidAsZeroBits};

use super::{CudaError, Device};

/// What buffers hold: plain numbers.
pub trait Element: DeviceRepr + ValidAsZeroBits + bytemuck::Pod + Send + Sync {}

impl<T: DeviceRepr + ValidAsZeroBits + bytemuck::Pod + Send + Sync> Element for T {}

/// An array in device memory, always initialised.
pub struct Buffer<T: Element> {
    device: Arc<Device>,
    memory: CudaSlice<T>,
}

impl<T: Element> Buffer<T> {
    /// `len` zeros.
    ///
    /// # Errors
    /// No memory.
    pub fn zeros(device: &Arc<Device>, len: usize) -> Result<Self, CudaError> {
        let memory = device
            .stream()
            .alloc_zeros(len.max(1))
            .map_err(|error| allocation_error::<T>(device, len, error))?;
        device.count_allocated(memory.num_bytes());
        Ok(Self { device: Arc::clone(device), memory })
    }

    /// `len` elements whose every byte is `byte`.
    ///
    /// # Errors
    /// No memory.
    pub fn filled(device: &Arc<Device>, len: usize, byte: u8) -> Result<Self, CudaError> {
        let buffer = Self::zeros(device, len)?;
        // SAFETY: the memory is alive, of that size, and any bytes are a valid element (`Pod`).
        unsafe {
            memset_d8_async(buffer.address(0), byte, buffer.bytes(), device.stream().cu_stream())
        }
        .map_err(|error| CudaError::driver("filling memory", error))?;
        Ok(buffer)
    }

    /// A copy of host memory.
    ///
    /// # Errors
    /// No memory.
    pub fn from_slice(device: &Arc<Device>, values: &[T]) -> Result<Self, CudaError> {
        let mut buffer = Self::zeros(device, values.len())?;
        buffer.write(0, values)?;
        Ok(buffer)
    }

    /// The device that it lies on.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// Elements. At least one: the driver has no empty memory.
    pub fn len(&self) -> usize {
        self.memory.len()
    }

    /// Never: see [`len`](Self::len).
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Bytes.
    pub fn bytes(&self) -> usize {
        self.memory.num_bytes()
    }

    /// Copies host memory to the elements from `at` on. Returns when the host memory may change again.
    ///
    /// # Errors
    /// A range outside the buffer; the driver's.
    pub fn write(&mut self, at: usize, values: &[T]) -> Result<(), CudaError> {
        if values.is_empty() {
            return Ok(());
        }
        let range = self.range(at..at.saturating_add(values.len()))?;
        let stream = Arc::clone(self.device.stream());
        stream
            .memcpy_htod(values, &mut self.memory.slice_mut(range))
            .map_err(|error| CudaError::driver("copying to the device", error))
    }

    /// Copies elements from `at` on to host memory, after all work that was submitted before.
    ///
    /// # Errors
    /// A range outside the buffer; the driver's, also those of earlier work.
    pub fn read(&self, at: usize, values: &mut [T]) -> Result<(), CudaError> {
        if values.is_empty() {
            return Ok(());
        }
        let range = self.range(at..at.saturating_add(values.len()))?;
        let stream = self.device.stream();
        stream
            .memcpy_dtoh(&self.memory.slice(range), values)
            .and_then(|()| stream.synchronize())
            .map_err(|error| CudaError::driver("copying from the device", error))
    }

    /// Copies the elements of another buffer of the same device and length.
    ///
    /// # Errors
    /// Another length; the driver's.
    pub fn copy_from(&mut self, other: &Self) -> Result<(), CudaError> {
        if self.len() != other.len() {
            let (to, from) = (self.len(), other.len());
            return Err(CudaError::Shape(format!("{from} elements copied to {to}")));
        }
        self.device
            .stream()
            .memcpy_dtod(&other.memory, &mut self.memory)
            .map_err(|error| CudaError::driver("copying on the device", error))
    }

    /// Sets every element to zero.
    ///
    /// # Errors
    /// The driver's.
    pub fn clear(&mut self) -> Result<(), CudaError> {
        let stream = Arc::clone(self.device.stream());
        stream
            .memset_zeros(&mut self.memory)
            .map_err(|error| CudaError::driver("clearing memory", error))
    }

    /// Sets a part to zero.
    ///
    /// # Errors
    /// A range outside the buffer; the driver's.
    pub fn clear_range(&mut self, range: Range<usize>) -> Result<(), CudaError> {
        if range.is_empty() {
            return Ok(());
        }
        let range = self.range(range)?;
        let stream = Arc::clone(self.device.stream());
        stream
            .memset_zeros(&mut self.memory.slice_mut(range))
            .map_err(|error| CudaError::driver("clearing memory", error))
    }

    /// Makes room for `len` elements; zeros if it had to grow.
    ///
    /// # Errors
    /// No memory.
    pub fn reserve(&mut self, len: usize) -> Result<bool, CudaError> {
        if len <= self.len() {
            return Ok(false);
        }
        let device = Arc::clone(&self.device);
        // Gives the old memory back first: both together might not fit.
        *self = Self::zeros(&device, 1)?;
        *self = Self::zeros(&device, len)?;
        Ok(true)
    }

    /// Address of an element, for a kernel. Valid while the buffer lives.
    pub(crate) fn address(&self, at: usize) -> u64 {
        let (address, _) = self.memory.device_ptr(self.device.stream());
        address + (at * size_of::<T>()) as u64
    }

    fn range(&self, range: Range<usize>) -> Result<Range<usize>, CudaError> {
        if range.end <= self.len() {
            return Ok(range);
        }
        Err(CudaError::Shape(format!(
            "elements {} to {} of a buffer of {}",
            range.start,
            range.end,
            self.len()
        )))
    }
}

impl<T: Element> Drop for Buffer<T> {
    fn drop(&mut self) {
        // If this fails, so does everything that follows on the device.
        let _ = self.device.join();
        self.device.count_freed(self.memory.num_bytes());
    }
}

impl<T: Element> fmt::Debug for Buffer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Buffer").field("len", &self.len()).finish_non_exhaustive()
    }
}

fn allocation_error<T>(device: &Device, len: usize, error: DriverError) -> CudaError {
    match (error.0, device.memory()) {
        (CUresult::CUDA_ERROR_OUT_OF_MEMORY, Ok((free, total))) => {
            CudaError::OutOfMemory { bytes: len.saturating_mul(size_of::<T>()), free, total }
        }
        _ => CudaError::driver("allocating memory", error),
    }
}
