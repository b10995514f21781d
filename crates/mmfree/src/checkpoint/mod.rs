//! Checkpoints.

/// A checkpoint on disk or in the program.
pub struct Checkpoint {}
