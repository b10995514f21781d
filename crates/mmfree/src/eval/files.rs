//! JSON lines and lists of labels, with file, line and field in every error.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use serde_json::Value;

use crate::error::{Error, Result};
use crate::json;

/// Longest line that is read. The longest of the published files has about 10 kB.
const MAX_LINE_BYTES: u64 = 1 << 20;
/// Most lines that are read. The largest published file has 40,398.
const MAX_LINES: usize = 1 << 20;

/// A line of a file of items.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// The file, for messages.
    pub file: String,
    /// Its number, from 1.
    pub line: u64,
    /// The object.
    pub value: Value,
}

impl Row {
    /// Something is wrong with a field.
    pub fn error(&self, field: &str, what: &str) -> Error {
        malformed(&self.file, self.line, format!("field {field:?}: {what}"))
    }

    /// The value of a field; `a.b` is field b of object a. `None` if it is not there.
    pub fn find(&self, field: &str) -> Option<&Value> {
        field.split('.').try_fold(&self.value, |value, name| value.get(name))
    }

    fn get(&self, field: &str) -> Result<&Value> {
        self.find(field).ok_or_else(|| self.error(field, "it is missing"))
    }

    /// A field that is a text.
    pub fn text(&self, field: &str) -> Result<&str> {
        let value = self.get(field)?;
        value.as_str().ok_or_else(|| self.wrong(field, "a string", value))
    }

    /// A field that is a list.
    pub fn list(&self, field: &str) -> Result<&[Value]> {
        let value = self.get(field)?;
        let list = value.as_array().ok_or_else(|| self.wrong(field, "a list", value))?;
        Ok(list)
    }

    /// A field that is a list of texts.
    pub fn texts(&self, field: &str) -> Result<Vec<String>> {
        let text = |(index, value): (usize, &Value)| {
            let field = format!("{field}[{index}]");
            let text = value.as_str().map(str::to_owned);
            text.ok_or_else(|| self.wrong(&field, "a string", value))
        };
        self.list(field)?.iter().enumerate().map(text).collect()
    }

    /// A field that is a number below `count`, which may be written as a text.
    pub fn index(&self, field: &str, count: usize) -> Result<usize> {
        let value = self.get(field)?;
        let number = match value {
            Value::String(text) => text.trim().parse().ok(),
            value => value.as_u64().and_then(|number| usize::try_from(number).ok()),
        };
        number.filter(|number| *number < count).ok_or_else(|| {
            let expected = format!("a number from 0 to {}", count.saturating_sub(1));
            self.wrong(field, &expected, value)
        })
    }

    fn wrong(&self, field: &str, expected: &str, found: &Value) -> Error {
        let mut found = found.to_string();
        if let Some((end, _)) = found.char_indices().nth(60) {
            found.truncate(end);
            found.push('…');
        }
        self.error(field, &format!("expected {expected}, found {found}"))
    }
}

fn malformed(file: &str, line: u64, what: String) -> Error {
    Error::Malformed { file: format!("{file}:{line}"), what }
}

/// Reads a file of one JSON object a line; blank lines are passed over.
///
/// # Errors
/// Errors of reading; a line that is no object or too long; a file without any.
pub fn read_rows(path: &Path) -> Result<Vec<Row>> {
    parse_rows(&path.display().to_string(), &mut open(path)?)
}

fn open(path: &Path) -> Result<BufReader<File>> {
    // Opening a directory may succeed; reading it does not.
    let opened = match path.is_dir() {
        true => Err(std::io::Error::other("it is a directory")),
        false => File::open(path),
    };
    let failed = |reason| Error::Read { file: path.display().to_string(), reason };
    opened.map(BufReader::new).map_err(failed)
}

/// [`read_rows`] of anything.
pub fn parse_rows(file: &str, reader: &mut dyn BufRead) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    each_line(file, reader, &mut |line, text| {
        let value = json::parse(text.as_bytes())
            .map_err(|error| malformed(file, line, format!("this line is not JSON: {error}")))?;
        if !value.is_object() {
            let what = "expected one JSON object a line".to_owned();
            return Err(malformed(file, line, what));
        }
        rows.push(Row { file: file.to_owned(), line, value });
        Ok(())
    })?;
    if rows.is_empty() {
        let what = "there are no items in it; expected one JSON object a line".to_owned();
        return Err(Error::Malformed { file: file.to_owned(), what });
    }
    Ok(rows)
}

/// Reads a list of labels, one a line, below `count` after taking away `first`.
///
/// # Errors
/// Errors of reading; a line that is no such number.
pub fn read_labels(path: &Path, first: usize, count: usize) -> Result<Vec<usize>> {
    let file = path.display().to_string();
    let mut labels = Vec::new();
    each_line(&file, &mut open(path)?, &mut |line, text| {
        let label = text.trim().parse::<usize>().ok().and_then(|label| label.checked_sub(first));
        labels.push(label.filter(|label| *label < count).ok_or_else(|| {
            let what = format!(
                "label {:?}: expected a number from {first} to {}",
                text.trim(),
                first + count - 1
            );
            malformed(&file, line, what)
        })?);
        Ok(())
    })?;
    Ok(labels)
}

/// Hands every line that is not blank to `take`, with its number.
fn each_line(
    file: &str,
    reader: &mut dyn BufRead,
    take: &mut dyn FnMut(u64, &str) -> Result<()>,
) -> Result<()> {
    let mut bytes = Vec::new();
    let mut lines = 0;
    for number in 1_u64.. {
        bytes.clear();
        let read = (&mut *reader).take(MAX_LINE_BYTES + 1).read_until(b'\n', &mut bytes);
        let length = read.map_err(|reason| Error::Read { file: file.to_owned(), reason })?;
        if length == 0 {
            break;
        }
        if length as u64 > MAX_LINE_BYTES {
            let what = format!("a line of more than {} MiB", MAX_LINE_BYTES >> 20);
            return Err(malformed(file, number, what));
        }
        let bytes =
            if number == 1 { bytes.strip_prefix(b"\xef\xbb\xbf") } else { None }.unwrap_or(&bytes);
        let text = std::str::from_utf8(bytes).map_err(|error| {
            let what =
                format!("the text is not UTF-8 from byte {} of the line", error.valid_up_to());
            malformed(file, number, what)
        })?;
        if text.trim().is_empty() {
            continue;
        }
        lines += 1;
        if lines > MAX_LINES {
            let what = format!("more than {MAX_LINES} items");
            return Err(malformed(file, number, what));
        }
        take(number, text)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &[u8]) -> Result<Vec<Row>> {
        parse_rows("items.jsonl", &mut &text[..])
    }

    #[test]
    fn errors_name_file_line_and_field() {
        let rows =
            parse(b"\xef\xbb\xbf{\"a\": {\"b\": [1, \"x\"]}, \"n\": \"2\"}\n\n{\"a\": 3}").unwrap();
        assert_eq!(rows.iter().map(|row| row.line).collect::<Vec<_>>(), [1, 3]);
        assert_eq!(rows[0].index("n", 3).unwrap(), 2);
        for (error, expected) in [
            (
                rows[0].index("n", 2).unwrap_err(),
                "items.jsonl:1: field \"n\": expected a number from 0 to 1",
            ),
            (rows[0].texts("a.b").unwrap_err(), "field \"a.b[0]\": expected a string, found 1"),
            (rows[1].text("a.b").unwrap_err(), "items.jsonl:3: field \"a.b\": it is missing"),
            (rows[1].list("a").unwrap_err(), "field \"a\": expected a list, found 3"),
            (parse(b"").unwrap_err(), "there are no items"),
            (parse(b"{}\n[1]").unwrap_err(), "items.jsonl:2: expected one JSON object"),
            (parse(b"{}\n{\"a\":").unwrap_err(), "items.jsonl:2: this line is not JSON"),
            (parse(b"{}\n\xff").unwrap_err(), "items.jsonl:2: the text is not UTF-8"),
            (parse(&vec![b' '; 1 << 21]).unwrap_err(), "items.jsonl:1: a line of more than 1 MiB"),
        ] {
            assert!(error.to_string().contains(expected), "{error}");
        }
    }
}
