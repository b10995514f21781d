//! The tokenizer that comes with a checkpoint.

use serde_json::Value;

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

/// A serialised tokenizer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TokenizerKind {
    /// `tokenizer.json` of the `tokenizers` library.
    HuggingFace(Vec<u8>),
    /// `tokenizer.model` of SentencePiece.
    SentencePiece(Vec<u8>),
}
