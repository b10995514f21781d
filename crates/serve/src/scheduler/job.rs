//! What the scheduler is asked for, and what it answers.

use std::sync::Arc;
use std::time::Instant;

use llguidance::Matcher;
use mmfree::sampler::SamplingParams;
use mmfree::state::State;
use tokio::sync::mpsc::Sender;

use super::logprobs::TokenLogprob;

/// Who asks: what fairness and the isolation of caches go by.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Client(pub Arc<str>);

/// A prompt and the texts that are to follow it.
pub(crate) struct Job {
    pub client: Client,
    /// Tokens to read. At least one.
    pub prompt: Vec<u32>,
    /// The state to read them from; `None` is the empty one, and then the prefix cache may help.
    pub start: Option<State>,
    /// Report the log-probability of each prompt token, and so many of the likeliest in its place.
    pub prompt_logprobs: Option<usize>,
    pub choices: Vec<Choice>,
    pub options: Arc<TextOptions>,
    pub events: Sender<Event>,
    pub submitted: Instant,
}

/// One text to write.
pub(crate) struct Choice {
    /// Its number in the request, named in every event.
    pub index: usize,
    pub seed: u64,
    /// What the text must look like.
    pub constraint: Option<Box<Matcher>>,
}

/// How texts are written, shared by the choices of a request.
#[derive(Clone, Debug, Default)]
pub(crate) struct TextOptions {
    pub max_tokens: u64,
    pub stop: Vec<String>,
    pub ignore_eos: bool,
    /// The seed is each choice's own.
    pub sampling: SamplingParams,
    pub presence_penalty: f32,
    pub frequency_penalty: f32,
    /// Added to logits, by token id.
    pub logit_bias: Vec<(u32, f32)>,
    /// Report log-probabilities of drawn tokens, and so many of the likeliest.
    pub logprobs: Option<usize>,
    /// Leave out white space at the start of the text.
    pub trim_start: bool,
    /// Hand back the state at the end.
    pub keep_state: bool,
}

/// What happened to one choice.
#[derive(Debug)]
pub(crate) struct Event {
    pub choice: usize,
    pub kind: EventKind,
}

#[derive(Debug)]
pub(crate) enum EventKind {
    /// The prompt is being read: the wait in the queue is over.
    Admitted,
    /// The prompt was read.
    PromptRead {
        cached_tokens: usize,
        /// Of all prompt tokens but the first.
        logprobs: Vec<TokenLogprob>,
    },
    /// A token was drawn and this text completed, which may be none. An end-of-text token has none.
    Token { id: u32, text: String, logprob: Option<TokenLogprob> },
    /// The text ended.
    Finished(Box<Finished>),
    /// The text could not be written.
    Failed(Failure),
}

/// The end of a text.
#[derive(Debug)]
pub(crate) struct Finished {
    pub reason: FinishReason,
    /// Text that was held back as the possible start of a stop string.
    pub text: String,
    pub completion_tokens: u64,
    /// The stop string that came up.
    pub stopped_by: Option<String>,
    /// With `keep_state`: the state, and the tokens that were drawn and not read yet.
    pub state: Option<(State, Vec<u32>)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FinishReason {
    /// An end-of-text token, or the end of what a grammar allows.
    EndOfText,
    /// A stop string; the model has read it.
    StopString,
    /// The limit on tokens.
    Length,
    /// The server is shutting down and could not wait.
    Shutdown,
}

impl FinishReason {
    /// The word that OpenAI's API has for it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::EndOfText | Self::StopString => "stop",
            Self::Length | Self::Shutdown => "length",
        }
    }
}

/// Why a text could not be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    /// The grammar cannot go on, or is too costly.
    Grammar(String),
    /// The engine failed.
    Engine(String),
    /// The server is shutting down.
    ShuttingDown,
}
