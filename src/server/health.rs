//! Everything that is no generation: models, tokens, and the node's condition.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::Json;
use axum::body::Bytes;
use axum::extract::{Path, State};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::chat::Conversation;
use super::error::ApiError;
use super::fields::{Fields, token_ids};
use super::reply::blocking;
use super::state::{ServerState, no_model};

type Shared = State<Arc<ServerState>>;

/// The process answers, and its device works.
pub(super) async fn health(State(state): Shared) -> Result<Json<Value>, ApiError> {
    match state.stats().lost {
        Some(reason) => Err(ApiError::lost(&reason)),
        None => Ok(Json(json!({"status": "ok"}))),
    }
}

/// The node takes requests.
pub(super) async fn ready(State(state): Shared) -> Result<Json<Value>, ApiError> {
    if let Some(reason) = state.stats().lost {
        return Err(ApiError::lost(&reason));
    }
    if state.is_draining() {
        return Err(ApiError::draining());
    }
    if !state.ready.load(Ordering::Acquire) {
        return Err(ApiError::not_ready("the model is still loading or the node has not joined its cluster yet"));
    }
    Ok(Json(json!({"status": "ready"})))
}

pub(super) async fn version() -> Json<Value> {
    Json(json!({"version": env!("CARGO_PKG_VERSION")}))
}

pub(super) async fn metrics(State(state): Shared) -> Result<Response, ApiError> {
    let text = state.metrics.encode().map_err(|_| ApiError::internal("the metrics cannot be written as text"))?;
    Ok(([(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], text).into_response())
}

/// The cluster as this node knows it, with this node's latencies.
pub(super) async fn cluster(State(state): Shared) -> Json<Value> {
    let mut cluster = (state.cluster)();
    if let Value::Object(map) = &mut cluster {
        map.insert("latency".into(), state.metrics.latencies());
    }
    Json(cluster)
}

/// One entry for each name that requests may use.
fn listed(state: &ServerState) -> Vec<Value> {
    let Some(model) = &state.model else { return Vec::new() };
    std::iter::once(&model.name)
        .chain(&model.aliases)
        .map(|name| {
            json!({
                "id": name,
                "object": "model",
                "created": state.started,
                "owned_by": "distkv",
                "root": model.name,
                "max_model_len": model.max_len,
            })
        })
        .collect()
}

pub(super) async fn models(State(state): Shared) -> Json<Value> {
    Json(json!({"object": "list", "data": listed(&state)}))
}

pub(super) async fn model(State(state): Shared, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    let served = state.model.as_ref().ok_or_else(no_model)?;
    let found = listed(&state).into_iter().find(|entry| entry["id"] == id.as_str());
    found.map(Json).ok_or_else(|| ApiError::unknown_model(&id, &served.name))
}

/// `{prompt}` or `{messages}` to `{tokens, count, max_model_len}`.
pub(super) async fn tokenize(state: Arc<ServerState>, body: Bytes) -> Result<Response, ApiError> {
    let fields = Fields::of(body).await?;
    let model = state.model(fields.string("model")?)?;
    let text = model.text.clone();
    let special = fields.bool("add_special_tokens")?;
    let tokens = if fields.get("messages").is_some() {
        let conversation = Conversation::read(&fields)?;
        blocking(move || conversation.encode(&*text, special.unwrap_or(false))).await?
    } else {
        let prompt = fields.string("prompt")?.map(str::to_owned);
        let prompt = prompt.ok_or_else(|| ApiError::field("prompt", "`prompt` or `messages` is required"))?;
        blocking(move || {
            text.encode(&prompt, special.unwrap_or(true))
                .map_err(|error| ApiError::field("prompt", format!("`prompt` cannot be tokenised: {error:#}")))
        })
        .await?
    };
    let mut answer = json!({"count": tokens.len(), "max_model_len": model.max_len, "tokens": tokens});
    if fields.bool("return_token_strs")?.unwrap_or(false) {
        answer["token_strs"] = tokens.iter().map(|&id| model.text.token_text(id)).collect();
    }
    Ok(Json(answer).into_response())
}

/// `{tokens}` to `{prompt}`.
pub(super) async fn detokenize(state: Arc<ServerState>, body: Bytes) -> Result<Response, ApiError> {
    let fields = Fields::of(body).await?;
    let model = state.model(fields.string("model")?)?;
    let tokens = fields.array("tokens")?.ok_or_else(|| ApiError::field("tokens", "`tokens` is required"))?;
    let tokens = token_ids("tokens", tokens, model.vocab)?;
    let prompt = model
        .text
        .decode(&tokens, false)
        .map_err(|error| ApiError::field("tokens", format!("`tokens` have no text: {error:#}")))?;
    Ok(Json(json!({"prompt": prompt})).into_response())
}
