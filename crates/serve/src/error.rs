//! Errors, and the one place where they become OpenAI's JSON.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

use crate::scheduler::{Failure, Refusal};

/// Result of a request.
pub(crate) type ApiResult<T> = Result<T, ApiError>;

/// An answer that is an error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ApiError {
    status: StatusCode,
    body: ErrorObject,
    retry_after: Option<u64>,
}

/// `{"error": …}`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub(crate) struct ErrorBody {
    error: ErrorObject,
}

/// What went wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub(crate) struct ErrorObject {
    /// For people.
    message: String,
    /// The kind of error.
    r#type: String,
    /// The request's field that is to blame.
    param: Option<String>,
    /// For programs.
    code: Option<String>,
}

impl ApiError {
    fn new(status: StatusCode, kind: &str, message: impl Into<String>) -> Self {
        let body =
            ErrorObject { message: message.into(), r#type: kind.into(), param: None, code: None };
        Self { status, body, retry_after: None }
    }

    fn code(mut self, code: &str) -> Self {
        self.body.code = Some(code.into());
        self
    }

    fn retry_after(mut self, seconds: u64) -> Self {
        self.retry_after = Some(seconds.clamp(1, 60));
        self
    }

    /// 400: a field that cannot be served.
    pub(crate) fn invalid(param: &str, message: impl Into<String>) -> Self {
        let mut error = Self::bad_request(message);
        error.body.param = Some(param.into());
        error
    }

    /// 400.
    pub(crate) fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
    }

    /// 401.
    pub(crate) fn unauthorized(message: &str) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "invalid_request_error", message)
            .code("invalid_api_key")
    }

    /// 403.
    pub(crate) fn forbidden(message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, "invalid_request_error", message)
    }

    /// 404.
    pub(crate) fn not_found(message: impl Into<String>, code: &str) -> Self {
        Self::new(StatusCode::NOT_FOUND, "invalid_request_error", message).code(code)
    }

    /// 405.
    pub(crate) fn method_not_allowed() -> Self {
        let message = "this path does not have this method; /openapi.json lists them";
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "invalid_request_error", message)
    }

    /// 408.
    pub(crate) fn slow_request(message: &str) -> Self {
        Self::new(StatusCode::REQUEST_TIMEOUT, "invalid_request_error", message)
    }

    /// 409.
    pub(crate) fn conflict(message: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, "invalid_request_error", message).code("session_conflict")
    }

    /// 413.
    pub(crate) fn too_large(message: impl Into<String>) -> Self {
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "invalid_request_error", message)
    }

    /// 415.
    pub(crate) fn media_type(expected: &str) -> Self {
        let message = format!("send the body as Content-Type: {expected}");
        Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "invalid_request_error", message)
    }

    /// 429.
    pub(crate) fn busy(message: &str, seconds: u64) -> Self {
        Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message)
            .code("rate_limit_exceeded")
            .retry_after(seconds)
    }

    /// 500.
    pub(crate) fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message)
    }

    /// 503.
    pub(crate) fn unavailable(message: impl Into<String>, code: &str) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", message)
            .code(code)
            .retry_after(2)
    }

    /// 504.
    pub(crate) fn timeout(message: impl Into<String>) -> Self {
        Self::new(StatusCode::GATEWAY_TIMEOUT, "server_error", message).code("timeout")
    }

    /// 503, of a server that is ending.
    pub(crate) fn shutting_down() -> Self {
        Self::unavailable("the server is shutting down; try another replica", "shutting_down")
    }

    /// A job that the scheduler did not take; `wait` is how long others wait at present, in seconds.
    pub(crate) fn refused(refusal: Refusal, wait: u64) -> Self {
        match refusal {
            Refusal::ClientQueue => {
                Self::busy("you have too many requests waiting; retry later", wait)
            }
            Refusal::ClientTexts => {
                Self::busy("you have too many requests at once; retry later", wait)
            }
            Refusal::Full => Self::busy("too many requests are waiting; retry later", wait),
            Refusal::Closed => Self::shutting_down(),
        }
    }

    /// The status.
    pub(crate) fn status(&self) -> StatusCode {
        self.status
    }

    /// The words.
    pub(crate) fn message(&self) -> &str {
        &self.body.message
    }

    /// The body, also the last event of a stream that fails.
    pub(crate) fn body(&self) -> ErrorBody {
        ErrorBody { error: self.body.clone() }
    }
}

impl From<Failure> for ApiError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Grammar(why) => {
                Self::invalid("response_format", format!("the format cannot be followed: {why}"))
            }
            Failure::Engine(why) => Self::internal(why),
            Failure::ShuttingDown => Self::shutting_down(),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        let headers = response.headers_mut();
        if let Some(seconds) = self.retry_after {
            headers.insert(header::RETRY_AFTER, seconds.into());
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        // For the log.
        response.extensions_mut().insert(self);
        response
    }
}
