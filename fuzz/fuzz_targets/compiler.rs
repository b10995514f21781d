//! Models of any content to program images: compiled and run for a token, or refused.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mmfree::checkpoint::Checkpoint;
use mmfree_accel::compiler::Plan;
use mmfree_accel::config::{Configuration, Packing};
use mmfree_accel::machine::Machine;
use mmfree_accel::timing::{self, Memory};
use mmfree_fuzz::Borrowed;

fuzz_target!(|bytes: &[u8]| {
    let [choice, bytes @ ..] = bytes else { return };
    let bytes = Borrowed::new(bytes);
    // SAFETY: the checkpoint is dropped before the bytes.
    let Ok(checkpoint) = Checkpoint::from_static_gguf(unsafe { bytes.get() }) else { return };
    let name = Configuration::preset_names().nth(usize::from(choice & 3)).unwrap_or("tiny");
    let packing = if choice & 4 == 0 { Packing::T2 } else { Packing::T5 };
    let Some(configuration) = Configuration::preset(name) else { return };
    let Ok(plan) = Plan::new(checkpoint.config(), &configuration, packing) else { return };
    // What takes long is no finding.
    if plan.stream_bytes > 1 << 16 || checkpoint.config().num_hidden_layers > 64 {
        return;
    }
    let _ = timing::estimate(&plan.program, &configuration, Memory::FULL_RATE);
    if let Ok(image) = plan.image(&checkpoint, &mut |_, _| {}) {
        // A plan's program never does what the machine refuses.
        Machine::new(image).run(0).unwrap();
    }
});
