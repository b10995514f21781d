//! Continuous batching: one thread owns the engine and takes one step after the other for everybody.
//!
//! A step is one forward pass over one token of each text that is being written and over parts of the prompts
//! that are being read, as many tokens of them as a budget allows. Who comes joins at the next step. Rows of a
//! pass do not influence each other, so a text is the same to the bit whatever else is in the batch.
//!
//! A reader who is slower than its text has the text wait, which costs its state, some kilobytes, and nobody
//! else anything; one who takes nothing for too long, or has gone, loses it.

mod intake;
mod job;
mod logprobs;
mod prefix_cache;
mod worker;
mod writer;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use mmfree::engine::Engine;
use mmfree::tokenizer::Tokenizer;

use self::intake::Intake;
pub(crate) use self::intake::{QueueLimits, Refusal};
pub(crate) use self::job::{
    Choice, Client, Event, EventKind, Failure, FinishReason, Finished, Job, TextOptions,
};
pub(crate) use self::logprobs::TokenLogprob;
use self::worker::Worker;
use crate::metrics::Metrics;

/// Bounds of the scheduler's work.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SchedulerOptions {
    pub queue: QueueLimits,
    /// Texts in work at once.
    pub max_texts: usize,
    /// Texts that take part in one step.
    pub max_batch: usize,
    /// Prompt tokens that a step reads while texts are being written.
    pub prefill_tokens: usize,
    /// Bytes of the prefix cache.
    pub prefix_cache_bytes: usize,
    /// How long a reader may take nothing.
    pub stall_timeout: Duration,
}

/// The way to the engine's thread.
#[derive(Clone)]
pub(crate) struct Scheduler {
    shared: Arc<Shared>,
}

struct Shared {
    intake: Mutex<Intake>,
    wake: Condvar,
    /// End every text now.
    stop: AtomicBool,
    is_alive: AtomicBool,
}

impl Shared {
    fn intake(&self) -> MutexGuard<'_, Intake> {
        self.intake.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Scheduler {
    /// Starts the thread. It ends after [`close`](Self::close), when the last text has.
    ///
    /// # Errors
    /// No thread can be had.
    pub(crate) fn start(
        engine: Engine,
        tokenizer: Option<Arc<Tokenizer>>,
        options: SchedulerOptions,
        metrics: Arc<Metrics>,
    ) -> std::io::Result<(Self, thread::JoinHandle<()>)> {
        let shared = Arc::new(Shared {
            intake: Mutex::new(Intake::new(options.queue)),
            wake: Condvar::new(),
            stop: AtomicBool::new(false),
            is_alive: AtomicBool::new(true),
        });
        let scheduler = Self { shared: shared.clone() };
        let thread = thread::Builder::new().name("mmfree-engine".into()).spawn(move || {
            let work =
                || Worker::new(engine, tokenizer.as_deref(), options, &shared, &metrics).run();
            if catch_unwind(AssertUnwindSafe(work)).is_err() {
                tracing::error!("the engine's thread panicked; this process cannot go on serving");
                shared.is_alive.store(false, Ordering::Relaxed);
                // Dropping the jobs tells their readers.
                drop(shared.intake().close());
            }
        })?;
        Ok((scheduler, thread))
    }

    /// Queues the jobs of one request, all or none.
    pub(crate) fn submit(&self, jobs: Vec<Job>) -> std::result::Result<(), Refusal> {
        self.shared.intake().submit(jobs)?;
        self.shared.wake.notify_one();
        Ok(())
    }

    /// Whether the engine's thread runs as it should.
    pub(crate) fn is_alive(&self) -> bool {
        self.shared.is_alive.load(Ordering::Relaxed)
    }

    /// Jobs that wait for a place.
    pub(crate) fn queued(&self) -> usize {
        self.shared.intake().queued()
    }

    /// Takes no more jobs, and sends away those that wait.
    pub(crate) fn close(&self) {
        for job in self.shared.intake().close() {
            for choice in &job.choices {
                let kind = EventKind::Failed(Failure::ShuttingDown);
                // A reader that has no room will see the channel end.
                let _ = job.events.try_send(Event { choice: choice.index, kind });
            }
        }
        self.shared.wake.notify_one();
    }

    /// Ends all texts at their next token.
    pub(crate) fn stop(&self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.close();
    }
}
