//! What it costs the host to submit work.

use std::time::{Duration, Instant};

use crate::cuda::{CudaError, Device};

/// Launches after which the device is waited for: it takes about a thousand before it makes the host wait, which would count
/// as the host's time.
const PENDING: usize = 512;

/// Counts what is submitted, and the time that the host takes for it and for what it does in between.
#[derive(Debug)]
pub(super) struct Submission {
    begun: Instant,
    waited: Duration,
    launches: usize,
}

impl Submission {
    pub fn new(device: &Device) -> Result<Self, CudaError> {
        device.synchronize()?;
        Ok(Self { begun: Instant::now(), waited: Duration::ZERO, launches: 0 })
    }

    pub fn count(&mut self, device: &Device) -> Result<(), CudaError> {
        self.launches += 1;
        if self.launches.is_multiple_of(PENDING) {
            let full = Instant::now();
            device.synchronize()?;
            self.waited += full.elapsed();
        }
        Ok(())
    }

    /// Launches, and seconds that the host took without waiting for the device.
    pub fn finish(self) -> (usize, f64) {
        (self.launches, (self.begun.elapsed() - self.waited).as_secs_f64())
    }
}
