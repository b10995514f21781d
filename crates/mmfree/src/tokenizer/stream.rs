//! Encodes a stream of bytes.

use std::io::{BufRead, ErrorKind};

use super::{CHUNK_BYTES, Pipeline, Tokenizer, hugging_face, sentencepiece};
use crate::error::{Error, Result};

/// Yields the ids of a text in chunks as it is read. See [`Tokenizer::encode_reader`].
///
/// # Errors
/// Reading fails; the text is not UTF-8 (the error names the byte); a stretch of more than
/// [`MAX_UNCUT_BYTES`](super::MAX_UNCUT_BYTES) cannot be cut. Nothing follows an error.
pub struct EncodeReader<'a, R> {
    tokenizer: &'a Tokenizer,
    reader: R,
    session: Session<'a>,
    add_special_tokens: bool,
    stage: Stage,
    bytes_read: u64,
    /// The start of a character whose end has not been read.
    partial: Vec<u8>,
}

/// Encodes a text that is handed over in parts, in constant memory, to the same ids as [`Tokenizer::encode`]
/// of the whole without special tokens. See [`Tokenizer::encode_session`].
pub struct EncodeSession<'a>(Session<'a>);

impl EncodeSession<'_> {
    /// Takes the next part of the text and appends the ids that are certain by now.
    ///
    /// # Errors
    /// A stretch of more than [`MAX_UNCUT_BYTES`](super::MAX_UNCUT_BYTES) that cannot be cut.
    pub fn push(&mut self, text: &str, ids: &mut Vec<u32>) -> Result<()> {
        self.0.push(text, ids)
    }

    /// Ends the text and appends the remaining ids.
    ///
    /// # Errors
    /// As [`push`](Self::push).
    pub fn finish(mut self, ids: &mut Vec<u32>) -> Result<()> {
        self.0.finish(ids)
    }
}

impl Tokenizer {
    /// Begins a text that will be handed over in parts.
    pub fn encode_session(&self) -> EncodeSession<'_> {
        EncodeSession(Session::new(self, CHUNK_BYTES))
    }
}

enum Session<'a> {
    HuggingFace(hugging_face::Session<'a>),
    SentencePiece(sentencepiece::Session<'a>),
}

impl<'a> Session<'a> {
    fn new(tokenizer: &'a Tokenizer, chunk_bytes: usize) -> Self {
        match &tokenizer.pipeline {
            Pipeline::HuggingFace(pipeline) => {
                Self::HuggingFace(hugging_face::Session::new(pipeline, chunk_bytes))
            }
            Pipeline::SentencePiece(model) => {
                Self::SentencePiece(sentencepiece::Session::new(model, chunk_bytes))
            }
        }
    }

    fn push(&mut self, text: &str, ids: &mut Vec<u32>) -> Result<()> {
        match self {
            Self::HuggingFace(session) => session.push(text, ids),
            Self::SentencePiece(session) => session.push(text, ids),
        }
    }

    fn finish(&mut self, ids: &mut Vec<u32>) -> Result<()> {
        match self {
            Self::HuggingFace(session) => session.finish(ids),
            Self::SentencePiece(session) => session.finish(ids),
        }
    }
}

#[derive(PartialEq)]
enum Stage {
    Start,
    Text,
    End,
}

impl<'a, R: BufRead> EncodeReader<'a, R> {
    pub(super) fn new(tokenizer: &'a Tokenizer, reader: R, add_special_tokens: bool) -> Self {
        let session = Session::new(tokenizer, CHUNK_BYTES);
        Self {
            tokenizer,
            reader,
            session,
            add_special_tokens,
            stage: Stage::Start,
            bytes_read: 0,
            partial: Vec::new(),
        }
    }

    /// Sets how much text, in bytes, is taken in before ids are yielded (64 KiB unless set); the ids
    /// do not depend on it. To be called before the first chunk is taken.
    pub fn with_chunk_bytes(mut self, chunk_bytes: usize) -> Self {
        self.session = Session::new(self.tokenizer, chunk_bytes.max(1));
        self
    }

    /// Bytes taken from the reader so far.
    pub fn bytes_read(&self) -> u64 {
        self.bytes_read
    }

    /// Reads until some ids are certain; at the end of the stream, ends the text.
    fn next_ids(&mut self, ids: &mut Vec<u32>) -> Result<()> {
        if self.stage == Stage::Start {
            self.stage = Stage::Text;
            if self.add_special_tokens {
                ids.extend(&self.tokenizer.prefix);
            }
        }
        while ids.is_empty() && self.stage == Stage::Text {
            if !self.read(ids)? {
                self.stage = Stage::End;
                self.session.finish(ids)?;
                if self.add_special_tokens {
                    ids.extend(&self.tokenizer.suffix);
                }
            }
        }
        Ok(())
    }

    /// Takes the next bytes of what the reader has buffered; `false` at the end of the stream.
    fn read(&mut self, ids: &mut Vec<u32>) -> Result<bool> {
        let buffered = loop {
            match self.reader.fill_buf() {
                Ok(bytes) => break &bytes[..bytes.len().min(CHUNK_BYTES)],
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::ReadText(error)),
            }
        };
        let length = buffered.len();
        // The offset of the first byte in `bytes`.
        let offset = self.bytes_read - self.partial.len() as u64;
        let joined;
        let bytes = if self.partial.is_empty() {
            buffered
        } else {
            joined = [self.partial.as_slice(), buffered].concat();
            &joined
        };
        let (text, rest) = match std::str::from_utf8(bytes) {
            Ok(text) => (text, &bytes[bytes.len()..]),
            Err(error) => {
                let (text, rest) = bytes.split_at(error.valid_up_to());
                if error.error_len().is_some() || length == 0 {
                    return Err(Error::NotUtf8 { offset: offset + text.len() as u64 });
                }
                (std::str::from_utf8(text).expect("just checked"), rest)
            }
        };
        self.session.push(text, ids)?;
        self.partial = rest.to_vec();
        self.reader.consume(length);
        self.bytes_read += length as u64;
        Ok(length > 0)
    }
}

impl<R: BufRead> Iterator for EncodeReader<'_, R> {
    type Item = Result<Vec<u32>>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut ids = Vec::new();
        match self.next_ids(&mut ids) {
            Ok(()) if ids.is_empty() => None,
            Ok(()) => Some(Ok(ids)),
            Err(error) => {
                self.stage = Stage::End;
                Some(Err(error))
            }
        }
    }
}
