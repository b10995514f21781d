//! Checkpoints.

use std::path::Path;

use crate::config::ModelConfig;
use crate::error::Result;

mod tokenizer;

pub use tokenizer::{TokenizerKind, TokenizerSource};

/// A checkpoint on disk or in the program.
pub struct Checkpoint {}

impl Checkpoint {
    /// Opens a Hugging Face directory or a packed file.
    ///
    /// # Errors
    /// Nothing to open, or a malformed checkpoint.
    pub fn open(_model: impl AsRef<Path>) -> Result<Self> {
        unimplemented!()
    }

    /// The configuration.
    pub fn config(&self) -> &ModelConfig {
        unimplemented!()
    }

    /// The tokenizer, if the checkpoint has one.
    ///
    /// # Errors
    /// A malformed tokenizer.
    pub fn tokenizer(&self) -> Result<Option<TokenizerSource>> {
        unimplemented!()
    }
}
