//! The files of a Hugging Face directory, of any content, are read whole or refused.
//!
//! The input is cut at its NUL-terminated markers: config.json, then the index, then up to two
//! safetensors files, each after the marker `\0--\0`.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mmfree::checkpoint::Checkpoint;
use mmfree_fuzz::{Borrowed, read_everything};

const MARKER: &[u8] = b"\0--\0";
/// Slots of the input in order. An empty one is an absent file.
const NAMES: [&str; 4] =
    ["config.json", "model.safetensors.index.json", "model.safetensors", "b.safetensors"];

fuzz_target!(|input: &[u8]| {
    let mut rest = input;
    let mut parts = Vec::new();
    while parts.len() + 1 < NAMES.len()
        && let Some(at) = rest.windows(MARKER.len()).position(|window| window == MARKER)
    {
        parts.push(Borrowed::new(&rest[..at]));
        rest = &rest[at + MARKER.len()..];
    }
    parts.push(Borrowed::new(rest));
    // SAFETY: the checkpoint is dropped before the parts.
    let files = NAMES.into_iter().zip(&parts).map(|(name, part)| (name, unsafe { part.get() }));
    let files: Vec<_> = files.filter(|(_, bytes)| !bytes.is_empty()).collect();
    if let Ok(checkpoint) = Checkpoint::from_static_files(&files) {
        let _ = read_everything(&checkpoint);
    }
});
