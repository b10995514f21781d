//! The HTTP API: its route table, and what every request goes through.

mod app;
mod chat;
mod completions;
mod generation;
mod info;
mod request;
mod sessions;
mod stream;
mod types;
mod web;

use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::middleware::{from_fn, from_fn_with_state};
use axum::routing::{MethodRouter, get, post};

pub(crate) use self::app::{App, key_digest};
pub(crate) use self::request::{Body, Bytes, Caller, Id, Peer};
use crate::error::ApiError;

/// Who may use a route.
#[derive(Clone, Copy, PartialEq)]
enum Access {
    /// Everybody.
    Open,
    /// Those with a key, if the server has keys.
    Key,
}

/// The one route table. `/openapi.json` describes those of the API.
fn routes() -> Vec<(&'static str, Access, MethodRouter<Arc<App>>)> {
    use Access::{Key, Open};
    vec![
        ("/v1/completions", Key, post(completions::completions)),
        ("/v1/chat/completions", Key, post(chat::chat)),
        ("/v1/models", Key, get(info::models)),
        ("/v1/models/{id}", Key, get(info::model)),
        ("/v1/sessions/{id}", Key, get(sessions::get_session).delete(sessions::delete_session)),
        ("/v1/sessions/{id}/state", Key, get(sessions::get_state).put(sessions::put_state)),
        ("/health", Open, get(info::health)),
        ("/health/live", Open, get(info::live)),
        ("/health/ready", Open, get(info::health)),
        ("/metrics", Open, get(info::metrics)),
        ("/openapi.json", Open, get(info::openapi)),
    ]
}

/// The whole service.
pub(crate) fn router(app: Arc<App>) -> Router {
    let mut router = Router::new();
    for (path, access, mut methods) in routes() {
        if access == Access::Key {
            methods = methods.route_layer(from_fn_with_state(app.clone(), request::authorize));
        }
        router = router.route(path, methods);
    }
    if app.options.has_web_page {
        router = router.merge(web::routes());
    }
    router
        .fallback(async || {
            ApiError::not_found("there is nothing here; /openapi.json lists the paths", "not_found")
        })
        .method_not_allowed_fallback(async || ApiError::method_not_allowed())
        .layer(from_fn(request::harden))
        .layer(from_fn_with_state(app.clone(), request::guard))
        .layer(from_fn_with_state(app.clone(), request::observe))
        .with_state(app)
}

/// A random number.
fn random() -> u64 {
    // The standard library's hash keys are random.
    RandomState::new().build_hasher().finish()
}

/// A name that no other answer has.
fn new_id(prefix: &str) -> String {
    format!("{prefix}{:016x}{:016x}", random(), random())
}

/// Seconds since 1970.
fn unix_time() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
