//! SentencePiece models (`tokenizer.model`): BPE and unigram, with byte fallback.
//!
//! Ids and texts are exactly those of the `sentencepiece` Python package with its default options:
//! the text of a control piece inside user text is ordinary text, and decoding leaves control pieces out.

mod bpe;
mod decode;
mod normalizer;
mod proto;
mod session;
mod unigram;

use std::collections::{HashMap, HashSet};

pub(super) use self::decode::PieceDecoder;
use self::normalizer::{Normalizer, UserDefined};
use self::proto::{Algorithm, ModelProto, Piece, PieceKind};
pub(super) use self::session::Session;
use self::unigram::PieceIndex;
use crate::error::{Error, Result};
use crate::tokenizer::CHUNK_BYTES;

/// A loaded SentencePiece model.
#[derive(Debug)]
pub(super) struct SentencePiece {
    vocabulary: Vocabulary,
    normalizer: Normalizer,
    segmenter: Segmenter,
    /// Ids of the 256 byte pieces, if unknown characters become bytes.
    byte_ids: Option<Box<[u32; 256]>>,
    /// Neighbouring characters that occur inside a piece; `None` if texts must be encoded whole.
    joined: Option<HashSet<(char, char)>>,
    unk_surface: String,
    pub(super) bos: Option<u32>,
    pub(super) eos: Option<u32>,
}

#[derive(Debug)]
enum Segmenter {
    Bpe,
    Unigram(PieceIndex),
}

/// The pieces of a model by id and by text.
#[derive(Debug)]
struct Vocabulary {
    pieces: Vec<Piece>,
    /// Pieces that text may become: normal, user-defined and unused ones.
    text: HashMap<Box<str>, u32>,
    /// Control, unknown and byte pieces.
    reserved: HashMap<Box<str>, u32>,
    unknown: u32,
}

impl Vocabulary {
    fn new(pieces: Vec<Piece>) -> Result<Self> {
        let mut text = HashMap::new();
        let mut reserved = HashMap::new();
        let mut unknown = None;
        for (id, piece) in pieces.iter().enumerate() {
            let id = u32::try_from(id).expect("the number of pieces is bounded");
            let map = match piece.kind {
                PieceKind::Normal | PieceKind::UserDefined | PieceKind::Unused => &mut text,
                PieceKind::Control | PieceKind::Unknown | PieceKind::Byte => &mut reserved,
            };
            if let Some(first) = map.insert(piece.text.as_str().into(), id) {
                return Err(invalid(format!("pieces {first} and {id} are both {:?}", piece.text)));
            }
            if piece.kind == PieceKind::Unknown
                && let Some(first) = unknown.replace(id)
            {
                return Err(invalid(format!("pieces {first} and {id} are both the unknown piece")));
            }
        }
        let unknown = unknown.ok_or_else(|| invalid("no unknown piece"))?;
        Ok(Self { pieces, text, reserved, unknown })
    }

    /// Id of a piece, the unknown one if there is none of that text.
    fn id(&self, piece: &str) -> u32 {
        *self.reserved.get(piece).or_else(|| self.text.get(piece)).unwrap_or(&self.unknown)
    }

    /// Id of a piece that text may become.
    fn mergeable(&self, piece: &str) -> Option<u32> {
        self.text.get(piece).copied()
    }

    fn piece(&self, id: u32) -> Option<&Piece> {
        self.pieces.get(id as usize)
    }

    fn kind(&self, id: u32) -> Option<PieceKind> {
        self.piece(id).map(|piece| piece.kind)
    }

    fn is_unused(&self, id: u32) -> bool {
        self.kind(id) == Some(PieceKind::Unused)
    }

    fn is_user_defined(&self, id: u32) -> bool {
        self.kind(id) == Some(PieceKind::UserDefined)
    }

    fn score(&self, id: u32) -> f32 {
        self.piece(id).map_or(0.0, |piece| piece.score)
    }

    fn unknown(&self) -> u32 {
        self.unknown
    }

    /// Id of a control piece.
    fn control(&self, piece: &str) -> Option<u32> {
        let id = self.reserved.get(piece).copied()?;
        (self.kind(id) == Some(PieceKind::Control)).then_some(id)
    }
}

impl SentencePiece {
    /// Reads a model file.
    ///
    /// # Errors
    /// Corrupt or truncated bytes, and kinds of model that are not supported (word, character).
    pub(super) fn parse(bytes: &[u8]) -> Result<Self> {
        let mut proto = ModelProto::parse(bytes)?;
        let vocabulary = Vocabulary::new(std::mem::take(&mut proto.pieces))?;
        let pieces = &vocabulary.pieces;
        let user_defined = pieces
            .iter()
            .filter(|piece| piece.kind == PieceKind::UserDefined)
            .map(|piece| piece.text.clone())
            .collect();
        let normalizer = Normalizer::new(&proto, UserDefined::new(user_defined))?;
        let segmenter = match proto.algorithm {
            Algorithm::Bpe => Segmenter::Bpe,
            Algorithm::Unigram => {
                let texts = vocabulary.text.iter().map(|(text, &id)| (id, text.clone()));
                Segmenter::Unigram(PieceIndex::new(texts, min_score(pieces)))
            }
        };
        // How BPE takes an unused piece apart depends on every place where it was put together.
        let is_cuttable = proto.algorithm == Algorithm::Unigram
            || !pieces.iter().any(|piece| piece.kind == PieceKind::Unused);
        Ok(Self {
            byte_ids: byte_ids(&vocabulary, proto.byte_fallback)?,
            joined: is_cuttable.then(|| joined_characters(&vocabulary)),
            bos: vocabulary.control(&proto.bos_piece),
            eos: vocabulary.control(&proto.eos_piece),
            unk_surface: proto.unk_surface,
            vocabulary,
            normalizer,
            segmenter,
        })
    }

    pub(super) fn vocab_size(&self) -> usize {
        self.vocabulary.pieces.len()
    }

    /// Text of a piece as the model stores it.
    pub(super) fn token(&self, id: u32) -> Option<&str> {
        self.vocabulary.piece(id).map(|piece| piece.text.as_str())
    }

    /// Id of a piece by its stored text.
    pub(super) fn token_id(&self, token: &str) -> Option<u32> {
        let vocabulary = &self.vocabulary;
        vocabulary.reserved.get(token).or_else(|| vocabulary.text.get(token)).copied()
    }

    /// Whether a piece is a control piece.
    pub(super) fn is_control(&self, id: u32) -> bool {
        self.vocabulary.kind(id) == Some(PieceKind::Control)
    }

    /// Every control piece with its id.
    pub(super) fn control_pieces(&self) -> impl Iterator<Item = (&str, u32)> {
        let reserved = self.vocabulary.reserved.iter();
        reserved.map(|(text, &id)| (text.as_ref(), id)).filter(|&(_, id)| self.is_control(id))
    }

    /// Whether long texts can be encoded in parts.
    pub(super) fn is_cuttable(&self) -> bool {
        self.joined.is_some()
    }

    /// Encodes a whole text.
    ///
    /// # Errors
    /// Corrupt normalisation rules that the text runs into; see also [`Session`].
    pub(super) fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = Vec::new();
        let mut session = Session::new(self, CHUNK_BYTES);
        session.push(text, &mut ids)?;
        session.finish(&mut ids)?;
        Ok(ids)
    }
}

/// Lowest score of the normal pieces.
fn min_score(pieces: &[Piece]) -> f32 {
    let normal = pieces.iter().filter(|piece| piece.kind == PieceKind::Normal);
    normal.map(|piece| piece.score).fold(f32::MAX, f32::min)
}

/// Ids of `<0x00>` to `<0xFF>` of a model with byte fallback.
fn byte_ids(vocabulary: &Vocabulary, byte_fallback: bool) -> Result<Option<Box<[u32; 256]>>> {
    if !byte_fallback {
        return match vocabulary.pieces.iter().find(|piece| piece.kind == PieceKind::Byte) {
            Some(piece) => Err(invalid(format!(
                "byte piece {:?} in a model without byte fallback",
                piece.text
            ))),
            None => Ok(None),
        };
    }
    let mut ids = Box::new([0; 256]);
    for (byte, id) in ids.iter_mut().enumerate() {
        let piece = format!("<0x{byte:02X}>");
        *id = vocabulary.id(&piece);
        if vocabulary.kind(*id) != Some(PieceKind::Byte) {
            return Err(invalid(format!("byte fallback without the byte piece {piece:?}")));
        }
    }
    let byte_pieces = vocabulary.pieces.iter().filter(|piece| piece.kind == PieceKind::Byte);
    match byte_pieces.count() {
        256 => Ok(Some(ids)),
        count => Err(invalid(format!("{count} byte pieces, expected 256"))),
    }
}

/// Neighbours inside any piece that text may become. Between two characters that are none, no piece
/// can reach across, so the text on either side is segmented as if the other were not there.
fn joined_characters(vocabulary: &Vocabulary) -> HashSet<(char, char)> {
    let pieces = vocabulary.text.keys();
    pieces.flat_map(|piece| piece.chars().zip(piece.chars().skip(1))).collect()
}

fn invalid(what: impl std::fmt::Display) -> Error {
    Error::Tokenizer(format!("invalid SentencePiece model: {what}"))
}
