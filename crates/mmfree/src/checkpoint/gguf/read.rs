//! Parser of GGUF files.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ops::Range;

use super::{ALIGNMENT_KEY, DEFAULT_ALIGNMENT, MAGIC, VERSION, kind};
use crate::checkpoint::Encoding;
use crate::error::{Error, Result};

/// Most metadata entries and most tensors that a file may have.
const MAX_ENTRIES: u64 = 1 << 16;
/// Longest metadata key and tensor name, in bytes.
const MAX_NAME_BYTES: u64 = 1024;
/// Deepest nesting of metadata arrays.
const MAX_ARRAY_DEPTH: u32 = 4;
/// Most dimensions of a tensor.
const MAX_DIMENSIONS: u32 = 4;
/// Largest alignment of tensor data.
const MAX_ALIGNMENT: u64 = 1 << 20;

/// A metadata value. Text and arrays stay in the file.
#[derive(Clone, Debug, PartialEq)]
pub(in crate::checkpoint) enum Value {
    /// An unsigned integer of any width.
    Unsigned(u64),
    /// A signed integer of any width.
    Signed(i64),
    /// A single. Doubles are narrowed.
    Float(f32),
    Bool(bool),
    /// Bytes of the file that hold the text.
    Text(Range<usize>),
    /// An array: number of its element type, bytes of the file that hold the elements.
    Array(u32, Range<usize>),
}

/// A tensor of the directory.
#[derive(Clone, Debug)]
pub(in crate::checkpoint) struct TensorInfo {
    pub name: String,
    /// Shape as stored, outermost dimension first.
    pub shape: Vec<usize>,
    pub encoding: Encoding,
    /// Bytes of the file that hold it.
    pub range: Range<usize>,
}

/// The parsed header of a file.
#[derive(Debug)]
pub(in crate::checkpoint) struct Header {
    pub metadata: BTreeMap<String, Value>,
    pub tensors: Vec<TensorInfo>,
}

/// Parses and checks the header of a file: every size against the bytes that are there, before
/// anything is allocated for it.
pub(in crate::checkpoint) fn parse(file: &str, bytes: &[u8]) -> Result<Header> {
    let mut cursor = Cursor { file, bytes, at: 0 };
    let magic: [u8; 4] = cursor.take("the magic number")?;
    if magic != MAGIC {
        return Err(cursor.malformed(format!("starts with {magic:02x?}, expected \"GGUF\"")));
    }
    let version = cursor.u32("the version")?;
    if version != VERSION {
        let hint = if version.swap_bytes() == VERSION { " (a big-endian file)" } else { "" };
        return Err(
            cursor.malformed(format!("is GGUF version {version}{hint}, expected {VERSION}"))
        );
    }
    let tensor_count = cursor.count("tensors")?;
    let metadata_count = cursor.count("metadata entries")?;
    let mut metadata = BTreeMap::new();
    for _ in 0..metadata_count {
        let key = cursor.name("a metadata key")?;
        let kind = cursor.u32(&key)?;
        let value = cursor.value(&key, kind, 0)?;
        match metadata.entry(key) {
            Entry::Vacant(entry) => entry.insert(value),
            Entry::Occupied(entry) => {
                let what = format!("the metadata key {} appears twice", entry.key());
                return Err(cursor.malformed(what));
            }
        };
    }
    let alignment = match metadata.get(ALIGNMENT_KEY) {
        None => DEFAULT_ALIGNMENT,
        Some(&Value::Unsigned(n)) if n.is_power_of_two() && (8..=MAX_ALIGNMENT).contains(&n) => {
            n as usize
        }
        Some(other) => {
            return Err(cursor.malformed(format!(
                "{ALIGNMENT_KEY} is {other:?}, expected a power of two from 8 to {MAX_ALIGNMENT}"
            )));
        }
    };
    let mut tensors = Vec::new();
    for _ in 0..tensor_count {
        tensors.push(cursor.tensor_info()?);
    }
    let start = cursor.at.next_multiple_of(alignment);
    let tensors = place_tensors(&cursor, tensors, start, alignment)?;
    Ok(Header { metadata, tensors })
}

/// A directory entry whose offset still counts from the start of the tensor data.
struct Unplaced {
    name: String,
    shape: Vec<usize>,
    encoding: Encoding,
    offset: u64,
    bytes: usize,
}

/// Turns offsets into ranges of the file; refuses equal names, overlap and data beyond the end.
fn place_tensors(
    cursor: &Cursor,
    tensors: Vec<Unplaced>,
    start: usize,
    alignment: usize,
) -> Result<Vec<TensorInfo>> {
    let mut placed = Vec::new();
    for Unplaced { name, shape, encoding, offset, bytes } in tensors {
        if offset % alignment as u64 != 0 {
            return Err(cursor.malformed(format!(
                "tensor {name} has offset {offset}, expected a multiple of {alignment}"
            )));
        }
        let end = (start as u64).checked_add(offset).and_then(|at| at.checked_add(bytes as u64));
        match end {
            Some(end) if end <= cursor.bytes.len() as u64 => {
                let end = end as usize;
                placed.push(TensorInfo { name, shape, encoding, range: end - bytes..end });
            }
            _ => {
                return Err(cursor.truncated(&format!("tensor {name}"), end.unwrap_or(u64::MAX)));
            }
        }
    }
    let mut by_name: Vec<&TensorInfo> = placed.iter().collect();
    by_name.sort_by(|a, b| a.name.cmp(&b.name));
    if let Some(pair) = by_name.windows(2).find(|pair| pair[0].name == pair[1].name) {
        return Err(cursor.malformed(format!("tensor {} appears twice", pair[0].name)));
    }
    by_name.sort_by_key(|tensor| tensor.range.start);
    if let Some(pair) = by_name.windows(2).find(|pair| pair[0].range.end > pair[1].range.start) {
        return Err(cursor.malformed(format!(
            "tensor {} at bytes {:?} overlaps tensor {} at bytes {:?}",
            pair[0].name, pair[0].range, pair[1].name, pair[1].range
        )));
    }
    Ok(placed)
}

/// Reads from the front of a file and never beyond its end.
struct Cursor<'a> {
    file: &'a str,
    bytes: &'a [u8],
    at: usize,
}

impl Cursor<'_> {
    fn malformed(&self, what: String) -> Error {
        Error::Malformed { file: self.file.to_owned(), what }
    }

    fn truncated(&self, what: &str, expected: u64) -> Error {
        Error::Truncated {
            file: self.file.to_owned(),
            what: what.to_owned(),
            expected,
            found: self.bytes.len() as u64,
        }
    }

    /// Steps over `length` bytes and returns where they are.
    fn skip(&mut self, what: &str, length: u64) -> Result<Range<usize>> {
        let end = (self.at as u64).saturating_add(length);
        if end > self.bytes.len() as u64 {
            return Err(self.truncated(what, end));
        }
        let range = self.at..end as usize;
        self.at = range.end;
        Ok(range)
    }

    fn take<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        let range = self.skip(what, N as u64)?;
        let mut taken = [0; N];
        taken.copy_from_slice(&self.bytes[range]);
        Ok(taken)
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        self.take(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        self.take(what).map(u64::from_le_bytes)
    }

    fn count(&mut self, what: &str) -> Result<u64> {
        let count = self.u64(what)?;
        if count > MAX_ENTRIES {
            return Err(self.malformed(format!(
                "announces {count} {what}, more than the limit of {MAX_ENTRIES}"
            )));
        }
        Ok(count)
    }

    fn name(&mut self, what: &str) -> Result<String> {
        let length = self.u64(what)?;
        if length > MAX_NAME_BYTES {
            return Err(self.malformed(format!(
                "{what} of {length} bytes at byte {}, more than the limit of {MAX_NAME_BYTES}",
                self.at
            )));
        }
        let range = self.skip(what, length)?;
        match str::from_utf8(&self.bytes[range.clone()]) {
            Ok(name) => Ok(name.to_owned()),
            Err(_) => Err(self.malformed(format!("{what} at byte {} is not UTF-8", range.start))),
        }
    }

    fn value(&mut self, key: &str, kind: u32, depth: u32) -> Result<Value> {
        Ok(match kind {
            kind::U8 => Value::Unsigned(self.take::<1>(key)?[0].into()),
            kind::I8 => Value::Signed((self.take::<1>(key)?[0] as i8).into()),
            kind::U16 => Value::Unsigned(u16::from_le_bytes(self.take(key)?).into()),
            kind::I16 => Value::Signed(i16::from_le_bytes(self.take(key)?).into()),
            kind::U32 => Value::Unsigned(self.u32(key)?.into()),
            kind::I32 => Value::Signed(i32::from_le_bytes(self.take(key)?).into()),
            kind::F32 => Value::Float(f32::from_le_bytes(self.take(key)?)),
            kind::U64 => Value::Unsigned(self.u64(key)?),
            kind::I64 => Value::Signed(i64::from_le_bytes(self.take(key)?)),
            kind::F64 => Value::Float(f64::from_le_bytes(self.take(key)?) as f32),
            kind::BOOL => match self.take::<1>(key)?[0] {
                0 => Value::Bool(false),
                1 => Value::Bool(true),
                other => {
                    return Err(self.malformed(format!("{key} is the truth value {other}")));
                }
            },
            kind::STRING => {
                let length = self.u64(key)?;
                Value::Text(self.skip(key, length)?)
            }
            kind::ARRAY => self.array(key, depth)?,
            other => {
                return Err(self.malformed(format!("{key} has the unknown metadata type {other}")));
            }
        })
    }

    fn array(&mut self, key: &str, depth: u32) -> Result<Value> {
        if depth == MAX_ARRAY_DEPTH {
            return Err(
                self.malformed(format!("{key} nests arrays deeper than {MAX_ARRAY_DEPTH} levels"))
            );
        }
        let kind = self.u32(key)?;
        let count = self.u64(key)?;
        let width = match kind {
            kind::U8 | kind::I8 | kind::BOOL => 1,
            kind::U16 | kind::I16 => 2,
            kind::U32 | kind::I32 | kind::F32 => 4,
            kind::U64 | kind::I64 | kind::F64 => 8,
            _ => 0,
        };
        let start = self.at;
        if width > 0 {
            self.skip(key, count.saturating_mul(width))?;
        } else {
            // Every element takes bytes, so a count that lies ends at the end of the file.
            for _ in 0..count {
                self.value(key, kind, depth + 1)?;
            }
        }
        Ok(Value::Array(kind, start..self.at))
    }

    fn tensor_info(&mut self) -> Result<Unplaced> {
        let name = self.name("a tensor name")?;
        let dimensions = self.u32(&name)?;
        if dimensions == 0 || dimensions > MAX_DIMENSIONS {
            return Err(self.malformed(format!(
                "tensor {name} has {dimensions} dimensions, expected 1 to {MAX_DIMENSIONS}"
            )));
        }
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            let size = self.u64(&name)?;
            // The innermost dimension comes first in the file.
            shape.insert(0, usize::try_from(size).unwrap_or(usize::MAX));
        }
        let number = self.u32(&name)?;
        let encoding = Encoding::from_ggml_type(number).ok_or_else(|| {
            self.malformed(format!(
                "tensor {name} has ggml type {number}; expected F32 (0), F16 (1), BF16 (30), \
                 TQ1_0 (34) or TQ2_0 (35)"
            ))
        })?;
        let bytes = encoding.tensor_bytes(&shape).ok_or_else(|| {
            self.malformed(format!(
                "tensor {name} of {} cannot have shape {shape:?}",
                encoding.name()
            ))
        })?;
        let offset = self.u64(&name)?;
        Ok(Unplaced { name, shape, encoding, offset, bytes })
    }
}
