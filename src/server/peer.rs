//! Requests that other nodes took in and that this one is to run. The body and
//! the answer are sealed under the cluster's key; no API key is asked for.

use std::convert::Infallible;
use std::sync::Arc;

use axum::body::{Body, Bytes};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures_util::StreamExt;
use tokio_stream::wrappers::ReceiverStream;

use super::error::ApiError;
use super::state::ServerState;
use crate::ingress::Unheard;

pub(super) async fn run(state: Arc<ServerState>, body: Bytes) -> Result<Response, ApiError> {
    let Some(runner) = &state.runner else { return Err(ApiError::not_found("this node takes no requests of others")) };
    let order = runner.open(&body).map_err(|unheard| match unheard {
        Unheard::Stranger => ApiError {
            status: StatusCode::FORBIDDEN,
            ..ApiError::invalid("this is for nodes of the cluster; clients ask /v1")
        },
        Unheard::Misdirected => ApiError {
            status: StatusCode::MISDIRECTED_REQUEST,
            ..ApiError::invalid("another instance, or another model, is meant")
        },
    })?;
    let admitted = state.admit()?;
    let draining = state.clone();
    let frames = runner.run(order, move || draining.is_draining(), admitted);
    let frames = ReceiverStream::new(frames).map(Ok::<_, Infallible>);
    Ok(([(header::CONTENT_TYPE, "application/octet-stream")], Body::from_stream(frames)).into_response())
}
