//! Server-sent events.

use std::convert::Infallible;
use std::time::Duration;

use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use futures_util::stream::unfold;
use serde::Serialize;

use super::generation::Generation;
use crate::error::ApiError;
use crate::scheduler::Event;

/// A comment goes out after so much silence, so that nobody on the way takes the connection for dead.
const KEEP_ALIVE: Duration = Duration::from_secs(10);
/// Events that wait are sent together, up to so many bytes.
const MAX_CHUNK_BYTES: usize = 16 << 10;

/// Turns events into chunks of an answer.
pub(crate) trait Chunks: Send + 'static {
    /// Appends what an event adds, which may be nothing.
    fn chunk(&mut self, event: Event, out: &mut Vec<u8>);
    /// Appends what comes after the last text.
    fn end(&mut self, generation: &Generation, include_usage: bool, out: &mut Vec<u8>);
}

/// Appends an event with an object as its data.
pub(crate) fn write_event(object: &impl Serialize, out: &mut Vec<u8>) {
    out.extend(b"data: ");
    let start = out.len();
    if serde_json::to_writer(&mut *out, object).is_err() {
        // Nothing that is sent here fails: there are no maps with other keys than strings.
        out.truncate(start);
        out.extend(b"{}");
    }
    out.extend(b"\n\n");
}

/// The answer to a request that streams. It ends with `[DONE]`, or with an error object. Whoever stops
/// reading cancels the texts.
pub(crate) fn stream(generation: Generation, chunks: impl Chunks, include_usage: bool) -> Response {
    let state = Some((generation, chunks));
    let body = unfold(state, move |state| async move {
        let (mut generation, mut chunks) = state?;
        let mut out = Vec::new();
        loop {
            let next = tokio::time::timeout(KEEP_ALIVE, generation.next()).await;
            match next {
                Err(_) => {
                    out.extend(b": waiting\n\n");
                    break;
                }
                Ok(Ok(Some(event))) => chunks.chunk(event, &mut out),
                Ok(Ok(None)) => {
                    chunks.end(&generation, include_usage, &mut out);
                    out.extend(b"data: [DONE]\n\n");
                    return Some((Ok::<_, Infallible>(out), None));
                }
                Ok(Err(error)) => {
                    write_error(&error, &mut out);
                    return Some((Ok(out), None));
                }
            }
            if !out.is_empty() && (!generation.has_more() || out.len() > MAX_CHUNK_BYTES) {
                break;
            }
        }
        Some((Ok(out), Some((generation, chunks))))
    });
    let mut response = axum::body::Body::from_stream(body).into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // For proxies that would wait for more.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

fn write_error(error: &ApiError, out: &mut Vec<u8>) {
    tracing::warn!(status = error.status().as_u16(), error = error.message(), "a stream failed");
    write_event(&error.body(), out);
}
