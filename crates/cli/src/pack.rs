//! `mmfree pack`: writes a packed model.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail, ensure};
use clap::ValueEnum;
use mmfree::checkpoint::{
    Checkpoint, EmbeddingStorage, FloatType, FullPrecision, PackOptions, pack, pack_transformer,
};
use mmfree_kernels::ternary::tq::TqFormat;

use crate::progress::Progress;

/// Write a model as one small file
///
/// Reads a Hugging Face directory (or a packed file, to change its format), quantises the weights to
/// -1, 0 and 1, and writes one GGUF file with configuration and tokenizer inside. It computes bit for
/// bit what its source computes. A Transformer++ (model_type llama) keeps weights in floating point.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Hugging Face directory, GGUF file, or Hugging Face repository id
    model: PathBuf,
    /// File to write; with `--format safetensors` the directory to write
    #[arg(short, long, value_name = "PATH")]
    output: PathBuf,
    /// How weights are stored [default: tq2_0; of a Transformer++ as in the source]
    #[arg(long, value_enum)]
    format: Option<Format>,
    /// How embeddings are stored; anything but `source` changes what the model computes
    #[arg(long, value_enum, default_value_t = Embeddings::Source)]
    embeddings: Embeddings,
    /// Name of the model in the file [default: name of the source]
    #[arg(long)]
    name: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    /// 2.06 bits a weight, loads fastest
    #[value(name = "tq2_0")]
    Tq2_0,
    /// 1.69 bits a weight
    #[value(name = "tq1_0")]
    Tq1_0,
    /// The Hugging Face directory itself, unchanged
    Safetensors,
    /// IEEE single, of a Transformer++
    F32,
    /// IEEE half, of a Transformer++
    F16,
    /// The upper half of an IEEE single, of a Transformer++
    Bf16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Embeddings {
    /// As the source stores them
    Source,
    /// IEEE half
    F16,
    /// The upper half of an IEEE single
    Bf16,
    /// IEEE single
    F32,
}

/// Packs.
pub fn run(args: &Args) -> Result<ExitCode> {
    if FullPrecision::is_transformer(&args.model) && args.format != Some(Format::Safetensors) {
        return transformer(args);
    }
    let checkpoint = Checkpoint::open(&args.model)?;
    let format = match args.format.unwrap_or(Format::Tq2_0) {
        Format::F32 | Format::F16 | Format::Bf16 => bail!(
            "--format f32, f16 and bf16 are for a Transformer++ (model_type llama): {} is a MatMul-free model, \
             whose weights are packed as tq2_0 or tq1_0",
            args.model.display()
        ),
        Format::Tq1_0 => TqFormat::Tq1_0,
        Format::Tq2_0 => TqFormat::Tq2_0,
        Format::Safetensors => {
            ensure!(
                args.embeddings == Embeddings::Source && args.name.is_none(),
                "--embeddings and --name do not go with --format safetensors, which writes the \
                 source unchanged"
            );
            checkpoint.write_hugging_face(&args.output)?;
            return Ok(ExitCode::SUCCESS);
        }
    };
    let embeddings = match args.embeddings {
        Embeddings::Source => EmbeddingStorage::Source,
        Embeddings::F16 => EmbeddingStorage::As(FloatType::F16),
        Embeddings::Bf16 => EmbeddingStorage::As(FloatType::Bf16),
        Embeddings::F32 => EmbeddingStorage::As(FloatType::F32),
    };
    let options = PackOptions { format, embeddings, name: args.name.clone() };
    let progress = Progress::new("packing");
    pack(&checkpoint, &args.output, &options, &mut |done, total| progress.set(done, total))?;
    Ok(ExitCode::SUCCESS)
}

fn transformer(args: &Args) -> Result<ExitCode> {
    let float = match args.format {
        None => None,
        Some(Format::F32) => Some(FloatType::F32),
        Some(Format::F16) => Some(FloatType::F16),
        Some(Format::Bf16) => Some(FloatType::Bf16),
        Some(Format::Tq2_0 | Format::Tq1_0 | Format::Safetensors) => bail!(
            "{} is a Transformer++, whose weights are not ternary: --format f32, f16 or bf16",
            args.model.display()
        ),
    };
    ensure!(
        args.embeddings == Embeddings::Source,
        "--embeddings is for MatMul-free models; --format holds for all matrices of a Transformer++"
    );
    let progress = Progress::new("packing");
    let mut report = |done, total| progress.set(done, total);
    pack_transformer(&args.model, &args.output, float, args.name.as_deref(), &mut report)?;
    Ok(ExitCode::SUCCESS)
}
