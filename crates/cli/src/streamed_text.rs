//! Text on standard output: at once, and an error, not a panic, if the reader has gone.

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

/// A line on standard output, as [`print`] writes it; returns from the function that uses it on an error.
macro_rules! line {
    ($($argument:tt)*) => {
        $crate::streamed_text::print(&format!("{}\n", format_args!($($argument)*)))?
    };
}
pub(crate) use line;
