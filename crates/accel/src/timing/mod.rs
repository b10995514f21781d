//! The timing model: cycles of a program, instruction by instruction, and what it moves and computes.
//!
//! Follows the RTL's state machines in `hw/rtl`. Instructions run one after the other; what each unit takes is
//! known beforehand, only weights come in the background. `streams` follows them clock by clock. Random stalls
//! are drawn, so one run with stalls is one sample. The co-simulation tests hold the model against the RTL.

use serde::Serialize;

use crate::config::{Configuration, Packing};
use crate::isa::{ADDRESS_REGISTERS, ADDRESS_UNIT, Instruction, LOOP_DEPTH, Opcode};
use crate::machine::moved_units;

mod streams;

use streams::{Chance, Channel, Streams};

/// Fetch, decode and issue of an instruction; it retires in one more cycle.
const ISSUE: u64 = 3;
const RETIRE: u64 = 1;
/// From the issue of the last word of a pass to its result (`mmfree_row_pkg::LaneLatency`), and the states
/// around a row-wise instruction.
const PASS_LATENCY: u64 = 10;
const ROW_STATES: u64 = 1;
/// Cycles of `mmfree_rms_unit`: mean, epsilon, shifts, root, division; its quantiser skips the first and third.
const RMS_CYCLES: u64 = 64 + 1 + 5 + 32 + 33 + 2;
const QUANT_CYCLES: u64 = 5 + 33 + 2;
/// Largest burst of the data port, in beats, and the bytes of a page that no burst leaves.
const DATA_BURST: u64 = 64;
const PAGE: u64 = 4096;

/// How memories behave.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Memory {
    /// Cycles from a read address to its first beat.
    pub latency: f64,
    /// Beats of weights that the memory of one core delivers a cycle, at most 1.
    pub weight_rate: f64,
    /// Words that the data port moves a cycle, at most 1.
    pub data_rate: f64,
    /// Chance that a channel of addresses or responses stalls in a cycle.
    pub stall: f64,
}

impl Memory {
    /// As fast as the arithmetic, behind 50 cycles of latency.
    pub const FULL_RATE: Self =
        Self { latency: 50.0, weight_rate: 1.0, data_rate: 1.0, stall: 0.0 };
}

/// What one run of a program costs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Cost {
    /// Clock cycles.
    pub cycles: f64,
    /// Cycles in which a core waits for weights: the arithmetic waits for the memory.
    pub starved_cycles: f64,
    /// Cycles in which all weights that were asked for have come and a FIFO has no room for the next burst: the
    /// memory waits for the arithmetic.
    pub full_cycles: f64,
    /// Cycles of matrix products, waiting included.
    pub matvec_cycles: f64,
    /// Cycles of the row-wise unit.
    pub row_cycles: f64,
    /// Cycles of the data port.
    pub data_cycles: f64,
    /// Instructions.
    pub instructions: u64,
    /// Bytes of weights, all cores.
    pub weight_bytes: u64,
    /// Bytes that the data port reads and writes.
    pub data_bytes: u64,
    /// Additions of trits times activations, zero trits and padding included.
    pub ternary_additions: u64,
    /// Multiplications of 32-bit elements.
    pub multiplications: u64,
    /// Elements that move between vector memory and a unit.
    pub vector_accesses: u64,
    /// 8-bit activations that are read from the buffers of the cores.
    pub activation_accesses: u64,
}

/// Walks through a program.
struct Walk<'a> {
    configuration: &'a Configuration,
    memory: Memory,
    cost: Cost,
    streams: Streams<'a>,
    addresses: [u32; ADDRESS_REGISTERS],
    chance: Chance,
}

/// Cycles and work of one run of a program that the machine accepts.
pub fn estimate(program: &[Instruction], configuration: &Configuration, memory: Memory) -> Cost {
    let mut walk = Walk {
        configuration,
        memory,
        cost: Cost::default(),
        streams: Streams::new(configuration, memory),
        addresses: [0; ADDRESS_REGISTERS],
        chance: Chance::new(memory.stall),
    };
    let mut loops: Vec<(usize, u32)> = Vec::with_capacity(LOOP_DEPTH);
    let mut pc = 0;
    while let Some(instruction) = program.get(pc) {
        pc += 1;
        walk.cost.instructions += 1;
        walk.streams.advance(ISSUE);
        match instruction.opcode {
            Opcode::Loop => loops.push((pc, instruction.imm.max(1) - 1)),
            Opcode::End => match loops.last_mut() {
                Some((_, 0)) | None => {
                    loops.pop();
                }
                Some((body, left)) => {
                    *left -= 1;
                    pc = *body;
                }
            },
            _ => walk.instruction(instruction),
        }
        walk.streams.advance(RETIRE);
        if instruction.opcode == Opcode::Halt {
            break;
        }
    }
    walk.cost.cycles = walk.streams.now as f64;
    walk.cost.starved_cycles = walk.streams.starved as f64;
    walk.cost.full_cycles = walk.streams.full as f64;
    walk.cost
}

impl Walk<'_> {
    fn instruction(&mut self, i: &Instruction) {
        let n = usize::from(i.n);
        let words = self.configuration.words(n) as u64;
        let lanes = u64::from(self.configuration.row_lanes);
        let elements = n as u64;
        let pass = words + PASS_LATENCY;
        // Multiplications and vector accesses of an element.
        let (cycles, multiplications, accesses) = match i.opcode {
            Opcode::Stream => return self.streams.begin(i.imm),
            Opcode::Load | Opcode::Embed => return self.load(i, words),
            Opcode::Store => return self.store(i, words),
            Opcode::MatVec => return self.matvec(i),
            Opcode::SetA => {
                self.addresses[usize::from(i.sd) % ADDRESS_REGISTERS] = i.imm;
                return;
            }
            Opcode::Halt | Opcode::Loop | Opcode::End | Opcode::SetO | Opcode::AddO => return,
            Opcode::SetS => (3, 0, 0),
            Opcode::ClearMax => (0, 0, 0),
            Opcode::RmsNorm => (2 * pass + lanes + RMS_CYCLES, 3, 4),
            Opcode::Quant => (2 * pass + lanes + QUANT_CYCLES, 1, 2),
            Opcode::Mlgru => (2 * pass, 5, 7),
            Opcode::ArgMax => (pass + lanes, 0, 1),
            Opcode::Add => (pass, 0, 3),
            Opcode::Mul => (pass, 1, 3),
            Opcode::Sigmoid => (pass, 1, 2),
            Opcode::Silu => (pass, 2, 2),
            Opcode::SwiGlu => (pass, 3, 3),
        };
        let cycles = cycles + ROW_STATES;
        self.cost.row_cycles += cycles as f64;
        self.cost.multiplications += multiplications * elements;
        self.cost.vector_accesses += accesses * elements;
        self.streams.advance(cycles);
    }

    /// Words of the bursts of a vector: none is longer than [`DATA_BURST`] or leaves its page.
    fn bursts(&self, i: &Instruction, words: u64) -> Vec<u32> {
        let word = u64::from(self.configuration.data_bytes());
        let mut at =
            u64::from(self.addresses[usize::from(i.sa) % ADDRESS_REGISTERS]) * ADDRESS_UNIT;
        let mut left = words;
        let mut bursts = Vec::with_capacity((words / DATA_BURST) as usize + 2);
        while left > 0 {
            let burst = left.min(DATA_BURST).min((PAGE - at % PAGE) / word);
            bursts.push(burst as u32);
            at += burst * word;
            left -= burst;
        }
        bursts
    }

    fn load(&mut self, i: &Instruction, words: u64) {
        let mut bursts = self.bursts(i, words).into_iter();
        let mut channel = Channel::new(self.memory.latency, self.memory.data_rate);
        channel.ready = !self.chance.stalls();
        let (mut left, mut cycles) = (words, 0);
        while left > 0 {
            let request = if channel.ready { bursts.next() } else { None };
            left -= u64::from(channel.valid);
            channel.step(cycles, request, &mut self.chance);
            cycles += 1;
        }
        self.data(i, words, cycles + 1);
    }

    fn store(&mut self, i: &Instruction, words: u64) {
        let mut cycles = 1;
        for burst in self.bursts(i, words) {
            // Address, first read, response; a word is read, offered, taken.
            cycles += 2 + self.chance.handshake();
            cycles += (0..burst).map(|_| 1 + self.chance.handshake()).sum::<u64>();
        }
        self.data(i, words, cycles);
    }

    fn data(&mut self, i: &Instruction, words: u64, cycles: u64) {
        if i.opcode != Opcode::Embed && i.sd & 1 != 0 {
            let address = &mut self.addresses[usize::from(i.sa) % ADDRESS_REGISTERS];
            *address = address.wrapping_add(moved_units(self.configuration, i.n.into()));
        }
        self.cost.data_bytes += words * u64::from(self.configuration.data_bytes());
        self.cost.vector_accesses += words * u64::from(self.configuration.row_lanes);
        self.cost.data_cycles += cycles as f64;
        self.streams.advance(cycles);
    }

    fn matvec(&mut self, i: &Instruction) {
        let c = self.configuration;
        let packing = Packing::from_flag(i.sd);
        let (n, k) = (usize::from(i.n), usize::from(i.vc));
        self.cost.matvec_cycles += self.streams.product(packing, n, k) as f64;
        let bytes = c.beats(packing, n, k) as u64 * u64::from(c.weight_bytes) * u64::from(c.cores);
        self.cost.weight_bytes += bytes;
        self.cost.ternary_additions += bytes * packing.trits() as u64;
        self.cost.activation_accesses += bytes;
        self.cost.multiplications += n as u64;
        self.cost.vector_accesses += n as u64;
    }
}
