//! States of prompts that were read before.
//!
//! A recurrent state stands for everything before it, so a prompt that begins like an earlier one needs only
//! its rest to be read. Entries are found by a digest of client and tokens (SHA-256: nobody can make two
//! prompts collide); a client never finds another's, so that nobody learns from the time or the usage counts
//! what others asked.

use std::collections::{BTreeMap, HashMap};

use mmfree::state::State;
use ring::digest::{Context, SHA256};

use super::job::Client;

type Key = [u8; 32];

/// Keeps the states that were used last, as many as fit into a number of bytes.
pub(crate) struct PrefixCache {
    budget: usize,
    entry_bytes: usize,
    entries: HashMap<Key, Entry>,
    /// Entries by the time of their last use.
    by_use: BTreeMap<u64, Key>,
    /// How many entries have this number of tokens.
    lengths: BTreeMap<usize, usize>,
    clock: u64,
}

struct Entry {
    state: State,
    length: usize,
    used: u64,
}

/// Bytes that an entry takes besides its state: keys, counters, tables.
const ENTRY_OVERHEAD: usize = 256;

impl PrefixCache {
    /// A cache of at most `budget` bytes for states of `state_bytes`; 0 keeps nothing.
    pub(crate) fn new(budget: usize, state_bytes: usize) -> Self {
        Self {
            budget,
            entry_bytes: state_bytes + ENTRY_OVERHEAD,
            entries: HashMap::new(),
            by_use: BTreeMap::new(),
            lengths: BTreeMap::new(),
            clock: 0,
        }
    }

    /// Whether it can hold anything.
    pub(crate) fn is_enabled(&self) -> bool {
        self.budget >= self.entry_bytes
    }

    /// Bytes in use.
    pub(crate) fn bytes(&self) -> usize {
        self.entries.len() * self.entry_bytes
    }

    /// Number of states.
    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    /// The state of the longest known prefix that leaves at least one token to read, and its length.
    pub(crate) fn longest(&mut self, client: &Client, tokens: &[u32]) -> Option<(usize, State)> {
        let mut digest = Digest::new(client);
        let mut best = None;
        for &length in self.lengths.keys() {
            if length >= tokens.len() {
                break;
            }
            let key = digest.advance(tokens, length);
            if self.entries.contains_key(&key) {
                best = Some(key);
            }
        }
        let key = best?;
        self.clock += 1;
        let entry = self.entries.get_mut(&key)?;
        self.by_use.remove(&entry.used);
        entry.used = self.clock;
        self.by_use.insert(self.clock, key);
        Some((entry.length, entry.state.clone()))
    }

    /// Remembers the state behind `tokens`. Returns how many others had to go.
    pub(crate) fn insert(&mut self, client: &Client, tokens: &[u32], state: &State) -> usize {
        if !self.is_enabled() || tokens.is_empty() {
            return 0;
        }
        let key = Digest::new(client).advance(tokens, tokens.len());
        self.clock += 1;
        if let Some(entry) = self.entries.get_mut(&key) {
            self.by_use.remove(&entry.used);
            entry.used = self.clock;
            self.by_use.insert(self.clock, key);
            return 0;
        }
        let mut evicted = 0;
        while (self.entries.len() + 1) * self.entry_bytes > self.budget {
            let Some((_, oldest)) = self.by_use.pop_first() else { break };
            if let Some(entry) = self.entries.remove(&oldest) {
                self.forget_length(entry.length);
                evicted += 1;
            }
        }
        let entry = Entry { state: state.clone(), length: tokens.len(), used: self.clock };
        self.entries.insert(key, entry);
        self.by_use.insert(self.clock, key);
        *self.lengths.entry(tokens.len()).or_default() += 1;
        evicted
    }

    fn forget_length(&mut self, length: usize) {
        if let Some(count) = self.lengths.get_mut(&length) {
            *count -= 1;
            if *count == 0 {
                self.lengths.remove(&length);
            }
        }
    }
}

/// A digest of a client and a growing number of tokens.
struct Digest {
    context: Context,
    length: usize,
}

impl Digest {
    fn new(Client(client): &Client) -> Self {
        let mut context = Context::new(&SHA256);
        context.update(&(client.len() as u64).to_le_bytes());
        context.update(client.as_bytes());
        Self { context, length: 0 }
    }

    /// The digest of the first `length` tokens, no fewer than before.
    fn advance(&mut self, tokens: &[u32], length: usize) -> Key {
        let mut bytes = [0; 1024];
        for chunk in tokens[self.length..length].chunks(bytes.len() / 4) {
            for (bytes, token) in bytes.chunks_exact_mut(4).zip(chunk) {
                bytes.copy_from_slice(&token.to_le_bytes());
            }
            self.context.update(&bytes[..4 * chunk.len()]);
        }
        self.length = length;
        let digest = self.context.clone().finish();
        digest.as_ref().try_into().expect("SHA-256 has 32 bytes")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(name: &str) -> Client {
        Client(name.into())
    }

    fn state() -> State {
        let checkpoint = mmfree::builtin::checkpoint().unwrap();
        State::new(&mmfree::model::Model::load(&checkpoint).unwrap())
    }

    #[test]
    fn the_longest_prefix_of_the_same_client_is_found() {
        let state = state();
        let mut cache = PrefixCache::new(1 << 20, 4 * state.hidden().len());
        let tokens: Vec<u32> = (0..1000).collect();
        let a = client("a");
        for length in [3, 500, 700] {
            assert_eq!(cache.insert(&a, &tokens[..length], &state), 0);
        }
        let found = |cache: &mut PrefixCache, client, tokens: &[u32]| {
            cache.longest(client, tokens).map(|(length, _)| length)
        };
        assert_eq!(found(&mut cache, &a, &tokens), Some(700));
        assert_eq!(found(&mut cache, &a, &tokens[..700]), Some(500));
        assert_eq!(found(&mut cache, &a, &tokens[..3]), None);
        let mut other = tokens.clone();
        other[600] = 0;
        assert_eq!(found(&mut cache, &a, &other), Some(500));
        other[0] = 1;
        assert_eq!(found(&mut cache, &a, &other), None);
        assert_eq!(found(&mut cache, &client("b"), &tokens), None);
    }

    #[test]
    fn the_budget_holds_and_the_least_recently_used_goes() {
        let state = state();
        let bytes = 4 * state.hidden().len();
        let mut cache = PrefixCache::new(2 * (bytes + ENTRY_OVERHEAD), bytes);
        let a = client("a");
        cache.insert(&a, &[1], &state);
        cache.insert(&a, &[2], &state);
        assert!(cache.longest(&a, &[1, 9]).is_some());
        assert_eq!(cache.insert(&a, &[3], &state), 1);
        assert_eq!(cache.len(), 2);
        assert!(cache.longest(&a, &[2, 9]).is_none());
        assert!(cache.longest(&a, &[1, 9]).is_some());
        assert!(cache.bytes() <= 2 * (bytes + ENTRY_OVERHEAD));
        let mut none = PrefixCache::new(0, bytes);
        none.insert(&a, &[1], &state);
        assert_eq!(none.len(), 0);
    }
}
