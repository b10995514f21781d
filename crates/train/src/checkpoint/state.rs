//! What a checkpoint says of a run beside its numbers.

use serde::{Deserialize, Serialize};

use crate::config::TrainConfig;
use crate::error::{Error, Result};

/// Version of the checkpoint's layout. Counted up when an older program could misread it.
const VERSION: u32 = 1;

/// `trainer.json`.
///
/// Nothing random has a state of its own: initial weights and the order of the data are functions of the
/// seed and the step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Version of the layout.
    pub version: u32,
    /// Optimiser steps done; the data position and the end of the log follow from it.
    pub step: u64,
    /// Tokens trained on.
    pub tokens: u64,
    /// The whole configuration, as TOML.
    pub config: String,
    /// V, which the configuration may leave to the tokenizer.
    pub vocab_size: usize,
    /// Fingerprint of the tokens trained on and of their tokenizer.
    pub data: String,
    /// What the guard against divergence has seen.
    pub guard: GuardState,
}

/// Memory of the guard against divergence.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct GuardState {
    /// Smoothed loss.
    pub smoothed: Option<f64>,
    /// Lowest smoothed loss.
    pub best: Option<f64>,
}

impl State {
    /// The state of a run that has done `step` steps.
    pub fn new(
        step: u64,
        config: &TrainConfig,
        vocab_size: usize,
        data: &str,
        guard: GuardState,
    ) -> Self {
        Self {
            version: VERSION,
            step,
            tokens: step * config.tokens_per_step(),
            config: config.to_toml(),
            vocab_size,
            data: data.to_owned(),
            guard,
        }
    }

    pub(super) fn read(checkpoint: &str, bytes: &[u8]) -> Result<Self> {
        let malformed = |what| Error::Checkpoint { checkpoint: checkpoint.to_owned(), what };
        #[derive(Deserialize)]
        struct Versioned {
            version: u32,
        }
        let Versioned { version } = serde_json::from_slice(bytes)
            .map_err(|error| malformed(format!("trainer.json is not valid: {error}")))?;
        if version != VERSION {
            return Err(malformed(format!(
                "it has version {version}, this program knows version {VERSION}; use the program that \
                 wrote it"
            )));
        }
        serde_json::from_slice(bytes)
            .map_err(|error| malformed(format!("trainer.json is not valid: {error}")))
    }

    /// Refuses to go on with a configuration, vocabulary or data that would lead elsewhere.
    ///
    /// # Errors
    /// [`Error::OtherConfiguration`] with every key that differs. With `allow_changes` only keys of the
    /// model count.
    pub fn require(
        &self,
        checkpoint: &str,
        config: &TrainConfig,
        vocab_size: usize,
        data: &str,
        allow_changes: bool,
    ) -> Result<()> {
        let saved = TrainConfig::parse(&format!("{checkpoint}/trainer.json"), &self.config, &[])?;
        let mut differences: Vec<String> = saved
            .differences(config)
            .into_iter()
            .filter(|(path, ..)| !allow_changes || path.starts_with("model."))
            .map(|(path, saved, now)| format!("{path}: {saved}, {now}"))
            .collect();
        if self.vocab_size != vocab_size {
            differences.push(format!("size of the vocabulary: {}, {vocab_size}", self.vocab_size));
        }
        if self.data != data && !allow_changes {
            differences.push(format!("tokens of data.train: {}, {data}", self.data));
        }
        if differences.is_empty() {
            return Ok(());
        }
        Err(Error::OtherConfiguration {
            checkpoint: checkpoint.to_owned(),
            differences,
            hint: "\nGive the checkpoint's values, start another run.directory, or go on with the new \
                   values with --allow-changes (never for keys of the model)",
        })
    }
}
