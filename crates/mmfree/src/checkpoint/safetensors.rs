//! Safetensors files: headers read, files written.
//!
//! Headers are read here and not by the `safetensors` crate, which keeps the last of two equal keys and whose
//! errors carry no offsets.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::ops::Range;

use serde_json::{Map, Value, json};

use super::float::FloatType;
use crate::error::{Error, Result};
use crate::json;

/// Longest header that is parsed. The largest supported configuration needs a quarter of it.
const MAX_HEADER_BYTES: u64 = 16 << 20;

/// A tensor of a safetensors file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub float: FloatType,
    pub shape: Vec<usize>,
    /// Bytes of the file that hold it.
    pub range: Range<usize>,
}

/// Parses the header of a file and checks that the tensors fill the rest of it, without gaps and
/// without overlap.
pub(super) fn parse(file: &str, bytes: &[u8]) -> Result<BTreeMap<String, Entry>> {
    let malformed = |what: String| Error::Malformed { file: file.to_owned(), what };
    let truncated = |what: &str, expected: u64| Error::Truncated {
        file: file.to_owned(),
        what: what.to_owned(),
        expected,
        found: bytes.len() as u64,
    };
    let (length, rest) = bytes.split_first_chunk().ok_or_else(|| truncated("the length", 8))?;
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER_BYTES {
        return Err(malformed(format!(
            "the header announces {length} bytes, more than the limit of {MAX_HEADER_BYTES}; \
             is this a safetensors file?"
        )));
    }
    let header = rest.get(..length as usize).ok_or_else(|| truncated("the header", 8 + length))?;
    let start = 8 + length as usize;
    let fields = match json::parse(header) {
        Ok(Value::Object(fields)) => fields,
        Ok(_) => return Err(malformed("the header is not a JSON object".to_owned())),
        Err(error) => return Err(malformed(format!("the header is not valid JSON: {error}"))),
    };
    let mut entries = BTreeMap::new();
    for (name, value) in fields {
        if name == "__metadata__" {
            continue;
        }
        let entry = parse_entry(&value, start)
            .map_err(|what| malformed(format!("tensor {name}: {what}")))?;
        if entry.range.end > bytes.len() {
            return Err(truncated(&format!("tensor {name}"), entry.range.end as u64));
        }
        entries.insert(name, entry);
    }
    let mut order: Vec<_> = entries.iter().collect();
    order.sort_by_key(|(_, entry)| (entry.range.start, entry.range.end));
    let mut end = start;
    for (name, entry) in order {
        if entry.range.start != end {
            return Err(malformed(format!(
                "tensor {name} begins at data byte {}, but the one before it ends at {}; \
                 tensors may neither overlap nor leave gaps",
                entry.range.start - start,
                end - start
            )));
        }
        end = entry.range.end;
    }
    if end != bytes.len() {
        return Err(malformed(format!(
            "the tensors end at byte {end}, but the file has {} bytes",
            bytes.len()
        )));
    }
    Ok(entries)
}

fn parse_entry(value: &Value, start: usize) -> std::result::Result<Entry, String> {
    let name = value.get("dtype").and_then(Value::as_str).ok_or("it has no dtype")?;
    let float = FloatType::from_name(name)
        .ok_or_else(|| format!("dtype {name} is not supported; expected F32, F16 or BF16"))?;
    let shape = sizes(value.get("shape")).ok_or("its shape is not a list of sizes")?;
    let offsets = sizes(value.get("data_offsets"));
    let (begin, end) = match offsets.as_deref() {
        Some(&[begin, end]) if begin <= end => (begin, end),
        _ => return Err("its data_offsets are not two ascending numbers".to_owned()),
    };
    let expected = shape
        .iter()
        .try_fold(float.bytes(), |bytes, &size| bytes.checked_mul(size))
        .ok_or_else(|| format!("shape {shape:?} is too large"))?;
    if end - begin != expected {
        return Err(format!(
            "shape {shape:?} of {name} takes {expected} bytes, but data_offsets span {}",
            end - begin
        ));
    }
    let range = start.checked_add(begin).zip(start.checked_add(end));
    let (begin, end) = range.ok_or("its data_offsets are too large")?;
    Ok(Entry { float, shape, range: begin..end })
}

fn sizes(value: Option<&Value>) -> Option<Vec<usize>> {
    value?.as_array()?.iter().map(|size| usize::try_from(size.as_u64()?).ok()).collect()
}

/// A tensor to write.
#[derive(Clone, Copy, Debug)]
pub struct TensorData<'a> {
    /// Its name.
    pub name: &'a str,
    /// Outermost dimension first.
    pub shape: &'a [usize],
    /// Row-major.
    pub values: &'a [f32],
}

/// Writes a safetensors file with the tensors in the type `float`, rounded half to even, in the given order.
///
/// # Errors
/// Errors of writing; a tensor whose shape is not that of its values.
pub fn write(out: &mut dyn Write, tensors: &[TensorData<'_>], float: FloatType) -> io::Result<()> {
    let mut header = Map::new();
    header.insert("__metadata__".to_owned(), json!({"format": "pt"}));
    let mut end = 0;
    for tensor in tensors {
        if tensor.shape.iter().product::<usize>() != tensor.values.len() {
            let TensorData { name, shape, values } = tensor;
            let len = values.len();
            return Err(io::Error::other(format!("tensor {name} of {shape:?} has {len} values")));
        }
        let start = end;
        end += tensor.values.len() * float.bytes();
        let entry =
            json!({"dtype": float.name(), "shape": tensor.shape, "data_offsets": [start, end]});
        header.insert(tensor.name.to_owned(), entry);
    }
    let mut header = Value::Object(header).to_string();
    // The data that follow are aligned.
    header.extend(std::iter::repeat_n(' ', header.len().next_multiple_of(8) - header.len()));
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(header.as_bytes())?;
    let mut bytes = Vec::new();
    for tensor in tensors {
        for values in tensor.values.chunks(1 << 16) {
            bytes.clear();
            float.encode(values, &mut bytes);
            out.write_all(&bytes)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(header: &str, data: usize) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        bytes
    }

    fn error(header: &str, data: usize) -> String {
        parse("x.safetensors", &file(header, data)).unwrap_err().to_string()
    }

    fn entry(dtype: &str, shape: &str, begin: u64, end: u64) -> String {
        format!(r#"{{"dtype": "{dtype}", "shape": {shape}, "data_offsets": [{begin}, {end}]}}"#)
    }

    #[test]
    fn a_header_is_read() {
        let (a, b) = (entry("F32", "[2, 3]", 4, 28), entry("BF16", "[2]", 0, 4));
        let header = format!(r#"{{"__metadata__": {{"format": "pt"}}, "a": {a}, "b": {b}}}  "#);
        let entries = parse("x", &file(&header, 28)).unwrap();
        let start = 8 + header.len();
        assert_eq!(entries["a"].shape, [2, 3]);
        assert_eq!(entries["a"].range, start + 4..start + 28);
        assert_eq!(entries["b"].float, FloatType::Bf16);
    }

    #[test]
    fn what_is_written_reads_the_same() {
        let a = TensorData { name: "a", shape: &[2, 2], values: &[1.0, 2.0, 3.0, -0.5] };
        let b = TensorData { name: "b", shape: &[1], values: &[7.0] };
        let mut bytes = Vec::new();
        write(&mut bytes, &[b, a], FloatType::Bf16).unwrap();
        let entries = parse("x", &bytes).unwrap();
        assert_eq!(entries["a"].shape, [2, 2]);
        assert_eq!(bytes.len(), entries["a"].range.end);
        let mut values = [0.0; 4];
        FloatType::Bf16.decode(&bytes[entries["a"].range.clone()], &mut values);
        assert_eq!(values, *a.values);
        assert!(
            write(&mut Vec::new(), &[TensorData { shape: &[3], ..b }], FloatType::F32).is_err()
        );
    }

    #[test]
    fn every_lie_is_refused_with_its_numbers() {
        let a = entry("F32", "[2]", 0, 8);
        let cases = [
            (format!(r#"{{"a": {a}, "a": {a}}}"#), 8, "appears twice"),
            (format!(r#"{{"a": {a}, "b": {a}}}"#), 8, "begins at data byte 0"),
            (format!(r#"{{"a": {a}, "b": {}}}"#, entry("F32", "[1]", 9, 13)), 13, "ends at 8"),
            (format!(r#"{{"a": {a}}}"#), 7, "is it truncated?"),
            (format!(r#"{{"a": {a}}}"#), 9, "the file has"),
            (format!(r#"{{"a": {}}}"#, entry("F32", "[3]", 0, 8)), 8, "takes 12 bytes"),
            (format!(r#"{{"a": {}}}"#, entry("I8", "[8]", 0, 8)), 8, "dtype I8"),
            (format!(r#"{{"a": {}}}"#, entry("F32", "[-1]", 0, 8)), 8, "list of sizes"),
            (format!(r#"{{"a": {}}}"#, entry("F32", "[2]", 8, 0)), 8, "two ascending"),
            (
                format!(r#"{{"a": {}}}"#, entry("F32", "[9223372036854775807, 4]", 0, 8)),
                8,
                "too large",
            ),
            (
                format!(r#"{{"a": {}}}"#, entry("F32", "[2]", u64::MAX - 8, u64::MAX)),
                8,
                "too large",
            ),
            ("[]".to_owned(), 0, "not a JSON object"),
            ("{".to_owned(), 0, "not valid JSON"),
            (r#"{"a": 1}"#.to_owned(), 0, "no dtype"),
        ];
        for (header, data, expected) in cases {
            let error = error(&header, data);
            assert!(error.contains(expected), "{header}: {error}");
        }
        for bytes in
            [&b""[..], b"\x01\0\0", b"\xff\xff\xff\xff\xff\xff\xff\xff{}", b"\x09\0\0\0\0\0\0\0{}"]
        {
            assert!(parse("x", bytes).is_err());
        }
    }
}
