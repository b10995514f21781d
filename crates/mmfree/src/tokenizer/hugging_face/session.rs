//! Encodes a text that arrives in parts.

use super::HuggingFace;
use crate::error::{Error, Result};
use crate::tokenizer::{MAX_UNCUT_BYTES, char_boundary_before, uncuttable};

/// The state of one text between parts: text is encoded up to the last place where
/// [`Cuts`](super::cut::Cuts) allows a cut, the rest waits for more.
///
/// What a pipeline does at the start of a text (a prepended space) must not happen after a cut. So
/// each part is encoded together with the stretch between the two cuts before it, and the ids of
/// that stretch, which are the first ones, are dropped.
pub(in crate::tokenizer) struct Session<'a> {
    tokenizer: &'a HuggingFace,
    context: String,
    pending: String,
    /// Length of `pending` from which a cut is looked for.
    cut_from: usize,
    /// How much text to take in before looking for a cut.
    chunk_bytes: usize,
}

impl<'a> Session<'a> {
    pub(in crate::tokenizer) fn new(tokenizer: &'a HuggingFace, chunk_bytes: usize) -> Self {
        Self {
            tokenizer,
            context: String::new(),
            pending: String::new(),
            cut_from: chunk_bytes,
            chunk_bytes,
        }
    }

    /// Takes the next part of the text and appends the ids that are certain by now.
    ///
    /// # Errors
    /// A stretch of more than [`MAX_UNCUT_BYTES`] that cannot be cut.
    pub(in crate::tokenizer) fn push(&mut self, text: &str, ids: &mut Vec<u32>) -> Result<()> {
        let mut rest = text;
        while !rest.is_empty() {
            let (part, tail) = rest.split_at(char_boundary_before(rest, self.chunk_bytes));
            rest = tail;
            self.pending.push_str(part);
            if self.pending.len() >= self.cut_from {
                self.encode_to_last_cut(ids)?;
            }
        }
        Ok(())
    }

    /// Ends the text and appends the remaining ids.
    pub(in crate::tokenizer) fn finish(&mut self, ids: &mut Vec<u32>) -> Result<()> {
        self.encode(self.pending.len(), ids)?;
        self.pending.clear();
        Ok(())
    }

    fn encode_to_last_cut(&mut self, ids: &mut Vec<u32>) -> Result<()> {
        let mut cuts = self.cuts_from_the_end();
        match cuts.next() {
            Some(cut) => {
                let before = cuts.next().unwrap_or(0);
                drop(cuts);
                self.encode(cut, ids)?;
                self.context.clear();
                self.context.push_str(&self.pending[before..cut]);
                self.pending.drain(..cut);
                self.cut_from = self.pending.len() + self.chunk_bytes;
            }
            None => {
                drop(cuts);
                if self.pending.len() > MAX_UNCUT_BYTES {
                    return Err(uncuttable());
                }
                self.cut_from = self.pending.len() * 2;
            }
        }
        Ok(())
    }

    /// The places in the pending text where it may be cut, last first.
    fn cuts_from_the_end(&self) -> impl Iterator<Item = usize> {
        let cuts = self.tokenizer.cuts.as_ref();
        let mut chars = self.pending.char_indices().rev();
        let mut right = chars.next();
        chars.filter_map(move |(start, left)| {
            let (end, char) = right.replace((start, left))?;
            cuts?.allow(left, char).then_some(end)
        })
    }

    /// Encodes the first `end` bytes of the pending text as the continuation of the context.
    fn encode(&self, end: usize, ids: &mut Vec<u32>) -> Result<()> {
        let part = &self.pending[..end];
        if part.is_empty() {
            return Ok(());
        }
        if self.context.is_empty() {
            ids.extend(self.tokenizer.encode(part)?);
            return Ok(());
        }
        let known = self.tokenizer.encode(&self.context)?;
        let all = self.tokenizer.encode(&format!("{}{part}", self.context))?;
        match all.strip_prefix(known.as_slice()) {
            Some(new) => ids.extend(new),
            None => {
                return Err(Error::Tokenizer(format!(
                    "this tokenizer does not encode {:?} alone as it does before more text; \
                     encode the text whole",
                    self.context
                )));
            }
        }
        Ok(())
    }
}
