//! The energy model: energies of operations from published measurements, times the activity that the
//! timing model counts.
//!
//! Per-operation energies are of chips in 45 nm (Horowitz, "Computing's energy problem", ISSCC 2014, figure
//! 1.1.9): addition of 8-bit integers 0.03 pJ and of 32-bit ones 0.1 pJ, multiplication of 32-bit integers 3.1 pJ, a
//! read of 64 bits from an 8 KiB cache 10 pJ. An FPGA spends more on the same operation: Kuon and Rose ("Measuring
//! the gap between FPGAs and ASICs", IEEE TCAD 26(2), 2007) measured 14 times the dynamic power on average for designs
//! in logic only, and less where hard multipliers and memories serve; 7 is taken for the low end. A DRAM's bit is its
//! supply current in streaming reads, as its data sheet gives it, over the rate of its pins, with refresh and
//! termination; a test below does that sum. `docs/accelerator.md` says what was read of each source.
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
    /// Where the figures come from, in a sentence.
    pub basis: &'static str,
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

/// A large FPGA with DDR4-2400. Operations: 45 nm ASIC energies times 7 to 14. DRAM: 12 pJ for one rank of eight chips of
/// 8 Gbit, 16 with two ranks' termination and a ninth chip for error correction, 22 with older chips of 4 Gbit and
/// the second rank's standby. The standing power is a guess for a device of the size of a Stratix 10.
pub const FPGA_DDR4: Technology = Technology {
    basis: "operations in 45 nm (Horowitz, ISSCC 2014) times 7 to 14 for an FPGA (Kuon and Rose, 2007); DDR4 from data \
            sheets' currents; the standing power is a guess",
    ternary_addition_pj: Range::new(0.2, 0.4, 0.7),
    multiplication_pj: Range::new(22.0, 31.0, 43.0),
    sram_bit_pj: Range::new(0.16, 0.5, 1.1),
    dram_bit_pj: Range::new(12.0, 16.0, 22.0),
    static_watts: Range::new(3.0, 5.0, 8.0),
};

/// A small FPGA with one DDR3 chip of 16 bits at 800 million transfers a second: as [`FPGA_DDR4`] for operations; 270 mA
/// at 1.5 V for 25.6 Gb/s are 16 pJ a bit, and the pins take the rest. The standing power is a guess.
pub const FPGA_DDR3: Technology = Technology {
    basis: "operations in 45 nm (Horowitz, ISSCC 2014) times 7 to 14 for an FPGA (Kuon and Rose, 2007); DDR3 from a data \
            sheet's currents; the standing power is a guess",
    dram_bit_pj: Range::new(18.0, 25.0, 38.0),
    static_watts: Range::new(0.3, 0.5, 1.0),
    ..FPGA_DDR4
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

#[cfg(test)]
mod tests {
    use super::*;

    /// A DDR4-2400 chip with eight data pins, 1.2 V, under streaming reads: pJ a bit of its supplies and its pins.
    ///
    /// `reading` is IDD4R in mA. The other currents are those of Micron's MT40A1G8: IDD5 250, IDD3N 43, IDD0 48, IDD2N
    /// 34 mA, and 3 mA at 2.5 V; refresh takes 350 ns of 7800, a row of 1 KiB is opened for 45.8 ns. A pin that is low
    /// draws 1.2 V over driver (34 ohms), wire (10) and `termination` (ohms): half of the data pins, and one of the
    /// strobe's two.
    fn ddr4_bit(reading: f64, termination: f64) -> f64 {
        let gigabits = 8.0 * 2.4;
        let refresh = (250.0 - 43.0) * 1.2 * 350.0 / 7800.0;
        let row = (48.0 * 45.8 - (43.0 * 32.5 + 34.0 * 13.3)) * 1.2 / 8192.0;
        let pins = (8.0 / 2.0 + 1.0) * 1.2 * 1.2 / (34.0 + 10.0 + termination) * 1000.0;
        (reading * 1.2 + refresh + 3.0 * 2.5 + pins) / gigabits + row
    }

    #[test]
    fn the_range_of_a_dram_bit_follows_from_data_sheets() {
        let parallel = |a: f64, b: f64| a * b / (a + b);
        // 120 ohms at the controller; the other rank terminates with 40 behind 10 of wire.
        let two_ranks = parallel(120.0, 50.0);
        let spare_chip = 9.0 / 8.0;
        let standby = 43.0 * 1.2 / (8.0 * 2.4);
        let Range { low, likely, high } = FPGA_DDR4.dram_bit_pj;
        for (constant, found) in [
            (low, ddr4_bit(135.0, 120.0)),
            (likely, ddr4_bit(135.0, two_ranks) * spare_chip),
            (high, (ddr4_bit(184.5, two_ranks) + standby) * spare_chip),
        ] {
            assert!((constant - found).abs() < 0.5, "{constant} is {found}");
        }
    }
}
