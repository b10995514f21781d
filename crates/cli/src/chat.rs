//! `mmfree chat`: a conversation.

use std::io::{BufRead, IsTerminal, stdin};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail};
use mmfree::error::Error;
use mmfree::output::OutputFile;
use mmfree::sampler::SamplingParams;
use mmfree::state::State;
use mmfree::text::generate::{Event, FinishReason, GenerateOptions, generate};
use mmfree::tokenizer::Tokenizer;
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;

use crate::model_arg::{self, EngineArgs, Loaded};
use crate::sampling_args::SamplingArgs;
use crate::streamed_text::print;
use crate::{interrupt, state_file};

const HELP: &str = "\
/reset        forget the conversation
/system TEXT  forget the conversation and begin with this system message
/save FILE    write what the model remembers
/load FILE    remember what a file says
/help         show this
/exit         leave (so does Ctrl-D)
A line that ends with \\ goes on in the next. Ctrl-C stops a reply.";

/// Talk with a model
///
/// The model's own chat template is used; without one, a plain transcript of `User:` and `Assistant:`.
/// What was said is kept in the model's state and never read again, so a conversation may be of any
/// length. /help lists the commands. Lines may also come from a file or a pipe.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Hugging Face directory, GGUF file, or Hugging Face repository id [default: the built-in model]
    model: Option<PathBuf>,
    /// System message to begin with
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// End a reply after so many tokens
    #[arg(long, value_name = "N", default_value_t = 512)]
    max_tokens: u64,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    engine: EngineArgs,
}

/// Talks until the input ends.
pub fn run(args: &Args) -> Result<ExitCode> {
    let sampling = args.sampling.params()?;
    let checkpoint = model_arg::open(args.model.as_deref())?;
    let mut loaded = model_arg::load(&checkpoint, &args.engine)?;
    let tokenizer = loaded.tokenizer.take();
    let tokenizer = tokenizer.context("this model has no tokenizer, so nobody can talk with it")?;
    let state = State::new(loaded.engine.model());
    let cancel = interrupt::catch()?;
    let system = args.system.clone();
    let mut chat = Conversation {
        loaded,
        tokenizer,
        state,
        system,
        sampling,
        max_tokens: args.max_tokens,
        has_seen_stop: false,
        cancel,
    };
    let mut input = Input::open()?;
    if input.is_terminal() {
        eprintln!("/help lists the commands.");
    }
    while let Some(line) = input.read()? {
        match chat.take(line.trim()) {
            Ok(true) => {}
            Ok(false) => break,
            // At a terminal a mistake can be put right.
            Err(error) if input.is_terminal() && error.downcast_ref::<Mistake>().is_some() => {
                eprintln!("{error:#}");
            }
            Err(error) => return Err(error),
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// A command that could not be carried out and did no harm.
#[derive(Debug)]
struct Mistake;

impl std::fmt::Display for Mistake {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the conversation goes on as it was")
    }
}

struct Conversation {
    loaded: Loaded,
    tokenizer: Tokenizer,
    state: State,
    system: Option<String>,
    sampling: SamplingParams,
    max_tokens: u64,
    /// Whether the last reply ran into the start of the next turn.
    has_seen_stop: bool,
    cancel: &'static AtomicBool,
}

impl Conversation {
    /// Carries out a command or replies to a message; `false` to leave.
    fn take(&mut self, line: &str) -> Result<bool> {
        let Some(command) = line.strip_prefix('/') else {
            if !line.is_empty() {
                self.reply(line)?;
            }
            return Ok(true);
        };
        let (name, argument) = command.split_once(char::is_whitespace).unwrap_or((command, ""));
        let argument = argument.trim();
        let result = match (name, argument) {
            ("exit" | "quit", "") => return Ok(false),
            ("help", "") => {
                eprintln!("{HELP}");
                Ok(())
            }
            ("reset", "") => {
                self.reset();
                Ok(())
            }
            ("system", text) => {
                self.reset();
                self.system = Some(text.to_owned()).filter(|text| !text.is_empty());
                Ok(())
            }
            ("save" | "load", "") => Err(anyhow::anyhow!("/{name} needs the name of a file")),
            ("save", file) => OutputFile::create(Path::new(file))
                .map_err(anyhow::Error::from)
                .and_then(|file| state_file::save(self.loaded.engine.model(), &self.state, file)),
            ("load", file) => self.load(Path::new(file)),
            _ => Err(anyhow::anyhow!("there is no command {line:?}; /help lists them")),
        };
        result.map_err(|error| error.context(Mistake))?;
        Ok(true)
    }

    fn reset(&mut self) {
        self.state = State::new(self.loaded.engine.model());
        self.has_seen_stop = false;
    }

    fn load(&mut self, file: &Path) -> Result<()> {
        self.state = state_file::load(self.loaded.engine.model(), file)?;
        self.has_seen_stop = false;
        Ok(())
    }

    /// Feeds a message and prints the reply.
    fn reply(&mut self, message: &str) -> Result<()> {
        let template = &self.loaded.template;
        let system = self.system.as_deref();
        let mut ids = Vec::new();
        let text = if self.state.tokens_seen() == 0 {
            if template.is_plain() {
                ids.extend_from_slice(self.tokenizer.prefix());
            }
            template.first_turn(system, message)?
        } else {
            template.next_turn(system, message, self.has_seen_stop)?
        };
        ids.extend(self.tokenizer.encode_with_special_text(&text)?);
        let options = GenerateOptions {
            max_tokens: Some(self.max_tokens),
            stop: template.stop(),
            ignore_eos: false,
            sampling: self.sampling.clone(),
        };
        // Another sequence of random numbers for the next reply.
        self.sampling.seed = self.sampling.seed.wrapping_add(1);

        let mut is_start = true;
        let generation = generate(
            &mut self.loaded.engine,
            &mut self.state,
            Some(&self.tokenizer),
            [Ok(ids)],
            &options,
            self.cancel,
            &mut |event| match event {
                Event::Text(text) => {
                    // A reply begins after a space in most templates.
                    let text = if is_start { text.trim_start() } else { text };
                    is_start &= text.is_empty();
                    print(text)
                }
                _ => Ok(()),
            },
        )?;
        print("\n")?;
        self.has_seen_stop = matches!(generation.finish, FinishReason::Stop(_));
        if generation.finish == FinishReason::Cancelled {
            if !stdin().is_terminal() {
                bail!(Error::Cancelled);
            }
            self.cancel.store(false, Ordering::Relaxed);
        }
        Ok(())
    }
}

/// Lines from a terminal, with editing and history, or from anything else.
enum Input {
    Terminal { editor: Box<DefaultEditor>, history: Option<PathBuf> },
    Lines,
}

impl Input {
    fn open() -> Result<Self> {
        if !stdin().is_terminal() {
            return Ok(Self::Lines);
        }
        let mut editor = DefaultEditor::new().context("cannot read from the terminal")?;
        let history = data_directory().map(|directory| directory.join("chat-history.txt"));
        if let Some(history) = &history {
            // There is none the first time, and a conversation does not need one.
            let _ = editor.load_history(history);
        }
        Ok(Self::Terminal { editor: Box::new(editor), history })
    }

    fn is_terminal(&self) -> bool {
        matches!(self, Self::Terminal { .. })
    }

    /// The next message, of several lines if they end with a backslash; `None` at the end.
    fn read(&mut self) -> Result<Option<String>> {
        let mut message = String::new();
        loop {
            let prompt = if message.is_empty() { "> " } else { ". " };
            let Some(line) = self.read_line(prompt)? else {
                return Ok((!message.is_empty()).then_some(message));
            };
            match line.strip_suffix('\\') {
                Some(start) => {
                    message.push_str(start);
                    message.push('\n');
                }
                None => {
                    message.push_str(&line);
                    self.remember(&message);
                    return Ok(Some(message));
                }
            }
        }
    }

    fn read_line(&mut self, prompt: &str) -> Result<Option<String>> {
        match self {
            Self::Terminal { editor, .. } => match editor.readline(prompt) {
                Ok(line) => Ok(Some(line)),
                Err(ReadlineError::Eof) => Ok(None),
                Err(ReadlineError::Interrupted) => {
                    eprintln!("/exit or Ctrl-D leaves.");
                    Ok(Some(String::new()))
                }
                Err(error) => Err(error).context("cannot read from the terminal"),
            },
            Self::Lines => {
                let mut line = String::new();
                let length =
                    stdin().lock().read_line(&mut line).context("cannot read the input")?;
                let line = line.trim_end_matches(['\r', '\n']);
                Ok((length > 0).then(|| line.to_owned()))
            }
        }
    }

    fn remember(&mut self, message: &str) {
        if let Self::Terminal { editor, history } = self {
            // Without a history a conversation is still a conversation.
            let _ = editor.add_history_entry(message);
            if let Some(history) = history {
                let _ = history.parent().map(std::fs::create_dir_all);
                let _ = editor.save_history(history);
            }
        }
    }
}

/// Where this user's data belong, by the conventions of the system.
fn data_directory() -> Option<PathBuf> {
    let variable = |name| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
    let base = if cfg!(windows) {
        variable("APPDATA")
    } else if cfg!(target_os = "macos") {
        variable("HOME").map(|home| home.join("Library/Application Support"))
    } else {
        variable("XDG_DATA_HOME").or_else(|| variable("HOME").map(|h| h.join(".local/share")))
    };
    base.map(|base| base.join("mmfree"))
}
