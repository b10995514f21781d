//! One thread reads a corpus, others work on its pieces, and what they make arrives in the corpus's order.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, channel, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::thread;

use mmfree::error::{Error, Result};
use mmfree::tokenizer::Tokenizer;

use super::source::{self, Content, Emit, Format, Item, Position, Source};

/// Text that goes to a thread at once, in bytes.
const TASK_BYTES: usize = 256 << 10;
/// Pieces that are on their way, for each thread.
const TASKS_PER_THREAD: usize = 4;

/// Files of text, and what is to be known to take them apart.
pub(super) struct Corpus<'a> {
    pub sources: &'a [Source],
    /// Says where long texts can be cut.
    pub tokenizer: &'a Tokenizer,
    /// Line between two documents of a `.txt` file.
    pub separator: Option<&'a str>,
    /// Parquet column: the field of JSON lines is read behind the pipeline.
    #[cfg_attr(not(feature = "parquet"), expect(dead_code))]
    pub field: &'a str,
}

impl Corpus<'_> {
    /// Bytes of all files.
    pub(super) fn total_bytes(&self) -> u64 {
        self.sources.iter().map(|source| source.bytes).sum()
    }

    /// Hands every item from `start` on to `work`, on as many threads, and what that makes of it to `take`, on
    /// this thread and in order, with the number of bytes that were read of the files. A bounded number of items
    /// is on its way. A file that cannot be read to its end gives an item that says so, and the next file
    /// follows.
    ///
    /// # Errors
    /// Those of `take`, which ends the work.
    pub(super) fn process<T: Send>(
        &self,
        start: Position,
        threads: usize,
        work: &(dyn Fn(Item) -> T + Sync),
        take: &mut dyn FnMut(T, u64) -> Result<()>,
    ) -> Result<()> {
        let threads = threads.max(1);
        let done = self.sources.iter().take(start.source).map(|source| source.bytes);
        let read = &AtomicU64::new(done.sum());
        let in_flight = TASKS_PER_THREAD * threads;
        let (permit, permits) = sync_channel(in_flight);
        for _ in 0..in_flight {
            let _ = permit.send(());
        }
        let (task_sender, tasks) = sync_channel::<Task>(in_flight);
        let tasks = &Mutex::new(tasks);
        let (result_sender, results) = channel();
        thread::scope(|scope| {
            scope.spawn(move || {
                let number = 0;
                let (items, bytes) = (Vec::new(), 0);
                let mut batches = Batches { permits, tasks: task_sender, number, items, bytes };
                self.read_all(start, read, &mut batches);
            });
            for _ in 0..threads {
                let results = result_sender.clone();
                scope.spawn(move || {
                    loop {
                        let task = tasks.lock().unwrap_or_else(PoisonError::into_inner).recv();
                        let Ok((number, items)) = task else { return };
                        let made: Vec<_> = items.into_iter().map(work).collect();
                        if results.send((number, made)).is_err() {
                            return;
                        }
                    }
                });
            }
            drop(result_sender);
            // Dropped on every way out of here, which stops the other threads.
            let (permit, results) = (permit, results);
            in_order(&results, &permit, &mut |made| take(made, read.load(Ordering::Relaxed)))
        })
    }

    /// What the reading thread does.
    fn read_all(&self, start: Position, read: &AtomicU64, batches: &mut Batches) {
        for (index, source) in self.sources.iter().enumerate().skip(start.source) {
            let fresh = Position { source: index, ..Position::default() };
            let at = if index == start.source { start } else { fresh };
            let mut goes_on = true;
            let mut emit = |item: Item| {
                goes_on = batches.push(item);
                goes_on
            };
            if let Err(error) = self.read_source(source, at, read, &mut emit) {
                let content = Content::Broken(error);
                // Nothing more can be had of this file.
                let after = Position { source: index + 1, ..Position::default() };
                goes_on = batches.push(Item { content, begins: true, ends: true, after });
            }
            if !goes_on {
                return;
            }
        }
        batches.flush();
    }

    fn read_source(
        &self,
        source: &Source,
        at: Position,
        read: &AtomicU64,
        emit: Emit,
    ) -> Result<()> {
        match Format::of(&source.file).map(|(format, _)| format) {
            Some(Format::JsonLines) => source::read_lines(source, at, read, emit),
            #[cfg(feature = "parquet")]
            Some(Format::Parquet) => source::read_parquet(source, at, self.field, read, emit),
            _ => {
                source::check_utf8(source)?;
                let located = |error| match error {
                    Error::Tokenizer(what) => Error::Malformed { file: source.file.clone(), what },
                    error => error,
                };
                source::read_text(source, at, self.separator, self.tokenizer, read, emit)
                    .map_err(located)
            }
        }
    }
}

/// Items that one thread works on at a time, and their place in the order.
type Task = (u64, Vec<Item>);

/// Collects items into tasks and hands these over as long as there are permits.
struct Batches {
    permits: Receiver<()>,
    tasks: SyncSender<Task>,
    number: u64,
    items: Vec<Item>,
    bytes: usize,
}

impl Batches {
    /// False if nobody wants more.
    fn push(&mut self, item: Item) -> bool {
        self.bytes += item.content.bytes() + size_of::<Item>();
        self.items.push(item);
        self.bytes < TASK_BYTES || self.flush()
    }

    fn flush(&mut self) -> bool {
        let task = (self.number, std::mem::take(&mut self.items));
        self.number += 1;
        self.bytes = 0;
        self.permits.recv().is_ok() && self.tasks.send(task).is_ok()
    }
}

/// Hands results over in the order of their numbers. There are never more than the permits allow.
fn in_order<T>(
    results: &Receiver<(u64, Vec<T>)>,
    permit: &SyncSender<()>,
    take: &mut dyn FnMut(T) -> Result<()>,
) -> Result<()> {
    let mut waiting = BTreeMap::new();
    let mut next = 0;
    for (number, made) in results {
        waiting.insert(number, made);
        while let Some(made) = waiting.remove(&next) {
            next += 1;
            made.into_iter().try_for_each(&mut *take)?;
            // The reader may be done already.
            let _ = permit.try_send(());
        }
    }
    Ok(())
}
