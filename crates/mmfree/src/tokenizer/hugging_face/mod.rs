//! Hugging Face pipelines (`tokenizer.json`), run by the `tokenizers` crate.

mod cut;
mod decode;
mod session;
mod split;

use std::panic::{AssertUnwindSafe, catch_unwind};

use tokenizers::models::ModelWrapper;
use tokenizers::{PaddingParams, Tokenizer};

use self::cut::Cuts;
pub(super) use self::decode::TokenDecoder;
pub(super) use self::session::Session;
pub(super) use self::split::Splitter;
use super::quiet_panic;
use crate::error::{Error, Result};

/// A loaded pipeline.
#[derive(Debug)]
pub(super) struct HuggingFace {
    inner: Tokenizer,
    cuts: Option<Cuts>,
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
        Ok(Self { inner, cuts, prefix, suffix })
    }

    /// Ids of a text, without those of the post-processor.
    pub(super) fn encode(&self, text: &str) -> Result<Vec<u32>> {
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
