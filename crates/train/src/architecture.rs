//! Which model is trained: the MatMul-free one or its Transformer++ baseline.

use mmfree::checkpoint::layout::{self, TensorKind};
use mmfree::config::{ModelConfig, TransformerConfig};
use mmfree::error::{Error, Result};

use crate::parameters::{ParameterKind, ParameterLayout};

/// A model that can be trained, with its sizes.
#[derive(Clone, Debug, PartialEq)]
pub enum Architecture {
    /// Ternary weights and the MLGRU recurrence (`model_type` `hgrn_bit`).
    MatMulFree(ModelConfig),
    /// The baseline: full-precision weights and softmax attention (`model_type` `llama`).
    Transformer(TransformerConfig),
}

impl Architecture {
    /// Reads a `config.json`; `file` names it in errors.
    ///
    /// # Errors
    /// An unknown `model_type`, a configuration that is not supported.
    pub fn from_json(file: &str, json: &[u8]) -> Result<Self> {
        let model_type = serde_json::from_slice::<serde_json::Value>(json)
            .ok()
            .and_then(|config| Some(config.get("model_type")?.as_str()?.to_owned()));
        Ok(match model_type.as_deref() {
            Some("llama") => Self::Transformer(TransformerConfig::from_json(file, json)?),
            Some("hgrn_bit") | None => Self::MatMulFree(ModelConfig::from_json(file, json)?),
            Some(other) => {
                return Err(Error::Config {
                    file: file.to_owned(),
                    problems: vec![format!(
                        "model_type is {other:?}, expected \"hgrn_bit\" or \"llama\""
                    )],
                });
            }
        })
    }

    /// `model_type` of `config.json`.
    pub fn model_type(&self) -> &'static str {
        match self {
            Self::MatMulFree(_) => "hgrn_bit",
            Self::Transformer(_) => "llama",
        }
    }

    /// V.
    pub fn vocab_size(&self) -> usize {
        match self {
            Self::MatMulFree(config) => config.vocab_size,
            Self::Transformer(config) => config.vocab_size,
        }
    }

    /// L.
    pub fn layers(&self) -> usize {
        match self {
            Self::MatMulFree(config) => config.num_hidden_layers,
            Self::Transformer(config) => config.num_hidden_layers,
        }
    }

    /// Every parameter and its place in the flat buffer.
    pub fn layout(&self) -> ParameterLayout {
        match self {
            Self::MatMulFree(config) => {
                ParameterLayout::new(layout::expected_tensors(config).into_iter().map(|tensor| {
                    let kind = match tensor.kind {
                        TensorKind::Ternary => ParameterKind::Matrix,
                        TensorKind::Embeddings => ParameterKind::Embedding,
                        TensorKind::Norm => ParameterKind::Norm,
                        TensorKind::LowerBounds => ParameterKind::LowerBounds,
                    };
                    (tensor.name, tensor.shape, kind)
                }))
            }
            // Projections of one input follow each other, so that q, k, v and gate, up are each one matrix in the
            // flat buffer.
            Self::Transformer(config) => ParameterLayout::new(
                config.tensors().into_iter().enumerate().map(|(index, (name, shape))| {
                    let kind = match (index, shape.len()) {
                        (0, _) => ParameterKind::Embedding,
                        (_, 1) => ParameterKind::Norm,
                        _ => ParameterKind::Matrix,
                    };
                    (name, shape, kind)
                }),
            ),
        }
    }

    /// The `config.json` of a checkpoint, as the authors' and Hugging Face's code read it.
    pub fn to_json(&self) -> serde_json::Value {
        match self {
            Self::MatMulFree(config) => config.to_json(),
            Self::Transformer(config) => config.to_json(),
        }
    }

    /// What makes this model's weights mean something else in another one: keys of `config.json`, with this one's
    /// value and the other's. Special tokens and the longest context may differ.
    pub fn differences(&self, other: &Self) -> Vec<String> {
        const MAY_DIFFER: [&str; 3] = ["bos_token_id", "eos_token_id", "max_position_embeddings"];
        let (these, others) = (self.to_json(), other.to_json());
        let shown = |key: &str| format!("{key}: {}, {}", these[key], others[key]);
        if self.model_type() != other.model_type() {
            return vec![shown("model_type")];
        }
        let keys = these.as_object().into_iter().flat_map(serde_json::Map::keys);
        keys.filter(|key| !MAY_DIFFER.contains(&key.as_str()) && these[*key] != others[*key])
            .map(|key| shown(key))
            .collect()
    }
}
