//! A conversation to prompt text.

use std::io::{self, Write};

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, ErrorKind, Value};

use super::clock;
use crate::checkpoint::TokenizerSource;
use crate::error::{Error, Result};

/// More than any template; bounds what a hostile file makes us compile.
const MAX_TEMPLATE_BYTES: usize = 1 << 20;
/// Steps that a template may take.
const FUEL: u64 = 10_000_000;
/// Largest prompt that a template may make.
const MAX_RENDERED_BYTES: usize = 64 << 20;
/// Stands for a reply when only what follows it is of interest. Private-use characters: no template
/// has them.
const REPLY: &str = "\u{f8fa}reply\u{f8fb}";

/// One contribution to a conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// What was said.
    pub content: String,
}

impl Message {
    /// A message from its parts.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }

    fn to_value(&self) -> Value {
        Value::from_pairs([("role", self.role.as_str()), ("content", self.content.as_str())])
    }
}

/// Turns conversations into the text that a model was trained on.
///
/// A checkpoint's template is Jinja as Hugging Face uses it: variables `messages`,
/// `add_generation_prompt`, `bos_token`, `eos_token` (and `unk_token`, `pad_token`), functions
/// `raise_exception(message)` and `strftime_now(format)` (in UTC), Python's string, list and dict methods,
/// `break` and `continue`, blocks trimmed.
///
/// Without one, the plain transcript is
///
/// ```text
/// System: CONTENT
///
/// User: CONTENT
///
/// Assistant: CONTENT
/// ```
///
/// that is, each message is `Role: content` and an empty line, and a reply is asked for by `Assistant:`.
/// A reply then ends at the next line that begins with `User:` ([`stop`](Self::stop)).
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Option<Environment<'static>>,
    special_tokens: Vec<(&'static str, String)>,
}

impl ChatTemplate {
    /// The template of a checkpoint, the plain transcript if it has none.
    ///
    /// # Errors
    /// A template that is too large or not valid Jinja.
    pub fn from_source(source: &TokenizerSource) -> Result<Self> {
        let config = source.tokenizer_config.as_ref();
        let token = |name: &'static str| {
            let value = config?.get(name)?;
            let text = value.as_str().or_else(|| value.get("content")?.as_str())?;
            Some((name, text.to_owned()))
        };
        let names = ["bos_token", "eos_token", "unk_token", "pad_token"];
        let special_tokens = names.into_iter().filter_map(token).collect();
        let environment = source.chat_template.clone().map(compile).transpose()?;
        Ok(Self { environment, special_tokens })
    }

    /// The plain transcript.
    pub fn plain() -> Self {
        Self { environment: None, special_tokens: Vec::new() }
    }

    /// Whether this is the plain transcript, for want of a template.
    pub fn is_plain(&self) -> bool {
        self.environment.is_none()
    }

    /// Strings at which a reply ends, apart from the end-of-text token.
    pub fn stop(&self) -> Vec<String> {
        if self.is_plain() { vec!["\nUser:".into()] } else { Vec::new() }
    }

    /// The text of a conversation; with `add_generation_prompt` it ends where the reply begins.
    ///
    /// # Errors
    /// A template that fails, calls `raise_exception`, or does not come to an end.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let Some(environment) = &self.environment else {
            return Ok(transcript(messages, add_generation_prompt));
        };
        let template = environment.get_template("chat").map_err(|error| failed(&error))?;
        let messages: Vec<Value> = messages.iter().map(Message::to_value).collect();
        let tokens = self.special_tokens.iter().map(|(name, text)| (*name, Value::from(text)));
        let context = Value::from_pairs(tokens.chain([
            ("messages", Value::from(messages)),
            ("add_generation_prompt", Value::from(add_generation_prompt)),
        ]));
        let mut text = Bounded(Vec::new());
        template.render_captured_to(context, &mut text).map_err(|error| failed(&error))?;
        String::from_utf8(text.0).map_err(|error| Error::ChatTemplate(error.to_string()))
    }

    /// The text that asks for the first reply.
    ///
    /// # Errors
    /// As [`render`](Self::render).
    pub fn first_turn(&self, system: Option<&str>, user: &str) -> Result<String> {
        self.render(&opening(system, user), true)
    }

    /// The text between the end of a reply and the start of the next: what ends the reply's turn, the
    /// user's message, and what asks for a reply. A model with recurrent state needs no more, as it
    /// remembers the rest. `has_seen_stop` if the reply ended with one of the [`stop`](Self::stop)
    /// strings: the model has then read the start of this text already.
    ///
    /// # Errors
    /// As [`render`](Self::render); a template that leaves out earlier replies.
    pub fn next_turn(
        &self,
        system: Option<&str>,
        user: &str,
        has_seen_stop: bool,
    ) -> Result<String> {
        let mut messages = opening(system, "Hello");
        messages.push(Message::new("assistant", REPLY));
        messages.push(Message::new("user", user));
        let text = self.render(&messages, true)?;
        match text.split_once(REPLY) {
            Some((_, rest)) => {
                let seen = if has_seen_stop && self.is_plain() { "\n\nUser:" } else { "" };
                Ok(rest.strip_prefix(seen).unwrap_or(rest).to_owned())
            }
            None => Err(Error::ChatTemplate(
                "it leaves out earlier replies, so a conversation cannot go on with it".into(),
            )),
        }
    }
}

fn opening(system: Option<&str>, user: &str) -> Vec<Message> {
    let system = system.map(|content| Message::new("system", content));
    system.into_iter().chain([Message::new("user", user)]).collect()
}

fn transcript(messages: &[Message], add_generation_prompt: bool) -> String {
    let mut text = String::new();
    for Message { role, content } in messages {
        let mut letters = role.chars();
        let first = letters.next().map(|letter| letter.to_uppercase().collect::<String>());
        text += &format!("{}{}: {content}\n\n", first.unwrap_or_default(), letters.as_str());
    }
    if add_generation_prompt {
        text += "Assistant:";
    }
    text
}

fn compile(template: String) -> Result<Environment<'static>> {
    if template.len() > MAX_TEMPLATE_BYTES {
        return Err(Error::ChatTemplate(format!(
            "it has {} bytes, at most {MAX_TEMPLATE_BYTES} are accepted",
            template.len()
        )));
    }
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.map_err(|error| failed(&error))?);
    environment.set_fuel(Some(FUEL));
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function("raise_exception", |message: String| {
        Err::<Value, _>(minijinja::Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_function("strftime_now", |format: String| {
        clock::now(&format)
            .map_err(|message| minijinja::Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_template_owned("chat", template).map_err(|error| failed(&error))?;
    Ok(environment)
}

fn failed(error: &minijinja::Error) -> Error {
    let line = error.line().map(|line| format!(" (line {line})")).unwrap_or_default();
    let detail = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    Error::ChatTemplate(format!("{detail}{line}"))
}

/// Output of bounded size.
struct Bounded(Vec<u8>);

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_RENDERED_BYTES {
            return Err(io::Error::other("the rendered text is too long"));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::checkpoint::TokenizerKind;

    fn template(text: &str) -> Result<ChatTemplate> {
        ChatTemplate::from_source(&TokenizerSource {
            kind: TokenizerKind::HuggingFace(Vec::new()),
            tokenizer_config: Some(json!({"bos_token": "<s>", "eos_token": {"content": "</s>"}})),
            chat_template: Some(text.into()),
        })
    }

    /// The template of Llama 2 and Mistral, shortened.
    const INST: &str = "{{ bos_token }}{% for message in messages %}
        {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
            {{- raise_exception('roles must alternate') }}
        {%- endif %}
        {%- if message['role'] == 'user' %}
            {{- '[INST] ' + message['content'].strip() + ' [/INST]' }}
        {%- else %}
            {{- ' ' + message.content|trim + eos_token }}
        {%- endif %}
    {%- endfor %}";

    #[test]
    fn renders_a_template_as_hugging_face_does() {
        let template = template(INST).unwrap();
        let messages = [
            Message::new("user", " Hi "),
            Message::new("assistant", "Hello. "),
            Message::new("user", "Who?"),
        ];
        let text = template.render(&messages, true).unwrap();
        assert_eq!(text, "<s>[INST] Hi [/INST] Hello.</s>[INST] Who? [/INST]");
        assert_eq!(template.first_turn(None, "Hi").unwrap(), "<s>[INST] Hi [/INST]");
        assert_eq!(template.next_turn(None, "Who?", false).unwrap(), "</s>[INST] Who? [/INST]");
        assert!(template.stop().is_empty());
    }

    #[test]
    fn a_template_can_refuse_and_its_words_are_shown() {
        let error = template(INST).unwrap().first_turn(Some("x"), "y").unwrap_err().to_string();
        assert!(error.contains("roles must alternate"), "{error}");
        let error = template("{{ messages[0].content.frobnicate() }}").unwrap();
        assert!(error.first_turn(None, "y").is_err());
    }

    #[test]
    fn helpers_of_templates_are_there() {
        let text = "{%- set ns = namespace(n=0) -%}
            {%- for m in messages -%}{%- if loop.first %}{% continue %}{% endif -%}
            {%- set ns.n = ns.n + 1 -%}{{ m.content.split('-')[0].title() }}{%- endfor -%}
            {{ ns.n }} {{ messages|length }} {{ messages[0]|tojson }} {{ strftime_now('%Y')|length }}
            {%- if tools is defined %}x{% endif %}{{ messages[0].get('none', '!') }}";
        let messages = [Message::new("user", "a"), Message::new("user", "b c-d")];
        let rendered = template(text).unwrap().render(&messages, false).unwrap();
        assert_eq!(rendered, r#"B C1 2 {"role": "user", "content": "a"} 4!"#);
    }

    #[test]
    fn hostile_templates_are_errors() {
        assert!(template("{% for x in %}").is_err());
        assert!(template(&"x".repeat(MAX_TEMPLATE_BYTES + 1)).is_err());
        let endless = "{% for i in range(10000) %}{% for j in range(10000) %}\
                       {% for k in range(10000) %}x{% endfor %}{% endfor %}{% endfor %}";
        let error = template(endless).unwrap().first_turn(None, "x").unwrap_err().to_string();
        assert!(error.contains("fuel"), "{error}");
        let forgetful = template("{{ messages[-1].content }}").unwrap();
        assert!(forgetful.next_turn(None, "x", false).is_err());
    }

    #[test]
    fn without_a_template_there_is_a_transcript() {
        let plain = ChatTemplate::plain();
        assert_eq!(
            plain.first_turn(Some("Be kind."), "Hi").unwrap(),
            "System: Be kind.\n\nUser: Hi\n\nAssistant:"
        );
        assert_eq!(plain.next_turn(None, "Bye", false).unwrap(), "\n\nUser: Bye\n\nAssistant:");
        assert_eq!(plain.next_turn(None, "Bye", true).unwrap(), " Bye\n\nAssistant:");
        assert_eq!(plain.stop(), ["\nUser:"]);
    }
}
