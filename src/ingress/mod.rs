//! Any node takes any request: where it runs is decided by the ledger, and if
//! whoever runs it dies, the node that took it in has it continued, from the
//! tokens that its client has been sent.
//!
//! [`Ingress`] stands before the node's own engine and looks like one. What runs
//! here goes straight to the engine. What runs elsewhere is an [`Order`] over a
//! [`connection`] (`wire`: what is said, `seal`: that it is heard by the right
//! ones only), and a `journey` that follows it to its end, wherever that is. A
//! [`Runner`] is the other side; it hands nothing on.

mod connection;
mod journey;
mod runner;
mod seal;
mod stats;
pub mod wire;

use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures_util::future::BoxFuture;
use tokio::sync::mpsc;

use crate::control::placement::{self, Candidate, Demand, Load};
use crate::control::view;
use crate::engine::{EngineStats, Output, Rejected, Request, Submit};
use crate::kv::rblock::InstanceId;
use crate::node::ClusterView;

pub use connection::{BEAT, PATH, SILENCE};
pub use runner::{Runner, Unheard};
pub use seal::{Answer, Keys};
pub use stats::IngressStats;

use connection::{Connection, Loss};
use journey::Journey;
use wire::Order;

/// Tokens of its answer for which a request should find room at once.
const SOON: usize = 128;
/// Tokens of a prompt that are its beginning: those of a few rBlocks, as no fewer
/// are worth meeting again for.
const BEGINNING: usize = 64;
/// Instances asked before a request is refused or stays here.
const TRIES: usize = 4;
/// How long an instance that did not take a request, or lost one, is not asked.
const DOUBT: Duration = Duration::from_secs(5);
/// The same where it had only become full: its next row will say so.
const FULL: Duration = Duration::from_millis(500);

/// What other nodes must know of an instance to have requests run there, and it
/// of itself.
#[derive(Clone, Debug)]
pub struct Identity {
    /// This instance.
    pub instance: InstanceId,
    /// Fingerprint of its model.
    pub model: [u8; 32],
    /// Tokens of its vocabulary.
    pub vocab: usize,
    /// Tokens an rBlock.
    pub block_tokens: usize,
    /// Longest context.
    pub max_model_len: usize,
}

/// The ledger, as far as requests go.
pub trait Directory: Send + Sync {
    /// The instances that requests can be handed to.
    fn candidates(&self) -> Vec<Candidate>;
    /// As far as is known the instance lives.
    fn is_up(&self, instance: InstanceId) -> bool;
}

impl Directory for ClusterView {
    fn candidates(&self) -> Vec<Candidate> {
        self.with(placement::candidates)
    }

    fn is_up(&self, instance: InstanceId) -> bool {
        let id = view::id(instance);
        self.with(|ledger| ledger.instances.iter().any(|entry| entry.id == id))
    }
}

/// See the module's page.
pub struct Ingress(Arc<Shared>);

struct Shared {
    identity: Identity,
    here: Arc<dyn Submit>,
    keys: Keys,
    directory: Arc<dyn Directory>,
    stats: IngressStats,
    elsewhere: Mutex<Elsewhere>,
}

/// What this node knows of other instances that the ledger does not.
#[derive(Default)]
struct Elsewhere {
    /// Requests of ours there.
    placed: BTreeMap<InstanceId, u32>,
    /// Not to be asked before.
    doubted: BTreeMap<InstanceId, Instant>,
}

/// A request that runs elsewhere.
struct Remote {
    at: InstanceId,
    connection: Connection,
    _counted: Counted,
}

/// Counts a request among those placed with an instance.
struct Counted(Arc<Shared>, InstanceId);

impl Drop for Counted {
    fn drop(&mut self) {
        if let Some(placed) = self.0.elsewhere().placed.get_mut(&self.1) {
            *placed -= 1;
        }
    }
}

impl Ingress {
    /// Stands before `here`, this node's engine.
    pub fn new(
        identity: Identity,
        here: Arc<dyn Submit>,
        keys: Keys,
        directory: Arc<dyn Directory>,
        stats: IngressStats,
    ) -> Self {
        Self(Arc::new(Shared { identity, here, keys, directory, stats, elsewhere: Mutex::default() }))
    }
}

impl Submit for Ingress {
    /// Here, whatever the ledger says: nothing can be awaited.
    fn submit(
        &self,
        request: Request,
        outputs: mpsc::UnboundedSender<Output>,
        cancelled: Arc<AtomicBool>,
    ) -> Result<(), Rejected> {
        self.0.here.submit(request, outputs, cancelled)
    }

    fn place(
        &self,
        request: Request,
        outputs: mpsc::UnboundedSender<Output>,
        cancelled: Arc<AtomicBool>,
    ) -> BoxFuture<'_, Result<(), Rejected>> {
        Box::pin(self.0.clone().place(request, outputs, cancelled))
    }

    fn stats(&self) -> EngineStats {
        self.0.here.stats()
    }
}

impl Shared {
    async fn place(
        self: Arc<Self>,
        mut request: Request,
        outputs: mpsc::UnboundedSender<Output>,
        cancelled: Arc<AtomicBool>,
    ) -> Result<(), Rejected> {
        // Whoever goes on with it must draw what the first would have drawn.
        request.sampling.seed.get_or_insert_with(rand::random);
        let demand = demand(&request);
        let mut refused = None;
        for _ in 0..TRIES {
            let others = self.others(&request);
            let there = match refused {
                None => placement::place(demand, &self.load_here(), &others),
                // A queue elsewhere is no better than the one that is full here.
                Some(_) => placement::with_room(demand, &others),
            };
            match (there, refused.take()) {
                (Some(there), before) => {
                    refused = before;
                    if let Ok(remote) = self.ask(there, &request).await {
                        let journey = Journey::new(self, request, outputs, cancelled);
                        tokio::spawn(journey.follow(remote));
                        return Ok(());
                    }
                }
                (None, Some(rejected)) => return Err(rejected),
                (None, None) => match self.here.submit(request.clone(), outputs.clone(), cancelled.clone()) {
                    Ok(()) => return Ok(()),
                    Err(rejected) => refused = Some(rejected),
                },
            }
        }
        match refused {
            Some(rejected) => Err(rejected),
            None => self.here.submit(request, outputs, cancelled),
        }
    }

    /// Asks an instance to run a request. One that does not is not asked again
    /// for a while.
    async fn ask(self: &Arc<Self>, there: &Candidate, request: &Request) -> Result<Remote, Loss> {
        let at = there.instance;
        let order = Order {
            id: rand::random(),
            from: self.identity.instance,
            to: at,
            model: self.identity.model,
            request: request.clone(),
        };
        let counted = self.count(at);
        match Connection::open(&there.address, &order, &self.keys).await {
            Ok(connection) => {
                tracing::debug!(%at, resumed = request.resume.len(), "a request runs elsewhere");
                self.stats.placed.inc();
                Ok(Remote { at, connection, _counted: counted })
            }
            Err(loss) => {
                tracing::info!(%at, ?loss, "an instance did not take a request");
                self.stats.declined.inc();
                self.doubt(at, &loss);
                Err(loss)
            }
        }
    }

    /// Who can be asked to run a request, with what of ours their rows do not
    /// show yet.
    fn others(&self, request: &Request) -> Vec<Candidate> {
        if !wire::is_sendable(request) {
            return Vec::new();
        }
        let mut others = self.directory.candidates();
        let now = Instant::now();
        let mut elsewhere = self.elsewhere();
        elsewhere.doubted.retain(|_, until| *until > now);
        others.retain(|other| !elsewhere.doubted.contains_key(&other.instance));
        for other in &mut others {
            let shown = other.load.running.saturating_add(other.load.waiting);
            let placed = elsewhere.placed.get(&other.instance).copied().unwrap_or(0);
            other.load.queued = placed.saturating_sub(shown);
        }
        others
    }

    fn load_here(&self) -> Load {
        let stats = self.here.stats();
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        Load {
            block_tokens: count(self.identity.block_tokens),
            total: count(stats.blocks_total),
            free: count(stats.blocks_free + stats.blocks_cached),
            running: count(stats.running),
            waiting: count(stats.waiting),
            queued: count(stats.queued),
        }
    }

    fn count(self: &Arc<Self>, at: InstanceId) -> Counted {
        *self.elsewhere().placed.entry(at).or_default() += 1;
        Counted(self.clone(), at)
    }

    fn doubt(&self, at: InstanceId, loss: &Loss) {
        let wait = if matches!(loss, Loss::Rejected(Rejected::Overloaded { .. })) { FULL } else { DOUBT };
        self.elsewhere().doubted.insert(at, Instant::now() + wait);
    }

    fn elsewhere(&self) -> MutexGuard<'_, Elsewhere> {
        self.elsewhere.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn demand(request: &Request) -> Demand {
    let Request { prompt, resume, max_tokens, .. } = request;
    let tokens = prompt.len() + resume.len() + max_tokens.saturating_sub(resume.len()).min(SOON);
    let hash = |hash: u64, &token: &u32| (hash ^ u64::from(token)).wrapping_mul(0x0100_0000_01b3);
    let beginning = prompt.iter().take(BEGINNING).fold(0xcbf2_9ce4_8422_2325, hash);
    Demand { tokens, beginning }
}
