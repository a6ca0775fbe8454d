//! Runs requests that other nodes took in. It never hands one on.

use std::collections::{BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval, timeout};

use super::connection::BEAT;
use super::seal::{Answer, Keys};
use super::wire::{MAX_ORDER, Order, Said};
use super::{Directory, Identity, IngressStats};
use crate::engine::{EngineHandle, Output, Rejected};

/// Orders whose ids are remembered, so that a recorded one is not run again.
const REMEMBERED: usize = 1 << 14;
/// Frames that wait for a slow reader before its request pauses.
const BACKLOG: usize = 64;
/// A reader that takes nothing for this long is gone.
const STUCK: Duration = Duration::from_secs(10);
/// Beats without the other node in the ledger after which it is gone: cut off,
/// it cannot close the connection. Longer than it takes to be taken for dead
/// and to return.
const MISSED: u32 = 20;

/// Why an order is not heard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unheard {
    /// It was not sealed with this cluster's key, or was heard before.
    Stranger,
    /// It is for another instance, or another model.
    Misdirected,
}

/// See the module's page.
pub struct Runner {
    identity: Identity,
    engine: EngineHandle,
    keys: Keys,
    directory: Arc<dyn Directory>,
    stats: IngressStats,
    seen: Mutex<Seen>,
}

#[derive(Default)]
struct Seen {
    ids: BTreeSet<[u8; 16]>,
    order: VecDeque<[u8; 16]>,
}

impl Seen {
    /// False: it was seen before.
    fn add(&mut self, id: [u8; 16]) -> bool {
        if !self.ids.insert(id) {
            return false;
        }
        self.order.push_back(id);
        if self.order.len() > REMEMBERED
            && let Some(oldest) = self.order.pop_front()
        {
            self.ids.remove(&oldest);
        }
        true
    }
}

impl Runner {
    /// Runs orders on `engine`, which must be this node's own.
    pub fn new(
        identity: Identity,
        engine: EngineHandle,
        keys: Keys,
        directory: Arc<dyn Directory>,
        stats: IngressStats,
    ) -> Self {
        Self { identity, engine, keys, directory, stats, seen: Mutex::default() }
    }

    /// Longest order that can be meant for this node, bytes: nothing longer is
    /// read of anybody who may be a stranger.
    pub fn longest_order(&self) -> usize {
        let Identity { max_model_len, vocab, .. } = self.identity;
        MAX_ORDER.min((64 << 10) + 4 * max_model_len + 8 * vocab)
    }

    /// The order in an HTTP body.
    pub fn open(&self, body: &[u8]) -> Result<Order, Unheard> {
        let order = self.keys.open_order(body).and_then(Result::ok);
        let new = |order: &Order| self.seen.lock().unwrap_or_else(PoisonError::into_inner).add(order.id);
        let Some(order) = order.filter(new) else {
            self.stats.strangers.inc();
            return Err(Unheard::Stranger);
        };
        if order.to != self.identity.instance || order.model != self.identity.model {
            return Err(Unheard::Misdirected);
        }
        Ok(order)
    }

    /// Runs an order in a task of its own; the answer's bytes. `leaving` says
    /// whether this node is about to leave, `guard` is held while it runs.
    /// Dropping the receiver cancels the request.
    pub fn run(
        self: &Arc<Self>,
        order: Order,
        leaving: impl Fn() -> bool + Send + Sync + 'static,
        guard: impl Send + 'static,
    ) -> mpsc::Receiver<Vec<u8>> {
        let (frames, answer) = mpsc::channel(BACKLOG);
        let runner = self.clone();
        tokio::spawn(async move {
            let _guard = guard;
            let speaker = Speaker { answer: runner.keys.answer(&order.id), frames };
            // Whoever asked is gone if nothing can be said.
            let _ = runner.serve(order, speaker, leaving).await;
        });
        answer
    }

    async fn serve(&self, order: Order, mut to: Speaker, leaving: impl Fn() -> bool) -> Option<()> {
        let (from, mut index) = (order.from, order.request.resume.len() as u32);
        let tokens = order.request.prompt.len().saturating_add(order.request.max_tokens);
        let limit = self.identity.max_model_len;
        // Here the answer would end before its time.
        let submitted =
            if tokens > limit { Err(Rejected::TooLong { tokens, limit }) } else { self.engine.submit(order.request) };
        let mut stream = match submitted {
            Ok(stream) => stream,
            Err(rejected) => return to.say(Said::Refused(rejected)).await,
        };
        self.stats.taken_in.inc();
        tracing::debug!(%from, "took a request in");
        to.say(Said::Taken).await?;
        let mut beat = interval(BEAT);
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut missed = 0;
        loop {
            let said = tokio::select! {
                biased;
                () = to.frames.closed() => return None,
                _ = beat.tick() => {
                    missed = if self.directory.is_up(from) { 0 } else { missed + 1 };
                    if missed > MISSED {
                        tracing::warn!(%from, "a request is dropped: the node that took it in is gone");
                        return None;
                    }
                    vec![if leaving() { Said::Leaving } else { Said::Alive }]
                }
                output = stream.next() => {
                    let token = matches!(output, Some(Output::Token { .. }));
                    let said = match output {
                        Some(output) => Said::of(output, index),
                        None => vec![Said::Failed("the engine ended".into())],
                    };
                    index += u32::from(token);
                    said
                }
            };
            for said in said {
                let last = said.is_last();
                to.say(said).await?;
                if last {
                    return Some(());
                }
            }
        }
    }
}

/// One side of an answer.
struct Speaker {
    answer: Answer,
    frames: mpsc::Sender<Vec<u8>>,
}

impl Speaker {
    /// `None`: nobody listens.
    async fn say(&mut self, said: Said) -> Option<()> {
        let frame = self.answer.say(said);
        timeout(STUCK, self.frames.send(frame)).await.ok()?.ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_new_once() {
        let mut seen = Seen::default();
        let id = |n: usize| (n as u128).to_le_bytes();
        assert!((0..2 * REMEMBERED).all(|n| seen.add(id(n))));
        assert!(!seen.add(id(2 * REMEMBERED - 1)) && !seen.add(id(REMEMBERED)));
        assert_eq!(seen.ids.len(), REMEMBERED);
    }
}
