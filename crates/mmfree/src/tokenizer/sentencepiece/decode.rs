//! Ids to text, one id at a time.

use super::SentencePiece;
use super::normalizer::ESCAPED_SPACE;
use super::proto::PieceKind;
use crate::error::{Error, Result};

/// Turns ids into text as they come. The concatenated output is what the model makes of all ids at
/// once; a character that byte pieces spell is held back until it is whole.
pub(in crate::tokenizer) struct PieceDecoder<'a> {
    model: &'a SentencePiece,
    skip_control: bool,
    /// Bytes of a character that is not whole yet, at most three.
    bytes: Vec<u8>,
    /// Whether nothing but a leading space may have been seen, so that one is to be dropped.
    at_start: bool,
    leading_space_dropped: bool,
    has_text: bool,
}

impl<'a> PieceDecoder<'a> {
    pub(in crate::tokenizer) fn new(model: &'a SentencePiece, skip_control: bool) -> Self {
        Self {
            model,
            skip_control,
            bytes: Vec::new(),
            at_start: true,
            leading_space_dropped: false,
            has_text: false,
        }
    }

    /// Appends the text that `id` completes.
    ///
    /// # Errors
    /// An id outside the vocabulary.
    pub(in crate::tokenizer) fn push(&mut self, id: u32, out: &mut String) -> Result<()> {
        let vocabulary = &self.model.vocabulary;
        let Some(piece) = vocabulary.piece(id) else {
            let size = vocabulary.pieces.len();
            return Err(Error::Tokenizer(format!(
                "token id {id} is outside the vocabulary of {size} pieces"
            )));
        };
        let length = out.len();
        if piece.kind == PieceKind::Byte {
            let byte = u8::from_str_radix(&piece.text[3..5], 16).expect("checked at load");
            self.bytes.push(byte);
            self.take_characters(false, out);
            self.has_text |= out.len() > length;
            return Ok(());
        }
        self.take_characters(true, out);
        self.has_text |= out.len() > length;
        if self.leading_space_dropped || self.has_text {
            self.at_start = false;
        }
        let length = out.len();
        self.leading_space_dropped = false;
        match piece.kind {
            PieceKind::Control if self.skip_control => {}
            PieceKind::Control => out.push_str(&piece.text),
            PieceKind::Unknown => out.push_str(&self.model.unk_surface),
            _ => self.push_text(&piece.text, out),
        }
        self.has_text |= out.len() > length;
        Ok(())
    }

    /// Ends the text: bytes that never became a character are replaced.
    pub(in crate::tokenizer) fn finish(&mut self, out: &mut String) {
        self.take_characters(true, out);
    }

    fn push_text(&mut self, mut piece: &str, out: &mut String) {
        let normalizer = &self.model.normalizer;
        if self.at_start
            && normalizer.strips_leading_space()
            && let Some(rest) = piece.strip_prefix(ESCAPED_SPACE)
        {
            piece = rest;
            // With extra white space removed from texts, none that leads is part of one.
            self.leading_space_dropped = !normalizer.removes_extra_whitespaces();
        }
        for (index, part) in piece.split(ESCAPED_SPACE).enumerate() {
            if index > 0 {
                out.push(' ');
            }
            out.push_str(part);
        }
    }

    /// Moves whole characters from the held bytes to `out`; each byte that is part of none becomes U+FFFD.
    /// Without `last` the start of a character stays.
    fn take_characters(&mut self, last: bool, out: &mut String) {
        while !self.bytes.is_empty() {
            let used = match std::str::from_utf8(&self.bytes) {
                Ok(text) => {
                    out.push_str(text);
                    self.bytes.len()
                }
                Err(error) if error.valid_up_to() > 0 => {
                    let valid = &self.bytes[..error.valid_up_to()];
                    out.push_str(std::str::from_utf8(valid).expect("just checked"));
                    valid.len()
                }
                Err(error) if error.error_len().is_none() && !last => return,
                Err(_) => {
                    out.push(char::REPLACEMENT_CHARACTER);
                    1
                }
            };
            self.bytes.drain(..used);
        }
    }
}
