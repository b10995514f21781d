//! `mmfree bench`: prefill and decode speed against the machine's memory bandwidth.

mod train;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use mmfree::benchmark::{self, DISTINCT_TOKENS, Options, Report, Spread};
use mmfree::config::ModelConfig;
use mmfree::model::Model;

use crate::model_arg::{self, EngineArgs};
use crate::progress::Progress;
use crate::streamed_text::line;

/// Measure prefill and decode speed
///
/// Runs a prompt and then decodes token by token, several times, and holds the decoding speed against
/// what the memory allows: bytes streamed a token over the read bandwidth, which is measured between the
/// runs with the same threads, or on the same GPU.
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Args {
    #[command(subcommand)]
    what: Option<What>,
    /// Hugging Face directory, GGUF file, or Hugging Face repository id [default: the built-in model]
    model: Option<PathBuf>,
    /// Random weights of a published size instead of a model
    #[arg(long, conflicts_with = "model", value_parser = clap::builder::PossibleValuesParser::new(ModelConfig::preset_names()))]
    size: Option<String>,
    /// Tokens of the prompt
    #[arg(long, value_name = "N", default_value_t = 512)]
    prompt_tokens: usize,
    /// Tokens decoded one by one after it
    #[arg(long, value_name = "N", default_value_t = 64)]
    decode_tokens: usize,
    /// Runs that count
    #[arg(long, value_name = "N", default_value_t = 5)]
    repetitions: usize,
    /// Runs before them that do not count
    #[arg(long, value_name = "N", default_value_t = 1)]
    warmup: usize,
    /// Sequences that are decoded side by side
    #[arg(long, value_name = "N", default_value_t = 1)]
    batch: usize,
    /// Print one JSON object instead of a table
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    engine: EngineArgs,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    Train(train::Args),
}

/// Runs the command.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    if let Some(What::Train(args)) = &args.what {
        return train::run(args);
    }
    let engine = args.engine.options()?;
    let layout = engine.layout()?;
    let (name, model) = match (&args.size, &args.model) {
        (Some(size), _) => {
            let config = ModelConfig::preset(size).context("unknown preset")?;
            (format!("{size}, random weights"), Model::random(&config, layout, DISTINCT_TOKENS, 0)?)
        }
        (None, path) => {
            let name =
                path.as_ref().map_or("built-in model".into(), |path| path.display().to_string());
            (name, Model::load_in(&model_arg::open(path.as_deref())?, layout)?)
        }
    };
    let options = Options {
        prompt_tokens: args.prompt_tokens,
        decode_tokens: args.decode_tokens,
        repetitions: args.repetitions,
        warmup: args.warmup,
        batch: args.batch,
        engine,
    };
    let progress = Progress::new("measuring");
    let runs = (args.warmup.max(1) + args.repetitions) as u64;
    let report = benchmark::run(&name, Arc::new(model), &options, &mut |run| {
        progress.set(run as u64, runs);
    })?;
    drop(progress);
    if args.json {
        line!("{}", serde_json::to_string(&report)?);
    } else {
        print_table(&report)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn print_table(report: &Report) -> anyhow::Result<()> {
    let spread = |spread: &Spread, unit: f64| {
        format!(
            "{:>10.1}  ({:.1} to {:.1})",
            spread.median / unit,
            spread.min / unit,
            spread.max / unit
        )
    };
    let processor = report.processor.as_deref().unwrap_or("unknown processor");
    match &report.device {
        Some(device) => line!("{}: {} on {device}", report.model, report.backend),
        None => {
            line!("{}: {}, {} threads on {processor}", report.model, report.backend, report.threads)
        }
    }
    line!("medians of {} runs, smallest and largest in brackets", report.repetitions);
    line!(
        "prefill, {:>5} tokens  {}  tokens/s",
        report.prompt_tokens,
        spread(&report.prefill, 1.0)
    );
    line!(
        "decode,  {:>5} tokens  {}  tokens/s",
        report.decode_tokens * report.batch,
        spread(&report.decode, 1.0)
    );
    line!("weights streamed       {:>10.1}  MB a token", report.bytes_per_token as f64 / 1e6);
    line!("read bandwidth         {}  GB/s", spread(&report.read_bandwidth, 1e9));
    line!("share of it            {:>10.1}  %", report.share_of_read_bandwidth * 100.0);
    match report.peak_rss_bytes {
        Some(bytes) => line!("peak resident memory   {:>10.1}  MiB", bytes as f64 / 1_048_576.0),
        None => line!("peak resident memory      unknown on this system"),
    }
    if let Some(bytes) = report.peak_device_bytes {
        line!("peak GPU memory        {:>10.1}  MiB", bytes as f64 / 1_048_576.0);
    }
    line!("state of a sequence    {:>10.1}  KiB", report.state_bytes as f64 / 1024.0);
    match report.joules_per_token {
        Some(joules) => {
            let of = if report.device.is_some() { "GPU" } else { "processor package" };
            line!("energy of decoding     {joules:>10.3}  J a token, {of}")
        }
        None => {
            line!("energy of decoding        unknown: no readable counter (RAPL, NVML)")
        }
    }
    Ok(())
}
