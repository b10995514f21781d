//! The configuration of a training run: one TOML file, every key with a default.
//!
//! [`fields`] is the table of keys, from which reading, writing, overriding and comparing follow; what
//! contradicts what is in `check`.

use std::path::{Path, PathBuf};

mod check;
mod fields;
mod parse;
mod value;

#[cfg(test)]
mod tests;

pub use fields::{Field, Scope, fields};
pub use parse::Override;

use crate::error::{Error, Result};
use value::choices;

/// Everything that decides a training run.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TrainConfig {
    /// `[run]`
    pub run: RunConfig,
    /// `[data]`
    pub data: DataConfig,
    /// `[model]`
    pub model: ModelSection,
    /// `[batch]`
    pub batch: BatchConfig,
    /// `[optimizer]`
    pub optimizer: OptimizerConfig,
    /// `[schedule]`
    pub schedule: ScheduleConfig,
    /// `[evaluation]`
    pub evaluation: EvaluationConfig,
    /// `[checkpoint]`
    pub checkpoint: CheckpointConfig,
    /// `[log]`
    pub log: LogConfig,
    /// `[guard]`
    pub guard: GuardConfig,
}

/// Which model is trained.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Architecture {
    /// MatMul-free (`hgrn_bit`).
    #[default]
    MatmulFree,
    /// Transformer++: Llama-2 style, the baseline.
    TransformerPlusPlus,
}
choices!(Architecture { MatmulFree = "matmul-free", TransformerPlusPlus = "transformer++" });

/// How the learning rate falls after the warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ScheduleKind {
    /// Half a cosine from the peak to the final value.
    #[default]
    Cosine,
    /// The cosine, multiplied by a factor from a point on.
    TwoStage,
    /// The peak to the end.
    Constant,
}
choices!(ScheduleKind { Cosine = "cosine", TwoStage = "two-stage", Constant = "constant" });

/// `[run]`: where, how long, with what.
#[derive(Clone, Debug, PartialEq)]
pub struct RunConfig {
    /// Directory of checkpoints, logs and the finished model.
    pub directory: String,
    /// Optimiser steps in all.
    pub steps: u64,
    /// Seed of the initial weights and of the order of the data.
    pub seed: u64,
    /// Threads of each process; 0 is all processors.
    pub threads: usize,
}

/// `[data]`: texts or token shards.
#[derive(Clone, Debug, PartialEq)]
pub struct DataConfig {
    /// Texts (`.txt`, `.jsonl`, `.jsonl.zst`, parquet), folders of them, or folders of token shards.
    pub train: Vec<String>,
    /// The same, held out; empty holds out a part of `train`.
    pub validation: Vec<String>,
    /// Share of the documents of `train` that is held out if `validation` is empty.
    pub validation_fraction: f64,
    /// `tokenizer.json` or SentencePiece `tokenizer.model`; empty trains a byte-level BPE on `train`.
    pub tokenizer: String,
    /// Vocabulary of the tokenizer that is trained.
    pub tokenizer_vocab_size: usize,
    /// Field of JSON lines and column of parquet that holds the text.
    pub text_field: String,
    /// Line that stands between two documents of a `.txt` file; empty: a file is one document.
    pub separator: String,
    /// Directory of what is made from texts, once: tokenizer and shards; empty is `DIRECTORY/data`.
    pub cache: String,
}

/// `[model]`: architecture and sizes.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelSection {
    /// Which model.
    pub architecture: Architecture,
    /// V; 0 is the tokenizer's.
    pub vocab_size: usize,
    /// D.
    pub hidden_size: usize,
    /// F; 0 is 256·ceil(int(D·8/3)/256).
    pub intermediate_size: usize,
    /// L.
    pub num_hidden_layers: usize,
    /// Heads of the attention of Transformer++; 0 for the MatMul-free model.
    pub num_attention_heads: usize,
    /// ε of the norms (outside BitLinear, where it is always 1e-6).
    pub rms_norm_eps: f64,
    /// Whether forget gates have learned lower bounds (MatMul-free only).
    pub use_lower_bound: bool,
    /// Base of the rotary position embedding (Transformer++ only).
    pub rope_theta: f64,
    /// Standard deviation of the initial weights.
    pub initializer_range: f64,
    /// Directory of a checkpoint to take the initial weights from; empty draws them.
    pub initial_checkpoint: String,
}

/// `[batch]`: what one optimiser step sees.
#[derive(Clone, Debug, PartialEq)]
pub struct BatchConfig {
    /// T, tokens of a sequence.
    pub sequence_length: usize,
    /// Sequences of an optimiser step, over all processes.
    pub sequences: usize,
    /// Sequences that are computed at once; `sequences / micro_batch` are accumulated.
    pub micro_batch: usize,
    /// At most so many partial sums of gradients, added in a fixed tree; what makes numbers of processes
    /// that are powers of two up to this give equal bits. 1 needs the least memory.
    pub reduction_groups: usize,
    /// Whether the backward pass computes activations again instead of keeping them.
    pub recompute_activations: bool,
    /// In so many blocks of the MatMul-free model, the backward pass computes the input of the gated linear unit
    /// again: less memory for a few percent more arithmetic.
    pub recompute_gates: usize,
}

/// `[optimizer]`: AdamW.
#[derive(Clone, Debug, PartialEq)]
pub struct OptimizerConfig {
    /// Peak learning rate.
    pub learning_rate: f64,
    /// β₁.
    pub beta1: f64,
    /// β₂.
    pub beta2: f64,
    /// ε.
    pub eps: f64,
    /// Weight decay of matrices: BitLinear and Linear weights, the head included.
    pub weight_decay: f64,
    /// Weight decay of the embedding table.
    pub weight_decay_embeddings: f64,
    /// Weight decay of norm weights and lower bounds.
    pub weight_decay_norms: f64,
    /// Gradients whose norm is above this are scaled to it; 0 does not clip.
    pub clip_grad_norm: f64,
}

/// `[schedule]`: the learning rate over the steps.
#[derive(Clone, Debug, PartialEq)]
pub struct ScheduleConfig {
    /// How it falls.
    pub kind: ScheduleKind,
    /// Steps over which it rises linearly from 0.
    pub warmup_steps: u64,
    /// Where the cosine ends, as a share of the peak.
    pub final_fraction: f64,
    /// Where the second stage begins, as a share of the steps (two-stage only).
    pub second_stage_at: f64,
    /// What the learning rate is multiplied by in the second stage (two-stage only).
    pub second_stage_learning_rate: f64,
    /// What the weight decay is multiplied by in the second stage (two-stage only).
    pub second_stage_weight_decay: f64,
}

/// `[evaluation]`: loss on the held-out split.
#[derive(Clone, Debug, PartialEq)]
pub struct EvaluationConfig {
    /// Every so many steps, and at the end; 0 never.
    pub every: u64,
    /// Sequences that it is computed on, the same ones every time; fewer if the split has fewer.
    pub sequences: usize,
}

/// `[checkpoint]`: what a run resumes from.
#[derive(Clone, Debug, PartialEq)]
pub struct CheckpointConfig {
    /// Every so many steps, and at the end; 0 only at the end and when stopped.
    pub every: u64,
    /// How many of the newest are kept.
    pub keep: usize,
}

/// `[log]`: what is written down.
#[derive(Clone, Debug, PartialEq)]
pub struct LogConfig {
    /// Every so many steps.
    pub every: u64,
    /// Whether TensorBoard event files are written beside the JSON lines.
    pub tensorboard: bool,
}

/// `[guard]`: when a run is stopped because it learns nothing any more.
#[derive(Clone, Debug, PartialEq)]
pub struct GuardConfig {
    /// The loss, smoothed over about 20 steps, may be this far above its best; 0 only stops at NaN and
    /// infinity.
    pub divergence: f64,
}

impl Default for RunConfig {
    fn default() -> Self {
        Self { directory: "runs/default".to_owned(), steps: 1000, seed: 0, threads: 0 }
    }
}

impl Default for DataConfig {
    fn default() -> Self {
        Self {
            train: Vec::new(),
            validation: Vec::new(),
            validation_fraction: 0.05,
            tokenizer: String::new(),
            tokenizer_vocab_size: 4096,
            text_field: "text".to_owned(),
            separator: String::new(),
            cache: String::new(),
        }
    }
}

impl Default for ModelSection {
    fn default() -> Self {
        Self {
            architecture: Architecture::MatmulFree,
            vocab_size: 0,
            hidden_size: 1024,
            intermediate_size: 0,
            num_hidden_layers: 24,
            num_attention_heads: 0,
            rms_norm_eps: 1e-6,
            use_lower_bound: true,
            rope_theta: 10_000.0,
            initializer_range: 0.02,
            initial_checkpoint: String::new(),
        }
    }
}

impl Default for BatchConfig {
    fn default() -> Self {
        Self {
            sequence_length: 2048,
            sequences: 256,
            micro_batch: 8,
            reduction_groups: 8,
            recompute_activations: false,
            recompute_gates: 0,
        }
    }
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        Self {
            learning_rate: 4e-3,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.01,
            weight_decay_embeddings: 0.01,
            weight_decay_norms: 0.0,
            clip_grad_norm: 1.0,
        }
    }
}

impl Default for ScheduleConfig {
    fn default() -> Self {
        Self {
            kind: ScheduleKind::Cosine,
            warmup_steps: 0,
            final_fraction: 0.0,
            second_stage_at: 0.5,
            second_stage_learning_rate: 0.5,
            second_stage_weight_decay: 1.0,
        }
    }
}

impl Default for EvaluationConfig {
    fn default() -> Self {
        Self { every: 500, sequences: 64 }
    }
}

impl Default for CheckpointConfig {
    fn default() -> Self {
        Self { every: 500, keep: 2 }
    }
}

impl Default for LogConfig {
    fn default() -> Self {
        Self { every: 1, tensorboard: true }
    }
}

impl Default for GuardConfig {
    fn default() -> Self {
        Self { divergence: 2.0 }
    }
}

impl TrainConfig {
    /// Reads a file, and what overrides it.
    ///
    /// # Errors
    /// [`Error::Read`], or one [`Error::Config`] that names every unknown key, every value that does not
    /// fit and every contradiction, each with its line.
    pub fn load(path: &Path, overrides: &[Override]) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .map_err(|reason| Error::Read { file: path.display().to_string(), reason })?;
        Self::parse(&path.display().to_string(), &text, overrides)
    }

    /// As [`load`](Self::load), from text. `file` names it in errors.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub fn parse(file: &str, text: &str, overrides: &[Override]) -> Result<Self> {
        let parsed = parse::parse(text, overrides);
        let contradictions = check::contradictions(&parsed);
        let mut problems = parsed.problems;
        problems.extend(contradictions);
        if problems.is_empty() {
            return Ok(parsed.config);
        }
        problems.sort_by_key(|problem| problem.line);
        Err(Error::Config {
            file: file.to_owned(),
            problems: problems.iter().map(ToString::to_string).collect(),
        })
    }

    /// The whole configuration as TOML, every default written out.
    pub fn to_toml(&self) -> String {
        let mut text = String::new();
        let mut table = "";
        for field in fields() {
            let (section, key) = field.path.split_once('.').unwrap_or(("", field.path));
            if section != table {
                if !text.is_empty() {
                    text.push('\n');
                }
                text.push_str(&format!("[{section}]\n"));
                table = section;
            }
            text.push_str(&format!("{key} = {}\n", (field.show)(self)));
        }
        text
    }

    /// Keys that decide the result and differ, with both values: `(path, self's, other's)`.
    pub fn differences(&self, other: &Self) -> Vec<(&'static str, String, String)> {
        fields()
            .iter()
            .filter(|field| field.scope != Scope::Conduct)
            .map(|field| (field.path, (field.show)(self), (field.show)(other)))
            .filter(|(_, own, others)| own != others)
            .collect()
    }

    /// F, its default worked out.
    pub fn intermediate_size(&self) -> usize {
        match self.model.intermediate_size {
            0 => (self.model.hidden_size * 8 / 3).div_ceil(256) * 256,
            given => given,
        }
    }

    /// How many micro-batches one optimiser step adds up.
    pub fn micro_batches(&self) -> usize {
        self.batch.sequences / self.batch.micro_batch
    }

    /// Tokens of one optimiser step.
    pub fn tokens_per_step(&self) -> u64 {
        (self.batch.sequences * self.batch.sequence_length) as u64
    }

    /// The directory of the run.
    pub fn directory(&self) -> &Path {
        Path::new(&self.run.directory)
    }

    /// Where tokenizer and shards made from texts are kept.
    pub fn cache(&self) -> PathBuf {
        match self.data.cache.as_str() {
            "" => self.directory().join("data"),
            given => PathBuf::from(given),
        }
    }
}
