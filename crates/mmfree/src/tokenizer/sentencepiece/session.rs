//! Encodes a text that arrives in parts.

use super::normalizer::Progress;
use super::{Segmenter, SentencePiece, bpe, unigram};
use crate::error::Result;
use crate::tokenizer::{MAX_UNCUT_BYTES, char_boundary_before, uncuttable};

/// The state of one text between parts. Ids are those of the whole text in one piece: normalised text
/// is segmented up to the last place where [`joined`](SentencePiece::joined) says that no piece
/// reaches across, the rest waits for more. What crosses such a place is carried along: the white-space
/// state of the normaliser, a run of unknown characters, the unigram path's score.
pub(in crate::tokenizer) struct Session<'a> {
    model: &'a SentencePiece,
    /// Text that is not normalised yet.
    raw: String,
    /// Normalised text that is not segmented yet.
    normalized: String,
    /// Length of `normalized` from which a cut is looked for.
    cut_from: usize,
    /// How much text to take in before looking for a cut.
    chunk_bytes: usize,
    progress: Progress,
    path_score: f32,
    previous_is_unknown: bool,
}

impl<'a> Session<'a> {
    pub(in crate::tokenizer) fn new(model: &'a SentencePiece, chunk_bytes: usize) -> Self {
        Self {
            model,
            raw: String::new(),
            normalized: String::new(),
            cut_from: chunk_bytes,
            chunk_bytes,
            progress: Progress::default(),
            path_score: 0.0,
            previous_is_unknown: false,
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
            self.raw.push_str(part);
            self.normalize(false)?;
            if self.normalized.len() >= self.cut_from {
                self.segment_to_last_cut(ids)?;
            }
        }
        Ok(())
    }

    /// Ends the text and appends the remaining ids.
    pub(in crate::tokenizer) fn finish(&mut self, ids: &mut Vec<u32>) -> Result<()> {
        self.normalize(true)?;
        let end = self.model.normalizer.trim_end(&self.normalized);
        self.segment(end, ids);
        Ok(())
    }

    fn normalize(&mut self, last: bool) -> Result<()> {
        let normalizer = &self.model.normalizer;
        let used =
            normalizer.normalize(&mut self.progress, &self.raw, last, &mut self.normalized)?;
        self.raw.drain(..used);
        Ok(())
    }

    fn segment_to_last_cut(&mut self, ids: &mut Vec<u32>) -> Result<()> {
        match self.last_cut() {
            Some(cut) => {
                self.segment(cut, ids);
                self.normalized.drain(..cut);
                self.cut_from = self.normalized.len() + self.chunk_bytes;
            }
            None if self.normalized.len() > MAX_UNCUT_BYTES => {
                return Err(uncuttable());
            }
            None => self.cut_from = self.normalized.len() * 2,
        }
        Ok(())
    }

    /// The last place before the trailing spaces (which may yet be dropped) that no piece crosses.
    fn last_cut(&self) -> Option<usize> {
        let joined = self.model.joined.as_ref()?;
        let text = &self.normalized[..self.model.normalizer.trim_end(&self.normalized)];
        let mut right = self.normalized[text.len()..].chars().next();
        for (start, left) in text.char_indices().rev() {
            let end = start + left.len_utf8();
            if right.is_some_and(|right| !joined.contains(&(left, right))) {
                return Some(end);
            }
            right = Some(left);
        }
        None
    }

    /// Segments the first `end` bytes of the normalised text.
    fn segment(&mut self, end: usize, ids: &mut Vec<u32>) {
        let model = self.model;
        let unknown = model.vocabulary.unknown;
        let previous_is_unknown = &mut self.previous_is_unknown;
        let mut emit = |piece: &str, id: u32| {
            let is_unknown = id == unknown;
            match &model.byte_ids {
                Some(byte_ids) if is_unknown => {
                    ids.extend(piece.bytes().map(|byte| byte_ids[usize::from(byte)]));
                }
                // A run of unknown characters is one unknown piece.
                _ if is_unknown && *previous_is_unknown => {}
                _ => ids.push(id),
            }
            *previous_is_unknown = is_unknown;
        };
        let text = &self.normalized[..end];
        match &model.segmenter {
            Segmenter::Bpe => {
                bpe::encode(text, &model.vocabulary, model.normalizer.user_defined(), &mut emit);
            }
            Segmenter::Unigram(index) => {
                unigram::encode(text, &model.vocabulary, index, &mut self.path_score, &mut emit);
            }
        }
    }
}
