//! `mmfree scaling`: scaling laws of training runs.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::ValueEnum;
use mmfree::output::OutputDirectory;
use mmfree_train::plot::{PlotOptions, plot};
use mmfree_train::scaling::{self, Options, PAPER_CROSSING, draw};

use crate::streamed_text;

/// Fit loss against compute for each architecture, and project where they cross
///
/// Reads the logs of MatMul-free and Transformer++ runs and fits, for each architecture, a power law with a
/// floor and a straight line on logarithmic axes (the form of the paper's projection, which crosses at 1e23
/// FLOPs), with intervals by bootstrap over the points. Compute is 6 · weights in matrices · tokens. DIR gets
/// scaling.svg, curves.svg, scaling.md and scaling.json. Beside each log must be the model's configuration, as
/// model/config.json or config.json.
///
///   mmfree scaling runs/mmf-* runs/transformer-* -o scaling
#[derive(Debug, clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Args {
    /// Directories of runs, or their log.jsonl
    #[arg(required = true, value_name = "RUN")]
    runs: Vec<PathBuf>,
    /// Directory to write; it must not exist or be empty
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// Losses that are fitted: the last of each run, or every evaluation but those of its first tenth
    #[arg(long, value_enum, default_value_t = Points::Final)]
    points: Points,
    /// Draws of the bootstrap
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(..=1_000_000))]
    bootstrap: u32,
    /// Print the JSON instead of the tables
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Points {
    Final,
    All,
}

/// Width and height of the charts in pixels.
const SIZE: (u32, u32) = (960, 600);

/// Fits and writes.
pub fn run(args: &Args) -> Result<ExitCode> {
    let options = Options {
        points: match args.points {
            Points::Final => scaling::Points::Final,
            Points::All => scaling::Points::All,
        },
        draws: args.bootstrap as usize,
    };
    let output = OutputDirectory::create(&args.output)?;
    let report = scaling::analyse(&args.runs, &options)?;
    let json = serde_json::to_string_pretty(&report)?;
    let curves = plot(&args.runs, &PlotOptions { size: SIZE, ..PlotOptions::default() })?;
    output.write_file("scaling.svg", draw(&report, 10.0 * PAPER_CROSSING, SIZE)?.as_bytes())?;
    output.write_file("curves.svg", curves.as_bytes())?;
    output.write_file("scaling.md", report.markdown().as_bytes())?;
    output.write_file("scaling.json", format!("{json}\n").as_bytes())?;
    output.commit()?;
    streamed_text::print(&if args.json { format!("{json}\n") } else { report.markdown() })?;
    Ok(ExitCode::SUCCESS)
}
