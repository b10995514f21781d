//! Text to token ids and back.
//!
//! Two kinds of tokenizer file are read: Hugging Face's `tokenizer.json` and SentencePiece's
//! `tokenizer.model`. Ids and texts are those of the Python packages `tokenizers` and
//! `sentencepiece` with their default options.
//!
//! | type | does |
//! |---|---|
//! | [`Tokenizer`] | encodes and decodes whole texts |
//! | [`EncodeReader`] | encodes a stream of any length in constant memory |
//! | [`TextSplitter`] | cuts a text into parts that encode apart, by many threads |
//! | [`StreamDecoder`] | decodes ids one at a time, never splitting a character |
//!
//! A stream is encoded in parts that are cut only where no stage of the tokenizer can look across,
//! so the ids are those of the whole text. Where a tokenizer or a text offers no such place the parts
//! grow, up to [`MAX_UNCUT_BYTES`]; a longer stretch is an error.
//!
//! ```
//! use mmfree::checkpoint::{TokenizerKind, TokenizerSource};
//! use mmfree::tokenizer::Tokenizer;
//!
//! # fn main() -> mmfree::error::Result<()> {
//! # let bytes = include_bytes!("../../../../tests/fixtures/tokenizers/bpe-byte-fallback.model").to_vec();
//! let tokenizer = Tokenizer::from_source(&TokenizerSource {
//!     kind: TokenizerKind::SentencePiece(bytes),
//!     tokenizer_config: None,
//!     chat_template: None,
//! })?;
//! let ids = tokenizer.encode("A tale of two cities", false)?;
//! assert_eq!(tokenizer.decode(&ids, true)?, "A tale of two cities");
//! # Ok(())
//! # }
//! ```

mod hugging_face;
mod quiet_panic;
mod sentencepiece;
mod split;
mod stream;

use serde_json::Value;

use self::hugging_face::{HuggingFace, TokenDecoder};
use self::sentencepiece::{PieceDecoder, SentencePiece};
pub use self::split::{Stretch, TextSplitter};
pub use self::stream::{EncodeReader, EncodeSession};
use crate::checkpoint::{TokenizerKind, TokenizerSource};
use crate::error::{Error, Result};

/// Largest tokenizer file that is read. The largest in common use have 35 MB.
pub const MAX_FILE_BYTES: usize = 128 << 20;

/// Longest stretch of text, in bytes, that is encoded in one piece for want of a place to cut it.
pub const MAX_UNCUT_BYTES: usize = 16 << 20;

/// How much text, in bytes, a stream encoder takes in before it looks for a place to cut.
const CHUNK_BYTES: usize = 64 << 10;

/// A loaded tokenizer.
#[derive(Debug)]
pub struct Tokenizer {
    pipeline: Pipeline,
    bos: Option<u32>,
    eos: Option<u32>,
    /// Ids put before and after a text that is encoded with special tokens.
    prefix: Vec<u32>,
    suffix: Vec<u32>,
}

#[derive(Debug)]
enum Pipeline {
    HuggingFace(Box<HuggingFace>),
    SentencePiece(Box<SentencePiece>),
}

impl Tokenizer {
    /// Loads the tokenizer of a checkpoint.
    ///
    /// BOS and EOS are those that `tokenizer_config.json` names, else those of the SentencePiece model.
    /// Which ids go around a text is the pipeline's template for `tokenizer.json`; for SentencePiece
    /// it is BOS unless `add_bos_token` is false, and EOS if `add_eos_token` is true.
    ///
    /// # Errors
    /// A file that is too large, corrupt or of an unsupported kind.
    pub fn from_source(source: &TokenizerSource) -> Result<Self> {
        let (TokenizerKind::HuggingFace(bytes) | TokenizerKind::SentencePiece(bytes)) =
            &source.kind;
        if bytes.len() > MAX_FILE_BYTES {
            return Err(Error::Tokenizer(format!(
                "the tokenizer file has {} bytes, at most {MAX_FILE_BYTES} are read",
                bytes.len()
            )));
        }
        let config = source.tokenizer_config.as_ref();
        match &source.kind {
            TokenizerKind::HuggingFace(json) => {
                let pipeline = HuggingFace::parse(json)?;
                let id = |key| configured_token(config, key).and_then(|t| pipeline.token_id(t));
                Ok(Self {
                    bos: id("bos_token"),
                    eos: id("eos_token"),
                    prefix: pipeline.prefix.clone(),
                    suffix: pipeline.suffix.clone(),
                    pipeline: Pipeline::HuggingFace(Box::new(pipeline)),
                })
            }
            TokenizerKind::SentencePiece(model) => {
                let model = SentencePiece::parse(model)?;
                let id = |key| configured_token(config, key).and_then(|t| model.token_id(t));
                let (bos, eos) = (id("bos_token").or(model.bos), id("eos_token").or(model.eos));
                let flag = |key: &str, default| {
                    config.and_then(|config| config[key].as_bool()).unwrap_or(default)
                };
                Ok(Self {
                    bos,
                    eos,
                    prefix: bos.filter(|_| flag("add_bos_token", true)).into_iter().collect(),
                    suffix: eos.filter(|_| flag("add_eos_token", false)).into_iter().collect(),
                    pipeline: Pipeline::SentencePiece(Box::new(model)),
                })
            }
        }
    }

    /// Ids of a text; with `add_special_tokens` also those that belong around it.
    ///
    /// The text of a special token inside `text` becomes that token with `tokenizer.json` and is
    /// ordinary text with SentencePiece, as in the Python packages.
    ///
    /// # Errors
    /// A malformed tokenizer that only this text brings to light.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        let ids = match &self.pipeline {
            Pipeline::HuggingFace(pipeline) => pipeline.encode(text)?,
            Pipeline::SentencePiece(model) => model.encode(text)?,
        };
        if !add_special_tokens {
            return Ok(ids);
        }
        Ok([self.prefix.as_slice(), &ids, &self.suffix].concat())
    }

    /// Ids of a text in which the texts of special tokens stand for these tokens, as a rendered chat
    /// template's do. Nothing is put around it.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_with_special_text(&self, text: &str) -> Result<Vec<u32>> {
        let model = match &self.pipeline {
            Pipeline::HuggingFace(pipeline) => return pipeline.encode(text),
            Pipeline::SentencePiece(model) => model,
        };
        let mut ids = Vec::new();
        let mut rest = text;
        loop {
            let next = model.control_pieces().filter_map(|(piece, id)| {
                let start = rest.find(piece)?;
                Some((start, std::cmp::Reverse(piece.len()), id))
            });
            let Some((start, std::cmp::Reverse(length), id)) = next.min() else { break };
            ids.extend(model.encode(&rest[..start])?);
            ids.push(id);
            rest = &rest[start + length..];
        }
        ids.extend(model.encode(rest)?);
        Ok(ids)
    }

    /// Encodes what `reader` yields, in constant memory, to the same ids as
    /// [`encode`](Self::encode) of the whole.
    pub fn encode_reader<R: std::io::BufRead>(
        &self,
        reader: R,
        add_special_tokens: bool,
    ) -> EncodeReader<'_, R> {
        EncodeReader::new(self, reader, add_special_tokens)
    }

    /// Text of ids. Special tokens are left out with `skip_special`, else they appear as their text.
    ///
    /// # Errors
    /// With SentencePiece an id outside the vocabulary; with `tokenizer.json` such an id has no text.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        match &self.pipeline {
            Pipeline::HuggingFace(pipeline) => pipeline.decode(ids, skip_special),
            Pipeline::SentencePiece(_) => {
                let mut decoder = self.stream_decoder(skip_special);
                let mut text = String::new();
                for &id in ids {
                    decoder.push(id, &mut text)?;
                }
                decoder.finish(&mut text)?;
                Ok(text)
            }
        }
    }

    /// A decoder that takes ids one at a time.
    pub fn stream_decoder(&self, skip_special: bool) -> StreamDecoder<'_> {
        StreamDecoder(match &self.pipeline {
            Pipeline::HuggingFace(p) => IdDecoder::Token(TokenDecoder::new(p, skip_special)),
            Pipeline::SentencePiece(m) => IdDecoder::Piece(PieceDecoder::new(m, skip_special)),
        })
    }

    /// Number of tokens, added ones included.
    pub fn vocab_size(&self) -> usize {
        match &self.pipeline {
            Pipeline::HuggingFace(pipeline) => pipeline.vocab_size(),
            Pipeline::SentencePiece(model) => model.vocab_size(),
        }
    }

    /// Ids that belong before a text that begins a sequence.
    pub fn prefix(&self) -> &[u32] {
        &self.prefix
    }

    /// Token that begins a text, if the tokenizer names one.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// Token that ends a text, if the tokenizer names one.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// Text of a token as the tokenizer file stores it (`▁the`, `Ġthe`, `<0x0A>`).
    pub fn token(&self, id: u32) -> Option<String> {
        match &self.pipeline {
            Pipeline::HuggingFace(pipeline) => pipeline.token(id),
            Pipeline::SentencePiece(model) => model.token(id).map(str::to_owned),
        }
    }

    /// Id of a token by its stored text.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        match &self.pipeline {
            Pipeline::HuggingFace(pipeline) => pipeline.token_id(token),
            Pipeline::SentencePiece(model) => model.token_id(token),
        }
    }

    /// Whether a long text is encoded in parts. If not, a text of more than [`MAX_UNCUT_BYTES`] can
    /// only be encoded whole.
    pub fn is_cuttable(&self) -> bool {
        match &self.pipeline {
            Pipeline::HuggingFace(pipeline) => pipeline.is_cuttable(),
            Pipeline::SentencePiece(model) => model.is_cuttable(),
        }
    }
}

/// Turns ids into text as they come: whole characters only, and all output together is the text that
/// [`Tokenizer::decode`] makes of all ids.
pub struct StreamDecoder<'a>(IdDecoder<'a>);

enum IdDecoder<'a> {
    Token(TokenDecoder<'a>),
    Piece(PieceDecoder<'a>),
}

impl StreamDecoder<'_> {
    /// Appends to `out` the text that `id` completes, which may be none yet.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn push(&mut self, id: u32, out: &mut String) -> Result<()> {
        match &mut self.0 {
            IdDecoder::Token(decoder) => decoder.push(id, out),
            IdDecoder::Piece(decoder) => decoder.push(id, out),
        }
    }

    /// Ends the text: appends what was held back, a broken character as U+FFFD.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn finish(&mut self, out: &mut String) -> Result<()> {
        match &mut self.0 {
            IdDecoder::Token(decoder) => decoder.finish(out),
            IdDecoder::Piece(decoder) => {
                decoder.finish(out);
                Ok(())
            }
        }
    }
}

/// Text of a special token in `tokenizer_config.json`, which is a string or an object with `content`.
fn configured_token<'a>(config: Option<&'a Value>, key: &str) -> Option<&'a str> {
    let value = config?.get(key)?;
    value.as_str().or_else(|| value.get("content")?.as_str())
}

/// The last character boundary of `text` at or before `limit`, at least one character in if there is
/// one.
fn char_boundary_before(text: &str, limit: usize) -> usize {
    let limit = limit.max(4).min(text.len());
    (0..=limit).rev().find(|&end| text.is_char_boundary(end)).unwrap_or(0)
}

/// A text that a tokenizer can neither cut nor hold.
fn uncuttable() -> Error {
    Error::Tokenizer(format!(
        "the text has a stretch of more than {} MiB that this tokenizer cannot encode in parts; \
         put white space or line breaks into it",
        MAX_UNCUT_BYTES >> 20
    ))
}
