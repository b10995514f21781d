//! Unigram segmentation: of all ways to cut a text into pieces, the one with the highest sum of
//! scores, found by Viterbi's algorithm.

use super::Vocabulary;

/// How much worse than the worst piece an unknown character is.
const UNKNOWN_PENALTY: f32 = 10.0;

/// The best way to reach a position: the piece that ends there.
#[derive(Clone, Copy)]
struct Node {
    start: usize,
    id: u32,
    score: f32,
}

/// A score this far from zero is taken back to zero, and the open ends with it, so that sums over a long
/// text keep their precision.
const SCORE_LIMIT: f32 = 100_000.0;

/// The pieces in byte order, to find all that start at a position.
#[derive(Debug)]
pub(super) struct PieceIndex {
    pieces: Vec<(Box<str>, u32)>,
    min_score: f32,
}

impl PieceIndex {
    /// From every piece that text may become (id, text), and the lowest score of the normal ones.
    pub(super) fn new(pieces: impl Iterator<Item = (u32, Box<str>)>, min_score: f32) -> Self {
        let mut pieces: Vec<_> = pieces.map(|(id, text)| (text, id)).collect();
        pieces.sort_unstable();
        Self { pieces, min_score }
    }

    /// Calls `found(length, id)` for every piece that `text` starts with, shortest first.
    fn prefixes(&self, text: &[u8], mut found: impl FnMut(usize, u32)) {
        let mut range = &self.pieces[..];
        for (depth, &byte) in text.iter().enumerate() {
            let at = |(piece, _): &(Box<str>, u32)| piece.as_bytes().get(depth).copied();
            let low = range.partition_point(|piece| at(piece) < Some(byte));
            let high = low + range[low..].partition_point(|piece| at(piece) == Some(byte));
            range = &range[low..high];
            match range.first() {
                None => return,
                Some((piece, id)) if piece.len() == depth + 1 => found(depth + 1, *id),
                Some(_) => {}
            }
        }
    }
}

/// Splits normalised `text` into pieces and hands each to `emit(piece, id)` in order.
///
/// `path_score` is the score of the text before `text` and becomes that of the text up to its end:
/// sums are rounded to f32 as they grow, so a text that is encoded in parts must go on with the sum
/// to be cut as it would be in one.
pub(super) fn encode(
    text: &str,
    vocabulary: &Vocabulary,
    index: &PieceIndex,
    path_score: &mut f32,
    emit: &mut dyn FnMut(&str, u32),
) {
    let unknown_score = index.min_score - UNKNOWN_PENALTY;
    let mut best: Vec<Option<Node>> = vec![None; text.len() + 1];
    // The furthest position that has a node.
    let mut frontier = 0;
    let relax = |best: &mut Vec<Option<Node>>, frontier: &mut usize, end: usize, node: Node| {
        *frontier = end.max(*frontier);
        if best[end].is_none_or(|old| node.score > old.score) {
            best[end] = Some(node);
        }
    };
    for (start, char) in text.char_indices() {
        let mut so_far = best[start].map_or(*path_score, |node| node.score);
        if so_far.abs() > SCORE_LIMIT {
            for node in best[start..=frontier.max(start)].iter_mut().flatten() {
                node.score -= so_far;
            }
            so_far = 0.0;
        }
        let mut has_single = false;
        index.prefixes(&text.as_bytes()[start..], |length, id| {
            if vocabulary.is_unused(id) {
                return;
            }
            let score = if vocabulary.is_user_defined(id) {
                user_defined_score(length)
            } else {
                vocabulary.score(id)
            };
            let node = Node { start, id, score: score + so_far };
            relax(&mut best, &mut frontier, start + length, node);
            has_single |= length == char.len_utf8();
        });
        if !has_single {
            let node = Node { start, id: vocabulary.unknown(), score: unknown_score + so_far };
            relax(&mut best, &mut frontier, start + char.len_utf8(), node);
        }
    }
    let mut path = Vec::new();
    let mut end = text.len();
    while let Some(node) = best[end] {
        path.push((node.start, end, node.id));
        end = node.start;
    }
    if let Some(node) = best[text.len()] {
        *path_score = node.score;
    }
    for &(start, end, id) in path.iter().rev() {
        emit(&text[start..end], id);
    }
}

/// Score of a user-defined piece of `length` bytes: positive, so that it wins over what it consists of.
fn user_defined_score(length: usize) -> f32 {
    (0.1 * (length as f64 - 1.0)) as f32
}
