//! Perplexity and bits per byte of texts of any length, in constant memory.
//!
//! ```text
//! word perplexity = exp(−Σ ln P / words)        words = white-space runs + 1 of each document
//! byte perplexity = exp(−Σ ln P / bytes)        bits per byte = −Σ ln P / (bytes · ln 2)
//! ```
//!
//! Each document begins anew, with the model's first token. Rolling, every token is judged after all that
//! stand before it in its document. In windows of W tokens, as the harness cuts them, a token is judged after
//! those of its window, of which the first stands before the W that are judged; the last window goes back so
//! far that the model reads W tokens there, too.

use serde::Serialize;

use super::python::is_space;
use super::request::{Encoder, Request};
use super::scorer::{Score, Scorer};
use crate::error::Result;
use crate::tokenizer::EncodeSession;

/// What is known of some texts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Perplexity {
    /// `Σ ln P` of all tokens, in nats.
    pub log_likelihood: f64,
    /// Documents.
    pub documents: u64,
    /// Tokens that were judged.
    pub tokens: u64,
    /// Words, as the harness counts them.
    pub words: u64,
    /// Bytes of UTF-8.
    pub bytes: u64,
}

impl Perplexity {
    /// `exp(−ln P / words)`
    pub fn word_perplexity(&self) -> f64 {
        (-self.log_likelihood / self.words as f64).exp()
    }

    /// `exp(−ln P / bytes)`
    pub fn byte_perplexity(&self) -> f64 {
        (-self.log_likelihood / self.bytes as f64).exp()
    }

    /// `−ln P / (bytes · ln 2)`
    pub fn bits_per_byte(&self) -> f64 {
        -self.log_likelihood / (self.bytes as f64 * std::f64::consts::LN_2)
    }

    /// Mean of `−ln P` over tokens.
    pub fn loss(&self) -> f64 {
        -self.log_likelihood / self.tokens as f64
    }
}

/// Judges documents that are handed over in parts.
pub struct Meter<'a> {
    encoder: &'a Encoder<'a>,
    scorer: &'a mut dyn Scorer,
    /// Tokens of a window; `None` carries the state on.
    window: Option<usize>,
    /// Called now and then; an error stops the work.
    tick: &'a mut dyn FnMut() -> Result<()>,
    document: Option<Document<'a>>,
    total: Perplexity,
}

struct Document<'a> {
    session: EncodeSession<'a>,
    /// Ids that are not judged yet; in windows, the last window's inputs before them.
    ids: Vec<u32>,
    /// How many of `ids` only stand before what is judged next.
    before: usize,
    is_first_window: bool,
    is_in_space: bool,
}

/// Windows that are scored together.
const WINDOWS: usize = 16;

impl<'a> Meter<'a> {
    /// Begins. Without a window the scorer must be able to [`roll`](Scorer::roll).
    pub fn new(
        encoder: &'a Encoder<'a>,
        scorer: &'a mut dyn Scorer,
        window: Option<usize>,
        tick: &'a mut dyn FnMut() -> Result<()>,
    ) -> Self {
        Self { encoder, scorer, window, tick, document: None, total: Perplexity::default() }
    }

    /// The next part of a document.
    ///
    /// # Errors
    /// A text that the tokenizer cannot encode, errors of the model.
    pub fn push(&mut self, text: &str) -> Result<()> {
        if text.is_empty() {
            return Ok(());
        }
        let mut document = match self.document.take() {
            Some(document) => document,
            None => self.begin()?,
        };
        self.total.bytes += text.len() as u64;
        for c in text.chars() {
            let is_space = is_space(c);
            self.total.words += u64::from(is_space && !document.is_in_space);
            document.is_in_space = is_space;
        }
        document.session.push(text, &mut document.ids)?;
        self.judge(&mut document, false)?;
        self.document = Some(document);
        Ok(())
    }

    /// Ends a document. One without text counts nothing.
    ///
    /// # Errors
    /// As [`push`](Self::push).
    pub fn end_document(&mut self) -> Result<()> {
        let Some(mut document) = self.document.take() else { return Ok(()) };
        let session =
            std::mem::replace(&mut document.session, self.encoder.tokenizer().encode_session());
        session.finish(&mut document.ids)?;
        self.judge(&mut document, true)
    }

    /// What is known by now.
    pub fn total(&self) -> Perplexity {
        self.total
    }

    fn begin(&mut self) -> Result<Document<'a>> {
        let start = self.encoder.start()?;
        self.scorer.restart(start);
        self.total.documents += 1;
        self.total.words += 1;
        let mut ids = Vec::new();
        let mut before = 0;
        if self.window.is_some() {
            // As the harness has it: the first token, and then what the tokenizer puts before a text.
            ids.push(start);
            ids.extend(self.encoder.tokenizer().prefix());
            before = 1;
        }
        Ok(Document {
            session: self.encoder.tokenizer().encode_session(),
            ids,
            before,
            is_first_window: true,
            is_in_space: false,
        })
    }

    fn judge(&mut self, document: &mut Document<'_>, is_end: bool) -> Result<()> {
        match self.window {
            None => self.roll(document),
            Some(window) => self.judge_windows(document, window, is_end),
        }
    }

    fn add(&mut self, score: Score) {
        self.total.log_likelihood += score.log_likelihood;
        self.total.tokens += score.tokens as u64;
    }

    fn roll(&mut self, document: &mut Document<'_>) -> Result<()> {
        const PART: usize = 4096;
        for part in document.ids.chunks(PART) {
            (self.tick)()?;
            if let Some(score) = self.scorer.roll(part)? {
                self.add(score);
            }
        }
        document.ids.clear();
        Ok(())
    }

    /// Scores whole windows, and at the end the last one.
    fn judge_windows(
        &mut self,
        document: &mut Document<'_>,
        window: usize,
        is_end: bool,
    ) -> Result<()> {
        loop {
            let mut requests: Vec<Vec<Request>> = Vec::new();
            // One token stands before the window's.
            let mut start = document.before;
            while requests.len() < WINDOWS {
                let left = document.ids.len() - start;
                if left == 0 || left < window && !is_end {
                    break;
                }
                let end = start + left.min(window);
                // The first window is as long as it is; a later one that is short begins further left.
                let from = if document.is_first_window {
                    start - 1
                } else {
                    end.saturating_sub(window + 1)
                };
                let tokens = document.ids[from..end].to_vec();
                requests.push(vec![Request { context: start - from, tokens }]);
                document.is_first_window = false;
                start = end;
            }
            if requests.is_empty() {
                return Ok(());
            }
            let tick = &mut *self.tick;
            let scores = self.scorer.score(&requests, &mut |_| tick())?;
            for score in scores.into_iter().flatten() {
                self.add(score);
            }
            // What a short last window may need is kept.
            let kept = start.saturating_sub(window + 1);
            document.ids.drain(..kept);
            document.before = start - kept;
        }
    }
}
