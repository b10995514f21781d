//! Log-likelihoods of continuations.
//!
//! The recurrent model reads what the requests of a group have in common once: its state behind the common
//! tokens is saved, and each request goes on from a copy. Groups are packed into passes that keep the machine
//! busy.

use serde::Serialize;

use super::request::Request;
use crate::engine::{Engine, Sequence, TokenScore, WantedRow};
use crate::error::Result;
use crate::state::State;

/// Log-likelihood of a continuation.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Score {
    /// `Σ_t ln P(continuation[t] | everything before)`, in nats.
    pub log_likelihood: f64,
    /// Whether every token of it is the most likely one.
    pub is_greedy: bool,
    /// Its tokens.
    pub tokens: usize,
}

impl Score {
    /// The score of no token.
    pub const NOTHING: Self = Self { log_likelihood: 0.0, is_greedy: true, tokens: 0 };

    /// Adds the next token.
    pub fn add(&mut self, token: TokenScore) {
        self.log_likelihood += token.log_likelihood;
        self.is_greedy &= token.is_greedy;
        self.tokens += 1;
    }
}

/// Called with the number of requests done so far; an error stops the work.
pub type Tick<'a> = dyn FnMut(usize) -> Result<()> + 'a;

/// A model that judges continuations.
pub trait Scorer {
    /// What computes, in one line.
    fn describe(&self) -> String;

    /// V.
    fn vocab_size(&self) -> usize;

    /// Tokens that the model can read; `None` if there is no limit.
    fn window(&self) -> Option<usize>;

    /// Scores of all requests, group by group. Requests of a group should have their first tokens in common.
    ///
    /// # Errors
    /// Ids outside the vocabulary, logits that are not finite, whatever `tick` reports.
    fn score(&mut self, groups: &[Vec<Request>], tick: &mut Tick<'_>) -> Result<Vec<Vec<Score>>>;

    /// Goes on with a text of any length: the score of `tokens` after everything that was read since
    /// [`restart`](Self::restart). `None` if the model needs windows.
    ///
    /// # Errors
    /// As [`score`](Self::score).
    fn roll(&mut self, tokens: &[u32]) -> Result<Option<Score>>;

    /// Begins another text with its first token, which is read and not judged.
    fn restart(&mut self, first: u32);
}

/// Groups whose states and tokens exist at a time, in tokens.
const BLOCK_TOKENS: usize = 16_384;

/// The MatMul-free model.
#[derive(Debug)]
pub struct EngineScorer {
    engine: Engine,
    /// State of the text that [`Scorer::roll`] reads, and its last token, which the state has not seen.
    rolling: Option<(State, u32)>,
}

impl EngineScorer {
    /// A scorer that runs an engine.
    pub fn new(engine: Engine) -> Self {
        Self { engine, rolling: None }
    }
}

/// Some tokens to be read from a state, and which tokens may follow which of them.
struct Job {
    state: State,
    tokens: Vec<u32>,
    /// Token number in the job, and what may follow.
    wanted: Vec<WantedRow>,
    scores: Vec<TokenScore>,
}

impl Job {
    fn new(state: State, tokens: &[u32]) -> Self {
        Self { state, tokens: tokens.to_vec(), wanted: Vec::new(), scores: Vec::new() }
    }
}

/// Tokens that all requests of a group begin with, and that none of them ends with.
fn common_tokens(group: &[Request]) -> usize {
    let Some((first, rest)) = group.split_first() else { return 0 };
    let limit = group.iter().map(|request| request.tokens.len() - 1).min().unwrap_or(0);
    let common = |request: &Request| {
        let pairs = first.tokens.iter().zip(&request.tokens);
        pairs.take_while(|(a, b)| a == b).count()
    };
    rest.iter().map(common).fold(limit, usize::min)
}

impl EngineScorer {
    /// Runs jobs, packed into passes.
    fn run(&mut self, jobs: &mut [Job], tick: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        let pass_rows = self.engine.chunk_rows();
        // Next job, and how much of it is done.
        let (mut next, mut done) = (0, 0);
        while next < jobs.len() {
            tick()?;
            let (mut rows, mut end, first_done) = (0, next, done);
            let mut pieces = Vec::new();
            while end < jobs.len() && rows < pass_rows {
                let from = if end == next { first_done } else { 0 };
                let take = (jobs[end].tokens.len() - from).min(pass_rows - rows);
                pieces.push(from..from + take);
                rows += take;
                end += 1;
            }
            let mut wanted = Vec::new();
            let mut start = 0;
            for (job, piece) in jobs[next..end].iter().zip(&pieces) {
                wanted.extend(job.wanted.iter().filter(|w| piece.contains(&w.row)).map(|w| {
                    WantedRow { row: start + w.row - piece.start, targets: w.targets.clone() }
                }));
                start += piece.len();
            }
            let mut batch: Vec<_> = jobs[next..end]
                .iter_mut()
                .zip(&pieces)
                .map(|(job, piece)| Sequence {
                    state: &mut job.state,
                    tokens: &job.tokens[piece.clone()],
                })
                .collect();
            let mut scores = self.engine.log_likelihoods(&mut batch, &wanted)?.into_iter();
            for (job, piece) in jobs[next..end].iter_mut().zip(&pieces) {
                let inside = job.wanted.iter().filter(|w| piece.contains(&w.row));
                let count = inside.map(|wanted| wanted.targets.len()).sum();
                job.scores.extend(scores.by_ref().take(count));
            }
            let last = pieces.last().map_or(0, |piece| piece.end);
            let is_whole = jobs[end - 1].tokens.len() == last;
            (next, done) = if is_whole { (end, 0) } else { (end - 1, last) };
        }
        Ok(())
    }

    /// Scores some groups at a time.
    fn block(
        &mut self,
        groups: &[Vec<Request>],
        tick: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Vec<Vec<Score>>> {
        let model = self.engine.model().clone();
        let common: Vec<usize> = groups.iter().map(|group| common_tokens(group)).collect();
        // What requests share. Where the wanted rows of several fall on one, it has all their targets.
        let mut prefixes = Vec::new();
        for (group, &common) in groups.iter().zip(&common) {
            let Some(first) = group.first() else { continue };
            let mut job = Job::new(State::new(&model), &first.tokens[..common]);
            let from = group.iter().map(|request| request.context).min().unwrap_or(1) - 1;
            for row in from..common {
                let targets: Vec<u32> = group
                    .iter()
                    .filter(|request| row + 1 >= request.context)
                    .map(|request| request.tokens[row + 1])
                    .collect();
                job.wanted.push(WantedRow { row, targets });
            }
            prefixes.push(job);
        }
        prefixes.retain(|job| !job.tokens.is_empty());
        self.run(&mut prefixes, tick)?;
        let mut prefixes = prefixes.into_iter();
        let mut branches = Vec::new();
        let mut scores = Vec::with_capacity(groups.len());
        for (group, &common) in groups.iter().zip(&common) {
            let mut group_scores = vec![Score::NOTHING; group.len()];
            let prefix = if common > 0 { prefixes.next() } else { None };
            if let Some(prefix) = &prefix {
                let mut tokens = prefix.scores.iter();
                for row in prefix.wanted.iter().map(|wanted| wanted.row) {
                    let judged = group.iter().zip(&mut group_scores);
                    for (_, score) in judged.filter(|(request, _)| row + 1 >= request.context) {
                        if let Some(&token) = tokens.next() {
                            score.add(token);
                        }
                    }
                }
            }
            for request in group {
                let rest = &request.tokens[common..request.tokens.len() - 1];
                if rest.is_empty() {
                    continue;
                }
                let state = prefix.as_ref().map(|prefix| prefix.state.clone());
                let mut job = Job::new(state.unwrap_or_else(|| State::new(&model)), rest);
                let from = (request.context - 1).saturating_sub(common);
                job.wanted.extend((from..rest.len()).map(|row| {
                    let targets = vec![request.tokens[common + row + 1]];
                    WantedRow { row, targets }
                }));
                branches.push(job);
            }
            scores.push(group_scores);
        }
        self.run(&mut branches, tick)?;
        let mut branches = branches.into_iter();
        for ((group, &common), scores) in groups.iter().zip(&common).zip(&mut scores) {
            for (request, score) in group.iter().zip(scores) {
                if request.tokens.len() - 1 > common
                    && let Some(job) = branches.next()
                {
                    job.scores.into_iter().for_each(|token| score.add(token));
                }
            }
        }
        Ok(scores)
    }
}

impl Scorer for EngineScorer {
    fn describe(&self) -> String {
        self.engine.describe()
    }

    fn vocab_size(&self) -> usize {
        self.engine.model().config().vocab_size
    }

    fn window(&self) -> Option<usize> {
        None
    }

    fn score(&mut self, groups: &[Vec<Request>], tick: &mut Tick<'_>) -> Result<Vec<Vec<Score>>> {
        let mut scores = Vec::with_capacity(groups.len());
        let (mut first, mut done) = (0, 0);
        while first < groups.len() {
            let mut tokens = 0;
            let mut end = first;
            while end < groups.len() && (end == first || tokens < BLOCK_TOKENS) {
                tokens += groups[end].iter().map(|request| request.tokens.len()).sum::<usize>();
                end += 1;
            }
            let block = &groups[first..end];
            scores.extend(self.block(block, &mut || tick(done))?);
            done += block.iter().map(Vec::len).sum::<usize>();
            tick(done)?;
            first = end;
        }
        Ok(scores)
    }

    fn roll(&mut self, tokens: &[u32]) -> Result<Option<Score>> {
        let mut score = Score::NOTHING;
        let Some((state, last)) = &mut self.rolling else { return Ok(None) };
        for chunk in tokens.chunks(self.engine.chunk_rows()) {
            let read: Vec<u32> =
                std::iter::once(*last).chain(chunk[..chunk.len() - 1].iter().copied()).collect();
            let wanted: Vec<_> = chunk
                .iter()
                .enumerate()
                .map(|(row, &target)| WantedRow { row, targets: vec![target] })
                .collect();
            let mut batch = [Sequence { state, tokens: &read }];
            let scores = self.engine.log_likelihoods(&mut batch, &wanted)?;
            scores.into_iter().for_each(|token| score.add(token));
            *last = chunk[chunk.len() - 1];
        }
        Ok(Some(score))
    }

    fn restart(&mut self, first: u32) {
        self.rolling = Some((State::new(self.engine.model()), first));
    }
}
