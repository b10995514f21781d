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
    /// A tokenizer file is corrupt or unsupported, or cannot encode or decode what it was given.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// Text that was to be encoded is not UTF-8.
    #[error("the text is not UTF-8: invalid byte at offset {offset}; convert the file to UTF-8")]
    NotUtf8 {
        /// Offset of the first byte that is part of no character.
        offset: u64,
    },
    /// Text that was to be encoded could not be read.
    #[error("cannot read the text")]
    Read(#[source] std::io::Error),
    /// A chat template is malformed or refuses the messages.
    #[error("chat template: {0}")]
    ChatTemplate(String),
}

impl Error {
    /// A text that a tokenizer can neither cut nor hold.
    pub(crate) fn uncuttable() -> Self {
        Self::Tokenizer(format!(
            "the text has a stretch of more than {} MiB that this tokenizer cannot encode in parts; \
             put white space or line breaks into it",
            crate::tokenizer::MAX_UNCUT_BYTES >> 20
        ))
    }
}
