//! One choice of one request: the engine's tokens become text, stop strings end
//! it, and its times are measured.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use super::metrics::Metrics;
use super::state::{TextModel, TextStream};
use super::stop::StopMatcher;
use crate::engine::{self, FinishReason, Output, Request};
use crate::model::sampler::TokenLogprobs;

/// A choice before it is submitted.
pub(super) struct Spec {
    pub request: Request,
    /// Stop strings, none empty.
    pub stop: Vec<String>,
    /// Only the prompt's logprobs are wanted: the one token that the engine
    /// generates at least is not shown.
    pub prompt_only: bool,
}

/// A token with its logprobs and the place of its text.
#[derive(Clone, Debug)]
pub(super) struct Piece {
    pub id: u32,
    pub logprobs: TokenLogprobs,
    /// Characters of generated text before it.
    pub offset: usize,
}

/// What a choice yields, in order: `Started`, `Text`s, then `Finished` or
/// `Failed`.
#[derive(Debug)]
pub(super) enum Event {
    Started {
        /// Of prompt tokens 1.., if asked for.
        prompt_logprobs: Option<Vec<TokenLogprobs>>,
    },
    Text {
        text: String,
        /// Empty unless logprobs were asked for.
        tokens: Vec<Piece>,
    },
    /// OpenAI's finish_reason.
    Finished(&'static str),
    Failed(String),
}

/// One choice that runs. Dropping it cancels the engine's request.
pub(super) struct Generation<'a> {
    stream: engine::Stream,
    text: Box<dyn TextStream + 'a>,
    stop: StopMatcher,
    wants_prompt_logprobs: bool,
    prompt_only: bool,
    /// Tokens whose text was not passed on yet.
    pending: VecDeque<Piece>,
    /// Characters decoded, and passed on.
    decoded: usize,
    passed: usize,
    /// Events that are due before the engine is asked again.
    due: VecDeque<Event>,
    clock: Clock,
    /// Prompt tokens found in the prefix cache.
    pub cached_tokens: usize,
    /// Tokens generated.
    pub generated: usize,
}

impl<'a> Generation<'a> {
    /// Takes over the stream of a submitted request; `arrived` is when its
    /// HTTP request did.
    pub(super) fn new(
        stream: engine::Stream,
        text: &'a dyn TextModel,
        plan: Plan,
        arrived: Instant,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self {
            stream,
            text: text.stream(),
            stop: StopMatcher::new(plan.stop),
            wants_prompt_logprobs: plan.prompt_logprobs,
            prompt_only: plan.prompt_only,
            pending: VecDeque::new(),
            decoded: 0,
            passed: 0,
            due: VecDeque::new(),
            clock: Clock { metrics, arrived, submitted: Instant::now(), first: None, last: None, ended: false },
            cached_tokens: 0,
            generated: 0,
        }
    }

    /// The next event. After `Finished` or `Failed` there is none.
    pub(super) async fn next(&mut self) -> Event {
        loop {
            if let Some(event) = self.due.pop_front() {
                return event;
            }
            match self.stream.next().await {
                Some(output) => self.take(output),
                None => self.fail("the engine ended this request without an answer; try again".into()),
            }
        }
    }

    fn take(&mut self, output: Output) {
        match output {
            Output::Started { cached_tokens } => {
                self.cached_tokens = cached_tokens;
                self.clock.started();
                if !self.wants_prompt_logprobs {
                    self.due.push_back(Event::Started { prompt_logprobs: None });
                }
            }
            Output::PromptLogprobs(logprobs) => {
                if self.wants_prompt_logprobs {
                    self.due.push_back(Event::Started { prompt_logprobs: Some(logprobs) });
                }
            }
            Output::Token { .. } if self.prompt_only => self.finish("length"),
            Output::Token { id, logprobs } => self.token(id, logprobs),
            Output::Finished { reason } => {
                let rest = self.text.finish();
                let passed = self.stop.push(&rest);
                if passed.stopped {
                    return self.stopped(passed.text);
                }
                let held = self.stop.finish();
                self.pass(passed.text + &held, true);
                self.finish(match reason {
                    FinishReason::Stop => "stop",
                    FinishReason::Length => "length",
                });
            }
            Output::Failed { message } => self.fail(message),
        }
    }

    fn token(&mut self, id: u32, logprobs: Option<TokenLogprobs>) {
        self.generated += 1;
        self.clock.token();
        if let Some(logprobs) = logprobs {
            self.pending.push_back(Piece { id, logprobs, offset: self.decoded });
        }
        match self.text.push(id) {
            Ok(None) => {}
            Ok(Some(piece)) => {
                self.decoded += piece.chars().count();
                let passed = self.stop.push(&piece);
                if passed.stopped {
                    self.stopped(passed.text);
                } else {
                    self.pass(passed.text, false);
                }
            }
            Err(error) => self.fail(format!("token {id} has no text: {error:#}")),
        }
    }

    /// Text before a stop string, which ends the choice; the tokens of the stop
    /// string itself are not shown.
    fn stopped(&mut self, text: String) {
        self.pass(text, false);
        self.pending.clear();
        self.finish("stop");
    }

    /// Passes text on with the tokens that began in it; with `all` also those
    /// that have no text.
    fn pass(&mut self, text: String, all: bool) {
        self.passed += text.chars().count();
        let count = if all {
            self.pending.len()
        } else {
            self.pending.iter().take_while(|piece| piece.offset < self.passed).count()
        };
        if !text.is_empty() || count > 0 {
            let tokens = self.pending.drain(..count).collect();
            self.due.push_back(Event::Text { text, tokens });
        }
    }

    fn finish(&mut self, reason: &'static str) {
        self.clock.finished(reason, self.generated);
        self.due.push_back(Event::Finished(reason));
    }

    fn fail(&mut self, message: String) {
        tracing::warn!(%message, tokens = self.generated, "a request failed");
        self.clock.failed();
        self.due.push_back(Event::Failed(message));
    }
}

/// What of a [`Spec`] stays on this side of the engine.
pub(super) struct Plan {
    pub stop: Vec<String>,
    pub prompt_logprobs: bool,
    pub prompt_only: bool,
}

/// A choice's times.
struct Clock {
    metrics: Arc<Metrics>,
    arrived: Instant,
    submitted: Instant,
    first: Option<Instant>,
    last: Option<Instant>,
    ended: bool,
}

impl Clock {
    fn started(&self) {
        self.metrics.queue.observe(self.submitted.elapsed());
    }

    fn token(&mut self) {
        let now = Instant::now();
        match self.last {
            None => self.metrics.time_to_first_token.observe(now - self.arrived),
            Some(last) => self.metrics.inter_token.observe(now - last),
        }
        self.first.get_or_insert(now);
        self.last = Some(now);
    }

    fn finished(&mut self, reason: &'static str, tokens: usize) {
        self.ended = true;
        self.metrics.e2e.observe(self.arrived.elapsed());
        if let (Some(first), Some(last), 2..) = (self.first, self.last, tokens) {
            self.metrics.time_per_output_token.observe((last - first).div_f64((tokens - 1) as f64));
        }
        self.metrics.succeeded(reason);
    }

    fn failed(&mut self) {
        self.ended = true;
        self.metrics.failed();
    }
}

impl Drop for Clock {
    fn drop(&mut self) {
        if !self.ended {
            self.metrics.succeeded("abort");
        }
    }
}
