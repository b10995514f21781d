//! Queues of the clients, and whose turn it is.
//!
//! Turns go by tokens: each client has a count of the tokens that were read and drawn for it, and the one with
//! the lowest count is next, for a place, for a part of the prompt budget, and for a row of a full batch. Who
//! comes anew starts at the lowest count of those who are there, so that rest is no credit.

use std::collections::{HashMap, VecDeque};

use super::job::{Client, Job};

/// Bounds of the queues.
#[derive(Clone, Copy, Debug)]
pub(crate) struct QueueLimits {
    /// Jobs that one client may have waiting.
    pub per_client: usize,
    /// Jobs that all clients may have waiting.
    pub total: usize,
    /// Texts that one client may have in work and waiting.
    pub texts_per_client: usize,
}

/// Why a job was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// This client has too much waiting.
    ClientQueue,
    /// This client has too many texts at once.
    ClientTexts,
    /// All queues together are full.
    Full,
    /// The server is shutting down, or its engine has failed.
    Closed,
}

/// The queues.
pub(crate) struct Intake {
    limits: QueueLimits,
    clients: HashMap<Client, Account>,
    queued: usize,
    is_closed: bool,
}

#[derive(Default)]
struct Account {
    queue: VecDeque<Job>,
    /// Texts in the queue and in work.
    texts: usize,
    /// Tokens served, the measure of fairness.
    served: u64,
}

impl Intake {
    pub(crate) fn new(limits: QueueLimits) -> Self {
        Self { limits, clients: HashMap::new(), queued: 0, is_closed: false }
    }

    /// Queues jobs, all or none.
    pub(crate) fn submit(&mut self, jobs: Vec<Job>) -> Result<(), Refusal> {
        let Some(client) = jobs.first().map(|job| job.client.clone()) else { return Ok(()) };
        let texts: usize = jobs.iter().map(|job| job.choices.len()).sum();
        let floor = self.clients.values().map(|account| account.served).min().unwrap_or(0);
        let (waiting, held) = self
            .clients
            .get(&client)
            .map_or((0, 0), |account| (account.queue.len(), account.texts));
        if self.is_closed {
            return Err(Refusal::Closed);
        }
        if held + texts > self.limits.texts_per_client {
            return Err(Refusal::ClientTexts);
        }
        if waiting + jobs.len() > self.limits.per_client {
            return Err(Refusal::ClientQueue);
        }
        if self.queued + jobs.len() > self.limits.total {
            return Err(Refusal::Full);
        }
        self.queued += jobs.len();
        let account = self
            .clients
            .entry(client)
            .or_insert_with(|| Account { served: floor, ..Account::default() });
        account.texts += texts;
        account.queue.extend(jobs);
        Ok(())
    }

    /// The next job that has at most `places` texts: of the client that was served least.
    pub(crate) fn next(&mut self, places: usize) -> Option<Job> {
        let fits = |account: &Account| {
            account.queue.front().is_some_and(|job| job.choices.len() <= places)
        };
        let candidates = self.clients.values_mut().filter(|account| fits(account));
        let account = candidates.min_by_key(|account| account.served)?;
        let job = account.queue.pop_front()?;
        self.queued -= 1;
        Some(job)
    }

    /// Takes away the jobs whose readers have gone.
    pub(crate) fn remove_abandoned(&mut self) {
        for account in self.clients.values_mut() {
            account.queue.retain(|job| {
                let is_wanted = !job.events.is_closed();
                if !is_wanted {
                    account.texts -= job.choices.len();
                    self.queued -= 1;
                }
                is_wanted
            });
        }
        self.clients.retain(|_, account| account.texts > 0);
    }

    /// Tokens served to a client.
    pub(crate) fn served(&self, client: &Client) -> u64 {
        self.clients.get(client).map_or(0, |account| account.served)
    }

    /// Counts tokens that were read or drawn for a client.
    pub(crate) fn serve(&mut self, client: &Client, tokens: u64) {
        if let Some(account) = self.clients.get_mut(client) {
            account.served += tokens;
        }
    }

    /// Gives back the place of a text.
    pub(crate) fn release(&mut self, client: &Client) {
        if let Some(account) = self.clients.get_mut(client) {
            account.texts -= 1;
            if account.texts == 0 {
                self.clients.remove(client);
            }
        }
    }

    /// Takes no more jobs; returns those that were waiting.
    pub(crate) fn close(&mut self) -> Vec<Job> {
        self.is_closed = true;
        let jobs = self.clients.values_mut().flat_map(|account| account.queue.drain(..)).collect();
        self.queued = 0;
        jobs
    }

    /// Whether no more jobs are taken.
    pub(crate) fn is_closed(&self) -> bool {
        self.is_closed
    }

    /// Jobs that wait.
    pub(crate) fn queued(&self) -> usize {
        self.queued
    }

    /// Clients with anything waiting or in work.
    pub(crate) fn clients(&self) -> usize {
        self.clients.len()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Instant;

    use super::super::job::Choice;
    use super::*;

    fn job(
        client: &str,
        texts: usize,
    ) -> (Job, tokio::sync::mpsc::Receiver<super::super::job::Event>) {
        let (events, receiver) = tokio::sync::mpsc::channel(1);
        let choice = |index| Choice { index, seed: 0, constraint: None };
        let job = Job {
            client: Client(client.into()),
            prompt: vec![1],
            start: None,
            prompt_logprobs: None,
            choices: (0..texts).map(choice).collect(),
            options: Arc::default(),
            events,
            submitted: Instant::now(),
        };
        (job, receiver)
    }

    fn intake() -> Intake {
        Intake::new(QueueLimits { per_client: 4, total: 6, texts_per_client: 8 })
    }

    #[test]
    fn the_client_served_least_is_next() {
        let mut intake = intake();
        let mut readers = Vec::new();
        for client in ["a", "a", "a", "b"] {
            let (job, reader) = job(client, 1);
            readers.push(reader);
            intake.submit(vec![job]).unwrap();
        }
        let mut order = Vec::new();
        while let Some(job) = intake.next(8) {
            intake.serve(&job.client, 10);
            order.push(job.client.0.to_string());
        }
        order[..2].sort();
        assert_eq!(order, ["a", "b", "a", "a"]);
    }

    #[test]
    fn bounds_hold_and_abandoned_jobs_leave_nothing() {
        let mut intake = intake();
        let mut readers = Vec::new();
        for _ in 0..4 {
            let (job, reader) = job("a", 1);
            readers.push(reader);
            intake.submit(vec![job]).unwrap();
        }
        assert_eq!(intake.submit(vec![job("a", 1).0]), Err(Refusal::ClientQueue));
        assert_eq!(intake.submit(vec![job("b", 9).0]), Err(Refusal::ClientTexts));
        for client in ["b", "c"] {
            let (job, reader) = job(client, 1);
            readers.push(reader);
            intake.submit(vec![job]).unwrap();
        }
        assert_eq!(intake.submit(vec![job("d", 1).0]), Err(Refusal::Full));
        drop(readers);
        intake.remove_abandoned();
        assert_eq!((intake.queued(), intake.clients()), (0, 0));
        intake.close();
        assert_eq!(intake.submit(vec![job("a", 1).0]), Err(Refusal::Closed));
    }
}
