//! Packed models in GGUF files: what their metadata and tensors mean.

use std::collections::BTreeMap;
use std::path::PathBuf;

use mmfree_kernels::memory::Bytes;
use mmfree_kernels::ternary::tq::BLOCK_TRITS;

use super::gguf::kind;
use super::gguf::read::{self, Header, Value};
use super::gguf::write::HeaderWriter;
use super::layout::{TensorKind, expected_tensors};
use super::tokenizer::TokenizerFiles;
use super::{Checkpoint, Container, Encoding, FileSlice, FloatType, StoredTensor};
use crate::config::ModelConfig;
use crate::error::{Error, Result, TensorProblem};

/// Value of `general.architecture`.
pub(super) const ARCHITECTURE: &str = "hgrn_bit";

/// Metadata keys.
pub(super) mod key {
    pub const ARCHITECTURE: &str = "general.architecture";
    pub const NAME: &str = "general.name";
    pub const FILE_TYPE: &str = "general.file_type";
    pub const QUANTIZATION_VERSION: &str = "general.quantization_version";
    pub const VOCAB_SIZE: &str = "hgrn_bit.vocab_size";
    pub const HIDDEN_SIZE: &str = "hgrn_bit.embedding_length";
    pub const INTERMEDIATE_SIZE: &str = "hgrn_bit.feed_forward_length";
    pub const LAYERS: &str = "hgrn_bit.block_count";
    pub const RMS_NORM_EPS: &str = "hgrn_bit.attention.layer_norm_rms_epsilon";
    pub const USE_LOWER_BOUND: &str = "hgrn_bit.use_lower_bound";
    pub const BOS: &str = "tokenizer.ggml.bos_token_id";
    pub const EOS: &str = "tokenizer.ggml.eos_token_id";
    pub const EOS_IDS: &str = "tokenizer.ggml.eos_token_ids";
    pub const TOKENIZER_JSON: &str = "tokenizer.huggingface.json";
    pub const TOKENIZER_CONFIG: &str = "tokenizer.huggingface.config";
    pub const SENTENCE_PIECE: &str = "tokenizer.sentencepiece.model";
    pub const CHAT_TEMPLATE: &str = "tokenizer.chat_template";
}

/// Opens a packed model.
pub(super) fn open(label: &str, bytes: Bytes, path: Option<PathBuf>) -> Result<Checkpoint> {
    let header = read::parse(label, &bytes)?;
    let slice = FileSlice::whole(label, bytes.clone());
    let metadata = Metadata { header: &header, file: &slice };
    let config = metadata.config()?;
    let tokenizer = metadata.tokenizer()?;
    let tensors = header
        .tensors
        .into_iter()
        .map(|info| {
            let data = FileSlice { range: info.range, ..slice.clone() };
            (info.name, StoredTensor { encoding: info.encoding, shape: info.shape, data })
        })
        .collect();
    check_tensors(label, demands(&config), &tensors)?;
    let container = Container::Gguf { bytes, path };
    Ok(Checkpoint { label: label.to_owned(), config, container, tensors, tokenizer })
}

/// The tokenizer of a file of any architecture.
pub(super) fn tokenizer(label: &str, bytes: Bytes) -> Result<TokenizerFiles> {
    let header = read::parse(label, &bytes)?;
    let slice = FileSlice::whole(label, bytes);
    Metadata { header: &header, file: &slice }.tokenizer()
}

/// Types that a tensor may be stored in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Demand {
    /// Any floating-point type.
    Float,
    /// F32, where nothing is gained by less.
    F32,
    /// A ternary block format.
    Ternary,
}

impl Demand {
    fn accepts(self, encoding: Encoding) -> bool {
        match self {
            Self::Float => matches!(encoding, Encoding::Float(_)),
            Self::F32 => encoding == Encoding::Float(FloatType::F32),
            Self::Ternary => matches!(encoding, Encoding::Ternary(_)),
        }
    }

    fn names(self) -> &'static str {
        match self {
            Self::Float => "F32, F16 or BF16",
            Self::F32 => "F32",
            Self::Ternary => "TQ1_0 or TQ2_0",
        }
    }
}

/// Shape in a file: rows of ternary blocks are padded to whole blocks.
pub(super) fn stored_shape(encoding: Encoding, shape: &[usize]) -> Vec<usize> {
    let mut stored = shape.to_vec();
    if let (Encoding::Ternary(_), Some(cols)) = (encoding, stored.last_mut()) {
        *cols = cols.next_multiple_of(BLOCK_TRITS);
    }
    stored
}

/// Names, logical shapes and types of the tensors of a packed model.
fn demands(config: &ModelConfig) -> impl Iterator<Item = (String, Vec<usize>, Demand)> {
    expected_tensors(config).into_iter().flat_map(|spec| {
        let demand = match spec.kind {
            TensorKind::Ternary => Demand::Ternary,
            TensorKind::Embeddings => Demand::Float,
            TensorKind::Norm | TensorKind::LowerBounds => Demand::F32,
        };
        let scale = (spec.kind == TensorKind::Ternary)
            .then(|| (scale_name(&spec.name), vec![1], Demand::F32));
        std::iter::once((spec.name, spec.shape, demand)).chain(scale)
    })
}

/// Name of the tensor that holds γ of a weight.
pub(super) fn scale_name(weight: &str) -> String {
    format!("{}.scale", weight.strip_suffix(".weight").unwrap_or(weight))
}

/// Compares tensors with what the configuration demands and reports every difference at once.
pub(super) fn check_tensors(
    label: &str,
    demands: impl Iterator<Item = (String, Vec<usize>, Demand)>,
    tensors: &BTreeMap<String, StoredTensor>,
) -> Result<()> {
    let mut problems = Vec::new();
    let mut known = std::collections::BTreeSet::new();
    for (name, shape, demand) in demands {
        match tensors.get(&name) {
            None => problems.push(TensorProblem::Missing { tensor: name.clone() }),
            Some(stored) if !demand.accepts(stored.encoding) => {
                problems.push(TensorProblem::Type {
                    tensor: name.clone(),
                    expected: demand.names(),
                    found: stored.encoding.name().to_owned(),
                });
            }
            Some(stored) => {
                let expected = stored_shape(stored.encoding, &shape);
                if stored.shape != expected {
                    let found = stored.shape.clone();
                    problems.push(TensorProblem::Shape { tensor: name.clone(), expected, found });
                }
            }
        }
        known.insert(name);
    }
    let unexpected = tensors.keys().filter(|name| !known.contains(*name));
    problems.extend(unexpected.map(|name| TensorProblem::Unexpected { tensor: name.clone() }));
    if problems.is_empty() {
        Ok(())
    } else {
        Err(Error::Tensors { file: label.to_owned(), problems })
    }
}

/// Typed access to metadata.
pub(super) struct Metadata<'a> {
    pub header: &'a Header,
    pub file: &'a FileSlice,
}

impl Metadata<'_> {
    fn config(&self) -> Result<ModelConfig> {
        let mut problems = Vec::new();
        self.expect_architecture(ARCHITECTURE, &mut problems)?;
        let config = ModelConfig {
            vocab_size: self.size(key::VOCAB_SIZE, &mut problems),
            hidden_size: self.size(key::HIDDEN_SIZE, &mut problems),
            intermediate_size: self.size(key::INTERMEDIATE_SIZE, &mut problems),
            num_hidden_layers: self.size(key::LAYERS, &mut problems),
            rms_norm_eps: self.float(key::RMS_NORM_EPS, None, &mut problems),
            use_lower_bound: match self.header.metadata.get(key::USE_LOWER_BOUND) {
                Some(&Value::Bool(on)) => on,
                other => problem(key::USE_LOWER_BOUND, "a bool", other, &mut problems)
                    .unwrap_or_default(),
            },
            bos_token_id: self.token_id(key::BOS, &mut problems),
            eos_token_ids: self.eos_token_ids(&mut problems),
        };
        if problems.is_empty() {
            problems = config.problems();
        }
        if problems.is_empty() {
            Ok(config)
        } else {
            Err(Error::Config { file: self.file.file.to_string(), problems })
        }
    }

    fn tokenizer(&self) -> Result<TokenizerFiles> {
        Ok(TokenizerFiles {
            hugging_face: self.text(key::TOKENIZER_JSON)?,
            sentence_piece: self.byte_array(key::SENTENCE_PIECE)?,
            config: self.text(key::TOKENIZER_CONFIG)?,
            chat_template: self.text(key::CHAT_TEMPLATE)?,
        })
    }

    pub fn expect_architecture(&self, expected: &str, problems: &mut Vec<String>) -> Result<()> {
        let architecture = self.text(key::ARCHITECTURE)?;
        let name = architecture.as_ref().map_or(&b""[..], FileSlice::get);
        if name != expected.as_bytes() {
            problems.push(format!(
                "{} is {:?}, expected {expected:?}",
                key::ARCHITECTURE,
                String::from_utf8_lossy(&name[..name.len().min(60)])
            ));
        }
        Ok(())
    }

    pub fn float(&self, key: &str, default: Option<f32>, problems: &mut Vec<String>) -> f32 {
        match (self.header.metadata.get(key), default) {
            (Some(&Value::Float(value)), _) => value,
            (None, Some(default)) => default,
            (other, _) => problem(key, "a float", other, problems).unwrap_or(1.0),
        }
    }

    pub fn size(&self, key: &str, problems: &mut Vec<String>) -> usize {
        match self.header.metadata.get(key) {
            Some(&Value::Unsigned(size)) => usize::try_from(size).unwrap_or(usize::MAX),
            other => problem(key, "an unsigned integer", other, problems).unwrap_or_default(),
        }
    }

    pub fn token_id(&self, key: &str, problems: &mut Vec<String>) -> Option<u32> {
        match self.header.metadata.get(key) {
            None => None,
            Some(&Value::Unsigned(id)) if id <= u32::MAX.into() => Some(id as u32),
            other => problem(key, "a token id", other, problems),
        }
    }

    /// The list where there is one, else the single id.
    pub fn eos_token_ids(&self, problems: &mut Vec<String>) -> Vec<u32> {
        let single = self.token_id(key::EOS, problems);
        match self.header.metadata.get(key::EOS_IDS) {
            None => single.into_iter().collect(),
            Some(Value::Array(kind::U32, range)) => {
                let (words, _) = self.file.bytes[range.clone()].as_chunks();
                words.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect()
            }
            other => problem(key::EOS_IDS, "an array of u32", other, problems).unwrap_or_default(),
        }
    }

    pub fn text(&self, key: &str) -> Result<Option<FileSlice>> {
        match self.header.metadata.get(key) {
            None => Ok(None),
            Some(Value::Text(range)) => {
                Ok(Some(FileSlice { range: range.clone(), ..self.file.clone() }))
            }
            Some(_) => Err(self.malformed(format!("{key} is not a string"))),
        }
    }

    fn byte_array(&self, key: &str) -> Result<Option<FileSlice>> {
        match self.header.metadata.get(key) {
            None => Ok(None),
            Some(Value::Array(kind::U8, range)) => {
                Ok(Some(FileSlice { range: range.clone(), ..self.file.clone() }))
            }
            Some(_) => Err(self.malformed(format!("{key} is not an array of u8"))),
        }
    }

    fn malformed(&self, what: String) -> Error {
        Error::Malformed { file: self.file.file.to_string(), what }
    }
}

/// Notes that a value is not what it should be.
fn problem<T>(
    key: &str,
    expected: &str,
    found: Option<&Value>,
    problems: &mut Vec<String>,
) -> Option<T> {
    let found = found.map_or_else(|| "missing".to_owned(), |value| format!("{value:?}"));
    problems.push(format!("{key} is {found}, expected {expected}"));
    None
}

/// Writes the configuration.
pub(super) fn put_config(header: &mut HeaderWriter, config: &ModelConfig) {
    header.u32(key::VOCAB_SIZE, config.vocab_size as u32);
    header.u32(key::HIDDEN_SIZE, config.hidden_size as u32);
    header.u32(key::INTERMEDIATE_SIZE, config.intermediate_size as u32);
    header.u32(key::LAYERS, config.num_hidden_layers as u32);
    header.f32(key::RMS_NORM_EPS, config.rms_norm_eps);
    header.bool(key::USE_LOWER_BOUND, config.use_lower_bound);
    put_token_ids(header, config.bos_token_id, &config.eos_token_ids);
}

/// Writes the tokens that begin and end a text.
pub(super) fn put_token_ids(header: &mut HeaderWriter, bos: Option<u32>, eos: &[u32]) {
    if let Some(id) = bos {
        header.u32(key::BOS, id);
    }
    if let Some(&first) = eos.first() {
        header.u32(key::EOS, first);
    }
    if eos.len() > 1 {
        header.u32_array(key::EOS_IDS, eos);
    }
}
