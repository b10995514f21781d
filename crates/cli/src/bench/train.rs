//! `mmfree bench train`: speed and memory of training.

use std::process::ExitCode;

use mmfree_train::backend::CpuBackend;
use mmfree_train::benchmark::{self, Options, PEAK_FLOPS, Report};
use mmfree_train::communicator::Launch;

use crate::processes;
use crate::progress::Progress;
use crate::streamed_text::line;

/// Measure how fast a model trains
///
/// Whole optimiser steps of a model of random weights on random tokens: forward, backward, clipping, AdamW. Under a
/// launcher, as `mmfree train` takes them, all processes share the batch.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Size of the model
    #[arg(long, value_parser = clap::builder::PossibleValuesParser::new(benchmark::size_names()))]
    size: String,
    /// Which model
    #[arg(long, value_enum, default_value_t = Arch::MatmulFree)]
    arch: Arch,
    /// Sequences of a step, over all processes
    #[arg(long, value_name = "B", default_value_t = 8)]
    batch: usize,
    /// Tokens of a sequence
    #[arg(long, value_name = "T", default_value_t = 2048)]
    seq_len: usize,
    /// Sequences that are computed at once [default: all that a process has]
    #[arg(long, value_name = "N")]
    micro_batch: Option<usize>,
    /// Keep only each block's input and compute the rest again for the backward pass: less memory
    #[arg(long)]
    recompute: bool,
    /// In so many blocks, compute the input of the gated linear unit again: less memory for a few percent more
    /// arithmetic
    #[arg(long, value_name = "BLOCKS", default_value_t = 0)]
    recompute_gates: usize,
    /// Steps that count
    #[arg(long, value_name = "N", default_value_t = 5)]
    repetitions: usize,
    /// Steps before them that do not count
    #[arg(long, value_name = "N", default_value_t = 2)]
    warmup: usize,
    /// What computes: cuda, or the CPU
    #[arg(long, value_enum, default_value_t = Device::Cuda)]
    backend: Device,
    /// Number of the GPU, of the first of several processes on a machine
    #[arg(long, value_name = "N", default_value_t = 0)]
    device: u16,
    /// Threads of the CPU [default: one for each core]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Print one JSON object instead of a table
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Arch {
    MatmulFree,
    Transformer,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Device {
    Cpu,
    Cuda,
}

/// Runs the command.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let launch = Launch::from_environment()?;
    let options = Options {
        size: args.size.clone(),
        transformer: matches!(args.arch, Arch::Transformer),
        batch: args.batch,
        sequence_length: args.seq_len,
        micro_batch: args.micro_batch.unwrap_or(args.batch / launch.world_size),
        recompute: args.recompute,
        recompute_gates: args.recompute_gates,
        repetitions: args.repetitions,
        warmup: args.warmup,
    };
    let processes = processes::join(&launch)?;
    let bar = (launch.rank == 0).then(|| Progress::new("training steps"));
    let steps = (args.warmup + args.repetitions) as u64;
    let mut progress = |step: usize| {
        if let Some(bar) = &bar {
            bar.set(step as u64, steps);
        }
    };
    let report = match args.backend {
        Device::Cpu => {
            let backend = CpuBackend::new(args.threads, None)?;
            benchmark::run(&options, backend, processes, &mut progress)?
        }
        Device::Cuda => {
            let (backend, communicator) =
                processes::gpu(usize::from(args.device), &launch, processes)?;
            benchmark::run(&options, backend, communicator, &mut progress)?
        }
    };
    drop(bar);
    if launch.rank > 0 {
        return Ok(ExitCode::SUCCESS);
    }
    if args.json {
        line!("{}", serde_json::to_string(&report)?);
    } else {
        print_table(&report)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn print_table(report: &Report) -> anyhow::Result<()> {
    let gib = |bytes: f64| bytes / (1u64 << 30) as f64;
    line!(
        "{} {}, {:.1} million parameters: {}",
        report.architecture,
        report.size,
        report.parameters as f64 / 1e6,
        match report.processes {
            1 => report.backend.clone(),
            count => format!("{count} processes, each {}", report.backend),
        }
    );
    line!(
        "{} sequences of {} tokens a step, {} at once{}; medians of {} steps, smallest and largest in brackets",
        report.batch,
        report.sequence_length,
        report.micro_batch,
        match (report.recompute, report.recompute_gates) {
            (true, _) => ", activations computed again".to_owned(),
            (false, 0) => String::new(),
            (false, blocks) => format!(", gates of {blocks} blocks computed again"),
        },
        report.repetitions
    );
    let speed = &report.tokens_per_second;
    line!(
        "speed                  {:>10.0}  ({:.0} to {:.0})  tokens/s",
        speed.median,
        speed.min,
        speed.max
    );
    let time = &report.step_seconds;
    line!(
        "step                   {:>10.1}  ({:.1} to {:.1})  ms",
        1e3 * time.median,
        1e3 * time.min,
        1e3 * time.max
    );
    if let Some(host) = &report.host {
        line!(
            "host's part of a step  {:>10.1}  ms, {} launches; it submits a step while the GPU computes the last",
            1e3 * host.seconds,
            host.launches
        );
    }
    line!("products               {:>10.3}  GFLOP a token", report.flops_per_token / 1e9);
    if let Some(share) = report.share_of_peak {
        line!("share of {:.0} TFLOP/s   {:>10.1}  %", PEAK_FLOPS / 1e12, 100.0 * share);
    }
    if let Some(bytes) = report.peak_device_bytes {
        line!("peak GPU memory        {:>10.2}  GiB", gib(bytes as f64));
    }
    if let Some(bytes) = report.peak_rss_bytes {
        line!("peak resident memory   {:>10.2}  GiB", gib(bytes as f64));
    }
    line!("loss                   {:>10.4}  then {:.4}", report.losses[0], report.losses[1]);
    if !report.breakdown.is_empty() {
        line!("where the time of a step goes");
        for part in &report.breakdown {
            let (time, share) = (1e3 * part.seconds, 100.0 * part.share);
            line!("  {:<30} {time:>9.2} ms {share:>6.1} %", part.kind);
        }
    }
    Ok(())
}
