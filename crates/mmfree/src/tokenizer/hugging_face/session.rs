//! Encodes a text that arrives in parts.

use super::{HuggingFace, Splitter};
use crate::error::Result;

/// The state of one text between parts.
pub(in crate::tokenizer) struct Session<'a> {
    tokenizer: &'a HuggingFace,
    splitter: Splitter<'a>,
}

impl<'a> Session<'a> {
    pub(in crate::tokenizer) fn new(tokenizer: &'a HuggingFace, chunk_bytes: usize) -> Self {
        Self { tokenizer, splitter: Splitter::new(tokenizer, chunk_bytes) }
    }

    /// Takes the next part of the text and appends the ids that are certain by now.
    ///
    /// # Errors
    /// A stretch of more than [`MAX_UNCUT_BYTES`](crate::tokenizer::MAX_UNCUT_BYTES) that cannot be cut.
    pub(in crate::tokenizer) fn push(&mut self, text: &str, ids: &mut Vec<u32>) -> Result<()> {
        self.splitter.push(text, &mut |stretch| {
            ids.extend(self.tokenizer.encode_stretch(&stretch)?);
            Ok(())
        })
    }

    /// Ends the text and appends the remaining ids.
    pub(in crate::tokenizer) fn finish(&mut self, ids: &mut Vec<u32>) -> Result<()> {
        ids.extend(self.tokenizer.encode_stretch(&self.splitter.finish())?);
        Ok(())
    }
}
