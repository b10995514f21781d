//! `POST /v1/completions`

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::extract::{Extension, State};
use axum::response::{IntoResponse, Response};

use super::generation::{Generation, Plan, blocking};
use super::stream::{Chunks, stream};
use super::types::{Completion, CompletionChoice, CompletionLogprobs, CompletionRequest, Prompt};
use super::{App, Body, Caller};
use crate::error::{ApiError, ApiResult};
use crate::scheduler::{Event, EventKind, TokenLogprob};
use crate::sessions::Session;

/// OpenAI's default.
const DEFAULT_MAX_TOKENS: u64 = 16;

/// Continues texts.
#[utoipa::path(
    post,
    path = "/v1/completions",
    request_body = CompletionRequest,
    responses(
        (status = 200, description = "The texts; with `stream` events of the same shape", content(
            (Completion = "application/json"), (String = "text/event-stream"))),
        (status = "4XX", description = "The request cannot be served", body = crate::error::ErrorBody),
        (status = "5XX", description = "The server failed or is busy", body = crate::error::ErrorBody),
    ),
    security((), ("key" = []))
)]
pub(crate) async fn completions(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Body(request): Body<CompletionRequest>,
) -> ApiResult<Response> {
    let common = request.common.check(&app, DEFAULT_MAX_TOKENS, request.logprobs)?;
    if request.suffix.is_some_and(|suffix| !suffix.is_empty()) {
        let message = "this model cannot write towards a text that follows; leave out suffix";
        return Err(ApiError::invalid("suffix", message));
    }
    if request.best_of.is_some_and(|best_of| best_of as usize != common.n) {
        return Err(ApiError::invalid("best_of", "best_of other than n is not supported"));
    }
    app.log_prompt(&request.prompt);
    let echo = request.echo.unwrap_or(false);
    let turn = match &request.common.session_id {
        None => None,
        Some(name) => Some(app.begin_turn(&caller, name).await?),
    };
    let session = turn.as_ref().map(|turn| app.read_session(turn)).transpose()?.flatten();
    if turn.is_some() && common.n > 1 {
        return Err(ApiError::invalid("n", "a session has one text at a time"));
    }
    let worker = app.clone();
    let has_turn = turn.is_some();
    let (prompts, start) =
        blocking(move || encode(&worker, request.prompt, has_turn, session)).await?;
    let mut builders = Vec::new();
    for prompt in &prompts {
        for _ in 0..common.n {
            builders.push(Builder::new(app.clone(), prompt, echo, request.logprobs.is_some())?);
        }
    }
    let plan = Plan {
        prompts: prompts.into_iter().map(|prompt| prompt.ids).collect(),
        n: common.n,
        seed: common.seed,
        prompt_logprobs: common.options.logprobs.filter(|_| echo),
        options: common.options,
        format: common.format,
        turn,
        start,
        turn_stops: Vec::new(),
    };
    let generation = Generation::start(app.clone(), caller.client, plan).await?;
    let answer = Answer { id: super::new_id("cmpl-"), created: super::unix_time(), app, builders };
    if common.streams {
        return Ok(stream(generation, answer, common.include_usage));
    }
    answer.collect(generation).await
}

/// A prompt as ids, and as the text that `echo` shows.
struct EncodedPrompt {
    ids: Vec<u32>,
    text: String,
    /// Leading ids that are no part of what was sent.
    unread: usize,
}

fn encode(
    app: &App,
    prompt: Option<Prompt>,
    has_turn: bool,
    session: Option<Session>,
) -> ApiResult<(Vec<EncodedPrompt>, Option<mmfree::state::State>)> {
    let is_start = session.is_none();
    let prompts = match prompt {
        None if !is_start => vec![(Vec::new(), String::new())],
        None => return Err(ApiError::invalid("prompt", "a prompt is needed")),
        Some(Prompt::Text(text)) => vec![text_prompt(app, text, is_start)?],
        Some(Prompt::Texts(texts)) if !texts.is_empty() => texts
            .into_iter()
            .map(|text| text_prompt(app, text, is_start))
            .collect::<ApiResult<_>>()?,
        Some(Prompt::Ids(ids)) => vec![ids_prompt(app, ids)?],
        Some(Prompt::ManyIds(many)) if !many.is_empty() => {
            many.into_iter().map(|ids| ids_prompt(app, ids)).collect::<ApiResult<_>>()?
        }
        Some(_) => return Err(ApiError::invalid("prompt", "there is no prompt in the array")),
    };
    if has_turn && prompts.len() > 1 {
        return Err(ApiError::invalid("prompt", "a session takes one prompt at a time"));
    }
    let mut prompts: Vec<EncodedPrompt> =
        prompts.into_iter().map(|(ids, text)| EncodedPrompt { ids, text, unread: 0 }).collect();
    let start = session.map(|session| {
        for prompt in &mut prompts {
            prompt.unread = session.unread.len();
            prompt.ids.splice(0..0, session.unread.iter().copied());
        }
        session.state
    });
    if prompts.iter().any(|prompt| prompt.ids.is_empty()) {
        let message = "the prompt is empty, and there is nothing to go on from; give some text";
        return Err(ApiError::invalid("prompt", message));
    }
    Ok((prompts, start))
}

fn text_prompt(app: &App, text: String, is_start: bool) -> ApiResult<(Vec<u32>, String)> {
    Ok((app.encode(&text, is_start)?, text))
}

fn ids_prompt(app: &App, ids: Vec<u32>) -> ApiResult<(Vec<u32>, String)> {
    let vocab_size = app.model.config().vocab_size;
    if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab_size) {
        let message = format!("token id {id} is outside the vocabulary of {vocab_size}");
        return Err(ApiError::invalid("prompt", message));
    }
    let text = app.tokenizer.as_ref().map(|tokenizer| tokenizer.decode(&ids, true)).transpose();
    let text = text.map_err(|error| ApiError::invalid("prompt", error.to_string()))?;
    Ok((ids, text.unwrap_or_default()))
}

/// Puts one choice together.
struct Builder {
    app: Arc<App>,
    /// With `echo`: the prompt's ids, text, and how many ids are no part of it.
    echo: Option<(Vec<u32>, String, usize)>,
    wants_logprobs: bool,
    /// Characters before the next token.
    offset: usize,
}

/// What an event adds to a choice.
#[derive(Default)]
struct Part {
    text: String,
    logprobs: Option<CompletionLogprobs>,
    finish_reason: Option<&'static str>,
}

impl Part {
    fn is_empty(&self) -> bool {
        self.text.is_empty() && self.logprobs.is_none() && self.finish_reason.is_none()
    }
}

impl Builder {
    fn new(
        app: Arc<App>,
        prompt: &EncodedPrompt,
        echo: bool,
        wants_logprobs: bool,
    ) -> ApiResult<Self> {
        let echo = echo.then(|| (prompt.ids.clone(), prompt.text.clone(), prompt.unread));
        Ok(Self { app, echo, wants_logprobs, offset: 0 })
    }

    fn take(&mut self, kind: EventKind) -> Part {
        match kind {
            EventKind::PromptRead { logprobs, .. } => {
                let Some((ids, text, unread)) = self.echo.take() else { return Part::default() };
                let logprobs = self.wants_logprobs.then(|| {
                    self.prompt_logprobs(&ids[unread..], &logprobs[unread.min(logprobs.len())..])
                });
                Part { text, logprobs, finish_reason: None }
            }
            EventKind::Token { id, text, logprob } => {
                let logprobs = logprob.map(|logprob| {
                    let mut all = CompletionLogprobs::default();
                    self.push(&mut all, id, Some(&logprob));
                    all
                });
                Part { text, logprobs, finish_reason: None }
            }
            EventKind::Finished(finished) => Part {
                text: finished.text,
                logprobs: None,
                finish_reason: Some(finished.reason.name()),
            },
            EventKind::Admitted | EventKind::Failed(_) => Part::default(),
        }
    }

    fn prompt_logprobs(&mut self, ids: &[u32], logprobs: &[TokenLogprob]) -> CompletionLogprobs {
        let mut all = CompletionLogprobs::default();
        // Nothing is known of the first.
        let known = std::iter::once(None).chain(logprobs.iter().map(Some));
        for (&id, logprob) in ids.iter().zip(known) {
            self.push(&mut all, id, logprob);
        }
        all
    }

    fn push(&mut self, all: &mut CompletionLogprobs, id: u32, logprob: Option<&TokenLogprob>) {
        let vocabulary = &self.app.vocabulary;
        all.tokens.push(vocabulary.show(id));
        all.token_logprobs.push(logprob.map(|logprob| logprob.logprob));
        all.top_logprobs.push(logprob.map(|logprob| {
            let mut top: BTreeMap<String, f32> = BTreeMap::new();
            // Of tokens that look the same the likeliest; the token itself is always there.
            for &(id, value) in logprob.top.iter().chain([&(logprob.id, logprob.logprob)]) {
                top.entry(vocabulary.show(id)).or_insert(value);
            }
            top
        }));
        all.text_offset.push(self.offset);
        if !vocabulary.is_special(id) {
            // A character counts where it begins.
            let is_start = |&&byte: &&u8| byte & 0xc0 != 0x80;
            self.offset += vocabulary.bytes(id).iter().filter(is_start).count();
        }
    }
}

struct Answer {
    id: String,
    created: u64,
    app: Arc<App>,
    builders: Vec<Builder>,
}

impl Answer {
    fn object(&self, choices: Vec<CompletionChoice>) -> Completion {
        Completion {
            id: self.id.clone(),
            object: "text_completion",
            created: self.created,
            model: self.app.options.model_name.clone(),
            system_fingerprint: self.app.fingerprint.clone(),
            choices,
            usage: None,
            session: None,
        }
    }

    async fn collect(mut self, mut generation: Generation) -> ApiResult<Response> {
        let choice = |index| CompletionChoice {
            index,
            text: String::new(),
            logprobs: None,
            finish_reason: None,
        };
        let mut choices: Vec<CompletionChoice> = (0..generation.choices()).map(choice).collect();
        while let Some(Event { choice, kind }) = generation.next().await? {
            let part = self.builders[choice].take(kind);
            let choice = &mut choices[choice];
            choice.text += &part.text;
            choice.finish_reason = part.finish_reason.or(choice.finish_reason);
            if let Some(new) = part.logprobs {
                let all = choice.logprobs.get_or_insert_default();
                all.tokens.extend(new.tokens);
                all.token_logprobs.extend(new.token_logprobs);
                all.top_logprobs.extend(new.top_logprobs);
                all.text_offset.extend(new.text_offset);
            }
        }
        for choice in &choices {
            self.app.log_text(&choice.text);
        }
        let mut object = self.object(choices);
        object.usage = Some(generation.usage);
        object.session = generation.session.take();
        Ok(axum::Json(object).into_response())
    }
}

impl Chunks for Answer {
    fn chunk(&mut self, Event { choice, kind }: Event, out: &mut Vec<u8>) {
        let part = self.builders[choice].take(kind);
        if part.is_empty() {
            return;
        }
        let Part { text, logprobs, finish_reason } = part;
        let choice = CompletionChoice { index: choice, text, logprobs, finish_reason };
        super::stream::write_event(&self.object(vec![choice]), out);
    }

    fn end(&mut self, generation: &Generation, include_usage: bool, out: &mut Vec<u8>) {
        if include_usage || generation.session.is_some() {
            let mut object = self.object(Vec::new());
            object.usage = include_usage.then_some(generation.usage);
            object.session = generation.session.clone();
            super::stream::write_event(&object, out);
        }
    }
}
