//! The tokenizer that comes with a checkpoint.

use std::path::Path;

use mmfree_kernels::memory::Bytes;
use serde_json::Value;

use super::gguf::write::HeaderWriter;
use super::hugging_face::{self, CHAT_TEMPLATE, TOKENIZER_CONFIG, TOKENIZER_JSON, TOKENIZER_MODEL};
use super::packed::{self, key};
use super::{FileSlice, gguf};
use crate::error::{Error, Result};

/// Everything that a checkpoint says about turning text into tokens and back.
#[derive(Clone, Debug)]
pub struct TokenizerSource {
    /// The vocabulary and its algorithm.
    pub kind: TokenizerKind,
    /// `tokenizer_config.json`.
    pub tokenizer_config: Option<Value>,
    /// Jinja template that turns a conversation into text.
    pub chat_template: Option<String>,
}

impl TokenizerSource {
    /// Reads a tokenizer: a `tokenizer.json` or SentencePiece file (of any name, with
    /// `tokenizer_config.json` and the chat template beside it if they are there), a directory that holds
    /// one, or a packed model.
    ///
    /// # Errors
    /// Nothing of the kind, or files that are malformed.
    pub fn open(path: &Path) -> Result<Self> {
        TokenizerFiles::open(path)?.read()?.ok_or_else(|| {
            let missing = if path.is_dir() {
                "there is neither tokenizer.json nor tokenizer.model"
            } else {
                "this model has no tokenizer"
            };
            Error::Tokenizer(format!("{}: {missing}", path.display()))
        })
    }
}

/// A serialised tokenizer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TokenizerKind {
    /// `tokenizer.json` of the `tokenizers` library.
    HuggingFace(Vec<u8>),
    /// `tokenizer.model` of SentencePiece.
    SentencePiece(Vec<u8>),
}

/// Where the parts of a tokenizer lie.
#[derive(Clone, Debug, Default)]
pub(super) struct TokenizerFiles {
    pub hugging_face: Option<FileSlice>,
    pub sentence_piece: Option<FileSlice>,
    pub config: Option<FileSlice>,
    /// A template of its own, which wins over one inside `config`.
    pub chat_template: Option<FileSlice>,
}

impl TokenizerFiles {
    /// Finds the files that [`TokenizerSource::open`] reads. None of them may be there.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let label = path.display().to_string();
        let bytes = if path.is_dir() {
            None
        } else {
            let read = Bytes::map(path);
            Some(read.map_err(|reason| Error::Read { file: label.clone(), reason })?)
        };
        if let Some(bytes) = bytes.as_ref().filter(|bytes| bytes.starts_with(&gguf::MAGIC)) {
            return packed::tokenizer(&label, bytes.clone());
        }
        let directory = if path.is_dir() { path } else { path.parent().unwrap_or(path) };
        let file = |name: &str| -> Result<Option<FileSlice>> {
            let found = hugging_face::map_if_there(&directory.join(name))?;
            Ok(found
                .map(|bytes| FileSlice::whole(&directory.join(name).display().to_string(), bytes)))
        };
        let mut files = TokenizerFiles {
            config: file(TOKENIZER_CONFIG)?,
            chat_template: file(CHAT_TEMPLATE)?,
            ..TokenizerFiles::default()
        };
        match bytes {
            None => {
                files.hugging_face = file(TOKENIZER_JSON)?;
                files.sentence_piece = file(TOKENIZER_MODEL)?;
            }
            Some(bytes) => {
                let is_json = bytes.trim_ascii_start().starts_with(b"{");
                let slice = Some(FileSlice::whole(&label, bytes));
                *(if is_json { &mut files.hugging_face } else { &mut files.sentence_piece }) =
                    slice;
            }
        }
        Ok(files)
    }

    /// Writes the tokenizer into a packed file.
    pub(super) fn put(&self, header: &mut HeaderWriter) -> Result<()> {
        match (&self.hugging_face, &self.sentence_piece) {
            (Some(json), _) => header.text(key::TOKENIZER_JSON, text(json)?),
            (None, Some(model)) => header.u8_array(key::SENTENCE_PIECE, model.get()),
            (None, None) => return Ok(()),
        }
        if let Some(config) = &self.config {
            header.text(key::TOKENIZER_CONFIG, text(config)?);
        }
        if let Some(template) = self.read()?.and_then(|source| source.chat_template) {
            header.text(key::CHAT_TEMPLATE, &template);
        }
        Ok(())
    }

    pub(super) fn read(&self) -> Result<Option<TokenizerSource>> {
        let kind = match (&self.hugging_face, &self.sentence_piece) {
            (Some(json), _) => TokenizerKind::HuggingFace(json.get().to_vec()),
            (None, Some(model)) => TokenizerKind::SentencePiece(model.get().to_vec()),
            (None, None) => return Ok(None),
        };
        let tokenizer_config = self.config.as_ref().map(parse_config).transpose()?;
        let chat_template = match &self.chat_template {
            Some(template) => Some(text(template)?.to_owned()),
            None => tokenizer_config.as_ref().and_then(template_of),
        };
        Ok(Some(TokenizerSource { kind, tokenizer_config, chat_template }))
    }
}

/// The bytes of a file as text.
pub(super) fn text(slice: &FileSlice) -> Result<&str> {
    str::from_utf8(slice.get()).map_err(|error| Error::Malformed {
        file: slice.file.to_string(),
        what: format!("text is not UTF-8 from byte {}", slice.range.start + error.valid_up_to()),
    })
}

fn parse_config(slice: &FileSlice) -> Result<Value> {
    serde_json::from_slice(slice.get()).map_err(|error| Error::Malformed {
        file: slice.file.to_string(),
        what: format!("the tokenizer configuration is not valid JSON: {error}"),
    })
}

/// `chat_template` is a template, or a list of named ones with a default among them.
fn template_of(config: &Value) -> Option<String> {
    let template = match config.get("chat_template")? {
        Value::Array(named) => {
            let default = named.iter().find(|entry| entry["name"] == "default");
            &default.or(named.first())?["template"]
        }
        template => template,
    };
    template.as_str().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn templates_come_alone_or_named() {
        assert_eq!(template_of(&json!({"chat_template": "x"})).as_deref(), Some("x"));
        let named = json!({"chat_template": [{"name": "rag", "template": "r"},
                                             {"name": "default", "template": "d"}]});
        assert_eq!(template_of(&named).as_deref(), Some("d"));
        assert_eq!(template_of(&json!({"chat_template": []})), None);
        assert_eq!(template_of(&json!({"chat_template": [3]})), None);
        assert_eq!(template_of(&json!([])), None);
    }
}
