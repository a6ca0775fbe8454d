//! The one impure loop of the control plane: feeds the controller with what the
//! control transport, the engine and the clock say, and does what it asks.

use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, Sender, SyncSender};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use distkv_fabric::{Address, Event, PeerId, Transport, Waker};

use super::datagrams::Datagrams;
use crate::control::controller::{Controller, Input, Loan, LocalStats, Note, Output};
use crate::control::slack::Slack;
use crate::control::view::LedgerView;
use crate::engine::{Command, GrantedLoan, Treasury};
use crate::kv::moves::Held;
use crate::kv::rblock::{InstanceId, KvShape, LoanId};
use crate::schedule::sequence::{HeldLoan, SeqId};

/// How long after a refusal the engine is told anew what can be borrowed.
const RETELL: Duration = Duration::from_millis(200);

/// What reaches the control loop from the node's other threads.
pub(super) enum NodeCommand {
    Borrow {
        seq: SeqId,
        blocks: usize,
        avoid: Vec<InstanceId>,
        only: Option<InstanceId>,
    },
    Repay {
        creditor: InstanceId,
        loan: LoanId,
    },
    Shrink {
        creditor: InstanceId,
        loan: LoanId,
        keep: u32,
    },
    Plan {
        requests: Vec<Held>,
        queue: Vec<u32>,
    },
    CreditorFailed {
        creditor: InstanceId,
        reason: String,
    },
    Drain,
    Leave,
    /// End without a word.
    Vanish,
}

/// How other threads reach the control loop.
#[derive(Clone)]
pub(super) struct NodeLink {
    pub(super) commands: Sender<NodeCommand>,
    pub(super) waker: Waker,
}

impl NodeLink {
    pub(super) fn tell(&self, command: NodeCommand) {
        // A control loop that has ended needs no news.
        if self.commands.send(command).is_ok() {
            self.waker.wake();
        }
    }
}

impl Treasury for NodeLink {
    fn borrow_blocks(&mut self, seq: SeqId, blocks: usize, avoid: &[InstanceId], only: Option<InstanceId>) {
        self.tell(NodeCommand::Borrow { seq, blocks, avoid: avoid.to_vec(), only });
    }

    fn repay(&mut self, loan: &HeldLoan) {
        self.tell(NodeCommand::Repay { creditor: loan.creditor, loan: loan.loan });
    }

    fn shrink(&mut self, creditor: InstanceId, loan: LoanId, keep: usize) {
        self.tell(NodeCommand::Shrink { creditor, loan, keep: keep as u32 });
    }

    fn report(&mut self, requests: Vec<Held>, queue: Vec<u32>) {
        self.tell(NodeCommand::Plan { requests, queue });
    }

    fn creditor_failed(&mut self, creditor: InstanceId, reason: &str) {
        self.tell(NodeCommand::CreditorFailed { creditor, reason: reason.to_string() });
    }
}

/// What the control plane knows, for other threads to read.
#[derive(Clone, Default)]
pub struct ClusterView(Arc<Mutex<(LedgerView, bool)>>);

impl ClusterView {
    /// The ledger as of a moment ago.
    pub fn ledger(&self) -> LedgerView {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).0.clone()
    }

    /// What `read` makes of the ledger as of a moment ago, without a copy of it.
    pub fn with<R>(&self, read: impl FnOnce(&LedgerView) -> R) -> R {
        read(&self.0.lock().unwrap_or_else(PoisonError::into_inner).0)
    }

    /// Nothing is lent or borrowed any more, and nothing will be.
    pub fn drained(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).1
    }

    fn publish(&self, ledger: LedgerView, drained: bool) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = (ledger, drained);
    }
}

struct Creditor {
    host: u64,
    endpoints: Vec<Address>,
}

/// The loop's state.
pub(super) struct ControlLoop {
    pub(super) transport: Box<dyn Transport>,
    pub(super) datagrams: Datagrams,
    pub(super) controller: Controller,
    pub(super) inbox: Receiver<NodeCommand>,
    /// The engine, where there is one.
    pub(super) engine: Option<SyncSender<Command>>,
    /// The engine's figures for the ledger row.
    pub(super) figures: Box<dyn FnMut() -> LocalStats + Send>,
    pub(super) shape: Option<KvShape>,
    pub(super) host: u64,
    pub(super) view: ClusterView,
}

impl ControlLoop {
    /// Runs until told to leave.
    pub(super) fn run(mut self) {
        let start = Instant::now();
        let mut state = State::new(start);
        let mut published = Duration::ZERO;
        self.feed(start.elapsed(), &mut state, Input::Tick);
        while !state.left {
            self.take_commands(start, &mut state);
            self.take_events(start, &mut state);
            while let Some((from, bytes)) = self.datagrams.receive() {
                self.feed(start.elapsed(), &mut state, Input::Datagram { from, bytes: &bytes });
            }
            let now = start.elapsed();
            if self.controller.deadline().is_some_and(|d| d <= now) {
                let figures = (self.figures)();
                self.feed(now, &mut state, Input::LocalRow(figures));
                self.feed(now, &mut state, Input::Tick);
            }
            self.report_memory(now, &mut state);
            if now >= published {
                self.view.publish(self.controller.view(now), state.drained);
                published = now + Duration::from_millis(50);
            }
            let until = self.controller.deadline().unwrap_or(now).max(now) - now;
            if let Err(error) = self.transport.wait(until.min(Duration::from_millis(100))) {
                tracing::error!(%error, "the control transport failed; this node is alone now");
                break;
            }
        }
        self.view.publish(self.controller.view(start.elapsed()), state.drained);
    }

    fn take_commands(&mut self, start: Instant, state: &mut State) {
        while let Ok(command) = self.inbox.try_recv() {
            let now = start.elapsed();
            match command {
                NodeCommand::Borrow { seq, blocks, avoid, only } => {
                    let (request, blocks) = (seq, blocks as u32);
                    self.feed(now, state, Input::Borrow { request, blocks, avoid: &avoid, only });
                }
                NodeCommand::Shrink { creditor, loan, keep } => {
                    self.feed(now, state, Input::ShrinkLoan { creditor, loan, keep });
                }
                NodeCommand::Plan { requests, queue } => self.feed(now, state, Input::Plan { requests, queue }),
                NodeCommand::Repay { creditor, loan } => self.feed(now, state, Input::RepayLoan { creditor, loan }),
                NodeCommand::CreditorFailed { creditor, reason } => {
                    tracing::warn!(%creditor, reason, "the lane to a creditor failed");
                }
                NodeCommand::Drain => self.feed(now, state, Input::Drain),
                NodeCommand::Leave => {
                    self.feed(now, state, Input::Leave);
                    state.left = true;
                }
                NodeCommand::Vanish => state.left = true,
            }
        }
    }

    fn take_events(&mut self, start: Instant, state: &mut State) {
        let mut events = std::mem::take(&mut state.events);
        let polled = self.transport.poll(&mut |event| {
            events.push(match event {
                Event::Connected { peer } => Happened::Connected(peer),
                Event::Accepted { peer, .. } => Happened::Accepted(peer),
                Event::Message { peer, payload } => Happened::Message(peer, payload.to_vec()),
                // Nothing is exported here, so nothing can be notified of.
                Event::Notified { peer, .. } => Happened::Foreign(peer),
                Event::Closed { peer, reason } => Happened::Closed(peer, reason.to_string()),
            });
        });
        if let Err(error) = polled {
            tracing::error!(%error, "the control transport failed");
        }
        for event in events.drain(..) {
            let now = start.elapsed();
            match event {
                Happened::Connected(peer) => {
                    if let Some(address) = state.dialing.remove(&peer.0) {
                        self.feed(now, state, Input::PeerConnected { conn: peer.0, address: &address });
                    }
                }
                Happened::Accepted(peer) => self.feed(now, state, Input::PeerAccepted { conn: peer.0 }),
                Happened::Message(peer, bytes) => {
                    self.feed(now, state, Input::PeerMessage { conn: peer.0, bytes: &bytes });
                }
                Happened::Foreign(peer) => {
                    self.transport.disconnect(peer);
                    self.feed(now, state, Input::PeerClosed { conn: peer.0 });
                }
                Happened::Closed(peer, reason) => match state.dialing.remove(&peer.0) {
                    Some(address) => {
                        tracing::debug!(address, reason, "a member could not be reached");
                        self.feed(now, state, Input::ConnectFailed { address: &address });
                    }
                    None => self.feed(now, state, Input::PeerClosed { conn: peer.0 }),
                },
            }
        }
        state.events = events;
    }

    fn feed(&mut self, now: Duration, state: &mut State, input: Input<'_>) {
        self.controller.handle(now, input);
        while let Some(output) = self.controller.poll_output() {
            self.carry_out(now, state, output);
        }
    }

    fn carry_out(&mut self, now: Duration, state: &mut State, output: Output) {
        match output {
            Output::Datagram { to, bytes } => self.datagrams.send(to, &bytes),
            Output::Connect { address } => match self.transport.connect(&Address(address.clone()), b"") {
                Ok(peer) => {
                    state.dialing.insert(peer.0, address);
                }
                Err(error) => {
                    tracing::debug!(address, %error, "a member could not be reached");
                    self.controller.handle(now, Input::ConnectFailed { address: &address });
                }
            },
            Output::Send { conn, bytes } => {
                if let Err(error) = self.transport.send(PeerId(conn), &bytes) {
                    tracing::debug!(conn, %error, "a control message was not sent");
                    self.transport.disconnect(PeerId(conn));
                    self.controller.handle(now, Input::PeerClosed { conn });
                }
            }
            Output::Disconnect { conn } => self.transport.disconnect(PeerId(conn)),
            Output::Granted { request, loans } => {
                let loans = loans.into_iter().map(|loan| self.locate(state, loan)).collect();
                self.tell_engine(Command::Granted { seq: request, loans });
            }
            Output::Refused { request, reason } => {
                // The engine asks no more until it hears of creditors anew: it is
                // told again, changed or not, but not at once.
                state.retell = Some(now + RETELL);
                self.tell_engine(Command::Refused { seq: request, reason: reason.to_string() });
            }
            Output::LeaseUntil { creditor, until } => {
                self.tell_engine(Command::LeaseUntil { creditor, until: state.start + until });
            }
            Output::CreditorLeaves { creditor } => self.tell_engine(Command::CreditorLeaves(creditor)),
            Output::Moves(moves) => {
                for planned in &moves {
                    tracing::debug!(?planned, "a move is planned");
                }
                self.tell_engine(Command::Moves(moves.iter().map(Into::into).collect()));
            }
            Output::LoansLost { loans } => {
                let loans = loans.iter().map(|l| (l.creditor, l.loan)).collect();
                self.tell_engine(Command::LoansLost { loans });
            }
            Output::CreditorUp { instance, host, endpoints } => {
                let endpoints = endpoints.into_iter().map(Address).collect();
                state.creditors.insert(instance, Creditor { host, endpoints });
            }
            Output::CreditorDown { instance } => {
                state.creditors.remove(&instance);
                let reason = "it left the cluster or stopped answering".to_string();
                self.tell_engine(Command::CreditorLost { creditor: instance, reason });
            }
            Output::Note(note) => log(&note),
            Output::Drained => state.drained = true,
        }
    }

    fn locate(&self, state: &State, loan: Loan) -> GrantedLoan {
        let creditor = state.creditors.get(&loan.creditor);
        let same_host = creditor.is_some_and(|c| c.host == self.host);
        // Shared memory is only an address on the same host.
        let usable = |a: &&Address| same_host || !a.0.starts_with("shm://");
        let addresses = creditor.map_or(&[][..], |c| &c.endpoints).iter().filter(usable).cloned().collect();
        let Loan { creditor, loan, epoch, blocks, .. } = loan;
        let loan = HeldLoan::new(creditor, loan, epoch, blocks);
        GrantedLoan { loan, addresses, same_host }
    }

    /// Tells the engine what could be borrowed, and when lent memory is back.
    fn report_memory(&mut self, now: Duration, state: &mut State) {
        if self.shape.is_none() {
            return;
        }
        let lent = self.controller.rmanager().lent();
        let slack = self.controller.slack();
        let again = state.retell.take_if(|at| *at <= now).is_some();
        if slack != state.slack || again {
            state.slack = slack;
            self.tell_engine(Command::Slack(slack));
        }
        if lent < state.lent {
            self.tell_engine(Command::MemoryReturned);
        }
        state.lent = lent;
    }

    fn tell_engine(&self, command: Command) {
        if let Some(engine) = &self.engine {
            // An engine that has ended needs no news.
            let _ = engine.send(command);
        }
    }
}

struct State {
    /// The controller's time began then.
    start: Instant,
    creditors: BTreeMap<InstanceId, Creditor>,
    dialing: BTreeMap<u64, String>,
    events: Vec<Happened>,
    slack: Slack,
    /// When the engine is to be told of it again.
    retell: Option<Duration>,
    lent: u32,
    drained: bool,
    left: bool,
}

impl State {
    fn new(start: Instant) -> Self {
        Self {
            start,
            creditors: BTreeMap::new(),
            dialing: BTreeMap::new(),
            events: Vec::new(),
            slack: Slack::default(),
            retell: None,
            lent: 0,
            drained: false,
            left: false,
        }
    }
}

enum Happened {
    Connected(PeerId),
    Accepted(PeerId),
    Message(PeerId, Vec<u8>),
    Foreign(PeerId),
    Closed(PeerId, String),
}

fn log(note: &Note) {
    match note {
        Note::Up(instance) => tracing::info!(%instance, "a member joined"),
        Note::Down(instance) => tracing::warn!(%instance, "a member is gone"),
        Note::Left(instance) => tracing::info!(%instance, "a member has left"),
        Note::Renewed(life) => tracing::warn!(life, "others took this node for dead; it has joined again"),
        Note::Dropped { conn, reason } => tracing::warn!(conn, reason, "closed a control connection"),
        Note::CreditorRefused(instance, reason) => tracing::debug!(%instance, ?reason, "a creditor refused"),
        Note::Lapsed { debtor, loan, blocks } => {
            tracing::warn!(%debtor, loan = loan.0, blocks, "a loan ended without being repaid");
        }
    }
}
