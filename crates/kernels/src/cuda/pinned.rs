//! Host memory that the device reads and writes by itself.

use std::fmt;
use std::sync::Arc;

use cudarc::driver::{CudaEvent, PinnedHostSlice, result};

use super::{Buffer, CudaError, Device, Element};

/// An array in host memory that stays where it is, always initialised: copies between it and the device go on while the
/// host does something else.
pub struct Pinned<T: Element> {
    device: Arc<Device>,
    memory: PinnedHostSlice<T>,
    /// End of the newest copy.
    copied: Option<CudaEvent>,
}

impl<T: Element> Pinned<T> {
    /// `len` zeros.
    ///
    /// # Errors
    /// No memory.
    pub fn zeros(device: &Arc<Device>, len: usize) -> Result<Self, CudaError> {
        let failed = |error| CudaError::driver("allocating host memory", error);
        // SAFETY: every element is set before anything reads it.
        let mut memory =
            unsafe { device.context.alloc_pinned_with_flags(len.max(1), 0) }.map_err(failed)?;
        memory.as_mut_slice().map_err(failed)?.fill(T::zeroed());
        Ok(Self { device: Arc::clone(device), memory, copied: None })
    }

    /// Begins to copy the first elements of a buffer to here, as many as there are, after all work that was submitted
    /// before.
    ///
    /// # Errors
    /// A buffer that is shorter; the driver's.
    pub fn fetch(&mut self, buffer: &Buffer<T>) -> Result<(), CudaError> {
        self.require(self.memory.len(), buffer)?;
        let stream = self.device.stream().cu_stream();
        let into = self.wait()?;
        // SAFETY: both are alive and long enough; the host does not look before the copy is done, see `wait`.
        unsafe { result::memcpy_dtoh_async(into, buffer.address(0), stream) }
            .map_err(|error| CudaError::driver("copying from the device", error))?;
        self.record()
    }

    /// Begins to copy the first `len` elements to a buffer, after all work that was submitted before.
    ///
    /// # Errors
    /// Fewer elements here or there; the driver's.
    pub fn send(&mut self, len: usize, buffer: &mut Buffer<T>) -> Result<(), CudaError> {
        self.require(len, buffer)?;
        let stream = self.device.stream().cu_stream();
        let from = &self.wait()?[..len];
        // SAFETY: both are alive and long enough; the host changes nothing before the copy is done, see `wait`.
        unsafe { result::memcpy_htod_async(buffer.address(0), from, stream) }
            .map_err(|error| CudaError::driver("copying to the device", error))?;
        self.record()
    }

    /// Whether the newest copy is done. Does not wait.
    ///
    /// # Errors
    /// The driver's, also those of earlier work.
    pub fn is_done(&self) -> Result<bool, CudaError> {
        let done = self.copied.as_ref().map_or(Ok(true), CudaEvent::try_is_complete);
        done.map_err(|error| CudaError::driver("a copy", error))
    }

    /// The elements, once the newest copy is done: waits for it.
    ///
    /// # Errors
    /// The driver's, also those of earlier work.
    pub fn wait(&mut self) -> Result<&mut [T], CudaError> {
        let failed = |error| CudaError::driver("a copy", error);
        if let Some(copied) = self.copied.take() {
            copied.synchronize().map_err(failed)?;
        }
        self.memory.as_mut_slice().map_err(failed)
    }

    fn require(&self, len: usize, buffer: &Buffer<T>) -> Result<(), CudaError> {
        if len <= self.memory.len() && len <= buffer.len() {
            return self.device.make_current();
        }
        Err(CudaError::Shape(format!(
            "{len} elements between {} of the host and {} of the device",
            self.memory.len(),
            buffer.len()
        )))
    }

    fn record(&mut self) -> Result<(), CudaError> {
        let event = self.device.stream().record_event(None);
        self.copied = Some(event.map_err(|error| CudaError::driver("a copy", error))?);
        Ok(())
    }
}

impl<T: Element> Drop for Pinned<T> {
    fn drop(&mut self) {
        // The device may still use the memory. If this fails, it does nothing any more.
        let _ = self.wait();
    }
}

impl<T: Element> fmt::Debug for Pinned<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pinned").field("len", &self.memory.len()).finish_non_exhaustive()
    }
}
