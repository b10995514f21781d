//! The recurrent state of one sequence.

use crate::error::Result;
use crate::model::Model;

/// Memory of one sequence: `h` [L, D], of constant size however long the sequence is.
#[derive(Clone, Debug)]
pub struct State {
    hidden: Vec<f32>,
    tokens_seen: u64,
}

impl State {
    /// The state before the first token.
    pub fn new(model: &Model) -> Self {
        let config = model.config();
        Self { hidden: vec![0.0; config.num_hidden_layers * config.hidden_size], tokens_seen: 0 }
    }

    /// `h` [L, D].
    pub fn hidden(&self) -> &[f32] {
        &self.hidden
    }

    /// How many tokens the state has seen.
    pub fn tokens_seen(&self) -> u64 {
        self.tokens_seen
    }

    /// Versioned, checksummed bytes, bound to the model by its fingerprint.
    pub fn to_bytes(&self, _model: &Model) -> Vec<u8> {
        unimplemented!()
    }

    /// Reads [`to_bytes`](Self::to_bytes) back.
    ///
    /// # Errors
    /// Foreign, corrupt or truncated bytes.
    pub fn from_bytes(_model: &Model, _bytes: &[u8]) -> Result<Self> {
        unimplemented!()
    }
}
