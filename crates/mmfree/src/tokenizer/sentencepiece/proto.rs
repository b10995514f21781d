//! Reads the fields of a SentencePiece `ModelProto` (protocol buffer, proto2) that encoding and
//! decoding depend on. Unknown fields are skipped, as the format demands.

use crate::error::{Error, Result};

/// More pieces than any vocabulary has; bounds what a hostile file can make us allocate.
const MAX_PIECES: usize = 1 << 22;

/// What a piece is, with the numbers of the file format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PieceKind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

#[derive(Debug)]
pub(super) struct Piece {
    pub text: String,
    pub score: f32,
    pub kind: PieceKind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Algorithm {
    Unigram,
    Bpe,
}

/// The model file, defaults of absent fields filled in.
#[derive(Debug)]
pub(super) struct ModelProto {
    pub pieces: Vec<Piece>,
    pub algorithm: Algorithm,
    pub byte_fallback: bool,
    pub bos_piece: String,
    pub eos_piece: String,
    pub unk_surface: String,
    pub add_dummy_prefix: bool,
    pub remove_extra_whitespaces: bool,
    pub escape_whitespaces: bool,
    pub precompiled_charsmap: Vec<u8>,
}

impl ModelProto {
    pub(super) fn parse(bytes: &[u8]) -> Result<Self> {
        let mut model = Self {
            pieces: Vec::new(),
            algorithm: Algorithm::Unigram,
            byte_fallback: false,
            bos_piece: "<s>".into(),
            eos_piece: "</s>".into(),
            unk_surface: " \u{2047} ".into(),
            add_dummy_prefix: true,
            remove_extra_whitespaces: true,
            escape_whitespaces: true,
            precompiled_charsmap: Vec::new(),
        };
        let mut reader = Reader { bytes, position: 0 };
        while let Some((field, value)) = reader.field()? {
            match field {
                1 if model.pieces.len() == MAX_PIECES => {
                    return Err(corrupt(format!("more than {MAX_PIECES} pieces")));
                }
                1 => {
                    let piece = parse_piece(value.message("piece")?)
                        .map_err(|e| corrupt(format!("piece {}: {e}", model.pieces.len())))?;
                    model.pieces.push(piece);
                }
                2 => model.parse_trainer_spec(value.message("trainer_spec")?)?,
                3 => model.parse_normalizer_spec(value.message("normalizer_spec")?)?,
                5 => refuse_denormalizer(value.message("denormalizer_spec")?)?,
                _ => {}
            }
        }
        if model.pieces.is_empty() {
            return Err(corrupt("no pieces: this is not a SentencePiece model"));
        }
        Ok(model)
    }

    fn parse_trainer_spec(&mut self, mut reader: Reader) -> Result<()> {
        while let Some((field, value)) = reader.field()? {
            match field {
                3 => {
                    self.algorithm = match value.varint("model_type")? {
                        1 => Algorithm::Unigram,
                        2 => Algorithm::Bpe,
                        other => {
                            return Err(Error::Tokenizer(format!(
                                "SentencePiece model type {other} is not supported, only 1 (unigram) and 2 (BPE)"
                            )));
                        }
                    }
                }
                24 if value.varint("treat_whitespace_as_suffix")? != 0 => {
                    return Err(Error::Tokenizer(
                        "SentencePiece models with treat_whitespace_as_suffix are not supported"
                            .into(),
                    ));
                }
                35 => self.byte_fallback = value.varint("byte_fallback")? != 0,
                44 => self.unk_surface = value.text("unk_surface")?,
                46 => self.bos_piece = value.text("bos_piece")?,
                47 => self.eos_piece = value.text("eos_piece")?,
                _ => {}
            }
        }
        Ok(())
    }

    fn parse_normalizer_spec(&mut self, mut reader: Reader) -> Result<()> {
        while let Some((field, value)) = reader.field()? {
            match field {
                2 => self.precompiled_charsmap = value.bytes("precompiled_charsmap")?.to_vec(),
                3 => self.add_dummy_prefix = value.varint("add_dummy_prefix")? != 0,
                4 => self.remove_extra_whitespaces = value.varint("remove_extra_whitespaces")? != 0,
                5 => self.escape_whitespaces = value.varint("escape_whitespaces")? != 0,
                _ => {}
            }
        }
        Ok(())
    }
}

fn parse_piece(mut reader: Reader) -> Result<Piece> {
    let mut piece = Piece { text: String::new(), score: 0.0, kind: PieceKind::Normal };
    while let Some((field, value)) = reader.field()? {
        match field {
            1 => piece.text = value.text("piece")?,
            2 => piece.score = f32::from_bits(value.fixed32("score")?),
            3 => {
                piece.kind = match value.varint("type")? {
                    1 => PieceKind::Normal,
                    2 => PieceKind::Unknown,
                    3 => PieceKind::Control,
                    4 => PieceKind::UserDefined,
                    5 => PieceKind::Unused,
                    6 => PieceKind::Byte,
                    other => return Err(corrupt(format!("type {other}, expected 1 to 6"))),
                }
            }
            _ => {}
        }
    }
    if piece.text.is_empty() {
        return Err(corrupt("empty text"));
    }
    if !piece.score.is_finite() {
        return Err(corrupt(format!("score is {}, expected a finite number", piece.score)));
    }
    Ok(piece)
}

fn refuse_denormalizer(mut reader: Reader) -> Result<()> {
    while let Some((field, value)) = reader.field()? {
        if field == 2 && !value.bytes("precompiled_charsmap")?.is_empty() {
            return Err(Error::Tokenizer(
                "SentencePiece models with a denormaliser are not supported".into(),
            ));
        }
    }
    Ok(())
}

/// A field's content, by wire type.
enum Value<'a> {
    Varint(u64),
    Fixed32(u32),
    Fixed64,
    Bytes(&'a [u8]),
}

impl<'a> Value<'a> {
    fn varint(&self, field: &str) -> Result<u64> {
        match self {
            Self::Varint(value) => Ok(*value),
            _ => Err(wrong_type(field)),
        }
    }

    fn fixed32(&self, field: &str) -> Result<u32> {
        match self {
            Self::Fixed32(value) => Ok(*value),
            _ => Err(wrong_type(field)),
        }
    }

    fn bytes(&self, field: &str) -> Result<&'a [u8]> {
        match self {
            Self::Bytes(value) => Ok(value),
            _ => Err(wrong_type(field)),
        }
    }

    fn message(&self, field: &str) -> Result<Reader<'a>> {
        Ok(Reader { bytes: self.bytes(field)?, position: 0 })
    }

    fn text(&self, field: &str) -> Result<String> {
        let bytes = self.bytes(field)?;
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(text.to_owned()),
            Err(_) => Err(corrupt(format!("{field} is not UTF-8"))),
        }
    }
}

/// A cursor over one message.
struct Reader<'a> {
    bytes: &'a [u8],
    position: usize,
}

impl<'a> Reader<'a> {
    /// The next field's number and content, or `None` at the end of the message.
    fn field(&mut self) -> Result<Option<(u64, Value<'a>)>> {
        if self.position == self.bytes.len() {
            return Ok(None);
        }
        let tag = self.varint()?;
        let value = match tag & 7 {
            0 => Value::Varint(self.varint()?),
            1 => {
                self.take(8)?;
                Value::Fixed64
            }
            2 => {
                let length = self.varint()?;
                Value::Bytes(self.take(length)?)
            }
            5 => Value::Fixed32(u32::from_le_bytes(self.take(4)?.try_into().expect("4 bytes"))),
            other => return Err(corrupt(format!("wire type {other} at byte {}", self.position))),
        };
        Ok(Some((tag >> 3, value)))
    }

    fn varint(&mut self) -> Result<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.take(1)?[0];
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(corrupt(format!("number longer than 64 bits at byte {}", self.position)))
    }

    fn take(&mut self, length: u64) -> Result<&'a [u8]> {
        let rest = &self.bytes[self.position..];
        match usize::try_from(length).ok().and_then(|length| rest.get(..length)) {
            Some(taken) => {
                self.position += taken.len();
                Ok(taken)
            }
            None => Err(corrupt(format!(
                "truncated: {length} bytes expected at byte {}, {} left",
                self.position,
                rest.len()
            ))),
        }
    }
}

fn wrong_type(field: &str) -> Error {
    corrupt(format!("field {field} has the wrong wire type"))
}

fn corrupt(what: impl std::fmt::Display) -> Error {
    Error::Tokenizer(format!("corrupt SentencePiece model: {what}"))
}
