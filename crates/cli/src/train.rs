//! `mmfree train`: trains a model.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};
use mmfree_train::backend::{Backend, CpuBackend};
use mmfree_train::communicator::Launch;
use mmfree_train::config::{Override, TrainConfig};
use mmfree_train::error::Error;
use mmfree_train::log::Record;
use mmfree_train::trainer::{Corpus, Observer, Outcome, PrepareObserver, Start, Trainer, prepare};

use crate::interrupt::StopSignals;
use crate::processes::{self, Joined, Processes};
use crate::progress::Progress;

/// Train a model from text
///
/// Everything about a run is in one TOML file; configs/ has examples with every key. Texts are tokenised at
/// first use. A run stopped by Ctrl-C, SIGTERM or SIGUSR1 saves a checkpoint and goes on with `--resume`.
/// The trained model is the Hugging Face directory DIRECTORY/model of the run.
///
/// Several processes train together when a launcher starts them: torchrun, srun, mpirun, or anything that
/// sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. On GPUs each takes the one of its number on its machine
/// (LOCAL_RANK), and they exchange gradients by NCCL.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// TOML file
    config: PathBuf,
    /// Set a key of the configuration, for example `--set run.steps=500`; may be repeated
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    set: Vec<Override>,
    /// Go on from the newest checkpoint of the run, or begin if there is none
    #[arg(long)]
    resume: bool,
    /// With --resume: go on although the configuration differs from the checkpoint's
    #[arg(long, requires = "resume")]
    allow_changes: bool,
    /// Print the configuration with every default written out, and do nothing else
    #[arg(long)]
    print_config: bool,
    /// What computes: cuda (an NVIDIA GPU), or the CPU with its fastest kernels (auto, cpu) or those of a tier: scalar,
    /// avx2, avx512, avx512vbmi, amx or neon [default: auto]
    #[arg(long)]
    backend: Option<String>,
    /// Number of the GPU, of the first of several processes on a machine; implies --backend cuda [default: 0]
    #[arg(long, value_name = "N")]
    device: Option<u16>,
}

/// Trains.
pub fn run(args: &Args) -> Result<ExitCode> {
    let config = TrainConfig::load(&args.config, &args.set)?;
    if args.print_config {
        print!("{}", config.to_toml());
        return Ok(ExitCode::SUCCESS);
    }
    let signals = StopSignals::catch()?;
    let launch = Launch::from_environment()?;
    let gpu = gpu(args)?;
    let processes = processes::join(&launch)?;
    let result = match gpu {
        Some(first) => train(args, config, processes, &signals, &|_, processes| {
            processes::gpu(first, &launch, processes)
        }),
        None => train(args, config, processes, &signals, &|config, processes| {
            let threads = match config.run.threads {
                0 => {
                    let local = launch.local_world_size.filter(|&count| count > 1);
                    local.map(|count| (cores() / count).max(1))
                }
                given => Some(given),
            };
            Ok((CpuBackend::new(threads, args.backend.as_deref())?, processes))
        }),
    };
    match result {
        Err(Error::Model(mmfree::error::Error::Cancelled)) => Ok(signals.code_or_default()),
        Err(error) if launch.world_size > 1 => {
            let process = format!("process {} of {}", launch.rank, launch.world_size);
            Err(anyhow::Error::from(error).context(process))
        }
        result => Ok(result?),
    }
}

/// The number of the GPU, if one is asked for.
fn gpu(args: &Args) -> Result<Option<usize>> {
    match (args.backend.as_deref(), args.device) {
        (Some("cuda"), device) => Ok(Some(device.map_or(0, usize::from))),
        (None | Some("auto"), Some(device)) => Ok(Some(usize::from(device))),
        (_, None) => Ok(None),
        (Some(backend), Some(_)) => {
            anyhow::bail!("--device is for GPUs, but the backend is {backend}")
        }
    }
}

fn train<B: Backend + 'static>(
    args: &Args,
    config: TrainConfig,
    mut processes: Processes,
    signals: &StopSignals,
    begin: &dyn Fn(&TrainConfig, Processes) -> mmfree_train::error::Result<Joined<B>>,
) -> mmfree_train::error::Result<ExitCode> {
    let leads = processes.rank() == 0;
    // One process makes the shards; the others find them.
    if leads {
        prepare(&config, signals.flag(), &mut Preparing(Some(Progress::new("reading text"))))?;
    }
    processes.barrier()?;
    let prepared = prepare(&config, signals.flag(), &mut Preparing(None))?;
    let corpus = Corpus::open(&config, &prepared.train, &prepared.validation)?;
    let (backend, communicator) = begin(&config, processes)?;
    let start = Start { resume: args.resume, allow_changes: args.allow_changes };
    let mut display = Display::new(config.run.steps);
    let mut trainer = Trainer::new(config, corpus, backend, communicator, start, &mut display)?;
    display.begin(trainer.steps_done());
    let outcome = trainer.run(signals.flag(), &mut display)?;
    display.finish();
    trainer.finish()?;
    Ok(match outcome {
        // Perhaps another process got the signal.
        Outcome::Stopped => signals.code_or_default(),
        Outcome::Finished => ExitCode::SUCCESS,
    })
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// Shows on stderr how texts become token shards.
struct Preparing(Option<Progress>);

impl PrepareObserver for Preparing {
    fn note(&mut self, message: &str) {
        if self.0.is_some() {
            eprintln!("{message}");
        }
    }

    fn progress(&mut self, done: u64, total: u64) {
        if let Some(bar) = &self.0 {
            bar.set(done, total);
        }
    }
}

/// Shows a run on stderr: a bar on a terminal, now and then a line elsewhere.
struct Display {
    bar: ProgressBar,
    steps: u64,
    is_terminal: bool,
    last_line: Option<Instant>,
    validation_loss: Option<f64>,
}

/// Time between lines where there is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

impl Display {
    fn new(steps: u64) -> Self {
        let is_terminal = std::io::stderr().is_terminal();
        Self {
            bar: ProgressBar::hidden(),
            steps,
            is_terminal,
            last_line: None,
            validation_loss: None,
        }
    }

    /// Shows the bar, after the header.
    fn begin(&mut self, step: u64) {
        if self.is_terminal {
            let style = ProgressStyle::with_template(
                "step {pos}/{len} {wide_bar} {msg} · {eta_precise} left",
            );
            self.bar = ProgressBar::new(self.steps)
                .with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            self.bar.set_position(step);
            self.bar.reset_eta();
        }
    }

    fn finish(&self) {
        self.bar.finish_and_clear();
    }

    fn line(&self, line: &str) {
        self.bar.suspend(|| eprintln!("{line}"));
    }
}

impl Observer for Display {
    fn note(&mut self, message: &str) {
        self.line(message);
    }

    fn step(&mut self, record: &Record) {
        let mut parts = Vec::new();
        parts.extend(record.loss.map(|loss| format!("loss {loss:.4}")));
        if record.validation_loss.is_some() {
            self.validation_loss = record.validation_loss;
        }
        parts.extend(self.validation_loss.map(|loss| format!("validation {loss:.4}")));
        parts.extend(record.tokens_per_second.map(|speed| format!("{speed:.0} tokens/s")));
        parts.extend(
            record.memory_bytes.map(|bytes| format!("{:.2} GiB", bytes as f64 / 1073741824.0)),
        );
        let message = parts.join(" · ");
        let due = self.last_line.is_none_or(|last| last.elapsed() > LINE_INTERVAL);
        if record.validation_loss.is_some() || (!self.is_terminal && due) {
            self.line(&format!("step {}/{}: {message}", record.step, self.steps));
            self.last_line = Some(Instant::now());
        }
        self.bar.set_message(message);
        self.bar.set_position(record.step);
    }

    fn saved(&mut self, step: u64, path: &Path) {
        if step == self.steps {
            self.line(&format!("the trained model: {}", model_of(path).display()));
        } else {
            self.line(&format!("checkpoint: {}", path.display()));
        }
    }
}

/// The link to the newest checkpoint, in the run's directory.
fn model_of(checkpoint: &Path) -> PathBuf {
    let run = checkpoint.parent().and_then(Path::parent).unwrap_or(checkpoint);
    run.join("model")
}
