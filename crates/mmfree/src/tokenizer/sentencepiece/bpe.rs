//! Byte-pair encoding by piece score: of all neighbours that form a piece, the pair with the highest
//! score (the leftmost of equals) is joined first, until no pair is left.

use std::cmp::Ordering;
use std::collections::{BinaryHeap, HashMap};

use super::Vocabulary;
use super::normalizer::{Match, UserDefined};

/// No neighbour.
const NONE: usize = usize::MAX;

/// A run of characters that has become one piece; empty once joined to its left neighbour.
struct Symbol {
    start: usize,
    end: usize,
    previous: usize,
    next: usize,
    /// A user-defined piece, which takes no part in joins.
    frozen: bool,
}

/// Two neighbours that form a piece of `length` bytes.
struct Join {
    score: f32,
    left: usize,
    right: usize,
    length: usize,
}

impl Ord for Join {
    fn cmp(&self, other: &Self) -> Ordering {
        self.score
            .partial_cmp(&other.score)
            .expect("scores are checked to be numbers")
            .then_with(|| other.left.cmp(&self.left))
    }
}

impl PartialOrd for Join {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Join {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Join {}

/// The encoder of one text.
struct Encoder<'a> {
    text: &'a str,
    vocabulary: &'a Vocabulary,
    symbols: Vec<Symbol>,
    agenda: BinaryHeap<Join>,
    /// How an unused piece was put together, to take it apart again.
    parts: HashMap<&'a str, (&'a str, &'a str)>,
}

/// Splits normalised `text` into pieces and hands each to `emit(piece, id)` in order.
pub(super) fn encode(
    text: &str,
    vocabulary: &Vocabulary,
    user_defined: &UserDefined,
    emit: &mut dyn FnMut(&str, u32),
) {
    let mut encoder = Encoder {
        text,
        vocabulary,
        symbols: split_characters(text, user_defined),
        agenda: BinaryHeap::new(),
        parts: HashMap::new(),
    };
    for right in 1..encoder.symbols.len() {
        encoder.consider(right - 1, right);
    }
    while let Some(join) = encoder.agenda.pop() {
        encoder.join(&join);
    }
    let mut index = if encoder.symbols.is_empty() { NONE } else { 0 };
    while index != NONE {
        let symbol = &encoder.symbols[index];
        encoder.emit(&text[symbol.start..symbol.end], emit);
        index = symbol.next;
    }
}

fn split_characters(text: &str, user_defined: &UserDefined) -> Vec<Symbol> {
    let mut symbols: Vec<Symbol> = Vec::with_capacity(text.len());
    let mut start = 0;
    while start < text.len() {
        let rest = &text[start..];
        let (length, frozen) = match user_defined.prefix(rest, true) {
            Match::Found(length) => (length, true),
            _ => (rest.chars().next().map_or(0, char::len_utf8), false),
        };
        let index = symbols.len();
        let previous = index.checked_sub(1).unwrap_or(NONE);
        let end = start + length;
        let next = if end == text.len() { NONE } else { index + 1 };
        symbols.push(Symbol { start, end, previous, next, frozen });
        start = end;
    }
    symbols
}

impl<'a> Encoder<'a> {
    /// Puts two neighbours on the agenda if they form a piece.
    fn consider(&mut self, left: usize, right: usize) {
        if left == NONE || right == NONE {
            return;
        }
        let (a, b) = (&self.symbols[left], &self.symbols[right]);
        if a.frozen || b.frozen {
            return;
        }
        let piece = &self.text[a.start..b.end];
        let Some(id) = self.vocabulary.mergeable(piece) else { return };
        let score = self.vocabulary.score(id);
        self.agenda.push(Join { score, left, right, length: piece.len() });
        if self.vocabulary.is_unused(id) {
            self.parts.insert(piece, (&self.text[a.start..a.end], &self.text[b.start..b.end]));
        }
    }

    /// Carries out a join, unless one of its sides has changed since it was considered.
    fn join(&mut self, join: &Join) {
        let (left, right) = (&self.symbols[join.left], &self.symbols[join.right]);
        let is_stale = left.start == left.end
            || right.start == right.end
            || (left.end - left.start) + (right.end - right.start) != join.length;
        if is_stale {
            return;
        }
        let (end, next) = (right.end, right.next);
        self.symbols[join.right].start = end;
        self.symbols[join.left].end = end;
        self.symbols[join.left].next = next;
        if next != NONE {
            self.symbols[next].previous = join.left;
        }
        self.consider(self.symbols[join.left].previous, join.left);
        self.consider(join.left, next);
    }

    /// Emits a piece, or the parts of one that the model must not use.
    fn emit(&self, piece: &'a str, emit: &mut dyn FnMut(&str, u32)) {
        let mut stack = vec![piece];
        while let Some(piece) = stack.pop() {
            let id = self.vocabulary.mergeable(piece).unwrap_or(self.vocabulary.unknown());
            match self.parts.get(piece) {
                Some((left, right)) if self.vocabulary.is_unused(id) => {
                    stack.push(right);
                    stack.push(left);
                }
                _ => emit(piece, id),
            }
        }
    }
}
