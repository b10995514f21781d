//! The instruction set: opcodes, operands, encoding.
//!
//! This module is the single source: assembler, disassembler, the simulator's decoder, the tables of
//! `docs/isa.md` and the SystemVerilog package ([`crate::package`]) are made from [`Opcode`] and [`Field`].
//!
//! An instruction is 128 bits, little-endian. Fields that an opcode does not use are zero.

/// Version of the instruction set and of program images.
pub const VERSION: u32 = 1;
/// Bytes of an instruction.
pub const INSTRUCTION_BYTES: usize = 16;
/// Instructions that the instruction memory holds.
pub const PROGRAM_LIMIT: usize = 256;
/// Scalar registers s0 to s15, each a scale.
pub const SCALAR_REGISTERS: usize = 16;
/// Address registers a0 to a7, in units of [`ADDRESS_UNIT`].
pub const ADDRESS_REGISTERS: usize = 8;
/// Bytes of a unit of DRAM addresses.
pub const ADDRESS_UNIT: u64 = 128;
/// Loops inside one another.
pub const LOOP_DEPTH: usize = 4;
/// Longest vector of a row-wise instruction, so that no sum of squares overflows.
pub const VECTOR_LIMIT: usize = 16_383;

/// Where a value is in the 128 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field {
    /// Bits 6:0.
    Opcode,
    /// Bit 7: the vector offset is added to `vd`.
    Indexed,
    /// Bits 11:8.
    Sd,
    /// Bits 15:12.
    Sa,
    /// Bits 31:16.
    Vd,
    /// Bits 47:32.
    Va,
    /// Bits 63:48.
    Vb,
    /// Bits 79:64.
    Vc,
    /// Bits 95:80.
    N,
    /// Bits 127:96.
    Imm,
}

impl Field {
    /// All fields, lowest bits first.
    pub const ALL: [Self; 10] = [
        Self::Opcode,
        Self::Indexed,
        Self::Sd,
        Self::Sa,
        Self::Vd,
        Self::Va,
        Self::Vb,
        Self::Vc,
        Self::N,
        Self::Imm,
    ];

    /// Lowest bit and width.
    pub fn bits(self) -> (u32, u32) {
        match self {
            Self::Opcode => (0, 7),
            Self::Indexed => (7, 1),
            Self::Sd => (8, 4),
            Self::Sa => (12, 4),
            Self::Vd => (16, 16),
            Self::Va => (32, 16),
            Self::Vb => (48, 16),
            Self::Vc => (64, 16),
            Self::N => (80, 16),
            Self::Imm => (96, 32),
        }
    }

    /// Name, as in the SystemVerilog package.
    pub fn name(self) -> &'static str {
        match self {
            Self::Opcode => "Opcode",
            Self::Indexed => "Indexed",
            Self::Sd => "Sd",
            Self::Sa => "Sa",
            Self::Vd => "Vd",
            Self::Va => "Va",
            Self::Vb => "Vb",
            Self::Vc => "Vc",
            Self::N => "N",
            Self::Imm => "Imm",
        }
    }
}

/// How an operand is written and what it means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A vector that is written, `v12` or with the vector offset `v12+o`: its first word in vector memory.
    Destination,
    /// A vector that is read, `v12`.
    Source,
    /// A scalar register, `s3`.
    Scalar,
    /// An address register, `a2`; its number is in the field.
    Address,
    /// As `Address`; `a2+` adds what was moved to the register afterwards (lowest bit of field `Sd`).
    AddressPost,
    /// Packing of weights, `t2` (four trits a byte) or `t5` (five): lowest bit of the field.
    Packing,
    /// A number.
    Number,
}

/// An operand of an opcode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operand {
    /// What it is, in messages and tables.
    pub name: &'static str,
    /// Where it is.
    pub field: Field,
    /// How it is written.
    pub kind: Kind,
}

const fn operand(name: &'static str, field: Field, kind: Kind) -> Operand {
    Operand { name, field, kind }
}

const VD: Operand = operand("vd", Field::Vd, Kind::Destination);
const VA: Operand = operand("va", Field::Va, Kind::Source);
const VB: Operand = operand("vb", Field::Vb, Kind::Source);
const VC: Operand = operand("vc", Field::Vc, Kind::Source);
const N: Operand = operand("n", Field::N, Kind::Number);
const SD: Operand = operand("sd", Field::Sd, Kind::Scalar);
const SA: Operand = operand("sa", Field::Sa, Kind::Scalar);
const POST: Operand = operand("address", Field::Sa, Kind::AddressPost);

macro_rules! opcodes {
    ($($(#[$doc:meta])* $name:ident = $code:literal, $mnemonic:literal, [$($operand:expr),*], $meaning:literal;)*) => {
        /// What an instruction does.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum Opcode {
            $(#[doc = $meaning] $name = $code,)*
        }

        impl Opcode {
            /// All opcodes, by number.
            pub const ALL: &'static [Self] = &[$(Self::$name),*];

            /// The opcode with this number.
            pub fn from_code(code: u8) -> Option<Self> {
                match code { $($code => Some(Self::$name),)* _ => None }
            }

            /// Name in assembly.
            pub fn mnemonic(self) -> &'static str {
                match self { $(Self::$name => $mnemonic,)* }
            }

            /// Name in the SystemVerilog package, without prefix.
            pub fn name(self) -> &'static str {
                match self { $(Self::$name => stringify!($name),)* }
            }

            /// Operands, in the order in which they are written.
            pub fn operands(self) -> &'static [Operand] {
                match self { $(Self::$name => const { &[$($operand),*] },)* }
            }

            /// One line for the table of `docs/isa.md`.
            pub fn meaning(self) -> &'static str {
                match self { $(Self::$name => $meaning,)* }
            }
        }
    };
}

opcodes! {
    Halt = 0, "halt", [],
        "Ends the program: the token register holds the best index of `argmax`.";
    Loop = 1, "loop", [operand("count", Field::Imm, Kind::Number)],
        "Runs what follows, to the matching `end`, `count` times (at least once).";
    End = 2, "end", [],
        "Ends the innermost loop's body.";
    SetA = 3, "seta", [operand("address", Field::Sd, Kind::Address), operand("value", Field::Imm, Kind::Number)],
        "`address = value`, in units of 128 bytes.";
    SetO = 4, "seto", [operand("words", Field::Imm, Kind::Number)],
        "`o = words`: the vector offset, added to every `vd+o`.";
    AddO = 5, "addo", [operand("words", Field::Imm, Kind::Number)],
        "`o = o + words`, modulo 2^16.";
    Stream = 6, "stream", [operand("address", Field::Sa, Kind::Address), operand("beats", Field::Imm, Kind::Number)],
        "Every core begins to read `beats` beats of packed weights from its own memory at `address` into its FIFO, \
         and goes on behind the following instructions. A stream that has not ended is waited for.";
    Load = 7, "load", [VD, POST, N],
        "`vd[0..n] = DRAM[address]`, elements of 4 bytes; whole words are moved.";
    Store = 8, "store", [VA, POST, N],
        "`DRAM[address] = va[0..n]`; whole words are moved.";
    Embed = 9, "embed", [VD, operand("address", Field::Sa, Kind::Address), N, operand("stride", Field::Imm, Kind::Number)],
        "`vd[0..n] = DRAM[address + token * stride]`: the embedding of the token register's token.";
    SetS = 10, "sets", [SD, VA, operand("index", Field::N, Kind::Number)],
        "`sd = (va[index], va[index + 1])`: mantissa and exponent of a scale.";
    RmsNorm = 11, "rmsnorm", [VD, VA, VB, N, operand("epsilon", Field::Imm, Kind::Number)],
        "`vd = va / sqrt(mean(va^2) + epsilon) * vb`, epsilon in Q28. Computed in two steps: the product with the \
         inverse root is rounded to an element first.";
    Quant = 12, "quant", [SD, VA, SA, N],
        "`q = clamp(round(va * 127 / max abs(va)), -127, 127)` into the activation buffers; `sd = sa * max abs(va)`.";
    MatVec = 13, "matvec", [VD, SA, operand("k", Field::Vc, Kind::Number), N, operand("packing", Field::Sd, Kind::Packing)],
        "`vd[0..n] = sa * (sum_k q[k] * t[n, k])` with the next weights of the streams.";
    Add = 14, "add", [VD, VA, VB, N],
        "`vd = va + vb`";
    Mul = 15, "mul", [VD, VA, VB, N],
        "`vd = va * vb`, element by element (Hadamard)";
    Sigmoid = 16, "sigmoid", [VD, VA, N],
        "`vd = 1 / (1 + exp(-va))`, piecewise linear";
    Silu = 17, "silu", [VD, VA, N],
        "`vd = va * sigmoid(va)`";
    SwiGlu = 18, "swiglu", [VD, VA, VB, N],
        "`vd = va * sigmoid(va) * vb`";
    Mlgru = 19, "mlgru", [VD, VA, VB, VC, N],
        "`vb = sigmoid(vb) + vc * (1 - sigmoid(vb))`, the forget gate with lower bound `vc`; then \
         `vd = c + vb * (vd - c)` with `c = va * sigmoid(va)`, the recurrence.";
    ArgMax = 20, "argmax", [VA, N],
        "Compares `va[0..n]`, whose indices follow those of the `argmax` before; the first of equals wins.";
    ClearMax = 21, "clearmax", [],
        "Forgets the best element; indices begin at 0.";
}

/// Fields of an instruction, decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Instruction {
    /// What it does.
    pub opcode: Opcode,
    /// Whether the vector offset is added to `vd`.
    pub indexed: bool,
    /// Scalar or address register that is written; flags.
    pub sd: u8,
    /// Scalar or address register that is read.
    pub sa: u8,
    /// First word of the vector that is written.
    pub vd: u16,
    /// First word of the first source.
    pub va: u16,
    /// First word of the second source.
    pub vb: u16,
    /// First word of the third source, or K.
    pub vc: u16,
    /// Elements.
    pub n: u16,
    /// Immediate.
    pub imm: u32,
}

/// Why 128 bits are no instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// No such opcode.
    #[error("there is no opcode {0}")]
    Opcode(u8),
    /// A field that the opcode does not use, or a value that its operand cannot have.
    #[error("{} cannot have {value:#x} in field {}", opcode.mnemonic(), field.name())]
    Field {
        /// The opcode.
        opcode: Opcode,
        /// The field.
        field: Field,
        /// What it holds.
        value: u32,
    },
}

impl Instruction {
    /// An instruction whose operands are all zero.
    pub fn new(opcode: Opcode) -> Self {
        Self { opcode, indexed: false, sd: 0, sa: 0, vd: 0, va: 0, vb: 0, vc: 0, n: 0, imm: 0 }
    }

    /// What a field holds.
    pub fn get(&self, field: Field) -> u32 {
        match field {
            Field::Opcode => self.opcode as u32,
            Field::Indexed => self.indexed.into(),
            Field::Sd => self.sd.into(),
            Field::Sa => self.sa.into(),
            Field::Vd => self.vd.into(),
            Field::Va => self.va.into(),
            Field::Vb => self.vb.into(),
            Field::Vc => self.vc.into(),
            Field::N => self.n.into(),
            Field::Imm => self.imm,
        }
    }

    /// Sets a field other than the opcode; bits beyond its width are dropped.
    pub fn set(&mut self, field: Field, value: u32) {
        match field {
            Field::Opcode => {}
            Field::Indexed => self.indexed = value & 1 != 0,
            Field::Sd => self.sd = value as u8 & 15,
            Field::Sa => self.sa = value as u8 & 15,
            Field::Vd => self.vd = value as u16,
            Field::Va => self.va = value as u16,
            Field::Vb => self.vb = value as u16,
            Field::Vc => self.vc = value as u16,
            Field::N => self.n = value as u16,
            Field::Imm => self.imm = value,
        }
    }

    /// The largest value that an opcode's operands allow in a field; `None` if the field must be zero.
    pub fn field_limit(opcode: Opcode, field: Field) -> Option<u32> {
        let widest = u32::MAX >> (32 - field.bits().1);
        if field == Field::Opcode {
            return Some(widest);
        }
        opcode.operands().iter().find_map(|operand| match operand.kind {
            Kind::Destination if field == Field::Indexed => Some(1),
            Kind::AddressPost if field == Field::Sd => Some(1),
            _ if operand.field != field => None,
            Kind::Packing => Some(1),
            Kind::Address | Kind::AddressPost => Some(ADDRESS_REGISTERS as u32 - 1),
            Kind::Scalar | Kind::Destination | Kind::Source | Kind::Number => Some(widest),
        })
    }

    /// The 16 bytes.
    pub fn encode(&self) -> [u8; INSTRUCTION_BYTES] {
        let bits = Field::ALL
            .iter()
            .fold(0u128, |bits, &field| bits | u128::from(self.get(field)) << field.bits().0);
        bits.to_le_bytes()
    }

    /// Reads 16 bytes.
    ///
    /// # Errors
    /// [`DecodeError`].
    pub fn decode(bytes: [u8; INSTRUCTION_BYTES]) -> Result<Self, DecodeError> {
        let bits = u128::from_le_bytes(bytes);
        let value = |field: Field| {
            let (low, width) = field.bits();
            (bits >> low) as u32 & (u32::MAX >> (32 - width))
        };
        let code = value(Field::Opcode) as u8;
        let opcode = Opcode::from_code(code).ok_or(DecodeError::Opcode(code))?;
        let mut instruction = Self::new(opcode);
        for &field in &Field::ALL[1..] {
            let value = value(field);
            if value > Self::field_limit(opcode, field).unwrap_or(0) {
                return Err(DecodeError::Field { opcode, field, value });
            }
            instruction.set(field, value);
        }
        Ok(instruction)
    }
}

/// The table of opcodes of `docs/isa.md`.
pub fn markdown_table() -> String {
    let mut table = "| code | instruction | meaning |\n|---|---|---|\n".to_owned();
    for &opcode in Opcode::ALL {
        let operands: Vec<_> = opcode.operands().iter().map(|operand| operand.name).collect();
        let separator = if operands.is_empty() { "" } else { " " };
        table += &format!(
            "| {} | `{}{separator}{}` | {} |\n",
            opcode as u8,
            opcode.mnemonic(),
            operands.join(", "),
            opcode.meaning()
        );
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documented_table_is_current() {
        let page = include_str!("../../../docs/isa.md");
        assert!(page.contains(&markdown_table()), "docs/isa.md should have:\n{}", markdown_table());
    }

    #[test]
    fn opcodes_are_dense_and_their_operands_distinct() {
        for (code, &opcode) in Opcode::ALL.iter().enumerate() {
            assert_eq!((opcode as usize, Opcode::from_code(code as u8)), (code, Some(opcode)));
            let fields: Vec<_> = opcode.operands().iter().map(|operand| operand.field).collect();
            for (i, field) in fields.iter().enumerate() {
                assert!(!fields[..i].contains(field), "{} uses {field:?} twice", opcode.mnemonic());
            }
        }
    }
}
