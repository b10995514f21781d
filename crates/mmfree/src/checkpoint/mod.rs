//! Checkpoints.

pub mod tokenizer_source;

/// A checkpoint on disk or in the program.
pub struct Checkpoint {}
