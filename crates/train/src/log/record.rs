//! One line of a run's log.

use serde::{Deserialize, Serialize};

/// What is reported of one step. What was not measured at this step is `None` and is left out.
///
/// A loss that is not finite is written as null: JSON has no NaN.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Optimiser steps done.
    pub step: u64,
    /// Tokens seen by then, over all processes.
    pub tokens: u64,
    /// Mean next-token cross-entropy of the step's global batch, in nats.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss: Option<f64>,
    /// Mean next-token cross-entropy of the held-out documents, in nats.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub validation_loss: Option<f64>,
    /// Learning rate of the step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub learning_rate: Option<f64>,
    /// L2 norm of all gradients before clipping.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gradient_norm: Option<f64>,
    /// Tokens a second since the record before, over all processes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens_per_second: Option<f64>,
    /// Largest resident memory of this process so far, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
    /// Seconds since 1970-01-01 UTC. [`RunLog::write`](super::RunLog::write) fills it in if it is 0.
    #[serde(default)]
    pub time: f64,
}

impl Record {
    /// The measured values under their TensorBoard tags. Training and validation loss have one last part,
    /// so that they share a chart's name.
    pub(super) fn scalars(&self) -> impl Iterator<Item = (&'static str, f64)> {
        [
            ("train/loss", self.loss),
            ("validation/loss", self.validation_loss),
            ("train/learning_rate", self.learning_rate),
            ("train/gradient_norm", self.gradient_norm),
            ("speed/tokens_per_second", self.tokens_per_second),
            ("speed/memory_bytes", self.memory_bytes.map(|bytes| bytes as f64)),
            ("train/tokens", Some(self.tokens as f64)),
        ]
        .into_iter()
        .filter_map(|(tag, value)| Some((tag, value?)))
    }
}
