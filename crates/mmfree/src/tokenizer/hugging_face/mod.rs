//! Hugging Face pipelines (`tokenizer.json`), run by the `tokenizers` crate.

mod cut;
mod decode;
mod session;
mod split;
mod words;

use std::panic::{AssertUnwindSafe, catch_unwind};

use tokenizers::models::ModelWrapper;
use tokenizers::{PaddingParams, Tokenizer};

use self::cut::Cuts;
pub(super) use self::decode::TokenDecoder;
pub(super) use self::session::Session;
pub(super) use self::split::Splitter;
use self::words::Words;
use super::quiet_panic;
use crate::error::{Error, Result};

/// A loaded pipeline.
#[derive(Debug)]
pub(super) struct HuggingFace {
    inner: Tokenizer,
    cuts: Option<Cuts>,
    words: Option<Words>,
    /// Ids that the post-processor puts before and after a text.
    pub(super) prefix: Vec<u32>,
    pub(super) suffix: Vec<u32>,
}

impl HuggingFace {
    /// Reads a `tokenizer.json`. Truncation, padding and dropout are switched off.
    ///
    /// # Errors
    /// A file that is no valid pipeline.
    pub(super) fn parse(json: &[u8]) -> Result<Self> {
        let mut inner = guarded("load tokenizer.json", || Tokenizer::from_bytes(json))?;
        inner.with_truncation(None).map_err(|error| failed("load tokenizer.json", &error))?;
        inner.with_padding(None::<PaddingParams>);
        if let ModelWrapper::BPE(bpe) = inner.get_model()
            && bpe.dropout.is_some()
        {
            let mut bpe = bpe.clone();
            bpe.dropout = None;
            inner.with_model(bpe);
        }
        let cuts = Cuts::of(&inner);
        let (prefix, suffix) = special_ids(&inner)?;
        let words = Words::of(&inner);
        Ok(Self { inner, cuts, words, prefix, suffix })
    }

    /// Ids of a text, without those of the post-processor.
    pub(super) fn encode(&self, text: &str) -> Result<Vec<u32>> {
        match &self.words {
            Some(words) => guarded("encode", || words.encode(&self.inner, text)),
            None => self.encode_by_stages(text),
        }
    }

    /// The same by all stages of the pipeline.
    fn encode_by_stages(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = guarded("encode", || self.inner.encode_fast(text, false))?;
        Ok(encoding.get_ids().to_vec())
    }

    pub(super) fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        guarded("decode", || self.inner.decode(ids, skip_special))
    }

    pub(super) fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    pub(super) fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    pub(super) fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Whether long texts can be encoded in parts.
    pub(super) fn is_cuttable(&self) -> bool {
        self.cuts.is_some()
    }
}

/// What the post-processor puts before and after a text.
fn special_ids(inner: &Tokenizer) -> Result<(Vec<u32>, Vec<u32>)> {
    let encoding = guarded("encode", || inner.encode_fast("a", true))?;
    let added = encoding.get_special_tokens_mask();
    let ids = encoding.get_ids();
    let start = added.iter().take_while(|&&mask| mask == 1).count();
    let end =
        added[start..].iter().rposition(|&mask| mask != 1).map_or(start, |last| start + last + 1);
    Ok((ids[..start].to_vec(), ids[end..].to_vec()))
}

/// Runs a call into the `tokenizers` crate; its errors, and its panics on malformed pipelines, become
/// errors of ours.
fn guarded<T>(action: &str, call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T> {
    match quiet_panic::silence(|| catch_unwind(AssertUnwindSafe(call))) {
        Ok(result) => result.map_err(|error| failed(action, &error)),
        Err(_) => Err(Error::Tokenizer(format!(
            "cannot {action}: the pipeline in tokenizer.json is malformed"
        ))),
    }
}

fn failed(action: &str, error: &dyn std::fmt::Display) -> Error {
    Error::Tokenizer(format!("cannot {action}: {error}"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The short way gives the ids of the long one: with and without a space before the text, with added
    /// tokens inside it, and with words that are looked up.
    #[test]
    fn remembered_words_have_the_ids_of_the_pipeline() {
        let fixture =
            concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/tokenizers/byte-level.json");
        let json = std::fs::read_to_string(fixture).unwrap();
        let other = json.replace("\"add_prefix_space\":false", "\"add_prefix_space\":true");
        assert_ne!(json, other);
        let piece = prop_oneof![
            4 => "[a-zA-Z']{1,8}",
            4 => " {1,3}",
            2 => "[ \t\n\r\u{a0}\u{3000}\u{85}]{1,4}",
            2 => "[0-9.,!?'/-]{1,5}",
            1 => "'s|'t|'re|'ve|'m|'ll|'d|'S|<s>|</s>|<mask>|<\\|end\\|>",
            1 => "\\PC{0,6}",
            1 => any::<String>(),
        ];
        let text = prop::collection::vec(piece, 0..30).prop_map(|pieces| pieces.concat());
        for json in [json, other] {
            let pipeline = HuggingFace::parse(json.as_bytes()).unwrap();
            assert!(pipeline.words.is_some());
            proptest!(ProptestConfig::with_cases(1000), |(text in &text)| {
                let expected = pipeline.encode_by_stages(&text).unwrap();
                prop_assert_eq!(pipeline.encode(&text).unwrap(), expected);
            });
        }
    }
}
