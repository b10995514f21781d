//! Ctrl-C: the first asks the work to stop, the second ends the program.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};

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
