//! What a model would do on a board: speed, bandwidth, power.

use mmfree::config::ModelConfig;
use serde::Serialize;

use crate::compiler::Plan;
use crate::config::{Configuration, Packing};
use crate::energy::{self, Energy, FPGA_DDR3, FPGA_DDR4, Technology};
use crate::error::{Error, Result};
use crate::timing::{self, Cost, Memory};

/// A board: its memory and clock.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Board {
    /// Name.
    pub name: &'static str,
    /// What the figures rest on.
    pub basis: &'static str,
    /// Hertz.
    pub clock_hz: f64,
    /// Why this clock.
    pub clock_basis: &'static str,
    /// Bytes a second, all channels together.
    pub memory_bandwidth: f64,
    /// The share of it that streaming reads reach, after refresh and turnarounds.
    pub memory_efficiency: f64,
    /// Seconds from a read address to its data.
    pub memory_latency: f64,
    /// Bytes of DRAM, all channels together.
    pub memory_bytes: u64,
    /// Energies of its chips.
    #[serde(skip)]
    pub technology: Technology,
    /// The preset of the hardware that fills it.
    pub configuration: &'static str,
    /// Published speed and power of the authors' accelerator on this board with a 1.3B model.
    pub published: Option<Published>,
}

/// A published measurement.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Published {
    /// Tokens a second.
    pub tokens_per_s: f64,
    /// Watts.
    pub watts: f64,
}

/// Boards that are known.
pub const BOARDS: [Board; 2] = [
    Board {
        name: "d5005",
        basis: "four DDR4-2400 channels of 64 bits, one a core; streaming reads at 92 % of the \
                channels' rate (refresh takes 4 to 5 %), 200 ns of latency; 32 GiB",
        clock_hz: 250e6,
        clock_basis: "an assumption: nothing was placed for this FPGA",
        memory_bandwidth: 76.8e9,
        memory_efficiency: 0.92,
        memory_latency: 200e-9,
        memory_bytes: 32 << 30,
        technology: FPGA_DDR4,
        configuration: "d5005",
        published: Some(Published { tokens_per_s: 23.8, watts: 13.0 }),
    },
    Board {
        name: "ecp5",
        basis: "one DDR3-800 channel of 16 bits; streaming reads at 85 % of the channel's rate, \
                200 ns of latency; 512 MiB",
        clock_hz: 38e6,
        clock_basis: "as place and route reports",
        memory_bandwidth: 1.6e9,
        memory_efficiency: 0.85,
        memory_latency: 200e-9,
        memory_bytes: 512 << 20,
        technology: FPGA_DDR3,
        configuration: "ecp5",
        published: None,
    },
];

/// Speed and energy of decoding one sequence.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// The model.
    pub model: String,
    /// The board.
    pub board: Board,
    /// The hardware.
    pub configuration: Configuration,
    /// How weights are packed.
    pub packing: Packing,
    /// Tokens a second.
    pub tokens_per_s: f64,
    /// Watts, likely value of the estimate.
    pub watts: f64,
    /// Joules a token, likely value of the estimate.
    pub joules_per_token: f64,
    /// Bytes moved over what the memory could have moved at its full rate in the same time.
    pub share_of_memory_bandwidth: f64,
    /// What the memory alone would allow at its full rate, tokens a second.
    pub memory_limit_tokens_per_s: f64,
    /// Tokens a second over that limit.
    pub share_of_memory_limit: f64,
    /// Bytes of weights a token.
    pub weight_bytes_per_token: u64,
    /// `memory`, `ternary unit` or `row-wise unit and latencies`.
    pub limited_by: &'static str,
    /// Activity of one token.
    pub cost: Cost,
    /// Energy of one token, with its range.
    pub energy: Energy,
    /// Energies that the estimate is made of.
    pub technology: Technology,
    /// Tokens a second over the published figure.
    pub speed_ratio: Option<f64>,
    /// Joules a token over the published figure: low, likely, high.
    pub energy_ratio: Option<[f64; 3]>,
}

/// Reports on a model of these sizes.
///
/// # Errors
/// A model that fits neither the configuration nor the board's memory.
pub fn report(
    name: &str,
    model: &ModelConfig,
    board: &Board,
    configuration: &Configuration,
    packing: Packing,
) -> Result<Report> {
    let plan = Plan::new(model, configuration, packing)?;
    check_memory(&plan, board)?;
    let beat = f64::from(configuration.weight_bytes);
    let channel = board.memory_bandwidth * board.memory_efficiency
        / board.clock_hz
        / f64::from(configuration.cores);
    let memory = Memory {
        latency: board.memory_latency * board.clock_hz,
        weight_rate: (channel / beat).min(1.0),
        data_rate: (channel / f64::from(configuration.data_bytes())).min(1.0),
        stall: 0.0,
    };
    // The data port shares the first core's channel, and all cores wait for the slowest: what it moves is
    // missing there.
    let alone = timing::estimate(&plan.program, configuration, memory);
    let first_channel = alone.weight_bytes as f64 / f64::from(configuration.cores);
    let left = first_channel / (first_channel + alone.data_bytes as f64);
    let memory = Memory { weight_rate: (channel / beat * left).min(1.0), ..memory };
    let cost = timing::estimate(&plan.program, configuration, memory);
    let seconds = cost.cycles / board.clock_hz;
    let moved = (cost.weight_bytes + cost.data_bytes) as f64;
    let energy = energy::estimate(&cost, &board.technology, seconds);
    let memory_limit_tokens_per_s = board.memory_bandwidth / cost.weight_bytes as f64;
    let tokens_per_s = 1.0 / seconds;
    let products = cost.matvec_cycles - cost.starved_cycles;
    let limited_by = if cost.starved_cycles > 0.2 * cost.cycles {
        "memory"
    } else if products > 0.5 * cost.cycles {
        "ternary unit"
    } else {
        "row-wise unit and latencies"
    };
    let published = board.published.filter(|_| name == "1.3b");
    Ok(Report {
        model: name.to_owned(),
        board: board.clone(),
        configuration: configuration.clone(),
        packing,
        tokens_per_s,
        watts: energy.watts.likely,
        joules_per_token: energy.joules.likely,
        share_of_memory_bandwidth: moved / seconds / board.memory_bandwidth,
        memory_limit_tokens_per_s,
        share_of_memory_limit: tokens_per_s / memory_limit_tokens_per_s,
        weight_bytes_per_token: cost.weight_bytes,
        limited_by,
        cost,
        energy,
        technology: board.technology,
        speed_ratio: published.map(|published| tokens_per_s / published.tokens_per_s),
        energy_ratio: published.map(|published| {
            let theirs = published.watts / published.tokens_per_s;
            [energy.joules.low, energy.joules.likely, energy.joules.high].map(|ours| ours / theirs)
        }),
    })
}

/// The first channel holds what the data port moves beside a core's weights.
fn check_memory(plan: &Plan, board: &Board) -> Result<()> {
    let cores = plan.configuration.cores;
    let (needed, channel) =
        (plan.stream_bytes + plan.data_bytes(), board.memory_bytes / u64::from(cores));
    if needed <= channel {
        return Ok(());
    }
    Err(Error::DoesNotFit {
        configuration: plan.configuration.name.clone(),
        what: format!(
            "its first memory channel takes {needed} bytes ({} of weights, {} of data), a channel of the board {} has \
             {channel}; choose another board, or t5 weights",
            plan.stream_bytes,
            plan.data_bytes(),
            board.name
        ),
    })
}
