//! The error type of this crate.

/// Result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Everything that can go wrong when a model is loaded, packed or run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The caller asked for something that the model or the engine cannot do.
    #[error("{0}")]
    Invalid(String),
    /// The work was cancelled between two steps.
    #[error("cancelled")]
    Cancelled,
}
