//! Reads the fields of a `config.json`.

use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::json;

/// The fields of a `config.json`. `file` names it in errors.
///
/// # Errors
/// [`Error::Malformed`] if it is no JSON object.
pub(super) fn parse(file: &str, bytes: &[u8]) -> Result<Map<String, Value>> {
    let malformed = |what| Error::Malformed { file: file.to_owned(), what };
    match json::parse(bytes) {
        Ok(Value::Object(fields)) => Ok(fields),
        Ok(_) => Err(malformed("expected a JSON object".to_owned())),
        Err(error) => Err(malformed(format!("not valid JSON: {error}"))),
    }
}

/// Reads fields and collects what is wrong with them. A field that is null counts as absent.
pub(super) struct FieldReader<'a> {
    pub fields: &'a Map<String, Value>,
    pub problems: Vec<String>,
}

impl FieldReader<'_> {
    /// A field that is there.
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.fields.get(name).filter(|value| !value.is_null())
    }

    /// Notes that a field is not as expected.
    pub fn problem(&mut self, name: &str, expected: &str) {
        let found = self.fields.get(name).map_or_else(|| "missing".to_owned(), shortened);
        self.problems.push(format!("{name} is {found}, expected {expected}"));
    }

    /// A size that must be there.
    pub fn size(&mut self, name: &str) -> Option<usize> {
        let value = self.get(name).and_then(Value::as_u64).and_then(|n| usize::try_from(n).ok());
        if value.is_none() {
            self.problem(name, "a positive integer");
        }
        value
    }

    /// A number, or the default.
    pub fn float(&mut self, name: &str, default: f64) -> f64 {
        let Some(value) = self.get(name) else { return default };
        value.as_f64().unwrap_or_else(|| {
            self.problem(name, "a number");
            default
        })
    }

    /// True or false, or the default.
    pub fn boolean(&mut self, name: &str, default: bool) -> bool {
        let Some(value) = self.get(name) else { return default };
        value.as_bool().unwrap_or_else(|| {
            self.problem(name, "true or false");
            default
        })
    }

    /// An id, a list of ids, or nothing.
    pub fn token_ids(&mut self, name: &str) -> Vec<u32> {
        let ids = match self.get(name) {
            None => Some(Vec::new()),
            Some(Value::Array(ids)) => ids.iter().map(token_id).collect(),
            Some(id) => token_id(id).map(|id| vec![id]),
        };
        ids.unwrap_or_else(|| {
            self.problem(name, "a token id or a list of token ids");
            Vec::new()
        })
    }
}

/// A configuration, unless its fields or their values have problems.
///
/// # Errors
/// [`Error::Config`] with what the fields have; if they have nothing, with what `problems` finds.
pub(super) fn checked<C>(
    file: &str,
    of_fields: Vec<String>,
    config: C,
    problems: impl FnOnce(&C) -> Vec<String>,
) -> Result<C> {
    let problems = if of_fields.is_empty() { problems(&config) } else { of_fields };
    if problems.is_empty() {
        Ok(config)
    } else {
        Err(Error::Config { file: file.to_owned(), problems })
    }
}

/// Sizes, by name, that are zero or above their limit.
pub(super) fn size_problems(sizes: &[(&str, usize, usize)]) -> Vec<String> {
    let wrong = sizes.iter().filter(|(_, value, limit)| *value == 0 || value > limit);
    wrong.map(|(name, value, limit)| format!("{name} is {value}, expected 1 to {limit}")).collect()
}

/// What is wrong with the epsilon of the norms.
pub(super) fn epsilon_problem(rms_norm_eps: f32) -> Option<String> {
    let is_fine = rms_norm_eps > 0.0 && rms_norm_eps < 1.0;
    (!is_fine)
        .then(|| format!("rms_norm_eps is {rms_norm_eps}, expected a positive number below 1"))
}

/// Ids of special tokens that the vocabulary does not have.
pub(super) fn token_problems(vocab_size: usize, bos: Option<u32>, eos: &[u32]) -> Vec<String> {
    let bos = bos.iter().map(|id| ("bos_token_id", id));
    let all = bos.chain(eos.iter().map(|id| ("eos_token_id", id)));
    all.filter(|(_, id)| **id as usize >= vocab_size)
        .map(|(name, id)| format!("{name} is {id}, expected less than vocab_size {vocab_size}"))
        .collect()
}

fn token_id(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|id| u32::try_from(id).ok())
}

/// A value for an error message, cut to a readable length.
fn shortened(value: &Value) -> String {
    const SHOWN: usize = 60;
    let text = value.to_string();
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}
