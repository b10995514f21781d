//! Digests of the machine's state, for lock-step comparison with the RTL (`hw/dv/tb_main.cpp`).

use std::fmt::Write;

use crate::error::Result;
use crate::machine::Machine;

/// A value's part of a digest, which is the sum over all places.
fn mix(index: u64, value: u32) -> u64 {
    let z = index.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ u64::from(value);
    let z = (z ^ (z >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
    z ^ (z >> 32)
}

fn digest(values: impl Iterator<Item = u32>) -> u64 {
    values
        .enumerate()
        .fold(0, |sum: u64, (index, value)| sum.wrapping_add(mix(index as u64, value)))
}

/// Digest of vector memory.
pub fn vectors(machine: &Machine) -> u64 {
    digest(machine.vectors().iter().map(|&value| value as u32))
}

/// Digest of scalar and address registers.
pub fn registers(machine: &Machine) -> u64 {
    let scalars = machine.scalars().iter().flat_map(|scale| [scale.mantissa, scale.exponent]);
    digest(scalars.chain(machine.addresses().iter().copied()))
}

/// Digest of data memory.
pub fn data(machine: &Machine) -> u64 {
    let words = machine.data().chunks_exact(4);
    digest(words.map(|bytes| u32::from_le_bytes(std::array::from_fn(|i| bytes[i]))))
}

/// Runs a token and writes a line for every instruction, and one at the end: what the RTL's test bench
/// writes.
///
/// # Errors
/// Errors of the machine.
pub fn run(machine: &mut Machine, token: u32, out: &mut String) -> Result<u32> {
    let result = machine.run_observed(token, &mut |pc, machine| {
        // Writing to a string cannot fail.
        let _ = writeln!(out, "{pc} {:016x} {:016x}", vectors(machine), registers(machine));
    })?;
    let _ = writeln!(out, "token {result} data {:016x}", data(machine));
    Ok(result)
}
