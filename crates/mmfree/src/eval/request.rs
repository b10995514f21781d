//! Texts to tokens, and where the continuation begins.

use super::python::is_space;
use crate::error::{Error, Result};
use crate::tokenizer::Tokenizer;

/// A continuation of a context, as tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Context and continuation.
    pub tokens: Vec<u32>,
    /// Tokens of the context, at least one and fewer than all.
    pub context: usize,
}

impl Request {
    /// Cut on the left, so that the model reads at most `window` tokens.
    ///
    /// # Errors
    /// A continuation that is longer than the window.
    pub fn within(self, window: Option<usize>) -> Result<Self> {
        // The last token is only predicted.
        let Some(cut) =
            window.and_then(|window| self.tokens.len().checked_sub(window.saturating_add(1)))
        else {
            return Ok(self);
        };
        if cut >= self.context {
            return Err(Error::Invalid(format!(
                "a continuation of {} tokens does not fit into the model's {} tokens",
                self.tokens.len() - self.context,
                self.tokens.len() - 1 - cut
            )));
        }
        Ok(Self { context: self.context - cut, tokens: self.tokens[cut..].to_vec() })
    }
}

/// Encodes texts for a model.
#[derive(Debug)]
pub struct Encoder<'a> {
    tokenizer: &'a Tokenizer,
    /// Stands where there is no context: BOS, otherwise EOS.
    start: Option<u32>,
    start_text: Option<String>,
}

impl<'a> Encoder<'a> {
    /// For a model of `vocab_size` tokens, whose configuration may name the first and the last token where the
    /// tokenizer does not.
    ///
    /// # Errors
    /// A tokenizer with more tokens than the model.
    pub fn new(
        tokenizer: &'a Tokenizer,
        vocab_size: usize,
        bos: Option<u32>,
        eos: Option<u32>,
    ) -> Result<Self> {
        let tokens = tokenizer.vocab_size();
        if tokens > vocab_size {
            return Err(Error::Tokenizer(format!(
                "the tokenizer has {tokens} tokens, but the model's vocabulary has {vocab_size}: it is \
                 another model's"
            )));
        }
        let start = tokenizer.bos().or(bos).or(tokenizer.eos()).or(eos);
        let start_text = start.and_then(|start| tokenizer.token(start));
        Ok(Self { tokenizer, start, start_text })
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &'a Tokenizer {
        self.tokenizer
    }

    /// The token that stands where there is no context.
    ///
    /// # Errors
    /// The model has neither BOS nor EOS.
    pub fn start(&self) -> Result<u32> {
        self.start.ok_or_else(|| {
            let what = "the model has neither a BOS nor an EOS token to begin a text with";
            Error::Tokenizer(what.to_owned())
        })
    }

    /// Ids of a text that begins a sequence, with what the tokenizer puts around texts, unless the text begins
    /// with the first token's own text.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let has_start = self.start_text.as_ref().is_some_and(|start| text.starts_with(start));
        self.tokenizer.encode(text, !has_start)
    }

    /// Encodes a context and its continuation: as one text, of which the tokens of the context alone are the
    /// context. White space at the end of the context belongs to the continuation. An empty context is the
    /// first token.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`]; a continuation without a token of its own.
    pub fn pair(&self, context: &str, continuation: &str) -> Result<Request> {
        let request = if context.is_empty() {
            let mut tokens = self.tokenizer.encode(continuation, false)?;
            let start = self.start()?;
            if tokens.first() != Some(&start) {
                tokens.insert(0, start);
            }
            Request { tokens, context: 1 }
        } else {
            let trimmed = context.trim_end_matches(is_space);
            let tokens = self.encode(&[context, continuation].concat())?;
            let context = self.encode(trimmed)?.len();
            Request { tokens, context }
        };
        if request.context == 0 || request.context >= request.tokens.len() {
            return Err(Error::Tokenizer(format!(
                "with this tokenizer the continuation {continuation:?} has no token of its own, or its \
                 context has none"
            )));
        }
        Ok(request)
    }
}
