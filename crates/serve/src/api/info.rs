//! Models, health, metrics and the description of the API.

use std::sync::atomic::Ordering;
use std::sync::{Arc, LazyLock};

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::{Modify, OpenApi};

use super::types::{Health, ModelInfo, ModelList};
use super::{App, Id};
use crate::error::{ApiError, ApiResult, ErrorBody};

/// `/openapi.json`
#[derive(OpenApi)]
#[openapi(
    info(
        title = "mmfree",
        description = "Language models whose sessions weigh kilobytes. The paths under /v1 follow OpenAI's API."
    ),
    paths(
        super::completions::completions,
        super::chat::chat,
        models,
        model,
        super::sessions::get_session,
        super::sessions::delete_session,
        super::sessions::get_state,
        super::sessions::put_state,
        health,
        live,
        metrics,
    ),
    modifiers(&Security)
)]
struct Description;

struct Security;

impl Modify for Security {
    fn modify(&self, openapi: &mut utoipa::openapi::OpenApi) {
        let scheme =
            SecurityScheme::Http(HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build());
        openapi.components.get_or_insert_default().add_security_scheme("key", scheme);
    }
}

static DESCRIPTION: LazyLock<String> =
    LazyLock::new(|| Description::openapi().to_pretty_json().unwrap_or_else(|_| "{}".to_owned()));

/// The description of this API.
pub(crate) async fn openapi() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], DESCRIPTION.as_str()).into_response()
}

fn model_info(app: &App) -> ModelInfo {
    ModelInfo {
        id: app.options.model_name.clone(),
        object: "model",
        created: app.started,
        owned_by: "mmfree",
        fingerprint: app.fingerprint.clone(),
        state_bytes: app.state_bytes(),
        max_prompt_tokens: app.options.limits.max_prompt_tokens,
        max_tokens: app.options.limits.max_tokens,
        has_chat_template: !app.template.is_plain(),
    }
}

/// The model that is served, as a list.
#[utoipa::path(
    get,
    path = "/v1/models",
    responses(
        (status = 200, description = "One model", body = ModelList),
        (status = "4XX", description = "No key", body = ErrorBody),
        (status = "5XX", description = "Shutting down", body = ErrorBody),
    ),
    security((), ("key" = []))
)]
pub(crate) async fn models(State(app): State<Arc<App>>) -> Response {
    axum::Json(ModelList { object: "list", data: vec![model_info(&app)] }).into_response()
}

/// The model of a name.
#[utoipa::path(
    get,
    path = "/v1/models/{id}",
    params(("id" = String, Path, description = "The model's name")),
    responses(
        (status = 200, description = "The model", body = ModelInfo),
        (status = "4XX", description = "No such model, or no key", body = ErrorBody),
        (status = "5XX", description = "Shutting down", body = ErrorBody),
    ),
    security((), ("key" = []))
)]
pub(crate) async fn model(State(app): State<Arc<App>>, Id(id): Id) -> ApiResult<Response> {
    if id != app.options.model_name {
        let message = format!("the model {id:?} does not exist here");
        return Err(ApiError::not_found(message, "model_not_found"));
    }
    Ok(axum::Json(model_info(&app)).into_response())
}

/// Whether new requests are welcome. A store that is down is reported and no reason to stay away: requests
/// without sessions do not need it.
#[utoipa::path(
    get,
    path = "/health",
    responses(
        (status = 200, description = "Ready", body = Health),
        (status = 503, description = "Shutting down, or the engine failed", body = Health),
    )
)]
pub(crate) async fn health(State(app): State<Arc<App>>) -> Response {
    let store = app.sessions.is_store_up().await.map(|is_up| if is_up { "up" } else { "down" });
    let (status, word) = match (app.scheduler.is_alive(), app.is_ending.load(Ordering::Relaxed)) {
        (false, _) => (StatusCode::SERVICE_UNAVAILABLE, "failed"),
        (true, true) => (StatusCode::SERVICE_UNAVAILABLE, "shutting_down"),
        (true, false) => (StatusCode::OK, "ok"),
    };
    (status, axum::Json(Health { status: word, store })).into_response()
}

/// Whether the process is worth keeping.
#[utoipa::path(
    get,
    path = "/health/live",
    responses(
        (status = 200, description = "Alive", body = Health),
        (status = 503, description = "The engine failed", body = Health),
    )
)]
pub(crate) async fn live(State(app): State<Arc<App>>) -> Response {
    let (status, word) = match app.scheduler.is_alive() {
        true => (StatusCode::OK, "ok"),
        false => (StatusCode::SERVICE_UNAVAILABLE, "failed"),
    };
    (status, axum::Json(Health { status: word, store: None })).into_response()
}

/// Counters for Prometheus.
#[utoipa::path(
    get,
    path = "/metrics",
    responses((status = 200, description = "Counters", body = String, content_type = "application/openmetrics-text"))
)]
pub(crate) async fn metrics(State(app): State<Arc<App>>) -> ApiResult<Response> {
    let text = app.metrics.encode().map_err(|error| ApiError::internal(error.to_string()))?;
    let content_type = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    Ok(([(header::CONTENT_TYPE, content_type)], text).into_response())
}
