//! `mmfree generate`: continues a text.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, ensure};
use mmfree::output::OutputFile;
use mmfree::state::State;
use mmfree::text::generate::{Event, FinishReason, GenerateOptions, generate};
use serde_json::json;

use crate::model_arg::{self, EngineArgs};
use crate::prompt::{Prompt, split_positionals};
use crate::sampling_args::SamplingArgs;
use crate::token_ids::TokenIds;
use crate::{interrupt, state_file, streamed_text};

/// Continue a text
///
/// Prints what the model writes after the prompt, as it is written. Ctrl-C stops it; what was printed
/// stays.
///
///   mmfree generate "Once upon a time"
///   mmfree generate model.gguf "Once upon a time" --greedy --max-tokens 50
///   mmfree generate model.gguf --prompt-file book.txt --save-state book.state
///   mmfree generate model.gguf "What happened?" --load-state book.state
///   mmfree generate model.gguf --token-ids 1,5,9 --greedy --print-ids
#[derive(Debug, clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Args {
    /// Hugging Face directory, GGUF file, or Hugging Face repository id [default: the built-in model]
    ///
    /// A single argument is the MODEL if the prompt is given by an option, or if it names a GGUF file or
    /// a directory with a config.json that is there. Otherwise it is the PROMPT.
    #[arg(value_name = "MODEL")]
    first: Option<String>,
    /// Text to continue; an empty one is the model's BOS token
    #[arg(value_name = "PROMPT")]
    second: Option<String>,

    /// Text to continue
    #[arg(long, value_name = "TEXT", group = "prompt_option", help_heading = "Prompt")]
    prompt: Option<String>,
    /// File with the text to continue, of any length; - is standard input
    #[arg(long, value_name = "FILE", group = "prompt_option", help_heading = "Prompt")]
    prompt_file: Option<PathBuf>,
    /// Token ids to continue, as in 1,5,9; nothing is put before them
    #[arg(long, value_name = "IDS", group = "prompt_option", help_heading = "Prompt")]
    token_ids: Option<TokenIds>,
    /// Start from a state that --save-state wrote, as if the prompt followed what it has read
    #[arg(long, value_name = "FILE", help_heading = "Prompt")]
    load_state: Option<PathBuf>,

    /// End after so many tokens
    #[arg(long, value_name = "N", default_value_t = 256, help_heading = "End")]
    max_tokens: u64,
    /// End before this text; may be repeated
    #[arg(long, value_name = "TEXT", help_heading = "End")]
    stop: Vec<String>,
    /// Go on after the model has ended its text
    #[arg(long, help_heading = "End")]
    ignore_eos: bool,

    /// Print the prompt, too, if it is text on the command line
    #[arg(long, help_heading = "Output", conflicts_with_all = ["print_ids", "json"])]
    echo: bool,
    /// Print the ids of the generated tokens (not of the prompt) instead of text, as in 7,12,2
    ///
    /// One line; with the end-of-text token that ended the text. Works for models without tokenizer.
    #[arg(long, help_heading = "Output", conflicts_with = "json")]
    print_ids: bool,
    /// Print one JSON object at the end: text, ids, finish_reason, counts, times and seed
    #[arg(long, help_heading = "Output")]
    json: bool,
    /// Write the state after prompt and generated text, to go on from later
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    save_state: Option<PathBuf>,

    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    engine: EngineArgs,
}

/// Generates.
pub fn run(args: &Args) -> Result<ExitCode> {
    let sampling = args.sampling.params()?;
    let seed = sampling.seed;
    let options = GenerateOptions {
        max_tokens: Some(args.max_tokens),
        stop: args.stop.clone(),
        ignore_eos: args.ignore_eos,
        sampling,
    };
    let (model, prompt) = prompt(args)?;
    let echo = match &prompt {
        Prompt::Text(text) if args.echo => text.clone(),
        _ => String::new(),
    };

    let checkpoint = model_arg::open(model.as_deref())?;
    let mut loaded = model_arg::load(&checkpoint, &args.engine)?;
    let tokenizer = loaded.tokenizer.as_ref();
    ensure!(
        tokenizer.is_some() || args.print_ids || args.json,
        "this model has no tokenizer, so it has no text to print: use --print-ids"
    );
    let model = loaded.engine.model().clone();
    let mut state = match &args.load_state {
        Some(path) => state_file::load(&model, path)?,
        None => State::new(&model),
    };
    let is_start = state.tokens_seen() == 0;
    // Begun before the work that it is to keep: a name that cannot be written fails now.
    let state_file = args.save_state.as_deref().map(OutputFile::create).transpose()?;
    let ids = prompt.into_ids(tokenizer, model.config(), is_start)?;

    let cancel = interrupt::catch()?;
    let mut output = Output::new(args, echo)?;
    let generation =
        generate(&mut loaded.engine, &mut state, tokenizer, ids, &options, cancel, &mut |event| {
            output.event(event)
        })?;
    output.finish(&generation, seed)?;
    let is_cancelled = generation.finish == FinishReason::Cancelled;
    if let Some(file) = state_file {
        ensure!(
            !is_cancelled || generation.generated_tokens > 0,
            "interrupted while reading the prompt: the state is not saved"
        );
        state_file::save(&model, &state, file)?;
    }
    Ok(if is_cancelled { interrupt::EXIT_CODE.into() } else { ExitCode::SUCCESS })
}

/// The model and the prompt that the arguments name.
fn prompt(args: &Args) -> Result<(Option<PathBuf>, Prompt)> {
    let has_option =
        args.prompt.is_some() || args.prompt_file.is_some() || args.token_ids.is_some();
    let (model, text) =
        split_positionals(args.first.as_deref(), args.second.as_deref(), has_option)?;
    let prompt = match (&args.prompt_file, &args.token_ids) {
        (Some(path), _) => Prompt::open(path)?,
        (None, Some(TokenIds(ids))) => Prompt::Ids(ids.clone()),
        (None, None) => Prompt::Text(args.prompt.clone().or(text).unwrap_or_default()),
    };
    Ok((model, prompt))
}

/// What is printed while tokens come, and at the end.
struct Output {
    kind: OutputKind,
    start: Instant,
    prompt_read: Option<Instant>,
    has_printed: bool,
    ends_line: bool,
}

enum OutputKind {
    Text,
    Ids,
    Json { text: String, ids: Vec<u32> },
}

impl Output {
    fn new(args: &Args, echo: String) -> mmfree::error::Result<Self> {
        let kind = match (args.json, args.print_ids) {
            (true, _) => OutputKind::Json { text: String::new(), ids: Vec::new() },
            (false, true) => OutputKind::Ids,
            (false, false) => OutputKind::Text,
        };
        let start = Instant::now();
        let mut output =
            Self { kind, start, prompt_read: None, has_printed: false, ends_line: false };
        output.print(&echo)?;
        Ok(output)
    }

    fn event(&mut self, event: Event) -> mmfree::error::Result<()> {
        match (&mut self.kind, event) {
            (_, Event::Prompt(_)) => self.prompt_read = Some(Instant::now()),
            (OutputKind::Text, Event::Text(text)) => return self.print(text),
            (OutputKind::Ids, Event::Token(id)) => {
                let comma = if self.has_printed { "," } else { "" };
                return self.print(&format!("{comma}{id}"));
            }
            (OutputKind::Json { text, .. }, Event::Text(new)) => text.push_str(new),
            (OutputKind::Json { ids, .. }, Event::Token(id)) => ids.push(id),
            _ => {}
        }
        Ok(())
    }

    fn finish(
        &mut self,
        generation: &mmfree::text::generate::Generation,
        seed: u64,
    ) -> mmfree::error::Result<()> {
        if let OutputKind::Json { text, ids } = &mut self.kind {
            let read = self.prompt_read.unwrap_or(self.start);
            let object = json!({
                "text": std::mem::take(text),
                "ids": std::mem::take(ids),
                "finish_reason": generation.finish.name(),
                "prompt_tokens": generation.prompt_tokens,
                "generated_tokens": generation.generated_tokens,
                "prompt_seconds": (read - self.start).as_secs_f64(),
                "generation_seconds": read.elapsed().as_secs_f64(),
                "seed": seed,
            });
            return self.print(&format!("{object}\n"));
        }
        if self.ends_line { Ok(()) } else { self.print("\n") }
    }

    fn print(&mut self, text: &str) -> mmfree::error::Result<()> {
        if text.is_empty() {
            return Ok(());
        }
        self.has_printed = true;
        self.ends_line = text.ends_with('\n');
        streamed_text::print(text)
    }
}
