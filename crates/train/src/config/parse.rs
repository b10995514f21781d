//! TOML to a configuration, collecting everything that is wrong with it.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use toml::de::{DeTable, DeValue};

use super::fields::{Field, fields};
use super::{TrainConfig, value};

/// `section.key=value` from a command line; the value is TOML, or a text without its quotes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Override {
    key: String,
    value: String,
}

impl FromStr for Override {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (key, value) = text.split_once('=').ok_or("expected section.key=value")?;
        Ok(Self { key: key.trim().to_owned(), value: value.trim().to_owned() })
    }
}

/// Where a value came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Line {
    /// The file as a whole.
    File,
    /// A line, counted from 1.
    Number(usize),
    /// An override.
    Override(usize),
}

/// Something that is wrong.
#[derive(Debug)]
pub(super) struct Problem {
    pub line: Line,
    pub what: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            Line::File => {}
            Line::Number(line) => write!(f, "line {line}: ")?,
            Line::Override(index) => write!(f, "--set number {}: ", index + 1)?,
        }
        f.write_str(&self.what)
    }
}

/// Where each key that is not at its default was given.
pub(super) type Places = BTreeMap<&'static str, Line>;

/// What a text and overrides say, and everything that is wrong with it by itself.
pub(super) fn parse(text: &str, overrides: &[Override]) -> Parsed {
    let mut parsed = Parsed::default();
    let (document, errors) = DeTable::parse_recoverable(text);
    let line_of = |offset| Line::Number(line_number(text, offset));
    for error in &errors {
        let line = error.span().map_or(Line::File, |span| line_of(span.start));
        parsed.problem(line, format!("not valid TOML: {}", error.message()));
        // What stands behind it may be missing.
        parsed.uncertain.push(String::new());
    }
    for (section, content) in document.get_ref() {
        let (name, line) = (section.get_ref(), line_of(section.span().start));
        if !fields().iter().any(|field| field.path.split('.').next() == Some(name)) {
            parsed.unknown_section(line, name);
            continue;
        }
        let DeValue::Table(table) = content.get_ref() else {
            parsed.uncertain.push(format!("{name}."));
            parsed
                .problem(line, format!("{name} is a section: write [{name}] on a line of its own"));
            continue;
        };
        for (key, value) in table {
            let line = line_of(key.span().start);
            parsed.set(line, &format!("{name}.{}", key.get_ref()), value.get_ref());
        }
    }
    for (index, given) in overrides.iter().enumerate() {
        parsed.set_override(Line::Override(index), given);
    }
    parsed
}

/// A configuration as far as it was understood.
#[derive(Default)]
pub(super) struct Parsed {
    pub config: TrainConfig,
    pub places: Places,
    pub problems: Vec<Problem>,
    /// Keys whose values are not known; all keys of a section, if it ends with a dot; all keys, if it is empty.
    uncertain: Vec<String>,
}

impl Parsed {
    /// Whether the value of a key may be another one than what was meant, since something was not understood.
    pub(super) fn is_uncertain(&self, key: &str) -> bool {
        let is_given = self.places.contains_key(key);
        self.uncertain.iter().any(|unknown| {
            let is_section = unknown.is_empty() || unknown.ends_with('.');
            key == unknown || is_section && !is_given && key.starts_with(unknown)
        })
    }

    fn problem(&mut self, line: Line, what: String) {
        self.problems.push(Problem { line, what });
    }

    fn set(&mut self, line: Line, path: &str, value: &DeValue) {
        let Some(field) = fields().iter().find(|field| field.path == path) else {
            let what = match suggestion(path) {
                Some(field) => {
                    self.uncertain.push(field.path.to_owned());
                    format!("{path} is not a key; did you mean {}?", field.path)
                }
                None => format!("{path} is not a key"),
            };
            return self.problem(line, what);
        };
        match (field.set)(&mut self.config, value) {
            Ok(()) => {
                self.places.insert(field.path, line);
            }
            Err(expected) => {
                self.uncertain.push(path.to_owned());
                self.problem(line, format!("{path} is {}, expected {expected}", shown(value)));
            }
        }
    }

    fn set_override(&mut self, line: Line, given: &Override) {
        let quoted = format!("value = {}", value::quoted(&given.value));
        let plain = format!("value = {}", given.value);
        let document = DeTable::parse(&plain)
            .ok()
            .filter(|table| table.get_ref().len() == 1)
            .or_else(|| DeTable::parse(&quoted).ok());
        match document.as_ref().and_then(|table| table.get_ref().get("value")) {
            Some(value) => self.set(line, &given.key, value.get_ref()),
            None => {
                self.uncertain.push(given.key.clone());
                self.problem(line, format!("{} has no value", given.key));
            }
        }
    }

    fn unknown_section(&mut self, line: Line, name: &str) {
        let sections = fields().iter().filter_map(|field| field.path.split('.').next());
        let nearest = nearest(name, sections);
        // A key that was written above the first section.
        let key = fields().iter().find(|field| field.path.split('.').nth(1) == Some(name));
        let what = match (nearest, key) {
            (_, Some(field)) => {
                self.uncertain.push(field.path.to_owned());
                format!("{name} stands outside its section; did you mean {}?", field.path)
            }
            (Some(section), None) => {
                self.uncertain.push(format!("{section}."));
                format!("[{name}] is not a section; did you mean [{section}]?")
            }
            (None, None) => format!("[{name}] is not a section"),
        };
        self.problem(line, what);
    }
}

/// The known key that was probably meant: the same name in another section, or one spelt alike.
fn suggestion(path: &str) -> Option<&'static Field> {
    let (_, key) = path.split_once('.')?;
    let namesake = fields().iter().find(|field| field.path.split('.').nth(1) == Some(key));
    namesake.or_else(|| {
        let best = nearest(path, fields().iter().map(|field| field.path)).or_else(|| {
            let keys = fields().iter().filter_map(|field| field.path.split('.').nth(1));
            nearest(key, keys)
        })?;
        fields()
            .iter()
            .find(|field| field.path == best || field.path.split('.').nth(1) == Some(best))
    })
}

/// The candidate that is spelt most like a name, if any is.
fn nearest<'a>(name: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    candidates
        .map(|candidate| (strsim::jaro_winkler(name, candidate), candidate))
        .filter(|&(likeness, _)| likeness > 0.85)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, candidate)| candidate)
}

fn line_number(text: &str, offset: usize) -> usize {
    1 + text.bytes().take(offset).filter(|&byte| byte == b'\n').count()
}

/// A value for a message, cut to a readable length.
fn shown(value: &DeValue) -> String {
    let text = match value {
        DeValue::String(text) => value::quoted(text),
        DeValue::Integer(number) => number.to_string(),
        DeValue::Float(number) => number.to_string(),
        DeValue::Boolean(flag) => flag.to_string(),
        DeValue::Datetime(time) => time.to_string(),
        DeValue::Array(_) => "a list".to_owned(),
        DeValue::Table(_) => "a section".to_owned(),
    };
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}
