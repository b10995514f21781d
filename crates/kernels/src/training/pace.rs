//! How far the host goes ahead of the device.
//!
//! A stream takes 1022 launches before it makes the host wait (747 with 3.9 KB of arguments each; found on an H200): in the
//! driver, where the host sees nothing else. If the device waits for another process that is lost, that would be for ever. So
//! the host waits by itself before that, and looks meanwhile whether there is still something to wait for.

use std::collections::VecDeque;
use std::thread;
use std::time::{Duration, Instant};

use cudarc::driver::{CudaEvent, CudaStream};

use crate::cuda::CudaError;

/// Launches between two marks, and marks that the device may still have to reach when the next one is set: up to 640 launches,
/// and what else goes to the stream between them.
const INTERVAL: usize = 128;
const MARKS: usize = 4;

/// How often the end of work is looked for, and whether there is still something to wait for.
const TICK: Duration = Duration::from_micros(20);
const LOOK: Duration = Duration::from_millis(200);

/// Looks, while the host waits for the device, whether there is still something to wait for: an error if not.
pub type Lookout = Box<dyn FnMut() -> Result<(), CudaError>>;

/// Waits until `done`, and calls `look` now and then.
///
/// # Errors
/// Those of both.
pub fn wait_until<E>(
    done: &mut dyn FnMut() -> Result<bool, E>,
    look: &mut dyn FnMut() -> Result<(), E>,
) -> Result<(), E> {
    let mut looked = Instant::now();
    while !done()? {
        if looked.elapsed() > LOOK {
            look()?;
            looked = Instant::now();
        }
        thread::sleep(TICK);
    }
    Ok(())
}

/// Keeps the host from going too far ahead of a stream.
#[derive(Default)]
pub(super) struct Pace {
    launches: usize,
    /// Time that the host has waited for the device.
    waited: Duration,
    /// What the device has yet to reach, the oldest first.
    marks: VecDeque<CudaEvent>,
    lookout: Option<Lookout>,
}

/// A time from which the host's part is counted.
pub(super) struct Start {
    begun: Instant,
    launches: usize,
    waited: Duration,
}

impl Pace {
    pub fn set_lookout(&mut self, lookout: Option<Lookout>) {
        self.lookout = lookout;
    }

    /// Now.
    pub fn start(&self) -> Start {
        Start { begun: Instant::now(), launches: self.launches, waited: self.waited }
    }

    /// Launches since then, and seconds of the host without those in which it waited.
    pub fn since(&self, start: &Start) -> (usize, f64) {
        let time = start.begun.elapsed().saturating_sub(self.waited - start.waited);
        (self.launches - start.launches, time.as_secs_f64())
    }

    /// Something was submitted to a stream, always the same. Waits if the device is too far behind with it.
    pub fn count(&mut self, stream: &CudaStream) -> Result<(), CudaError> {
        self.launches += 1;
        if !self.launches.is_multiple_of(INTERVAL) {
            return Ok(());
        }
        let failed = |error| CudaError::driver("waiting for the device", error);
        if self.marks.len() == MARKS
            && let Some(oldest) = self.marks.pop_front()
        {
            self.wait(&mut || oldest.try_is_complete().map_err(failed))?;
        }
        self.marks.push_back(stream.record_event(None).map_err(failed)?);
        Ok(())
    }

    /// Waits until `done`.
    pub fn wait(
        &mut self,
        done: &mut dyn FnMut() -> Result<bool, CudaError>,
    ) -> Result<(), CudaError> {
        let begun = Instant::now();
        let outcome = wait_until(done, &mut || self.lookout.as_mut().map_or(Ok(()), |look| look()));
        self.waited += begun.elapsed();
        outcome
    }
}
