//! The HTTP side: OpenAI's API over an [`EngineHandle`](crate::engine::EngineHandle),
//! and what operators ask of a node.
//!
//! A request's life: the body is parsed by hand so that every error names its
//! field (`fields`, `request`), text becomes tokens (`completions`, `chat`), the
//! engine takes one request a choice (`reply`), tokens become text and stop
//! strings end it (`generation`, `stop`), and the endpoint's `Shape` writes
//! JSON. A client that goes drops the engine's streams, which cancels them.

mod chat;
mod completions;
mod error;
mod fields;
mod generation;
mod health;
mod metrics;
mod peer;
mod reply;
mod request;
mod state;
mod stop;
mod text;

use std::future::Future;
use std::io;
use std::sync::Arc;

use axum::Router;
use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::{StatusCode, Uri, header};
use axum::middleware::{self, Next};
use axum::response::Response;
use axum::routing::{get, post};
use axum::serve::ListenerExt;
use tokio::net::TcpListener;
use tokio::sync::oneshot;

use crate::ingress;

pub use error::ApiError;
pub use metrics::{Latency, Metrics};
pub use state::{Cluster, Model, ServerState, Stats, TextModel, TextStream};
pub use text::ModelText;

/// The routes over `state`.
pub fn router(state: Arc<ServerState>) -> Router {
    let guarded = Router::new().route("/cluster", get(health::cluster)).route("/v1/models", get(health::models));
    let guarded = if state.model.is_some() {
        guarded
            .route("/v1/models/{*id}", get(health::model))
            .route("/v1/completions", post(completions))
            .route("/v1/chat/completions", post(chat_completions))
            .route("/tokenize", post(tokenize))
            .route("/detokenize", post(detokenize))
    } else {
        guarded
    };
    let peers = match &state.runner {
        Some(runner) => {
            let limit = DefaultBodyLimit::max(runner.longest_order());
            Router::new().route(ingress::PATH, post(peer_request).layer(limit))
        }
        None => Router::new(),
    };
    guarded
        .layer(middleware::from_fn_with_state(state.clone(), authorize))
        // Open: probes and scrapers carry no key, and learn nothing private.
        .route("/health", get(health::health))
        .route("/ready", get(health::ready))
        .route("/version", get(health::version))
        .route("/metrics", get(health::metrics))
        .merge(peers)
        .fallback(unknown_path)
        .method_not_allowed_fallback(wrong_method)
        .layer(DefaultBodyLimit::max(state.max_body_bytes))
        .with_state(state)
}

/// Serves until `shutdown` resolves, then drains: new generations get 503 while
/// those that run finish, then the listener closes and this returns; at the
/// latest when the drain limit has passed. What still runs then ends with the
/// runtime.
pub async fn serve(
    listener: TcpListener,
    state: Arc<ServerState>,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let (drained, stop) = oneshot::channel::<()>();
    let app = router(state.clone());
    // Tokens are small writes, each wanted at once.
    let listener = listener.tap_io(|socket| {
        if let Err(error) = socket.set_nodelay(true) {
            tracing::debug!(%error, "TCP_NODELAY was refused");
        }
    });
    let server = axum::serve(listener, app).with_graceful_shutdown(async {
        // A dropped sender means that this function was dropped.
        let _ = stop.await;
    });
    let drain = async {
        shutdown.await;
        state.drain();
        let idle = async {
            state.idle().await;
            let _ = drained.send(());
            std::future::pending::<()>().await;
        };
        if tokio::time::timeout(state.drain_limit, idle).await.is_err() {
            tracing::warn!(running = state.running(), "the drain limit passed: connections are cut");
        }
    };
    tokio::select! {
        served = server.into_future() => served,
        () = drain => Ok(()),
    }
}

type Body = Result<Bytes, BytesRejection>;
type Answer = Result<Response, ApiError>;

fn read(state: &ServerState, body: Body) -> Result<Bytes, ApiError> {
    body.map_err(|rejection| match rejection.status() {
        StatusCode::PAYLOAD_TOO_LARGE => ApiError::too_large(state.max_body_bytes),
        _ => ApiError::invalid(format!("the request body cannot be read: {rejection}")),
    })
}

async fn completions(State(state): State<Arc<ServerState>>, body: Body) -> Answer {
    let body = read(&state, body)?;
    completions::completions(state, body).await
}

async fn chat_completions(State(state): State<Arc<ServerState>>, body: Body) -> Answer {
    let body = read(&state, body)?;
    chat::chat_completions(state, body).await
}

async fn tokenize(State(state): State<Arc<ServerState>>, body: Body) -> Answer {
    let body = read(&state, body)?;
    health::tokenize(state, body).await
}

async fn detokenize(State(state): State<Arc<ServerState>>, body: Body) -> Answer {
    let body = read(&state, body)?;
    health::detokenize(state, body).await
}

async fn peer_request(State(state): State<Arc<ServerState>>, body: Body) -> Answer {
    let body = read(&state, body)?;
    peer::run(state, body).await
}

async fn authorize(State(state): State<Arc<ServerState>>, request: Request, next: Next) -> Answer {
    if let Some(key) = &state.api_key {
        let given = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let given =
            given.and_then(|value| value.split_once(' ')).filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
        // Hashes compare in constant time.
        if !given.is_some_and(|(_, given)| blake3::hash(given.trim().as_bytes()) == *key) {
            return Err(ApiError::unauthorized());
        }
    }
    Ok(next.run(request).await)
}

async fn unknown_path(State(state): State<Arc<ServerState>>, uri: Uri) -> ApiError {
    if state.model.is_none() && (uri.path().starts_with("/v1/") || uri.path().ends_with("tokenize")) {
        return state::no_model();
    }
    ApiError::not_found(format!("there is no {} here", uri.path()))
}

async fn wrong_method(request: Request) -> ApiError {
    let message = format!("{} does not take {}", request.uri().path(), request.method());
    ApiError { status: StatusCode::METHOD_NOT_ALLOWED, ..ApiError::not_found(message) }
}
