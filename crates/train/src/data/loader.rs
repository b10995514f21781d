//! Batches as a pure function of seed and step.

use std::ops::Range;
use std::sync::Arc;

use mmfree::error::{Error, Result};

use super::dataset::{Dataset, containing};
use super::held_out::Part;
use super::permutation::{Permutation, mix};

/// What a loader takes from a dataset, and how.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LoaderOptions {
    /// T: tokens of a sequence.
    pub seq_len: usize,
    /// B: sequences of a global batch, over all processes and all steps of gradient accumulation.
    pub batch_size: usize,
    /// Which documents.
    pub part: Part,
    /// In which order.
    pub order: Order,
}

/// The order of sequences.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Without end; every epoch has each sequence once, in an order of its own.
    Epochs {
        /// Chooses the orders.
        seed: u64,
    },
    /// Each sequence once, in one shuffled order that is always the same, so that the first few batches
    /// stand for all. For evaluation.
    Once,
}

/// Batches of token ids from a [`Dataset`].
///
/// The documents are packed: they follow each other without padding, each with the tokens that its tokenizer
/// puts around it, and the stream is cut into sequences. Sequence w has the tokens wT to wT+T, of which the first
/// T are inputs and the last T are targets, so every token but the first of the stream is a target once an
/// epoch, and at most T of them at the end are not used.
///
/// Nothing is kept between calls: [`batch`](Self::batch) is a pure function, so that a run resumes in the
/// middle of an epoch by asking for its next step, and any number of processes sees the same global batch.
#[derive(Clone, Debug)]
pub struct Loader {
    dataset: Arc<Dataset>,
    options: LoaderOptions,
    /// Ranges of the dataset's stream that are concatenated.
    ranges: Vec<Range<u64>>,
    /// Where each range begins in the concatenation, and its end.
    starts: Vec<u64>,
    /// Sequences in it.
    sequences: u64,
}

/// Some sequences.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// Sequences here.
    pub rows: usize,
    /// T.
    pub seq_len: usize,
    /// Input ids, \[rows, T\].
    pub ids: Vec<u32>,
    /// The token that follows each input, \[rows, T\].
    pub targets: Vec<u32>,
}

/// Fixed order of evaluation.
const EVALUATION_SEED: u64 = 0x6576_616c;

impl Loader {
    /// Prepares sequences.
    ///
    /// # Errors
    /// Sizes of zero, a share of held-out documents outside 0 to 1, or fewer than T + 1 tokens.
    pub fn new(dataset: Arc<Dataset>, options: LoaderOptions) -> Result<Self> {
        let LoaderOptions { seq_len, batch_size, part, .. } = options;
        if seq_len == 0 || batch_size == 0 {
            let what =
                format!("{batch_size} sequences of {seq_len} tokens; both must be at least 1");
            return Err(Error::Invalid(what));
        }
        if let Part::Training { held_out } | Part::HeldOut { held_out } = part
            && !(0.0..=1.0).contains(&held_out)
        {
            return Err(Error::Invalid(format!("held out {held_out}; expected a share, 0 to 1")));
        }
        let ranges = part.ranges(&dataset);
        let mut starts = vec![0];
        for range in &ranges {
            starts.push(starts[starts.len() - 1] + (range.end - range.start));
        }
        let tokens = starts[starts.len() - 1];
        let sequences = tokens.saturating_sub(1) / seq_len as u64;
        if sequences == 0 {
            let what = match part {
                Part::All => "",
                Part::Training { .. } => " outside its held-out part",
                Part::HeldOut { .. } => " in its held-out part",
            };
            return Err(Error::Malformed {
                file: dataset.label().to_owned(),
                what: format!(
                    "the corpus has {tokens} tokens{what} (of {}, in {} documents); a sequence of \
                     {seq_len} and its last target need {}",
                    dataset.tokens(),
                    dataset.documents(),
                    seq_len + 1
                ),
            });
        }
        Ok(Self { dataset, options, ranges, starts, sequences })
    }

    /// Sequences of an epoch.
    pub fn sequences(&self) -> u64 {
        self.sequences
    }

    /// Tokens of the documents that this loader takes from.
    pub fn tokens(&self) -> u64 {
        self.starts[self.starts.len() - 1]
    }

    /// Steps that take every sequence once; the last one may begin the next epoch, or with [`Order::Once`] be
    /// smaller than the others.
    pub fn steps_per_epoch(&self) -> u64 {
        self.sequences.div_ceil(self.options.batch_size as u64)
    }

    /// Epoch of a step's first sequence, from 0.
    pub fn epoch(&self, step: u64) -> u64 {
        let first = u128::from(step) * self.options.batch_size as u128;
        (first / u128::from(self.sequences)) as u64
    }

    /// Sequences in the global batch of a step: the batch size, or with [`Order::Once`] what is left.
    pub fn batch_rows(&self, step: u64) -> usize {
        let size = self.options.batch_size;
        match self.options.order {
            Order::Epochs { .. } => size,
            Order::Once => {
                let before = step.saturating_mul(size as u64);
                self.sequences.saturating_sub(before).min(size as u64) as usize
            }
        }
    }

    /// The share of a step's global batch that belongs to process `rank` of `world`. The shares follow each
    /// other: together, in the order of ranks, they are the batch of one process alone.
    ///
    /// # Errors
    /// A shard that turns out to be corrupt.
    ///
    /// # Panics
    /// If `rank` is not below `world`.
    pub fn batch(&self, step: u64, rank: usize, world: usize) -> Result<Batch> {
        self.rows(step, share(self.batch_rows(step), rank, world))
    }

    /// Some rows of a step's global batch, as for one step of gradient accumulation.
    ///
    /// # Errors
    /// A shard that turns out to be corrupt.
    ///
    /// # Panics
    /// If the batch has fewer rows.
    pub fn rows(&self, step: u64, rows: Range<usize>) -> Result<Batch> {
        assert!(rows.end <= self.batch_rows(step), "rows {rows:?} of step {step}");
        let seq_len = self.options.seq_len;
        let mut batch = Batch {
            rows: rows.len(),
            seq_len,
            ids: Vec::with_capacity(rows.len() * seq_len),
            targets: Vec::with_capacity(rows.len() * seq_len),
        };
        let mut tokens = Vec::with_capacity(seq_len + 1);
        for row in rows {
            let position = u128::from(step) * self.options.batch_size as u128 + row as u128;
            tokens.clear();
            self.read(self.sequence_at(position), &mut tokens)?;
            batch.ids.extend(&tokens[..seq_len]);
            batch.targets.extend(&tokens[1..]);
        }
        Ok(batch)
    }

    /// Which sequence comes at a position of the order.
    fn sequence_at(&self, position: u128) -> u64 {
        let sequences = u128::from(self.sequences);
        let (epoch, index) = ((position / sequences) as u64, (position % sequences) as u64);
        let seed = match self.options.order {
            Order::Epochs { seed } => seed,
            Order::Once => EVALUATION_SEED,
        };
        Permutation::new(self.sequences, mix(mix(seed) ^ epoch)).apply(index)
    }

    /// Appends the T + 1 tokens of a sequence.
    fn read(&self, sequence: u64, out: &mut Vec<u32>) -> Result<()> {
        let mut start = sequence * self.options.seq_len as u64;
        let end = start + self.options.seq_len as u64 + 1;
        while start < end {
            let index = containing(&self.starts, start);
            let (range, first) = (&self.ranges[index], self.starts[index]);
            let stop = end.min(self.starts[index + 1]);
            self.dataset.read(range.start + start - first..range.start + stop - first, out)?;
            start = stop;
        }
        Ok(())
    }
}

/// The part of `0..total` that belongs to process `rank` of `world`: the parts follow each other, and their
/// lengths differ by one at most.
///
/// # Panics
/// If `rank` is not below `world`.
pub fn share(total: usize, rank: usize, world: usize) -> Range<usize> {
    assert!(rank < world, "rank {rank} of {world}");
    let start = |rank: usize| (total as u128 * rank as u128 / world as u128) as usize;
    start(rank)..start(rank + 1)
}

#[cfg(test)]
mod tests;
