//! The model: weights in the layout that the engine runs.

use crate::checkpoint::Checkpoint;
use crate::config::ModelConfig;
use crate::error::Result;

/// A loaded model, immutable and shared by engines.
pub struct Model {
    config: ModelConfig,
}

impl Model {
    /// Loads every weight of a checkpoint, quantising full-precision ones.
    ///
    /// # Errors
    /// Missing, misshapen or non-finite tensors, by name.
    pub fn load(_checkpoint: &Checkpoint) -> Result<Self> {
        unimplemented!()
    }

    /// The configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// A hash of configuration and weights: a saved state belongs to the model with the same one.
    pub fn fingerprint(&self) -> u64 {
        unimplemented!()
    }
}
