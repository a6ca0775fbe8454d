//! Running the choices of a request together and answering with them: as one
//! JSON object or as server-sent events.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::error::ApiError;
use super::generation::{Event, Generation, Piece, Plan, Spec};
use super::metrics::Metrics;
use super::state::{Admitted, Model, ServerState, TextModel};
use crate::engine;
use crate::model::sampler::TokenLogprobs;

/// A comment is sent after this long without an event, so that proxies keep the
/// connection open through a long prompt.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// Events that wait for a slow client before its choices pause.
const BACKLOG: usize = 64;

/// How an endpoint writes its answer.
pub(super) trait Shape: Send + Sync {
    /// The first chunk of a choice, if there is one.
    fn opening(&self, choice: usize, prompt_logprobs: Option<&[TokenLogprobs]>) -> Option<Value>;
    /// A chunk of text.
    fn chunk(&self, choice: usize, text: &str, tokens: &[Piece]) -> Value;
    /// The last chunk of a choice.
    fn closing(&self, choice: usize, finish_reason: &str) -> Value;
    /// The chunk after the last, with no choices; `usage` is added to it.
    fn epilogue(&self) -> Value;
    /// The whole answer without its usage.
    fn whole(&self, choices: &[Collected]) -> Value;
}

/// A choice in full.
#[derive(Default)]
pub(super) struct Collected {
    pub prompt_logprobs: Option<Vec<TokenLogprobs>>,
    pub text: String,
    pub tokens: Vec<Piece>,
    pub finish_reason: &'static str,
}

/// A request that is ready to run.
pub(super) struct Job {
    pub specs: Vec<Spec>,
    /// Prompt tokens; a prompt of several choices counts once.
    pub prompt_tokens: usize,
    /// Choices of each prompt.
    pub n: usize,
    pub stream: bool,
    pub include_usage: bool,
    pub arrived: Instant,
    pub shape: Box<dyn Shape>,
}

impl Job {
    /// Submits the choices and answers. Nothing is sent before the engine has
    /// taken all of them.
    pub(super) async fn run(
        self,
        state: &Arc<ServerState>,
        model: &Model,
        admitted: Admitted,
    ) -> Result<Response, ApiError> {
        let mut streams = Vec::with_capacity(self.specs.len());
        for Spec { request, stop, prompt_only } in self.specs {
            let plan = Plan { stop, prompt_logprobs: request.prompt_logprobs, prompt_only };
            // A refusal drops the streams before it, which cancels them.
            streams.push((model.engine.place(request).await?, plan));
        }
        let running = Running {
            text: model.text.clone(),
            metrics: state.metrics.clone(),
            arrived: self.arrived,
            streams,
            usage: Usage { prompt_tokens: self.prompt_tokens, n: self.n, ..Usage::default() },
        };
        if self.stream {
            Ok(running.events(self.shape, self.include_usage, admitted))
        } else {
            running.whole(self.shape).await.map(|body| axum::Json(body).into_response())
        }
    }
}

/// Submitted choices.
struct Running {
    text: Arc<dyn TextModel>,
    metrics: Arc<Metrics>,
    arrived: Instant,
    streams: Vec<(engine::Stream, Plan)>,
    usage: Usage,
}

impl Running {
    /// Collects every choice. Dropping the future cancels them.
    async fn whole(self, shape: Box<dyn Shape>) -> Result<Value, ApiError> {
        let Self { text, metrics, arrived, streams, mut usage } = self;
        let mut collected: Vec<Collected> = streams.iter().map(|_| Collected::default()).collect();
        let mut choices = Choices::new(streams, &*text, arrived, &metrics);
        while let Some((index, event)) = choices.next(&mut usage).await {
            let choice = &mut collected[index];
            match event {
                Event::Started { prompt_logprobs } => choice.prompt_logprobs = prompt_logprobs,
                Event::Text { text, tokens } => {
                    choice.text.push_str(&text);
                    choice.tokens.extend(tokens);
                }
                Event::Finished(reason) => choice.finish_reason = reason,
                Event::Failed(message) => return Err(ApiError::internal(message)),
            }
        }
        let mut body = shape.whole(&collected);
        body["usage"] = usage.json();
        Ok(body)
    }

    /// Answers with events while the choices run in a task of their own. The
    /// task ends, and the choices are cancelled, as soon as the client goes.
    fn events(self, shape: Box<dyn Shape>, include_usage: bool, admitted: Admitted) -> Response {
        let (frames, body) = mpsc::channel::<Result<Bytes, Infallible>>(BACKLOG);
        tokio::spawn(async move {
            let _admitted = admitted;
            tokio::select! {
                () = frames.closed() => {}
                // The client is gone if a frame cannot be sent.
                _ = self.send(shape, include_usage, &frames) => {}
            }
        });
        let headers = [
            (header::CONTENT_TYPE, "text/event-stream"),
            (header::CACHE_CONTROL, "no-cache"),
            // nginx would otherwise collect events into a buffer.
            (header::HeaderName::from_static("x-accel-buffering"), "no"),
        ];
        (headers, Body::from_stream(ReceiverStream::new(body))).into_response()
    }

    async fn send(self, shape: Box<dyn Shape>, include_usage: bool, frames: &Frames) -> Option<()> {
        let Self { text, metrics, arrived, streams, mut usage } = self;
        let mut choices = Choices::new(streams, &*text, arrived, &metrics);
        let emit = async |mut chunk: Value| {
            if include_usage {
                chunk["usage"] = Value::Null;
            }
            frame(frames, &chunk).await
        };
        loop {
            let next = match tokio::time::timeout(KEEP_ALIVE, choices.next(&mut usage)).await {
                Ok(next) => next,
                Err(_) => {
                    frames.send(Ok(Bytes::from_static(b": waiting\n\n"))).await.ok()?;
                    continue;
                }
            };
            let Some((index, event)) = next else { break };
            match event {
                Event::Started { prompt_logprobs } => {
                    if let Some(chunk) = shape.opening(index, prompt_logprobs.as_deref()) {
                        emit(chunk).await?;
                    }
                }
                Event::Text { text, tokens } => emit(shape.chunk(index, &text, &tokens)).await?,
                Event::Finished(reason) => emit(shape.closing(index, reason)).await?,
                // The answer is broken off: no [DONE] follows.
                Event::Failed(message) => return frame(frames, &ApiError::internal(message).body()).await,
            }
        }
        if include_usage {
            let mut chunk = shape.epilogue();
            chunk["usage"] = usage.json();
            frame(frames, &chunk).await?;
        }
        frames.send(Ok(Bytes::from_static(b"data: [DONE]\n\n"))).await.ok()
    }
}

type Frames = mpsc::Sender<Result<Bytes, Infallible>>;

/// Sends one event; `None` if the client is gone.
async fn frame(frames: &Frames, chunk: &Value) -> Option<()> {
    frames.send(Ok(Bytes::from(format!("data: {chunk}\n\n")))).await.ok()
}

/// A choice with the event it yielded last.
type Step<'a> = BoxFuture<'a, (usize, Generation<'a>, Event)>;

/// The choices of a request, whichever has something first.
struct Choices<'a> {
    steps: FuturesUnordered<Step<'a>>,
}

impl<'a> Choices<'a> {
    fn new(
        streams: Vec<(engine::Stream, Plan)>,
        text: &'a dyn TextModel,
        arrived: Instant,
        metrics: &Arc<Metrics>,
    ) -> Self {
        let steps = streams
            .into_iter()
            .enumerate()
            .map(|(index, (stream, plan))| step(index, Generation::new(stream, text, plan, arrived, metrics.clone())))
            .collect();
        Self { steps }
    }

    /// The next event of any choice; `None` once all have ended.
    async fn next(&mut self, usage: &mut Usage) -> Option<(usize, Event)> {
        let (index, generation, event) = self.steps.next().await?;
        if matches!(event, Event::Finished(_) | Event::Failed(_)) {
            usage.add(index, &generation);
        } else {
            self.steps.push(step(index, generation));
        }
        Some((index, event))
    }
}

fn step<'a>(index: usize, mut generation: Generation<'a>) -> Step<'a> {
    Box::pin(async move {
        let event = generation.next().await;
        (index, generation, event)
    })
}

/// Tokens that a request used.
#[derive(Default)]
struct Usage {
    prompt_tokens: usize,
    completion_tokens: usize,
    cached_tokens: usize,
    n: usize,
}

impl Usage {
    fn add(&mut self, choice: usize, generation: &Generation<'_>) {
        self.completion_tokens += generation.generated;
        // A prompt counts once, so its first choice speaks for it: the others
        // find in the cache what the first one computed.
        if choice.is_multiple_of(self.n.max(1)) {
            self.cached_tokens += generation.cached_tokens;
        }
    }

    fn json(&self) -> Value {
        json!({
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        })
    }
}

/// Runs tokenizer work off the threads that serve connections.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(ApiError::internal(format!("the tokenizer failed: {error}"))),
    }
}

/// A response id as OpenAI's look.
pub(super) fn response_id(prefix: &str) -> String {
    format!("{prefix}-{:032x}", rand::random::<u128>())
}
