//! The error type of this crate.

use std::fmt;
use std::io;

use mmfree_kernels::cuda::CudaError;
use mmfree_kernels::ternary::TernaryError;

/// Result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Everything that can go wrong when a model is loaded, packed or run.
///
/// `file` is a path, or a description of what takes its place. Messages are complete: there is no chain of
/// sources to print behind them.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A tokenizer file is corrupt or unsupported, or cannot encode or decode what it was given.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// Text that was to be encoded is not UTF-8.
    #[error("the text is not UTF-8: invalid byte at offset {offset}; convert it to UTF-8")]
    NotUtf8 {
        /// Offset of the first byte that is part of no character.
        offset: u64,
    },
    /// Text that was to be encoded could not be read.
    #[error("cannot read the text: {0}")]
    ReadText(io::Error),
    /// A chat template is malformed or refuses the messages.
    #[error("chat template: {0}")]
    ChatTemplate(String),
    /// The caller asked for something that the model or the engine cannot do.
    #[error("{0}")]
    Invalid(String),
    /// A GPU is missing, lacks something, or failed.
    #[error(transparent)]
    Cuda(#[from] CudaError),
    /// The work was cancelled between two steps.
    #[error("cancelled")]
    Cancelled,
    /// A file could not be read.
    #[error("cannot read {file}: {reason}")]
    Read {
        /// The file.
        file: String,
        /// The system's reason.
        reason: io::Error,
    },
    /// A file could not be written. Nothing is left under its name.
    #[error("cannot write {file}: {reason}")]
    Write {
        /// The file.
        file: String,
        /// The system's reason.
        reason: io::Error,
    },
    /// Nothing that a model could be loaded from has this name.
    #[error("there is no model {model:?}: {reason}")]
    NoModel {
        /// What the caller named.
        model: String,
        /// What was tried, and what to do.
        reason: String,
    },
    /// A file does not follow its format.
    #[error("{file}: {what}")]
    Malformed {
        /// The file.
        file: String,
        /// What is wrong, with what was expected and what was found.
        what: String,
    },
    /// A file ends before something that it announces.
    #[error(
        "{file}: {what} ends at byte {expected}, but the file has {found} bytes; is it truncated?"
    )]
    Truncated {
        /// The file.
        file: String,
        /// What should be there.
        what: String,
        /// Bytes that the file would need.
        expected: u64,
        /// Bytes that the file has.
        found: u64,
    },
    /// A configuration that cannot be a MatMul-free model, or is one that is not supported.
    #[error("{file}: this configuration cannot be run{}", Lines(problems))]
    Config {
        /// The file.
        file: String,
        /// Everything that is wrong with it.
        problems: Vec<String>,
    },
    /// The tensors are not those that the configuration demands.
    #[error("{file}: the tensors do not fit the configuration{}", Lines(problems))]
    Tensors {
        /// The file or directory.
        file: String,
        /// Missing, unexpected and misshapen tensors.
        problems: Vec<TensorProblem>,
    },
    /// A weight is NaN or infinite.
    #[error("{file}: tensor {tensor}: value {index} is {value}; weights must be finite")]
    NotFinite {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// Row-major index of the first offending value.
        index: usize,
        /// The value.
        value: f32,
    },
    /// Ternary weights could not be read or stored.
    #[error("{file}: tensor {tensor}: {reason}")]
    Ternary {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// What is wrong.
        reason: TernaryError,
    },
    /// A token id that the vocabulary does not have.
    #[error("token id {id} is outside the vocabulary of {vocab_size}")]
    TokenId {
        /// The id.
        id: u32,
        /// V.
        vocab_size: usize,
    },
}

/// One way in which a tensor does not fit the configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TensorProblem {
    /// The configuration demands it and it is not there.
    Missing {
        /// The tensor.
        tensor: String,
    },
    /// It is there and the configuration knows no such tensor.
    Unexpected {
        /// The tensor.
        tensor: String,
    },
    /// It has another shape.
    Shape {
        /// The tensor.
        tensor: String,
        /// What the configuration demands, outermost dimension first.
        expected: Vec<usize>,
        /// What the file has.
        found: Vec<usize>,
    },
    /// It is stored in a type that it cannot have.
    Type {
        /// The tensor.
        tensor: String,
        /// Types that it can have.
        expected: &'static str,
        /// What the file has.
        found: String,
    },
}

impl fmt::Display for TensorProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing { tensor } => write!(f, "{tensor} is missing"),
            Self::Unexpected { tensor } => write!(f, "{tensor} is not a tensor of this model"),
            Self::Shape { tensor, expected, found } => {
                write!(f, "{tensor} has shape {found:?}, expected {expected:?}")
            }
            Self::Type { tensor, expected, found } => {
                write!(f, "{tensor} is stored as {found}, expected {expected}")
            }
        }
    }
}

/// Prints a list one item a line, cut where it stops being useful to a reader.
struct Lines<'a, T>(&'a [T]);

impl<T: fmt::Display> fmt::Display for Lines<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 24;
        for item in self.0.iter().take(SHOWN) {
            write!(f, "\n  {item}")?;
        }
        if self.0.len() > SHOWN {
            write!(f, "\n  and {} more", self.0.len() - SHOWN)?;
        }
        Ok(())
    }
}
