//! `mmfree accel report`: speed and energy of a model on a board.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use mmfree::config::ModelConfig;
use mmfree_accel::energy::Range;
use mmfree_accel::report::{self, BOARDS, Report};

use super::HardwareArgs;
use crate::model_arg;
use crate::streamed_text::line;

/// Estimate speed and energy of a model on a board
///
/// Decoding of one sequence in the timing model, which agrees with the RTL's cycle counts. Watts and
/// joules are estimates from published energies of operations; their range is printed.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Hugging Face directory or GGUF file [default: the built-in model]
    #[arg(conflicts_with = "size")]
    model: Option<PathBuf>,
    /// A published size instead: 370m, 1.3b, 2.7b, 7b, 13b
    #[arg(long, value_name = "SIZE")]
    size: Option<String>,
    /// Board: d5005 (Intel FPGA PAC D5005), ecp5 (Lattice ECP5-85 with one DDR3 chip)
    #[arg(long, value_name = "NAME", default_value = "d5005")]
    board: String,
    /// Clock in MHz [default: the board's]
    #[arg(long, value_name = "MHZ", value_parser = clap::value_parser!(u32).range(1..=2000))]
    clock_mhz: Option<u32>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    hardware: HardwareArgs,
}

/// Reports.
pub fn run(args: &Args) -> Result<ExitCode> {
    let known = BOARDS.iter().find(|board| board.name.eq_ignore_ascii_case(&args.board));
    let mut board = known.cloned().with_context(|| {
        let names: Vec<_> = BOARDS.iter().map(|board| board.name).collect();
        format!("there is no board {:?}; choose from {}", args.board, names.join(", "))
    })?;
    if let Some(mhz) = args.clock_mhz {
        board.clock_hz = f64::from(mhz) * 1e6;
        board.clock_basis = "as asked for";
    }
    let (name, model) = match &args.size {
        Some(size) => {
            let names: Vec<_> = ModelConfig::preset_names().collect();
            let model = ModelConfig::preset(size).with_context(|| {
                format!("there is no size {size:?}; choose from {}", names.join(", "))
            })?;
            (size.to_ascii_lowercase(), model)
        }
        None => {
            let checkpoint = model_arg::open(args.model.as_deref())?;
            let name = super::model_name(args.model.as_deref(), &checkpoint);
            (name.to_owned(), checkpoint.config().clone())
        }
    };
    let configuration = args.hardware.configuration_or(board.configuration)?;
    let found = report::report(&name, &model, &board, &configuration, args.hardware.packing())?;
    if args.json {
        line!("{}", serde_json::to_string(&found)?);
    } else {
        print(&found)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn print(report: &Report) -> Result<()> {
    let Report { board, configuration: c, cost, energy, .. } = report;
    let range = |r: &Range, digits: usize| {
        format!("{:>8.digits$}  ({:.digits$} to {:.digits$})", r.likely, r.low, r.high)
    };
    line!(
        "{} on {}: {} of {} bytes, {} row lanes, packing {}",
        report.model,
        board.name,
        super::cores(c),
        c.weight_bytes,
        c.row_lanes,
        report.packing.name()
    );
    line!("basis: {}", board.basis);
    line!("clock: {:.0} MHz, {}", board.clock_hz / 1e6, board.clock_basis);
    line!("speed                {:>8.1}  tokens/s", report.tokens_per_s);
    line!(
        "memory alone allows  {:>8.1}  tokens/s at {:.1} GB/s; reached: {:.1} %",
        report.memory_limit_tokens_per_s,
        board.memory_bandwidth / 1e9,
        report.share_of_memory_limit * 100.0
    );
    line!("memory bandwidth     {:>8.1}  % used", report.share_of_memory_bandwidth * 100.0);
    line!("limited by           {}", report.limited_by);
    line!("weights a token      {:>8.1}  MB", report.weight_bytes_per_token as f64 / 1e6);
    line!(
        "cycles a token       {:>8.0}  ({:.1} % products, {:.1} % row-wise, {:.1} % loads and stores)",
        cost.cycles,
        cost.matvec_cycles / cost.cycles * 100.0,
        cost.row_cycles / cost.cycles * 100.0,
        cost.data_cycles / cost.cycles * 100.0
    );
    line!("energy a token       {}  J, estimated", range(&energy.joules, 4));
    line!("  DRAM               {}", range(&energy.dram_joules, 5));
    line!("  ternary additions  {}", range(&energy.ternary_joules, 5));
    line!("  row-wise unit      {}", range(&energy.row_joules, 5));
    line!("  on-chip memories   {}", range(&energy.sram_joules, 5));
    line!("  standing power     {}", range(&energy.static_joules, 5));
    line!("power                {}  W, estimated", range(&energy.watts, 2));
    let (dram, standing) = (&report.technology.dram_bit_pj, &report.technology.static_watts);
    line!(
        "basis of the energy: {}; {} pJ ({} to {}) a bit of DRAM, {} W ({} to {}) standing",
        report.technology.basis,
        dram.likely,
        dram.low,
        dram.high,
        standing.likely,
        standing.low,
        standing.high
    );
    if let (Some(speed), Some([low, likely, high]), Some(published)) =
        (report.speed_ratio, report.energy_ratio, board.published)
    {
        line!(
            "published for this board and size: {} tokens/s at {} W, {:.2} J a token; speed {speed:.1} times that, \
             energy a token {likely:.2} of it ({low:.2} to {high:.2})",
            published.tokens_per_s,
            published.watts,
            published.watts / published.tokens_per_s
        );
    }
    Ok(())
}
