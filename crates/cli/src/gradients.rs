//! `mmfree gradients`: the gradients that training would use, for other programs.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, ensure};
use mmfree::checkpoint::FloatType;
use mmfree::checkpoint::safetensors::{self, TensorData};
use mmfree::output::OutputFile;
use mmfree_train::backend::{Backend, BatchShape, CpuBackend, CudaBackend};
use mmfree_train::model::{Batch, Model, ModelOptions};
use mmfree_train::weights;

use crate::interrupt;
use crate::streamed_text::line;
use crate::token_ids;

/// Write the gradients of the mean next-token cross-entropy to a safetensors file
///
/// The file has `loss` `[1]` f32 and, under the checkpoint's own tensor names, the gradient f32 of every
/// parameter. Each token but the last of a sequence predicts the next; the loss is the mean over all of
/// them. Ternary layers pass gradients straight through their quantisers, as in training.
///
///   mmfree gradients CHECKPOINT --token-ids-file ids.json -o gradients.safetensors
#[derive(Debug, clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Args {
    /// Hugging Face directory with full-precision weights (model_type hgrn_bit or llama)
    directory: PathBuf,
    /// JSON file with a list of lists of token ids, all of one length
    #[arg(long, value_name = "FILE")]
    token_ids_file: PathBuf,
    /// File to write
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Device that computes
    #[arg(long, value_enum, default_value_t = Device::Cpu)]
    backend: Device,
    /// Number of the GPU
    #[arg(long, value_name = "N", default_value_t = 0)]
    device: u16,
    /// Threads of the CPU [default: one for each core]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Sequences that are computed together; gradients of the parts are added up [default: all]
    #[arg(long, value_name = "N")]
    micro_batch: Option<usize>,
    /// Keep only each block's input and compute the rest again for the backward pass: less memory
    #[arg(long)]
    recompute: bool,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Device {
    Cpu,
    Cuda,
}

/// Computes and writes.
pub fn run(args: &Args) -> Result<ExitCode> {
    match args.backend {
        Device::Cpu => write(args, &mut CpuBackend::new(args.threads, None)?),
        Device::Cuda => write(args, &mut CudaBackend::new(usize::from(args.device))?),
    }
}

fn write<B: Backend + 'static>(args: &Args, backend: &mut B) -> Result<ExitCode> {
    let sequences = token_ids::read_file(&args.token_ids_file)?;
    let length = token_ids::sequence_length(&sequences)?;
    ensure!(
        length >= 2,
        "sequences have one token; the loss needs a token and the one that follows it"
    );
    let micro_batch = args.micro_batch.unwrap_or(sequences.len()).min(sequences.len());
    ensure!(
        micro_batch > 0 && sequences.len().is_multiple_of(micro_batch),
        "--micro-batch {micro_batch} does not divide the {} sequences",
        sequences.len()
    );
    let (architecture, parameters) = weights::load(&args.directory)?;
    for ids in &sequences {
        token_ids::check(ids, architecture.vocab_size())?;
    }
    let mut file = OutputFile::create(&args.output)?;
    let cancel = interrupt::catch()?;

    let shape = BatchShape { sequences: micro_batch, length: length - 1 };
    let options = ModelOptions {
        recompute: args.recompute,
        head_chunk: backend.head_chunk(),
        ..ModelOptions::default()
    };
    let mut model = Model::new(backend, &architecture, shape, &options)?;
    let flat = backend.flat_from(&parameters)?;
    let mut gradients = backend.flat_zeros(parameters.len())?;
    model.update_weights(backend, &flat)?;
    let scale = micro_batch as f32 / sequences.len() as f32;
    for part in sequences.chunks(micro_batch) {
        interrupt::check(cancel)?;
        let ids: Vec<u32> = part.iter().flat_map(|ids| &ids[..length - 1]).copied().collect();
        let targets: Vec<u32> = part.iter().flat_map(|ids| &ids[1..]).copied().collect();
        let batch = Batch { ids: &ids, targets: &targets };
        model.accumulate(backend, &flat, batch, scale, &mut gradients)?;
    }
    let loss = model.take_loss(backend)?;
    let mut values = parameters;
    backend.read_flat(&gradients, 0, &mut values)?;
    ensure!(
        loss.is_finite() && values.iter().all(|value| value.is_finite()),
        "the loss or a gradient is not finite; the weights are damaged or diverged"
    );

    let loss = [loss as f32];
    let mut tensors = vec![TensorData { name: "loss", shape: &[1], values: &loss }];
    let layout = architecture.layout();
    tensors.extend(weights::tensors(&layout, &values));
    safetensors::write(&mut file, &tensors, FloatType::F32).map_err(|reason| {
        mmfree::error::Error::Write { file: args.output.display().to_string(), reason }
    })?;
    file.commit()?;
    line!("loss {}", loss[0]);
    Ok(ExitCode::SUCCESS)
}
