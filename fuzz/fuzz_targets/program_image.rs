//! Program images of the accelerator: read, then run.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mmfree_accel::image::Image;
use mmfree_accel::machine::Machine;

fuzz_target!(|bytes: &[u8]| {
    let mut bytes = bytes.to_vec();
    Image::reseal(&mut bytes);
    let Ok(image) = Image::from_bytes("fuzz", &bytes) else { return };
    // Loops that run long are no finding.
    if image.program.iter().all(|instruction| instruction.imm < 1 << 10) {
        let _ = Machine::new(image).run(1);
    }
});
