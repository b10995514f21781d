//! Files that lie about themselves, built byte by byte.

use proptest::prelude::*;

use super::read::{Value, parse};
use super::write::{HeaderWriter, NewTensor};
use super::{DEFAULT_ALIGNMENT, MAGIC, VERSION, kind};
use crate::checkpoint::{Encoding, FloatType};

/// A metadata entry or a directory entry, as bytes.
type Entry = Vec<u8>;

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

fn metadata(key: &str, kind: u32, value: &[u8]) -> Entry {
    [&text(key)[..], &kind.to_le_bytes(), value].concat()
}

fn tensor(name: &str, dimensions: &[u64], ggml_type: u32, offset: u64) -> Entry {
    let mut entry = text(name);
    entry.extend((dimensions.len() as u32).to_le_bytes());
    entry.extend(dimensions.iter().flat_map(|size| size.to_le_bytes()));
    entry.extend(ggml_type.to_le_bytes());
    entry.extend(offset.to_le_bytes());
    entry
}

fn file(metadata: &[Entry], tensors: &[Entry], data: usize) -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend((tensors.len() as u64).to_le_bytes());
    bytes.extend((metadata.len() as u64).to_le_bytes());
    bytes.extend(metadata.concat());
    bytes.extend(tensors.concat());
    bytes.resize(bytes.len().next_multiple_of(DEFAULT_ALIGNMENT) + data, 0);
    bytes
}

fn error(bytes: &[u8]) -> String {
    parse("x.gguf", bytes).unwrap_err().to_string()
}

#[test]
fn what_is_written_is_read() {
    let mut header = HeaderWriter::new();
    header.u32("a", 7);
    header.f32("b", 0.5);
    header.bool("c", true);
    header.text("d", "é");
    header.u8_array("e", &[1, 2, 3]);
    header.u32_array("f", &[4, 5]);
    let new = |name: &str, shape: &[usize], number| {
        let encoding = Encoding::from_ggml_type(number).unwrap();
        let bytes = encoding.tensor_bytes(shape).unwrap();
        NewTensor { name: name.to_owned(), shape: shape.to_vec(), encoding, bytes }
    };
    let tensors = [new("x", &[3], 0), new("y", &[2, 512], 34), new("z", &[2, 3, 4], 30)];
    let mut bytes = header.finish(&tensors);
    let start = bytes.len();
    bytes.resize(start + tensors.iter().map(|t| t.bytes + t.padding()).sum::<usize>(), 0);
    let parsed = parse("x", &bytes).unwrap();
    assert_eq!(parsed.metadata["a"], Value::Unsigned(7));
    assert_eq!(parsed.metadata["b"], Value::Float(0.5));
    assert_eq!(parsed.metadata["c"], Value::Bool(true));
    let Value::Text(range) = &parsed.metadata["d"] else { panic!() };
    assert_eq!(&bytes[range.clone()], "é".as_bytes());
    let Value::Array(kind::U8, range) = &parsed.metadata["e"] else { panic!() };
    assert_eq!(bytes[range.clone()], [1, 2, 3]);
    let found: Vec<_> =
        parsed.tensors.iter().map(|t| (&*t.name, &*t.shape, t.range.len())).collect();
    assert_eq!(found, [("x", &[3][..], 12), ("y", &[2, 512], 216), ("z", &[2, 3, 4], 48)]);
    assert_eq!(parsed.tensors[1].range.start, start + 64);
    assert_eq!(parsed.tensors[2].encoding, Encoding::Float(FloatType::Bf16));
}

#[test]
fn wrong_beginnings_are_refused() {
    let good = file(&[], &[], 0);
    parse("x", &good).unwrap();
    let patched = |at: usize, bytes: &[u8]| {
        let mut patched = good.clone();
        patched[at..at + bytes.len()].copy_from_slice(bytes);
        patched
    };
    assert!(error(&patched(0, b"GGML")).contains("expected \"GGUF\""));
    assert!(error(&patched(4, &2u32.to_le_bytes())).contains("version 2, expected 3"));
    assert!(error(&patched(4, &3u32.to_be_bytes())).contains("big-endian"));
    assert!(error(&patched(8, &u64::MAX.to_le_bytes())).contains("18446744073709551615 tensors"));
    assert!(error(&patched(16, &65537u64.to_le_bytes())).contains("65537 metadata entries"));
    assert!(error(&patched(16, &9u64.to_le_bytes())).contains("the file has 32 bytes"));
}

#[test]
fn wrong_metadata_are_refused() {
    let u32_entry = |key: &str, value: u32| metadata(key, kind::U32, &value.to_le_bytes());
    let array = |kind: u32, count: u64, rest: &[u8]| {
        [&kind.to_le_bytes()[..], &count.to_le_bytes(), rest].concat()
    };
    let mut nested = array(kind::U8, 0, &[]);
    for _ in 0..5 {
        nested = array(kind::ARRAY, 1, &nested);
    }
    let mut long_key = text("k");
    long_key[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    let mut not_text = metadata("k", kind::U8, &[0]);
    not_text[8] = 0xff;
    let cases = [
        (vec![u32_entry("a", 1), u32_entry("a", 1)], "key a appears twice"),
        (vec![u32_entry("general.alignment", 0)], "expected a power of two"),
        (vec![u32_entry("general.alignment", 48)], "expected a power of two"),
        (vec![u32_entry("general.alignment", 1 << 31)], "expected a power of two"),
        (vec![metadata("general.alignment", kind::BOOL, &[1])], "expected a power of two"),
        (vec![metadata("a", kind::BOOL, &[2])], "truth value 2"),
        (vec![metadata("a", 13, &[])], "unknown metadata type 13"),
        (vec![metadata("a", kind::STRING, &u64::MAX.to_le_bytes())], "is it truncated?"),
        (vec![metadata("a", kind::ARRAY, &array(kind::U64, u64::MAX, &[]))], "is it truncated?"),
        (vec![metadata("a", kind::ARRAY, &array(kind::STRING, u64::MAX, &[]))], "is it truncated?"),
        (vec![metadata("a", kind::ARRAY, &array(99, 1, &[]))], "unknown metadata type 99"),
        (vec![metadata("a", kind::ARRAY, &nested)], "deeper than 4"),
        (vec![long_key], "more than the limit of 1024"),
        (vec![not_text], "not UTF-8"),
    ];
    for (entries, expected) in cases {
        let error = error(&file(&entries, &[], 0));
        assert!(error.contains(expected), "{expected}: {error}");
    }
}

#[test]
fn wrong_tensors_are_refused() {
    let good = |name: &str, offset| tensor(name, &[8], 0, offset);
    parse("x", &file(&[], &[good("b", 32), good("a", 0)], 64)).unwrap();
    let cases = [
        (vec![good("a", 0), good("a", 32)], "tensor a appears twice"),
        (vec![good("a", 0), good("b", 0)], "overlaps"),
        (vec![tensor("a", &[9], 0, 0), good("b", 32)], "overlaps"),
        (vec![good("a", 16)], "expected a multiple of 32"),
        (vec![good("a", 64)], "is it truncated?"),
        (vec![good("a", u64::MAX - 31)], "is it truncated?"),
        (vec![tensor("a", &[], 0, 0)], "0 dimensions"),
        (vec![tensor("a", &[1; 5], 0, 0)], "5 dimensions"),
        (vec![tensor("a", &[u64::MAX, 2], 0, 0)], "cannot have shape"),
        (vec![tensor("a", &[1 << 31, 1 << 31, 2], 1, 0)], "cannot have shape"),
        (vec![tensor("a", &[255], 35, 0)], "cannot have shape"),
        (vec![tensor("a", &[8], 2, 0)], "ggml type 2"),
    ];
    for (entries, expected) in cases {
        let error = error(&file(&[], &entries, 64));
        assert!(error.contains(expected), "{expected}: {error}");
    }
}

proptest! {
    #[test]
    fn arbitrary_directories_never_panic(
        entries in proptest::collection::vec(
            ("[a-c]{1,2}", proptest::collection::vec(0u64..600, 0..5), 0u32..40, 0u64..8),
            0..6,
        ),
        cut in 0usize..400,
        data in 0usize..4096,
    ) {
        let tensors: Vec<Entry> = entries
            .iter()
            .map(|(name, dims, number, offset)| tensor(name, dims, *number, offset * 32))
            .collect();
        let mut bytes = file(&[], &tensors, data);
        bytes.truncate(bytes.len().saturating_sub(cut));
        if let Ok(header) = parse("x", &bytes) {
            for tensor in header.tensors {
                prop_assert!(tensor.range.end <= bytes.len());
            }
        }
    }
}
