//! Program texts of the accelerator: assembled or refused; what was assembled reads back as itself.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mmfree_accel::asm;

fuzz_target!(|text: &str| {
    match asm::assemble("fuzz", text) {
        Ok(program) => {
            let listing = asm::listing(&program);
            assert_eq!(asm::assemble("listing", &listing).ok(), Some(program), "{listing}");
        }
        Err(error) => drop((error.to_string(), format!("{error:?}"))),
    }
});
