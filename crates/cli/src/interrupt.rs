//! Ctrl-C: the first asks the work to stop, the second ends the program.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use mmfree::error::Error;

/// Exit code of an interrupted command, as shells have it.
pub const EXIT_CODE: u8 = 130;

static REQUESTED: AtomicBool = AtomicBool::new(false);

/// From now on Ctrl-C sets the flag that is returned.
pub fn catch() -> Result<&'static AtomicBool> {
    ctrlc::set_handler(|| {
        if REQUESTED.swap(true, Ordering::Relaxed) {
            std::process::exit(EXIT_CODE.into());
        }
    })
    .context("cannot catch Ctrl-C")?;
    Ok(&REQUESTED)
}

/// Whether work may go on: an error once the flag is set.
///
/// # Errors
/// [`Error::Cancelled`].
pub fn check(cancel: &AtomicBool) -> mmfree::error::Result<()> {
    if cancel.load(Ordering::Relaxed) { Err(Error::Cancelled) } else { Ok(()) }
}

/// Signals that ask long work to save and stop. A second Ctrl-C ends the program.
pub struct StopSignals {
    any: Arc<AtomicBool>,
    each: [(i32, Arc<AtomicBool>); 3],
}

impl StopSignals {
    /// From now on SIGINT, SIGTERM and SIGUSR1 are remembered. `mpirun` passes SIGUSR1 on to its processes,
    /// and batch systems send it before the time is up.
    pub fn catch() -> Result<Self> {
        use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};
        let any = Arc::default();
        let each = [SIGINT, SIGTERM, SIGUSR1].map(|signal| (signal, Arc::default()));
        for (signal, flag) in &each {
            if *signal == SIGINT {
                let code = i32::from(EXIT_CODE);
                signal_hook::flag::register_conditional_shutdown(SIGINT, code, Arc::clone(flag))
                    .context("cannot catch Ctrl-C")?;
            }
            for flag in [flag, &any] {
                signal_hook::flag::register(*signal, Arc::clone(flag))
                    .context("cannot catch signals")?;
            }
        }
        Ok(Self { any, each })
    }

    /// Set once one of them has come.
    pub fn flag(&self) -> &AtomicBool {
        &self.any
    }

    /// The exit code of a program that stopped because of a signal: 128 plus its number, as shells have
    /// it. That of Ctrl-C if the signal came to another process.
    pub fn code_or_default(&self) -> ExitCode {
        let caught = self.each.iter().find(|(_, flag)| flag.load(Ordering::Relaxed));
        caught.map_or(EXIT_CODE, |(signal, _)| 128 + *signal as u8).into()
    }
}
