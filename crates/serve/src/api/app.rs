//! What all handlers share.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use mmfree::model::Model;
use mmfree::text::chat::ChatTemplate;
use mmfree::tokenizer::Tokenizer;
use ring::digest;
use subtle::{Choice, ConstantTimeEq};

use super::request::Caller;
use crate::constraint::Grammars;
use crate::error::{ApiError, ApiResult};
use crate::metrics::Metrics;
use crate::options::Options;
use crate::scheduler::Scheduler;
use crate::sessions::{Session, SessionKey, Sessions, Turn};
use crate::vocabulary::Vocabulary;

/// The served model, the way to its engine, and everything around it.
pub(crate) struct App {
    pub options: Options,
    pub model: Arc<Model>,
    pub fingerprint: String,
    pub tokenizer: Option<Arc<Tokenizer>>,
    pub template: ChatTemplate,
    pub vocabulary: Vocabulary,
    pub eos: Vec<u32>,
    pub grammars: Option<Arc<Grammars>>,
    pub scheduler: Scheduler,
    pub sessions: Arc<Sessions>,
    pub metrics: Arc<Metrics>,
    pub started: u64,
    pub is_ending: AtomicBool,
    /// Digests of the keys: of equal length, so that comparing them tells nothing.
    pub keys: Vec<[u8; 32]>,
    /// A moving average of the wait in the queue, in milliseconds.
    pub wait_millis: AtomicU64,
}

/// The digest of a key.
pub(crate) fn key_digest(key: &[u8]) -> [u8; 32] {
    digest::digest(&digest::SHA256, key).as_ref().try_into().expect("SHA-256 has 32 bytes")
}

impl App {
    /// Whether a key is one of the server's, in a time that does not depend on which, or how nearly.
    pub(crate) fn has_key(&self, digest: &[u8; 32]) -> bool {
        let found = self.keys.iter().fold(Choice::from(0), |found, key| found | key.ct_eq(digest));
        found.into()
    }

    /// Bytes of one state.
    pub(crate) fn state_bytes(&self) -> usize {
        let config = self.model.config();
        4 * config.num_hidden_layers * config.hidden_size
    }

    /// How long a new request may have to wait, in seconds.
    pub(crate) fn expected_wait(&self) -> u64 {
        let average = self.wait_millis.load(Ordering::Relaxed);
        let waiting = self.scheduler.queued() as u64;
        1 + (average * (1 + waiting / 64)) / 1000
    }

    /// Takes a wait into the average.
    pub(crate) fn note_wait(&self, wait: Duration) {
        let wait = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
        let average = self.wait_millis.load(Ordering::Relaxed);
        // Two at once may lose one: it is an estimate.
        self.wait_millis.store((average * 15 + wait.min(600_000)) / 16, Ordering::Relaxed);
    }

    /// Begins a turn of a caller's session.
    pub(crate) async fn begin_turn(&self, caller: &Caller, name: &str) -> ApiResult<Turn> {
        let key = SessionKey::new(caller.owner.clone(), name, "session_id")?;
        self.sessions.begin(key).await
    }

    /// What a session remembers; `None` if it is new.
    pub(crate) fn read_session(&self, turn: &Turn) -> ApiResult<Option<Session>> {
        let read = |bytes| {
            Session::from_bytes(&self.model, bytes).map_err(|why| {
                ApiError::conflict(format!(
                    "{why} (DELETE /v1/sessions/{} forgets it)",
                    turn.name()
                ))
            })
        };
        turn.bytes().map(read).transpose()
    }

    /// Ids of a text and the text. A text that begins a sequence gets what belongs before texts; an empty one
    /// is then the begin-of-text token, as in `mmfree generate`.
    pub(crate) fn encode(&self, text: &str, is_start: bool) -> ApiResult<Vec<u32>> {
        let tokenizer = self.tokenizer.as_ref().ok_or_else(|| {
            ApiError::invalid("prompt", "this model has no tokenizer: give the prompt as token ids")
        })?;
        let mut ids = if is_start { tokenizer.prefix().to_vec() } else { Vec::new() };
        if text.is_empty() && is_start && ids.is_empty() {
            ids.extend(tokenizer.bos().or(self.model.config().bos_token_id));
        }
        let more = tokenizer
            .encode(text, false)
            .map_err(|error| ApiError::invalid("prompt", error.to_string()))?;
        ids.extend(more);
        Ok(ids)
    }

    /// Writes what was asked into the log, if that is wanted.
    pub(crate) fn log_prompt(&self, prompt: &impl std::fmt::Debug) {
        if self.options.logs_prompts {
            tracing::info!(prompt = ?prompt, "prompt");
        }
    }

    /// Writes what was answered into the log, if that is wanted.
    pub(crate) fn log_text(&self, text: &str) {
        if self.options.logs_prompts {
            tracing::info!(text, "text");
        }
    }
}
