//! `mmfree accel compare`: the accelerator's arithmetic beside the engine's.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use mmfree::state::State;
use mmfree_accel::compare::{self, Comparison};
use mmfree_accel::machine::Machine;

use super::HardwareArgs;
use crate::model_arg::{self, EngineArgs};
use crate::progress::Progress;
use crate::streamed_text::line;

/// Measure what the accelerator's arithmetic costs in quality
///
/// Reads a text with the float engine and with the simulated accelerator, and prints the mean
/// cross-entropy of each, their difference, and how often both find the same token most likely.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Hugging Face directory or GGUF file [default: the built-in model]
    model: Option<PathBuf>,
    /// Text to read
    #[arg(long, value_name = "FILE")]
    text_file: PathBuf,
    /// Read so many tokens at most
    #[arg(long, value_name = "N", default_value_t = 4096)]
    max_tokens: usize,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    hardware: HardwareArgs,
    #[command(flatten)]
    engine: EngineArgs,
}

/// Compares.
pub fn run(args: &Args) -> Result<ExitCode> {
    let checkpoint = model_arg::open(args.model.as_deref())?;
    let mut loaded = model_arg::load(&checkpoint, &args.engine)?;
    let tokenizer = loaded.tokenizer.as_ref().context("this model has no tokenizer")?;
    let text = std::fs::read_to_string(&args.text_file)
        .with_context(|| format!("cannot read {}", args.text_file.display()))?;
    let mut tokens = tokenizer.encode(&text, true)?;
    tokens.truncate(args.max_tokens);
    ensure!(tokens.len() > 1, "{} has no two tokens", args.text_file.display());
    let name = super::model_name(args.model.as_deref(), &checkpoint);
    let mut machine = Machine::new(super::image(None, name, &checkpoint, &args.hardware)?);
    let progress = Progress::new("comparing");
    let mut state = State::new(&loaded.engine.model().clone());
    let found =
        compare::compare(&mut loaded.engine, &mut state, &mut machine, &tokens, &mut |done| {
            progress.set(done as u64, tokens.len() as u64);
        })?;
    drop(progress);
    if args.json {
        line!("{}", serde_json::to_string(&found)?);
    } else {
        let Comparison {
            tokens,
            engine_loss,
            accelerator_loss,
            loss_ratio,
            same_best_token,
            rms_share,
        } = found;
        line!("{tokens} tokens predicted");
        line!("cross-entropy, float engine  {engine_loss:.5} nats");
        line!(
            "cross-entropy, accelerator   {accelerator_loss:.5} nats ({:+.3} %)",
            (loss_ratio - 1.0) * 100.0
        );
        line!("same most likely token       {:.2} %", same_best_token * 100.0);
        line!("difference of the logits     {:.2} % of their spread (RMS)", rms_share * 100.0);
    }
    Ok(ExitCode::SUCCESS)
}
