//! `/v1/sessions/{id}` and `/v1/sessions/{id}/state`

use std::sync::Arc;

use axum::extract::{Extension, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

use super::generation::{Generation, Plan};
use super::types::SessionInfo;
use super::{App, Bytes, Caller, Id};
use crate::error::{ApiError, ApiResult};
use crate::scheduler::{Event, EventKind, TextOptions};
use crate::sessions::{Session, Turn, state_from_bytes};

/// The media type of a state.
const STATE_TYPE: &str = "application/octet-stream";
/// Tells that the last reply ended with a stop string of the plain transcript, which the state has read.
const SEEN_STOP: &str = "x-mmfree-seen-stop";
/// What a state may have besides its numbers.
const MAX_OVERHEAD: usize = 4096;

/// A session that was deleted.
#[derive(Serialize, ToSchema)]
pub(crate) struct Deleted {
    id: String,
    object: &'static str,
    deleted: bool,
}

fn missing() -> ApiError {
    ApiError::not_found(
        "there is no such session, or it has not been used for too long",
        "session_not_found",
    )
}

fn info(app: &App, turn: &Turn, session: &Session) -> SessionInfo {
    SessionInfo {
        id: turn.name().to_owned(),
        tokens_seen: session.state.tokens_seen() + session.unread.len() as u64,
        state_bytes: app.state_bytes(),
    }
}

/// Where a session stands.
#[utoipa::path(
    get,
    path = "/v1/sessions/{id}",
    params(("id" = String, Path, description = "The session's name")),
    responses(
        (status = 200, description = "The session", body = SessionInfo),
        (status = "4XX", description = "No such session, or it is busy", body = crate::error::ErrorBody),
        (status = "5XX", description = "The store cannot be reached", body = crate::error::ErrorBody),
    ),
    security((), ("key" = []))
)]
pub(crate) async fn get_session(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Id(id): Id,
) -> ApiResult<Response> {
    let turn = app.begin_turn(&caller, &id).await?;
    let session = app.read_session(&turn)?.ok_or_else(missing)?;
    Ok(axum::Json(info(&app, &turn, &session)).into_response())
}

/// Forgets a session.
#[utoipa::path(
    delete,
    path = "/v1/sessions/{id}",
    params(("id" = String, Path, description = "The session's name")),
    responses(
        (status = 200, description = "It is gone", body = Deleted),
        (status = "4XX", description = "No such session, or it is busy", body = crate::error::ErrorBody),
        (status = "5XX", description = "The store cannot be reached", body = crate::error::ErrorBody),
    ),
    security((), ("key" = []))
)]
pub(crate) async fn delete_session(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Id(id): Id,
) -> ApiResult<Response> {
    let turn = app.begin_turn(&caller, &id).await?;
    match turn.delete().await? {
        true => {
            Ok(axum::Json(Deleted { id, object: "session.deleted", deleted: true }).into_response())
        }
        false => Err(missing()),
    }
}

/// A session's state, to take elsewhere: to another server, or to `mmfree generate --load-state`.
#[utoipa::path(
    get,
    path = "/v1/sessions/{id}/state",
    params(("id" = String, Path, description = "The session's name")),
    responses(
        (status = 200, description = "The state", body = Vec<u8>, content_type = "application/octet-stream"),
        (status = "4XX", description = "No such session, or it is busy", body = crate::error::ErrorBody),
        (status = "5XX", description = "The store cannot be reached", body = crate::error::ErrorBody),
    ),
    security((), ("key" = []))
)]
pub(crate) async fn get_state(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Id(id): Id,
) -> ApiResult<Response> {
    let turn = app.begin_turn(&caller, &id).await?;
    let mut session = app.read_session(&turn)?.ok_or_else(missing)?;
    let has_seen_stop = session.has_seen_stop;
    if !session.unread.is_empty() {
        session = read_unread(&app, &caller, session).await?;
    }
    let mut response = session.state.to_bytes(&app.model).into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, header::HeaderValue::from_static(STATE_TYPE));
    if has_seen_stop {
        headers.insert(SEEN_STOP, header::HeaderValue::from_static("true"));
    }
    Ok(response)
}

/// Has the engine read the token that a session still holds: a state has read everything.
async fn read_unread(app: &Arc<App>, caller: &Caller, session: Session) -> ApiResult<Session> {
    let plan = Plan {
        prompts: vec![session.unread],
        n: 1,
        seed: 0,
        options: TextOptions { max_tokens: 0, keep_state: true, ..TextOptions::default() },
        format: None,
        prompt_logprobs: None,
        turn: None,
        start: Some(session.state),
        turn_stops: Vec::new(),
    };
    let mut generation = Generation::start(app.clone(), caller.client.clone(), plan).await?;
    while let Some(Event { kind, .. }) = generation.next().await? {
        if let EventKind::Finished(finished) = kind
            && let Some((state, _)) = finished.state
        {
            return Ok(Session { state, unread: Vec::new(), has_seen_stop: session.has_seen_stop });
        }
    }
    Err(ApiError::internal("the state could not be brought up to date"))
}

/// Begins or replaces a session with a state that `GET` or `mmfree generate --save-state` gave.
#[utoipa::path(
    put,
    path = "/v1/sessions/{id}/state",
    params(("id" = String, Path, description = "The session's name")),
    request_body(content = Vec<u8>, content_type = "application/octet-stream"),
    responses(
        (status = 200, description = "The session", body = SessionInfo),
        (status = "4XX", description = "The state is damaged, or of another model", body = crate::error::ErrorBody),
        (status = "5XX", description = "The store cannot be reached", body = crate::error::ErrorBody),
    ),
    security((), ("key" = []))
)]
pub(crate) async fn put_state(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Id(id): Id,
    request: axum::extract::Request,
) -> ApiResult<Response> {
    let is_binary = request
        .headers()
        .get(header::CONTENT_TYPE)
        .is_some_and(|value| value.as_bytes().starts_with(STATE_TYPE.as_bytes()));
    if !is_binary {
        return Err(ApiError::media_type(STATE_TYPE));
    }
    let has_seen_stop = request.headers().get(SEEN_STOP).is_some_and(|value| value == "true");
    let limit = (app.state_bytes() + MAX_OVERHEAD)
        .min(app.options.limits.max_body_bytes.max(app.state_bytes() + MAX_OVERHEAD));
    let Bytes(bytes) = Bytes::read(&app, request, limit).await?;
    let state = state_from_bytes(&app.model, &bytes).map_err(ApiError::bad_request)?;
    let mut turn = app.begin_turn(&caller, &id).await?;
    let session = Session { has_seen_stop, ..Session::new(state) };
    turn.save(session.to_bytes(&app.model)).await?;
    Ok((StatusCode::OK, axum::Json(info(&app, &turn, &session))).into_response())
}
