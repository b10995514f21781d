//! What a run trains on: token shards, made from raw text at first use.

use std::path::PathBuf;
use std::sync::Arc;

use mmfree::checkpoint::{TokenizerKind, TokenizerSource};
use mmfree::config::{ModelConfig, TransformerConfig};

use super::prepare::named_tokenizer;
use crate::architecture::Architecture;
use crate::backend::IGNORED;
use crate::config::{self, TrainConfig};
use crate::data::{Batch, Dataset, Loader, LoaderOptions, Order, Part};
use crate::error::{Error, Result};

/// Token shards of a run and the tokenizer that made them.
#[derive(Debug)]
pub struct Corpus {
    train: Loader,
    validation: Option<Loader>,
    /// Sequences that are evaluated at a time, and in all.
    micro_batch: usize,
    evaluated: usize,
    dataset: Arc<Dataset>,
    tokenizer: TokenizerSource,
}

impl Corpus {
    /// Opens the shards that [`prepare`](super::prepare) has named.
    ///
    /// # Errors
    /// Shards that are missing, damaged or of different tokenizers; too little text.
    pub fn open(config: &TrainConfig, train: &[PathBuf], validation: &[PathBuf]) -> Result<Self> {
        let (data, batch) = (&config.data, &config.batch);
        let dataset = Arc::new(Dataset::open(train)?);
        let tokenizer = dataset.tokenizer_source()?;
        if let Some(named) = named_tokenizer(config)? {
            dataset.require_tokenizer(&data.tokenizer, &named)?;
        }
        let held_out = if validation.is_empty() { data.validation_fraction } else { 0.0 };
        let options = LoaderOptions {
            seq_len: batch.sequence_length,
            batch_size: batch.sequences,
            part: if held_out > 0.0 { Part::Training { held_out } } else { Part::All },
            order: Order::Epochs { seed: config.run.seed },
        };
        let loader = Loader::new(dataset.clone(), options)?;
        let evaluation =
            LoaderOptions { batch_size: batch.micro_batch, order: Order::Once, ..options };
        let validation = if config.evaluation.every == 0 {
            None
        } else if validation.is_empty() {
            let part = Part::HeldOut { held_out };
            Some(Loader::new(dataset.clone(), LoaderOptions { part, ..evaluation })?)
        } else {
            let held_out = Arc::new(Dataset::open(validation)?);
            let label = dataset.tokenizer_path().display().to_string();
            held_out.require_tokenizer(&label, &tokenizer)?;
            Some(Loader::new(held_out, LoaderOptions { part: Part::All, ..evaluation })?)
        };
        Ok(Self {
            train: loader,
            validation,
            micro_batch: batch.micro_batch,
            evaluated: config.evaluation.sequences,
            dataset,
            tokenizer,
        })
    }

    /// Batches to train on.
    pub fn train(&self) -> &Loader {
        &self.train
    }

    /// Batches of one evaluation; 0 if nothing is held out.
    pub fn evaluation_batches(&self) -> usize {
        let Some(loader) = &self.validation else { return 0 };
        let sequences = (self.evaluated as u64).min(loader.sequences()) as usize;
        sequences.div_ceil(self.micro_batch)
    }

    /// A batch of the evaluation, filled up to its full shape with sequences that do not count, and the
    /// number of sequences that do.
    ///
    /// # Errors
    /// A shard that turns out to be corrupt.
    pub fn evaluation_batch(&self, index: usize) -> Result<(Batch, usize)> {
        let loader = self.validation.as_ref().ok_or_else(|| {
            Error::Invalid("nothing is held out: there is nothing to evaluate".to_owned())
        })?;
        let step = index as u64;
        let left = self.evaluated.saturating_sub(index * self.micro_batch);
        let rows = loader.batch_rows(step).min(left);
        let mut batch = loader.rows(step, 0..rows)?;
        let full = self.micro_batch * batch.seq_len;
        batch.ids.resize(full, 0);
        batch.targets.resize(full, IGNORED);
        Ok((batch, rows))
    }

    /// What the tokens are, for checkpoints: sizes, checksum of all shards, and the hash of the tokenizer.
    pub fn fingerprint(&self) -> String {
        let (dataset, tokenizer) = (&self.dataset, self.dataset.tokenizer());
        format!(
            "{} tokens in {} documents, checksum {:016x}, tokenizer {}",
            dataset.tokens(),
            dataset.documents(),
            dataset.checksum(),
            tokenizer.sha256
        )
    }

    /// V of the tokenizer.
    pub fn vocab_size(&self) -> usize {
        self.dataset.vocab_size()
    }

    /// The model that a configuration asks for, with the tokenizer's vocabulary and special tokens.
    ///
    /// # Errors
    /// A vocabulary smaller than the tokenizer's, sizes that are no model.
    pub fn architecture(&self, config: &TrainConfig) -> Result<Architecture> {
        let model = &config.model;
        let vocab_size = match model.vocab_size {
            0 => self.vocab_size(),
            given if given >= self.vocab_size() => given,
            given => {
                return Err(Error::Invalid(format!(
                    "model.vocab_size is {given}, but the tokenizer has {} tokens; raise it, or set it to \
                     0 to take the tokenizer's",
                    self.vocab_size()
                )));
            }
        };
        let special = self.dataset.tokenizer();
        let (bos_token_id, eos_token_ids) = (special.bos, special.eos.into_iter().collect());
        let (hidden_size, intermediate_size) = (model.hidden_size, config.intermediate_size());
        let num_hidden_layers = model.num_hidden_layers;
        let rms_norm_eps = model.rms_norm_eps as f32;
        let (architecture, problems) = match model.architecture {
            config::Architecture::MatmulFree => {
                let config = ModelConfig {
                    vocab_size,
                    hidden_size,
                    intermediate_size,
                    num_hidden_layers,
                    rms_norm_eps,
                    use_lower_bound: model.use_lower_bound,
                    bos_token_id,
                    eos_token_ids,
                };
                let problems = config.problems();
                (Architecture::MatMulFree(config), problems)
            }
            config::Architecture::TransformerPlusPlus => {
                let config = TransformerConfig {
                    vocab_size,
                    hidden_size,
                    intermediate_size,
                    num_hidden_layers,
                    num_attention_heads: model.num_attention_heads,
                    rms_norm_eps,
                    rope_theta: model.rope_theta as f32,
                    max_position_embeddings: config.batch.sequence_length,
                    bos_token_id,
                    eos_token_ids,
                };
                let problems = config.problems();
                (Architecture::Transformer(config), problems)
            }
        };
        if problems.is_empty() {
            return Ok(architecture);
        }
        Err(Error::Config { file: "[model]".to_owned(), problems })
    }

    /// The tokenizer's files, as a Hugging Face directory has them.
    pub fn tokenizer_files(&self) -> Vec<(String, Vec<u8>)> {
        let mut files = Vec::new();
        match &self.tokenizer.kind {
            TokenizerKind::HuggingFace(bytes) => {
                files.push(("tokenizer.json".to_owned(), bytes.clone()));
            }
            TokenizerKind::SentencePiece(bytes) => {
                files.push(("tokenizer.model".to_owned(), bytes.clone()));
            }
        }
        if let Some(config) = &self.tokenizer.tokenizer_config {
            files.push(("tokenizer_config.json".to_owned(), format!("{config:#}\n").into_bytes()));
        }
        if let Some(template) = &self.tokenizer.chat_template {
            files.push(("chat_template.jinja".to_owned(), template.clone().into_bytes()));
        }
        files
    }
}
