//! What every request goes through: keys, bodies, the log, headers.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use axum::extract::{FromRequest, FromRequestParts, MatchedPath, Path, Request, State};
use axum::http::header::{self, HeaderName};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use futures_util::StreamExt;
use serde::de::DeserializeOwned;

use super::App;
use super::app::key_digest;
use crate::error::{ApiError, ApiResult};
use crate::metrics::RequestLabels;
use crate::scheduler::Client;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// How much more than its limit of a body is taken and thrown away: a client that is still sending when the
/// connection is closed never sees the answer.
const DRAINED_BYTES: usize = 4 << 20;

/// The other end of a connection.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Peer(pub SocketAddr);

/// Who sends a request.
#[derive(Clone, Debug)]
pub(crate) struct Caller {
    /// For turns and limits: the key, or without keys the address.
    pub client: Client,
    /// For sessions: the key; without keys everybody is one.
    pub owner: Arc<str>,
}

/// Lets those through who have a key, and finds out who they are.
pub(crate) async fn authorize(
    State(app): State<Arc<App>>,
    mut request: Request,
    next: Next,
) -> Response {
    let caller = if app.keys.is_empty() {
        let address = request.extensions().get::<Peer>().map(|Peer(peer)| peer.ip().to_string());
        let address = address.unwrap_or_else(|| "local".to_owned());
        Caller { client: Client(address.into()), owner: "open".into() }
    } else {
        match caller_by_key(&app, request.headers()) {
            Ok(caller) => caller,
            Err(error) => return error.into_response(),
        }
    };
    if app.is_ending.load(Ordering::Relaxed) {
        return ApiError::shutting_down().into_response();
    }
    request.extensions_mut().insert(caller);
    next.run(request).await
}

fn caller_by_key(app: &App, headers: &HeaderMap) -> ApiResult<Caller> {
    let value = headers.get(header::AUTHORIZATION).ok_or_else(|| {
        ApiError::unauthorized("you sent no key; send it as the header Authorization: Bearer KEY")
    })?;
    let key = value
        .as_bytes()
        .split_at_checked(7)
        .filter(|(scheme, _)| scheme.eq_ignore_ascii_case(b"bearer "));
    let digest = key.map(|(_, key)| key_digest(key.trim_ascii()));
    match digest.filter(|digest| app.has_key(digest)) {
        Some(digest) => {
            let name: Arc<str> =
                digest[..16].iter().map(|byte| format!("{byte:02x}")).collect::<String>().into();
            Ok(Caller { client: Client(name.clone()), owner: name })
        }
        None => Err(ApiError::unauthorized("this key is not known here")),
    }
}

/// The bytes of a body.
pub(crate) struct Bytes(pub Vec<u8>);

impl Bytes {
    /// Reads a body of at most `limit` bytes, in a limited time.
    pub(crate) async fn read(app: &App, request: Request, limit: usize) -> ApiResult<Self> {
        let too_large = || ApiError::too_large(format!("the body has more than {limit} bytes"));
        let announced = request
            .headers()
            .get(header::CONTENT_LENGTH)
            .and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
        if announced.is_some_and(|announced| announced > (limit + DRAINED_BYTES) as u64) {
            return Err(too_large());
        }
        let read = async {
            let mut body = request.into_body().into_data_stream();
            let mut bytes = Vec::new();
            let mut length = 0;
            while let Some(chunk) = body.next().await {
                let chunk = chunk.map_err(|_| ApiError::bad_request("the body broke off"))?;
                length += chunk.len();
                if length > limit + DRAINED_BYTES {
                    return Err(too_large());
                }
                if length > limit {
                    bytes = Vec::new();
                } else {
                    bytes.extend_from_slice(&chunk);
                }
            }
            if length > limit { Err(too_large()) } else { Ok(Self(bytes)) }
        };
        let slow = |_| ApiError::slow_request("the body took too long to arrive");
        tokio::time::timeout(app.options.limits.read_timeout, read).await.map_err(slow)?
    }
}

/// A body of JSON.
pub(crate) struct Body<T>(pub T);

impl<T: DeserializeOwned + Send> FromRequest<Arc<App>> for Body<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &Arc<App>) -> ApiResult<Self> {
        // A page from elsewhere can only send other types without asking first.
        let content_type = request.headers().get(header::CONTENT_TYPE);
        let is_json = content_type.and_then(|value| value.to_str().ok()).is_some_and(|value| {
            let essence = value.split(';').next().unwrap_or_default().trim();
            essence.eq_ignore_ascii_case("application/json")
        });
        if !is_json {
            return Err(ApiError::media_type("application/json"));
        }
        let Bytes(bytes) = Bytes::read(app, request, app.options.limits.max_body_bytes).await?;
        match serde_json::from_slice(&bytes) {
            Ok(value) => Ok(Self(value)),
            Err(error) => {
                Err(ApiError::bad_request(format!("the body is not what is expected: {error}")))
            }
        }
    }
}

/// The last parameter of a path.
pub(crate) struct Id(pub String);

impl<S: Send + Sync> FromRequestParts<S> for Id {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> ApiResult<Self> {
        match Path::<String>::from_request_parts(parts, state).await {
            Ok(Path(id)) => Ok(Self(id)),
            Err(_) => Err(ApiError::bad_request("the path is not valid UTF-8")),
        }
    }
}

/// Names the request, writes it into the log and counts it.
pub(crate) async fn observe(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let begin = Instant::now();
    let id = request
        .headers()
        .get(&REQUEST_ID)
        .and_then(|value| value.to_str().ok())
        .filter(|id| id.len() <= 64 && id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-'))
        .map_or_else(|| super::new_id("req-"), str::to_owned);
    let method = request.method().clone();
    let route = request.extensions().get::<MatchedPath>().map(|path| path.as_str().to_owned());
    let route = route.unwrap_or_else(|| "none".to_owned());
    let peer = request.extensions().get::<Peer>().map(|Peer(peer)| peer.to_string());
    app.metrics.requests_in_flight.inc();
    let _in_flight = InFlight(&app);
    let mut response = next.run(request).await;
    let status = response.status().as_u16();
    let known =
        [Method::GET, Method::POST, Method::PUT, Method::DELETE, Method::HEAD, Method::OPTIONS];
    let label = if known.contains(&method) { method.to_string() } else { "other".to_owned() };
    let labels = RequestLabels { method: label, route: route.clone(), status };
    app.metrics.requests.get_or_create(&labels).inc();
    let error = response.extensions().get::<ApiError>().map(|error| error.message().to_owned());
    let millis = begin.elapsed().as_secs_f64() * 1e3;
    tracing::info!(
        request = %id,
        %method,
        route,
        status,
        milliseconds = millis,
        peer,
        error = error.filter(|_| status >= 500 || app.options.logs_prompts),
        "request"
    );
    if let Ok(value) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    response
}

struct InFlight<'a>(&'a App);

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.0.metrics.requests_in_flight.dec();
    }
}

/// Keeps pages from elsewhere out, and lets those in that may.
pub(crate) async fn guard(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let origin = request.headers().get(header::ORIGIN).cloned();
    let allowed = origin.filter(|origin| {
        let origins = &app.options.allowed_origins;
        origins.iter().any(|allowed| allowed == "*" || allowed.as_bytes() == origin.as_bytes())
    });
    if app.keys.is_empty()
        && app.options.listen.ip().is_loopback()
        && let Err(error) = check_host(&app, &request)
    {
        return error.into_response();
    }
    let is_preflight = request.method() == Method::OPTIONS
        && request.headers().contains_key(header::ACCESS_CONTROL_REQUEST_METHOD);
    let mut response = match (&allowed, is_preflight) {
        (Some(_), true) => StatusCode::NO_CONTENT.into_response(),
        _ => next.run(request).await,
    };
    if let Some(origin) = allowed {
        let headers = response.headers_mut();
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        headers.insert(header::VARY, HeaderValue::from_static("Origin"));
        if is_preflight {
            let methods = HeaderValue::from_static("GET, POST, PUT, DELETE");
            headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, methods);
            let allowed = HeaderValue::from_static("authorization, content-type");
            headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, allowed);
        }
    }
    response
}

/// A name that a page made point to this machine is not one of ours.
fn check_host(app: &App, request: &Request) -> ApiResult<()> {
    let host = request.headers().get(header::HOST).and_then(|value| value.to_str().ok());
    let Some(host) = host else { return Ok(()) };
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.rsplit_once(':').map_or(host, |(name, _)| name),
    };
    let is_ours = name.parse::<IpAddr>().is_ok()
        || name.eq_ignore_ascii_case("localhost")
        || app.options.allowed_hosts.iter().any(|allowed| name.eq_ignore_ascii_case(allowed));
    match is_ours {
        true => Ok(()),
        false => Err(ApiError::forbidden(
            "this host name is not this server's; start it with --allowed-host NAME, or with keys",
        )),
    }
}

/// Headers that every answer has.
pub(crate) async fn harden(request: Request, next: Next) -> Response {
    let mut response = next.run(request).await;
    let headers = response.headers_mut();
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    headers.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    headers
        .entry(header::CONTENT_SECURITY_POLICY)
        .or_insert(HeaderValue::from_static("default-src 'none'; frame-ancestors 'none'"));
    response
}
