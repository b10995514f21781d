//! `mmfree plot`: loss curves.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::ValueEnum;
use mmfree::output::OutputFile;
use mmfree_train::plot::{PlotOptions, plot};

/// Draw the loss curves of training runs
///
/// The line is the smoothed training loss, with the raw one in a pale colour behind it; the dashed line with
/// marks is the loss on held-out text. The chart is an SVG file, which browsers show.
///
///   mmfree plot runs/tiny runs/tiny-transformer -o loss.svg
#[derive(Debug, clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Args {
    /// Directories of runs, or their log.jsonl
    #[arg(required = true, value_name = "RUN")]
    runs: Vec<PathBuf>,
    /// File to write
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Horizontal axis
    #[arg(long, value_enum, default_value_t = Axis::Tokens)]
    axis: Axis,
    /// Smoothing of the training loss, from 0 (none) to less than 1
    #[arg(long, value_name = "SHARE", default_value_t = 0.6)]
    smoothing: f64,
    /// Text above the chart
    #[arg(long, value_name = "TEXT", default_value = "Loss")]
    title: String,
    /// Width in pixels
    #[arg(long, value_name = "PIXELS", default_value_t = 960)]
    width: u32,
    /// Height in pixels
    #[arg(long, value_name = "PIXELS", default_value_t = 600)]
    height: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Axis {
    /// Tokens seen: compares runs with different batch sizes
    Tokens,
    /// Optimiser steps
    Steps,
}

/// Draws.
pub fn run(args: &Args) -> Result<ExitCode> {
    let options = PlotOptions {
        axis: match args.axis {
            Axis::Tokens => mmfree_train::plot::Axis::Tokens,
            Axis::Steps => mmfree_train::plot::Axis::Steps,
        },
        title: args.title.clone(),
        smoothing: args.smoothing,
        size: (args.width, args.height),
    };
    let svg = plot(&args.runs, &options)?;
    let mut file = OutputFile::create(&args.output)?;
    file.put(svg.as_bytes())?;
    file.commit()?;
    Ok(ExitCode::SUCCESS)
}
