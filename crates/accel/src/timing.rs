//! The timing model: cycles of a program, instruction by instruction, and what it moves and computes.
//!
//! Follows the RTL's state machines in `hw/rtl`. Instructions run one after the other; weights come in the
//! background, limited by the memory's rate and by what the FIFO holds. The model knows averages
//! only: it treats beats of weights as a flow. The co-simulation tests hold it against the RTL.

use serde::Serialize;

use crate::config::{Configuration, Packing};
use crate::isa::{Instruction, LOOP_DEPTH, Opcode};

/// Cycles of fetch, decode, issue and retirement of every instruction.
const OVERHEAD: f64 = 4.0;
/// From the issue of the last word of a pass to its result (`mmfree_row_pkg::LaneLatency`), and the states
/// around a row-wise instruction.
const PASS_LATENCY: f64 = 10.0;
const ROW_STATES: f64 = 1.0;
/// Cycles of `mmfree_rms_unit`: mean, epsilon, shifts, root, division; its quantiser skips the first and third.
const RMS_CYCLES: f64 = 64.0 + 1.0 + 5.0 + 32.0 + 33.0 + 2.0;
const QUANT_CYCLES: f64 = 5.0 + 33.0 + 2.0;
/// From the last sum to the last write of the writeback.
const MATVEC_STATES: f64 = 2.0;
/// From the FIFO's input to its output.
const FIFO_LATENCY: f64 = 2.0;
/// From room in the FIFO to a request, and from its answer to room again, without the memory's latency.
const READER_STATES: f64 = 6.0;
/// Largest burst of the data port, in beats.
const DATA_BURST: u32 = 64;

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

/// What one run of a program costs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Cost {
    /// Clock cycles.
    pub cycles: f64,
    /// Cycles in which the cores wait for weights.
    pub starved_cycles: f64,
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
    /// Beats of a core's stream that are not yet used, those in the FIFO, and when the first can be there.
    left: f64,
    stored: f64,
    ready_at: f64,
}

/// Cycles and work of one run of a program that the machine accepts.
pub fn estimate(program: &[Instruction], configuration: &Configuration, memory: Memory) -> Cost {
    // A slow answer bounds the rate, too: no more is on its way than the FIFO has room for.
    let in_flight = memory.latency + f64::from(configuration.burst_beats) + READER_STATES;
    let memory = Memory {
        latency: memory.latency.max(1.0),
        weight_rate: memory.weight_rate.min(f64::from(configuration.fifo_beats) / in_flight),
        ..memory
    };
    let mut walk = Walk {
        configuration,
        memory,
        cost: Cost::default(),
        left: 0.0,
        stored: 0.0,
        ready_at: 0.0,
    };
    let mut loops: Vec<(usize, u32)> = Vec::with_capacity(LOOP_DEPTH);
    let mut pc = 0;
    while let Some(instruction) = program.get(pc) {
        pc += 1;
        walk.cost.instructions += 1;
        walk.pass_time(OVERHEAD);
        match instruction.opcode {
            Opcode::Halt => break,
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
    }
    walk.cost
}

impl Walk<'_> {
    /// Lets time go by in which nobody takes weights.
    fn pass_time(&mut self, cycles: f64) {
        let from = self.cost.cycles.max(self.ready_at);
        self.cost.cycles += cycles;
        let flowing = (self.cost.cycles - from).max(0.0) * self.memory.weight_rate;
        let room = f64::from(self.configuration.fifo_beats) - self.stored;
        self.stored += flowing.min(room.max(0.0)).min(self.left - self.stored);
    }

    fn instruction(&mut self, i: &Instruction) {
        let n = usize::from(i.n);
        let words = self.configuration.words(n) as f64;
        let lanes = f64::from(self.configuration.row_lanes);
        let elements = n as u64;
        let pass = words + PASS_LATENCY;
        // Multiplications and vector accesses of an element.
        let (cycles, multiplications, accesses) = match i.opcode {
            Opcode::Stream => {
                self.left = f64::from(i.imm);
                self.stored = 0.0;
                self.ready_at = self.cost.cycles + self.memory.latency + FIFO_LATENCY + 1.0;
                return;
            }
            Opcode::Load | Opcode::Embed => return self.load(words),
            Opcode::Store => return self.store(words),
            Opcode::MatVec => return self.matvec(i),
            Opcode::Halt
            | Opcode::Loop
            | Opcode::End
            | Opcode::SetA
            | Opcode::SetO
            | Opcode::AddO => return,
            Opcode::SetS => (3.0, 0, 0),
            Opcode::ClearMax => (0.0, 0, 0),
            Opcode::RmsNorm => (2.0 * pass + lanes + RMS_CYCLES, 3, 4),
            Opcode::Quant => (2.0 * pass + lanes + QUANT_CYCLES, 1, 2),
            Opcode::Mlgru => (2.0 * pass, 5, 7),
            Opcode::ArgMax => (pass + lanes, 0, 1),
            Opcode::Add => (pass, 0, 3),
            Opcode::Mul => (pass, 1, 3),
            Opcode::Sigmoid => (pass, 1, 2),
            Opcode::Silu => (pass, 2, 2),
            Opcode::SwiGlu => (pass, 3, 3),
        };
        let cycles = cycles + ROW_STATES;
        self.cost.row_cycles += cycles;
        self.cost.multiplications += multiplications * elements;
        self.cost.vector_accesses += accesses * elements;
        self.pass_time(cycles);
    }

    /// Mean cycles of a handshake that stalls at random.
    fn handshake(&self) -> f64 {
        1.0 / (1.0 - self.memory.stall)
    }

    fn load(&mut self, words: f64) {
        let rate = self.memory.data_rate.min(1.0 - self.memory.stall);
        self.data(words, self.memory.latency + self.handshake() + words / rate + 1.0);
    }

    fn store(&mut self, words: f64) {
        let limit = (4096 / self.configuration.data_bytes()).min(DATA_BURST);
        let bursts = (words / f64::from(limit)).ceil();
        // A word: read, offered, taken. A burst: address, first read, response.
        let word = 1.0 + self.handshake();
        self.data(words, words * word + bursts * (2.0 + self.handshake()) + 1.0);
    }

    fn data(&mut self, words: f64, cycles: f64) {
        self.cost.data_bytes += words as u64 * u64::from(self.configuration.data_bytes());
        self.cost.vector_accesses += words as u64 * u64::from(self.configuration.row_lanes);
        self.cost.data_cycles += cycles;
        self.pass_time(cycles);
    }

    fn matvec(&mut self, i: &Instruction) {
        let c = self.configuration;
        let packing = Packing::from_flag(i.sd);
        let (n, k) = (usize::from(i.n), usize::from(i.vc));
        let beats = c.beats(packing, n, k) as f64;
        let columns = k.div_ceil(c.weight_bytes as usize) as f64;
        // The writeback takes a group of every core in turn, so many sums a cycle as there are lanes.
        let slots = packing.trits().div_ceil((c.row_lanes as usize).min(5)) as f64;
        let per_group = slots * f64::from(c.cores);
        let pace = columns.max(per_group) / columns;
        // Beats flow out at the arithmetic's pace while they are there, then at the memory's.
        let mut left = beats;
        let mut busy = 0.0;
        let wait = (self.ready_at - self.cost.cycles).max(0.0);
        let rate = self.memory.weight_rate;
        let (stored, out) = (self.stored, 1.0 / pace);
        if rate < out {
            // The store runs dry after so many beats.
            let before_dry = (stored * out / (out - rate)).min(left);
            busy += before_dry / out;
            left -= before_dry;
            let starved = left / rate;
            self.cost.starved_cycles += starved - left / out;
            busy += starved;
            self.stored = (stored - before_dry * (1.0 - rate / out)).max(0.0);
        } else {
            busy += left / out;
            let room = f64::from(c.fifo_beats);
            self.stored = (stored + busy * rate - left).clamp(0.0, room);
        }
        self.left -= beats;
        self.stored = self.stored.min(self.left);
        let latency = 3.0 + f64::from(c.weight_bytes).log2() + per_group;
        self.cost.starved_cycles += wait;
        self.cost.matvec_cycles += wait + busy + latency + MATVEC_STATES;
        self.cost.cycles += wait + busy;
        self.pass_time(latency + MATVEC_STATES);

        let cores = u64::from(c.cores);
        let bytes = beats as u64 * u64::from(c.weight_bytes) * cores;
        self.cost.weight_bytes += bytes;
        self.cost.ternary_additions += bytes * packing.trits() as u64;
        self.cost.activation_accesses += bytes;
        self.cost.multiplications += n as u64;
        self.cost.vector_accesses += n as u64;
    }
}
