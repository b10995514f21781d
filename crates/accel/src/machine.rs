//! The functional simulator: what each instruction does, bit for bit.
//!
//! It knows no time; [`crate::timing`] does.

use crate::arith::{self, Scale, Sigmoid};
use crate::asm::disassemble;
use crate::config::{Configuration, Packing};
use crate::error::{Error, Result};
use crate::image::Image;
use crate::isa::{
    ADDRESS_REGISTERS, ADDRESS_UNIT, Instruction, LOOP_DEPTH, Opcode, SCALAR_REGISTERS,
    VECTOR_LIMIT,
};

/// Instructions after which a run is given up: no model of the family comes near.
const INSTRUCTION_LIMIT: u64 = 10_000_000;
/// Most bytes of trits times activations that sum up in 16 bits: 256 · 127 < 2^15.
const SHORT_SUM: usize = 256;

/// An accelerator with a program in its memories.
#[derive(Debug)]
pub struct Machine {
    configuration: Configuration,
    program: Vec<Instruction>,
    data: Vec<u8>,
    streams: Vec<Vec<u8>>,
    state: std::ops::Range<usize>,
    logits: std::ops::Range<usize>,
    stored: usize,
    vectors: Vec<i32>,
    activations: Vec<i8>,
    scalars: [Scale; SCALAR_REGISTERS],
    addresses: [u32; ADDRESS_REGISTERS],
    vector_offset: u16,
    token: u32,
    /// Next byte of every core's stream, and where the stream ends.
    stream_at: usize,
    stream_end: usize,
    best: (i32, u32),
    next_index: u32,
    sigmoid: Sigmoid,
    trits: [Box<[[i16; 8]; 256]>; 2],
}

/// Something that happened while a program ran, for those who compare.
pub type Observer<'a> = dyn FnMut(usize, &Machine) + 'a;

impl Machine {
    /// Loads an image. Registers and on-chip memories are zero.
    pub fn new(image: Image) -> Self {
        let region = |region: crate::image::Region| {
            region.address as usize..(region.address + region.bytes) as usize
        };
        let (state, logits) = (region(image.state), region(image.logits));
        let table = |packing: Packing| {
            let mut table = Box::new([[0i16; 8]; 256]);
            for (byte, row) in table.iter_mut().enumerate() {
                for (slot, trit) in row.iter_mut().zip(packing.decode(byte as u8)) {
                    *slot = trit.into();
                }
            }
            table
        };
        let stored = image.data.len();
        let mut data = image.data;
        data.resize(image.data_bytes as usize, 0);
        Self {
            vectors: vec![0; image.configuration.vector_elements()],
            activations: vec![0; image.configuration.activation_bytes as usize],
            configuration: image.configuration,
            program: image.program,
            data,
            streams: image.streams,
            state,
            logits,
            stored,
            scalars: Default::default(),
            addresses: [0; ADDRESS_REGISTERS],
            vector_offset: 0,
            token: 0,
            stream_at: 0,
            stream_end: 0,
            best: (i32::MIN, 0),
            next_index: 0,
            sigmoid: Sigmoid::default(),
            trits: [table(Packing::T2), table(Packing::T5)],
        }
    }

    /// The configuration.
    pub fn configuration(&self) -> &Configuration {
        &self.configuration
    }

    /// Vector memory, element by element.
    pub fn vectors(&self) -> &[i32] {
        &self.vectors
    }

    /// Data memory.
    pub fn data(&self) -> &[u8] {
        &self.data
    }

    /// Scalar registers.
    pub fn scalars(&self) -> &[Scale; SCALAR_REGISTERS] {
        &self.scalars
    }

    /// Address registers.
    pub fn addresses(&self) -> &[u32; ADDRESS_REGISTERS] {
        &self.addresses
    }

    /// The token register: the last best index, or what was set.
    pub fn token(&self) -> u32 {
        self.token
    }

    /// Logits of the last token, as elements (Q20).
    pub fn logits(&self) -> impl Iterator<Item = i32> + '_ {
        let bytes = self.data[self.logits.clone()].chunks_exact(4);
        bytes.map(|bytes| i32::from_le_bytes(std::array::from_fn(|i| bytes[i])))
    }

    /// Forgets the text: zeroes the recurrent state.
    pub fn reset_state(&mut self) {
        self.data[self.state.clone()].fill(0);
    }

    /// Bytes of data memory that the image held.
    pub fn stored_bytes(&self) -> usize {
        self.stored
    }

    /// Runs the program once for a token; returns the token register.
    ///
    /// # Errors
    /// [`Error::Machine`] where the program does what the hardware cannot do.
    pub fn run(&mut self, token: u32) -> Result<u32> {
        self.run_observed(token, &mut |_, _| {})
    }

    /// As [`run`](Self::run); calls `observer` with the index of each instruction when it is done.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn run_observed(&mut self, token: u32, observer: &mut Observer<'_>) -> Result<u32> {
        self.token = token;
        // Body's first instruction, and how often it is yet to be repeated.
        let mut loops: Vec<(usize, u32)> = Vec::with_capacity(LOOP_DEPTH);
        let mut pc = 0;
        for _ in 0..INSTRUCTION_LIMIT {
            let Some(&instruction) = self.program.get(pc) else {
                return Err(Error::Machine {
                    pc,
                    instruction: "none".to_owned(),
                    what: "the program has no halt".to_owned(),
                });
            };
            let here = pc;
            let fail = |what: String| {
                let instruction = disassemble(&instruction);
                Error::Machine { pc: here, instruction, what }
            };
            pc += 1;
            match instruction.opcode {
                Opcode::Halt => {
                    if self.stream_at != self.stream_end {
                        let left = self.stream_end - self.stream_at;
                        return Err(fail(format!(
                            "{left} bytes of weights were streamed and not used"
                        )));
                    }
                    self.token = self.best.1;
                    observer(here, self);
                    return Ok(self.token);
                }
                Opcode::Loop => {
                    if loops.len() == LOOP_DEPTH {
                        return Err(fail(format!(
                            "more than {LOOP_DEPTH} loops inside one another"
                        )));
                    }
                    loops.push((pc, instruction.imm.max(1) - 1));
                }
                Opcode::End => match loops.last_mut() {
                    None => return Err(fail("no loop is open".to_owned())),
                    Some((_, 0)) => {
                        loops.pop();
                    }
                    Some((body, left)) => {
                        *left -= 1;
                        pc = *body;
                    }
                },
                _ => self.execute(&instruction).map_err(fail)?,
            }
            observer(here, self);
        }
        Err(Error::Machine {
            pc,
            instruction: self.program.get(pc).map_or("none".to_owned(), disassemble),
            what: format!("{INSTRUCTION_LIMIT} instructions have run without a halt"),
        })
    }

    fn execute(&mut self, i: &Instruction) -> std::result::Result<(), String> {
        let n = usize::from(i.n);
        // Elements that fill up the last word are computed, too.
        let padded = n.next_multiple_of(self.configuration.row_lanes as usize);
        match i.opcode {
            Opcode::Halt | Opcode::Loop | Opcode::End => {}
            Opcode::SetA => self.addresses[usize::from(i.sd)] = i.imm,
            Opcode::SetO => self.vector_offset = i.imm as u16,
            Opcode::AddO => self.vector_offset = self.vector_offset.wrapping_add(i.imm as u16),
            Opcode::Stream => self.stream(i)?,
            Opcode::Load => {
                let address = self.addresses[usize::from(i.sa)];
                self.load(i, address)?;
                self.advance(i);
            }
            Opcode::Embed => {
                let base = self.addresses[usize::from(i.sa)];
                let address = base.wrapping_add(self.token.wrapping_mul(i.imm));
                self.load(i, address)?;
            }
            Opcode::Store => {
                let source = self.words_of("va", i.va, n)?;
                let target = self.memory(self.addresses[usize::from(i.sa)], source.len() * 4)?;
                for (bytes, value) in
                    self.data[target].chunks_exact_mut(4).zip(&self.vectors[source])
                {
                    bytes.copy_from_slice(&value.to_le_bytes());
                }
                self.advance(i);
            }
            Opcode::SetS => {
                let start = usize::from(i.va) * self.configuration.row_lanes as usize + n;
                let pair = self.vectors.get(start..start + 2);
                let pair = pair.ok_or("the scale lies outside of vector memory")?;
                self.scalars[usize::from(i.sd)] = Scale::from_words(pair[0], pair[1]);
            }
            Opcode::RmsNorm => {
                let (d, a, b) = self.three(i)?;
                let sum = self.vectors[a..a + n].iter().map(|&x| arith::square(x)).sum();
                let factor = arith::inverse_rms(sum, n as u32, i.imm);
                each(&mut self.vectors, padded, |v, j| {
                    v[d + j] = arith::mul(factor.apply(v[a + j]), v[b + j])
                });
            }
            Opcode::Quant => self.quant(i)?,
            Opcode::MatVec => self.matvec(i)?,
            Opcode::Add => {
                let (d, a, b) = self.three(i)?;
                each(&mut self.vectors, padded, |v, j| v[d + j] = arith::add(v[a + j], v[b + j]));
            }
            Opcode::Mul => {
                let (d, a, b) = self.three(i)?;
                each(&mut self.vectors, padded, |v, j| v[d + j] = arith::mul(v[a + j], v[b + j]));
            }
            Opcode::Sigmoid | Opcode::Silu => {
                let (d, a) = self.two(i)?;
                let is_silu = i.opcode == Opcode::Silu;
                let sigmoid = &self.sigmoid;
                each(&mut self.vectors, padded, |v, j| {
                    let x = v[a + j];
                    v[d + j] = if is_silu { sigmoid.silu(x) } else { sigmoid.eval(x) };
                });
            }
            Opcode::SwiGlu => {
                let (d, a, b) = self.three(i)?;
                let sigmoid = &self.sigmoid;
                each(&mut self.vectors, padded, |v, j| {
                    v[d + j] = arith::mul(sigmoid.silu(v[a + j]), v[b + j])
                });
            }
            Opcode::Mlgru => self.mlgru(i)?,
            Opcode::ArgMax => {
                let a = self.words_of("va", i.va, n)?.start;
                for j in 0..n {
                    if self.vectors[a + j] > self.best.0 {
                        self.best = (self.vectors[a + j], self.next_index);
                    }
                    self.next_index = self.next_index.wrapping_add(1);
                }
            }
            Opcode::ClearMax => {
                self.best = (i32::MIN, 0);
                self.next_index = 0;
            }
        }
        Ok(())
    }

    /// Elements of the words that hold a vector.
    fn words_of(
        &self,
        name: &str,
        word: u16,
        n: usize,
    ) -> std::result::Result<std::ops::Range<usize>, String> {
        let words = self.configuration.words(n);
        let limit = self.configuration.vector_words as usize;
        if n == 0 || n > VECTOR_LIMIT {
            return Err(format!("vectors have 1 to {VECTOR_LIMIT} elements, found {n}"));
        }
        let (first, end) = (usize::from(word), usize::from(word) + words);
        if end > limit {
            return Err(format!(
                "{name} is words {first} to {} of a vector memory of {limit}",
                end - 1
            ));
        }
        let lanes = self.configuration.row_lanes as usize;
        Ok(first * lanes..end * lanes)
    }

    fn destination(&self, i: &Instruction) -> u16 {
        if i.indexed { i.vd.wrapping_add(self.vector_offset) } else { i.vd }
    }

    fn two(&self, i: &Instruction) -> std::result::Result<(usize, usize), String> {
        let n = usize::from(i.n);
        let d = self.words_of("vd", self.destination(i), n)?;
        let a = self.words_of("va", i.va, n)?;
        overlap("va", &d, &a)?;
        Ok((d.start, a.start))
    }

    fn three(&self, i: &Instruction) -> std::result::Result<(usize, usize, usize), String> {
        let (d, a) = self.two(i)?;
        let b = self.words_of("vb", i.vb, usize::from(i.n))?;
        overlap("vb", &(d..d + b.len()), &b)?;
        Ok((d, a, b.start))
    }

    /// Bytes of data memory.
    fn memory(
        &self,
        address: u32,
        bytes: usize,
    ) -> std::result::Result<std::ops::Range<usize>, String> {
        let start = u64::from(address) * ADDRESS_UNIT;
        let end = start + bytes as u64;
        if end > self.data.len() as u64 {
            return Err(format!(
                "bytes {start} to {end} lie outside of {} bytes of data memory",
                self.data.len()
            ));
        }
        Ok(start as usize..end as usize)
    }

    fn load(&mut self, i: &Instruction, address: u32) -> std::result::Result<(), String> {
        let target = self.words_of("vd", self.destination(i), i.n.into())?;
        let source = self.memory(address, target.len() * 4)?;
        for (value, bytes) in self.vectors[target].iter_mut().zip(self.data[source].chunks_exact(4))
        {
            *value = i32::from_le_bytes(std::array::from_fn(|i| bytes[i]));
        }
        Ok(())
    }

    /// Post-increment of an address register.
    fn advance(&mut self, i: &Instruction) {
        if i.sd & 1 != 0 {
            let units = moved_units(&self.configuration, i.n.into());
            let register = &mut self.addresses[usize::from(i.sa)];
            *register = register.wrapping_add(units);
        }
    }

    fn stream(&mut self, i: &Instruction) -> std::result::Result<(), String> {
        if self.stream_at != self.stream_end {
            return Err("the stream before has weights left that nobody used".to_owned());
        }
        let start = u64::from(self.addresses[usize::from(i.sa)]) * ADDRESS_UNIT;
        let end = start + u64::from(i.imm) * u64::from(self.configuration.weight_bytes);
        let limit = self.streams.iter().map(Vec::len).min().unwrap_or(0) as u64;
        let whole = u64::from(self.configuration.burst_beats * self.configuration.weight_bytes);
        if !start.is_multiple_of(whole) {
            return Err(format!(
                "streams begin at multiples of a burst of {whole} bytes, found {start}"
            ));
        }
        if end > limit {
            return Err(format!(
                "bytes {start} to {end} lie outside of {limit} bytes of weight memory"
            ));
        }
        (self.stream_at, self.stream_end) = (start as usize, end as usize);
        Ok(())
    }

    fn quant(&mut self, i: &Instruction) -> std::result::Result<(), String> {
        let n = usize::from(i.n);
        let a = self.words_of("va", i.va, n)?;
        if a.len() > self.activations.len() {
            let limit = self.activations.len();
            return Err(format!("{} activations do not fit a buffer of {limit}", a.len()));
        }
        let maximum =
            self.vectors[a.start..a.start + n].iter().map(|x| x.unsigned_abs()).max().unwrap_or(0);
        let factor = arith::quant_factor(maximum);
        for (j, q) in self.activations[..a.len()].iter_mut().enumerate() {
            *q = if j < n { arith::quantize(self.vectors[a.start + j], factor) } else { 0 };
        }
        self.scalars[usize::from(i.sd)] =
            arith::dequant_scale(maximum, self.scalars[usize::from(i.sa)]);
        Ok(())
    }

    fn matvec(&mut self, i: &Instruction) -> std::result::Result<(), String> {
        let (n, k) = (usize::from(i.n), usize::from(i.vc));
        let packing = Packing::from_flag(i.sd);
        let width = self.configuration.weight_bytes as usize;
        let columns = k.next_multiple_of(width);
        if n == 0 || k == 0 || columns > self.activations.len() {
            let limit = self.activations.len();
            return Err(format!(
                "{n} rows of {k} activations: expected at least 1, and at most {limit} activations"
            ));
        }
        let lanes = self.configuration.row_lanes as usize;
        let target = usize::from(self.destination(i)) * lanes;
        if target + n.next_multiple_of(lanes) > self.vectors.len() {
            return Err(format!(
                "{n} results from word {} on do not fit vector memory",
                target / lanes
            ));
        }
        let bytes = self.configuration.beats(packing, n, k) * width;
        if self.stream_end - self.stream_at < bytes {
            let left = self.stream_end - self.stream_at;
            return Err(format!(
                "it needs {bytes} bytes of weights a core, but {left} are left of the stream"
            ));
        }
        let scale = self.scalars[usize::from(i.sa)];
        let rows = packing.trits();
        let cores = self.configuration.cores as usize;
        let table = &self.trits[packing.flag() as usize];
        for (core, stream) in self.streams.iter().enumerate() {
            let weights = stream[self.stream_at..self.stream_at + bytes].chunks_exact(columns);
            for (group, weights) in weights.enumerate() {
                let first = (group * cores + core) * rows;
                let sums = ternary_sums(table, weights, &self.activations);
                for (row, &sum) in (first..n.min(first + rows)).zip(&sums) {
                    self.vectors[target + row] = scale.apply(sum);
                }
            }
        }
        self.stream_at += bytes;
        Ok(())
    }

    fn mlgru(&mut self, i: &Instruction) -> std::result::Result<(), String> {
        let n = usize::from(i.n);
        let ranges = [
            self.words_of("vd", self.destination(i), n)?,
            self.words_of("va", i.va, n)?,
            self.words_of("vb", i.vb, n)?,
            self.words_of("vc", i.vc, n)?,
        ];
        for (index, first) in ranges.iter().enumerate() {
            if ranges[..index]
                .iter()
                .any(|second| first.start < second.end && second.start < first.end)
            {
                return Err("its four vectors must not overlap".to_owned());
            }
        }
        let padded = ranges[0].len();
        let [h, input, gate, bound] = ranges.map(|range| range.start);
        let sigmoid = &self.sigmoid;
        each(&mut self.vectors, padded, |v, j| {
            v[gate + j] = arith::forget_gate(sigmoid, v[gate + j], v[bound + j])
        });
        each(&mut self.vectors, padded, |v, j| {
            v[h + j] = arith::recurrence(sigmoid, v[input + j], v[gate + j], v[h + j])
        });
        Ok(())
    }
}

/// Runs an operation on each of `n` elements.
fn each(vectors: &mut [i32], n: usize, mut operation: impl FnMut(&mut [i32], usize)) {
    for j in 0..n {
        operation(vectors, j);
    }
}

/// A source may be the destination, but not overlap it otherwise: words are read ahead of those written.
fn overlap(
    name: &str,
    d: &std::ops::Range<usize>,
    source: &std::ops::Range<usize>,
) -> std::result::Result<(), String> {
    if d.start != source.start && d.start < source.end && source.start < d.end {
        return Err(format!("vd and {name} overlap without being the same"));
    }
    Ok(())
}

/// Units of address that a vector of `n` elements takes in data memory.
pub(crate) fn moved_units(configuration: &Configuration, n: usize) -> u32 {
    let bytes = configuration.words(n) as u64 * u64::from(configuration.data_bytes());
    bytes.div_ceil(ADDRESS_UNIT) as u32
}

/// Sums of a group of rows: `sum_k q[k] · t_r(weights[k])` for the rows r of a byte.
fn ternary_sums(table: &[[i16; 8]; 256], weights: &[u8], activations: &[i8]) -> [i32; 8] {
    let mut sums = [0i32; 8];
    for (weights, activations) in weights.chunks(SHORT_SUM).zip(activations.chunks(SHORT_SUM)) {
        let mut short = [0i16; 8];
        for (&byte, &q) in weights.iter().zip(activations) {
            let q = i16::from(q);
            for (sum, trit) in short.iter_mut().zip(&table[usize::from(byte)]) {
                *sum += trit * q;
            }
        }
        for (sum, short) in sums.iter_mut().zip(short) {
            *sum += i32::from(short);
        }
    }
    sums
}
