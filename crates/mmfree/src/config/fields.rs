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
