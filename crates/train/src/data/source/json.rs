//! One field of a line of JSON.

use std::fmt;

use mmfree::error::{Error, Result};
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor};

/// The text in a field of an object; `place` names the line in the error.
///
/// # Errors
/// A line that is not UTF-8 or no JSON object; a field that is not there or no string.
pub(in crate::data) fn json_field(
    line: &[u8],
    field: &str,
    place: impl Fn() -> String,
) -> Result<String> {
    let malformed = |what| Error::Malformed { file: place(), what };
    let line = std::str::from_utf8(line).map_err(|error| {
        let byte = error.valid_up_to() + 1;
        malformed(format!("the line is not UTF-8: invalid at its byte {byte}"))
    })?;
    let mut deserializer = serde_json::Deserializer::from_str(line.trim_end());
    let found = Field(field)
        .deserialize(&mut deserializer)
        .and_then(|found| deserializer.end().map(|()| found));
    match found {
        Ok(Found::Text(text)) => Ok(text),
        Ok(Found::Other(kind)) => {
            Err(malformed(format!("the field {field:?} is {kind}; expected a string")))
        }
        Ok(Found::Nothing(names)) => Err(malformed(format!(
            "there is no field {field:?} (--field, data.text_field); it has {}",
            if names.is_empty() { "none".to_owned() } else { names.join(", ") }
        ))),
        Err(error) => Err(malformed(format!("not a JSON object: {}", without_line(&error)))),
    }
}

/// The message of a JSON error in a document of one line: with the column only.
fn without_line(error: &serde_json::Error) -> String {
    error.to_string().replace(" at line 1 column ", " at column ")
}

/// What a line has under a name.
enum Found {
    Text(String),
    Other(&'static str),
    /// The names that it has instead.
    Nothing(Vec<String>),
}

/// Takes one field of an object and passes over the others.
struct Field<'a>(&'a str);

impl<'de> DeserializeSeed<'de> for Field<'_> {
    type Value = Found;

    fn deserialize<D: Deserializer<'de>>(
        self,
        deserializer: D,
    ) -> std::result::Result<Found, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Field<'_> {
    type Value = Found;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> std::result::Result<Found, A::Error> {
        const NAMES: usize = 10;
        let (mut found, mut names) = (None, Vec::new());
        while let Some(name) = access.next_key::<String>()? {
            if name == self.0 {
                found = Some(match access.next_value::<serde_json::Value>()? {
                    serde_json::Value::String(text) => Found::Text(text),
                    serde_json::Value::Null => Found::Other("null"),
                    serde_json::Value::Bool(_) => Found::Other("a truth value"),
                    serde_json::Value::Number(_) => Found::Other("a number"),
                    serde_json::Value::Array(_) => Found::Other("a list"),
                    serde_json::Value::Object(_) => Found::Other("an object"),
                });
            } else {
                access.next_value::<IgnoredAny>()?;
                if names.len() < NAMES {
                    names.push(format!("{name:?}"));
                }
            }
        }
        Ok(found.unwrap_or(Found::Nothing(names)))
    }
}
