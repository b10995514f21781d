//! Sessions in Redis or Valkey, shared by all replicas.

use std::time::Duration;

use redis::aio::{ConnectionManager, ConnectionManagerConfig};
use redis::{Client, RedisError, Script, Value};
use tokio::sync::OnceCell;

use super::{Record, StoreError};

/// How long one call may take.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(2);
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(2);

/// Replaces a session if its version is still the expected one: version and bytes are fields of a hash.
const SAVE: &str = "
local version = redis.call('HGET', KEYS[1], 'version') or '0'
if version ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], 'version', ARGV[2], 'session', ARGV[3])
redis.call('PEXPIRE', KEYS[1], ARGV[4])
return 1";

/// A connection that comes back by itself.
pub(super) struct RedisStore {
    client: Client,
    connection: OnceCell<ConnectionManager>,
    ttl: Duration,
    save: Script,
}

impl RedisStore {
    pub(super) fn new(url: &str, ttl: Duration) -> Result<Self, String> {
        let client = Client::open(url)
            .map_err(|error| format!("the store's address cannot be used: {error}"))?;
        Ok(Self { client, connection: OnceCell::new(), ttl, save: Script::new(SAVE) })
    }

    async fn connection(&self) -> Result<ConnectionManager, RedisError> {
        let config = ConnectionManagerConfig::new()
            .set_connection_timeout(Some(CONNECTION_TIMEOUT))
            .set_response_timeout(Some(RESPONSE_TIMEOUT))
            .set_number_of_retries(1)
            .set_max_delay(Duration::from_millis(500));
        let open = || ConnectionManager::new_with_config(self.client.clone(), config);
        self.connection.get_or_try_init(open).await.cloned()
    }

    pub(super) async fn ping(&self) -> bool {
        let ping = async {
            let mut connection = self.connection().await?;
            redis::cmd("PING").query_async::<()>(&mut connection).await
        };
        ping.await.is_ok()
    }

    pub(super) async fn load(&self, key: &str) -> Result<Option<Record>, StoreError> {
        let load = async {
            let mut connection = self.connection().await?;
            let ttl = u64::try_from(self.ttl.as_millis()).unwrap_or(u64::MAX);
            let (version, bytes, _): (Option<u64>, Option<Vec<u8>>, Value) = redis::pipe()
                .atomic()
                .cmd("HGET")
                .arg(key)
                .arg("version")
                .cmd("HGET")
                .arg(key)
                .arg("session")
                .cmd("PEXPIRE")
                .arg(key)
                .arg(ttl)
                .query_async(&mut connection)
                .await?;
            Ok(version.zip(bytes).map(|(version, bytes)| Record { version, bytes }))
        };
        load.await.map_err(unavailable)
    }

    pub(super) async fn save(
        &self,
        key: &str,
        expected: u64,
        record: &Record,
    ) -> Result<(), StoreError> {
        let save = async {
            let mut connection = self.connection().await?;
            let mut call = self.save.key(key);
            let ttl = u64::try_from(self.ttl.as_millis()).unwrap_or(u64::MAX);
            call.arg(expected).arg(record.version).arg(&record.bytes).arg(ttl);
            call.invoke_async::<u8>(&mut connection).await
        };
        match save.await.map_err(unavailable)? {
            1 => Ok(()),
            _ => Err(StoreError::Conflict),
        }
    }

    pub(super) async fn delete(&self, key: &str) -> Result<bool, StoreError> {
        let delete = async {
            let mut connection = self.connection().await?;
            redis::cmd("DEL").arg(key).query_async::<u64>(&mut connection).await
        };
        delete.await.map(|count| count > 0).map_err(unavailable)
    }
}

fn unavailable(error: RedisError) -> StoreError {
    StoreError::Unavailable(error.to_string())
}
