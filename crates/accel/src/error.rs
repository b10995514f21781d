//! The error type of this crate.

use crate::asm::AssemblyError;
use crate::isa::DecodeError;

/// Result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Everything that can go wrong between a model and its run on the accelerator.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The model, its tokenizer, or a file.
    #[error(transparent)]
    Model(#[from] mmfree::error::Error),
    /// Sizes that no hardware can have.
    #[error("configuration: {0}")]
    Configuration(String),
    /// A model that does not fit the configuration.
    #[error("the model does not fit the configuration {configuration}: {what}")]
    DoesNotFit {
        /// Name of the configuration.
        configuration: String,
        /// What is too large, both numbers, and what to change.
        what: String,
    },
    /// A program image that is truncated, corrupt, of another kind or another version.
    #[error("{file}: {what}")]
    Image {
        /// The file.
        file: String,
        /// What is wrong.
        what: String,
    },
    /// An instruction of a program image.
    #[error("{file}: instruction {index}: {reason}")]
    Instruction {
        /// The file.
        file: String,
        /// Which instruction.
        index: usize,
        /// What is wrong.
        reason: DecodeError,
    },
    /// A program that the machine cannot go on with.
    #[error("the program stopped at instruction {pc} ({instruction}): {what}")]
    Machine {
        /// Index of the instruction.
        pc: usize,
        /// Its disassembly.
        instruction: String,
        /// What it did that cannot be done.
        what: String,
    },
    /// A program text.
    #[error(transparent)]
    Assembly(#[from] Box<AssemblyError>),
    /// Something else that the caller asked for and that cannot be had.
    #[error("{0}")]
    Invalid(String),
}
