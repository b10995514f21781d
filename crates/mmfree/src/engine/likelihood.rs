//! Log-probabilities of given tokens, without handing out the logits.

use std::num::NonZeroUsize;
use std::thread;

use mmfree_kernels::cross_entropy;
use mmfree_kernels::pool::Pool;
use mmfree_kernels::tier::Backend;

use super::{Engine, Executor, Sequence};
use crate::error::{Error, Result};

/// Rows whose logits exist at a time.
const HEAD_ROWS: usize = 128;

/// A row of a pass whose logits are wanted, and the tokens that may follow it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WantedRow {
    /// Number of the row in the pass: all sequences' tokens in order.
    pub row: usize,
    /// At least one token.
    pub targets: Vec<u32>,
}

/// What a model thinks of a token at its place.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct TokenScore {
    /// `z[target] − ln Σ_v exp(z[v])`, in nats.
    pub log_likelihood: f64,
    /// Whether no token is more likely (of equals, the lowest id counts as the most likely).
    pub is_greedy: bool,
}

impl TokenScore {
    /// The score of `target` where the logits are `logits` and `ln Σ exp(z)` is `log_sum`.
    fn new(logits: &[f32], target: u32, log_sum: f64) -> Self {
        let target = target as usize;
        let z = logits[target];
        let beaten = logits[..target].iter().fold(false, |beaten, &other| beaten | (other >= z))
            || logits[target..].iter().fold(false, |beaten, &other| beaten | (other > z));
        Self { log_likelihood: f64::from(z) - log_sum, is_greedy: !beaten }
    }

    /// The score of `target` after a row of logits, in f64.
    pub fn of(logits: &[f32], target: u32) -> Self {
        let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = logits.iter().map(|&z| f64::from(z - largest).exp()).sum();
        Self::new(logits, target, sum.ln() + f64::from(largest))
    }
}

impl Engine {
    /// Feeds each sequence its tokens, all in one pass, and returns the score of every target of every
    /// wanted row, in their order. Rows are named in rising order. The pass should not have many more than
    /// a thousand tokens: the working memory is proportional to them.
    ///
    /// # Errors
    /// A sequence without tokens, an id outside the vocabulary, a row that the pass does not have (all
    /// states are then unchanged), logits that are not finite.
    pub fn log_likelihoods(
        &mut self,
        batch: &mut [Sequence<'_>],
        wanted: &[WantedRow],
    ) -> Result<Vec<TokenScore>> {
        batch.iter().try_for_each(|sequence| self.check_tokens(sequence.tokens))?;
        let rows: usize = batch.iter().map(|sequence| sequence.tokens.len()).sum();
        for wanted in wanted {
            self.check_tokens(&wanted.targets)?;
        }
        let rises = wanted.windows(2).all(|pair| pair[0].row < pair[1].row);
        if !rises || wanted.last().is_some_and(|last| last.row >= rows) {
            return Err(Error::Invalid(format!(
                "rows must be named in rising order, and there are {rows}"
            )));
        }
        self.run_blocks(batch, None)?;
        let vocab_size = self.model.config().vocab_size;
        let mut scores = Vec::with_capacity(wanted.len());
        if let Executor::Cpu(engine) = &mut self.executor {
            engine.gather(wanted.iter().map(|wanted| wanted.row));
        }
        for (number, part) in wanted.chunks(HEAD_ROWS).enumerate() {
            let first = number * HEAD_ROWS;
            match &mut self.executor {
                Executor::Cpu(engine) => {
                    engine.head(first..first + part.len())?;
                    let (backend, pool, logits) = engine.logits_and_pool();
                    score_rows(backend, pool, logits, vocab_size, part, &mut scores);
                }
                Executor::Cuda(engine) => {
                    let rows: Vec<u32> = part.iter().map(|wanted| wanted.row as u32).collect();
                    engine.pick_head(&rows)?;
                    let threads = thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
                    let pool = self.host_pool.get_or_insert_with(|| Pool::new(threads));
                    let logits = &mut engine.logits;
                    score_rows(Backend::detect(), pool, logits, vocab_size, part, &mut scores);
                }
            }
        }
        Ok(scores)
    }
}

/// Scores the targets of rows of logits [rows, V], which are undefined afterwards.
fn score_rows(
    backend: Backend,
    pool: &Pool,
    logits: &mut [f32],
    vocab_size: usize,
    wanted: &[WantedRow],
    scores: &mut Vec<TokenScore>,
) {
    let begin = scores.len();
    // Relative to a log sum of 0; the kernel overwrites the logits.
    for (logits, wanted) in logits.chunks_exact(vocab_size).zip(wanted) {
        scores.extend(wanted.targets.iter().map(|&target| TokenScore::new(logits, target, 0.0)));
    }
    let firsts: Vec<u32> = wanted.iter().map(|wanted| wanted.targets[0]).collect();
    let mut losses = vec![0.0; wanted.len()];
    cross_entropy::forward_backward(backend, pool, logits, &firsts, None, &mut losses);
    let mut scores = scores[begin..].iter_mut();
    for (wanted, loss) in wanted.iter().zip(losses) {
        let mut log_sum = None;
        for score in scores.by_ref().take(wanted.targets.len()) {
            let log_sum = *log_sum.get_or_insert(loss + score.log_likelihood);
            score.log_likelihood -= log_sum;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_are_log_softmax_and_ties_go_to_the_lowest_id() {
        let logits = [1.0, 3.0, -2.0, 3.0, 0.5];
        let sum: f64 = logits.iter().map(|&z: &f32| f64::from(z).exp()).sum();
        for (target, is_greedy) in [(0, false), (1, true), (2, false), (3, false), (4, false)] {
            let score = TokenScore::of(&logits, target);
            let expected = f64::from(logits[target as usize]) - sum.ln();
            assert!((score.log_likelihood - expected).abs() < 1e-12);
            assert_eq!(score.is_greedy, is_greedy, "{target}");
        }
    }

    #[test]
    fn rows_with_several_targets_share_their_sum() {
        let rows: Vec<f32> = (0..21).map(|i| ((i * 7919) % 13) as f32 * 0.7 - 3.0).collect();
        let wanted: Vec<_> = [vec![0, 6, 3], vec![2], vec![5, 5]]
            .into_iter()
            .enumerate()
            .map(|(row, targets)| WantedRow { row, targets })
            .collect();
        let mut scores = vec![TokenScore { log_likelihood: 0.0, is_greedy: false }];
        let pool = Pool::new(NonZeroUsize::MIN);
        score_rows(Backend::detect(), &pool, &mut rows.clone(), 7, &wanted, &mut scores);
        let expected: Vec<_> = wanted
            .iter()
            .flat_map(|w| w.targets.iter().map(|&t| TokenScore::of(&rows[w.row * 7..][..7], t)))
            .collect();
        assert_eq!(scores.len(), 1 + expected.len());
        for (score, expected) in scores[1..].iter().zip(expected) {
            assert!((score.log_likelihood - expected.log_likelihood).abs() < 1e-5);
            assert_eq!(score.is_greedy, expected.is_greedy);
        }
    }
}
