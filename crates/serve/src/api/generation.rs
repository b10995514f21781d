//! From a request to its texts: what both kinds of completion share.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Instant;

use mmfree::sampler::SamplingParams;
use mmfree::state::State;
use tokio::sync::mpsc;
use tokio::time::{self, timeout_at};

use super::App;
use super::types::{CommonRequest, PromptTokensDetails, ResponseFormat, SessionInfo, Stop, Usage};
use crate::constraint::Format;
use crate::error::{ApiError, ApiResult};
use crate::scheduler::{
    Choice, Client, Event, EventKind, FinishReason, Finished, Job, TextOptions,
};
use crate::sessions::{Session, Turn};

/// Fields of OpenAI's API that change nothing here, and are accepted.
const IGNORED_FIELDS: [&str; 8] = [
    "user",
    "store",
    "metadata",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "parallel_tool_calls",
    "reasoning_effort",
];
/// Stop strings of a request.
const MAX_STOPS: usize = 16;
/// Bytes of a stop string.
const MAX_STOP_BYTES: usize = 1024;
/// Entries of `logit_bias`.
const MAX_BIASES: usize = 1024;
/// Likeliest tokens that can be asked for.
const MAX_TOP_LOGPROBS: u32 = 20;
/// Events that wait for a reader, for each text.
const EVENTS_PER_CHOICE: usize = 32;

/// What is to be written.
pub(crate) struct Plan {
    pub prompts: Vec<Vec<u32>>,
    pub n: usize,
    pub seed: u64,
    pub options: TextOptions,
    pub format: Option<Format>,
    pub prompt_logprobs: Option<usize>,
    pub turn: Option<Turn>,
    pub start: Option<State>,
    /// Stop strings that begin the next turn.
    pub turn_stops: Vec<String>,
}

/// Fields that are checked and have their defaults.
pub(crate) struct Common {
    pub n: usize,
    pub seed: u64,
    pub options: TextOptions,
    pub format: Option<Format>,
    pub streams: bool,
    pub include_usage: bool,
}

impl CommonRequest {
    /// Checks everything that needs no tokenizer. `logprobs` is how many likely tokens are wanted.
    pub(crate) fn check(
        &self,
        app: &App,
        default_max_tokens: u64,
        logprobs: Option<u32>,
    ) -> ApiResult<Common> {
        if let Some(model) = self.model.as_deref().filter(|&model| model != app.options.model_name)
        {
            let message = format!(
                "the model {model:?} does not exist here; this server has {:?}",
                app.options.model_name
            );
            return Err(ApiError::not_found(message, "model_not_found"));
        }
        for (field, value) in &self.other {
            let is_nothing = value.is_null() || value.as_array().is_some_and(Vec::is_empty);
            if !is_nothing && !IGNORED_FIELDS.contains(&field.as_str()) {
                let message = format!("the field {field:?} is not supported");
                return Err(ApiError::invalid(field, message));
            }
        }
        let limits = &app.options.limits;
        let max_tokens = self.max_tokens.unwrap_or(default_max_tokens.min(limits.max_tokens));
        if max_tokens > limits.max_tokens {
            let message =
                format!("max_tokens is {max_tokens}, this server allows {}", limits.max_tokens);
            return Err(ApiError::invalid("max_tokens", message));
        }
        let n = self.n.unwrap_or(1) as usize;
        if n == 0 || n > limits.max_choices.min(limits.max_concurrent) {
            let most = limits.max_choices.min(limits.max_concurrent);
            return Err(ApiError::invalid("n", format!("n is {n}, expected 1 to {most}")));
        }
        let sampling = SamplingParams {
            temperature: self.temperature.unwrap_or(1.0),
            top_p: self.top_p.unwrap_or(1.0),
            top_k: self.top_k.unwrap_or(0) as usize,
            min_p: self.min_p.unwrap_or(0.0),
            repetition_penalty: self.repetition_penalty.unwrap_or(1.0),
            ..SamplingParams::default()
        };
        sampling.validate().map_err(|error| {
            let message = error.to_string();
            let param = message.split(' ').next().unwrap_or_default().replace('-', "_");
            ApiError::invalid(&param, message)
        })?;
        let penalty = |param: &str, value: Option<f32>| {
            let value = value.unwrap_or(0.0);
            match (-2.0..=2.0).contains(&value) {
                true => Ok(value),
                false => {
                    Err(ApiError::invalid(param, format!("{param} is {value}, expected -2 to 2")))
                }
            }
        };
        if logprobs.is_some_and(|count| count > MAX_TOP_LOGPROBS) {
            let message =
                format!("log-probabilities of at most {MAX_TOP_LOGPROBS} tokens can be had");
            return Err(ApiError::invalid("logprobs", message));
        }
        let seed = self.seed.map_or_else(super::random, |seed| seed as u64);
        let options = TextOptions {
            max_tokens,
            stop: self.stops()?,
            ignore_eos: self.ignore_eos.unwrap_or(false),
            sampling,
            presence_penalty: penalty("presence_penalty", self.presence_penalty)?,
            frequency_penalty: penalty("frequency_penalty", self.frequency_penalty)?,
            logit_bias: self.biases(app.model.config().vocab_size)?,
            logprobs: logprobs.map(|count| count as usize),
            trim_start: false,
            keep_state: self.session_id.is_some(),
        };
        let streams = self.stream.unwrap_or(false);
        let include_usage =
            self.stream_options.as_ref().and_then(|options| options.include_usage).unwrap_or(false);
        let format = self.format(limits.max_grammar_bytes)?;
        Ok(Common { n, seed, options, format, streams, include_usage })
    }

    fn stops(&self) -> ApiResult<Vec<String>> {
        let stops = match &self.stop {
            None => Vec::new(),
            Some(Stop::One(stop)) => vec![stop.clone()],
            Some(Stop::Many(stops)) => stops.clone(),
        };
        if stops.len() > MAX_STOPS {
            let message = format!("{} stop strings, expected {MAX_STOPS} at most", stops.len());
            return Err(ApiError::invalid("stop", message));
        }
        if stops.iter().any(|stop| stop.is_empty() || stop.len() > MAX_STOP_BYTES) {
            let message = format!("a stop string has 1 to {MAX_STOP_BYTES} bytes");
            return Err(ApiError::invalid("stop", message));
        }
        Ok(stops)
    }

    fn biases(&self, vocab_size: usize) -> ApiResult<Vec<(u32, f32)>> {
        let biases = self.logit_bias.iter().flatten();
        if biases.clone().count() > MAX_BIASES {
            let message = format!("expected at most {MAX_BIASES} entries");
            return Err(ApiError::invalid("logit_bias", message));
        }
        biases
            .map(|(id, &bias)| {
                let token = id.parse().ok().filter(|&id: &u32| (id as usize) < vocab_size);
                match token {
                    Some(token) if (-100.0..=100.0).contains(&bias) => Ok((token, bias)),
                    _ => {
                        let message = format!(
                            "{id:?}: {bias}: expected a token id below {vocab_size} and a bias of -100 to 100"
                        );
                        Err(ApiError::invalid("logit_bias", message))
                    }
                }
            })
            .collect()
    }

    fn format(&self, max_bytes: usize) -> ApiResult<Option<Format>> {
        let (format, bytes) = match &self.response_format {
            None | Some(ResponseFormat::Text) => return Ok(None),
            Some(ResponseFormat::JsonObject) => (Format::JsonObject, 0),
            Some(ResponseFormat::JsonSchema { json_schema }) => {
                let bytes = json_schema.schema.to_string().len();
                (Format::JsonSchema(json_schema.schema.clone()), bytes)
            }
            Some(ResponseFormat::Regex { regex }) => (Format::Regex(regex.clone()), regex.len()),
            Some(ResponseFormat::Grammar { grammar }) => {
                (Format::Grammar(grammar.clone()), grammar.len())
            }
        };
        if bytes > max_bytes {
            let message = format!("the format has {bytes} bytes, this server allows {max_bytes}");
            return Err(ApiError::invalid("response_format", message));
        }
        Ok(Some(format))
    }
}

/// Runs what takes processor time off the threads that serve connections.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> ApiResult<T> + Send + 'static,
) -> ApiResult<T> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|_| Err(ApiError::internal("a part of the request made the server panic")))
}

/// Texts in work. Dropping it cancels them.
pub(crate) struct Generation {
    app: Arc<App>,
    events: mpsc::Receiver<Event>,
    deadline: Instant,
    queue_deadline: Instant,
    started: Instant,
    /// Texts that wait for their place, and texts that have not ended.
    waiting: usize,
    unfinished: usize,
    last_token: Vec<Option<Instant>>,
    pub usage: Usage,
    prompts_read: HashSet<usize>,
    n: usize,
    turn: Option<Turn>,
    turn_stops: Vec<String>,
    pub session: Option<SessionInfo>,
}

impl Generation {
    /// Queues the texts of a plan.
    pub(crate) async fn start(app: Arc<App>, client: Client, plan: Plan) -> ApiResult<Self> {
        let limits = &app.options.limits;
        let count = plan.prompts.len() * plan.n;
        let most = limits.max_choices.min(limits.max_concurrent);
        if count > most {
            let message = format!("{count} texts (prompts times n), expected {most} at most");
            return Err(ApiError::invalid("prompt", message));
        }
        for prompt in &plan.prompts {
            if prompt.len() > limits.max_prompt_tokens {
                let message = format!(
                    "the prompt has {} tokens, this server reads {}; a longer text can be read in several turns of a session",
                    prompt.len(),
                    limits.max_prompt_tokens
                );
                return Err(ApiError::invalid("prompt", message));
            }
        }
        let mut constraints = match plan.format {
            None => Vec::new(),
            Some(format) => {
                let grammars = app.grammars.clone().ok_or_else(|| {
                    let message =
                        "this model has no tokenizer or no end-of-text token, which a format needs";
                    ApiError::invalid("response_format", message)
                })?;
                blocking(move || {
                    let matcher = grammars
                        .compile(&format)
                        .map_err(|why| ApiError::invalid("response_format", why))?;
                    // A copy for each text that shares nothing with the others.
                    Ok((0..count).map(|_| Some(Box::new(matcher.deep_clone()))).collect())
                })
                .await?
            }
        };
        constraints.resize_with(count, || None);
        let mut constraints = constraints.into_iter();
        let (sender, events) = mpsc::channel(EVENTS_PER_CHOICE * count + count);
        let options = Arc::new(plan.options);
        let started = Instant::now();
        let prompt_tokens = plan.prompts.iter().map(|prompt| prompt.len() as u64).sum();
        let mut start = plan.start;
        let jobs = plan.prompts.into_iter().enumerate().map(|(at, prompt)| Job {
            client: client.clone(),
            prompt,
            start: start.take(),
            prompt_logprobs: plan.prompt_logprobs,
            choices: (0..plan.n)
                .map(|number| Choice {
                    index: at * plan.n + number,
                    seed: plan.seed.wrapping_add((at * plan.n + number) as u64),
                    constraint: constraints.next().flatten(),
                })
                .collect(),
            options: options.clone(),
            events: sender.clone(),
            submitted: started,
        });
        app.scheduler.submit(jobs.collect()).map_err(|refusal| {
            app.metrics.rejected.inc();
            ApiError::refused(refusal, app.expected_wait())
        })?;
        Ok(Self {
            deadline: started + limits.request_timeout,
            queue_deadline: started + limits.queue_timeout,
            started,
            events,
            waiting: count,
            unfinished: count,
            last_token: vec![None; count],
            usage: Usage { prompt_tokens, ..Usage::default() },
            prompts_read: HashSet::new(),
            n: plan.n,
            turn: plan.turn,
            turn_stops: plan.turn_stops,
            session: None,
            app,
        })
    }

    /// Number of texts.
    pub(crate) fn choices(&self) -> usize {
        self.last_token.len()
    }

    /// Whether an event is there without waiting.
    pub(crate) fn has_more(&self) -> bool {
        !self.events.is_empty()
    }

    /// The next event; `None` when all texts have ended. When the last has, its session is saved.
    pub(crate) async fn next(&mut self) -> ApiResult<Option<Event>> {
        loop {
            if self.unfinished == 0 {
                return Ok(None);
            }
            let is_waiting = self.waiting > 0;
            let until =
                if is_waiting { self.deadline.min(self.queue_deadline) } else { self.deadline };
            let event = match timeout_at(time::Instant::from_std(until), self.events.recv()).await {
                Ok(Some(event)) => event,
                Ok(None) => {
                    return Err(ApiError::internal(
                        "the text was dropped: its reader took nothing for too long, or the engine failed",
                    ));
                }
                Err(_) if is_waiting && until < self.deadline => {
                    self.app.metrics.rejected.inc();
                    let message = "no place became free in time; retry later";
                    return Err(ApiError::busy(message, self.app.expected_wait()));
                }
                Err(_) => {
                    let message = format!(
                        "the request took longer than {:?}",
                        self.app.options.limits.request_timeout
                    );
                    return Err(ApiError::timeout(message));
                }
            };
            match &event.kind {
                EventKind::Admitted => {
                    self.waiting -= 1;
                    self.app.note_wait(self.started.elapsed());
                    continue;
                }
                EventKind::PromptRead { cached_tokens, .. } => {
                    if self.prompts_read.insert(event.choice / self.n) {
                        let PromptTokensDetails { cached_tokens: sum } =
                            &mut self.usage.prompt_tokens_details;
                        *sum += *cached_tokens as u64;
                    }
                }
                EventKind::Token { .. } => self.note_token(event.choice),
                EventKind::Finished(finished) => {
                    self.unfinished -= 1;
                    self.usage.completion_tokens += finished.completion_tokens;
                    self.usage.total_tokens =
                        self.usage.prompt_tokens + self.usage.completion_tokens;
                    self.save(finished).await?;
                }
                EventKind::Failed(failure) => return Err(failure.clone().into()),
            }
            return Ok(Some(event));
        }
    }

    fn note_token(&mut self, choice: usize) {
        let now = Instant::now();
        match self.last_token[choice].replace(now) {
            None => {
                self.app.metrics.first_token_seconds.observe((now - self.started).as_secs_f64())
            }
            Some(last) => self.app.metrics.token_seconds.observe((now - last).as_secs_f64()),
        }
    }

    async fn save(&mut self, finished: &Finished) -> ApiResult<()> {
        let Some(turn) = &mut self.turn else { return Ok(()) };
        let Some((state, unread)) = finished.state.clone() else { return Ok(()) };
        let has_seen_stop = finished.reason == FinishReason::StopString
            && finished.stopped_by.as_ref().is_some_and(|stop| self.turn_stops.contains(stop));
        let session = Session { state, unread, has_seen_stop };
        turn.save(session.to_bytes(&self.app.model)).await?;
        self.session = Some(SessionInfo {
            id: turn.name().to_owned(),
            tokens_seen: session.state.tokens_seen() + session.unread.len() as u64,
            state_bytes: self.app.state_bytes(),
        });
        Ok(())
    }
}
