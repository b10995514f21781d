//! Hardware configurations: the parameters of the RTL's top module.

use serde::Serialize;

use crate::error::{Error, Result};

/// Sizes of one accelerator. The RTL's parameters have the same names in UpperCamelCase.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Configuration {
    /// Name of a preset, or `custom`.
    pub name: String,
    /// Cores: ternary units with a weight memory each.
    pub cores: u32,
    /// Bytes of packed weights that a core reads and consumes a cycle: inputs of an adder tree.
    pub weight_bytes: u32,
    /// Elements that the row-wise unit handles a cycle; a word of vector memory.
    pub row_lanes: u32,
    /// Words of vector memory.
    pub vector_words: u32,
    /// Longest K: bytes of a core's activation buffer.
    pub activation_bytes: u32,
    /// Beats of a core's weight FIFO.
    pub fifo_beats: u32,
    /// Beats of a read burst.
    pub burst_beats: u32,
}

/// Names and sizes of the presets, in the order of the fields.
const PRESETS: [(&str, [u32; 7]); 4] = [
    // For unit tests: everything has several of everything and nothing is large.
    ("tiny", [2, 8, 2, 1024, 512, 32, 8]),
    // For a Lattice ECP5-85 and the built-in model's vectors; placed out of context only, without pins.
    ("ecp5", [1, 16, 2, 4096, 2048, 64, 16]),
    // For RTL simulation of the built-in model.
    ("sim", [2, 64, 16, 1024, 2048, 64, 16]),
    // Intel D5005: one core for each DDR4 channel. FIFOs of 512 KiB each hold what the memory brings while the
    // row-wise unit works, 2 of the chip's 28 MiB of block RAM.
    ("d5005", [4, 128, 32, 4096, 16384, 4096, 32]),
];

impl Configuration {
    /// A preset: `tiny`, `ecp5`, `sim` or `d5005`.
    pub fn preset(name: &str) -> Option<Self> {
        let &(
            name,
            [
                cores,
                weight_bytes,
                row_lanes,
                vector_words,
                activation_bytes,
                fifo_beats,
                burst_beats,
            ],
        ) = PRESETS.iter().find(|(preset, _)| preset.eq_ignore_ascii_case(name))?;
        Some(Self {
            name: name.to_owned(),
            cores,
            weight_bytes,
            row_lanes,
            vector_words,
            activation_bytes,
            fifo_beats,
            burst_beats,
        })
    }

    /// The names that [`preset`](Self::preset) knows.
    pub fn preset_names() -> impl Iterator<Item = &'static str> {
        PRESETS.iter().map(|&(name, _)| name)
    }

    /// Checks that hardware of these sizes can be built.
    ///
    /// # Errors
    /// [`Error::Configuration`], naming the first size that is wrong.
    pub fn check(&self) -> Result<()> {
        let wrong = |what: String| Err(Error::Configuration(what));
        for (name, value, low, high) in [
            ("cores", self.cores, 1, 64),
            ("weight_bytes", self.weight_bytes, 4, 128),
            ("row_lanes", self.row_lanes, 1, 32),
            ("vector_words", self.vector_words, 16, 65_536),
            ("activation_bytes", self.activation_bytes, 16, 65_536),
            ("fifo_beats", self.fifo_beats, 4, 65_536),
            ("burst_beats", self.burst_beats, 1, 256),
        ] {
            if !(low..=high).contains(&value) || !value.is_power_of_two() && name != "cores" {
                return wrong(format!(
                    "{name} is {value}, expected {}{low} to {high}",
                    if name == "cores" { "" } else { "a power of two from " }
                ));
            }
        }
        if self.weight_bytes < self.row_lanes {
            return wrong(format!(
                "weight_bytes is {} and row_lanes {}, expected at least as many weight_bytes",
                self.weight_bytes, self.row_lanes
            ));
        }
        if self.activation_bytes < self.weight_bytes {
            return wrong(format!(
                "activation_bytes is {}, expected at least weight_bytes, {}",
                self.activation_bytes, self.weight_bytes
            ));
        }
        if self.burst_beats * self.weight_bytes > 4096 || self.burst_beats * 2 > self.fifo_beats {
            return wrong(format!(
                "burst_beats is {}, expected bursts of at most 4096 bytes and half the FIFO of {} beats",
                self.burst_beats, self.fifo_beats
            ));
        }
        Ok(())
    }

    /// Bytes of a beat of the data port: one word of vector memory.
    pub fn data_bytes(&self) -> u32 {
        4 * self.row_lanes
    }

    /// Elements of vector memory.
    pub fn vector_elements(&self) -> usize {
        self.vector_words as usize * self.row_lanes as usize
    }

    /// Words of a vector of `n` elements.
    pub fn words(&self, n: usize) -> usize {
        n.div_ceil(self.row_lanes as usize)
    }

    /// Beats of weights that one core reads for `rows` x `cols` trits.
    pub fn beats(&self, packing: Packing, rows: usize, cols: usize) -> usize {
        self.groups(packing, rows) * cols.div_ceil(self.weight_bytes as usize)
    }

    /// Groups of rows that one core computes.
    pub fn groups(&self, packing: Packing, rows: usize) -> usize {
        rows.div_ceil(packing.trits() * self.cores as usize)
    }
}

/// How trits are packed into bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Packing {
    /// Four trits a byte, 2 bits each: `t + 1`, lowest bits first.
    T2,
    /// Five trits a byte, base 3: `sum (t_i + 1) 3^i`.
    T5,
}

impl Packing {
    /// Trits of a byte, which are of as many rows.
    pub fn trits(self) -> usize {
        match self {
            Self::T2 => 4,
            Self::T5 => 5,
        }
    }

    /// Name in assembly.
    pub fn name(self) -> &'static str {
        match self {
            Self::T2 => "t2",
            Self::T5 => "t5",
        }
    }

    /// From the flag of `matvec`.
    pub fn from_flag(flag: u8) -> Self {
        if flag & 1 == 0 { Self::T2 } else { Self::T5 }
    }

    /// The flag of `matvec`.
    pub fn flag(self) -> u8 {
        self as u8
    }

    /// Packs one trit of each row of a group.
    pub fn encode(self, trits: &[i8]) -> u8 {
        match self {
            Self::T2 => trits.iter().rev().fold(0, |byte, &t| byte << 2 | (t + 1) as u8),
            Self::T5 => trits.iter().rev().fold(0, |byte, &t| byte * 3 + (t + 1) as u8),
        }
    }

    /// Trits of a byte, zeros for codes that stand for none, and in `[4]` of T2.
    pub fn decode(self, byte: u8) -> [i8; 5] {
        let mut trits = [0; 5];
        match self {
            Self::T2 => {
                for (i, trit) in trits[..4].iter_mut().enumerate() {
                    let code = byte >> (2 * i) & 3;
                    *trit = if code == 3 { 0 } else { code as i8 - 1 };
                }
            }
            Self::T5 if byte < 243 => {
                let mut rest = byte;
                for trit in &mut trits {
                    *trit = (rest % 3) as i8 - 1;
                    rest /= 3;
                }
            }
            Self::T5 => {}
        }
        trits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn presets_can_be_built() {
        for name in Configuration::preset_names() {
            Configuration::preset(name).unwrap().check().unwrap();
        }
        assert_eq!(Configuration::preset("D5005").unwrap().name, "d5005");
        assert!(Configuration::preset("x").is_none());
    }

    #[test]
    fn impossible_sizes_are_named() {
        let tiny = Configuration::preset("tiny").unwrap();
        for (name, changed) in [
            ("cores", Configuration { cores: 0, ..tiny.clone() }),
            ("row_lanes", Configuration { row_lanes: 3, ..tiny.clone() }),
            ("weight_bytes", Configuration { weight_bytes: 4, row_lanes: 8, ..tiny.clone() }),
            (
                "activation_bytes",
                Configuration { activation_bytes: 16, weight_bytes: 32, ..tiny.clone() },
            ),
            ("burst_beats", Configuration { burst_beats: 32, ..tiny.clone() }),
        ] {
            assert!(changed.check().unwrap_err().to_string().contains(name), "{name}");
        }
    }

    #[test]
    fn every_group_of_trits_round_trips() {
        for code in 0..243u32 {
            let trits: [i8; 5] = std::array::from_fn(|i| (code / 3u32.pow(i as u32) % 3) as i8 - 1);
            assert_eq!(Packing::T5.decode(Packing::T5.encode(&trits)), trits);
            let four = [trits[0], trits[1], trits[2], trits[3], 0];
            assert_eq!(Packing::T2.decode(Packing::T2.encode(&trits[..4])), four);
        }
        assert_eq!(Packing::T5.decode(243), [0; 5]);
        assert_eq!(Packing::T2.decode(0xff), [0; 5]);
    }
}
