//! A short way for the commonest pipelines: byte-level BPE over the words that GPT-2's expression cuts out.
//!
//! The words of a text repeat, and what the model makes of a word does not depend on its neighbours. So the words
//! are cut out here, without copying them, and the ids of those seen before are looked up. Added tokens, the
//! normaliser and the model itself are the `tokenizers` crate's, so the ids are, too.

use std::collections::HashMap;
use std::sync::{LazyLock, Mutex, PoisonError};

use ahash::RandomState;
use regex_syntax::hir::{Class, HirKind};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::{Model, OffsetReferential, OffsetType, Tokenizer};

use super::decode::BYTE_CHARS;

/// Longest word that is remembered, in bytes, and most words: a few megabytes for each thread.
const MAX_WORD_BYTES: usize = 64;
const MAX_WORDS: usize = 1 << 16;

/// The short way of one tokenizer.
#[derive(Debug)]
pub(super) struct Words {
    add_prefix_space: bool,
    /// One for each thread that encodes: taken for a text and put back.
    caches: Mutex<Vec<Cache>>,
}

/// Ids of words.
#[derive(Debug, Default)]
struct Cache {
    /// Where the ids of a word begin in `ids`, and how many there are.
    places: HashMap<Box<str>, (u32, u32), RandomState>,
    ids: Vec<u32>,
}

impl Words {
    /// `None` if the pipeline cuts words in another way.
    pub(super) fn of(tokenizer: &Tokenizer) -> Option<Self> {
        match tokenizer.get_pre_tokenizer()? {
            PreTokenizerWrapper::ByteLevel(stage) if stage.use_regex => {
                Some(Self { add_prefix_space: stage.add_prefix_space, caches: Mutex::default() })
            }
            _ => None,
        }
    }

    /// Ids of a text, without those of the post-processor.
    pub(super) fn encode(&self, tokenizer: &Tokenizer, text: &str) -> tokenizers::Result<Vec<u32>> {
        let lock = || self.caches.lock().unwrap_or_else(PoisonError::into_inner);
        let mut cache = lock().pop().unwrap_or_default();
        let mut ids = Vec::with_capacity(text.len() / 3);
        let added = tokenizer.get_added_vocabulary();
        let pieces = added.extract_and_normalize(tokenizer.get_normalizer(), text);
        for (piece, _, tokens) in pieces.get_splits(OffsetReferential::Normalized, OffsetType::None)
        {
            if let Some(tokens) = tokens {
                ids.extend(tokens.iter().map(|token| token.id));
            } else if self.add_prefix_space && !piece.starts_with(' ') {
                cache.encode(tokenizer, &format!(" {piece}"), &mut ids)?;
            } else {
                cache.encode(tokenizer, piece, &mut ids)?;
            }
        }
        lock().push(cache);
        Ok(ids)
    }
}

impl Cache {
    fn encode(
        &mut self,
        tokenizer: &Tokenizer,
        mut text: &str,
        ids: &mut Vec<u32>,
    ) -> tokenizers::Result<()> {
        while !text.is_empty() {
            let (word, rest) = text.split_at(word_end(text));
            text = rest;
            if let Some(&(start, count)) = self.places.get(word) {
                ids.extend(&self.ids[start as usize..][..count as usize]);
                continue;
            }
            let spelled: String = word.bytes().map(|byte| BYTE_CHARS[usize::from(byte)]).collect();
            let first = ids.len();
            ids.extend(tokenizer.get_model().tokenize(&spelled)?.iter().map(|token| token.id));
            if word.len() <= MAX_WORD_BYTES {
                self.insert(word, &ids[first..]);
            }
        }
        Ok(())
    }

    fn insert(&mut self, word: &str, ids: &[u32]) {
        if self.places.len() == MAX_WORDS {
            self.places.clear();
            self.ids.clear();
        }
        // At most 64 ids a word, of 65,536 words.
        let place = (self.ids.len() as u32, ids.len() as u32);
        self.ids.extend(ids);
        self.places.insert(word.into(), place);
    }
}

/// What GPT-2's expression tells apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Letter,
    Number,
    Space,
    Other,
}

/// Bytes of the first match of GPT-2's expression in a text that is not empty:
/// `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`
fn word_end(text: &str) -> usize {
    const CONTRACTIONS: [&str; 7] = ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d"];
    if text.starts_with('\'')
        && let Some(end) = CONTRACTIONS.iter().find(|&&end| text.starts_with(end))
    {
        return end.len();
    }
    let after_space = text.strip_prefix(' ').unwrap_or(text);
    let kind = after_space.chars().next().map_or(Kind::Space, kind);
    if kind != Kind::Space {
        return text.len() - after_space.len() + run(after_space, kind).0;
    }
    match run(text, Kind::Space) {
        // The last white space before something else goes with that, unless it is alone.
        (end, last) if end < text.len() && last > 0 => last,
        (end, _) => end,
    }
}

/// Where the run of characters of one kind ends, and where its last character begins.
fn run(text: &str, of: Kind) -> (usize, usize) {
    let mut last = 0;
    for (start, char) in text.char_indices() {
        if kind(char) != of {
            return (start, last);
        }
        last = start;
    }
    (text.len(), last)
}

fn kind(char: char) -> Kind {
    static ASCII: [Kind; 128] = {
        let mut kinds = [Kind::Other; 128];
        let mut byte = 0;
        while byte < 128 {
            kinds[byte] = match byte as u8 {
                b'a'..=b'z' | b'A'..=b'Z' => Kind::Letter,
                b'0'..=b'9' => Kind::Number,
                b' ' | b'\t'..=b'\r' => Kind::Space,
                _ => Kind::Other,
            };
            byte += 1;
        }
        kinds
    };
    match ASCII.get(char as usize) {
        Some(&kind) => kind,
        None if is_in(&LETTERS, char) => Kind::Letter,
        None if is_in(&NUMBERS, char) => Kind::Number,
        None if char.is_whitespace() => Kind::Space,
        None => Kind::Other,
    }
}

type Ranges = Vec<(char, char)>;

/// The Unicode tables of the engine that would run the expression.
static LETTERS: LazyLock<Ranges> = LazyLock::new(|| class(r"\p{L}"));
static NUMBERS: LazyLock<Ranges> = LazyLock::new(|| class(r"\p{N}"));

fn class(expression: &str) -> Ranges {
    let parsed = regex_syntax::parse(expression).expect("a valid class");
    match parsed.kind() {
        HirKind::Class(Class::Unicode(class)) => {
            class.iter().map(|range| (range.start(), range.end())).collect()
        }
        _ => Ranges::new(),
    }
}

fn is_in(ranges: &Ranges, char: char) -> bool {
    let after = ranges.partition_point(|&(start, _)| start <= char);
    after > 0 && char <= ranges[after - 1].1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(mut text: &str) -> Vec<&str> {
        let mut words = Vec::new();
        while !text.is_empty() {
            let (word, rest) = text.split_at(word_end(text));
            words.push(word);
            text = rest;
        }
        words
    }

    #[test]
    fn words_are_cut_as_the_expression_says() {
        assert_eq!(
            words("It's 42, isn't\u{a0}it?"),
            ["It", "'s", " 42", ",", " isn", "'t", "\u{a0}", "it", "?"]
        );
        assert_eq!(words("a  b \n\n c  "), ["a", " ", " b", " \n\n", " c", "  "]);
        assert_eq!(words("\tx\n y 'll'"), ["\t", "x", "\n", " y", " '", "ll", "'"]);
        assert_eq!(words("žena ½ 日本 a\u{301}"), ["žena", " ½", " 日本", " a", "\u{301}"]);
    }

    #[test]
    fn every_character_has_its_class() {
        assert!(LETTERS.len() > 500 && NUMBERS.len() > 100);
        for char in ('\0'..='\u{2ffff}').step_by(7).chain('\0'..='\u{ff}') {
            let expected = match kind(char) {
                Kind::Letter => char.is_alphabetic(),
                Kind::Number => char.is_numeric(),
                Kind::Space => char.is_whitespace(),
                Kind::Other => !char.is_whitespace() && !char.is_ascii_alphanumeric(),
            };
            assert!(expected, "{char:?}");
        }
    }
}
