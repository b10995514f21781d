//! The log: JSON, a line an event, without prompts or texts unless asked.
//!
//! Lines go through a bounded queue to a thread of their own. What cannot be written, for a full disk or a
//! reader that does not read, is dropped and counted; no request waits for it.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::path::Path;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread;

use prometheus_client::metrics::counter::Counter;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::MakeWriter;

/// Lines that wait to be written.
const QUEUED_LINES: usize = 4096;

/// The log of a process.
pub struct Log {
    dropped: Counter,
}

/// How much is logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogLevel {
    /// Nothing.
    Off,
    /// What somebody should look at.
    Warn,
    /// Every request.
    Info,
    /// Every connection.
    Debug,
}

impl Log {
    /// Logs to a file, or to standard error. A process has one log: the first.
    ///
    /// # Errors
    /// A file that cannot be opened.
    pub fn start(file: Option<&Path>, level: LogLevel) -> io::Result<Self> {
        let output: Box<dyn Write + Send> = match file {
            None => Box::new(io::stderr()),
            Some(path) => Box::new(OpenOptions::new().append(true).create(true).open(path)?),
        };
        let dropped = Counter::default();
        let lines = writer(output, dropped.clone())?;
        let level = match level {
            LogLevel::Off => LevelFilter::OFF,
            LogLevel::Warn => LevelFilter::WARN,
            LogLevel::Info => LevelFilter::INFO,
            LogLevel::Debug => LevelFilter::DEBUG,
        };
        let subscriber = tracing_subscriber::fmt()
            .json()
            .flatten_event(true)
            .with_target(false)
            .with_max_level(level)
            .with_writer(Lines { lines, dropped: dropped.clone() })
            .log_internal_errors(false)
            .finish();
        // In a program that has another subscriber that one stays.
        let _ = tracing::subscriber::set_global_default(subscriber);
        Ok(Self { dropped })
    }

    /// No log.
    pub fn off() -> Self {
        Self { dropped: Counter::default() }
    }

    /// Counts lines that could not be written.
    pub(crate) fn dropped(&self) -> Counter {
        self.dropped.clone()
    }
}

/// Starts the thread that writes lines.
fn writer(mut output: Box<dyn Write + Send>, dropped: Counter) -> io::Result<SyncSender<Vec<u8>>> {
    let (sender, lines) = sync_channel::<Vec<u8>>(QUEUED_LINES);
    thread::Builder::new().name("mmfree-log".into()).spawn(move || {
        for line in lines {
            if output.write_all(&line).and_then(|()| output.flush()).is_err() {
                dropped.inc();
            }
        }
    })?;
    Ok(sender)
}

#[derive(Clone)]
struct Lines {
    lines: SyncSender<Vec<u8>>,
    dropped: Counter,
}

impl Write for Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if self.lines.try_send(line.to_vec()).is_err() {
            self.dropped.inc();
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Lines {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}
