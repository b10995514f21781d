//! Text to normalised text: replacement rules, white space, dummy prefix.

use std::collections::HashSet;

use super::proto::ModelProto;
use crate::error::{Error, Result};

/// U+2581, which stands for a space inside pieces.
pub(super) const ESCAPED_SPACE: &str = "\u{2581}";

/// No rule of a real model is longer; ends walks through a hostile trie that runs in circles.
const MAX_RULE_BYTES: usize = 1024;

/// The normaliser of one model.
#[derive(Debug)]
pub(super) struct Normalizer {
    rules: Option<CharsMap>,
    user_defined: UserDefined,
    add_dummy_prefix: bool,
    remove_extra_whitespaces: bool,
    escape_whitespaces: bool,
}

/// What a text that is normalised in parts remembers from one part to the next.
#[derive(Clone, Debug, Default)]
pub(super) struct Progress {
    started: bool,
    previous_is_space: bool,
}

impl Normalizer {
    pub(super) fn new(model: &ModelProto, user_defined: UserDefined) -> Result<Self> {
        let rules = match model.precompiled_charsmap.as_slice() {
            [] => None,
            blob => Some(CharsMap::parse(blob)?),
        };
        Ok(Self {
            rules,
            user_defined,
            add_dummy_prefix: model.add_dummy_prefix,
            remove_extra_whitespaces: model.remove_extra_whitespaces,
            escape_whitespaces: model.escape_whitespaces,
        })
    }

    pub(super) fn user_defined(&self) -> &UserDefined {
        &self.user_defined
    }

    pub(super) fn strips_leading_space(&self) -> bool {
        self.add_dummy_prefix || self.remove_extra_whitespaces
    }

    pub(super) fn removes_extra_whitespaces(&self) -> bool {
        self.remove_extra_whitespaces
    }

    /// What a space is written as.
    pub(super) fn space(&self) -> &'static str {
        if self.escape_whitespaces { ESCAPED_SPACE } else { " " }
    }

    /// Normalises the start of `text`, appends it to `out` and returns how many bytes of `text` were
    /// used: all of them if `last`, else as many as no later text can change.
    ///
    /// Trailing spaces are kept: [`trim_end`](Self::trim_end) removes them at the end of the text.
    pub(super) fn normalize(
        &self,
        progress: &mut Progress,
        text: &str,
        last: bool,
        out: &mut String,
    ) -> Result<usize> {
        let mut used = 0;
        while used < text.len() {
            let Some((mut replacement, length)) = self.prefix(&text[used..], last)? else { break };
            used += length;
            if !progress.started {
                if self.remove_extra_whitespaces && replacement == " " {
                    continue;
                }
                if self.add_dummy_prefix {
                    out.push_str(self.space());
                }
                progress.started = true;
                progress.previous_is_space = self.remove_extra_whitespaces;
            }
            if progress.previous_is_space {
                replacement = replacement.trim_start_matches(' ');
            }
            if !replacement.is_empty() {
                for part in replacement.split_inclusive(' ') {
                    match part.strip_suffix(' ') {
                        Some(word) => {
                            out.push_str(word);
                            out.push_str(self.space());
                        }
                        None => out.push_str(part),
                    }
                }
                progress.previous_is_space = replacement.ends_with(' ');
            }
            progress.previous_is_space &= self.remove_extra_whitespaces;
        }
        Ok(used)
    }

    /// Length of `normalized` without the spaces at its end that the model ignores.
    pub(super) fn trim_end(&self, normalized: &str) -> usize {
        if self.remove_extra_whitespaces {
            normalized.trim_end_matches(self.space()).len()
        } else {
            normalized.len()
        }
    }

    /// Replacement and length of the rule for the start of `text`; `None` if text that is yet to come
    /// could lengthen the match. A user-defined piece stands for itself, as does text without a rule.
    fn prefix<'a>(&'a self, text: &'a str, last: bool) -> Result<Option<(&'a str, usize)>> {
        match self.user_defined.prefix(text, last) {
            Match::NeedsMore => return Ok(None),
            Match::Found(length) => return Ok(Some((&text[..length], length))),
            Match::None => {}
        }
        if let Some(rules) = &self.rules {
            match rules.prefix(text.as_bytes(), last)? {
                RuleMatch::NeedsMore => return Ok(None),
                RuleMatch::Found { length, .. } if !text.is_char_boundary(length) => {
                    return Err(corrupt("a rule ends inside a character"));
                }
                RuleMatch::Found { replacement, length } => return Ok(Some((replacement, length))),
                RuleMatch::None => {}
            }
        }
        let length = text.chars().next().map_or(0, char::len_utf8);
        Ok(Some((&text[..length], length)))
    }
}

/// The user-defined pieces, which the normaliser leaves alone and the model never splits.
#[derive(Debug, Default)]
pub(super) struct UserDefined {
    pieces: HashSet<String>,
    /// Every proper prefix of a piece that ends at a character.
    prefixes: HashSet<String>,
}

/// How the user-defined pieces match the start of a text.
pub(super) enum Match {
    None,
    Found(usize),
    /// The text ends where a longer piece could go on.
    NeedsMore,
}

impl UserDefined {
    pub(super) fn new(pieces: HashSet<String>) -> Self {
        let prefixes = pieces
            .iter()
            .flat_map(|piece| piece.char_indices().skip(1).map(|(end, _)| piece[..end].to_owned()))
            .collect();
        Self { pieces, prefixes }
    }

    /// The longest piece that `text` starts with; `last` if the text goes no further.
    pub(super) fn prefix(&self, text: &str, last: bool) -> Match {
        if self.pieces.is_empty() {
            return Match::None;
        }
        let mut found = Match::None;
        for (start, char) in text.char_indices() {
            let end = start + char.len_utf8();
            let head = &text[..end];
            if self.pieces.contains(head) {
                found = Match::Found(end);
            }
            if !self.prefixes.contains(head) {
                return found;
            }
        }
        if last { found } else { Match::NeedsMore }
    }
}

/// The compiled replacement rules: a double-array trie (Darts) from byte strings to offsets into a
/// block of NUL-terminated replacements.
///
/// Layout: u32 LE size of the trie in bytes; the trie, one u32 LE a unit; the replacements.
#[derive(Debug)]
struct CharsMap {
    units: Vec<u32>,
    replacements: String,
}

enum RuleMatch<'a> {
    None,
    Found {
        replacement: &'a str,
        length: usize,
    },
    /// The text ends where a longer rule could go on.
    NeedsMore,
}

impl CharsMap {
    fn parse(blob: &[u8]) -> Result<Self> {
        let (size, rest) = blob.split_first_chunk::<4>().ok_or_else(|| corrupt("too short"))?;
        let size = u32::from_le_bytes(*size) as usize;
        if size == 0 || !size.is_multiple_of(4) || size > rest.len() {
            return Err(corrupt(format!("trie of {size} bytes in {} bytes of data", rest.len())));
        }
        let (trie, replacements) = rest.split_at(size);
        let units = trie.chunks_exact(4).map(|unit| u32::from_le_bytes(unit.try_into().unwrap()));
        let replacements =
            std::str::from_utf8(replacements).map_err(|e| corrupt(format!("replacements: {e}")))?;
        Ok(Self { units: units.collect(), replacements: replacements.to_owned() })
    }

    /// The longest rule that `text` starts with.
    fn prefix(&self, text: &[u8], last: bool) -> Result<RuleMatch<'_>> {
        let mut found = RuleMatch::None;
        let mut node = offset(self.unit(0)?);
        for (index, &byte) in text.iter().enumerate() {
            if index == MAX_RULE_BYTES {
                return Err(corrupt(format!("a rule is longer than {MAX_RULE_BYTES} bytes")));
            }
            node ^= usize::from(byte);
            let unit = self.unit(node)?;
            if unit & (1 << 31 | 0xff) != u32::from(byte) {
                return Ok(found);
            }
            node ^= offset(unit);
            if unit >> 8 & 1 == 1 {
                let start = (self.unit(node)? & !(1 << 31)) as usize;
                let tail = self
                    .replacements
                    .get(start..)
                    .ok_or_else(|| corrupt(format!("a rule points at byte {start}")))?;
                let end = tail.find('\0').ok_or_else(|| corrupt("a replacement has no end"))?;
                found = RuleMatch::Found { replacement: &tail[..end], length: index + 1 };
            }
        }
        Ok(if last { found } else { RuleMatch::NeedsMore })
    }

    fn unit(&self, node: usize) -> Result<u32> {
        self.units
            .get(node)
            .copied()
            .ok_or_else(|| corrupt(format!("the trie has {} units, not {node}", self.units.len())))
    }
}

/// Where a unit's children are, relative to it.
fn offset(unit: u32) -> usize {
    ((unit >> 10) << ((unit & 1 << 9) >> 6)) as usize
}

fn corrupt(what: impl std::fmt::Display) -> Error {
    Error::Tokenizer(format!("corrupt SentencePiece model: normalisation rules: {what}"))
}
