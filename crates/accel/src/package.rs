//! Writes the SystemVerilog package that the RTL shares with this crate: `hw/rtl/mmfree_pkg.sv`.

use std::fmt::Write;

use crate::arith;
use crate::config::Packing;
use crate::isa::{self, Field, Opcode};

/// Lines of hexadecimal words, highest index first, as a concatenation lists them.
fn words(values: impl DoubleEndedIterator<Item = u64>, bits: u32, per_line: usize) -> String {
    let digits = bits.div_ceil(4) as usize;
    let items: Vec<_> = values.rev().map(|value| format!("{bits}'h{value:0digits$x}")).collect();
    let lines: Vec<_> =
        items.chunks(per_line).map(|line| format!("    {}", line.join(", "))).collect();
    lines.join(",\n")
}

/// The package's text.
pub fn system_verilog() -> String {
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = render(&mut text);
    text
}

fn render(out: &mut String) -> std::fmt::Result {
    writeln!(out, "// Constants that hardware and software share.")?;
    writeln!(
        out,
        "// Written by mmfree-accel (crates/accel/src/package.rs): change it there. A test compares."
    )?;
    writeln!(out, "package mmfree_pkg;")?;
    writeln!(out, "  // Instruction set")?;
    for (name, value) in [
        ("IsaVersion", isa::VERSION as usize),
        ("InstructionBits", isa::INSTRUCTION_BYTES * 8),
        ("ProgramLimit", isa::PROGRAM_LIMIT),
        ("ScalarRegisters", isa::SCALAR_REGISTERS),
        ("AddressRegisters", isa::ADDRESS_REGISTERS),
        ("AddressUnitBytes", isa::ADDRESS_UNIT as usize),
        ("LoopDepth", isa::LOOP_DEPTH),
        ("VectorLimit", isa::VECTOR_LIMIT),
    ] {
        writeln!(out, "  localparam int unsigned {name} = {value};")?;
    }
    writeln!(out, "\n  // Fields of an instruction")?;
    for field in Field::ALL {
        let (low, width) = field.bits();
        writeln!(out, "  localparam int unsigned {}Low = {low};", field.name())?;
        writeln!(out, "  localparam int unsigned {}Width = {width};", field.name())?;
    }
    writeln!(out, "\n  typedef enum logic [OpcodeWidth-1:0] {{")?;
    for (index, &opcode) in Opcode::ALL.iter().enumerate() {
        let comma = if index + 1 < Opcode::ALL.len() { "," } else { "" };
        writeln!(
            out,
            "    Op{} = {}'d{}{comma}",
            opcode.name(),
            Field::Opcode.bits().1,
            opcode as u8
        )?;
    }
    writeln!(out, "  }} opcode_e;")?;

    writeln!(out, "\n  // Arithmetic: docs/numerics.md")?;
    for (name, value) in [
        ("FractionBits", arith::FRACTION_BITS),
        ("SquareShift", arith::SQUARE_SHIFT),
        ("QuantFloor", arith::QUANT_FLOOR),
        ("SigmoidSegments", arith::SIGMOID_SEGMENTS as u32),
    ] {
        writeln!(out, "  localparam int unsigned {name} = {value};")?;
    }
    writeln!(out, "\n  // A factor: mantissa * 2^-exponent")?;
    writeln!(
        out,
        "  typedef struct packed {{\n    logic [30:0] mantissa;\n    logic [5:0] exponent;\n  }} scale_t;"
    )?;

    let table = arith::sigmoid_table();
    writeln!(
        out,
        "\n  // Sigmoid on [0, 16) in steps of 1/16: value (21 bits) and rise (15 bits) of each segment, Q20."
    )?;
    writeln!(out, "  localparam logic [SigmoidSegments-1:0][35:0] SigmoidTable = {{")?;
    let entries = table.iter().map(|&(value, rise)| u64::from(value) << 15 | u64::from(rise));
    writeln!(out, "{}\n  }};", words(entries, 36, 6))?;

    writeln!(
        out,
        "\n  // Five trits of a byte, base 3: for each two bits, {{is negative, is not zero}}, lowest trit first."
    )?;
    writeln!(out, "  localparam logic [255:0][9:0] TritTable5 = {{")?;
    let entries =
        (0..=255u8).map(|byte| {
            Packing::T5.decode(byte).iter().rev().fold(0u64, |bits, &trit| {
                bits << 2 | u64::from(trit < 0) << 1 | u64::from(trit != 0)
            })
        });
    writeln!(out, "{}\n  }};", words(entries, 10, 10))?;
    writeln!(out, "endpackage")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// After a change of the instruction set: `cargo run -- accel package -o hw/rtl/mmfree_pkg.sv`.
    #[test]
    fn the_committed_package_is_current() {
        let committed = include_str!("../../../hw/rtl/mmfree_pkg.sv");
        assert_eq!(committed, system_verilog(), "write it anew: mmfree accel package");
    }
}
