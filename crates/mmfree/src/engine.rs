//! Runs a model on the CPU.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use crate::error::Result;
use crate::model::Model;
use crate::state::State;

/// How an engine is built. `Default` chooses for this machine.
#[derive(Clone, Debug, Default)]
pub struct EngineOptions {
    /// Worker threads; `None` is one for each core.
    pub threads: Option<usize>,
    /// Kernel tier by name (`scalar`, `avx2`, `avx512`, `neon`); `None` is the fastest that this CPU runs,
    /// or what the environment variable `MMFREE_BACKEND` names.
    pub backend: Option<String>,
}

/// Scratch memory and threads to run one model.
pub struct Engine {
    model: Arc<Model>,
}

impl Engine {
    /// Builds an engine.
    ///
    /// # Errors
    /// An unknown or unavailable backend, or zero threads.
    pub fn new(_model: Arc<Model>, _options: &EngineOptions) -> Result<Self> {
        unimplemented!()
    }

    /// The model.
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// Kernel tier, threads: one line for a run header.
    pub fn describe(&self) -> String {
        unimplemented!()
    }

    /// Feeds tokens, in chunks, and returns the logits [V] after the last one. Checks `cancel` between
    /// chunks; a cancelled prefill leaves the state after the last whole chunk.
    ///
    /// # Errors
    /// An empty prompt, an id outside the vocabulary (the state is then unchanged), cancellation.
    pub fn prefill(
        &mut self,
        _state: &mut State,
        _tokens: &[u32],
        _cancel: &AtomicBool,
    ) -> Result<&mut [f32]> {
        unimplemented!()
    }

    /// Feeds one token and returns the logits [V] after it.
    ///
    /// # Errors
    /// An id outside the vocabulary.
    pub fn decode(&mut self, _state: &mut State, _token: u32) -> Result<&mut [f32]> {
        unimplemented!()
    }

    /// Feeds tokens and hands the logits [V] of every position to `sink(position, logits)`.
    ///
    /// # Errors
    /// As [`prefill`](Self::prefill), and whatever the sink reports.
    pub fn logits(
        &mut self,
        _state: &mut State,
        _tokens: &[u32],
        _sink: &mut dyn FnMut(usize, &[f32]) -> Result<()>,
    ) -> Result<()> {
        unimplemented!()
    }
}
