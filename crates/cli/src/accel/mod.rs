//! `mmfree accel`: the accelerator, simulated.

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::{Subcommand, ValueEnum};
use mmfree::checkpoint::Checkpoint;
use mmfree::config::ModelConfig;
use mmfree_accel::compiler::Plan;
use mmfree_accel::config::{Configuration, Packing};
use mmfree_accel::image::{Image, Shape};

use crate::progress::Progress;

mod compare;
mod compile;
mod program;
mod report;
mod run;

/// A processor for MatMul-free models, simulated
///
/// Programs are compiled from a model, or written in assembly, for one of the hardware configurations:
/// tiny, ecp5, sim, d5005. The simulator computes what the hardware in hw/rtl computes, bit for bit.
///
///   mmfree accel run "Once upon a time"
///   mmfree accel compile model.gguf --config d5005 -o model.mma
///   mmfree accel run --image model.mma model.gguf "Once upon a time"
///   mmfree accel disasm model.mma
#[derive(Debug, clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Run(run::Args),
    Compare(compare::Args),
    Compile(compile::Args),
    Asm(program::AsmArgs),
    Disasm(program::DisasmArgs),
    Package(program::PackageArgs),
    Report(report::Args),
}

/// Runs the command.
pub fn run(args: &Args) -> Result<ExitCode> {
    match &args.command {
        Command::Run(args) => run::run(args),
        Command::Compare(args) => compare::run(args),
        Command::Compile(args) => compile::run(args),
        Command::Asm(args) => program::assemble(args),
        Command::Disasm(args) => program::disassemble(args),
        Command::Package(args) => program::package(args),
        Command::Report(args) => report::run(args),
    }
}

/// The hardware that a model is compiled for.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Hardware")]
pub struct HardwareArgs {
    /// Hardware configuration: tiny, ecp5, sim or d5005 [default: sim; of a report, the board's]
    #[arg(long, value_name = "NAME")]
    config: Option<String>,
    /// Cores, each with a memory channel, which share the rows of a matrix
    #[arg(long, value_name = "N")]
    cores: Option<u32>,
    /// Bytes of weights that a core takes a cycle
    #[arg(long, value_name = "N")]
    weight_bytes: Option<u32>,
    /// Elements that the row-wise unit takes a cycle
    #[arg(long, value_name = "N")]
    row_lanes: Option<u32>,
    /// Words of vector memory
    #[arg(long, value_name = "N")]
    vector_words: Option<u32>,
    /// Longest vector that a matrix is multiplied with
    #[arg(long, value_name = "N")]
    activation_bytes: Option<u32>,
    /// Beats of weights that a core's FIFO holds
    #[arg(long, value_name = "N")]
    fifo_beats: Option<u32>,
    /// Beats of weights that a core asks its memory for at a time
    #[arg(long, value_name = "N")]
    burst_beats: Option<u32>,
    /// How weights are packed
    #[arg(long, value_enum, default_value_t = PackingName::T5)]
    packing: PackingName,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum PackingName {
    /// 2 bits a weight
    T2,
    /// 1.6 bits a weight: five in a byte
    T5,
}

impl HardwareArgs {
    fn packing(&self) -> Packing {
        match self.packing {
            PackingName::T2 => Packing::T2,
            PackingName::T5 => Packing::T5,
        }
    }

    /// The preset, `sim` if none is named, with what the options change.
    fn configuration(&self) -> Result<Configuration> {
        self.configuration_or("sim")
    }

    fn configuration_or(&self, default: &str) -> Result<Configuration> {
        let name = self.config.as_deref().unwrap_or(default);
        let preset = Configuration::preset(name).with_context(|| {
            let names: Vec<_> = Configuration::preset_names().collect();
            format!("there is no configuration {name:?}; choose from {}", names.join(", "))
        })?;
        let mut configuration = Configuration {
            cores: self.cores.unwrap_or(preset.cores),
            weight_bytes: self.weight_bytes.unwrap_or(preset.weight_bytes),
            row_lanes: self.row_lanes.unwrap_or(preset.row_lanes),
            vector_words: self.vector_words.unwrap_or(preset.vector_words),
            activation_bytes: self.activation_bytes.unwrap_or(preset.activation_bytes),
            fifo_beats: self.fifo_beats.unwrap_or(preset.fifo_beats),
            burst_beats: self.burst_beats.unwrap_or(preset.burst_beats),
            name: preset.name.clone(),
        };
        if configuration != preset {
            configuration.name = "custom".to_owned();
        }
        configuration.check()?;
        Ok(configuration)
    }

    fn plan(&self, model: &ModelConfig) -> Result<Plan> {
        Ok(Plan::new(model, &self.configuration()?, self.packing())?)
    }
}

/// What messages call a model.
fn model_name<'a>(model: Option<&Path>, checkpoint: &'a Checkpoint) -> &'a str {
    match model {
        None => "the built-in model",
        Some(_) => checkpoint.label(),
    }
}

/// `1 core`, `4 cores`.
fn cores(configuration: &Configuration) -> String {
    match configuration.cores {
        1 => "1 core".to_owned(),
        cores => format!("{cores} cores"),
    }
}

/// A checkpoint's image: read from a file, or compiled. `name` is what messages call the model.
fn image(
    file: Option<&Path>,
    name: &str,
    checkpoint: &Checkpoint,
    hardware: &HardwareArgs,
) -> Result<Image> {
    let Some(file) = file else {
        let plan = hardware.plan(checkpoint.config())?;
        let progress = Progress::new("compiling");
        return Ok(plan.image(checkpoint, &mut |done, total| progress.set(done, total))?);
    };
    let image = Image::read(file)?;
    if image.shape == Shape::default() {
        bail!("{} holds no model: it was assembled from text, not compiled", file.display());
    }
    let (found, model) = (image.shape, checkpoint.config());
    let expected =
        [model.vocab_size, model.hidden_size, model.intermediate_size, model.num_hidden_layers];
    let found =
        [found.vocab_size, found.hidden_size, found.intermediate_size, found.num_hidden_layers];
    if found.map(|size| size as usize) != expected {
        bail!(
            "{} is of a model with V, D, F, L = {found:?}, but {name} has {expected:?}; name the model that it was \
             compiled from",
            file.display(),
        );
    }
    Ok(image)
}
