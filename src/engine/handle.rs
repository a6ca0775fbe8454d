//! The engine as everything above sees it: tokens in, a stream of tokens out.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use futures_util::future::BoxFuture;
use tokio::sync::mpsc;

use crate::control::perf::PerfModel;
use crate::model::sampler::{SamplingParams, TokenLogprobs};

/// A request as the engine takes it: tokens in, tokens out. Text, stop strings
/// and templates are the caller's.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// Prompt, at least one token.
    pub prompt: Vec<u32>,
    /// How to choose.
    pub sampling: SamplingParams,
    /// Most tokens to generate, at least 1.
    pub max_tokens: usize,
    /// Tokens that end the generation (reported as a stop, not emitted).
    pub stop_tokens: Vec<u32>,
    /// Report logprobs of the prompt's tokens too (OpenAI's echo + logprobs).
    pub prompt_logprobs: bool,
    /// Tokens generated already, where this goes on with a request that was
    /// broken off: they count towards `max_tokens`, and are not emitted again.
    pub resume: Vec<u32>,
}

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop token.
    Stop,
    /// `max_tokens` or the model's length reached.
    Length,
}

/// What a request yields, in order: `Started`, `Token`s, then `Finished` or
/// `Failed`.
#[derive(Clone, Debug, PartialEq)]
pub enum Output {
    /// The prompt is being computed.
    Started {
        /// Prompt tokens whose KV was found in the prefix cache.
        cached_tokens: usize,
    },
    /// Logprobs of prompt tokens 1.. (the first has none), if asked for.
    PromptLogprobs(Vec<TokenLogprobs>),
    /// One token.
    Token {
        /// Its id.
        id: u32,
        /// If asked for.
        logprobs: Option<TokenLogprobs>,
    },
    /// The last output of a request that went well.
    Finished {
        /// Why.
        reason: FinishReason,
    },
    /// The last output of one that did not; says what happened and what to do.
    Failed {
        /// For the client.
        message: String,
    },
}

/// Why a request was not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Rejected {
    /// Longer than this model or cluster can ever hold.
    #[error("the request needs {tokens} tokens of context (prompt + max_tokens at least 1); the limit is {limit}")]
    TooLong {
        /// Prompt tokens plus one.
        tokens: usize,
        /// Longest context.
        limit: usize,
    },
    /// The queue is full: try again later.
    #[error("overloaded: {waiting} requests are waiting")]
    Overloaded {
        /// Requests in the queue.
        waiting: usize,
    },
    /// The engine is shutting down.
    #[error("draining: this node takes no new requests")]
    Draining,
}

/// One accepted request's outputs. Dropping it cancels the request.
pub struct Stream {
    outputs: mpsc::UnboundedReceiver<Output>,
    cancelled: Arc<AtomicBool>,
}

impl Stream {
    /// The next output; `None` after the last.
    pub async fn next(&mut self) -> Option<Output> {
        self.outputs.recv().await
    }

    /// As [`next`](Self::next), for callers without a runtime.
    pub fn blocking_next(&mut self) -> Option<Output> {
        self.outputs.blocking_recv()
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.cancelled.store(true, Ordering::Release);
    }
}

/// The engine as everything above sees it. Cheap to clone, usable from any
/// thread.
#[derive(Clone)]
pub struct EngineHandle {
    inner: Arc<dyn Submit>,
}

/// The engine side of a handle.
pub trait Submit: Send + Sync {
    /// Queues a request; outputs go to `outputs`, `cancelled` ends it.
    fn submit(
        &self,
        request: Request,
        outputs: mpsc::UnboundedSender<Output>,
        cancelled: Arc<AtomicBool>,
    ) -> Result<(), Rejected>;
    /// As [`submit`](Self::submit), for a request that need not run here:
    /// resolves once somebody has taken it.
    fn place(
        &self,
        request: Request,
        outputs: mpsc::UnboundedSender<Output>,
        cancelled: Arc<AtomicBool>,
    ) -> BoxFuture<'_, Result<(), Rejected>> {
        Box::pin(std::future::ready(self.submit(request, outputs, cancelled)))
    }
    /// Figures for `/metrics` and `/cluster`.
    fn stats(&self) -> EngineStats;
}

/// A moment's figures.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct EngineStats {
    /// Requests in the batch.
    pub running: usize,
    /// Requests in the queue: there was no room for them yet.
    pub waiting: usize,
    /// Requests submitted of late, which may or may not have to wait.
    pub queued: usize,
    /// rBlocks that the first of them needs of others, being too long for this
    /// instance alone; else 0.
    pub wanted: usize,
    /// Local rBlocks in all.
    pub blocks_total: usize,
    /// Of these free.
    pub blocks_free: usize,
    /// Of these kept only for prefix reuse.
    pub blocks_cached: usize,
    /// rBlocks borrowed from creditors.
    pub blocks_borrowed: usize,
    /// rBlocks lent to debtors.
    pub blocks_lent: usize,
    /// Prompt tokens computed since start.
    pub prompt_tokens: u64,
    /// Prompt tokens found in the prefix cache since start.
    pub cached_tokens: u64,
    /// Tokens generated since start.
    pub generated_tokens: u64,
    /// Requests preempted since start.
    pub preemptions: u64,
    /// Partial results dropped since start: late, foreign or malformed.
    pub partials_rejected: u64,
    /// Times since start that a request lost KV with a creditor and went on.
    pub recoveries: u64,
    /// Tokens computed again since start because their KV was lost.
    pub recomputed_tokens: u64,
    /// rBlocks that planned moves took to creditors since start.
    pub blocks_sent: u64,
    /// rBlocks that planned moves brought home since start.
    pub blocks_fetched: u64,
    /// rBlocks that lie with one creditor although each is to lie with two.
    pub unreplicated_blocks: usize,
    /// Tokens whose KV the memory in reach holds at most, here and with
    /// creditors.
    pub reach_tokens: usize,
    /// How long a decode step takes, as fitted to those of late.
    pub perf: Option<PerfModel>,
    /// Why the device was lost, and with it the engine.
    pub lost: Option<Arc<str>>,
}

/// So that something can stand before an engine and be taken for it.
impl Submit for EngineHandle {
    fn submit(
        &self,
        request: Request,
        outputs: mpsc::UnboundedSender<Output>,
        cancelled: Arc<AtomicBool>,
    ) -> Result<(), Rejected> {
        self.inner.submit(request, outputs, cancelled)
    }

    fn place(
        &self,
        request: Request,
        outputs: mpsc::UnboundedSender<Output>,
        cancelled: Arc<AtomicBool>,
    ) -> BoxFuture<'_, Result<(), Rejected>> {
        self.inner.place(request, outputs, cancelled)
    }

    fn stats(&self) -> EngineStats {
        self.inner.stats()
    }
}

impl EngineHandle {
    /// A handle on `inner`.
    pub fn new(inner: Arc<dyn Submit>) -> Self {
        Self { inner }
    }

    /// Queues a request.
    pub fn submit(&self, request: Request) -> Result<Stream, Rejected> {
        let (sender, outputs) = mpsc::unbounded_channel();
        let cancelled = Arc::new(AtomicBool::new(false));
        self.inner.submit(request, sender, cancelled.clone())?;
        Ok(Stream { outputs, cancelled })
    }

    /// Has a request run, here or on another instance.
    pub async fn place(&self, request: Request) -> Result<Stream, Rejected> {
        let (sender, outputs) = mpsc::unbounded_channel();
        let cancelled = Arc::new(AtomicBool::new(false));
        // Made first: a caller that stops waiting cancels.
        let stream = Stream { outputs, cancelled: cancelled.clone() };
        self.inner.place(request, sender, cancelled).await?;
        Ok(stream)
    }

    /// A moment's figures.
    pub fn stats(&self) -> EngineStats {
        self.inner.stats()
    }
}
