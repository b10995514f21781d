//! `mmfree serve`: the HTTP server.

use std::io::Read;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use mmfree::engine::Engine;
use mmfree::model::Model;
use mmfree_serve::log::{Log, LogLevel};
use mmfree_serve::options::{Limits, Options, TlsFiles};
use mmfree_serve::{ServedModel, serve_until_signal};

use crate::model_arg::{self, EngineArgs};

/// Longest file of keys.
const MAX_KEY_FILE_BYTES: u64 = 1 << 20;

/// Serve an OpenAI-compatible API and a web page
///
/// Conversations are states of some kilobytes: name one by `session_id` and send only what is new. Ctrl-C or
/// SIGTERM lets running texts finish; a second Ctrl-C ends at once. docs/serving.md is the manual.
///
///   mmfree serve
///   mmfree serve model.gguf --host 0.0.0.0 --api-key-file keys.txt
///   mmfree serve --store redis://127.0.0.1/
#[derive(Debug, clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Args {
    /// Hugging Face directory, GGUF file, or Hugging Face repository id [default: the built-in model]
    model: Option<PathBuf>,
    /// Name of the model in the API [default: the file's or directory's name, or mmfree-builtin]
    #[arg(long, value_name = "NAME")]
    model_name: Option<String>,

    /// Address to listen on; 0.0.0.0 is every network that this machine is in
    #[arg(long, value_name = "IP", default_value = "127.0.0.1", help_heading = "Network")]
    host: IpAddr,
    /// Port to listen on; 0 takes a free one
    #[arg(long, value_name = "N", default_value_t = 8080, help_heading = "Network")]
    port: u16,
    /// PEM file with the certificate chain: serve HTTPS
    #[arg(long, value_name = "FILE", requires = "tls_key", help_heading = "Network")]
    tls_cert: Option<PathBuf>,
    /// PEM file with the certificate's private key
    #[arg(long, value_name = "FILE", requires = "tls_cert", help_heading = "Network")]
    tls_key: Option<PathBuf>,
    /// Another host name that requests may name; may be repeated. Only looked at without keys on a loopback
    /// address
    #[arg(long, value_name = "NAME", help_heading = "Network")]
    allowed_host: Vec<String>,
    /// Let pages of this origin use the API, as in https://example.org; * is every one; may be repeated
    #[arg(long, value_name = "ORIGIN", help_heading = "Network")]
    allowed_origin: Vec<String>,
    /// Serve the API only
    #[arg(long, help_heading = "Network")]
    no_web_page: bool,

    /// File with a key a line; whoever sends none of them (Authorization: Bearer KEY) is refused. Lines that
    /// begin with # are comments. The variable MMFREE_API_KEY holds one key, too
    #[arg(long, value_name = "FILE", help_heading = "Access")]
    api_key_file: Option<PathBuf>,

    /// Keep sessions in Redis or Valkey, shared by all servers that name it: redis://[USER:PASSWORD@]HOST[:PORT]/[DB].
    /// The variable MMFREE_STORE says the same without showing a password in the list of processes
    #[arg(long, value_name = "URL", help_heading = "Sessions")]
    store: Option<String>,
    /// Memory for sessions in this process, in MiB
    #[arg(long, value_name = "MIB", default_value_t = 256, help_heading = "Sessions")]
    session_memory_mib: usize,
    /// Forget sessions that were not used for so many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 86_400, help_heading = "Sessions")]
    session_ttl_seconds: u64,
    /// Memory for states of prompts that were read before, in MiB; 0 turns it off
    #[arg(long, value_name = "MIB", default_value_t = 64, help_heading = "Sessions")]
    prefix_cache_mib: usize,

    #[command(flatten)]
    limits: LimitArgs,

    /// Append the log to a file instead of standard error
    #[arg(long, value_name = "FILE", help_heading = "Log")]
    log_file: Option<PathBuf>,
    /// How much to log, as JSON lines
    #[arg(long, value_name = "LEVEL", default_value = "info", help_heading = "Log")]
    log_level: Level,
    /// Write prompts and texts into the log
    #[arg(long, help_heading = "Log")]
    log_prompts: bool,

    #[command(flatten)]
    engine: EngineArgs,
}

/// Bounds.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Limits")]
struct LimitArgs {
    /// Bytes of a request
    #[arg(long, value_name = "BYTES", default_value_t = 4 << 20)]
    max_body_bytes: usize,
    /// Tokens of a prompt
    #[arg(long, value_name = "N", default_value_t = 32_768)]
    max_prompt_tokens: usize,
    /// Tokens that a request may ask for
    #[arg(long, value_name = "N", default_value_t = 4_096)]
    max_tokens: u64,
    /// Texts in work at once; more wait
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = positive)]
    max_concurrent: usize,
    /// Texts of one client at once, waiting ones included; more are refused (429)
    #[arg(long, value_name = "N", default_value_t = 1_024, value_parser = positive)]
    max_concurrent_per_client: usize,
    /// Texts in one step of the engine; fewer make tokens come sooner, more make more of them
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = positive)]
    max_batch: usize,
    /// Prompt tokens that one step reads beside texts being written; fewer disturb those less
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = positive)]
    prefill_tokens: usize,
    /// Prompts of one client that may wait, and eight times as many of all; more are refused (429)
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = positive)]
    max_queue: usize,
    /// Open connections; more are closed at once
    #[arg(long, value_name = "N", default_value_t = 2_048, value_parser = positive)]
    max_connections: usize,
    /// A request must be done after so many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    request_timeout_seconds: u64,
    /// A request that has waited so many seconds for a place is refused (429)
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    queue_timeout_seconds: u64,
    /// Head and body of a request must arrive within so many seconds each
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    read_timeout_seconds: u64,
    /// A reader that takes nothing for so many seconds loses its text
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    write_timeout_seconds: u64,
    /// At the end running texts may go on for so many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    shutdown_timeout_seconds: u64,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Level {
    Off,
    Warn,
    Info,
    Debug,
}

fn positive(text: &str) -> std::result::Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("expected at least 1".to_owned()),
        Ok(number) => Ok(number),
        Err(error) => Err(error.to_string()),
    }
}

/// Serves until a signal.
pub fn run(args: &Args) -> Result<ExitCode> {
    let options = options(args)?;
    let log = Log::start(args.log_file.as_deref(), args.log_level.into()).with_context(|| {
        format!("cannot write the log {:?}", args.log_file.as_deref().unwrap_or(Path::new("-")))
    })?;
    let checkpoint = model_arg::open(args.model.as_deref())?;
    let tokenizer = checkpoint.tokenizer()?;
    let engine_options = args.engine.options()?;
    let model = Model::load_in(&checkpoint, engine_options.layout()?)?;
    let engine = Engine::new(Arc::new(model), &engine_options)?;
    let description = engine.describe();
    let (scheme, has_keys) =
        (if options.tls.is_some() { "https" } else { "http" }, !options.api_keys.is_empty());
    let name = options.model_name.clone();
    serve_until_signal(ServedModel { engine, tokenizer }, options, &log, |address| {
        eprintln!("{description}");
        eprintln!("serving {name} on {scheme}://{address}/");
        if !has_keys && !address.ip().is_loopback() {
            eprintln!(
                "warning: everybody who can reach this address can use it: there are no keys (--api-key-file)"
            );
        }
    })?;
    Ok(ExitCode::SUCCESS)
}

fn options(args: &Args) -> Result<Options> {
    let LimitArgs {
        max_body_bytes,
        max_prompt_tokens,
        max_tokens,
        max_concurrent,
        max_concurrent_per_client,
        max_batch,
        prefill_tokens,
        max_queue,
        max_connections,
        request_timeout_seconds,
        queue_timeout_seconds,
        read_timeout_seconds,
        write_timeout_seconds,
        shutdown_timeout_seconds,
    } = args.limits;
    let tls = args.tls_cert.clone().zip(args.tls_key.clone());
    Ok(Options {
        listen: SocketAddr::new(args.host, args.port),
        model_name: args.model_name.clone().unwrap_or_else(|| model_name(args.model.as_deref())),
        api_keys: api_keys(args.api_key_file.as_deref())?,
        tls: tls.map(|(certificate, key)| TlsFiles { certificate, key }),
        store: args.store.clone().or_else(|| std::env::var("MMFREE_STORE").ok()),
        allowed_hosts: args.allowed_host.clone(),
        allowed_origins: args.allowed_origin.clone(),
        has_web_page: !args.no_web_page,
        logs_prompts: args.log_prompts,
        limits: Limits {
            max_body_bytes,
            max_prompt_tokens,
            max_tokens,
            max_concurrent,
            max_concurrent_per_client,
            max_batch,
            prefill_tokens,
            max_queue,
            max_connections,
            request_timeout: Duration::from_secs(request_timeout_seconds),
            queue_timeout: Duration::from_secs(queue_timeout_seconds),
            read_timeout: Duration::from_secs(read_timeout_seconds),
            write_timeout: Duration::from_secs(write_timeout_seconds),
            shutdown_timeout: Duration::from_secs(shutdown_timeout_seconds),
            prefix_cache_bytes: args.prefix_cache_mib << 20,
            session_bytes: args.session_memory_mib << 20,
            session_ttl: Duration::from_secs(args.session_ttl_seconds),
            ..Limits::default()
        },
    })
}

/// The name that a model has for want of another.
fn model_name(model: Option<&Path>) -> String {
    let Some(model) = model else { return "mmfree-builtin".to_owned() };
    let is_packed = model.extension().is_some_and(|extension| extension == "gguf");
    let name = if is_packed { model.file_stem() } else { model.file_name() };
    name.map_or_else(|| "mmfree".to_owned(), |name| name.to_string_lossy().into_owned())
}

/// The keys of the file and of the environment.
fn api_keys(file: Option<&Path>) -> Result<Vec<String>> {
    let mut keys: Vec<String> = std::env::var("MMFREE_API_KEY").into_iter().collect();
    if let Some(path) = file {
        let context = || format!("cannot read the keys {}", path.display());
        let mut text = String::new();
        std::fs::File::open(path)
            .with_context(context)?
            .take(MAX_KEY_FILE_BYTES)
            .read_to_string(&mut text)
            .with_context(context)?;
        let lines = text.lines().map(str::trim).filter(|line| !line.starts_with('#'));
        keys.extend(lines.filter(|line| !line.is_empty()).map(str::to_owned));
        // A file that was meant to close the server must not leave it open.
        ensure!(!keys.is_empty(), "{}: there is no key in it", path.display());
    }
    ensure!(keys.iter().all(|key| !key.trim().is_empty()), "an API key is empty");
    Ok(keys)
}

impl From<Level> for LogLevel {
    fn from(level: Level) -> Self {
        match level {
            Level::Off => Self::Off,
            Level::Warn => Self::Warn,
            Level::Info => Self::Info,
            Level::Debug => Self::Debug,
        }
    }
}
