//! Text on standard output while it is made.

use std::io::{Write, stdout};

use mmfree::error::{Error, Result};

/// Prints at once: a reader sees each token when it comes.
pub fn print(text: &str) -> Result<()> {
    let mut stdout = stdout().lock();
    stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
        .map_err(|reason| Error::Write { file: "standard output".into(), reason })
}
