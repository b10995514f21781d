//! Structured output: what a text must look like, as masks over tokens.

use std::sync::Arc;

use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{
    InferenceCapabilities, TokEnv, TokRxInfo, TokTrie, TokenId, TokenizerEnv,
};
use llguidance::{Matcher, ParserFactory};
use mmfree::tokenizer::Tokenizer;
use serde_json::{Value, json};

use crate::vocabulary::Vocabulary;

/// What a text must be.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Format {
    /// Any JSON object.
    JsonObject,
    /// JSON that follows this schema.
    JsonSchema(Value),
    /// A match of this regular expression.
    Regex(String),
    /// A sentence of this grammar, in Lark's notation.
    Grammar(String),
}

/// Compiles formats for one vocabulary.
pub(crate) struct Grammars {
    factory: ParserFactory,
}

/// What a grammar may cost, so that nobody's is a burden to others: masks are made in the engine's thread.
const INITIAL_LEXER_FUEL: u64 = 500_000;
const STEP_LEXER_FUEL: u64 = 100_000;
const STEP_ITEMS: usize = 20_000;
const LEXER_STATES: usize = 20_000;
const GRAMMAR_SIZE: usize = 100_000;

impl Grammars {
    /// For a vocabulary whose texts end with the first of `eos`; `None` without one.
    ///
    /// # Errors
    /// A vocabulary that no masks can be made for.
    pub(crate) fn new(
        vocabulary: &Vocabulary,
        tokenizer: Arc<Tokenizer>,
        eos: &[u32],
    ) -> Result<Option<Self>, String> {
        let Some(&first) = eos.first() else { return Ok(None) };
        let words: Vec<Vec<u8>> = (0..vocabulary.len() as u32)
            .map(|id| match vocabulary.is_special(id) {
                true => [&[TokTrie::SPECIAL_TOKEN_MARKER], vocabulary.bytes(id)].concat(),
                false => vocabulary.bytes(id).to_vec(),
            })
            .collect();
        let info = TokRxInfo::new(words.len() as u32, first);
        let trie = TokTrie::from(&info, &words).with_eos_tokens(eos);
        let environment: TokEnv = Arc::new(Environment { trie, tokenizer });
        let mut factory = ParserFactory::new(&environment, InferenceCapabilities::default(), &[])
            .map_err(|error| error.to_string())?;
        factory.quiet();
        let limits = factory.limits_mut();
        limits.initial_lexer_fuel = INITIAL_LEXER_FUEL;
        limits.step_lexer_fuel = STEP_LEXER_FUEL;
        limits.step_max_items = STEP_ITEMS;
        limits.max_lexer_states = LEXER_STATES;
        limits.max_grammar_size = GRAMMAR_SIZE;
        limits.verbose_errors = false;
        Ok(Some(Self { factory }))
    }

    /// Compiles a format. Takes milliseconds, for a hostile one tens of them.
    ///
    /// # Errors
    /// Why it cannot be followed.
    pub(crate) fn compile(&self, format: &Format) -> Result<Matcher, String> {
        let grammar = match format {
            Format::JsonObject => json_grammar(json!({"type": "object"})),
            Format::JsonSchema(schema) => json_grammar(schema.clone()),
            Format::Regex(regex) => TopLevelGrammar::from_regex(regex),
            Format::Grammar(lark) => TopLevelGrammar::from_lark(lark.clone()),
        };
        // The compiler may panic on what it does not expect; a matcher only catches what comes later.
        let compile = || Matcher::new(self.factory.create_parser(grammar));
        let matcher = std::panic::catch_unwind(std::panic::AssertUnwindSafe(compile))
            .map_err(|_| "it cannot be compiled".to_owned())?;
        match matcher.get_error() {
            None => Ok(matcher),
            Some(error) => Err(error),
        }
    }
}

/// JSON with one space where people put one and no other white space: a model that is unsure would otherwise
/// fill its text with line breaks, which every schema allows.
fn json_grammar(mut schema: Value) -> TopLevelGrammar {
    if let Some(object) = schema.as_object_mut() {
        object.entry("x-guidance").or_insert(json!({
            "whitespace_flexible": false,
            "item_separator": ", ",
            "key_separator": ": ",
        }));
    }
    TopLevelGrammar::from_json_schema(schema)
}

/// The tokenizer as the grammar library sees it.
struct Environment {
    trie: TokTrie,
    tokenizer: Arc<Tokenizer>,
}

impl TokenizerEnv for Environment {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<TokenId> {
        let encode = |text: &str| self.tokenizer.encode(text, false).unwrap_or_default();
        self.trie.tokenize_with_greedy_fallback(bytes, encode)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grammars() -> (Grammars, Arc<Tokenizer>) {
        let source = mmfree::builtin::checkpoint().unwrap().tokenizer().unwrap().unwrap();
        let tokenizer = Arc::new(Tokenizer::from_source(&source).unwrap());
        let vocabulary = Vocabulary::new(&source, &tokenizer, tokenizer.vocab_size());
        let eos = [tokenizer.eos().unwrap()];
        (Grammars::new(&vocabulary, tokenizer.clone(), &eos).unwrap().unwrap(), tokenizer)
    }

    /// Whether a text is accepted to its last byte, and could end there.
    fn accepts(format: &Format, text: &str) -> bool {
        let (grammars, tokenizer) = grammars();
        let mut matcher = grammars.compile(format).unwrap();
        let ids = tokenizer.encode(text, false).unwrap();
        matcher.try_consume_tokens(&ids).unwrap() == ids.len() && matcher.is_accepting().unwrap()
    }

    #[test]
    fn formats_accept_what_they_should_and_nothing_else() {
        let schema = Format::JsonSchema(json!({
            "type": "object",
            "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
            "required": ["name", "age"],
            "additionalProperties": false,
        }));
        assert!(accepts(&schema, r#"{"name": "naïve", "age": 7}"#));
        assert!(!accepts(&schema, r#"{"name": "Ann"}"#));
        assert!(!accepts(&schema, r#"{"name": "Ann", "age": "7"}"#));
        assert!(accepts(&Format::JsonObject, r#"{"a": [1, {"b": null}]}"#));
        assert!(!accepts(&Format::JsonObject, "[1]"));
        let regex = Format::Regex("(yes|no) [0-9]{2}".into());
        assert!(accepts(&regex, "yes 42"));
        assert!(!accepts(&regex, "yes 4"));
        let grammar = Format::Grammar("start: \"a\" start \"b\" | \"c\"".into());
        assert!(accepts(&grammar, "aacbb"));
        assert!(!accepts(&grammar, "aacb"));
    }

    #[test]
    fn hostile_formats_are_errors() {
        let (grammars, _) = grammars();
        for format in [
            Format::Regex("(".into()),
            Format::Grammar("start: nothing".into()),
            Format::JsonSchema(json!({"type": "no such type"})),
            Format::JsonSchema(json!({"$ref": "https://example.com/schema.json"})),
        ] {
            assert!(grammars.compile(&format).is_err(), "{format:?}");
        }
    }
}
