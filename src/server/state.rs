//! What the handlers share.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::Value;
use tokio::sync::watch;

use super::error::ApiError;
use super::metrics::Metrics;
use crate::engine::{EngineHandle, EngineStats};
use crate::ingress::Runner;
use crate::model::sampler::SamplingParams;

/// Text to tokens and back, and messages to a prompt: all that the server
/// needs of a model besides the engine.
pub trait TextModel: Send + Sync {
    /// Tokens of `text`; with `add_special` also those that begin (and end) a
    /// text for this model.
    fn encode(&self, text: &str, add_special: bool) -> anyhow::Result<Vec<u32>>;
    /// Text of `tokens`.
    fn decode(&self, tokens: &[u32], skip_special: bool) -> anyhow::Result<String>;
    /// A decoder for tokens that arrive one at a time.
    fn stream(&self) -> Box<dyn TextStream + '_>;
    /// One token as people read it.
    fn token_text(&self, id: u32) -> String;
    /// One token's bytes, which need not be UTF-8.
    fn token_bytes(&self, id: u32) -> Vec<u8>;
    /// The prompt for a conversation. An error is the conversation's fault (or
    /// the model has no chat template) and is told to the client.
    fn render(
        &self,
        messages: &[Value],
        tools: Option<&[Value]>,
        add_generation_prompt: bool,
    ) -> anyhow::Result<String>;
}

/// Decodes tokens as they come.
pub trait TextStream: Send {
    /// The text that `id` completes, if any.
    fn push(&mut self, id: u32) -> anyhow::Result<Option<String>>;
    /// What is left when no token follows.
    fn finish(&mut self) -> String;
}

/// The model a node serves.
#[derive(Clone)]
pub struct Model {
    /// Takes the requests.
    pub engine: EngineHandle,
    /// Tokenizer and chat template.
    pub text: Arc<dyn TextModel>,
    /// Name under which it is listed.
    pub name: String,
    /// Other names that requests may use.
    pub aliases: Vec<String>,
    /// Longest context, prompt and answer together, in tokens.
    pub max_len: usize,
    /// Tokens in the vocabulary.
    pub vocab: usize,
    /// Tokens that end a generation.
    pub eos: Vec<u32>,
    /// What a request gets where it says nothing (generation_config.json).
    pub defaults: SamplingParams,
}

/// A source of figures.
pub type Stats = Arc<dyn Fn() -> EngineStats + Send + Sync>;
/// A source of `/cluster`'s JSON.
pub type Cluster = Arc<dyn Fn() -> Value + Send + Sync>;

/// What the handlers share. Built once, then given to
/// [`serve`](super::serve) in an `Arc`.
pub struct ServerState {
    pub(super) model: Option<Model>,
    pub(super) stats: Stats,
    pub(super) cluster: Cluster,
    pub(super) ready: Arc<AtomicBool>,
    /// Of the key, so that comparing takes the same time for every guess.
    pub(super) api_key: Option<blake3::Hash>,
    pub(super) max_body_bytes: usize,
    pub(super) drain_limit: Duration,
    pub(super) metrics: Arc<Metrics>,
    pub(super) runner: Option<Arc<Runner>>,
    /// Unix time at start: the models' `created`.
    pub(super) started: u64,
    draining: AtomicBool,
    inflight: watch::Sender<usize>,
}

impl ServerState {
    /// The state of a node that serves `model`; with `None` that of a node
    /// which only lends memory. `ready` is set by the owner once the node may
    /// take requests.
    pub fn new(model: Option<Model>, stats: Stats, cluster: Cluster, ready: Arc<AtomicBool>) -> Self {
        let metrics = Arc::new(Metrics::new(stats.clone()));
        Self {
            model,
            stats,
            cluster,
            ready,
            api_key: None,
            max_body_bytes: 32 << 20,
            drain_limit: Duration::from_secs(300),
            metrics,
            runner: None,
            started: unix_time(),
            draining: AtomicBool::new(false),
            inflight: watch::Sender::new(0),
        }
    }

    /// Clients must send `key` as a bearer token.
    pub fn with_api_key(mut self, key: Option<&str>) -> Self {
        self.api_key = key.map(|key| blake3::hash(key.as_bytes()));
        self
    }

    /// Runs requests of other nodes; without it none are taken in.
    pub fn with_runner(mut self, runner: Option<Arc<Runner>>) -> Self {
        self.runner = runner;
        self
    }

    /// Largest request body in bytes; 32 MiB where not set.
    pub fn with_max_body_bytes(mut self, limit: usize) -> Self {
        self.max_body_bytes = limit;
        self
    }

    /// How long shutting down may wait for requests and connections to end; 5
    /// minutes where not set. A client that stopped reading must not keep a
    /// node from ending.
    pub fn with_drain_limit(mut self, limit: Duration) -> Self {
        self.drain_limit = limit;
        self
    }

    /// The metrics, to register more of them.
    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.metrics
    }

    /// The engine's figures now.
    pub fn stats(&self) -> EngineStats {
        (self.stats)()
    }

    /// From now on new requests get 503; those that run finish.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::SeqCst);
    }

    /// Whether [`drain`](Self::drain) was called.
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::SeqCst)
    }

    /// Returns once no request runs.
    pub async fn idle(&self) {
        // The sender lives as long as `self`, so this cannot fail.
        let _ = self.inflight.subscribe().wait_for(|count| *count == 0).await;
    }

    /// Requests that run.
    pub fn running(&self) -> usize {
        *self.inflight.borrow()
    }

    /// Admits one generation; it counts as running until the guard is dropped.
    pub(super) fn admit(self: &Arc<Self>) -> Result<Admitted, ApiError> {
        // Counted first and checked second: `drain` then `idle` misses none.
        self.inflight.send_modify(|count| *count += 1);
        let admitted = Admitted(self.clone());
        if self.is_draining() {
            return Err(ApiError::draining());
        }
        if !self.ready.load(Ordering::Acquire) {
            return Err(ApiError::not_ready("the model is still loading or the node has not joined its cluster yet"));
        }
        Ok(admitted)
    }

    /// The model, if `asked` is one of its names.
    pub(super) fn model(&self, asked: Option<&str>) -> Result<&Model, ApiError> {
        let model = self.model.as_ref().ok_or_else(no_model)?;
        match asked {
            Some(asked) if asked != model.name && !model.aliases.iter().any(|alias| alias == asked) => {
                Err(ApiError::unknown_model(asked, &model.name))
            }
            _ => Ok(model),
        }
    }
}

/// A request that runs.
pub(super) struct Admitted(Arc<ServerState>);

impl Drop for Admitted {
    fn drop(&mut self) {
        self.0.inflight.send_modify(|count| *count -= 1);
    }
}

pub(super) fn no_model() -> ApiError {
    ApiError::not_found("this node lends memory and serves no model; ask a node started with --model")
}

pub(super) fn unix_time() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs())
}
