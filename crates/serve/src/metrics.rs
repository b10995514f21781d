//! What the server counts, in Prometheus' text format.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

/// A request, for counting. Routes are those of the table, never a path that somebody made up.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct RequestLabels {
    pub method: String,
    pub route: String,
    pub status: u16,
}

/// All counters.
pub(crate) struct Metrics {
    registry: Registry,
    pub requests: Family<RequestLabels, Counter>,
    pub requests_in_flight: Gauge,
    pub connections: Gauge,
    pub refused_connections: Counter,
    pub queued: Gauge,
    pub clients: Gauge,
    pub reading: Gauge,
    pub running: Gauge,
    pub rejected: Counter,
    pub cancelled: Counter,
    pub prompt_tokens: Counter,
    pub generated_tokens: Counter,
    pub queue_seconds: Histogram,
    pub first_token_seconds: Histogram,
    pub token_seconds: Histogram,
    pub step_seconds: Histogram,
    pub batch_rows: Histogram,
    pub prefix_cache_hits: Counter,
    pub prefix_cache_misses: Counter,
    pub prefix_cache_tokens: Counter,
    pub prefix_cache_evictions: Counter,
    pub prefix_cache_states: Gauge,
    pub prefix_cache_bytes: Gauge,
    pub sessions: Gauge,
    pub session_bytes: Gauge,
    pub store_errors: Counter,
    pub log_lines_dropped: Counter,
}

impl Metrics {
    /// Counters at zero; the log counts its own.
    pub(crate) fn new(log_lines_dropped: Counter) -> Self {
        let mut registry = Registry::with_prefix("mmfree");
        let seconds = || Histogram::new(exponential_buckets(0.001, 2.0, 18));
        let rows = || Histogram::new(exponential_buckets(1.0, 2.0, 11));
        let metrics = Self {
            requests: Family::default(),
            requests_in_flight: Gauge::default(),
            connections: Gauge::default(),
            refused_connections: Counter::default(),
            queued: Gauge::default(),
            clients: Gauge::default(),
            reading: Gauge::default(),
            running: Gauge::default(),
            rejected: Counter::default(),
            cancelled: Counter::default(),
            prompt_tokens: Counter::default(),
            generated_tokens: Counter::default(),
            queue_seconds: seconds(),
            first_token_seconds: seconds(),
            token_seconds: seconds(),
            step_seconds: seconds(),
            batch_rows: rows(),
            prefix_cache_hits: Counter::default(),
            prefix_cache_misses: Counter::default(),
            prefix_cache_tokens: Counter::default(),
            prefix_cache_evictions: Counter::default(),
            prefix_cache_states: Gauge::default(),
            prefix_cache_bytes: Gauge::default(),
            sessions: Gauge::default(),
            session_bytes: Gauge::default(),
            store_errors: Counter::default(),
            log_lines_dropped,
            registry: Registry::default(),
        };
        let m = &metrics;
        let r = &mut registry;
        r.register("requests", "Requests answered", m.requests.clone());
        r.register("requests_in_flight", "Requests being answered", m.requests_in_flight.clone());
        r.register("connections", "Open connections", m.connections.clone());
        r.register(
            "refused_connections",
            "Connections over the limit",
            m.refused_connections.clone(),
        );
        r.register("queued_jobs", "Prompts that wait for a place", m.queued.clone());
        r.register("clients", "Clients with anything waiting or in work", m.clients.clone());
        r.register("reading_prompts", "Prompts being read", m.reading.clone());
        r.register("running_texts", "Texts being written", m.running.clone());
        r.register("rejected", "Requests refused for want of room", m.rejected.clone());
        r.register(
            "cancelled_texts",
            "Texts whose reader went away or stalled",
            m.cancelled.clone(),
        );
        r.register(
            "prompt_tokens",
            "Prompt tokens read, without cached ones",
            m.prompt_tokens.clone(),
        );
        r.register("generated_tokens", "Tokens drawn", m.generated_tokens.clone());
        let unit = || Unit::Seconds;
        r.register_with_unit("queue", "Wait for a place", unit(), m.queue_seconds.clone());
        r.register_with_unit(
            "first_token",
            "Request to first token",
            unit(),
            m.first_token_seconds.clone(),
        );
        r.register_with_unit(
            "token",
            "Between two tokens of a text",
            unit(),
            m.token_seconds.clone(),
        );
        r.register_with_unit("step", "One step of the engine", unit(), m.step_seconds.clone());
        r.register("batch_rows", "Tokens in a step", m.batch_rows.clone());
        r.register("prefix_cache_hits", "Prompts with a known prefix", m.prefix_cache_hits.clone());
        r.register("prefix_cache_misses", "Prompts without one", m.prefix_cache_misses.clone());
        r.register(
            "prefix_cache_tokens",
            "Prompt tokens not read again",
            m.prefix_cache_tokens.clone(),
        );
        r.register(
            "prefix_cache_evictions",
            "States that had to go",
            m.prefix_cache_evictions.clone(),
        );
        r.register("prefix_cache_states", "States kept", m.prefix_cache_states.clone());
        r.register_with_unit(
            "prefix_cache",
            "Memory of them",
            Unit::Bytes,
            m.prefix_cache_bytes.clone(),
        );
        r.register("sessions", "Sessions in this process", m.sessions.clone());
        r.register_with_unit("sessions", "Memory of them", Unit::Bytes, m.session_bytes.clone());
        r.register("store_errors", "Failed calls to the shared store", m.store_errors.clone());
        r.register(
            "log_lines_dropped",
            "Log lines that could not be written",
            m.log_lines_dropped.clone(),
        );
        Self { registry, ..metrics }
    }

    /// Everything, as Prometheus reads it.
    pub(crate) fn encode(&self) -> Result<String, std::fmt::Error> {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry)?;
        Ok(text)
    }
}
