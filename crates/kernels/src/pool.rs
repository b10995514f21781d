//! A persistent pool of worker threads for fork-join parallelism.
//!
//! Decoding one token takes about a hundred short parallel sections, so starting one must cost well
//! under a microsecond: workers spin for a while before they sleep. Each thread owns a contiguous range
//! of the tasks and takes them in order, so that neighbouring tasks stream neighbouring memory, which
//! the prefetchers reward (half as much bandwidth again, measured on two cores). A thread that is
//! done takes tasks from the end of another's range, and a job does not wait for workers that have not
//! begun with it, so a worker that the system keeps from running holds up nobody.

use std::any::Any;
use std::num::NonZeroUsize;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle, Thread};

/// Turns of the waiting loop before a worker sleeps; about 100 microseconds.
const SPINS_BEFORE_SLEEP: u32 = 4_000;
/// Turns of the waiting loop before it starts to yield to other threads.
const SPINS_BEFORE_YIELD: u32 = 2_000;

/// Where the number of a job stands in [`Shared::job`].
const NUMBER_SHIFT: u32 = 32;
/// Set while workers may join the job.
const OPEN: u64 = 1 << 31;
/// The workers that have joined and not left.
const JOINED: u64 = OPEN - 1;

type Task<'a> = dyn Fn(usize, usize) + Sync + 'a;

/// Worker threads that live as long as the pool. The thread that calls [`run`](Pool::run) works too.
#[derive(Debug)]
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    handles: Vec<Thread>,
    running: Mutex<()>,
}

#[derive(Debug)]
struct Shared {
    /// The state of the current job: its number in the high half, [`OPEN`] while workers may join it,
    /// and how many have joined and not left.
    job: AtomicU64,
    /// The current job: a `*const Task` split into its two words.
    task: [AtomicUsize; 2],
    /// Tasks of the current job that nobody has taken, a range for each thread.
    ranges: Vec<TaskRange>,
    /// Workers that sleep, or are about to.
    asleep: AtomicUsize,
    stop: AtomicBool,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

impl Pool {
    /// A pool in which `threads` threads work, the caller included.
    pub fn new(threads: NonZeroUsize) -> Self {
        let shared = Arc::new(Shared {
            job: AtomicU64::new(0),
            task: [AtomicUsize::new(0), AtomicUsize::new(0)],
            ranges: (0..threads.get()).map(|_| TaskRange::default()).collect(),
            asleep: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            panic: Mutex::new(None),
        });
        let workers: Vec<_> = (1..threads.get())
            .filter_map(|index| {
                let shared = Arc::clone(&shared);
                // A system that refuses a thread leaves a smaller pool, which is still correct.
                thread::Builder::new()
                    .name(format!("mmfree-{index}"))
                    .spawn(move || shared.work(index))
                    .ok()
            })
            .collect();
        let handles = workers.iter().map(|worker| worker.thread().clone()).collect();
        Self { shared, workers, handles, running: Mutex::new(()) }
    }

    /// Threads that work on a job, the caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `task(thread, index)` once for every index below `tasks`, on all threads, and returns when
    /// all are done. `thread` is below [`threads`](Self::threads) and no two calls that run at the
    /// same time share it.
    ///
    /// # Panics
    /// If a task panicked, after the others have finished.
    pub fn run(&self, tasks: usize, task: &Task<'_>) {
        if self.workers.is_empty() || tasks <= 1 {
            (0..tasks).for_each(|index| task(0, index));
            return;
        }
        let _running = self.running.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let shared = &*self.shared;
        // SAFETY: a reference to a trait object is two words, which `Shared::work` puts together again.
        // A worker uses it only between joining and leaving the job, and this function returns only
        // when the job is closed and all have left, so the borrow outlives every use.
        let words: [usize; 2] = unsafe { std::mem::transmute::<&Task<'_>, [usize; 2]>(task) };
        shared.task[0].store(words[0], Ordering::Relaxed);
        shared.task[1].store(words[1], Ordering::Relaxed);
        assert!(u32::try_from(tasks).is_ok(), "{tasks} tasks in one job");
        let bound = |thread: usize| (tasks as u64 * thread as u64 / self.threads() as u64) as u32;
        for (thread, range) in shared.ranges.iter().enumerate().take(self.threads()) {
            range.set(bound(thread), bound(thread + 1));
        }
        // Publishes the job. Sequentially consistent with `asleep`: either the worker sees the new job
        // before it sleeps, or its count is seen here and it is woken.
        let number = shared.job.load(Ordering::Relaxed) >> NUMBER_SHIFT;
        shared.job.store(number.wrapping_add(1) << NUMBER_SHIFT | OPEN, Ordering::SeqCst);
        if shared.asleep.load(Ordering::SeqCst) > 0 {
            self.handles.iter().for_each(Thread::unpark);
        }
        let outcome = catch_unwind(AssertUnwindSafe(|| shared.take_tasks(0, task)));
        // No task is left to take, or this thread's panic will be passed on: nobody else need join.
        shared.job.fetch_and(!OPEN, Ordering::AcqRel);
        let mut spins = 0;
        while shared.job.load(Ordering::Acquire) & JOINED > 0 {
            wait_a_little(&mut spins);
        }
        let panic = shared.panic.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take();
        if let Some(payload) = outcome.err().or(panic) {
            resume_unwind(payload);
        }
    }

    /// Cuts `data` into chunks of `chunk` elements (the last may be shorter) and calls
    /// `task(thread, index, chunk)` for each.
    ///
    /// # Panics
    /// If `chunk` is zero, or if a task panicked.
    pub fn for_each_chunk<T: Send>(
        &self,
        data: &mut [T],
        chunk: usize,
        task: &(dyn Fn(usize, usize, &mut [T]) + Sync),
    ) {
        assert!(chunk > 0, "chunks must not be empty");
        let len = data.len();
        let start = SharedMut::new(data);
        self.run(len.div_ceil(chunk), &|thread, index| {
            let from = index * chunk;
            // SAFETY: chunks do not overlap and lie inside `data`; each index is handed out once.
            let part = unsafe { start.slice(from, chunk.min(len - from)) };
            task(thread, index, part);
        });
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker catches its tasks' panics, so joining cannot fail.
            let _ = worker.join();
        }
    }
}

impl Shared {
    fn work(&self, thread: usize) {
        let mut seen = 0;
        while let Some(number) = self.join_next_job(seen) {
            seen = number;
            let words =
                [self.task[0].load(Ordering::Relaxed), self.task[1].load(Ordering::Relaxed)];
            // SAFETY: `run` stored the two words of a live reference before it opened the job that this
            // worker has joined, and does not return before it has left.
            let task: &Task<'_> = unsafe { std::mem::transmute::<[usize; 2], &Task<'_>>(words) };
            let outcome = catch_unwind(AssertUnwindSafe(|| self.take_tasks(thread, task)));
            if let Err(payload) = outcome {
                *self.panic.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(payload);
            }
            self.job.fetch_sub(1, Ordering::Release);
        }
    }

    /// Waits for a job with another number than `seen` and joins it. `None` when the pool goes.
    fn join_next_job(&self, seen: u64) -> Option<u64> {
        let mut spins = 0;
        loop {
            let job = self.job.load(Ordering::Acquire);
            let number = job >> NUMBER_SHIFT;
            if job & OPEN > 0 && number != seen {
                let joined = self.job.compare_exchange_weak(
                    job,
                    job + 1,
                    Ordering::Acquire,
                    Ordering::Relaxed,
                );
                if joined.is_ok() {
                    return Some(number);
                }
                continue;
            }
            if self.stop.load(Ordering::SeqCst) {
                return None;
            }
            if spins < SPINS_BEFORE_SLEEP {
                wait_a_little(&mut spins);
                continue;
            }
            self.asleep.fetch_add(1, Ordering::SeqCst);
            while self.job.load(Ordering::SeqCst) == job && !self.stop.load(Ordering::SeqCst) {
                thread::park();
            }
            self.asleep.fetch_sub(1, Ordering::SeqCst);
            spins = 0;
        }
    }

    /// Does tasks until none is left: the thread's own from the front, then others' from the back.
    fn take_tasks(&self, thread: usize, task: &Task<'_>) {
        while let Some(index) = self.ranges[thread].take_first() {
            task(thread, index as usize);
        }
        let fullest = || {
            let ranges = self.ranges.iter();
            ranges.map(|range| (range.len(), range)).max_by_key(|&(len, _)| len)
        };
        while let Some((1.., range)) = fullest() {
            if let Some(index) = range.take_last() {
                task(thread, index as usize);
            }
        }
    }
}

/// First and end of a range of tasks in one atomic word, on a cache line of its own.
#[derive(Debug, Default)]
#[repr(align(128))]
struct TaskRange(AtomicU64);

impl TaskRange {
    fn set(&self, first: u32, end: u32) {
        self.0.store(u64::from(first) | u64::from(end) << 32, Ordering::Relaxed);
    }

    fn len(&self) -> u32 {
        let (first, end) = Self::bounds(self.0.load(Ordering::Relaxed));
        end - first
    }

    fn take_first(&self) -> Option<u32> {
        let before = self.update(|first, end| (first + 1, end))?;
        Some(Self::bounds(before).0)
    }

    fn take_last(&self) -> Option<u32> {
        let before = self.update(|first, end| (first, end - 1))?;
        Some(Self::bounds(before).1 - 1)
    }

    /// Changes the bounds if the range is not empty; returns what they were.
    fn update(&self, change: impl Fn(u32, u32) -> (u32, u32)) -> Option<u64> {
        self.0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |bounds| {
                let (first, end) = Self::bounds(bounds);
                let (first, end) = (first < end).then(|| change(first, end))?;
                Some(u64::from(first) | u64::from(end) << 32)
            })
            .ok()
    }

    fn bounds(word: u64) -> (u32, u32) {
        (word as u32, (word >> 32) as u32)
    }
}

fn wait_a_little(spins: &mut u32) {
    *spins += 1;
    if *spins < SPINS_BEFORE_YIELD {
        std::hint::spin_loop();
    } else {
        thread::yield_now();
    }
}

/// A mutable slice that several tasks write to, each its own part.
pub(crate) struct SharedMut<T>(*mut T, usize);

// SAFETY: the pointer is only turned into references by `slice`, whose callers promise disjointness.
unsafe impl<T: Send> Send for SharedMut<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for SharedMut<T> {}

impl<T> SharedMut<T> {
    pub(crate) fn new(slice: &mut [T]) -> Self {
        Self(slice.as_mut_ptr(), slice.len())
    }

    /// A part of the slice.
    ///
    /// # Safety
    /// The slice that this was made from is still mutably borrowed for this purpose, and no two
    /// parts that live at the same time overlap.
    ///
    /// # Panics
    /// If the part does not lie inside the slice.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn slice(&self, from: usize, len: usize) -> &mut [T] {
        assert!(from <= self.1 && len <= self.1 - from, "part outside the slice");
        // SAFETY: inside the slice by the check above, exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(from), len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(threads: usize) -> Pool {
        Pool::new(NonZeroUsize::new(threads).expect("not zero"))
    }

    #[test]
    fn every_task_runs_once_on_any_number_of_threads() {
        for threads in [1, 2, 5] {
            let pool = pool(threads);
            for tasks in [0, 1, 2, 3, 1000] {
                for _ in 0..20 {
                    let counts: Vec<_> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                    pool.run(tasks, &|thread, index| {
                        assert!(thread < threads);
                        counts[index].fetch_add(1, Ordering::Relaxed);
                    });
                    assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
                }
            }
        }
    }

    #[test]
    fn workers_wake_from_sleep() {
        let pool = pool(3);
        for _ in 0..3 {
            std::thread::sleep(std::time::Duration::from_millis(20));
            let mut data = vec![0usize; 1001];
            pool.for_each_chunk(&mut data, 10, &|_, index, part| part.fill(index + 1));
            assert!(data.iter().enumerate().all(|(i, &v)| v == i / 10 + 1));
        }
    }

    #[test]
    fn a_panic_in_a_task_reaches_the_caller_and_the_pool_lives_on() {
        let pool = pool(2);
        for bad in 0..8 {
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                pool.run(8, &|_, index| assert!(index != bad, "task {bad}"));
            }));
            assert!(outcome.is_err());
        }
        pool.run(8, &|_, _| {});
    }
}
