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

/// The pieces in byte order, to find all that start at a position.
#[derive(Debug)]
pub(super) struct PieceIndex {
    pieces: Vec<(Box<str>, u32)>,
    min_score: f32,
    max_score: f32,
}

impl PieceIndex {
    /// From every piece that text may become (id, text), and the score range of the normal ones.
    pub(super) fn new(pieces: impl Iterator<Item = (u32, Box<str>)>, range: (f32, f32)) -> Self {
        let mut pieces: Vec<_> = pieces.map(|(id, text)| (text, id)).collect();
        pieces.sort_unstable();
        Self { pieces, min_score: range.0, max_score: range.1 }
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
    let relax = |best: &mut Vec<Option<Node>>, end: usize, node: Node, score: f32| {
        if best[end].is_none_or(|old| score > old.score) {
            best[end] = Some(Node { score, ..node });
        }
    };
    for (start, char) in text.char_indices() {
        let so_far = match best[start] {
            Some(node) => node.score,
            None => *path_score,
        };
        let mut has_single = false;
        index.prefixes(&text.as_bytes()[start..], |length, id| {
            if vocabulary.is_unused(id) {
                return;
            }
            let score = if vocabulary.is_user_defined(id) {
                (f64::from(length as f32 * index.max_score) - 0.1) as f32
            } else {
                vocabulary.score(id)
            };
            let node = Node { start, id, score: 0.0 };
            relax(&mut best, start + length, node, score + so_far);
            has_single |= length == char.len_utf8();
        });
        if !has_single {
            let node = Node { start, id: vocabulary.unknown(), score: 0.0 };
            let score = unknown_score + so_far;
            relax(&mut best, start + char.len_utf8(), node, score);
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
