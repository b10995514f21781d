//! `mmfree tokenize`: text to token shards.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use clap::ValueEnum;
use mmfree::builtin;
use mmfree::checkpoint::TokenizerSource;
use mmfree::error::Error;
use mmfree_train::data::tokenize::{Event, OnError, TokenizeOptions, tokenize};
use mmfree_train::data::{Dataset, PartOf};

use crate::interrupt;
use crate::progress::Progress;
use crate::streamed_text::line;

/// Broken documents that are reported one by one; the rest are counted.
const REPORTED: u64 = 20;

/// Turn text into token shards for training
///
/// Reads .txt, .jsonl, .jsonl.zst and .parquet files, and directories of them, and writes a directory of
/// memory-mapped token shards with a manifest and a copy of the tokenizer. Documents are kept apart by the
/// tokenizer's BOS and EOS tokens.
///
/// What was interrupted, by Ctrl-C, a kill or an error, goes on where it was when the same command is run again,
/// and ends in the same bytes.
///
///   mmfree tokenize books/ -o shards
///   mmfree tokenize corpus.jsonl.zst -o shards --tokenizer my-tokenizer
///   mmfree tokenize corpus/ -o shards --shard 3/16     # one of 16 jobs, all with the same DIR
///   mmfree tokenize --verify shards
#[derive(Debug, clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Args {
    /// Files of text, and directories that are searched for them
    #[arg(required_unless_present = "verify")]
    inputs: Vec<PathBuf>,
    /// Directory to write
    #[arg(short, long, value_name = "DIR", required_unless_present = "verify")]
    output: Option<PathBuf>,
    /// Tokenizer: tokenizer.json, SentencePiece model, a directory or a packed model that has one [default:
    /// that of the built-in model]
    #[arg(long, value_name = "PATH")]
    tokenizer: Option<PathBuf>,
    /// JSON field or parquet column that holds the text
    #[arg(long, value_name = "NAME", default_value = "text")]
    field: String,
    /// Line that stands between two documents of a .txt file, as in "<|endoftext|>" [default: a file is one
    /// document]
    #[arg(long, value_name = "LINE")]
    document_separator: Option<String>,
    /// Token that ends a document [default: the tokenizer's EOS token]
    #[arg(long, value_name = "TOKEN")]
    eos_token: Option<String>,
    /// Take part I of N of the corpus, I from 1 to N; 0 stands for N, so counting from 0 works, too
    #[arg(long, value_name = "I/N", value_parser = part)]
    shard: Option<PartOf>,
    /// A shard ends with the first document that reaches so many tokens
    #[arg(long, value_name = "N", default_value_t = 100_000_000, value_parser = clap::value_parser!(u64).range(1..))]
    shard_tokens: u64,
    /// Threads that encode [default: one for each core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// What to do about a line, row or file that is broken
    #[arg(long, value_enum, default_value_t = Policy::Stop)]
    on_error: Policy,
    /// Time between two records of how far the work has come, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 5.0)]
    sync_seconds: f64,
    /// Print the counts as JSON
    #[arg(long)]
    json: bool,
    /// Read every token of these directories again and compare all checksums
    #[arg(long, value_name = "DIR", num_args = 1.., conflicts_with_all = ["inputs", "output"])]
    verify: Option<Vec<PathBuf>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Policy {
    /// Stop; go on when it is mended and the command is run again
    Stop,
    /// Leave it out, report it and count it
    Skip,
}

/// Tokenises.
pub fn run(args: &Args) -> Result<ExitCode> {
    if let Some(directories) = &args.verify {
        return verify(directories, args.json);
    }
    let Some(output) = &args.output else { bail!("--output is missing") };
    ensure!(
        (0.0..=86_400.0).contains(&args.sync_seconds),
        "--sync-seconds {}: expected 0 to 86400",
        args.sync_seconds
    );
    let tokenizer = open_tokenizer(args.tokenizer.as_deref())?;
    let mut options = TokenizeOptions::new(args.inputs.clone(), output.clone(), tokenizer);
    options.field.clone_from(&args.field);
    options.separator.clone_from(&args.document_separator);
    options.eos_token.clone_from(&args.eos_token);
    options.part = args.shard.unwrap_or(PartOf::WHOLE);
    options.shard_tokens = args.shard_tokens;
    options.threads = args.threads.map_or(options.threads, usize::from);
    options.on_error = match args.on_error {
        Policy::Stop => OnError::Stop,
        Policy::Skip => OnError::Skip,
    };
    options.sync_interval = Duration::from_secs_f64(args.sync_seconds);

    let cancel = interrupt::catch()?;
    let progress = Progress::new("tokenising");
    let mut skipped = 0;
    let done = tokenize(&options, cancel, &mut |event| match event {
        Event::Progress { read_bytes, total_bytes, .. } => progress.set(read_bytes, total_bytes),
        Event::Resumed(documents) => {
            eprintln!("going on after {documents} documents that an earlier call has done");
        }
        Event::AlreadyDone => eprintln!("{} is complete already", output.display()),
        Event::Changed(file) => eprintln!(
            "note: {file} was changed after its tokens were made; if its text is another now, choose another \
             directory"
        ),
        Event::Skipped(error) => {
            skipped += 1;
            if skipped <= REPORTED {
                eprintln!("skipped: {error}");
            }
        }
    });
    drop(progress);
    if skipped > REPORTED {
        eprintln!("skipped: {} more", skipped - REPORTED);
    }
    let manifest = match done {
        Err(Error::Cancelled) => {
            eprintln!("interrupted; run the same command again to go on");
            return Ok(interrupt::EXIT_CODE.into());
        }
        Err(Error::Write { file, reason }) if reason.kind() == ErrorKind::StorageFull => bail!(
            "cannot write {file}: {reason}; what is done is kept: make room and run the same command again \
             to go on"
        ),
        done => done?,
    };
    if args.json {
        line!("{}", String::from_utf8_lossy(&manifest.to_json()).trim_end());
    } else {
        line!(
            "{} tokens of {} documents ({} bytes of text) in {} shards{}{}",
            manifest.tokens,
            manifest.documents,
            manifest.text_bytes,
            manifest.shards.len(),
            counted(
                manifest.empty_documents,
                "empty document left out",
                "empty documents left out"
            ),
            counted(manifest.skipped, "broken one left out", "broken ones left out"),
        );
    }
    Ok(ExitCode::SUCCESS)
}

/// `; N things`, or nothing if there are none.
fn counted(count: u64, one: &str, many: &str) -> String {
    match count {
        0 => String::new(),
        1 => format!("; 1 {one}"),
        _ => format!("; {count} {many}"),
    }
}

fn verify(directories: &[PathBuf], as_json: bool) -> Result<ExitCode> {
    let dataset = Dataset::open(directories)?;
    let progress = Progress::new("verifying");
    dataset.verify(&mut |done, total| progress.set(done, total))?;
    drop(progress);
    let (tokens, documents) = (dataset.tokens(), dataset.documents());
    if as_json {
        line!("{}", serde_json::json!({"tokens": tokens, "documents": documents}));
    } else {
        line!("{tokens} tokens of {documents} documents, all as they were written");
    }
    Ok(ExitCode::SUCCESS)
}

/// The tokenizer that is named, or that of the built-in model.
fn open_tokenizer(path: Option<&Path>) -> Result<TokenizerSource> {
    match path {
        Some(path) => Ok(TokenizerSource::open(path)?),
        None => match builtin::checkpoint()?.tokenizer()? {
            Some(tokenizer) => Ok(tokenizer),
            None => bail!("the built-in model has no tokenizer; name one with --tokenizer"),
        },
    }
}

/// `I/N`.
fn part(text: &str) -> Result<PartOf, String> {
    let numbers = text
        .split_once('/')
        .and_then(|(index, count)| Some((index.parse::<u32>().ok()?, count.parse::<u32>().ok()?)));
    match numbers {
        Some((index, count)) if count > 0 && index <= count => {
            Ok(PartOf { index: if index == 0 { count } else { index }, count })
        }
        _ => Err("expected I/N with I from 1 to N, as in 3/16".to_owned()),
    }
}
