//! Parts of a text that can be encoded apart, by any number of threads.

use super::{CHUNK_BYTES, Pipeline, Tokenizer, hugging_face};
use crate::error::{Error, Result};

/// A part of a text, with as much of what comes before it as its ids depend on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stretch {
    pub(super) context: String,
    pub(super) text: String,
}

impl Stretch {
    /// A whole text.
    pub fn whole(text: String) -> Self {
        Self { context: String::new(), text }
    }

    /// Whether its ids depend on what comes before it.
    pub fn has_context(&self) -> bool {
        !self.context.is_empty()
    }

    /// The part itself.
    pub fn text(&self) -> &str {
        &self.text
    }
}

/// Cuts a text into [`Stretch`]es. See [`Tokenizer::splitter`].
pub struct TextSplitter<'a>(hugging_face::Splitter<'a>);

impl TextSplitter<'_> {
    /// Takes the next part of the text; `emit` gets the stretches that are certain by now.
    ///
    /// # Errors
    /// A stretch of more than [`MAX_UNCUT_BYTES`](super::MAX_UNCUT_BYTES) that cannot be cut; an error of
    /// `emit`.
    pub fn push(&mut self, text: &str, emit: &mut dyn FnMut(Stretch) -> Result<()>) -> Result<()> {
        self.0.push(text, emit)
    }

    /// Ends the text: what remains of it. The next part begins another text.
    pub fn finish(&mut self) -> Stretch {
        self.0.finish()
    }
}

impl Tokenizer {
    /// Cuts texts into parts of about 64 KiB that encode apart: their ids in order are those of the text. None
    /// if this tokenizer's texts must be encoded from start to end, as with SentencePiece.
    pub fn splitter(&self) -> Option<TextSplitter<'_>> {
        match &self.pipeline {
            Pipeline::HuggingFace(pipeline) if pipeline.is_cuttable() => {
                Some(TextSplitter(hugging_face::Splitter::new(pipeline, CHUNK_BYTES)))
            }
            _ => None,
        }
    }

    /// Ids of a part, without special tokens.
    ///
    /// # Errors
    /// As [`encode`](Self::encode); a part with context of another tokenizer's splitter.
    pub fn encode_stretch(&self, stretch: &Stretch) -> Result<Vec<u32>> {
        match &self.pipeline {
            Pipeline::HuggingFace(pipeline) => pipeline.encode_stretch(stretch),
            Pipeline::SentencePiece(_) if stretch.context.is_empty() => {
                self.encode(&stretch.text, false)
            }
            Pipeline::SentencePiece(_) => Err(Error::Tokenizer(
                "SentencePiece texts are encoded from start to end".to_owned(),
            )),
        }
    }
}
