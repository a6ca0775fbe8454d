//! Errors as OpenAI's clients expect them.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::engine::Rejected;

/// What a client is told: a status and OpenAI's error body.
#[derive(Clone, Debug, PartialEq)]
pub struct ApiError {
    /// HTTP status.
    pub status: StatusCode,
    /// What is wrong and what to do about it.
    pub message: String,
    /// OpenAI's error type.
    pub kind: &'static str,
    /// The field at fault.
    pub param: Option<String>,
    /// Machine-readable reason.
    pub code: Option<&'static str>,
    /// Seconds after which trying again makes sense.
    pub retry_after: Option<u32>,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), kind, param: None, code: None, retry_after: None }
    }

    /// 400: the request cannot be understood.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
    }

    /// 400: `field` holds something it may not.
    pub fn field(field: &str, message: impl Into<String>) -> Self {
        Self { param: Some(field.to_owned()), ..Self::invalid(message) }
    }

    /// 400: `field` asks for something this server does not do.
    pub fn unsupported(field: &str, because: &str) -> Self {
        Self { code: Some("unsupported"), ..Self::field(field, format!("unsupported: {field} because {because}")) }
    }

    /// 400: more context than there is.
    pub fn too_long(message: impl Into<String>, field: &str) -> Self {
        Self { code: Some("context_length_exceeded"), ..Self::field(field, message) }
    }

    /// 401.
    pub fn unauthorized() -> Self {
        Self {
            code: Some("invalid_api_key"),
            ..Self::new(
                StatusCode::UNAUTHORIZED,
                "invalid_request_error",
                "this server needs an API key: send it as `Authorization: Bearer KEY`",
            )
        }
    }

    /// 404: nothing of that name.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "invalid_request_error", message)
    }

    /// 404: not the model served here.
    pub fn unknown_model(asked: &str, served: &str) -> Self {
        Self {
            code: Some("model_not_found"),
            param: Some("model".to_owned()),
            ..Self::not_found(format!("the model `{asked}` does not exist here; this node serves `{served}`"))
        }
    }

    /// 413.
    pub fn too_large(limit: usize) -> Self {
        Self::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "invalid_request_error",
            format!("the request body is larger than the limit of {limit} bytes"),
        )
    }

    /// 500.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message)
    }

    /// 503: shutting down.
    pub fn draining() -> Self {
        Self {
            code: Some("draining"),
            retry_after: Some(5),
            ..Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", Rejected::Draining.to_string())
        }
    }

    /// 503: not ready yet.
    pub fn not_ready(message: &str) -> Self {
        Self { retry_after: Some(1), ..Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", message) }
    }

    /// 503: the device is lost, and the node ends.
    pub fn lost(reason: &str) -> Self {
        let message = format!("{reason}; this node ends");
        Self { code: Some("device_lost"), ..Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", message) }
    }

    /// The body: `{"error": {...}}`.
    pub fn body(&self) -> Value {
        json!({"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}})
    }
}

impl From<Rejected> for ApiError {
    fn from(rejected: Rejected) -> Self {
        let message = rejected.to_string();
        match rejected {
            Rejected::TooLong { .. } => Self { param: None, ..Self::too_long(message, "") },
            // The queue empties at the pace of whole requests; a second is the
            // smallest wait that a client can be told.
            Rejected::Overloaded { .. } => Self {
                code: Some("overloaded"),
                retry_after: Some(1),
                ..Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message)
            },
            Rejected::Draining => Self::draining(),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, axum::Json(self.body())).into_response();
        if let Some(seconds) = self.retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}
