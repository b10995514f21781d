//! `mmfree accel compile`: a model to a program image.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use mmfree_accel::timing::{self, Memory};
use serde_json::json;

use super::HardwareArgs;
use crate::model_arg;
use crate::progress::Progress;
use crate::streamed_text::line;

/// Compile a model to a program image
///
/// Writes program, parameters and packed weights for one hardware configuration, and prints what a token
/// streams, how many cycles it takes with a memory at full rate (`accel report` has those of boards), and where
/// everything lies.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Hugging Face directory or GGUF file [default: the built-in model]
    model: Option<PathBuf>,
    /// File to write; without it nothing is written, only the report is printed
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Print the report as one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    hardware: HardwareArgs,
}

/// Compiles.
pub fn run(args: &Args) -> Result<ExitCode> {
    let checkpoint = model_arg::open(args.model.as_deref())?;
    let plan = args.hardware.plan(checkpoint.config())?;
    if let Some(path) = &args.output {
        let progress = Progress::new("compiling");
        plan.image(&checkpoint, &mut |done, total| progress.set(done, total))?.write(path)?;
    }
    let c = &plan.configuration;
    let streamed = plan.stream_bytes * u64::from(c.cores);
    let parameters = plan.model().parameters();
    let memory = Memory::FULL_RATE;
    let cost = timing::estimate(&plan.program, c, memory);
    if args.json {
        let weights: Vec<_> = (0..c.cores)
            .map(|core| json!({ "core": core, "address": 0, "bytes": plan.stream_bytes }))
            .collect();
        let object = json!({
            "configuration": c,
            "packing": plan.packing,
            "instructions": plan.program.len(),
            "bytes_streamed_per_token": streamed,
            "bits_per_weight": streamed as f64 * 8.0 / parameters.ternary as f64,
            "cycles_per_token": cost.cycles,
            "cost": cost,
            "memory": memory,
            "vector_words_used": plan.vector_words_used,
            "data_bytes": plan.data_bytes(),
            "data_map": plan.data_map,
            "weight_map": weights,
        });
        line!("{object}");
        return Ok(ExitCode::SUCCESS);
    }
    line!(
        "configuration {}: {} of {} weight bytes, {} row lanes; packing {}",
        c.name,
        super::cores(c),
        c.weight_bytes,
        c.row_lanes,
        plan.packing.name()
    );
    line!("instructions      {:>14}", plan.program.len());
    line!("vector memory     {:>14} words of {} are used", plan.vector_words_used, c.vector_words);
    line!(
        "weights a token   {streamed:>14} bytes, {:.3} bits a weight",
        streamed as f64 * 8.0 / parameters.ternary as f64
    );
    line!(
        "cycles a token    {:>14} with a beat of weights a cycle and {} cycles of latency",
        cost.cycles,
        memory.latency
    );
    line!(
        "                  {:>14} products, {} row-wise, {} loads and stores",
        cost.matvec_cycles,
        cost.row_cycles,
        cost.data_cycles
    );
    line!("memory map, bytes        address          size");
    for entry in &plan.data_map {
        line!("  data            {:>14} {:>13}  {}", entry.address, entry.bytes, entry.name);
    }
    for core in 0..c.cores {
        line!("  core {core:<10} {:>14} {:>13}  weights", 0, plan.stream_bytes);
    }
    Ok(ExitCode::SUCCESS)
}
