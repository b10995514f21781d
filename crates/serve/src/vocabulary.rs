//! What each token stands for, as bytes.

use mmfree::checkpoint::{TokenizerKind, TokenizerSource};
use mmfree::tokenizer::Tokenizer;
use serde_json::Value;

/// The bytes of every token, for log-probabilities and for structured output.
#[derive(Debug)]
pub(crate) struct Vocabulary {
    tokens: Vec<Token>,
}

#[derive(Debug, Default)]
struct Token {
    bytes: Box<[u8]>,
    is_special: bool,
}

/// How a tokenizer file writes bytes.
#[derive(Clone, Copy, PartialEq)]
enum Spelling {
    /// Each byte as a printable character of its own (GPT-2).
    ByteLevel,
    /// Spaces as `▁`, single bytes as `<0x0A>`.
    Pieces,
    /// `##` before tokens that go on a word.
    WordPiece,
}

impl Vocabulary {
    /// The vocabulary of a tokenizer, `size` tokens; those that the tokenizer lacks have no bytes.
    pub(crate) fn new(source: &TokenizerSource, tokenizer: &Tokenizer, size: usize) -> Self {
        let json = match &source.kind {
            TokenizerKind::HuggingFace(bytes) => serde_json::from_slice(bytes).unwrap_or_default(),
            TokenizerKind::SentencePiece(_) => Value::Null,
        };
        let spelling = spelling(&json["decoder"]);
        let mut tokens: Vec<Token> = Vec::with_capacity(size);
        for id in 0..size as u32 {
            let text = tokenizer.token(id).unwrap_or_default();
            let is_control = json.is_null()
                && byte_of(&text).is_none()
                && tokenizer.decode(&[id], true).is_ok_and(|shown| shown.is_empty())
                && text.starts_with('<');
            let bytes = if is_control { text.into_bytes() } else { spelling.bytes(&text) };
            tokens.push(Token { bytes: bytes.into(), is_special: is_control });
        }
        for added in json["added_tokens"].as_array().into_iter().flatten() {
            let id = added["id"].as_u64().and_then(|id| usize::try_from(id).ok());
            if let (Some(token), Some(text)) =
                (id.and_then(|id| tokens.get_mut(id)), added["content"].as_str())
            {
                token.bytes = text.as_bytes().into();
                token.is_special = added["special"].as_bool().unwrap_or(false);
            }
        }
        Self { tokens }
    }

    /// The vocabulary of a model without a tokenizer: tokens without text.
    pub(crate) fn unknown(size: usize) -> Self {
        Self { tokens: std::iter::repeat_with(Token::default).take(size).collect() }
    }

    /// Number of tokens, V.
    pub(crate) fn len(&self) -> usize {
        self.tokens.len()
    }

    /// The bytes that a token adds to a text (of a special token, its name).
    pub(crate) fn bytes(&self, id: u32) -> &[u8] {
        self.tokens.get(id as usize).map_or(&[], |token| &token.bytes)
    }

    /// Whether a token is no text, but a mark.
    pub(crate) fn is_special(&self, id: u32) -> bool {
        self.tokens.get(id as usize).is_some_and(|token| token.is_special)
    }

    /// A token as OpenAI's API shows it: its text, or `bytes:\xe2\x82` where it is a part of a character.
    pub(crate) fn show(&self, id: u32) -> String {
        let bytes = self.bytes(id);
        match str::from_utf8(bytes) {
            Ok(text) => text.to_owned(),
            Err(_) => {
                let hex = bytes.iter().map(|byte| format!("\\x{byte:02x}"));
                format!("bytes:{}", hex.collect::<String>())
            }
        }
    }
}

/// How the decoder of a `tokenizer.json` reads tokens.
fn spelling(decoder: &Value) -> Spelling {
    let stages = decoder["decoders"].as_array();
    let mut kinds =
        stages.into_iter().flatten().chain([decoder]).filter_map(|stage| stage["type"].as_str());
    kinds
        .find_map(|kind| match kind {
            "ByteLevel" => Some(Spelling::ByteLevel),
            "WordPiece" => Some(Spelling::WordPiece),
            _ => None,
        })
        .unwrap_or(Spelling::Pieces)
}

impl Spelling {
    fn bytes(self, token: &str) -> Vec<u8> {
        match self {
            Self::ByteLevel => token
                .chars()
                .map(byte_level)
                .collect::<Option<Vec<u8>>>()
                .unwrap_or_else(|| token.as_bytes().to_vec()),
            Self::Pieces => match byte_of(token) {
                Some(byte) => vec![byte],
                None => token.replace('▁', " ").into_bytes(),
            },
            Self::WordPiece => match token.strip_prefix("##") {
                Some(rest) => rest.as_bytes().to_vec(),
                None => format!(" {token}").into_bytes(),
            },
        }
    }
}

/// The byte of `<0x0A>`.
fn byte_of(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() == 2 { u8::from_str_radix(digits, 16).ok() } else { None }
}

/// The byte that a character of a byte-level vocabulary stands for: printable Latin-1 characters are
/// themselves, the other 68 bytes are U+0100 and up, in order.
fn byte_level(char: char) -> Option<u8> {
    let is_printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let code = u32::from(char);
    match u8::try_from(code) {
        Ok(byte) => is_printable(byte).then_some(byte),
        Err(_) => {
            (0..=255).filter(|&byte| !is_printable(byte)).nth(code.checked_sub(256)? as usize)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spellings_become_bytes() {
        assert_eq!(Spelling::ByteLevel.bytes("Ġthe"), b" the");
        assert_eq!(Spelling::ByteLevel.bytes("Ċ"), b"\n");
        assert_eq!(Spelling::ByteLevel.bytes("Ã©"), "é".as_bytes());
        assert_eq!(Spelling::Pieces.bytes("▁the"), b" the");
        assert_eq!(Spelling::Pieces.bytes("<0x0A>"), b"\n");
        assert_eq!(Spelling::WordPiece.bytes("##ing"), b"ing");
    }

    #[test]
    fn the_built_in_vocabulary_spells_its_texts() {
        let source = mmfree::builtin::checkpoint().unwrap().tokenizer().unwrap().unwrap();
        let tokenizer = Tokenizer::from_source(&source).unwrap();
        let vocabulary = Vocabulary::new(&source, &tokenizer, tokenizer.vocab_size());
        let text = "Once upon a time, naïve 日本 \u{1f600}\n\tEnd.";
        let ids = tokenizer.encode(text, true).unwrap();
        assert!(vocabulary.is_special(ids[0]));
        let bytes: Vec<u8> =
            ids[1..].iter().flat_map(|&id| vocabulary.bytes(id)).copied().collect();
        assert_eq!(bytes, text.as_bytes());
    }
}
