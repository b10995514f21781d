//! How a server is set up.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

/// What to serve on, to whom, and how much. `Default` suits one person on one machine.
#[derive(Clone, Debug)]
pub struct Options {
    /// Address to listen on. Port 0 takes a free one.
    pub listen: SocketAddr,
    /// Name of the model in the API.
    pub model_name: String,
    /// Keys that open the API, each as `Authorization: Bearer KEY`. Without any it is open.
    pub api_keys: Vec<String>,
    /// Certificate chain and private key, PEM files: serves HTTPS.
    pub tls: Option<TlsFiles>,
    /// Shared store of sessions, `redis://HOST:PORT/DB`; `None` keeps them in this process.
    pub store: Option<String>,
    /// Host names that requests may name besides addresses and `localhost`. Only looked at while the server
    /// listens on a loopback address without keys: a page from elsewhere could otherwise reach it by a
    /// name that it makes point here.
    pub allowed_hosts: Vec<String>,
    /// Origins whose pages may use the API from a browser (CORS); `*` is every one.
    pub allowed_origins: Vec<String>,
    /// Whether `/` serves the playground.
    pub has_web_page: bool,
    /// Writes prompts and texts into the log.
    pub logs_prompts: bool,
    /// Bounds.
    pub limits: Limits,
}

/// PEM files.
#[derive(Clone, Debug)]
pub struct TlsFiles {
    /// Certificate chain, the server's own first.
    pub certificate: PathBuf,
    /// Private key.
    pub key: PathBuf,
}

/// Bounds on what requests may take.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Bytes of a request's body.
    pub max_body_bytes: usize,
    /// Tokens of a prompt.
    pub max_prompt_tokens: usize,
    /// Tokens that a request may ask for.
    pub max_tokens: u64,
    /// Prompts times n of a request.
    pub max_choices: usize,
    /// Texts in work at once; more wait.
    pub max_concurrent: usize,
    /// Texts of one client at once, waiting ones included.
    pub max_concurrent_per_client: usize,
    /// Texts in one step of the engine. Fewer make each step shorter.
    pub max_batch: usize,
    /// Prompt tokens in one step while texts are being written. Fewer disturb them less.
    pub prefill_tokens: usize,
    /// Prompts of one client that may wait; eight times as many of all.
    pub max_queue: usize,
    /// Open connections.
    pub max_connections: usize,
    /// Bytes of a JSON schema, regular expression or grammar.
    pub max_grammar_bytes: usize,
    /// From the request to its last token.
    pub request_timeout: Duration,
    /// From the request to its place in the batch.
    pub queue_timeout: Duration,
    /// For the head and for the body of a request to arrive.
    pub read_timeout: Duration,
    /// How long a reader may take nothing.
    pub write_timeout: Duration,
    /// How long texts in work may go on after a signal to end.
    pub shutdown_timeout: Duration,
    /// Bytes of the prefix cache; 0 turns it off.
    pub prefix_cache_bytes: usize,
    /// Bytes of sessions in this process. With a shared store they are there.
    pub session_bytes: usize,
    /// How long an unused session is kept.
    pub session_ttl: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_body_bytes: 4 << 20,
            max_prompt_tokens: 32_768,
            max_tokens: 4_096,
            max_choices: 128,
            max_concurrent: 256,
            max_concurrent_per_client: 1_024,
            max_batch: 256,
            prefill_tokens: 128,
            max_queue: 512,
            max_connections: 2_048,
            max_grammar_bytes: 64 << 10,
            request_timeout: Duration::from_secs(600),
            queue_timeout: Duration::from_secs(60),
            read_timeout: Duration::from_secs(30),
            write_timeout: Duration::from_secs(30),
            shutdown_timeout: Duration::from_secs(30),
            prefix_cache_bytes: 64 << 20,
            session_bytes: 256 << 20,
            session_ttl: Duration::from_secs(24 * 3600),
        }
    }
}

impl Default for Options {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 8080)),
            model_name: "mmfree".into(),
            api_keys: Vec::new(),
            tls: None,
            store: None,
            allowed_hosts: Vec::new(),
            allowed_origins: Vec::new(),
            has_web_page: true,
            logs_prompts: false,
            limits: Limits::default(),
        }
    }
}
