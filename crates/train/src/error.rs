//! The error type of training.

use std::fmt;
use std::io;

/// Result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Everything that can go wrong when a model is trained.
///
/// Messages are complete: there is no chain of sources to print behind them.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Loading, computing or writing a model failed.
    #[error(transparent)]
    Model(#[from] mmfree::error::Error),
    /// A file could not be read.
    #[error("cannot read {file}: {reason}")]
    Read {
        /// The file.
        file: String,
        /// The system's reason.
        reason: io::Error,
    },
    /// A file could not be written.
    #[error("cannot write {file}: {reason}")]
    Write {
        /// The file.
        file: String,
        /// The system's reason.
        reason: io::Error,
    },
    /// A configuration with unknown keys, unfitting values or contradictions.
    #[error("{file}: this configuration cannot be trained{}", Lines(problems))]
    Config {
        /// The file.
        file: String,
        /// Everything that is wrong with it, with lines.
        problems: Vec<String>,
    },
    /// A checkpoint belongs to another configuration.
    #[error(
        "{checkpoint} was made with another configuration (checkpoint, now){}{hint}",
        Lines(differences)
    )]
    OtherConfiguration {
        /// The checkpoint.
        checkpoint: String,
        /// The keys that differ, with both values.
        differences: Vec<String>,
        /// What to do.
        hint: &'static str,
    },
    /// A checkpoint is damaged or of an unknown version.
    #[error("{checkpoint}: {what}")]
    Checkpoint {
        /// The checkpoint.
        checkpoint: String,
        /// What is wrong with it.
        what: String,
    },
    /// The loss is no number any more, or far above what it was.
    #[error("{0}")]
    Diverged(String),
    /// Processes could not be joined, or one of them is gone.
    #[error("{0}")]
    Communication(String),
    /// The caller asked for something that cannot be done.
    #[error("{0}")]
    Invalid(String),
}

/// Prints a list one item a line, cut where it stops being useful to a reader.
struct Lines<'a>(&'a [String]);

impl fmt::Display for Lines<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 40;
        for item in self.0.iter().take(SHOWN) {
            write!(f, "\n  {item}")?;
        }
        if self.0.len() > SHOWN {
            write!(f, "\n  and {} more", self.0.len() - SHOWN)?;
        }
        Ok(())
    }
}
