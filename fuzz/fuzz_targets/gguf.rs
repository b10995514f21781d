//! A packed file of any content is read whole or refused.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mmfree::checkpoint::Checkpoint;
use mmfree_fuzz::{Borrowed, read_everything};

fuzz_target!(|bytes: &[u8]| {
    let bytes = Borrowed::new(bytes);
    // SAFETY: the checkpoint is dropped before the bytes.
    if let Ok(checkpoint) = Checkpoint::from_static_gguf(unsafe { bytes.get() }) {
        let _ = read_everything(&checkpoint);
    }
});
