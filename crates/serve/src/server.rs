//! Connections: accepting, TLS, limits, and the end.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::extract::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use mmfree::checkpoint::TokenizerSource;
use mmfree::engine::Engine;
use mmfree::text::chat::ChatTemplate;
use mmfree::tokenizer::Tokenizer;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_io_timeout::TimeoutStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::{ServerConfig, crypto};
use tower::Service;

use crate::api::{App, Peer, key_digest, router};
use crate::constraint::Grammars;
use crate::metrics::Metrics;
use crate::options::{Options, TlsFiles};
use crate::scheduler::{QueueLimits, Scheduler, SchedulerOptions};
use crate::sessions::Sessions;
use crate::vocabulary::Vocabulary;

/// Largest head of a request.
const MAX_HEAD_BYTES: usize = 64 << 10;
/// Headers of a request.
const MAX_HEADERS: usize = 64;
/// Threads for what takes processor time, such as tokenizing.
const BLOCKING_THREADS: usize = 4;
/// How long the last answers may take to leave once their texts have ended.
const DRAIN_TIME: Duration = Duration::from_secs(5);

/// What is served.
pub struct ServedModel {
    /// The engine, which gets a thread of its own.
    pub engine: Engine,
    /// The model's tokenizer as its checkpoint has it.
    pub tokenizer: Option<TokenizerSource>,
}

/// Why a server could not start or go on.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The model's tokenizer or chat template cannot be used.
    #[error(transparent)]
    Model(#[from] mmfree::error::Error),
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {reason}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// The system's reason.
        reason: io::Error,
    },
    /// Certificate or key cannot be used.
    #[error("cannot serve TLS with {file}: {reason}")]
    Tls {
        /// The file.
        file: String,
        /// What is wrong with it.
        reason: String,
    },
    /// An option that cannot be used.
    #[error("{0}")]
    Option(String),
    /// No thread, or no socket.
    #[error("cannot start the server: {0}")]
    System(#[from] io::Error),
}

/// A server that listens.
pub struct Server {
    app: Arc<App>,
    listener: TcpListener,
    acceptor: Option<TlsAcceptor>,
    engine: thread::JoinHandle<()>,
}

impl Server {
    /// Sets everything up and listens. Requests that come before [`run`](Self::run) wait.
    ///
    /// # Errors
    /// See [`ServeError`].
    pub async fn bind(
        model: ServedModel,
        options: Options,
        log: &crate::log::Log,
    ) -> Result<Self, ServeError> {
        let acceptor = options.tls.as_ref().map(acceptor).transpose()?;
        let address = options.listen;
        let listener = TcpListener::bind(address)
            .await
            .map_err(|reason| ServeError::Listen { address, reason })?;
        let metrics = Arc::new(Metrics::new(log.dropped()));
        let app = app(model, options, metrics)?;
        let (app, engine) = app;
        Ok(Self { app, listener, acceptor, engine })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// The system's.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until `shutdown` is ready, then takes no more requests, lets those in work go on for the time
    /// that the options give, and ends the rest where they are: their sessions are saved.
    pub async fn run(self, shutdown: impl Future<Output = ()>) {
        let Self { app, listener, acceptor, engine } = self;
        let graceful = GracefulShutdown::new();
        let places = Arc::new(Semaphore::new(app.options.limits.max_connections));
        let service = router(app.clone());
        let mut shutdown = pin!(shutdown);
        loop {
            let (stream, peer) = tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok(accepted) => accepted,
                    Err(error) => {
                        // Out of file descriptors, most likely: it passes when connections end.
                        tracing::warn!(%error, "a connection could not be accepted");
                        tokio::time::sleep(Duration::from_millis(50)).await;
                        continue;
                    }
                },
                () = &mut shutdown => break,
            };
            let Ok(place) = places.clone().try_acquire_owned() else {
                app.metrics.refused_connections.inc();
                continue;
            };
            let watcher = graceful.watcher();
            let (app, acceptor, service) = (app.clone(), acceptor.clone(), service.clone());
            tokio::spawn(async move {
                app.metrics.connections.inc();
                let timeout = app.options.limits.read_timeout;
                // A token should leave at once.
                let _ = stream.set_nodelay(true);
                match acceptor {
                    None => serve(stream, peer, &app, service, watcher).await,
                    Some(acceptor) => {
                        let handshake = tokio::time::timeout(timeout, acceptor.accept(stream));
                        if let Ok(Ok(stream)) = handshake.await {
                            serve(stream, peer, &app, service, watcher).await;
                        }
                    }
                }
                app.metrics.connections.dec();
                drop(place);
            });
        }
        drop(listener);
        app.is_ending.store(true, Ordering::Relaxed);
        tracing::info!("shutting down: no new requests");
        app.scheduler.close();
        let mut ended = pin!(graceful.shutdown());
        let patience = app.options.limits.shutdown_timeout;
        if tokio::time::timeout(patience, &mut ended).await.is_err() {
            tracing::warn!("some texts are not complete: they end where they are");
            app.scheduler.stop();
            let _ = tokio::time::timeout(DRAIN_TIME, &mut ended).await;
        }
        app.scheduler.stop();
        let _ = tokio::task::spawn_blocking(move || engine.join()).await;
        tracing::info!("shut down");
    }
}

/// Serves one connection.
async fn serve<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    stream: S,
    peer: SocketAddr,
    app: &App,
    service: axum::Router,
    watcher: hyper_util::server::graceful::Watcher,
) {
    let limits = &app.options.limits;
    let mut stream = TimeoutStream::new(stream);
    // A reader that takes nothing loses its connection, and with it its text.
    stream.set_write_timeout(Some(limits.write_timeout));
    let service = hyper::service::service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(Peer(peer));
        service.clone().call(request)
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.read_timeout)
        .max_buf_size(MAX_HEAD_BYTES)
        .max_headers(MAX_HEADERS)
        .serve_connection(TokioIo::new(Box::pin(stream)), service);
    if let Err(error) = watcher.watch(connection).await {
        tracing::debug!(%error, %peer, "a connection ended");
    }
}

fn app(
    model: ServedModel,
    options: Options,
    metrics: Arc<Metrics>,
) -> Result<(Arc<App>, thread::JoinHandle<()>), ServeError> {
    let ServedModel { engine, tokenizer: source } = model;
    let model = engine.model().clone();
    let config = model.config();
    let tokenizer = source.as_ref().map(Tokenizer::from_source).transpose()?.map(Arc::new);
    let template = source.as_ref().map(ChatTemplate::from_source).transpose()?;
    let mut eos = config.eos_token_ids.clone();
    if let Some(id) = tokenizer.as_ref().and_then(|tokenizer| tokenizer.eos())
        && !eos.contains(&id)
    {
        eos.push(id);
    }
    let vocabulary = match (&source, &tokenizer) {
        (Some(source), Some(tokenizer)) => Vocabulary::new(source, tokenizer, config.vocab_size),
        _ => Vocabulary::unknown(config.vocab_size),
    };
    let grammars = match &tokenizer {
        Some(tokenizer) => Grammars::new(&vocabulary, tokenizer.clone(), &eos)
            .map_err(|why| ServeError::Option(format!("no structured output: {why}")))?,
        None => None,
    };
    let sessions = Sessions::open(&options, metrics.clone()).map_err(ServeError::Option)?;
    let limits = &options.limits;
    let scheduling = SchedulerOptions {
        queue: QueueLimits {
            per_client: limits.max_queue,
            total: limits.max_queue.saturating_mul(8),
            texts_per_client: limits.max_concurrent_per_client,
        },
        max_texts: limits.max_concurrent,
        max_batch: limits.max_batch,
        prefill_tokens: limits.prefill_tokens,
        prefix_cache_bytes: limits.prefix_cache_bytes,
        stall_timeout: limits.write_timeout,
    };
    let fingerprint = format!("{:016x}", model.fingerprint());
    let (scheduler, thread) =
        Scheduler::start(engine, tokenizer.clone(), scheduling, metrics.clone())?;
    let keys = options.api_keys.iter().map(|key| key_digest(key.as_bytes())).collect();
    let started = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let app = App {
        options,
        fingerprint,
        model,
        tokenizer,
        template: template.unwrap_or_else(ChatTemplate::plain),
        vocabulary,
        eos,
        grammars: grammars.map(Arc::new),
        scheduler,
        sessions: Arc::new(sessions),
        metrics,
        started,
        is_ending: AtomicBool::new(false),
        keys,
        wait_millis: AtomicU64::new(0),
    };
    Ok((Arc::new(app), thread))
}

fn acceptor(files: &TlsFiles) -> Result<TlsAcceptor, ServeError> {
    let error =
        |file: &Path, reason: String| ServeError::Tls { file: file.display().to_string(), reason };
    let certificates = CertificateDer::pem_file_iter(&files.certificate)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|reason| error(&files.certificate, reason.to_string()))?;
    let key = PrivateKeyDer::from_pem_file(&files.key)
        .map_err(|reason| error(&files.key, reason.to_string()))?;
    let mut config =
        ServerConfig::builder_with_provider(Arc::new(crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .and_then(|builder| builder.with_no_client_auth().with_single_cert(certificates, key))
            .map_err(|reason| error(&files.certificate, reason.to_string()))?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// Serves until Ctrl-C or SIGTERM, on threads of its own. `ready` is told the address.
///
/// # Errors
/// See [`ServeError`].
pub fn serve_until_signal(
    model: ServedModel,
    options: Options,
    log: &crate::log::Log,
    ready: impl FnOnce(SocketAddr),
) -> Result<(), ServeError> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS)
        .build()?;
    let result = runtime.block_on(async {
        let shutdown = signals()?;
        let server = Server::bind(model, options, log).await?;
        ready(server.address()?);
        server.run(shutdown).await;
        Ok(())
    });
    runtime.shutdown_timeout(Duration::from_secs(1));
    result
}

/// Ready at the first Ctrl-C or SIGTERM. A second one ends the program.
fn signals() -> io::Result<impl Future<Output = ()>> {
    #[cfg(unix)]
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    let wait = async move {
        #[cfg(unix)]
        tokio::select! {
            _ = tokio::signal::ctrl_c() => {}
            _ = terminate.recv() => {}
        }
        #[cfg(not(unix))]
        let _ = tokio::signal::ctrl_c().await;
        tokio::spawn(async {
            let _ = tokio::signal::ctrl_c().await;
            std::process::exit(130);
        });
    };
    Ok(wait)
}
