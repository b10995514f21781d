//! Sessions in this process.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::{Record, SessionKey, StoreError};

/// Keeps the sessions that were used last, as many as fit into a number of bytes.
pub(super) struct MemoryStore {
    budget: usize,
    ttl: Duration,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    entries: HashMap<SessionKey, Entry>,
    by_use: BTreeMap<u64, SessionKey>,
    clock: u64,
    bytes: usize,
}

struct Entry {
    record: Record,
    used: u64,
    at: Instant,
}

/// Bytes that a session takes besides its record.
const ENTRY_OVERHEAD: usize = 512;

impl MemoryStore {
    pub(super) fn new(budget: usize, ttl: Duration) -> Self {
        Self { budget, ttl, inner: Mutex::default() }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    pub(super) fn load(&self, key: &SessionKey) -> Option<Record> {
        let mut inner = self.inner();
        inner.expire(self.ttl);
        inner.entries.get(key).map(|entry| entry.record.clone())
    }

    pub(super) fn save(&self, key: &SessionKey, record: Record) -> Result<(), StoreError> {
        let mut inner = self.inner();
        inner.remove(key);
        let bytes = record.bytes.len() + ENTRY_OVERHEAD;
        if bytes > self.budget {
            let why = format!("a session takes {bytes} bytes, and all may take {}", self.budget);
            return Err(StoreError::Unavailable(why));
        }
        while inner.bytes + bytes > self.budget {
            let Some(oldest) = inner.by_use.values().next().cloned() else { break };
            inner.remove(&oldest);
        }
        inner.clock += 1;
        inner.bytes += bytes;
        let used = inner.clock;
        inner.by_use.insert(used, key.clone());
        inner.entries.insert(key.clone(), Entry { record, used, at: Instant::now() });
        Ok(())
    }

    pub(super) fn delete(&self, key: &SessionKey) -> bool {
        self.inner().remove(key)
    }

    /// Number of sessions and their bytes.
    pub(super) fn size(&self) -> (usize, usize) {
        let inner = self.inner();
        (inner.entries.len(), inner.bytes)
    }
}

impl Inner {
    fn remove(&mut self, key: &SessionKey) -> bool {
        let Some(entry) = self.entries.remove(key) else { return false };
        self.by_use.remove(&entry.used);
        self.bytes -= entry.record.bytes.len() + ENTRY_OVERHEAD;
        true
    }

    fn expire(&mut self, ttl: Duration) {
        while let Some(oldest) = self.by_use.values().next().cloned() {
            if self.entries.get(&oldest).is_some_and(|entry| entry.at.elapsed() < ttl) {
                return;
            }
            self.remove(&oldest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str) -> SessionKey {
        SessionKey::new("owner".into(), name, "session_id").unwrap()
    }

    #[test]
    fn the_oldest_goes_when_there_is_no_room_or_time() {
        let store = MemoryStore::new(2 * (100 + ENTRY_OVERHEAD), Duration::from_secs(60));
        let record = Record { version: 1, bytes: vec![0; 100] };
        for name in ["a", "b", "a", "c"] {
            store.save(&key(name), record.clone()).unwrap();
        }
        assert!(store.load(&key("b")).is_none());
        assert_eq!(store.load(&key("a")), Some(record.clone()));
        assert_eq!(store.size(), (2, 2 * (100 + ENTRY_OVERHEAD)));
        assert!(store.delete(&key("a")));
        assert!(!store.delete(&key("a")));
        assert!(store.save(&key("d"), Record { version: 1, bytes: vec![0; 9999] }).is_err());

        let store = MemoryStore::new(1 << 20, Duration::ZERO);
        store.save(&key("a"), record).unwrap();
        assert!(store.load(&key("a")).is_none());
        assert_eq!(store.size(), (0, 0));
    }
}
