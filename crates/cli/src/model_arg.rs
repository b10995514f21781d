//! The model and the engine that a command runs on.

use std::io::{IsTerminal, stderr};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Result, bail};
use mmfree::builtin;
use mmfree::checkpoint::Checkpoint;
use mmfree::engine::{Engine, EngineOptions};
use mmfree::model::Model;
use mmfree::text::chat::ChatTemplate;
use mmfree::tokenizer::Tokenizer;
use mmfree_train::backend::{CpuBackend, CudaBackend};

/// How the engine runs.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Engine")]
pub struct EngineArgs {
    /// Worker threads [default: one for each core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Where to run: auto (a GPU if one is usable, else the CPU), cuda, cpu, or one of the CPU's kernel tiers:
    /// scalar, avx2, avx512, avx512vbmi, amx, neon [default: MMFREE_BACKEND, else auto]
    #[arg(long, value_name = "NAME")]
    backend: Option<String>,
    /// Number of the GPU; implies --backend cuda [default: 0]
    #[arg(long, value_name = "N")]
    device: Option<u16>,
}

impl EngineArgs {
    /// What the library calls them.
    ///
    /// # Errors
    /// A GPU's number for a backend that is none.
    pub fn options(&self) -> Result<EngineOptions> {
        let backend = match (self.backend.as_deref(), self.device) {
            (None | Some("auto" | "cuda"), Some(device)) => Some(format!("cuda:{device}")),
            (Some(backend), Some(_)) => bail!("--device is for GPUs, but the backend is {backend}"),
            (backend, None) => backend.map(str::to_owned),
        };
        Ok(EngineOptions { threads: self.threads.map(usize::from), backend })
    }

    /// What computes models with full-precision weights: the CPU in f32 unless a GPU is asked for, which computes
    /// in bf16.
    ///
    /// # Errors
    /// A backend that cannot.
    pub fn full_precision(&self) -> Result<FullPrecisionBackend> {
        let name = self.options()?.backend.filter(|name| name != "auto" && name != "cpu");
        match name.as_deref().and_then(|name| name.strip_prefix("cuda")) {
            Some(device) => {
                let ordinal = device.strip_prefix(':').map_or(Ok(0), str::parse)?;
                Ok(FullPrecisionBackend::Cuda(Box::new(CudaBackend::new(ordinal)?)))
            }
            None => {
                let threads = self.threads.map(usize::from);
                Ok(FullPrecisionBackend::Cpu(Box::new(CpuBackend::new(threads, name.as_deref())?)))
            }
        }
    }
}

/// Backends of models with full-precision weights.
pub enum FullPrecisionBackend {
    Cpu(Box<CpuBackend>),
    Cuda(Box<CudaBackend>),
}

/// A model that is ready to run.
pub struct Loaded {
    /// Engine and weights.
    pub engine: Engine,
    /// The model's tokenizer, if it has one.
    pub tokenizer: Option<Tokenizer>,
    /// The model's chat template, or the plain transcript.
    pub template: ChatTemplate,
}

/// Opens a checkpoint: a Hugging Face directory, a GGUF file or a Hugging Face repository id; the
/// built-in model if none is named.
pub fn open(model: Option<&Path>) -> Result<Checkpoint> {
    Ok(match model {
        Some(model) => Checkpoint::open(model)?,
        None => builtin::checkpoint()?,
    })
}

/// Loads a checkpoint and builds its engine. The tokenizer comes first: it fails fastest.
pub fn load(checkpoint: &Checkpoint, args: &EngineArgs) -> Result<Loaded> {
    let source = checkpoint.tokenizer()?;
    let tokenizer = source.as_ref().map(Tokenizer::from_source).transpose()?;
    let template = source.as_ref().map(ChatTemplate::from_source).transpose()?;
    let options = args.options()?;
    let model = Model::load_in(checkpoint, options.layout()?)?;
    let engine = Engine::new(Arc::new(model), &options)?;
    if stderr().is_terminal() {
        eprintln!("{}", engine.describe());
    }
    Ok(Loaded { engine, tokenizer, template: template.unwrap_or_else(ChatTemplate::plain) })
}

/// Whether a path names a model that is there: a GGUF file, or a directory with a configuration.
pub fn is_model(path: &Path) -> bool {
    let is_gguf = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"));
    is_gguf && path.is_file() || path.join("config.json").is_file()
}
