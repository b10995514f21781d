//! `POST /v1/chat/completions`

use std::sync::Arc;

use axum::extract::{Extension, State};
use axum::response::{IntoResponse, Response};
use mmfree::text::chat::Message;

use super::generation::{Generation, Plan, blocking};
use super::stream::{Chunks, stream};
use super::types::{
    ChatChoice, ChatCompletion, ChatLogprobs, ChatMessage, ChatRequest, ChatTokenLogprob, Content,
    Delta, ReplyMessage, TopLogprob,
};
use super::{App, Body, Caller};
use crate::error::{ApiError, ApiResult};
use crate::scheduler::{Event, EventKind, FinishReason, TokenLogprob};
use crate::sessions::Session;

/// What `mmfree chat` has, too.
const DEFAULT_MAX_TOKENS: u64 = 512;
/// Messages of a request.
const MAX_MESSAGES: usize = 4096;

/// Replies to a conversation.
#[utoipa::path(
    post,
    path = "/v1/chat/completions",
    request_body = ChatRequest,
    responses(
        (status = 200, description = "The replies; with `stream` events with deltas", content(
            (ChatCompletion = "application/json"), (String = "text/event-stream"))),
        (status = "4XX", description = "The request cannot be served", body = crate::error::ErrorBody),
        (status = "5XX", description = "The server failed or is busy", body = crate::error::ErrorBody),
    ),
    security((), ("key" = []))
)]
pub(crate) async fn chat(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Body(mut request): Body<ChatRequest>,
) -> ApiResult<Response> {
    if let Some(max_tokens) = request.max_completion_tokens {
        if request.common.max_tokens.is_some_and(|other| other != max_tokens) {
            let message = "it differs from max_tokens; give one of them";
            return Err(ApiError::invalid("max_completion_tokens", message));
        }
        request.common.max_tokens = Some(max_tokens);
    }
    let wants_logprobs = request.logprobs.unwrap_or(false);
    if request.top_logprobs.is_some() && !wants_logprobs {
        return Err(ApiError::invalid("top_logprobs", "it needs logprobs: true"));
    }
    let logprobs = wants_logprobs.then(|| request.top_logprobs.unwrap_or(0));
    let mut common = request.common.check(&app, DEFAULT_MAX_TOKENS, logprobs)?;
    let messages = messages(request.messages)?;
    app.log_prompt(&messages);
    // A reply begins after a space in most templates.
    common.options.trim_start = true;
    let turn_stops = app.template.stop();
    common.options.stop.extend(turn_stops.iter().cloned());

    let turn = match &request.common.session_id {
        None => None,
        Some(_) if common.n > 1 => {
            return Err(ApiError::invalid("n", "a session has one reply at a time"));
        }
        Some(name) => Some(app.begin_turn(&caller, name).await?),
    };
    let session = turn.as_ref().map(|turn| app.read_session(turn)).transpose()?.flatten();
    let worker = app.clone();
    let (prompt, start) = blocking(move || encode(&worker, &messages, session)).await?;
    let plan = Plan {
        prompts: vec![prompt],
        n: common.n,
        seed: common.seed,
        options: common.options,
        format: common.format,
        prompt_logprobs: None,
        turn,
        start,
        turn_stops,
    };
    let generation = Generation::start(app.clone(), caller.client, plan).await?;
    let answer = Answer {
        id: super::new_id("chatcmpl-"),
        created: super::unix_time(),
        app,
        has_role: Vec::new(),
    };
    if common.streams {
        return Ok(stream(generation, answer, common.include_usage));
    }
    answer.collect(generation, wants_logprobs).await
}

/// Checks messages.
fn messages(messages: Vec<ChatMessage>) -> ApiResult<Vec<Message>> {
    if messages.is_empty() || messages.len() > MAX_MESSAGES {
        let message = format!("{} messages, expected 1 to {MAX_MESSAGES}", messages.len());
        return Err(ApiError::invalid("messages", message));
    }
    let check = |message: ChatMessage| {
        let role = match message.role.as_str() {
            role @ ("system" | "user" | "assistant") => role,
            "developer" => "system",
            other => {
                let why = format!(
                    "the role {other:?} is not supported: expected system, developer, user or assistant"
                );
                return Err(ApiError::invalid("messages", why));
            }
        };
        for (field, value) in &message.other {
            if !value.is_null() && !["name", "refusal", "annotations"].contains(&field.as_str()) {
                return Err(ApiError::invalid(
                    "messages",
                    format!("the field {field:?} is not supported"),
                ));
            }
        }
        let content = match message.content {
            Content::Text(text) => text,
            Content::Parts(parts) => {
                let mut text = String::new();
                for part in parts {
                    match (part.r#type.as_str(), part.text) {
                        ("text", Some(new)) => text += &new,
                        (other, _) => {
                            let why = format!(
                                "a part of the type {other:?} cannot be read: this model reads text only"
                            );
                            return Err(ApiError::invalid("messages", why));
                        }
                    }
                }
                text
            }
        };
        Ok(Message::new(role, content))
    };
    messages.into_iter().map(check).collect()
}

/// The ids to read, from which state.
fn encode(
    app: &App,
    messages: &[Message],
    session: Option<Session>,
) -> ApiResult<(Vec<u32>, Option<mmfree::state::State>)> {
    let Some(tokenizer) = &app.tokenizer else {
        return Err(ApiError::bad_request(
            "this model has no tokenizer, so nobody can talk with it",
        ));
    };
    let template = &app.template;
    let refuse = |error: mmfree::error::Error| ApiError::invalid("messages", error.to_string());
    let mut ids = Vec::new();
    let mut start = None;
    let text = match session {
        None => {
            if template.is_plain() {
                ids.extend_from_slice(tokenizer.prefix());
            }
            template.render(messages, true).map_err(refuse)?
        }
        Some(session) => {
            let [message] = messages else {
                let why = format!(
                    "this session exists and remembers what was said: send the new message only, not {} messages (DELETE /v1/sessions/ID forgets it)",
                    messages.len()
                );
                return Err(ApiError::invalid("messages", why));
            };
            if message.role != "user" {
                let why = format!(
                    "a session goes on with a message of the user, not of the role {:?}",
                    message.role
                );
                return Err(ApiError::invalid("messages", why));
            }
            ids.extend(&session.unread);
            let text = template
                .next_turn(None, &message.content, session.has_seen_stop)
                .map_err(refuse)?;
            start = Some(session.state);
            text
        }
    };
    ids.extend(tokenizer.encode_with_special_text(&text).map_err(refuse)?);
    if ids.is_empty() {
        return Err(ApiError::invalid("messages", "the chat template makes no text of them"));
    }
    Ok((ids, start))
}

struct Answer {
    id: String,
    created: u64,
    app: Arc<App>,
    /// Of a stream: which choices have said whose words come.
    has_role: Vec<bool>,
}

impl Answer {
    fn object(&self, object: &'static str, choices: Vec<ChatChoice>) -> ChatCompletion {
        ChatCompletion {
            id: self.id.clone(),
            object,
            created: self.created,
            model: self.app.options.model_name.clone(),
            system_fingerprint: self.app.fingerprint.clone(),
            choices,
            usage: None,
            session: None,
        }
    }

    fn logprob(&self, logprob: &TokenLogprob) -> ChatTokenLogprob {
        let vocabulary = &self.app.vocabulary;
        let top = |&(id, logprob): &(u32, f32)| TopLogprob {
            token: vocabulary.show(id),
            logprob,
            bytes: vocabulary.bytes(id).to_vec(),
        };
        ChatTokenLogprob {
            token: vocabulary.show(logprob.id),
            logprob: logprob.logprob,
            bytes: vocabulary.bytes(logprob.id).to_vec(),
            top_logprobs: logprob.top.iter().map(top).collect(),
        }
    }

    async fn collect(
        self,
        mut generation: Generation,
        wants_logprobs: bool,
    ) -> ApiResult<Response> {
        let count = generation.choices();
        let mut contents = vec![String::new(); count];
        let mut logprobs = vec![wants_logprobs.then(ChatLogprobs::default); count];
        let mut reasons = vec![None; count];
        while let Some(Event { choice, kind }) = generation.next().await? {
            match kind {
                EventKind::Token { text, logprob, .. } => {
                    contents[choice] += &text;
                    if let (Some(all), Some(logprob)) = (&mut logprobs[choice], logprob) {
                        all.content.push(self.logprob(&logprob));
                    }
                }
                EventKind::Finished(finished) => {
                    contents[choice] += &finished.text;
                    reasons[choice] = Some(finished.reason.name());
                    if finished.reason == FinishReason::EndOfText
                        && let Some(all) = &mut logprobs[choice]
                        && finished.state.as_ref().is_none_or(|(_, unread)| unread.is_empty())
                    {
                        drop_end(&self.app, all);
                    }
                }
                _ => {}
            }
        }
        let choices = contents.into_iter().zip(logprobs).zip(reasons).enumerate();
        let choices = choices.map(|(index, ((content, logprobs), finish_reason))| {
            self.app.log_text(&content);
            let message = ReplyMessage { role: "assistant", content, refusal: None };
            ChatChoice { index, message: Some(message), delta: None, logprobs, finish_reason }
        });
        let mut object = self.object("chat.completion", choices.collect());
        object.usage = Some(generation.usage);
        object.session = generation.session.take();
        Ok(axum::Json(object).into_response())
    }
}

/// The end-of-text token is no part of a reply.
fn drop_end(app: &App, all: &mut ChatLogprobs) {
    let is_end =
        |entry: &ChatTokenLogprob| app.eos.iter().any(|&id| app.vocabulary.show(id) == entry.token);
    if all.content.last().is_some_and(is_end) {
        all.content.pop();
    }
}

impl Chunks for Answer {
    fn chunk(&mut self, Event { choice: index, kind }: Event, out: &mut Vec<u8>) {
        self.has_role.resize(self.has_role.len().max(index + 1), false);
        let mut delta = Delta::default();
        if !std::mem::replace(&mut self.has_role[index], true) {
            delta.role = Some("assistant");
            delta.content = Some(String::new());
        }
        let mut choice =
            ChatChoice { index, message: None, delta: None, logprobs: None, finish_reason: None };
        let text = match kind {
            EventKind::Token { id, text, logprob } if !self.app.eos.contains(&id) => {
                choice.logprobs = logprob.map(|logprob| ChatLogprobs {
                    content: vec![self.logprob(&logprob)],
                    refusal: None,
                });
                text
            }
            EventKind::Finished(finished) => {
                choice.finish_reason = Some(finished.reason.name());
                finished.text
            }
            _ => String::new(),
        };
        if !text.is_empty() || choice.logprobs.is_some() {
            delta.content = Some(text);
        }
        if delta.content.is_none() && choice.finish_reason.is_none() {
            return;
        }
        choice.delta = Some(delta);
        super::stream::write_event(&self.object("chat.completion.chunk", vec![choice]), out);
    }

    fn end(&mut self, generation: &Generation, include_usage: bool, out: &mut Vec<u8>) {
        if include_usage || generation.session.is_some() {
            let mut object = self.object("chat.completion.chunk", Vec::new());
            object.usage = include_usage.then_some(generation.usage);
            object.session = generation.session.clone();
            super::stream::write_event(&object, out);
        }
    }
}
