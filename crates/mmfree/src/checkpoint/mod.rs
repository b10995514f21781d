//! Checkpoints: Hugging Face directories and packed GGUF files, in and out.
//!
//! | module | holds |
//! |---|---|
//! | `hugging_face`, `safetensors` | directories with `config.json` and safetensors, full precision |
//! | `packed`, `gguf` | single files with ternary weights, metadata and tokenizer |
//! | `full_precision`, `llama` | tensors of any architecture for training and judging; the Transformer++ in GGUF |
//! | `layout` | names and shapes of a model's tensors |
//! | [`pack()`], [`info`] | writing a packed file, describing a checkpoint |
//!
//! Opening maps the files, reads headers and compares every tensor with the configuration; weights are
//! read when a method asks for them. `docs/checkpoint-format.md` has the byte layout.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mmfree_kernels::memory::Bytes;
use mmfree_kernels::ternary::tq::{BLOCK_TRITS, TqFormat};

use crate::config::ModelConfig;
use crate::error::{Error, Result};

mod embeddings;
mod float;
mod full_precision;
mod gguf;
#[cfg(feature = "hub")]
mod hub;
mod hugging_face;
pub mod info;
pub mod layout;
mod llama;
mod pack;
mod packed;
pub mod safetensors;
mod tensors;
mod tokenizer;

pub use embeddings::EmbeddingTable;
pub use float::FloatType;
pub use full_precision::FullPrecision;
pub use hugging_face::write_full_precision;
pub use llama::pack_transformer;
pub use pack::{EmbeddingStorage, PackOptions, pack};
pub use tokenizer::{TokenizerKind, TokenizerSource};

/// A checkpoint on disk or in the program: its configuration, and weights that are read on demand.
///
/// It can be shared by threads that load different tensors.
#[derive(Debug)]
pub struct Checkpoint {
    label: String,
    config: ModelConfig,
    container: Container,
    /// By the name in the file.
    tensors: BTreeMap<String, StoredTensor>,
    tokenizer: tokenizer::TokenizerFiles,
}

/// What the tensors came in.
#[derive(Debug)]
enum Container {
    /// A directory: its files by name, those that belong to the checkpoint.
    HuggingFace { files: Vec<(String, Bytes)>, directory: Option<PathBuf> },
    /// A packed file.
    Gguf { bytes: Bytes, path: Option<PathBuf> },
}

/// A tensor as a file stores it.
#[derive(Clone, Debug)]
struct StoredTensor {
    encoding: Encoding,
    /// As stored, outermost dimension first: rows of a packed tensor are padded to whole blocks.
    shape: Vec<usize>,
    data: FileSlice,
}

/// A part of a mapped file.
#[derive(Clone, Debug)]
struct FileSlice {
    /// Name of the file, for messages.
    file: Arc<str>,
    bytes: Bytes,
    range: Range<usize>,
}

impl FileSlice {
    fn whole(file: &str, bytes: Bytes) -> Self {
        let range = 0..bytes.len();
        Self { file: file.into(), bytes, range }
    }

    fn get(&self) -> &[u8] {
        &self.bytes[self.range.clone()]
    }

    /// Lets the pages go that hold this part.
    fn release(&self) {
        self.bytes.release(self.range.clone());
    }
}

/// How values of a tensor are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Encoding {
    Float(FloatType),
    Ternary(TqFormat),
}

impl Encoding {
    fn ggml_type(self) -> u32 {
        match self {
            Self::Float(float) => float.ggml_type(),
            Self::Ternary(format) => format.ggml_type(),
        }
    }

    fn from_ggml_type(number: u32) -> Option<Self> {
        let float = FloatType::from_ggml_type(number).map(Self::Float);
        float.or_else(|| TqFormat::from_ggml_type(number).map(Self::Ternary))
    }

    fn name(self) -> &'static str {
        match self {
            Self::Float(float) => float.name(),
            Self::Ternary(TqFormat::Tq1_0) => "TQ1_0",
            Self::Ternary(TqFormat::Tq2_0) => "TQ2_0",
        }
    }

    /// Bytes of a tensor; `None` on overflow, or if rows are not whole blocks.
    fn tensor_bytes(self, shape: &[usize]) -> Option<usize> {
        let (&cols, outer) = shape.split_last()?;
        let row_bytes = match self {
            Self::Float(float) => cols.checked_mul(float.bytes()),
            Self::Ternary(format) if cols % BLOCK_TRITS == 0 => format.row_bytes(cols),
            Self::Ternary(_) => None,
        };
        outer.iter().try_fold(row_bytes?, |bytes, &size| bytes.checked_mul(size))
    }
}

impl Checkpoint {
    /// Opens a Hugging Face directory or a packed file. If nothing has the name and the feature `hub`
    /// is on, `owner/name` is fetched from the Hugging Face hub (or found in its cache).
    ///
    /// # Errors
    /// [`Error::NoModel`] if there is nothing to open; errors of reading; a file that is malformed or
    /// truncated; a configuration that is not supported; tensors that do not fit it, all of them in
    /// one error.
    pub fn open(model: impl AsRef<Path>) -> Result<Self> {
        let model = model.as_ref();
        let path = &locate(model)?;
        let label = path.display().to_string();
        if path.is_dir() {
            return hugging_face::open_directory(&label, path);
        }
        let bytes =
            Bytes::map(path).map_err(|reason| Error::Read { file: label.clone(), reason })?;
        if !bytes.starts_with(&gguf::MAGIC) && path.extension().is_some_and(|e| e == "safetensors")
        {
            let reason = "this file has weights but no configuration; name the directory that holds \
                          it and config.json";
            return Err(Error::NoModel { model: label, reason: reason.to_owned() });
        }
        packed::open(&label, bytes, Some(path.clone()))
    }

    /// Opens a packed file that is part of the program.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn from_static_gguf(bytes: &'static [u8]) -> Result<Self> {
        packed::open("packed model in memory", Bytes::from_static(bytes), None)
    }

    /// Opens the files of a Hugging Face directory, by name, from memory.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn from_static_files(files: &[(&str, &'static [u8])]) -> Result<Self> {
        hugging_face::open("files in memory", None, &|name| {
            let found = files.iter().find(|(file, _)| *file == name);
            Ok(found.map(|(_, bytes)| Bytes::from_static(bytes)))
        })
    }

    /// The configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Where the checkpoint came from: its path.
    pub fn label(&self) -> &str {
        &self.label
    }

    /// Whether this is a packed file, whose full-precision weights are gone.
    pub fn is_packed(&self) -> bool {
        matches!(self.container, Container::Gguf { .. })
    }

    /// The tokenizer, if the checkpoint has one. Reads and copies it: call once.
    ///
    /// # Errors
    /// Text that is not UTF-8, or a tokenizer configuration that is not JSON.
    pub fn tokenizer(&self) -> Result<Option<TokenizerSource>> {
        self.tokenizer.read()
    }

    /// Writes the checkpoint as a Hugging Face directory: every file that belongs to it (configuration,
    /// weights in the same shards, tokenizer), bit for bit. The directory appears complete or not at all.
    ///
    /// # Errors
    /// A packed checkpoint, which has no full-precision weights; a directory that exists and is not
    /// empty; errors of writing.
    pub fn write_hugging_face(&self, directory: &Path) -> Result<()> {
        hugging_face::write(self, directory)
    }
}

/// The path that a name stands for.
fn locate(model: &Path) -> Result<PathBuf> {
    if model.exists() {
        return Ok(model.to_owned());
    }
    let name = model.display().to_string();
    if !is_repository_id(&name) {
        let reason = "no such file or directory (and it is not a Hugging Face repository id, \
                      owner/name)";
        return Err(Error::NoModel { model: name, reason: reason.to_owned() });
    }
    #[cfg(feature = "hub")]
    return hub::fetch(&name).map_err(|why| Error::NoModel {
        reason: format!(
            "no such file or directory, and the Hugging Face repository of that name could not be \
             fetched: {why}"
        ),
        model: name,
    });
    #[cfg(not(feature = "hub"))]
    Err(Error::NoModel {
        model: name,
        reason:
            "no such file or directory; fetching it as a Hugging Face repository needs a build \
                 with the feature `hub`"
                .to_owned(),
    })
}

/// Whether a name can be `owner/name` of the hub and is not clearly a file.
fn is_repository_id(name: &str) -> bool {
    let is_part = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    let is_file = [".gguf", ".safetensors", ".json"].iter().any(|end| name.ends_with(end));
    !is_file && name.split_once('/').is_some_and(|(owner, name)| is_part(owner) && is_part(name))
}
