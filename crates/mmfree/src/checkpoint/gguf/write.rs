//! Headers of new GGUF files.

use super::{ALIGNMENT_KEY, MAGIC, VERSION, kind};
use crate::checkpoint::Encoding;

/// Alignment of tensor data in written files: a cache line.
pub(in crate::checkpoint) const ALIGNMENT: usize = 64;

/// A tensor to be written.
#[derive(Clone, Debug)]
pub(in crate::checkpoint) struct NewTensor {
    pub name: String,
    /// Shape as stored, outermost dimension first.
    pub shape: Vec<usize>,
    pub encoding: Encoding,
    /// Bytes without padding.
    pub bytes: usize,
}

impl NewTensor {
    /// Zero bytes that must follow the data.
    pub fn padding(&self) -> usize {
        self.bytes.next_multiple_of(ALIGNMENT) - self.bytes
    }
}

/// Collects metadata, then lays out tensors.
pub(in crate::checkpoint) struct HeaderWriter {
    metadata: Vec<u8>,
    count: u64,
}

impl HeaderWriter {
    /// A header that states its alignment.
    pub fn new() -> Self {
        let mut header = Self { metadata: Vec::new(), count: 0 };
        header.u32(ALIGNMENT_KEY, ALIGNMENT as u32);
        header
    }

    fn entry(&mut self, key: &str, kind: u32, value: &[u8]) {
        put_text(&mut self.metadata, key.as_bytes());
        self.metadata.extend(kind.to_le_bytes());
        self.metadata.extend(value);
        self.count += 1;
    }

    pub fn u32(&mut self, key: &str, value: u32) {
        self.entry(key, kind::U32, &value.to_le_bytes());
    }

    pub fn f32(&mut self, key: &str, value: f32) {
        self.entry(key, kind::F32, &value.to_le_bytes());
    }

    pub fn bool(&mut self, key: &str, value: bool) {
        self.entry(key, kind::BOOL, &[value.into()]);
    }

    pub fn text(&mut self, key: &str, value: &str) {
        let mut bytes = Vec::new();
        put_text(&mut bytes, value.as_bytes());
        self.entry(key, kind::STRING, &bytes);
    }

    pub fn u32_array(&mut self, key: &str, values: &[u32]) {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.array(key, kind::U32, values.len(), &bytes);
    }

    pub fn u8_array(&mut self, key: &str, values: &[u8]) {
        self.array(key, kind::U8, values.len(), values);
    }

    fn array(&mut self, key: &str, element: u32, count: usize, elements: &[u8]) {
        let mut bytes = element.to_le_bytes().to_vec();
        bytes.extend((count as u64).to_le_bytes());
        bytes.extend(elements);
        self.entry(key, kind::ARRAY, &bytes);
    }

    /// The whole header, padded to where the tensor data begin. The data follow in the same order,
    /// each tensor with its [`padding`](NewTensor::padding).
    pub fn finish(self, tensors: &[NewTensor]) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend((tensors.len() as u64).to_le_bytes());
        bytes.extend(self.count.to_le_bytes());
        bytes.extend(self.metadata);
        let mut offset = 0;
        for tensor in tensors {
            put_text(&mut bytes, tensor.name.as_bytes());
            bytes.extend((tensor.shape.len() as u32).to_le_bytes());
            for &size in tensor.shape.iter().rev() {
                bytes.extend((size as u64).to_le_bytes());
            }
            bytes.extend(tensor.encoding.ggml_type().to_le_bytes());
            bytes.extend((offset as u64).to_le_bytes());
            offset += tensor.bytes + tensor.padding();
        }
        bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), 0);
        bytes
    }
}

fn put_text(bytes: &mut Vec<u8>, text: &[u8]) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text);
}
