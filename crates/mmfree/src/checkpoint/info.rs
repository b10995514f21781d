//! Describes a checkpoint.

use serde::Serialize;

use super::layout::{TensorKind, expected_tensors};
use super::packed::scale_name;
use super::{Checkpoint, Container, TokenizerKind};
use crate::config::{ModelConfig, ParameterCounts};
use crate::error::Result;

/// What a checkpoint holds.
#[derive(Clone, Debug, Serialize)]
pub struct ModelInfo {
    /// Where it came from.
    pub source: String,
    /// `gguf` or `hugging-face`.
    pub container: &'static str,
    /// The configuration.
    pub config: ModelConfig,
    /// `tokenizer.json`, `sentencepiece`, or nothing.
    pub tokenizer: Option<&'static str>,
    /// Whether there is a template for conversations.
    pub chat_template: bool,
    /// Parameters by kind.
    pub parameters: ParameterCounts,
    /// Stored bytes by kind.
    pub bytes: ByteCounts,
    /// Stored bits for one weight of a BitLinear layer, scales and padding included.
    pub bits_per_ternary_weight: f64,
    /// Stored bits of all tensors for one parameter.
    pub bits_per_parameter: f64,
    /// Share of the ternary weights that are zero once quantised, from 0 to 1.
    pub zero_share: f64,
    /// Every tensor, in the order of a forward pass.
    pub tensors: Vec<TensorInfo>,
}

/// Stored bytes, by kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ByteCounts {
    /// Weights of BitLinear layers with their scales.
    pub ternary: usize,
    /// The embedding table.
    pub embeddings: usize,
    /// Weights of every RMSNorm.
    pub norms: usize,
    /// Lower bounds.
    pub lower_bounds: usize,
    /// Headers, metadata, tokenizer, alignment: everything that is no tensor.
    pub other: usize,
    /// Size of the file, or of all files of a directory.
    pub total: usize,
}

/// A tensor.
#[derive(Clone, Debug, Serialize)]
pub struct TensorInfo {
    /// Its name.
    pub name: String,
    /// Logical shape, outermost dimension first.
    pub shape: Vec<usize>,
    /// How it is stored: `F32`, `F16`, `BF16`, `TQ1_0`, `TQ2_0`.
    pub stored_as: &'static str,
    /// Stored bytes.
    pub bytes: usize,
    /// γ of a ternary tensor.
    pub scale: Option<f32>,
    /// Share of the trits that are zero, from 0 to 1, of a ternary tensor.
    pub zero_share: Option<f64>,
}

/// Describes a checkpoint. Reads every ternary weight once or twice; `progress(done, total)` is called
/// with weights.
///
/// # Errors
/// Weights that are NaN or infinite, invalid codes, a tokenizer that is not text.
pub fn describe(checkpoint: &Checkpoint, progress: &mut dyn FnMut(u64, u64)) -> Result<ModelInfo> {
    let config = checkpoint.config().clone();
    let parameters = config.parameters();
    let mut bytes = ByteCounts { total: total_bytes(checkpoint), ..ByteCounts::default() };
    let mut tensors = Vec::new();
    let (mut zeros, mut done) = (0, 0);
    for spec in expected_tensors(&config) {
        let stored = &checkpoint.tensors[&spec.name];
        let mut info = TensorInfo {
            name: spec.name.clone(),
            shape: spec.shape.clone(),
            stored_as: stored.encoding.name(),
            bytes: stored.data.range.len(),
            scale: None,
            zero_share: None,
        };
        if spec.kind == TensorKind::Ternary {
            let name = spec.name.strip_suffix(".weight").unwrap_or(&spec.name);
            let (rows, cols) = (spec.shape[0], spec.shape[1]);
            let scale = checkpoint.ternary_scale(name, rows, cols)?;
            let mut source = checkpoint.trit_rows(name, rows, cols, scale)?;
            let mut trits = vec![0; cols];
            let mut count = 0;
            for row in 0..rows {
                source.read(row, &mut trits).map_err(|error| source.error(name, error))?;
                count += trits.iter().filter(|&&trit| trit == 0).count();
                done += cols as u64;
                progress(done, parameters.ternary as u64);
            }
            info.scale = Some(scale);
            info.zero_share = Some(count as f64 / spec.elements() as f64);
            zeros += count;
            let stored_scale = checkpoint.tensors.get(&scale_name(&spec.name));
            bytes.ternary += stored_scale.map_or(0, |scale| scale.data.range.len());
        }
        *match spec.kind {
            TensorKind::Ternary => &mut bytes.ternary,
            TensorKind::Embeddings => &mut bytes.embeddings,
            TensorKind::Norm => &mut bytes.norms,
            TensorKind::LowerBounds => &mut bytes.lower_bounds,
        } += info.bytes;
        tensors.push(info);
    }
    let stored = bytes.ternary + bytes.embeddings + bytes.norms + bytes.lower_bounds;
    bytes.other = bytes.total.saturating_sub(stored);
    let tokenizer = checkpoint.tokenizer()?;
    Ok(ModelInfo {
        source: checkpoint.label().to_owned(),
        container: if checkpoint.is_packed() { "gguf" } else { "hugging-face" },
        tokenizer: tokenizer.as_ref().map(|source| match source.kind {
            TokenizerKind::HuggingFace(_) => "tokenizer.json",
            TokenizerKind::SentencePiece(_) => "sentencepiece",
        }),
        chat_template: tokenizer.is_some_and(|source| source.chat_template.is_some()),
        bits_per_ternary_weight: bytes.ternary as f64 * 8.0 / parameters.ternary as f64,
        bits_per_parameter: stored as f64 * 8.0 / parameters.total as f64,
        zero_share: zeros as f64 / parameters.ternary as f64,
        config,
        parameters,
        bytes,
        tensors,
    })
}

fn total_bytes(checkpoint: &Checkpoint) -> usize {
    match &checkpoint.container {
        Container::Gguf { bytes, .. } => bytes.len(),
        Container::HuggingFace { files, .. } => files.iter().map(|(_, bytes)| bytes.len()).sum(),
    }
}
