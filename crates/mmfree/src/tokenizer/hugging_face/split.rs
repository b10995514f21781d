//! Cuts a text that arrives in parts into stretches that encode apart.

use super::HuggingFace;
use crate::error::{Error, Result};
use crate::tokenizer::{MAX_UNCUT_BYTES, Stretch, char_boundary_before, uncuttable};

/// The state of one text between parts: text up to the last place where [`Cuts`](super::cut::Cuts) allows a
/// cut is given out, the rest waits for more.
///
/// What a pipeline does at the start of a text (a prepended space) must not happen after a cut. So each
/// stretch goes with the one between the two cuts before it, whose ids, which are the first ones, are dropped.
pub(in crate::tokenizer) struct Splitter<'a> {
    tokenizer: &'a HuggingFace,
    context: String,
    pending: String,
    /// Length of `pending` from which a cut is looked for.
    cut_from: usize,
    /// How much text to take in before looking for a cut.
    chunk_bytes: usize,
}

impl<'a> Splitter<'a> {
    pub(in crate::tokenizer) fn new(tokenizer: &'a HuggingFace, chunk_bytes: usize) -> Self {
        Self {
            tokenizer,
            context: String::new(),
            pending: String::new(),
            cut_from: chunk_bytes,
            chunk_bytes,
        }
    }

    /// Takes the next part of the text and gives out the stretches that are certain by now.
    ///
    /// # Errors
    /// A stretch of more than [`MAX_UNCUT_BYTES`] that cannot be cut; an error of `emit`.
    pub(in crate::tokenizer) fn push(
        &mut self,
        text: &str,
        emit: &mut dyn FnMut(Stretch) -> Result<()>,
    ) -> Result<()> {
        let mut rest = text;
        while !rest.is_empty() {
            let (part, tail) = rest.split_at(char_boundary_before(rest, self.chunk_bytes));
            rest = tail;
            self.pending.push_str(part);
            if self.pending.len() >= self.cut_from {
                self.cut_last(emit)?;
            }
        }
        Ok(())
    }

    /// Ends the text: what remains of it.
    pub(in crate::tokenizer) fn finish(&mut self) -> Stretch {
        let text = std::mem::take(&mut self.pending);
        Stretch { context: std::mem::take(&mut self.context), text }
    }

    fn cut_last(&mut self, emit: &mut dyn FnMut(Stretch) -> Result<()>) -> Result<()> {
        let mut cuts = self.cuts_from_the_end();
        match cuts.next() {
            Some(cut) => {
                let before = cuts.next().unwrap_or(0);
                drop(cuts);
                let next_context = self.pending[before..cut].to_owned();
                let rest = self.pending.split_off(cut);
                let text = std::mem::replace(&mut self.pending, rest);
                let context = std::mem::replace(&mut self.context, next_context);
                self.cut_from = self.pending.len() + self.chunk_bytes;
                emit(Stretch { context, text })
            }
            None => {
                drop(cuts);
                if self.pending.len() > MAX_UNCUT_BYTES {
                    return Err(uncuttable());
                }
                self.cut_from = self.pending.len() * 2;
                Ok(())
            }
        }
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
}

impl HuggingFace {
    /// Ids of a stretch, as they are inside the whole text.
    ///
    /// # Errors
    /// A pipeline that does not encode the context alone as it does before more text.
    pub(in crate::tokenizer) fn encode_stretch(&self, stretch: &Stretch) -> Result<Vec<u32>> {
        let Stretch { context, text } = stretch;
        if text.is_empty() {
            return Ok(Vec::new());
        }
        if context.is_empty() {
            return self.encode(text);
        }
        let known = self.encode(context)?;
        let mut all = self.encode(&format!("{context}{text}"))?;
        if !all.starts_with(&known) {
            return Err(Error::Tokenizer(format!(
                "this tokenizer does not encode {context:?} alone as it does before more text; encode the \
                 text whole"
            )));
        }
        all.drain(..known.len());
        Ok(all)
    }
}
