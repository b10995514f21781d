//! Where the time of a step goes, by events on the stream.

use cudarc::driver::CudaEvent;
use cudarc::driver::sys::CUevent_flags::CU_EVENT_DEFAULT;

use crate::cuda::{CudaError, Device};

/// Events between works of different kinds.
pub struct Timeline {
    marks: Vec<(CudaEvent, &'static str)>,
}

impl Timeline {
    pub(super) fn new(device: &Device) -> Result<Self, CudaError> {
        let mut timeline = Self { marks: Vec::new() };
        timeline.mark(device, "other")?;
        Ok(timeline)
    }

    pub(super) fn mark(&mut self, device: &Device, kind: &'static str) -> Result<(), CudaError> {
        if self.marks.last().is_some_and(|(_, last)| *last == kind) {
            return Ok(());
        }
        let event = device
            .stream()
            .record_event(Some(CU_EVENT_DEFAULT))
            .map_err(|error| CudaError::driver("timing", error))?;
        self.marks.push((event, kind));
        Ok(())
    }

    /// Seconds by kind, in the order of their first use.
    pub(super) fn finish(mut self, device: &Device) -> Result<Vec<(&'static str, f64)>, CudaError> {
        self.mark(device, "")?;
        device.synchronize()?;
        let mut kinds: Vec<(&'static str, f64)> = Vec::new();
        for pair in self.marks.windows(2) {
            let ((start, kind), (end, _)) = (&pair[0], &pair[1]);
            let milliseconds =
                start.elapsed_ms(end).map_err(|error| CudaError::driver("timing", error))?;
            let seconds = f64::from(milliseconds) / 1e3;
            match kinds.iter_mut().find(|(known, _)| known == kind) {
                Some((_, sum)) => *sum += seconds,
                None => kinds.push((kind, seconds)),
            }
        }
        Ok(kinds)
    }
}

impl std::fmt::Debug for Timeline {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Timeline").field("marks", &self.marks.len()).finish()
    }
}
