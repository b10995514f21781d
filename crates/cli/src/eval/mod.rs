//! `mmfree eval`: tasks as lm-evaluation-harness scores them, perplexity, and log-likelihoods of own texts.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use mmfree::eval::files::read_rows;
use mmfree::eval::harness::{DEFAULT_SEED, Options};
use mmfree::eval::request::Encoder;
use mmfree::eval::tasks::{Split, Task};
use mmfree::output::OutputFile;
use serde_json::Value;

mod judge;
mod perplexity;
mod requests;
mod tasks;

use crate::model_arg::EngineArgs;
use judge::Judge;

/// Judge a model: zero-shot and few-shot tasks, or the perplexity of texts
///
/// Tasks are read from their published files below DIR, and prompts, token boundaries and metrics are those of
/// EleutherAI's lm-evaluation-harness. MODEL is a MatMul-free model (Hugging Face directory, GGUF file) or a
/// Transformer++ (Hugging Face directory, model_type llama).
///
///   mmfree eval model.gguf --tasks arc-easy,hellaswag,lambada --data benchmarks
///   mmfree eval --tasks piqa --data benchmarks --shots 5 --limit 100 --json
///   mmfree eval model.gguf --perplexity book.txt
///   mmfree eval model.gguf --perplexity validation/ --window 2048
///   mmfree eval model.gguf --requests pairs.jsonl
///
/// Tasks: arc-easy, arc-challenge, hellaswag, openbookqa, piqa, winogrande, lambada
#[derive(Debug, clap::Args)]
#[command(verbatim_doc_comment)]
#[command(group = clap::ArgGroup::new("what").required(true).args(["tasks", "perplexity", "requests"]))]
pub struct Args {
    /// Hugging Face directory, GGUF file, or Hugging Face repository id [default: the built-in model]
    model: Option<PathBuf>,
    /// Tasks, separated by commas
    #[arg(long, value_name = "NAMES", value_delimiter = ',', requires = "data")]
    tasks: Vec<String>,
    /// Directory with the tasks' files, in directories named like the tasks or as they were published
    #[arg(long, value_name = "DIR", requires = "tasks")]
    data: Option<PathBuf>,
    /// Examples before each question
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u16).range(..=1000), requires = "tasks")]
    shots: u16,
    /// Seed with which examples are drawn
    #[arg(long, value_name = "N", default_value_t = DEFAULT_SEED, requires = "tasks")]
    seed: u32,
    /// Only the first N items of each task
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..), requires = "tasks")]
    limit: Option<u64>,
    /// Part of the data to evaluate [default: test, or validation where the answers of test are secret]
    #[arg(long, value_enum, requires = "tasks")]
    split: Option<SplitName>,
    /// Add the prompts to the JSON
    #[arg(long, requires = "tasks")]
    prompts: bool,
    /// Texts whose perplexity is measured: any text file, .jsonl, .parquet, also .zst, or directories
    #[arg(long, value_name = "FILE", num_args = 1..)]
    perplexity: Vec<PathBuf>,
    /// Tokens of the windows that a text is cut into [default: none, the state is carried on; a Transformer++:
    /// the longest text that it is made for]
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..=1 << 20), requires = "perplexity")]
    window: Option<u32>,
    /// Field of JSON lines and column of parquet that holds the text
    #[arg(long, value_name = "NAME", default_value = "text", requires = "perplexity")]
    field: String,
    /// JSON lines with "context" and "continuation" texts, or "context_ids" and "continuation_ids": prints the
    /// log-likelihood of each as a JSON line
    #[arg(long, value_name = "FILE")]
    requests: Option<PathBuf>,
    /// Print JSON, with every item of every task
    #[arg(long)]
    json: bool,
    /// Also write the JSON to a file; that of --requests only there
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    #[command(flatten)]
    engine: EngineArgs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum SplitName {
    Train,
    Validation,
    Test,
}

/// Judges.
pub fn run(args: &Args) -> Result<ExitCode> {
    // What is wrong with arguments and files shows before the model is loaded.
    let options = Options {
        shots: args.shots.into(),
        seed: args.seed,
        limit: args.limit.map(|limit| usize::try_from(limit).unwrap_or(usize::MAX)),
        split: args.split.map(|split| match split {
            SplitName::Train => Split::Train,
            SplitName::Validation => Split::Validation,
            SplitName::Test => Split::Test,
        }),
    };
    let prepared = match &args.data {
        Some(data) => {
            let tasks = args.tasks.iter().map(|name| Task::find(name));
            tasks::prepare(tasks.collect::<mmfree::error::Result<_>>()?, data, &options)?
        }
        None => Vec::new(),
    };
    let requests = args.requests.as_deref().map(read_rows).transpose()?;
    for input in &args.perplexity {
        ensure!(input.exists(), "cannot read {}: there is no such file", input.display());
    }
    let file = args.output.as_deref().map(OutputFile::create).transpose()?;

    let mut judge = Judge::load(args.model.as_deref(), &args.engine)?;
    let tokenizer = judge.tokenizer.take();
    let scorer = &mut *judge.scorer;
    let encoder = match &tokenizer {
        Some(tokenizer) => {
            Some(Encoder::new(tokenizer, scorer.vocab_size(), judge.bos, judge.eos)?)
        }
        None => None,
    };
    if let Some(requests) = requests {
        requests::run(&requests, encoder.as_ref(), scorer, file)?;
        return Ok(ExitCode::SUCCESS);
    }
    let encoder =
        encoder.context("this model has no tokenizer; put its tokenizer.json beside it")?;
    let (model, backend) = (judge.name, scorer.describe());
    let report = if args.perplexity.is_empty() {
        tasks::run(&prepared, &encoder, scorer, args.json, args.prompts)?
    } else {
        let inputs = perplexity::Inputs {
            files: &args.perplexity,
            field: &args.field,
            window: args.window.map(|window| window as usize),
        };
        perplexity::run(&inputs, &encoder, scorer, args.json)?
    };
    let report = with_header(report, &model, &backend);
    if args.json {
        print(&format!("{report}\n"))?;
    }
    if let Some(mut file) = file {
        file.put(format!("{report}\n").as_bytes())?;
        file.commit()?;
    }
    Ok(ExitCode::SUCCESS)
}

fn with_header(report: Value, model: &str, backend: &str) -> Value {
    let mut object = serde_json::Map::new();
    object.insert("model".into(), model.into());
    object.insert("backend".into(), backend.into());
    if let Value::Object(report) = report {
        object.extend(report);
    }
    Value::Object(object)
}

/// Prints; a reader that has seen enough is told by the error.
fn print(text: &str) -> Result<()> {
    Ok(crate::streamed_text::print(text)?)
}
