//! The engine's thread: who takes part in a step, and what becomes of its logits.

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use mmfree::engine::{Engine, Sequence, Want};
use mmfree::state::State;
use mmfree::tokenizer::Tokenizer;

use super::job::{Client, Event, EventKind, Failure, Job};
use super::logprobs::{TokenLogprob, token_logprob};
use super::prefix_cache::PrefixCache;
use super::writer::{Delivery, Outbox, Outcome, Writer};
use super::{SchedulerOptions, Shared};
use crate::metrics::Metrics;

/// A prompt shorter than this is not worth a place in the prefix cache.
const MIN_CACHED_TOKENS: usize = 16;
/// Besides the end of a prompt, states are remembered every so many tokens.
const CACHE_STRIDE: usize = 256;
/// How often readers are looked after while no step can be taken.
const IDLE_POLL: Duration = Duration::from_millis(5);
/// How often abandoned jobs are swept from the queues.
const SWEEP_STEPS: u64 = 64;

/// A prompt that is being read.
struct Reader {
    job: Job,
    state: State,
    /// The state was not empty: the prompt alone does not say what it stands for.
    goes_on: bool,
    fed: usize,
    cached: usize,
    logprobs: Vec<TokenLogprob>,
}

impl Reader {
    fn is_abandoned(&self) -> bool {
        self.job.events.is_closed()
    }

    /// How many tokens to read next, at most `budget`: up to the next place worth remembering.
    fn chunk(&self, budget: usize, caches: bool) -> usize {
        let left = self.job.prompt.len() - self.fed;
        let mut chunk = left.min(budget);
        if caches && self.is_cacheable() {
            let to_stride = CACHE_STRIDE - self.fed % CACHE_STRIDE;
            chunk = chunk.min(to_stride);
            // The state before the last token serves the same prompt again, whose logits are needed.
            if self.fed + chunk == self.job.prompt.len() && chunk > 1 {
                chunk -= 1;
            }
        }
        chunk
    }

    fn is_cacheable(&self) -> bool {
        !self.goes_on
            && self.job.prompt_logprobs.is_none()
            && self.job.prompt.len() >= MIN_CACHED_TOKENS
    }

    fn is_worth_caching(&self) -> bool {
        self.is_cacheable()
            && (self.fed.is_multiple_of(CACHE_STRIDE) || self.fed + 1 == self.job.prompt.len())
    }
}

/// The engine's thread.
pub(super) struct Worker<'a> {
    engine: Engine,
    tokenizer: Option<&'a Tokenizer>,
    options: SchedulerOptions,
    shared: &'a Shared,
    metrics: &'a Metrics,
    eos: Vec<u32>,
    cache: PrefixCache,
    readers: Vec<Reader>,
    writers: Vec<Writer<'a>>,
    /// Ended texts whose last events have not been taken yet. They hold no place.
    leaving: Vec<Outbox>,
    steps: u64,
}

impl<'a> Worker<'a> {
    pub(super) fn new(
        engine: Engine,
        tokenizer: Option<&'a Tokenizer>,
        options: SchedulerOptions,
        shared: &'a Shared,
        metrics: &'a Metrics,
    ) -> Self {
        let config = engine.model().config();
        let eos = config.eos_token_ids.iter().copied();
        let eos = eos.chain(tokenizer.and_then(Tokenizer::eos)).collect();
        let state_bytes = 4 * config.num_hidden_layers * config.hidden_size;
        Self {
            eos,
            cache: PrefixCache::new(options.prefix_cache_bytes, state_bytes),
            engine,
            tokenizer,
            options,
            shared,
            metrics,
            readers: Vec::new(),
            writers: Vec::new(),
            leaving: Vec::new(),
            steps: 0,
        }
    }

    /// Works until the intake is closed and the last text has ended.
    pub(super) fn run(&mut self) {
        loop {
            if !self.admit() {
                return;
            }
            if self.shared.stop.load(Ordering::Relaxed) {
                self.stop_all();
            }
            let ready = self.deliver();
            let has_stepped = self.step(&ready);
            self.report();
            if !has_stepped {
                self.wait();
            }
        }
    }

    /// Takes new jobs into work; `false` when there will be none and nothing is left to do.
    fn admit(&mut self) -> bool {
        let mut intake = self.shared.intake();
        if self.steps.is_multiple_of(SWEEP_STEPS) {
            intake.remove_abandoned();
        }
        let mut taken =
            self.writers.len() + self.readers.iter().map(|r| r.job.choices.len()).sum::<usize>();
        while let Some(job) = intake.next(self.options.max_texts.saturating_sub(taken)) {
            if job.events.is_closed() {
                job.choices.iter().for_each(|_| intake.release(&job.client));
                continue;
            }
            taken += job.choices.len();
            self.metrics.queue_seconds.observe(job.submitted.elapsed().as_secs_f64());
            for choice in &job.choices {
                let event = Event { choice: choice.index, kind: EventKind::Admitted };
                // There is room: it is the first event.
                let _ = job.events.try_send(event);
            }
            self.readers.push(Self::reader(&mut self.cache, &self.engine, self.metrics, job));
        }
        self.metrics.queued.set(intake.queued() as i64);
        self.metrics.clients.set(intake.clients() as i64);
        let is_idle = self.readers.is_empty() && self.writers.is_empty() && self.leaving.is_empty();
        !(is_idle && intake.is_closed())
    }

    fn reader(cache: &mut PrefixCache, engine: &Engine, metrics: &Metrics, mut job: Job) -> Reader {
        let start = job.start.take();
        let mut reader = Reader {
            goes_on: start.is_some(),
            state: start.unwrap_or_else(|| State::new(engine.model())),
            job,
            fed: 0,
            cached: 0,
            logprobs: Vec::new(),
        };
        if reader.is_cacheable() && cache.is_enabled() {
            match cache.longest(&reader.job.client, &reader.job.prompt) {
                Some((length, state)) => {
                    metrics.prefix_cache_hits.inc();
                    metrics.prefix_cache_tokens.inc_by(length as u64);
                    reader.state = state;
                    reader.fed = length;
                    reader.cached = length;
                }
                None => {
                    metrics.prefix_cache_misses.inc();
                }
            }
        }
        reader
    }

    /// Brings events to the readers and drops the texts nobody waits for. Returns which writers may go on.
    fn deliver(&mut self) -> Vec<bool> {
        let patience = self.options.stall_timeout;
        self.leaving.retain_mut(|outbox| outbox.deliver(patience) == Delivery::Waiting);
        let mut gone = Vec::new();
        let mut ready = Vec::new();
        self.writers.retain_mut(|writer| match writer.outbox.deliver(patience) {
            Delivery::Gone => {
                gone.push(writer.client.clone());
                false
            }
            delivery => {
                ready.push(delivery == Delivery::Done);
                true
            }
        });
        self.readers.retain(|reader| {
            let is_wanted = !reader.is_abandoned();
            if !is_wanted {
                gone.extend(reader.job.choices.iter().map(|_| reader.job.client.clone()));
            }
            is_wanted
        });
        if !gone.is_empty() {
            self.metrics.cancelled.inc_by(gone.len() as u64);
            let mut intake = self.shared.intake();
            gone.iter().for_each(|client| intake.release(client));
        }
        ready
    }

    /// The writers of the next step, by index: all that are ready if they fit, else by turns.
    fn choose_writers(&self, ready: &[bool]) -> Vec<usize> {
        let mut chosen: Vec<usize> = (0..self.writers.len()).filter(|&at| ready[at]).collect();
        if chosen.len() <= self.options.max_batch {
            return chosen;
        }
        chosen.sort_by_key(|&at| self.writers[at].last_step);
        let intake = self.shared.intake();
        let mut turns: HashMap<&Client, u64> = HashMap::new();
        let mut keyed: Vec<(u64, u64, usize)> = chosen
            .into_iter()
            .map(|at| {
                let writer = &self.writers[at];
                let turn =
                    turns.entry(&writer.client).or_insert_with(|| intake.served(&writer.client));
                *turn += 1;
                (*turn, writer.last_step, at)
            })
            .collect();
        drop(intake);
        keyed.sort_unstable();
        keyed.truncate(self.options.max_batch);
        let mut chosen: Vec<usize> = keyed.into_iter().map(|(_, _, at)| at).collect();
        chosen.sort_unstable();
        chosen
    }

    /// How many tokens each prompt gets in the next step. The client that was served least goes first, and
    /// its prompts in the order in which they came.
    fn share_budget(&self, budget: usize) -> Vec<usize> {
        let mut shares = vec![0; self.readers.len()];
        let caches = self.cache.is_enabled();
        let intake = self.shared.intake();
        let mut clients: Vec<(u64, usize)> = Vec::new();
        let mut seen: HashMap<&Client, usize> = HashMap::new();
        for (at, reader) in self.readers.iter().enumerate() {
            if reader.job.prompt_logprobs.is_none() && !seen.contains_key(&reader.job.client) {
                seen.insert(&reader.job.client, at);
                clients.push((intake.served(&reader.job.client), at));
            }
        }
        drop(intake);
        clients.sort_unstable();
        // Equal parts at first; what some do not need goes to whoever is next.
        let mut left = budget;
        let mut part = budget.div_ceil(clients.len().max(1)).max(1);
        while left > 0 {
            let mut has_given = false;
            for &(_, first) in &clients {
                let client = &self.readers[first].job.client;
                let mut quota = part.min(left);
                for (at, reader) in self.readers.iter().enumerate() {
                    let is_theirs = reader.job.client == *client;
                    if quota == 0
                        || !is_theirs
                        || shares[at] > 0
                        || reader.job.prompt_logprobs.is_some()
                    {
                        continue;
                    }
                    let chunk = reader.chunk(quota, caches);
                    shares[at] = chunk;
                    quota -= chunk;
                    left -= chunk;
                    has_given = true;
                }
            }
            if !has_given {
                break;
            }
            part = left;
        }
        shares
    }

    /// Takes one step, if there is anything to do.
    fn step(&mut self, ready: &[bool]) -> bool {
        let chosen = self.choose_writers(ready);
        let budget = if chosen.is_empty() {
            self.options.prefill_tokens.max(CACHE_STRIDE)
        } else {
            self.options.prefill_tokens
        };
        let scored = self.score_prompt(budget);
        let shares = self.share_budget(budget);
        if chosen.is_empty() && shares.iter().all(|&share| share == 0) {
            return scored;
        }
        self.steps += 1;
        let begin = Instant::now();
        let rows = chosen.len() + shares.iter().sum::<usize>();
        let vocab_size = self.engine.model().config().vocab_size;
        let (mut batch, mut wants): (Vec<Sequence>, Vec<Want>) =
            at_places(&mut self.writers, &chosen).map(Writer::part).unzip();
        for (reader, &share) in self.readers.iter_mut().zip(&shares) {
            if share > 0 {
                let end = reader.fed + share;
                let tokens = &reader.job.prompt[reader.fed..end];
                let is_read = end == reader.job.prompt.len();
                batch.push(Sequence { state: &mut reader.state, tokens });
                wants.push(if is_read { Want::Logits } else { Want::Nothing });
            }
        }
        let drawn = match self.engine.forward_and_draw(&mut batch, &mut wants) {
            Ok(drawn) => drawn,
            Err(error) => {
                drop((batch, wants));
                self.fail_all(&Failure::Engine(error.to_string()));
                return true;
            }
        };
        let mut served: HashMap<Client, u64> = HashMap::new();
        let mut advancing = Vec::with_capacity(chosen.len());
        for (writer, drawn) in at_places(&mut self.writers, &chosen).zip(drawn) {
            writer.last_step = self.steps;
            *served.entry(writer.client.clone()).or_default() += 1;
            if let Some(history) = &mut writer.history {
                history.push(writer.next);
            }
            advancing.push((writer, drawn, Outcome::Continues));
        }
        let eos = &self.eos;
        let logits = self.engine.for_each_row(&mut advancing, &|(writer, drawn, outcome), row| {
            *outcome = writer.advance(*drawn, row, eos);
        });
        let ended = advancing.iter().zip(&chosen);
        let ended = ended.filter(|((.., outcome), _)| matches!(outcome, Outcome::Ended));
        let ended: Vec<usize> = ended.map(|(_, &at)| at).collect();
        let mut rows_of_logits = logits.chunks_exact_mut(vocab_size);
        let mut read = Vec::new();
        for (at, &share) in shares.iter().enumerate().filter(|&(_, &share)| share > 0) {
            let Some(row) = rows_of_logits.next() else { break };
            let reader = &mut self.readers[at];
            reader.fed += share;
            *served.entry(reader.job.client.clone()).or_default() += share as u64;
            if reader.fed == reader.job.prompt.len() {
                read.push((at, row.to_vec()));
            } else if reader.is_worth_caching() {
                let known = &reader.job.prompt[..reader.fed];
                let evicted = self.cache.insert(&reader.job.client, known, &reader.state);
                self.metrics.prefix_cache_evictions.inc_by(evicted as u64);
            }
        }
        self.metrics.generated_tokens.inc_by(chosen.len() as u64);
        self.metrics.prompt_tokens.inc_by((rows - chosen.len()) as u64);
        self.metrics.batch_rows.observe(rows as f64);
        self.metrics.step_seconds.observe(begin.elapsed().as_secs_f64());
        {
            let mut intake = self.shared.intake();
            for (client, tokens) in &served {
                intake.serve(client, *tokens);
            }
        }
        for &at in ended.iter().rev() {
            self.end(at);
        }
        for (at, mut logits) in read.into_iter().rev() {
            let reader = self.readers.remove(at);
            self.begin_writing(reader, &mut logits);
        }
        true
    }

    /// Reads a part of one prompt whose log-probabilities are wanted: every position has its logits
    /// computed, so it cannot share a pass with others.
    fn score_prompt(&mut self, budget: usize) -> bool {
        let intake = self.shared.intake();
        let scored = self.readers.iter().enumerate();
        let scored = scored.filter(|(_, reader)| reader.job.prompt_logprobs.is_some());
        let first = scored.min_by_key(|(_, reader)| intake.served(&reader.job.client));
        let Some(at) = first.map(|(at, _)| at) else { return false };
        drop(intake);
        self.steps += 1;
        let reader = &mut self.readers[at];
        let prompt = &reader.job.prompt;
        let count = reader.job.prompt_logprobs.unwrap_or(0);
        let fed = reader.fed;
        let chunk = &prompt[fed..prompt.len().min(fed + budget)];
        let mut last = Vec::new();
        let logprobs = &mut reader.logprobs;
        let outcome = self.engine.logits(&mut reader.state, chunk, &mut |position, logits| {
            match prompt.get(fed + position + 1) {
                Some(&next) => logprobs.push(token_logprob(logits, next, count)),
                None => last = logits.to_vec(),
            }
            Ok(())
        });
        reader.fed += chunk.len();
        let (client, tokens) = (reader.job.client.clone(), chunk.len() as u64);
        let is_read = reader.fed == prompt.len();
        self.shared.intake().serve(&client, tokens);
        self.metrics.prompt_tokens.inc_by(tokens);
        if outcome.is_err() || is_read {
            let reader = self.readers.remove(at);
            match outcome {
                Ok(()) => self.begin_writing(reader, &mut last),
                Err(error) => self.fail_reader(reader, &Failure::Engine(error.to_string())),
            }
        }
        true
    }

    /// The prompt is read, and these are the logits behind it: draws the first token of each text.
    fn begin_writing(&mut self, mut reader: Reader, logits: &mut [f32]) {
        let history = (reader.is_cacheable() && self.cache.is_enabled())
            .then(|| std::mem::take(&mut reader.job.prompt));
        let prompt: &[u32] = history.as_deref().unwrap_or(&reader.job.prompt);
        let Job { client, options, events, choices, .. } = reader.job;
        let count = choices.len();
        let mut logprobs = reader.logprobs;
        for (at, choice) in choices.into_iter().enumerate() {
            let writer = Writer::new(
                client.clone(),
                choice,
                options.clone(),
                self.tokenizer,
                reader.state.clone(),
                prompt,
                events.clone(),
            );
            let mut writer = match writer {
                Ok(writer) => writer,
                Err(error) => {
                    // Options are checked before they come here.
                    tracing::error!(%error, "a text could not be begun");
                    self.shared.intake().release(&client);
                    continue;
                }
            };
            writer.outbox.push(EventKind::PromptRead {
                cached_tokens: reader.cached,
                logprobs: if at == 0 { std::mem::take(&mut logprobs) } else { Vec::new() },
            });
            if at == 0 {
                writer.history.clone_from(&history);
            }
            let outcome = if at + 1 == count {
                writer.advance(None, logits, &self.eos)
            } else {
                writer.advance(None, &mut logits.to_vec(), &self.eos)
            };
            self.writers.push(writer);
            if let Outcome::Ended = outcome {
                self.end(self.writers.len() - 1);
            }
        }
    }

    /// Gives the place of a text back; its last events may still have to be taken.
    fn end(&mut self, at: usize) {
        let writer = self.writers.swap_remove(at);
        if let Some(history) = &writer.history
            && writer.drawn() > 0
        {
            let evicted = self.cache.insert(&writer.client, history, &writer.state);
            self.metrics.prefix_cache_evictions.inc_by(evicted as u64);
        }
        self.shared.intake().release(&writer.client);
        let mut outbox = writer.outbox;
        if outbox.deliver(self.options.stall_timeout) == Delivery::Waiting {
            self.leaving.push(outbox);
        }
    }

    fn fail_reader(&mut self, reader: Reader, failure: &Failure) {
        for choice in &reader.job.choices {
            let mut outbox = Outbox::new(choice.index, reader.job.events.clone());
            outbox.push(EventKind::Failed(failure.clone()));
            if outbox.deliver(self.options.stall_timeout) == Delivery::Waiting {
                self.leaving.push(outbox);
            }
            self.shared.intake().release(&reader.job.client);
        }
    }

    /// The engine failed, or there is no more time: nothing in work can go on.
    fn fail_all(&mut self, failure: &Failure) {
        tracing::error!(?failure, "every text in work is ended");
        for reader in std::mem::take(&mut self.readers) {
            self.fail_reader(reader, failure);
        }
        while let Some(at) = self.writers.len().checked_sub(1) {
            self.writers[at].history = None;
            self.writers[at].fail(failure.clone());
            self.end(at);
        }
    }

    /// Ends every text where it is.
    fn stop_all(&mut self) {
        for reader in std::mem::take(&mut self.readers) {
            self.fail_reader(reader, &Failure::ShuttingDown);
        }
        while let Some(at) = self.writers.len().checked_sub(1) {
            self.writers[at].stop();
            self.end(at);
        }
    }

    fn report(&self) {
        let metrics = self.metrics;
        metrics.running.set(self.writers.len() as i64);
        metrics.reading.set(self.readers.len() as i64);
        metrics.prefix_cache_states.set(self.cache.len() as i64);
        metrics.prefix_cache_bytes.set(self.cache.bytes() as i64);
    }

    /// Sleeps until there may be something to do.
    fn wait(&mut self) {
        let intake = self.shared.intake();
        let is_idle = self.readers.is_empty() && self.writers.is_empty() && self.leaving.is_empty();
        if is_idle && (intake.queued() > 0 || intake.is_closed()) {
            return;
        }
        if is_idle {
            self.steps = self.steps.next_multiple_of(SWEEP_STEPS);
            // Woken by every new job and by the end.
            let _ = self.shared.wake.wait_timeout(intake, Duration::from_secs(1));
        } else {
            let _ = self.shared.wake.wait_timeout(intake, IDLE_POLL);
        }
    }
}

/// The items at some places, which ascend.
fn at_places<'a, T>(items: &'a mut [T], places: &'a [usize]) -> impl Iterator<Item = &'a mut T> {
    let mut places = places.iter().peekable();
    items
        .iter_mut()
        .enumerate()
        .filter_map(move |(at, item)| places.next_if(|&&place| place == at).map(|_| item))
}
