//! Clock by clock: weight readers with their memories and FIFOs, ternary units, the writeback. Each `step` is an
//! edge of the RTL's clock; data is left out, only whether it is there counts.

use std::collections::VecDeque;

use super::Memory;
use crate::config::{Configuration, Packing};

/// Addresses that a memory's queue takes before it refuses more (`hw/dv/mmfree_axi_memory.sv`).
const QUEUE_LIMIT: usize = 13;
/// Most beats that a memory can make up for after a pause.
const CREDIT_LIMIT: f64 = 2.0;
/// Stages of the ternary unit before the adder tree.
const TERNARY_STAGES: u32 = 2;
/// Cycles from the writeback's last sum to its last write.
const WRITE_LATENCY: u32 = 3;

/// Random stalls; xorshift64*, always with the same seed, so that an estimate is the same every time.
pub(super) struct Chance {
    state: u64,
    probability: f64,
}

impl Chance {
    pub(super) fn new(probability: f64) -> Self {
        // Beyond this nothing would ever move.
        Self { state: 0x9e37_79b9_7f4a_7c15, probability: probability.clamp(0.0, 0.99) }
    }

    /// Whether something stalls in this cycle.
    pub(super) fn stalls(&mut self) -> bool {
        if self.probability == 0.0 {
            return false;
        }
        self.state ^= self.state >> 12;
        self.state ^= self.state << 25;
        self.state ^= self.state >> 27;
        let draw = self.state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11;
        (draw as f64) < self.probability * (1u64 << 53) as f64
    }

    /// Cycles of a handshake, at least one.
    pub(super) fn handshake(&mut self) -> u64 {
        let mut cycles = 1;
        while self.stalls() {
            cycles += 1;
        }
        cycles
    }
}

/// The read side of a memory behind an AXI4 port.
pub(super) struct Channel {
    latency: u64,
    rate: f64,
    /// When the first beat of each burst may leave, and its beats.
    queue: VecDeque<(u64, u32)>,
    credit: f64,
    /// `arready` and `rvalid` in this cycle.
    pub(super) ready: bool,
    pub(super) valid: bool,
}

impl Channel {
    pub(super) fn new(latency: f64, rate: f64) -> Self {
        Self {
            latency: latency.max(0.0).round() as u64,
            // No rate at all would wait for ever.
            rate: rate.clamp(1e-3, 1.0),
            queue: VecDeque::with_capacity(QUEUE_LIMIT + 1),
            credit: CREDIT_LIMIT,
            ready: true,
            valid: false,
        }
    }

    /// A clock edge; `request` is a burst that was asked for while the channel was ready.
    pub(super) fn step(&mut self, now: u64, request: Option<u32>, chance: &mut Chance) {
        self.ready = self.queue.len() < QUEUE_LIMIT && !chance.stalls();
        self.valid = false;
        let credit = self.credit;
        if self.credit < CREDIT_LIMIT {
            self.credit += self.rate;
        }
        if let Some((time, beats)) = self.queue.front_mut()
            && now >= *time
            && credit >= 1.0
            && !chance.stalls()
        {
            self.valid = true;
            self.credit = credit + self.rate - 1.0;
            *beats -= 1;
            if *beats == 0 {
                self.queue.pop_front();
            }
        }
        if let Some(beats) = request {
            self.queue.push_back((now + self.latency, beats));
        }
    }
}

/// Weight reader, FIFO and ternary unit of one core.
struct Core {
    channel: Channel,
    chance: Chance,
    /// Reader: beats that no burst was asked for, and beats that have a place in the FIFO.
    left: u32,
    reserved: u32,
    /// FIFO: entries in its memory, and whether its output register holds one.
    stored: u32,
    head: bool,
    /// Ternary unit: groups to do, beat of the group.
    groups: u32,
    beat: u32,
    /// Stages of the pipeline, the first lowest, that hold the last beat of a group; whether sums wait behind it.
    ends: u64,
    sum: bool,
}

/// All cores and the writeback.
pub(super) struct Streams<'a> {
    configuration: &'a Configuration,
    cores: Vec<Core>,
    /// The bit of [`Core::ends`] from which sums come.
    last_stage: u64,
    pub(super) now: u64,
    /// Cycles in which a core waits for weights, and in which a memory waits for room in the FIFO.
    pub(super) starved: u64,
    pub(super) full: u64,
    columns: u32,
    /// Writeback: groups of sums to take, of all cores; cycles for each, and those spent on this one.
    to_take: u32,
    slots: u32,
    slot: u32,
    turn: usize,
}

impl<'a> Streams<'a> {
    pub(super) fn new(configuration: &'a Configuration, memory: Memory) -> Self {
        let core = |index: u32| {
            let mut chance = Chance::new(memory.stall);
            chance.state = chance.state.wrapping_add(u64::from(index) << 32);
            Core {
                channel: Channel::new(memory.latency, memory.weight_rate),
                chance,
                left: 0,
                reserved: 0,
                stored: 0,
                head: false,
                groups: 0,
                beat: 0,
                ends: 0,
                sum: false,
            }
        };
        Self {
            configuration,
            cores: (0..configuration.cores).map(core).collect(),
            last_stage: 1 << (TERNARY_STAGES + configuration.weight_bytes.ilog2() - 1),
            now: 0,
            starved: 0,
            full: 0,
            columns: 1,
            to_take: 0,
            slots: 1,
            slot: 0,
            turn: 0,
        }
    }

    /// Begins a stream of so many beats, when the one before has been asked for.
    pub(super) fn begin(&mut self, beats: u32) {
        while self.cores.iter().any(|core| core.left > 0) && !self.is_quiet() {
            self.step();
        }
        for core in &mut self.cores {
            core.left = beats;
        }
    }

    /// Lets time go by in which nobody takes weights.
    pub(super) fn advance(&mut self, cycles: u64) {
        let end = self.now + cycles;
        while self.now < end {
            if self.is_quiet() {
                // Nothing changes any more but the counter.
                if self.cores.iter().any(|core| core.left > 0) {
                    self.full += end - self.now;
                }
                for core in &mut self.cores {
                    core.channel.credit = CREDIT_LIMIT;
                }
                self.now = end;
                return;
            }
            self.step();
        }
    }

    /// A product of `rows` x `cols`; returns its cycles, from the issue to `done` included.
    pub(super) fn product(&mut self, packing: Packing, rows: usize, cols: usize) -> u64 {
        let c = self.configuration;
        let groups = c.groups(packing, rows) as u32;
        self.columns = cols.div_ceil(c.weight_bytes as usize).max(1) as u32;
        for core in &mut self.cores {
            (core.groups, core.beat) = (groups, 0);
        }
        self.to_take = groups * c.cores;
        self.slots = (packing.trits() as u32).div_ceil(c.row_lanes.min(5));
        (self.slot, self.turn) = (0, 0);
        let start = self.now;
        // A program without enough weights, which the machine refuses, ends here, too.
        while self.to_take > 0 && !self.is_starved() {
            self.step();
        }
        self.advance(WRITE_LATENCY.into());
        self.now - start
    }

    /// Whether no core can ever take another beat.
    fn is_starved(&self) -> bool {
        self.cores.iter().all(|core| {
            !core.head
                && core.stored == 0
                && core.left == 0
                && core.channel.queue.is_empty()
                && !core.channel.valid
                && core.ends == 0
                && !core.sum
        })
    }

    /// Whether no memory, reader or FIFO moves before somebody takes weights.
    fn is_quiet(&self) -> bool {
        let c = self.configuration;
        self.cores.iter().all(|core| {
            let burst = core.left.min(c.burst_beats);
            core.channel.queue.is_empty()
                && !core.channel.valid
                && (core.head || core.stored == 0)
                && (core.left == 0 || core.reserved + burst > c.fifo_beats)
                && core.groups == 0
        })
    }

    /// One clock edge.
    fn step(&mut self) {
        let (c, last_stage) = (self.configuration, self.last_stage);
        let (mut starved, mut full) = (false, false);
        let last_slot = self.slot + 1 == self.slots;
        let taken = (self.to_take > 0 && self.cores[self.turn].sum).then_some(self.turn);
        for (index, core) in self.cores.iter_mut().enumerate() {
            let sum_ready = self.to_take > 0 && index == self.turn && last_slot;
            let complete = core.ends & last_stage != 0;
            let enabled = !(complete && core.sum && !sum_ready);
            let wants = core.groups > 0 && enabled;
            let take = wants && core.head;
            starved |= wants && !core.head;
            // Reader
            let burst = core.left.min(c.burst_beats);
            let room = core.reserved + burst <= c.fifo_beats;
            let pending = core.channel.valid || !core.channel.queue.is_empty();
            full |= core.left > 0 && !room && !pending;
            let request = (core.left > 0 && room && core.channel.ready).then_some(burst);
            core.reserved += request.unwrap_or(0);
            core.reserved -= u32::from(take);
            core.left -= request.unwrap_or(0);
            // FIFO
            let pushed = core.channel.valid;
            let fetch = core.stored > 0 && (!core.head || wants);
            core.stored = core.stored + u32::from(pushed) - u32::from(fetch);
            core.head = fetch || core.head && !wants;
            core.channel.step(self.now, request, &mut core.chance);
            // Ternary unit
            let mut ends = false;
            if take {
                core.beat += 1;
                if core.beat == self.columns {
                    ends = true;
                    core.beat = 0;
                    core.groups -= 1;
                }
            }
            if enabled {
                core.ends = (core.ends << 1 | u64::from(ends)) & (2 * last_stage - 1);
            }
            core.sum = enabled && complete || core.sum && !sum_ready;
        }
        if let Some(turn) = taken {
            self.slot = if last_slot { 0 } else { self.slot + 1 };
            if last_slot {
                self.turn = (turn + 1) % self.cores.len();
                self.to_take -= 1;
            }
        }
        self.starved += u64::from(starved);
        self.full += u64::from(full);
        self.now += 1;
    }
}
