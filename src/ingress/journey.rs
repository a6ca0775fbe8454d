//! A request that began elsewhere, from its first token to its last: what is
//! heard of it is checked and passed on, and where it is lost it is continued
//! from what was passed on.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval, sleep};

use super::connection::Loss;
use super::wire::Said;
use super::{Remote, Shared, demand};
use crate::control::placement;
use crate::engine::{FinishReason, Output, Rejected, Request};
use crate::kv::rblock::InstanceId;
use crate::model::sampler::TokenLogprobs;

/// Losses after which a request goes on here, where nothing can be lost without
/// its client being lost too.
const LOSSES: u32 = 8;
/// How long a request that was lost may wait until somebody has room for it.
const PATIENCE: Duration = Duration::from_secs(60);
/// Time between two looks at whether whoever runs it lives.
const LOOK: Duration = Duration::from_millis(100);
/// Time between two looks for room.
const AGAIN: Duration = Duration::from_millis(100);

/// See the module's page.
pub(super) struct Journey {
    shared: Arc<Shared>,
    /// What is still to be done: tokens that were passed on are in `resume`.
    request: Request,
    outputs: mpsc::UnboundedSender<Output>,
    cancelled: Arc<AtomicBool>,
    started: bool,
    /// Of the prompt, as they come.
    prompt_logprobs: Vec<TokenLogprobs>,
    losses: u32,
}

/// How a stretch of the way ended.
enum End {
    /// The client has all of it, or is gone.
    Over,
    Lost(Loss),
}

impl Journey {
    pub(super) fn new(
        shared: Arc<Shared>,
        request: Request,
        outputs: mpsc::UnboundedSender<Output>,
        cancelled: Arc<AtomicBool>,
    ) -> Self {
        Self { shared, request, outputs, cancelled, started: false, prompt_logprobs: Vec::new(), losses: 0 }
    }

    /// Follows the request to its end, beginning with `remote`.
    pub(super) async fn follow(mut self, mut remote: Remote) {
        loop {
            let at = remote.at;
            let End::Lost(loss) = self.listen(remote).await else { return };
            if !self.note(at, loss) {
                return;
            }
            match self.place_again().await {
                Some(next) => remote = next,
                None => return,
            }
        }
    }

    /// Passes on what is heard, as long as whoever says it lives.
    async fn listen(&mut self, mut remote: Remote) -> End {
        let mut look = interval(LOOK);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let said = tokio::select! {
                // What has arrived counts before how late it is: it may be this
                // node that was paused.
                biased;
                () = self.outputs.closed() => return End::Over,
                said = remote.connection.next() => said,
                _ = look.tick() => {
                    if remote.connection.is_silent() {
                        return End::Lost(Loss::Silent);
                    }
                    if !self.shared.directory.is_up(remote.at) {
                        return End::Lost(Loss::Down);
                    }
                    continue;
                }
            };
            match said.and_then(|said| self.take(said)) {
                Ok(true) => return End::Over,
                Ok(false) => {}
                Err(loss) => return End::Lost(loss),
            }
        }
    }

    /// Checks what was said and passes it on. True: it was the last.
    fn take(&mut self, said: Said) -> Result<bool, Loss> {
        match said {
            Said::Alive => {}
            Said::Started { cached_tokens } => {
                // That it began again elsewhere is nothing to the client.
                if !std::mem::replace(&mut self.started, true) {
                    self.send(Output::Started { cached_tokens });
                }
            }
            Said::PromptLogprobs { last, logprobs } => {
                let whole = self.request.prompt.len() - 1;
                self.prompt_logprobs.extend(logprobs);
                let have = self.prompt_logprobs.len();
                if !self.started || !self.request.prompt_logprobs || have > whole || last != (have == whole) {
                    return Err(Loss::Garbage("logprobs of a prompt that is not this one"));
                }
                if last {
                    self.request.prompt_logprobs = false;
                    let logprobs = std::mem::take(&mut self.prompt_logprobs);
                    self.send(Output::PromptLogprobs(logprobs));
                }
            }
            Said::Token { index, id, logprobs } => {
                let Request { sampling, max_tokens, resume, prompt_logprobs, .. } = &self.request;
                let described = match (&logprobs, sampling.logprobs) {
                    (Some(logprobs), Some(most)) => logprobs.top.len() <= most as usize,
                    (None, None) => true,
                    _ => false,
                };
                let due = self.started && !prompt_logprobs && index as usize == resume.len();
                if !due || !described || resume.len() >= *max_tokens || id as usize >= self.shared.identity.vocab {
                    return Err(Loss::Garbage("a token that is not due"));
                }
                self.request.resume.push(id);
                self.send(Output::Token { id, logprobs });
            }
            Said::Finished(reason) => {
                let done = reason == FinishReason::Stop || self.request.resume.len() == self.request.max_tokens;
                if !self.started || self.request.prompt_logprobs || !done {
                    return Err(Loss::Garbage("an end that is not due"));
                }
                self.send(Output::Finished { reason });
                return Ok(true);
            }
            // Its client may fare better elsewhere; here its word will be final.
            Said::Failed(message) => return Err(Loss::Failed(message)),
            Said::Leaving => return Err(Loss::Leaving),
            Said::Taken | Said::Refused(_) => return Err(Loss::Garbage("a second word about being taken")),
        }
        Ok(false)
    }

    /// Notes a loss. False: there is nothing to go on with.
    fn note(&mut self, at: InstanceId, loss: Loss) -> bool {
        let sent = self.request.resume.len();
        self.losses += 1;
        self.prompt_logprobs.clear();
        self.shared.stats.continued(loss.name());
        self.shared.doubt(at, &loss);
        tracing::warn!(%at, ?loss, sent, "whoever ran a request is lost to it; it goes on from the tokens sent");
        let over = sent >= self.request.max_tokens;
        if over {
            self.send(Output::Finished { reason: FinishReason::Length });
        }
        !over
    }

    /// Finds somebody to go on: another instance, or this one, which then is
    /// followed to the end.
    async fn place_again(&mut self) -> Option<Remote> {
        let begun = Instant::now();
        let rejected = loop {
            if self.outputs.is_closed() {
                return None;
            }
            let demand = demand(&self.request);
            let others = if self.losses < LOSSES { self.shared.others(&self.request) } else { Vec::new() };
            if let Some(there) = placement::place(demand, &self.shared.load_here(), &others) {
                if let Ok(remote) = self.shared.ask(there, &self.request).await {
                    return Some(remote);
                }
                continue;
            }
            let (sender, outputs) = mpsc::unbounded_channel();
            match self.shared.here.submit(self.request.clone(), sender, self.cancelled.clone()) {
                Ok(()) => {
                    self.pass_on(outputs).await;
                    return None;
                }
                Err(rejected) => {
                    if let Some(there) = placement::with_room(demand, &others)
                        && let Ok(remote) = self.shared.ask(there, &self.request).await
                    {
                        return Some(remote);
                    }
                    if begun.elapsed() > PATIENCE || rejected == Rejected::Draining {
                        break rejected;
                    }
                }
            }
            sleep(AGAIN).await;
        };
        self.shared.stats.failed.inc();
        let message = format!("whoever ran this request was lost, and nobody could go on with it here: {rejected}");
        self.send(Output::Failed { message });
        None
    }

    /// Passes on what this node's own engine puts out. A client that goes ends
    /// it by its flag.
    async fn pass_on(&mut self, mut outputs: mpsc::UnboundedReceiver<Output>) {
        while let Some(output) = outputs.recv().await {
            match output {
                Output::Started { .. } if std::mem::replace(&mut self.started, true) => {}
                Output::Failed { .. } => {
                    self.shared.stats.failed.inc();
                    self.send(output);
                }
                output => self.send(output),
            }
        }
    }

    fn send(&self, output: Output) {
        // That the client is gone is noticed where the next output is awaited.
        let _ = self.outputs.send(output);
    }
}
