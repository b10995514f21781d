//! The tokenizer files of a checkpoint, unparsed.

/// A tokenizer file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TokenizerKind {
    /// The JSON of a Hugging Face `tokenizer.json`.
    HuggingFace(Vec<u8>),
    /// A SentencePiece `tokenizer.model`.
    SentencePiece(Vec<u8>),
}

/// What a checkpoint says about text.
#[derive(Clone, Debug)]
pub struct TokenizerSource {
    /// The tokenizer itself.
    pub kind: TokenizerKind,
    /// `tokenizer_config.json`, if there is one.
    pub tokenizer_config: Option<serde_json::Value>,
    /// The chat template, if it is kept apart from the configuration.
    pub chat_template: Option<String>,
}
