//! The recurrent state of one sequence.

use std::sync::{Arc, OnceLock};

use mmfree_kernels::cuda::{Buffer, Device};

use crate::error::{Error, Result};
use crate::model::Model;

/// Memory of one sequence: `h` [L, D], of constant size however long the sequence is.
///
/// It lies where it was used last. A state that a GPU has stepped is copied to the host when somebody looks at
/// it; should that GPU have failed meanwhile, it reads as NaN.
#[derive(Debug)]
pub struct State {
    /// Missing while the device's copy is newer.
    host: OnceLock<Vec<f32>>,
    /// The newest copy, if there is one.
    device: Option<Buffer<f32>>,
    len: usize,
    tokens_seen: u64,
}

impl Clone for State {
    fn clone(&self) -> Self {
        Self::from_host(self.hidden().to_vec(), self.tokens_seen)
    }
}

impl PartialEq for State {
    fn eq(&self, other: &Self) -> bool {
        self.tokens_seen == other.tokens_seen && self.hidden() == other.hidden()
    }
}

/// Begins a saved state.
const MAGIC: [u8; 8] = *b"MMFSTATE";
/// Version of the layout below.
const VERSION: u32 = 1;
/// Magic, version, L, D, tokens seen, fingerprint of the model.
const HEADER_BYTES: usize = 8 + 3 * 4 + 2 * 8;
/// XXH3 of everything before it.
const CHECKSUM_BYTES: usize = 8;

impl State {
    /// The state before the first token: all zero.
    pub fn new(model: &Model) -> Self {
        let config = model.config();
        Self::from_host(vec![0.0; config.num_hidden_layers * config.hidden_size], 0)
    }

    fn from_host(hidden: Vec<f32>, tokens_seen: u64) -> Self {
        Self { len: hidden.len(), host: OnceLock::from(hidden), device: None, tokens_seen }
    }

    /// `h` [L, D].
    pub fn hidden(&self) -> &[f32] {
        self.host.get_or_init(|| {
            let mut hidden = vec![f32::NAN; self.len];
            if let Some(device) = &self.device
                && device.read(0, &mut hidden).is_err()
            {
                hidden.fill(f32::NAN);
            }
            hidden
        })
    }

    /// The copy on a device, to be changed there: any other copy is out of date from now on.
    pub(crate) fn on_device(&mut self, device: &Arc<Device>) -> Result<&mut Buffer<f32>> {
        let is_there = self.device.as_ref().is_some_and(|copy| Arc::ptr_eq(copy.device(), device));
        if !is_there {
            let copy = Buffer::from_slice(device, self.hidden())?;
            self.device = Some(copy);
        }
        self.host = OnceLock::new();
        self.device.as_mut().ok_or_else(|| bad("it is nowhere"))
    }

    /// Becomes what another state is, where that lies. Memory that it has there is used again.
    pub(crate) fn copy_from(&mut self, other: &Self) -> Result<()> {
        let (Some(from), None) = (&other.device, other.host.get()) else {
            *self = other.clone();
            return Ok(());
        };
        let device = self.device.take().filter(|to| Arc::ptr_eq(to.device(), from.device()));
        let mut device = match device.filter(|to| to.len() == from.len()) {
            Some(device) => device,
            None => Buffer::zeros(from.device(), from.len())?,
        };
        device.copy_from(from)?;
        self.device = Some(device);
        self.host = OnceLock::new();
        self.len = other.len;
        self.tokens_seen = other.tokens_seen;
        Ok(())
    }

    /// How many tokens the state has seen.
    pub fn tokens_seen(&self) -> u64 {
        self.tokens_seen
    }

    /// The `h` `[D]` of a layer.
    pub(crate) fn layer_mut(&mut self, layer: usize, width: usize) -> &mut [f32] {
        self.hidden();
        self.device = None;
        let hidden = self.host.get_mut().map_or(&mut [][..], |hidden| hidden);
        &mut hidden[layer * width..][..width]
    }

    pub(crate) fn count_tokens(&mut self, tokens: usize) {
        self.tokens_seen += tokens as u64;
    }

    /// The state as bytes, bound to the model by its fingerprint. All numbers little-endian:
    ///
    /// | bytes | what |
    /// |---|---|
    /// | 0..8 | `MMFSTATE` |
    /// | 8..12 | version, u32: 1 |
    /// | 12..20 | L and D, u32 each |
    /// | 20..28 | tokens seen, u64 |
    /// | 28..36 | fingerprint of the model, u64 |
    /// | 36.. | `h` [L, D], f32 |
    /// | last 8 | XXH3 (64 bits, seed 0) of everything before |
    pub fn to_bytes(&self, model: &Model) -> Vec<u8> {
        let config = model.config();
        let mut bytes = Vec::with_capacity(HEADER_BYTES + 4 * self.len + CHECKSUM_BYTES);
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend((config.num_hidden_layers as u32).to_le_bytes());
        bytes.extend((config.hidden_size as u32).to_le_bytes());
        bytes.extend(self.tokens_seen.to_le_bytes());
        bytes.extend(model.fingerprint().to_le_bytes());
        bytes.extend(self.hidden().iter().flat_map(|h| h.to_le_bytes()));
        bytes.extend(checksum(&bytes).to_le_bytes());
        bytes
    }

    /// Reads [`to_bytes`](Self::to_bytes) back.
    ///
    /// # Errors
    /// Bytes that are no state, of another version or another model, damaged, or not finite.
    pub fn from_bytes(model: &Model, bytes: &[u8]) -> Result<Self> {
        let config = model.config();
        let count = config.num_hidden_layers * config.hidden_size;
        let mut reader = Reader(bytes);
        if reader.take::<8>()? != MAGIC {
            return Err(bad("these bytes are not a saved state: they do not begin with MMFSTATE"));
        }
        let version = u32::from_le_bytes(reader.take()?);
        if version != VERSION {
            return Err(bad(&format!("version {version}, expected {VERSION}")));
        }
        let shape = [u32::from_le_bytes(reader.take()?), u32::from_le_bytes(reader.take()?)];
        let expected = [config.num_hidden_layers as u32, config.hidden_size as u32];
        if shape != expected {
            return Err(bad(&format!(
                "{} layers of width {}, but the model has {} of {}",
                shape[0], shape[1], expected[0], expected[1]
            )));
        }
        let tokens_seen = u64::from_le_bytes(reader.take()?);
        let fingerprint = u64::from_le_bytes(reader.take()?);
        let expected = HEADER_BYTES + 4 * count + CHECKSUM_BYTES;
        if bytes.len() != expected {
            return Err(bad(&format!("{} bytes, expected {expected}", bytes.len())));
        }
        let (body, sum) = bytes.split_at(expected - CHECKSUM_BYTES);
        if checksum(body).to_le_bytes() != sum {
            return Err(bad("the checksum does not match: the bytes were damaged"));
        }
        if fingerprint != model.fingerprint() {
            return Err(bad("it belongs to another model (same sizes, other weights)"));
        }
        let values = body[HEADER_BYTES..].chunks_exact(4);
        let hidden: Vec<f32> =
            values.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        if hidden.iter().any(|h| !h.is_finite()) {
            return Err(bad("a value is not finite"));
        }
        Ok(Self::from_host(hidden, tokens_seen))
    }
}

fn bad(what: &str) -> Error {
    Error::Invalid(format!("cannot restore the state: {what}"))
}

fn checksum(bytes: &[u8]) -> u64 {
    twox_hash::XxHash3_64::oneshot(bytes)
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N]> {
        let (&head, rest) = self
            .0
            .split_first_chunk()
            .ok_or_else(|| bad("the bytes end within the header; are they truncated?"))?;
        self.0 = rest;
        Ok(head)
    }
}
