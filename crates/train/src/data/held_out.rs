//! Which documents are kept for evaluation.

use std::ops::Range;

use super::dataset::Dataset;
use super::permutation::Permutation;

/// Most groups of documents among which is chosen: bounds the memory that a choice takes.
const MAX_GROUPS: u64 = 1 << 16;
/// Chooses the held-out documents. Always the same, so that runs with different seeds are evaluated on the
/// same text.
const KEY: u64 = 0x6d6d_6672_6565;
/// With fewer held-out documents than this, the end of the stream is held out instead.
const MIN_HELD_OUT_DOCUMENTS: f64 = 4.0;

/// A part of a dataset. The same dataset and the same `held_out` always give the same documents, whatever the
/// seed of a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Part {
    /// Every document.
    All,
    /// All but the share `held_out` (0 to 1) of the documents.
    Training {
        /// Share of the documents that is left out.
        held_out: f64,
    },
    /// The share `held_out` of the documents.
    HeldOut {
        /// Share of the documents that is taken.
        held_out: f64,
    },
}

impl Part {
    /// The part as ranges of the dataset's stream, in order, none empty.
    ///
    /// Whole documents are chosen, in at most 65,536 groups of neighbours; the chosen groups lie all over the
    /// stream, so that every source is represented. Where that would hold out fewer than four documents, the
    /// last tokens of the stream are held out instead.
    pub(super) fn ranges(self, dataset: &Dataset) -> Vec<Range<u64>> {
        let (share, takes_held_out) = match self {
            Self::All => (0.0, false),
            Self::Training { held_out } => (held_out, false),
            Self::HeldOut { held_out } => (held_out, true),
        };
        let (documents, tokens) = (dataset.documents(), dataset.tokens());
        let mut ranges: Vec<Range<u64>> = Vec::new();
        let mut add = |range: Range<u64>| match ranges.last_mut() {
            _ if range.is_empty() => {}
            Some(last) if last.end == range.start => last.end = range.end,
            _ => ranges.push(range),
        };
        if share * (documents as f64) < MIN_HELD_OUT_DOCUMENTS {
            let held_out = ((share * tokens as f64).round() as u64).min(tokens);
            let cut = tokens - held_out;
            add(if takes_held_out { cut..tokens } else { 0..cut });
            return ranges;
        }
        let groups = documents.min(MAX_GROUPS);
        let held_out = ((share * groups as f64).round() as u64).min(groups);
        let order = Permutation::new(groups, KEY);
        let mut start = 0;
        for group in 0..groups {
            let next = u128::from(group + 1) * u128::from(documents) / u128::from(groups);
            let end = dataset.document_end(next as u64 - 1);
            if (order.apply(group) < held_out) == takes_held_out {
                add(start..end);
            }
            start = end;
        }
        ranges
    }
}
