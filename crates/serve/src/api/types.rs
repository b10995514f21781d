//! Requests and answers of the API, field by field.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

/// `POST /v1/completions`
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct CompletionRequest {
    /// Text or token ids to continue; an empty text is the model's begin-of-text token. May be left out if a
    /// session goes on.
    #[serde(default)]
    pub prompt: Option<Prompt>,
    /// Put the prompt before the text.
    #[serde(default)]
    pub echo: Option<bool>,
    /// Log-probabilities of so many of the likeliest tokens, 0 to 20.
    #[serde(default)]
    #[schema(maximum = 20)]
    pub logprobs: Option<u32>,
    /// Only `n` can be asked for.
    #[serde(default)]
    pub best_of: Option<u32>,
    /// Not supported: text that follows the completion.
    #[serde(default)]
    pub suffix: Option<String>,
    #[serde(flatten)]
    pub common: CommonRequest,
}

/// `POST /v1/chat/completions`
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct ChatRequest {
    /// The conversation, or with a session that exists the one new message.
    pub messages: Vec<ChatMessage>,
    /// The same as `max_tokens`.
    #[serde(default)]
    pub max_completion_tokens: Option<u64>,
    /// Log-probabilities of the drawn tokens.
    #[serde(default)]
    pub logprobs: Option<bool>,
    /// With `logprobs`: so many of the likeliest tokens, 0 to 20.
    #[serde(default)]
    #[schema(maximum = 20)]
    pub top_logprobs: Option<u32>,
    #[serde(flatten)]
    pub common: CommonRequest,
}

/// Fields that both kinds of request have.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub(crate) struct CommonRequest {
    /// The model's name, as `/v1/models` has it.
    #[serde(default)]
    pub model: Option<String>,
    /// Ends the text after so many tokens (completions: 16, chat: 512 unless given).
    #[serde(default)]
    pub max_tokens: Option<u64>,
    /// 0 is greedy.
    #[serde(default)]
    #[schema(minimum = 0, maximum = 100)]
    pub temperature: Option<f32>,
    /// Draws from the likeliest tokens that have this probability together.
    #[serde(default)]
    #[schema(exclusive_minimum = 0, maximum = 1)]
    pub top_p: Option<f32>,
    /// Draws from so many of the likeliest tokens; 0 is all. Not of OpenAI's API.
    #[serde(default)]
    pub top_k: Option<u32>,
    /// Draws from tokens at least this fraction as likely as the likeliest. Not of OpenAI's API.
    #[serde(default)]
    #[schema(minimum = 0, maximum = 1)]
    pub min_p: Option<f32>,
    /// Above 1 makes tokens of the last 64 less likely. Not of OpenAI's API.
    #[serde(default)]
    #[schema(exclusive_minimum = 0)]
    pub repetition_penalty: Option<f32>,
    /// Taken from the logit of every token that was drawn.
    #[serde(default)]
    #[schema(minimum = -2, maximum = 2)]
    pub presence_penalty: Option<f32>,
    /// Taken from the logit of a token for every time that it was drawn.
    #[serde(default)]
    #[schema(minimum = -2, maximum = 2)]
    pub frequency_penalty: Option<f32>,
    /// Added to logits, by token id.
    #[serde(default)]
    pub logit_bias: Option<BTreeMap<String, f32>>,
    /// How many texts.
    #[serde(default)]
    #[schema(minimum = 1, maximum = 128)]
    pub n: Option<u32>,
    /// The same seed gives the same text.
    #[serde(default)]
    pub seed: Option<i64>,
    /// Texts that end the text and are not part of it, 16 at most.
    #[serde(default)]
    pub stop: Option<Stop>,
    /// Server-sent events as tokens come.
    #[serde(default)]
    pub stream: Option<bool>,
    /// How to stream.
    #[serde(default)]
    pub stream_options: Option<StreamOptions>,
    /// What the text must look like.
    #[serde(default)]
    pub response_format: Option<ResponseFormat>,
    /// Goes on after the end-of-text token. Not of OpenAI's API.
    #[serde(default)]
    pub ignore_eos: Option<bool>,
    /// Goes on from a session, or begins one. Not of OpenAI's API.
    #[serde(default)]
    pub session_id: Option<String>,
    /// Everything else.
    #[serde(flatten)]
    #[schema(ignore)]
    pub other: Map<String, Value>,
}

/// Text, token ids, or several of either.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(
    untagged,
    expecting = "prompt: expected a string, an array of strings, an array of token ids, or an array of such arrays"
)]
pub(crate) enum Prompt {
    Text(String),
    Texts(Vec<String>),
    Ids(Vec<u32>),
    ManyIds(Vec<Vec<u32>>),
}

/// One text or several.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(untagged, expecting = "stop: expected a string or an array of strings")]
pub(crate) enum Stop {
    One(String),
    Many(Vec<String>),
}

/// How to stream.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct StreamOptions {
    /// A last event with the usage counts.
    #[serde(default)]
    pub include_usage: Option<bool>,
}

/// What a text must look like.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(crate) enum ResponseFormat {
    /// Anything.
    Text,
    /// A JSON object.
    JsonObject,
    /// JSON that follows a schema.
    JsonSchema { json_schema: NamedSchema },
    /// A match of a regular expression. Not of OpenAI's API.
    Regex { regex: String },
    /// A sentence of a grammar in Lark's notation. Not of OpenAI's API.
    Grammar { grammar: String },
}

/// A schema and its name.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct NamedSchema {
    /// For people.
    #[serde(default)]
    #[allow(dead_code)]
    pub name: Option<String>,
    /// The JSON schema.
    #[schema(value_type = Object)]
    pub schema: Value,
}

/// One contribution to a conversation.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct ChatMessage {
    /// `system` (or `developer`), `user` or `assistant`.
    pub role: String,
    /// Text, or parts of the type `text`.
    pub content: Content,
    /// Everything else.
    #[serde(flatten)]
    #[schema(ignore)]
    pub other: Map<String, Value>,
}

/// Text, whole or in parts.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(untagged, expecting = "content: expected a string or an array of text parts")]
pub(crate) enum Content {
    Text(String),
    Parts(Vec<ContentPart>),
}

/// A part of a message.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct ContentPart {
    /// `text`; others are refused.
    pub r#type: String,
    #[serde(default)]
    pub text: Option<String>,
}

/// Counts of tokens.
#[derive(Clone, Copy, Debug, Default, Serialize, ToSchema)]
pub(crate) struct Usage {
    pub prompt_tokens: u64,
    pub completion_tokens: u64,
    pub total_tokens: u64,
    pub prompt_tokens_details: PromptTokensDetails,
}

/// What the prompt tokens were.
#[derive(Clone, Copy, Debug, Default, Serialize, ToSchema)]
pub(crate) struct PromptTokensDetails {
    /// Not read again, since the state behind them was known.
    pub cached_tokens: u64,
}

/// Where a session stands. Not of OpenAI's API.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(crate) struct SessionInfo {
    pub id: String,
    /// Tokens that the session has seen.
    pub tokens_seen: u64,
    /// Bytes of its state, however long it is.
    pub state_bytes: usize,
}

/// Answer of `/v1/completions`, and each event of its stream.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Completion {
    pub id: String,
    pub object: &'static str,
    pub created: u64,
    pub model: String,
    pub system_fingerprint: String,
    pub choices: Vec<CompletionChoice>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub session: Option<SessionInfo>,
}

/// A text.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct CompletionChoice {
    pub index: usize,
    pub text: String,
    pub logprobs: Option<CompletionLogprobs>,
    /// `stop` or `length`.
    pub finish_reason: Option<&'static str>,
}

/// Log-probabilities, an entry a token.
#[derive(Clone, Debug, Default, Serialize, ToSchema)]
pub(crate) struct CompletionLogprobs {
    pub tokens: Vec<String>,
    /// Natural logarithms; null for the first token of a prompt.
    pub token_logprobs: Vec<Option<f32>>,
    pub top_logprobs: Vec<Option<BTreeMap<String, f32>>>,
    /// Characters before each token.
    pub text_offset: Vec<usize>,
}

/// Answer of `/v1/chat/completions`.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ChatCompletion {
    pub id: String,
    pub object: &'static str,
    pub created: u64,
    pub model: String,
    pub system_fingerprint: String,
    pub choices: Vec<ChatChoice>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub session: Option<SessionInfo>,
}

/// A reply, or in a stream what is new of it.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ChatChoice {
    pub index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<ReplyMessage>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub delta: Option<Delta>,
    pub logprobs: Option<ChatLogprobs>,
    /// `stop` or `length`.
    pub finish_reason: Option<&'static str>,
}

/// A whole reply.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ReplyMessage {
    pub role: &'static str,
    pub content: String,
    pub refusal: Option<String>,
}

/// What is new of a reply.
#[derive(Debug, Default, Serialize, ToSchema)]
pub(crate) struct Delta {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
}

/// Log-probabilities, an entry a token.
#[derive(Clone, Debug, Default, Serialize, ToSchema)]
pub(crate) struct ChatLogprobs {
    pub content: Vec<ChatTokenLogprob>,
    pub refusal: Option<Vec<ChatTokenLogprob>>,
}

/// A token and those in its place.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(crate) struct ChatTokenLogprob {
    pub token: String,
    pub logprob: f32,
    pub bytes: Vec<u8>,
    pub top_logprobs: Vec<TopLogprob>,
}

/// A likely token.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(crate) struct TopLogprob {
    pub token: String,
    pub logprob: f32,
    pub bytes: Vec<u8>,
}

/// `GET /v1/models`
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ModelList {
    pub object: &'static str,
    pub data: Vec<ModelInfo>,
}

/// A model.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(crate) struct ModelInfo {
    pub id: String,
    pub object: &'static str,
    pub created: u64,
    pub owned_by: &'static str,
    /// Configuration and weights, in one number. Not of OpenAI's API.
    pub fingerprint: String,
    /// Bytes of a session's state. Not of OpenAI's API.
    pub state_bytes: usize,
    /// Longest prompt of a request. Not of OpenAI's API.
    pub max_prompt_tokens: usize,
    /// Most tokens of a text. Not of OpenAI's API.
    pub max_tokens: u64,
    /// Whether the model has a chat template; without one a plain transcript is used. Not of OpenAI's API.
    pub has_chat_template: bool,
}

/// `GET /health`
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Health {
    /// `ok`, `shutting_down` or `failed`.
    pub status: &'static str,
    /// `up` or `down`, if there is a shared store.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub store: Option<&'static str>,
}
