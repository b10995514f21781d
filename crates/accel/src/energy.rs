//! The energy model: energies of operations from published measurements, times the activity that the
//! timing model counts.
//!
//! Per-operation energies are of chips in 45 nm (Horowitz, "Computing's energy problem", ISSCC 2014, figure
//! 1.1.9): addition of 8-bit integers 0.03 pJ and of 32-bit ones 0.1 pJ, multiplication of 32-bit integers 3.1 pJ, a
//! read of 64 bits from an 8 KiB cache 10 pJ. An FPGA spends more on the same operation: Kuon and Rose ("Measuring
//! the gap between FPGAs and ASICs", IEEE TCAD 26(2), 2007) measured 14 times the dynamic power on average for designs
//! in logic only, and less where hard multipliers and memories serve; 7 is taken for the low end. DRAM: DDR4 takes
//! some 15 to 25 pJ a bit at the device and its interface under streaming reads. `docs/accelerator.md` says which of
//! these were checked against the publications.
//!
//! The range that is printed is the product of the low and of the high ends. Newer processes than 45 nm make the
//! chip's part smaller; that is left out, in favour of caution.

use serde::Serialize;

use crate::timing::Cost;

/// Low, likely and high value.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Range {
    /// The lowest that the sources support.
    pub low: f64,
    /// The likely value.
    pub likely: f64,
    /// The highest.
    pub high: f64,
}

impl Range {
    const fn new(low: f64, likely: f64, high: f64) -> Self {
        Self { low, likely, high }
    }

    fn each(parts: &[(Self, f64)], constant: Self) -> Self {
        let sum = |pick: fn(&Self) -> f64| {
            pick(&constant) + parts.iter().map(|(range, factor)| pick(range) * factor).sum::<f64>()
        };
        Self { low: sum(|r| r.low), likely: sum(|r| r.likely), high: sum(|r| r.high) }
    }
}

/// Energies of one technology, in picojoules, and its standing power in watts.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Technology {
    /// Addition of an 8-bit activation in a tree of adders of up to 16 bits.
    pub ternary_addition_pj: Range,
    /// Multiplication of 32-bit integers with rounding.
    pub multiplication_pj: Range,
    /// A bit from or to a memory on the chip.
    pub sram_bit_pj: Range,
    /// A bit from or to DRAM.
    pub dram_bit_pj: Range,
    /// What the chip and its memories take while nothing happens.
    pub static_watts: Range,
}

/// A large FPGA with DDR4. Operations: 45 nm ASIC energies times 7 to 14, the standing power is that of a
/// device of the size of a Stratix 10 with four memory channels.
pub const FPGA_DDR4: Technology = Technology {
    ternary_addition_pj: Range::new(0.2, 0.4, 0.7),
    multiplication_pj: Range::new(22.0, 31.0, 43.0),
    sram_bit_pj: Range::new(0.16, 0.5, 1.1),
    dram_bit_pj: Range::new(15.0, 20.0, 25.0),
    static_watts: Range::new(3.0, 5.0, 8.0),
};

/// Energy of a run, by part.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Energy {
    /// DRAM, joules.
    pub dram_joules: Range,
    /// Additions of the ternary units, joules.
    pub ternary_joules: Range,
    /// The row-wise unit, joules.
    pub row_joules: Range,
    /// Memories on the chip, joules.
    pub sram_joules: Range,
    /// Standing power over the run's time, joules.
    pub static_joules: Range,
    /// All of it.
    pub joules: Range,
    /// All of it over the time.
    pub watts: Range,
}

/// Energy of a run that takes `seconds`.
pub fn estimate(cost: &Cost, technology: &Technology, seconds: f64) -> Energy {
    const PICO: f64 = 1e-12;
    let none = Range::new(0.0, 0.0, 0.0);
    let part = |range: Range, count: f64| Range::each(&[(range, count * PICO)], none);
    let dram_bits = (cost.weight_bytes + cost.data_bytes) as f64 * 8.0;
    // Weights are written to the FIFO and read from it; vectors are words of 32 bits.
    let sram_bits = cost.weight_bytes as f64 * 16.0
        + cost.activation_accesses as f64 * 8.0
        + cost.vector_accesses as f64 * 32.0;
    let dram_joules = part(technology.dram_bit_pj, dram_bits);
    let ternary_joules = part(technology.ternary_addition_pj, cost.ternary_additions as f64);
    let row_joules = part(technology.multiplication_pj, cost.multiplications as f64);
    let sram_joules = part(technology.sram_bit_pj, sram_bits);
    let static_joules = Range::each(&[(technology.static_watts, seconds)], none);
    let parts = [dram_joules, ternary_joules, row_joules, sram_joules, static_joules];
    let joules = Range::each(&parts.map(|part| (part, 1.0)), none);
    let watts = Range::each(&[(joules, 1.0 / seconds)], none);
    Energy { dram_joules, ternary_joules, row_joules, sram_joules, static_joules, joules, watts }
}
