//! Where a text may be cut so that the parts encode to the same ids as the whole.
//!
//! Between neighbours (a, b) a text may be cut if no stage of the pipeline looks across that place:
//!
//! - normaliser: only kinds that work character by character or (Unicode forms) never join a character
//!   to a white-space one, and `Prepend`, which acts at the start of a text only;
//! - pre-tokenizer: its splitting expression always ends a match between a and b, whatever surrounds
//!   them, and never looks back across ([`Rule::Split`]); this is known of the expressions in
//!   [`SPLIT_PATTERNS`], of `ByteLevel`, of `Metaspace` and of the white-space splitters;
//! - without a splitting pre-tokenizer, a BPE model: a and b are neighbours in no token, so that no merge
//!   can ever join them ([`Rule::Pairs`]);
//! - added tokens: none contains a and b as neighbours, none takes in white space at that place.
//!
//! A pipeline with any other stage is not cut at all.

use std::collections::HashSet;

use serde_json::Value;
use tokenizers::models::ModelWrapper;
use tokenizers::models::bpe::BPE;
use tokenizers::{AddedToken, Tokenizer};

/// Splitting expressions that always end a match between a character that is no white space and a
/// space, and after a newline that a character other than white space and `/` follows.
const SPLIT_PATTERNS: [&str; 4] = [
    // cl100k and Llama 3.
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    // The same as tiktoken writes it.
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    // Qwen 2.
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    // o200k.
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
];

/// GPT-2's splitting expression, which `ByteLevel` has built in: every match ends before white space
/// that follows something else.
const GPT2_PATTERN: &str =
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

/// Where the texts of one tokenizer may be cut.
#[derive(Debug)]
pub(super) struct Cuts {
    rule: Rule,
    added: AddedTokens,
}

#[derive(Debug)]
enum Rule {
    /// Before white space that follows something else: any (`any_whitespace`) or only a space.
    /// With `after_newline` also where a line begins with something else than white space.
    Split { any_whitespace: bool, after_newline: bool },
    /// Between neighbours that are none in any token.
    Pairs {
        /// What the pipeline writes for a space.
        space: char,
        joined: HashSet<(char, char)>,
        /// The characters that are tokens, if a run of others is one unknown token: a cut must not
        /// divide such a run.
        known: Option<HashSet<char>>,
    },
}

/// What the added tokens, which are taken out before all else, forbid.
#[derive(Debug, Default)]
struct AddedTokens {
    joined: HashSet<(char, char)>,
    any_strips_left: bool,
    /// Last characters of tokens that take in the white space to their right.
    ends_that_strip_right: HashSet<char>,
}

impl Cuts {
    /// The rule of a tokenizer, `None` if its texts must be encoded whole.
    pub(super) fn of(tokenizer: &Tokenizer) -> Option<Self> {
        let normalizer = Normalization::of(&to_value(tokenizer.get_normalizer())?)?;
        let pre_tokenizer = to_value(tokenizer.get_pre_tokenizer())?;
        let added = tokenizer.get_added_tokens_decoder();
        let added = AddedTokens::of(added.values(), &normalizer)?;
        let rule = match unsplit_space(&pre_tokenizer, &normalizer) {
            Some(space) => pair_rule(tokenizer, space, &normalizer)?,
            None => split_rule(&pre_tokenizer, &normalizer)?,
        };
        Some(Self { rule, added })
    }

    /// Whether a text may be cut between these neighbours.
    pub(super) fn allow(&self, left: char, right: char) -> bool {
        let rule_allows = match &self.rule {
            Rule::Split { any_whitespace, after_newline } => {
                let before_whitespace = !left.is_whitespace()
                    && (right == ' ' || *any_whitespace && right.is_whitespace());
                let line_start =
                    *after_newline && left == '\n' && !right.is_whitespace() && right != '/';
                before_whitespace || line_start
            }
            Rule::Pairs { space, joined, known } => {
                let written = |char: char| if char == ' ' { *space } else { char };
                let (left, right) = (written(left), written(right));
                !joined.contains(&(left, right))
                    && known.as_ref().is_none_or(|known| known.contains(&left))
            }
        };
        rule_allows && self.added.allow(left, right)
    }
}

impl AddedTokens {
    /// `None` if a token's match depends on more than its own text and the white space beside it.
    fn of<'a>(
        tokens: impl Iterator<Item = &'a AddedToken>,
        normalizer: &Normalization,
    ) -> Option<Self> {
        let mut all = Self::default();
        for token in tokens {
            if token.single_word {
                return None;
            }
            all.any_strips_left |= token.lstrip;
            let pairs = token.content.chars().zip(token.content.chars().skip(1));
            if token.normalized {
                // Such a token matches normalised text, whose letters may differ from the raw ones;
                // what a cut sees of it must then not matter at all.
                let crosses = pairs.clone().any(|(a, b)| !a.is_whitespace() && b.is_whitespace());
                if token.rstrip || crosses || token.content.contains('\n') {
                    return None;
                }
                if normalizer.prepends {
                    all.joined.extend(token.content.chars().next().map(|first| (' ', first)));
                }
            } else if token.rstrip {
                all.ends_that_strip_right.extend(token.content.chars().last());
            }
            all.joined.extend(pairs);
        }
        Some(all)
    }

    fn allow(&self, left: char, right: char) -> bool {
        let inside_stripped = right.is_whitespace()
            && (self.ends_that_strip_right.contains(&left)
                || left.is_whitespace() && !self.ends_that_strip_right.is_empty());
        let beside_stripped = self.any_strips_left && left.is_whitespace();
        !(inside_stripped || beside_stripped || self.joined.contains(&(left, right)))
    }
}

/// What a normaliser does that matters to a cut.
#[derive(Debug, Default, PartialEq)]
struct Normalization {
    /// What it writes for a space, if it replaces spaces.
    space: Option<char>,
    prepends: bool,
    /// Whether characters change otherwise.
    changes_characters: bool,
}

impl Normalization {
    /// `None` for kinds that may look across a cut.
    fn of(value: &Value) -> Option<Self> {
        let mut all = Self::default();
        if value.is_null() {
            return Some(all);
        }
        match value["type"].as_str()? {
            "Sequence" => {
                for part in value["normalizers"].as_array()? {
                    let part = Self::of(part)?;
                    all.space = all.space.or(part.space);
                    all.prepends |= part.prepends;
                    all.changes_characters |= part.changes_characters;
                }
            }
            "NFC" | "NFD" | "NFKC" | "NFKD" | "Lowercase" => all.changes_characters = true,
            "Prepend" => all.prepends = true,
            "Replace" if value["pattern"]["String"] == " " => {
                all.space = Some(single_char(&value["content"])?);
            }
            _ => return None,
        }
        Some(all)
    }
}

/// If the pre-tokenizer leaves a text in one piece: what stands for a space in it.
fn unsplit_space(pre_tokenizer: &Value, normalizer: &Normalization) -> Option<char> {
    if pre_tokenizer.is_null() {
        return Some(normalizer.space.unwrap_or(' '));
    }
    let is_unsplit = pre_tokenizer["type"] == "Metaspace" && pre_tokenizer["split"] == false;
    let space = if is_unsplit { single_char(&pre_tokenizer["replacement"])? } else { return None };
    Some(normalizer.space.unwrap_or(space))
}

/// The rule of a splitting pre-tokenizer.
fn split_rule(pre_tokenizer: &Value, normalizer: &Normalization) -> Option<Rule> {
    let splits_at_metaspace = pre_tokenizer["type"] == "Metaspace"
        && normalizer.space.is_none_or(|space| {
            single_char(&pre_tokenizer["replacement"]).is_some_and(|own| own == space)
        });
    if normalizer.space.is_some() && !splits_at_metaspace {
        return None;
    }
    match split_effect(pre_tokenizer)? {
        Effect::Splits { any_whitespace, after_newline } => {
            Some(Rule::Split { any_whitespace, after_newline })
        }
        Effect::Neutral => None,
    }
}

/// What one pre-tokenizer does at a cut.
enum Effect {
    /// It may leave both sides in one piece, but splits either side as if alone.
    Neutral,
    Splits {
        any_whitespace: bool,
        after_newline: bool,
    },
}

fn split_effect(value: &Value) -> Option<Effect> {
    let splits = |any_whitespace, after_newline| Effect::Splits { any_whitespace, after_newline };
    Some(match value["type"].as_str()? {
        "ByteLevel" if value["use_regex"] == false => Effect::Neutral,
        "ByteLevel" | "Whitespace" | "WhitespaceSplit" | "BertPreTokenizer" => splits(true, false),
        "Metaspace" if value["split"] == true => splits(false, false),
        "Digits" | "Punctuation" => Effect::Neutral,
        "Split" => {
            let is_plain = value["behavior"] == "Isolated" && value["invert"] == false
                || value["behavior"] == "Removed" && value["invert"] == true;
            match value["pattern"]["Regex"].as_str()? {
                GPT2_PATTERN if is_plain => splits(true, false),
                pattern if is_plain && SPLIT_PATTERNS.contains(&pattern) => splits(false, true),
                _ => return None,
            }
        }
        "Sequence" => {
            let mut all = Effect::Neutral;
            for part in value["pretokenizers"].as_array()? {
                all = match (all, split_effect(part)?) {
                    (effect, Effect::Neutral) | (Effect::Neutral, effect) => effect,
                    (
                        Effect::Splits { any_whitespace: a, after_newline: b },
                        Effect::Splits { any_whitespace: c, after_newline: d },
                    ) => splits(a && c, b && d),
                };
            }
            all
        }
        _ => return None,
    })
}

/// The rule of a BPE model that sees a text in one piece.
fn pair_rule(tokenizer: &Tokenizer, space: char, normalizer: &Normalization) -> Option<Rule> {
    let ModelWrapper::BPE(bpe) = tokenizer.get_model() else { return None };
    if normalizer.changes_characters || has_word_marks(bpe) || bpe.ignore_merges {
        return None;
    }
    let vocabulary = bpe.get_vocab();
    if vocabulary.keys().any(|token| joins_bytes(token)) {
        return None;
    }
    let pairs = |token: &String| token.chars().zip(token.chars().skip(1)).collect::<Vec<_>>();
    let joined = vocabulary.keys().flat_map(pairs).collect();
    let single = |token: &String| single_char(&Value::from(token.as_str()));
    let fuses = bpe.fuse_unk && bpe.unk_token.is_some();
    let known = fuses.then(|| vocabulary.keys().filter_map(single).collect());
    Some(Rule::Pairs { space, joined, known })
}

/// Whether tokens carry a mark for the inside or the end of a word, which a cut would misplace.
fn has_word_marks(bpe: &BPE) -> bool {
    let is_set = |mark: &Option<String>| mark.as_ref().is_some_and(|mark| !mark.is_empty());
    is_set(&bpe.continuing_subword_prefix) || is_set(&bpe.end_of_word_suffix)
}

/// Whether a token joins byte tokens such as `<0x0A>` to something else; those spell characters that
/// do not appear in the token, so its neighbours say nothing.
fn joins_bytes(token: &str) -> bool {
    token.len() > 6
        && token.as_bytes().windows(6).any(|window| {
            window.starts_with(b"<0x")
                && window[3..5].iter().all(u8::is_ascii_hexdigit)
                && window[5] == b'>'
        })
}

fn single_char(value: &Value) -> Option<char> {
    let mut chars = value.as_str()?.chars();
    let first = chars.next()?;
    chars.next().is_none().then_some(first)
}

/// A pipeline stage as its JSON, null if absent.
fn to_value<T: serde::Serialize>(stage: Option<&T>) -> Option<Value> {
    stage.map_or(Some(Value::Null), |stage| serde_json::to_value(stage).ok())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn stages_that_look_across_a_cut_are_refused() {
        assert_eq!(Normalization::of(&json!({"type": "Strip"})), None);
        assert!(split_effect(&json!({"type": "UnicodeScripts"})).is_none());
        let split = json!({"type": "Split", "pattern": {"Regex": r"\s+|\S+ "},
            "behavior": "Isolated", "invert": false});
        assert!(split_effect(&split).is_none());
        let sequence = json!({"type": "Sequence", "pretokenizers": [{"type": "Digits"}, split]});
        assert!(split_effect(&sequence).is_none());
    }

    #[test]
    fn an_added_token_forbids_cuts_inside_it() {
        let token = AddedToken::from("a b", true);
        let added = AddedTokens::of([&token].into_iter(), &Normalization::default()).unwrap();
        assert!(!added.allow('a', ' '));
        assert!(added.allow('b', ' '));
        let strips = AddedToken::from("<m>", true).rstrip(true);
        let added = AddedTokens::of([&strips].into_iter(), &Normalization::default()).unwrap();
        assert!(!added.allow('>', ' '));
        assert!(!added.allow(' ', ' '));
        assert!(added.allow('a', ' '));
    }

    #[test]
    fn tokens_of_joined_bytes_are_seen() {
        assert!(joins_bytes("<0xE4><0xBD>"));
        assert!(!joins_bytes("<0xE4>"));
        assert!(!joins_bytes("<0xG4>abc"));
    }
}
