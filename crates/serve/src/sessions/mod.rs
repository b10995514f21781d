//! Named sessions: conversations that go on from their state, without their history.
//!
//! A turn is saved whole or not at all: a session is loaded when a turn begins and replaced when it has
//! ended, and only if nobody else replaced it meanwhile. After a crash the last whole turn is there, and the
//! same request gives the same tokens again.

mod memory;
mod record;
mod redis_store;

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard};

use self::memory::MemoryStore;
pub(crate) use self::record::{Session, state_from_bytes};
use self::redis_store::RedisStore;
use crate::error::{ApiError, ApiResult};
use crate::metrics::Metrics;
use crate::options::Options;

/// Longest name of a session.
pub(crate) const MAX_NAME_BYTES: usize = 128;

/// A session's name with its owner: two keys may use the same name and never see each other's.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct SessionKey {
    owner: Arc<str>,
    name: String,
}

impl SessionKey {
    /// # Errors
    /// 400: a name that is empty, too long or has other characters.
    pub(crate) fn new(owner: Arc<str>, name: &str, param: &str) -> ApiResult<Self> {
        let is_valid = (1..=MAX_NAME_BYTES).contains(&name.len())
            && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
        if !is_valid {
            let message = format!(
                "a session's name has 1 to {MAX_NAME_BYTES} letters, digits, '-', '_' or '.'"
            );
            return Err(ApiError::invalid(param, message));
        }
        Ok(Self { owner, name: name.to_owned() })
    }

    /// As one word, for the shared store.
    fn to_store_key(&self) -> String {
        format!("mmfree:session:{}:{}", self.owner, self.name)
    }
}

/// What a store keeps: a session as bytes, and how often it was replaced.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Record {
    version: u64,
    bytes: Vec<u8>,
}

/// Why a store did not do it.
#[derive(Debug)]
enum StoreError {
    /// Somebody else replaced the session.
    Conflict,
    /// The store cannot be reached, or answers with an error.
    Unavailable(String),
}

/// The sessions of a server.
pub(crate) struct Sessions {
    store: Store,
    /// Sessions with a turn in work, in this process.
    busy: Mutex<HashSet<SessionKey>>,
    metrics: Arc<Metrics>,
}

enum Store {
    Memory(MemoryStore),
    Redis(RedisStore),
}

impl Sessions {
    /// # Errors
    /// A store whose address cannot be understood. One that is down is no error: it may come up.
    pub(crate) fn open(options: &Options, metrics: Arc<Metrics>) -> Result<Self, String> {
        let limits = &options.limits;
        let store = match &options.store {
            None => Store::Memory(MemoryStore::new(limits.session_bytes, limits.session_ttl)),
            Some(url) => Store::Redis(RedisStore::new(url, limits.session_ttl)?),
        };
        Ok(Self { store, busy: Mutex::default(), metrics })
    }

    fn busy(&self) -> MutexGuard<'_, HashSet<SessionKey>> {
        self.busy.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Whether the store answers; `None` if sessions are in this process.
    pub(crate) async fn is_store_up(&self) -> Option<bool> {
        match &self.store {
            Store::Memory(_) => None,
            Store::Redis(store) => Some(store.ping().await),
        }
    }

    /// Begins a turn: nobody else in this process can until it is dropped.
    ///
    /// # Errors
    /// 409 while another turn is in work, 503 without the store.
    pub(crate) async fn begin(self: &Arc<Self>, key: SessionKey) -> ApiResult<Turn> {
        if !self.busy().insert(key.clone()) {
            let message =
                "this session is busy with another request; a session has one turn at a time";
            return Err(ApiError::conflict(message));
        }
        // From here on dropping it makes the session free.
        let mut turn = Turn { sessions: self.clone(), key, record: None };
        turn.record = turn.sessions.load(&turn.key).await?;
        Ok(turn)
    }

    async fn load(&self, key: &SessionKey) -> ApiResult<Option<Record>> {
        let found = match &self.store {
            Store::Memory(store) => Ok(store.load(key)),
            Store::Redis(store) => store.load(&key.to_store_key()).await,
        };
        found.map_err(|error| self.failed(&error))
    }

    fn failed(&self, error: &StoreError) -> ApiError {
        match error {
            StoreError::Conflict => ApiError::conflict(
                "the session was changed by another request meanwhile; this turn was not saved",
            ),
            StoreError::Unavailable(why) => {
                self.metrics.store_errors.inc();
                tracing::warn!(error = %why, "the session store failed");
                ApiError::unavailable(
                    "the session store cannot be reached; nothing was saved. Retry later, or go on without a session",
                    "store_unavailable",
                )
            }
        }
    }

    fn count(&self) {
        if let Store::Memory(store) = &self.store {
            let (sessions, bytes) = store.size();
            self.metrics.sessions.set(sessions as i64);
            self.metrics.session_bytes.set(bytes as i64);
        }
    }
}

/// A session while somebody works with it.
pub(crate) struct Turn {
    sessions: Arc<Sessions>,
    key: SessionKey,
    record: Option<Record>,
}

impl Turn {
    /// The session as bytes, if it exists.
    pub(crate) fn bytes(&self) -> Option<&[u8]> {
        self.record.as_ref().map(|record| record.bytes.as_slice())
    }

    /// The session's name.
    pub(crate) fn name(&self) -> &str {
        &self.key.name
    }

    /// Replaces the session.
    ///
    /// # Errors
    /// 409 if somebody else has, 503 without the store; then it is as it was.
    pub(crate) async fn save(&mut self, bytes: Vec<u8>) -> ApiResult<()> {
        let sessions = &self.sessions;
        let expected = self.record.as_ref().map_or(0, |record| record.version);
        let record = Record { version: expected + 1, bytes };
        let saved = match &sessions.store {
            Store::Memory(store) => store.save(&self.key, record.clone()),
            Store::Redis(store) => store.save(&self.key.to_store_key(), expected, &record).await,
        };
        saved.map_err(|error| sessions.failed(&error))?;
        self.record = Some(record);
        sessions.count();
        Ok(())
    }

    /// Deletes the session; `false` if there was none.
    ///
    /// # Errors
    /// 503 without the store.
    pub(crate) async fn delete(self) -> ApiResult<bool> {
        let sessions = &self.sessions;
        let deleted = match &sessions.store {
            Store::Memory(store) => Ok(store.delete(&self.key)),
            Store::Redis(store) => store.delete(&self.key.to_store_key()).await,
        };
        let deleted = deleted.map_err(|error| sessions.failed(&error))?;
        sessions.count();
        Ok(deleted)
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.sessions.busy().remove(&self.key);
    }
}
