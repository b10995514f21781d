//! One text that is being written: from logits to tokens, text and its end.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use llguidance::Matcher;
use mmfree::engine::{Draw, Sequence, Want};
use mmfree::error::{Error, Result};
use mmfree::sampler::{Sampler, SamplingParams};
use mmfree::state::State;
use mmfree::text::stop::StopMatcher;
use mmfree::tokenizer::{StreamDecoder, Tokenizer};
use tokio::sync::mpsc::Sender;
use tokio::sync::mpsc::error::TrySendError;

use super::job::{Choice, Client, Event, EventKind, Failure, FinishReason, Finished, TextOptions};
use super::logprobs::{TokenLogprob, token_logprob};

/// Events to one choice. What the reader has no room for waits here, and so does the text.
pub(super) struct Outbox {
    choice: usize,
    events: Sender<Event>,
    waiting: VecDeque<EventKind>,
    full_since: Option<Instant>,
}

/// Where an outbox stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Delivery {
    /// Everything was taken.
    Done,
    /// The reader is slower than the text.
    Waiting,
    /// The reader has gone, or took nothing for too long.
    Gone,
}

impl Outbox {
    pub(super) fn new(choice: usize, events: Sender<Event>) -> Self {
        Self { choice, events, waiting: VecDeque::new(), full_since: None }
    }

    pub(super) fn push(&mut self, kind: EventKind) {
        self.waiting.push_back(kind);
    }

    pub(super) fn deliver(&mut self, patience: Duration) -> Delivery {
        while let Some(kind) = self.waiting.pop_front() {
            match self.events.try_send(Event { choice: self.choice, kind }) {
                Ok(()) => self.full_since = None,
                Err(TrySendError::Closed(_)) => return Delivery::Gone,
                Err(TrySendError::Full(event)) => {
                    self.waiting.push_front(event.kind);
                    let since = *self.full_since.get_or_insert_with(Instant::now);
                    let is_over = since.elapsed() > patience;
                    return if is_over { Delivery::Gone } else { Delivery::Waiting };
                }
            }
        }
        if self.events.is_closed() { Delivery::Gone } else { Delivery::Done }
    }
}

/// A text that is being written.
pub(super) struct Writer<'a> {
    pub client: Client,
    pub state: State,
    /// The token that was drawn last and has to be read next.
    pub next: u32,
    pub outbox: Outbox,
    /// When it was last part of a step, in steps.
    pub last_step: u64,
    /// What the state has read, for the prefix cache; `None` if it began elsewhere.
    pub history: Option<Vec<u32>>,
    text: Text<'a>,
    options: Arc<TextOptions>,
    sampler: Sampler,
    constraint: Option<Box<Matcher>>,
    recent: Vec<u32>,
    drawn: u64,
    counts: HashMap<u32, u32>,
    stopped_by: Option<String>,
}

/// What a step made of a text.
pub(super) enum Outcome {
    /// `next` has to be read.
    Continues,
    /// The text is complete and its last event is in the outbox.
    Ended,
}

impl<'a> Writer<'a> {
    pub(super) fn new(
        client: Client,
        choice: Choice,
        options: Arc<TextOptions>,
        tokenizer: Option<&'a Tokenizer>,
        state: State,
        prompt: &[u32],
        events: Sender<Event>,
    ) -> Result<Self> {
        let params = SamplingParams { seed: choice.seed, ..options.sampling.clone() };
        let keep = prompt.len().saturating_sub(params.repetition_window);
        Ok(Self {
            client,
            state,
            next: 0,
            outbox: Outbox::new(choice.index, events),
            last_step: 0,
            history: None,
            text: Text::new(tokenizer, &options)?,
            sampler: Sampler::new(params)?,
            constraint: choice.constraint,
            recent: prompt[keep..].to_vec(),
            options,
            drawn: 0,
            counts: HashMap::new(),
            stopped_by: None,
        })
    }

    /// How many tokens were drawn.
    pub(super) fn drawn(&self) -> u64 {
        self.drawn
    }

    /// Its part in a step: the token to read, and what is wanted of what comes next. Only the host has logits with masks, biases
    /// and log-probabilities.
    pub(super) fn part(&mut self) -> (Sequence<'_>, Want<'_>) {
        let options = &*self.options;
        let needs_logits = self.constraint.is_some()
            || options.logprobs.is_some()
            || !options.logit_bias.is_empty()
            || options.presence_penalty != 0.0
            || options.frequency_penalty != 0.0;
        let tokens = std::slice::from_ref(&self.next);
        let want = if needs_logits {
            Want::Logits
        } else {
            Want::Token(Draw { sampler: &mut self.sampler, recent: &self.recent })
        };
        (Sequence { state: &mut self.state, tokens }, want)
    }

    /// Takes the next token, if the engine has drawn it, or draws it from the logits `[V]` after what was read so far.
    pub(super) fn advance(
        &mut self,
        drawn: Option<u32>,
        logits: &mut [f32],
        eos: &[u32],
    ) -> Outcome {
        let outcome = match drawn {
            Some(token) => self.accept(token, None, eos),
            None => self.draw(logits, eos),
        };
        outcome.unwrap_or_else(|error| self.fail(Failure::Engine(error.to_string())))
    }

    fn draw(&mut self, logits: &mut [f32], eos: &[u32]) -> Result<Outcome> {
        if self.options.max_tokens == 0 {
            return self.finish(FinishReason::Length, None);
        }
        let logprobs = self.options.logprobs.map(|count| (count, logits.to_vec()));
        self.penalise(logits);
        if let Some(constraint) = &mut self.constraint {
            let mask = match constraint.compute_mask_or_eos() {
                Ok(mask) => mask,
                Err(error) => return Ok(self.fail(Failure::Grammar(error.to_string()))),
            };
            for (id, logit) in logits.iter_mut().enumerate() {
                if id >= mask.len() || !mask.is_allowed(id as u32) {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
        let token = self.sampler.sample(logits, &self.recent)?;
        let logprob = logprobs.map(|(count, logits)| token_logprob(&logits, token, count));
        self.accept(token, logprob, eos)
    }

    /// A token was drawn: its text, and whether it ends the text.
    fn accept(
        &mut self,
        token: u32,
        logprob: Option<TokenLogprob>,
        eos: &[u32],
    ) -> Result<Outcome> {
        self.drawn += 1;
        self.next = token;
        let is_end = !self.options.ignore_eos && eos.contains(&token);
        let mut is_complete = false;
        if let Some(constraint) = &mut self.constraint {
            if let Err(error) = constraint.consume_token(token) {
                return Ok(self.fail(Failure::Grammar(error.to_string())));
            }
            is_complete = constraint.is_stopped();
        }
        if is_end {
            self.outbox.push(EventKind::Token { id: token, text: String::new(), logprob });
            return self.finish(FinishReason::EndOfText, None);
        }
        let window = self.sampler.params().repetition_window;
        if window > 0 {
            if self.recent.len() >= window {
                self.recent.drain(..=self.recent.len() - window);
            }
            self.recent.push(token);
        }
        if self.options.presence_penalty != 0.0 || self.options.frequency_penalty != 0.0 {
            *self.counts.entry(token).or_default() += 1;
        }
        let mut text = String::new();
        self.stopped_by = self.text.push(token, &mut text)?;
        self.outbox.push(EventKind::Token { id: token, text, logprob });
        if self.stopped_by.is_some() {
            return self.finish(FinishReason::StopString, Some(token));
        }
        if is_complete {
            return self.finish(FinishReason::EndOfText, Some(token));
        }
        if self.drawn >= self.options.max_tokens {
            return self.finish(FinishReason::Length, Some(token));
        }
        Ok(Outcome::Continues)
    }

    /// OpenAI's penalties: a token that was drawn c times loses c·frequency + presence.
    fn penalise(&self, logits: &mut [f32]) {
        let TextOptions { presence_penalty, frequency_penalty, logit_bias, .. } = &*self.options;
        for (&id, &count) in &self.counts {
            logits[id as usize] -= count as f32 * frequency_penalty + presence_penalty;
        }
        for &(id, bias) in logit_bias {
            logits[id as usize] += bias;
        }
    }

    /// Ends a text whose `next` token has not been read, because the server stops.
    pub(super) fn stop(&mut self) {
        let next = self.next;
        if let Err(error) = self.finish(FinishReason::Shutdown, Some(next)) {
            self.fail(Failure::Engine(error.to_string()));
        }
    }

    /// Ends a text with an error.
    pub(super) fn fail(&mut self, failure: Failure) -> Outcome {
        self.outbox.push(EventKind::Failed(failure));
        Outcome::Ended
    }

    fn finish(&mut self, reason: FinishReason, unread: Option<u32>) -> Result<Outcome> {
        let mut text = String::new();
        if reason != FinishReason::StopString {
            self.text.finish(&mut text)?;
        }
        let state = self.options.keep_state.then(|| (self.state.clone(), Vec::from_iter(unread)));
        self.outbox.push(EventKind::Finished(Box::new(Finished {
            reason,
            text,
            completion_tokens: self.drawn,
            stopped_by: self.stopped_by.take(),
            state,
        })));
        Ok(Outcome::Ended)
    }
}

/// Turns tokens into text that ends before the first stop string.
struct Text<'a> {
    decoder: Option<StreamDecoder<'a>>,
    stop: StopMatcher,
    decoded: String,
    trims: bool,
}

impl<'a> Text<'a> {
    fn new(tokenizer: Option<&'a Tokenizer>, options: &TextOptions) -> Result<Self> {
        if tokenizer.is_none() && !options.stop.is_empty() {
            return Err(Error::Invalid("stop strings need a model with a tokenizer".into()));
        }
        Ok(Self {
            decoder: tokenizer.map(|tokenizer| tokenizer.stream_decoder(true)),
            stop: StopMatcher::new(options.stop.clone())?,
            decoded: String::new(),
            trims: options.trim_start,
        })
    }

    /// Appends what `token` completes; returns the stop string that came up.
    fn push(&mut self, token: u32, out: &mut String) -> Result<Option<String>> {
        let Some(decoder) = &mut self.decoder else { return Ok(None) };
        self.decoded.clear();
        decoder.push(token, &mut self.decoded)?;
        let stop = self.stop.push(&self.decoded, out).map(str::to_owned);
        self.trim(out);
        Ok(stop)
    }

    fn finish(&mut self, out: &mut String) -> Result<()> {
        let Some(decoder) = &mut self.decoder else { return Ok(()) };
        self.decoded.clear();
        decoder.finish(&mut self.decoded)?;
        if self.stop.push(&self.decoded, out).is_none() {
            self.stop.finish(out);
        }
        self.trim(out);
        Ok(())
    }

    fn trim(&mut self, out: &mut String) {
        if self.trims {
            let start = out.len() - out.trim_start().len();
            out.drain(..start);
            self.trims = out.is_empty();
        }
    }
}
