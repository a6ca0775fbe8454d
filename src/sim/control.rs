//! All that the simulation knows of the controller's interface: one place to
//! change when that changes.

use core::net::SocketAddr;
use std::collections::BTreeMap;
use std::time::Duration;

use super::lender::Sabotage;
use super::network::{Arrival, Slot};
use crate::control::controller::{Config, Controller, Input, LocalStats, Output};
use crate::control::message::{Packet, Role};
use crate::control::rmanager::RManager;
use crate::control::row::{Profile, Stamp};
use crate::control::seal::{KEY_BYTES, NONCE_BYTES, Seal};
use crate::control::slack::Slack;
use crate::kv::moves::{Errand, Held};
use crate::kv::rblock::{InstanceId, KvShape, LoanId};
use crate::schedule::sequence::HeldLoan;

/// What the controller wants of the network.
#[derive(Clone, Debug)]
pub enum Call {
    /// A control connection to an address; ends in an arrival with this ask.
    Dial {
        /// Names it.
        ask: u64,
        /// Where to.
        address: String,
    },
    /// A message.
    Send {
        /// Over which connection.
        conn: u64,
        /// What.
        bytes: Vec<u8>,
    },
    /// A datagram.
    Datagram {
        /// To whom.
        to: Slot,
        /// What.
        bytes: Vec<u8>,
    },
    /// A connection is over.
    Close {
        /// Which.
        conn: u64,
    },
}

/// What the controller tells the engine.
#[derive(Clone, Debug)]
pub enum News {
    /// Loans for a request, all that was asked for.
    Granted {
        /// Whose.
        request: u64,
        /// Which.
        loans: Vec<HeldLoan>,
    },
    /// None.
    Refused {
        /// Whose.
        request: u64,
        /// Why.
        reason: String,
    },
    /// Loans are gone.
    LoansLost(Vec<(InstanceId, LoanId)>),
    /// A creditor is gone.
    CreditorLost(InstanceId),
    /// What members may have for us.
    Slack(Slack),
    /// A creditor is draining.
    CreditorLeaves(InstanceId),
    /// What should lie elsewhere.
    Moves(Vec<Errand>),
    /// Lent memory came back.
    MemoryReturned,
}

/// How a simulated instance is known to the others.
#[derive(Clone, Debug)]
pub struct Identity {
    /// Its id.
    pub instance: InstanceId,
    /// Its place.
    pub slot: Slot,
    /// Names its host.
    pub host: u64,
    /// When its life began.
    pub started: u64,
    /// Instances in the world: it joins at all their addresses.
    pub instances: usize,
    /// Shape of its KV.
    pub shape: KvShape,
    /// A planted bug.
    pub sabotage: Sabotage,
}

/// A controller, and what is in flight for it.
pub struct Control {
    controller: Controller,
    /// A planted bug: the stamps of the rows that came, where it is planted.
    newest: Option<BTreeMap<InstanceId, Stamp>>,
    asks: BTreeMap<u64, String>,
    next_ask: u64,
    creditors: BTreeMap<InstanceId, Slot>,
    /// As told last; `None`: to be told anew.
    slack: Option<Slack>,
    lent: u32,
    calls: Vec<Call>,
    news: Vec<News>,
    notes: Vec<String>,
}

/// The cluster's name; its key is of zeros.
const CLUSTER: [u8; 16] = [1; 16];

/// The control address of a slot.
fn address(slot: Slot) -> String {
    format!("node-{slot}")
}

/// The datagram address of a slot.
fn gossip(slot: Slot) -> SocketAddr {
    SocketAddr::from(([10, 0, 0, 1], 1 + slot as u16))
}

/// The slot of an address, of either endpoint.
pub fn slot_of(address: &str) -> Option<Slot> {
    address.rsplit('-').next()?.parse().ok()
}

impl Control {
    /// A controller that has not begun.
    pub fn new(identity: &Identity, rmanager: RManager, seed: u64) -> Self {
        let profile = Profile {
            role: Role::Engine,
            model: Some([7; 32]),
            host: identity.host,
            rank: 0,
            control: vec![address(identity.slot)],
            creditor: vec![format!("lane-{}", identity.slot)],
            http: String::new(),
            peers: None,
        };
        // As many as a cluster's operator would name.
        let others = (0..identity.instances).filter(|slot| *slot != identity.slot).take(3);
        let config = Config {
            started: identity.started,
            shape: Some(identity.shape),
            join: others.map(gossip).collect(),
            ..Config::new(identity.instance, CLUSTER, profile, gossip(identity.slot))
        };
        let controller = Controller::new(config, rmanager, seed);
        Self {
            controller: controller.unwrap_or_else(|error| unreachable!("the simulation's configuration: {error}")),
            newest: (identity.sabotage == Sabotage::Merge).then(BTreeMap::new),
            asks: BTreeMap::new(),
            next_ask: 0,
            creditors: BTreeMap::new(),
            slack: Some(Slack::default()),
            lent: 0,
            calls: Vec::new(),
            news: Vec::new(),
            notes: Vec::new(),
        }
    }

    /// Where a creditor's lanes are reached.
    pub fn creditor(&self, instance: InstanceId) -> Option<Slot> {
        self.creditors.get(&instance).copied()
    }

    /// The controller itself, to be looked at.
    pub fn controller(&self) -> &Controller {
        &self.controller
    }

    /// When [`tick`](Self::tick) is due.
    pub fn deadline(&self) -> Option<Duration> {
        self.controller.deadline()
    }

    /// Time has passed.
    pub fn tick(&mut self, now: Duration, stats: LocalStats) {
        self.feed(now, Input::LocalRow(stats));
        self.feed(now, Input::Tick);
        self.look();
    }

    /// Something arrived on a control connection, or as a datagram.
    pub fn arrived(&mut self, now: Duration, arrival: Arrival<Vec<u8>>) {
        match arrival {
            Arrival::Connected { conn, ask } => {
                if let Some(address) = self.asks.remove(&ask) {
                    self.feed(now, Input::PeerConnected { conn, address: &address });
                }
            }
            Arrival::ConnectFailed { ask } => {
                if let Some(address) = self.asks.remove(&ask) {
                    self.feed(now, Input::ConnectFailed { address: &address });
                }
            }
            Arrival::Accepted { conn, .. } => self.feed(now, Input::PeerAccepted { conn }),
            Arrival::Message { conn, message } => self.feed(now, Input::PeerMessage { conn, bytes: &message }),
            Arrival::Closed { conn } => self.feed(now, Input::PeerClosed { conn }),
            Arrival::Datagram { from, mut bytes } => {
                if let Some(newest) = self.newest.as_mut() {
                    bytes = without_stamps(newest, bytes);
                }
                self.feed(now, Input::Datagram { from: gossip(from), bytes: &bytes });
            }
        }
        let lent = self.controller.rmanager().lent();
        if lent < self.lent {
            self.news.push(News::MemoryReturned);
        }
        self.lent = lent;
    }

    /// The engine needs blocks elsewhere.
    pub fn borrow(&mut self, now: Duration, request: u64, blocks: u32, avoid: &[InstanceId], only: Option<InstanceId>) {
        self.feed(now, Input::Borrow { request, blocks, avoid, only });
    }

    /// Of a loan it needs only the first `keep` blocks.
    pub fn shrink(&mut self, now: Duration, creditor: InstanceId, loan: LoanId, keep: usize) {
        self.feed(now, Input::ShrinkLoan { creditor, loan, keep: keep as u32 });
    }

    /// What the engine's sequences hold and wait for: to plan by.
    pub fn plan(&mut self, now: Duration, requests: Vec<Held>, queue: Vec<u32>) {
        self.feed(now, Input::Plan { requests, queue });
    }

    /// The engine gives a loan back.
    pub fn repay(&mut self, now: Duration, creditor: InstanceId, loan: LoanId) {
        self.feed(now, Input::RepayLoan { creditor, loan });
    }

    /// What is to be done since the last call.
    pub fn take_calls(&mut self) -> Vec<Call> {
        std::mem::take(&mut self.calls)
    }

    /// What the engine is to be told since the last call.
    pub fn take_news(&mut self) -> Vec<News> {
        std::mem::take(&mut self.news)
    }

    /// Lines for the log since the last call.
    pub fn take_notes(&mut self) -> Vec<String> {
        std::mem::take(&mut self.notes)
    }

    /// What members can lend, as far as known.
    fn look(&mut self) {
        let slack = self.controller.slack();
        if self.slack != Some(slack) {
            self.slack = Some(slack);
            self.news.push(News::Slack(slack));
        }
    }

    fn feed(&mut self, now: Duration, input: Input<'_>) {
        self.controller.handle(now, input);
        while let Some(output) = self.controller.poll_output() {
            self.output(output);
        }
    }

    fn output(&mut self, output: Output) {
        match output {
            Output::Datagram { to, bytes } => {
                self.calls.push(Call::Datagram { to: Slot::from(to.port() - 1), bytes });
            }
            Output::Connect { address } => {
                self.next_ask += 1;
                self.asks.insert(self.next_ask, address.clone());
                self.calls.push(Call::Dial { ask: self.next_ask, address });
            }
            Output::Send { conn, bytes } => self.calls.push(Call::Send { conn, bytes }),
            Output::Disconnect { conn } => self.calls.push(Call::Close { conn }),
            Output::Granted { request, loans } => {
                let held = |l: crate::control::debts::Loan| HeldLoan::new(l.creditor, l.loan, l.epoch, l.blocks);
                self.news.push(News::Granted { request, loans: loans.into_iter().map(held).collect() });
            }
            Output::Refused { request, reason } => {
                // The scheduler asks no more until it hears of creditors anew:
                // so it is told at the next tick, changed or not.
                self.slack = None;
                self.news.push(News::Refused { request, reason: reason.to_string() });
            }
            Output::CreditorLeaves { creditor } => self.news.push(News::CreditorLeaves(creditor)),
            Output::Moves(moves) => self.news.push(News::Moves(moves.iter().map(Into::into).collect())),
            Output::LoansLost { loans } => {
                self.news.push(News::LoansLost(loans.iter().map(|l| (l.creditor, l.loan)).collect()));
            }
            Output::CreditorUp { instance, endpoints, .. } => {
                let slot = endpoints.first().and_then(|endpoint| slot_of(endpoint));
                self.creditors.extend(slot.map(|slot| (instance, slot)));
            }
            Output::CreditorDown { instance } => {
                self.creditors.remove(&instance);
                self.news.push(News::CreditorLost(instance));
            }
            Output::Note(note) => self.notes.push(format!("{note:?}")),
            // The lenders of a simulation ask before each write.
            Output::LeaseUntil { .. } | Output::Drained => {}
        }
    }
}

/// A planted bug: of the rows in a datagram those that are older than what came
/// before are made to be taken for the newest.
fn without_stamps(newest: &mut BTreeMap<InstanceId, Stamp>, bytes: Vec<u8>) -> Vec<u8> {
    let seal = Seal::new(&[0; KEY_BYTES], CLUSTER);
    let packet = seal.open(&bytes).and_then(|plain| Packet::decode(&plain).ok());
    let Some(Packet::Rows(mut rows)) = packet else { return bytes };
    for row in &mut rows {
        let newest = newest.entry(row.instance).or_insert(row.stamp);
        if row.stamp < *newest {
            row.stamp = Stamp { version: newest.version + 1, ..*newest };
        }
        *newest = row.stamp;
    }
    let mut plain = Vec::new();
    Packet::Rows(rows).encode(&mut plain);
    seal.seal([0; NONCE_BYTES], &plain)
}
