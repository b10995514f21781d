//! `mmfree tokenizer`: trains tokenizers.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Subcommand;
use mmfree_train::data::{TokenizerTraining, train_tokenizer};

use crate::interrupt;
use crate::progress::Progress;
use crate::streamed_text::line;

/// Train a tokenizer
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Train(TrainArgs),
}

/// Make a byte-level BPE tokenizer from text
///
/// Reads what `mmfree tokenize` reads and writes a directory with tokenizer.json, tokenizer_config.json and
/// special_tokens_map.json, which `mmfree tokenize --tokenizer` and a checkpoint take, and training.json, which
/// says what it was trained on. The same text gives the same tokenizer.
///
///   mmfree tokenizer train books/ -o my-tokenizer --vocab-size 8192
#[derive(Debug, clap::Args)]
#[command(verbatim_doc_comment)]
struct TrainArgs {
    /// Files of text, and directories that are searched for them
    #[arg(required = true)]
    inputs: Vec<PathBuf>,
    /// Directory to write
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// Tokens of the vocabulary: special ones, 256 bytes, and merges
    #[arg(long, value_name = "N", default_value_t = 8192)]
    vocab_size: usize,
    /// Pairs that occur less often are not merged
    #[arg(long, value_name = "N", default_value_t = 2)]
    min_frequency: u64,
    /// Token of what is unknown; checkpoints have one by custom, a byte-level tokenizer never makes it
    #[arg(long, value_name = "TEXT", default_value = "<unk>")]
    unk_token: String,
    /// Token before a text
    #[arg(long, value_name = "TEXT", default_value = "<s>")]
    bos_token: String,
    /// Token after a document
    #[arg(long, value_name = "TEXT", default_value = "</s>")]
    eos_token: String,
    /// Further special token, as in "<|user|>"; may be repeated
    #[arg(long, value_name = "TEXT")]
    special_token: Vec<String>,
    /// JSON field or parquet column that holds the text
    #[arg(long, value_name = "NAME", default_value = "text")]
    field: String,
    /// Line that stands between two documents of a .txt file
    #[arg(long, value_name = "LINE")]
    document_separator: Option<String>,
    /// Threads that count words [default: one for each core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
}

/// Does what a subcommand says.
pub fn run(args: &Args) -> Result<ExitCode> {
    let Command::Train(args) = &args.command;
    let mut options =
        TokenizerTraining::new(args.inputs.clone(), args.output.clone(), args.vocab_size);
    options.min_frequency = args.min_frequency;
    options.unk_token.clone_from(&args.unk_token);
    options.bos_token.clone_from(&args.bos_token);
    options.eos_token.clone_from(&args.eos_token);
    options.special_tokens.clone_from(&args.special_token);
    options.field.clone_from(&args.field);
    options.separator.clone_from(&args.document_separator);
    options.threads = args.threads.map_or(options.threads, usize::from);

    let cancel = interrupt::catch()?;
    let progress = Progress::new("counting words");
    let trained = train_tokenizer(&options, cancel, &mut |done, total| progress.set(done, total))?;
    drop(progress);
    line!(
        "{} tokens from {} bytes of text with {} different words",
        trained.vocab_size,
        trained.text_bytes,
        trained.words
    );
    if trained.vocab_size < args.vocab_size {
        eprintln!(
            "the text has too few frequent pairs for {} tokens: give more text, or lower --min-frequency",
            args.vocab_size
        );
    }
    if trained.forgot_words {
        eprintln!("there were so many different words that the rarest were not counted");
    }
    Ok(ExitCode::SUCCESS)
}
