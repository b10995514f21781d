//! Prompt to text.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};

use super::stop::StopMatcher;
use crate::engine::{Draw, Engine};
use crate::error::{Error, Result};
use crate::sampler::{Sampler, SamplingParams};
use crate::state::State;
use crate::tokenizer::Tokenizer;

/// How a text is generated.
#[derive(Clone, Debug, Default)]
pub struct GenerateOptions {
    /// Ends the text after so many tokens; `None` does not.
    pub max_tokens: Option<u64>,
    /// Strings that end the text and are not part of it.
    pub stop: Vec<String>,
    /// Goes on after an end-of-text token.
    pub ignore_eos: bool,
    /// How tokens are drawn.
    pub sampling: SamplingParams,
}

/// What happens during generation, in order.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Event<'a> {
    /// So many tokens of the prompt have been fed.
    Prompt(u64),
    /// A token was drawn; an end-of-text token, too.
    Token(u32),
    /// Text was completed. Never empty, never part of a character, never part of a stop string.
    Text(&'a str),
}

/// Why a text ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// The model drew an end-of-text token.
    EndOfText,
    /// The limit on tokens was reached.
    Length,
    /// This stop string came up.
    Stop(String),
    /// The caller cancelled.
    Cancelled,
}

impl FinishReason {
    /// The reason in one word: `eos`, `length`, `stop` or `cancelled`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::EndOfText => "eos",
            Self::Length => "length",
            Self::Stop(_) => "stop",
            Self::Cancelled => "cancelled",
        }
    }
}

/// What was generated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Generation {
    /// Tokens fed as the prompt.
    pub prompt_tokens: u64,
    /// Tokens drawn, with an end-of-text token that ended the text.
    pub generated_tokens: u64,
    /// Why the text ended.
    pub finish: FinishReason,
}

/// Feeds `prompt`, an iterator over chunks of ids, and draws tokens until the text ends.
///
/// Memory does not grow with the prompt or the text. Without a tokenizer there are no [`Event::Text`]
/// and no stop strings. At the end `state` has seen the prompt and every drawn token except an
/// end-of-text token that ended the text, so that more can follow. `cancel` is looked at before each
/// token and inside a long prompt. On a GPU some tokens are drawn ahead, and those that come after the end
/// are forgotten.
///
/// # Errors
/// An empty prompt, ids outside the vocabulary, stop strings without a tokenizer, invalid logits, and
/// whatever the prompt or `on_event` reports.
pub fn generate(
    engine: &mut Engine,
    state: &mut State,
    tokenizer: Option<&Tokenizer>,
    prompt: impl IntoIterator<Item = Result<Vec<u32>>>,
    options: &GenerateOptions,
    cancel: &AtomicBool,
    on_event: &mut dyn FnMut(Event) -> Result<()>,
) -> Result<Generation> {
    let sampler = Sampler::new(options.sampling.clone())?;
    let mut text = TextOutput::new(tokenizer, &options.stop)?;
    let mut recent = Recent::new(options.sampling.repetition_window);
    let mut logits = Vec::new();
    let mut prompt_tokens = 0;
    for chunk in prompt {
        let chunk = chunk?;
        if chunk.is_empty() {
            continue;
        }
        match engine.prefill(state, &chunk, cancel) {
            Ok(last) => {
                logits.clear();
                logits.extend_from_slice(last);
            }
            Err(Error::Cancelled) => {
                let finish = FinishReason::Cancelled;
                return Ok(Generation { prompt_tokens, generated_tokens: 0, finish });
            }
            Err(error) => return Err(error),
        }
        recent.extend(&chunk);
        prompt_tokens += chunk.len() as u64;
        on_event(Event::Prompt(prompt_tokens))?;
    }
    if prompt_tokens == 0 {
        return Err(Error::Invalid("the prompt is empty; give at least one token".into()));
    }

    let eos: Vec<u32> = {
        let config = engine.model().config();
        config.eos_token_ids.iter().copied().chain(tokenizer.and_then(Tokenizer::eos)).collect()
    };
    let mut tokens = Tokens::new(engine, state, sampler, logits);
    let mut generated_tokens = 0;
    let finish = loop {
        let left = options.max_tokens.map_or(u64::MAX, |limit| limit - generated_tokens);
        if left == 0 {
            break FinishReason::Length;
        }
        if cancel.load(Ordering::Relaxed) {
            break FinishReason::Cancelled;
        }
        let token = tokens.draw(recent.tokens(), left)?;
        generated_tokens += 1;
        on_event(Event::Token(token))?;
        if !options.ignore_eos && eos.contains(&token) {
            break FinishReason::EndOfText;
        }
        tokens.read(token);
        recent.extend(&[token]);
        if let Some(stop) = text.push(token, on_event)? {
            break FinishReason::Stop(stop);
        }
    };
    tokens.finish()?;
    if !matches!(finish, FinishReason::Stop(_)) {
        text.finish(on_event)?;
    }
    Ok(Generation { prompt_tokens, generated_tokens, finish })
}

/// Tokens of a text, some of them drawn and read by the engine before anybody asks for them.
struct Tokens<'a> {
    engine: &'a mut Engine,
    state: &'a mut State,
    sampler: Sampler,
    /// How many tokens the engine draws at once.
    most: usize,
    /// Behind the prompt, until the first token is drawn.
    logits: Vec<f32>,
    /// Drawn and not asked for.
    ahead: VecDeque<u32>,
    /// The state before the engine's last call that drew ahead, and how many tokens the last one read.
    before: State,
    fed: usize,
    /// Tokens that count as read since then, of which the engine may have to be told the last.
    read: Vec<u32>,
}

impl<'a> Tokens<'a> {
    fn new(
        engine: &'a mut Engine,
        state: &'a mut State,
        sampler: Sampler,
        logits: Vec<f32>,
    ) -> Self {
        let (ahead, read) = (VecDeque::new(), Vec::new());
        let most = engine.tokens_ahead(&sampler);
        let before = State::new(engine.model());
        Self { engine, state, sampler, most, logits, ahead, before, fed: 0, read }
    }

    /// The next token, where at most `left` more are wanted. `recent` are the tokens so far.
    fn draw(&mut self, recent: &[u32], left: u64) -> Result<u32> {
        if let Some(token) = self.ahead.pop_front() {
            return Ok(token);
        }
        let Some(&last) = self.read.last() else {
            return self.sampler.sample(&mut self.logits, recent);
        };
        let count = usize::try_from(left).map_or(self.most, |left| self.most.min(left));
        if count > 1 {
            self.before.copy_from(self.state)?;
        }
        let draw = Draw { sampler: &mut self.sampler, recent };
        self.ahead = self.engine.sample(self.state, last, count, draw)?.into();
        self.fed = count;
        self.read.clear();
        self.read.push(last);
        self.ahead.pop_front().ok_or_else(|| Error::Invalid("no token was drawn".into()))
    }

    /// The last token belongs to what the state has read.
    fn read(&mut self, token: u32) {
        self.read.push(token);
    }

    /// Brings the state behind the tokens that were read.
    fn finish(&mut self) -> Result<()> {
        if self.read.len() < self.fed {
            std::mem::swap(self.state, &mut self.before);
            self.fed = 0;
        }
        for &token in self.read.get(self.fed..).unwrap_or_default() {
            self.engine.decode(self.state, token)?;
        }
        Ok(())
    }
}

/// Turns tokens into text events.
struct TextOutput<'a> {
    decoder: Option<crate::tokenizer::StreamDecoder<'a>>,
    stop: StopMatcher,
    decoded: String,
    certain: String,
}

impl<'a> TextOutput<'a> {
    fn new(tokenizer: Option<&'a Tokenizer>, stop: &[String]) -> Result<Self> {
        if tokenizer.is_none() && !stop.is_empty() {
            return Err(Error::Invalid("stop strings need a model with a tokenizer".into()));
        }
        Ok(Self {
            decoder: tokenizer.map(|tokenizer| tokenizer.stream_decoder(true)),
            stop: StopMatcher::new(stop.to_vec())?,
            decoded: String::new(),
            certain: String::new(),
        })
    }

    /// Takes a token; returns the stop string that it completes.
    fn push(
        &mut self,
        token: u32,
        on_event: &mut dyn FnMut(Event) -> Result<()>,
    ) -> Result<Option<String>> {
        let Some(decoder) = &mut self.decoder else { return Ok(None) };
        self.decoded.clear();
        decoder.push(token, &mut self.decoded)?;
        self.emit(on_event)
    }

    fn finish(&mut self, on_event: &mut dyn FnMut(Event) -> Result<()>) -> Result<()> {
        let Some(decoder) = &mut self.decoder else { return Ok(()) };
        self.decoded.clear();
        decoder.finish(&mut self.decoded)?;
        if self.emit(on_event)?.is_none() {
            self.certain.clear();
            self.stop.finish(&mut self.certain);
            if !self.certain.is_empty() {
                on_event(Event::Text(&self.certain))?;
            }
        }
        Ok(())
    }

    fn emit(&mut self, on_event: &mut dyn FnMut(Event) -> Result<()>) -> Result<Option<String>> {
        self.certain.clear();
        let stop = self.stop.push(&self.decoded, &mut self.certain).map(str::to_owned);
        if !self.certain.is_empty() {
            on_event(Event::Text(&self.certain))?;
        }
        Ok(stop)
    }
}

/// The last tokens, as many as the repetition penalty needs.
struct Recent {
    window: usize,
    tokens: Vec<u32>,
}

impl Recent {
    fn new(window: usize) -> Self {
        Self { window, tokens: Vec::new() }
    }

    fn extend(&mut self, tokens: &[u32]) {
        let new = &tokens[tokens.len().saturating_sub(self.window)..];
        let excess = (self.tokens.len() + new.len()).saturating_sub(self.window);
        self.tokens.drain(..excess);
        self.tokens.extend_from_slice(new);
    }

    fn tokens(&self) -> &[u32] {
        &self.tokens
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::engine::EngineOptions;
    use crate::model::Model;

    #[test]
    fn tokens_drawn_ahead_leave_no_trace() {
        let checkpoint = crate::builtin::checkpoint().expect("opens");
        let model = Arc::new(Model::load(&checkpoint).expect("loads"));
        let options = EngineOptions { threads: Some(1), backend: Some("cpu".to_owned()) };
        let mut engine = Engine::new(Arc::clone(&model), &options).expect("engine");
        let mut run = |most: usize, count: usize, reads_last: bool| {
            let mut state = State::new(&model);
            let logits = engine.prefill(&mut state, &[1, 2, 3], &AtomicBool::new(false));
            let logits = logits.expect("runs").to_vec();
            let sampler = Sampler::new(SamplingParams::default()).expect("valid");
            let mut tokens = Tokens::new(&mut engine, &mut state, sampler, logits);
            tokens.most = most;
            let mut text = vec![1, 2, 3];
            for at in 1..=count {
                let token = tokens.draw(&text, 100).expect("draws");
                text.push(token);
                if at < count || reads_last {
                    tokens.read(token);
                }
            }
            tokens.finish().expect("runs");
            (text, state)
        };
        for reads_last in [false, true] {
            for count in [0, 1, 2, 3, 5, 6, 7, 10, 11, 12] {
                let (expected, found) = (run(1, count, reads_last), run(5, count, reads_last));
                assert!(expected == found, "{count} tokens, {reads_last}");
                let read = 3 + count - usize::from(count > 0 && !reads_last);
                assert_eq!(found.1.tokens_seen(), read as u64);
            }
        }
    }

    #[test]
    fn recent_tokens_are_the_last_ones() {
        let mut recent = Recent::new(3);
        for chunk in [&[1, 2][..], &[3, 4, 5, 6], &[], &[7]] {
            recent.extend(chunk);
        }
        assert_eq!(recent.tokens(), [5, 6, 7]);
        let mut none = Recent::new(0);
        none.extend(&[1]);
        assert!(none.tokens().is_empty());
    }
}
