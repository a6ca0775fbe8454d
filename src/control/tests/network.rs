//! Controllers joined by a network that exists in memory: seeded delays, each
//! connection in order, connections that break or fall silent, nodes that die
//! and come back. After every step the invariants are checked.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::shape;
use crate::control::controller::{Config, Controller, Input, Loan, Note, Output};
use crate::control::message::Role;
use crate::control::rmanager::{PoolSource, RManager};
use crate::control::row::Profile;
use crate::kv::pool::KvPool;
use crate::kv::rblock::{InstanceId, LoanId};
use crate::kv::table::BlockRef;

pub const LEASE: Duration = Duration::from_secs(3);

pub fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

/// What a node is made of.
#[derive(Clone)]
pub struct Plan {
    pub address: String,
    pub join: Vec<String>,
    pub cluster: u8,
    /// Blocks of a model's pool, or a lender's memory in blocks of `shape(2)`.
    pub blocks: u32,
    pub lender: bool,
    pub lend: f64,
}

impl Plan {
    pub fn new(address: &str, join: &[&str], blocks: u32) -> Self {
        let join = join.iter().map(|s| s.to_string()).collect();
        Self { address: address.into(), join, cluster: 1, blocks, lender: false, lend: 0.5 }
    }
}

/// One life of a node, and what its engine knows.
pub struct Node {
    pub plan: Plan,
    pub instance: InstanceId,
    pub control: Controller,
    pub pool: Option<Arc<KvPool>>,
    /// Local blocks in use.
    pub local: Vec<BlockRef>,
    /// Loans as told by the controller, by request.
    pub loans: BTreeMap<u64, Vec<Loan>>,
    /// Borrowings not answered.
    pub borrowing: BTreeMap<u64, u32>,
    pub refused: Vec<u64>,
    /// A creditor that drains, as told.
    pub leaving: Option<InstanceId>,
    /// Until when each creditor's loans are in force.
    pub leases: BTreeMap<InstanceId, Duration>,
    /// The last plan.
    pub moves: Vec<crate::control::plan::Move>,
    pub lost: Vec<Loan>,
    pub creditors: BTreeMap<InstanceId, Vec<String>>,
    pub notes: Vec<Note>,
    pub drained: bool,
    pub alive: bool,
}

/// One end of a connection.
#[derive(Clone, Copy)]
struct End {
    node: usize,
    peer: u64,
    open: bool,
    stalled: bool,
    /// Nothing arrives here before this.
    last: Duration,
}

enum Event {
    Dial { node: usize, address: String },
    Connected { conn: u64, address: String },
    Accepted { conn: u64 },
    ConnectFailed { node: usize, address: String },
    Message { conn: u64, bytes: Vec<u8> },
    Closed { conn: u64 },
    Datagram { from: SocketAddr, to: SocketAddr, bytes: Vec<u8> },
}

/// The datagram address of whoever listens at a control address `NAME-N`.
pub fn gossip(address: &str) -> SocketAddr {
    let number: u16 = address.bytes().fold(7, |sum, byte| sum.wrapping_mul(31).wrapping_add(u16::from(byte)));
    SocketAddr::from(([10, 0, 0, 1], number))
}

pub struct World {
    pub now: Duration,
    pub nodes: Vec<Node>,
    pub rng: ChaCha8Rng,
    pub log: String,
    ends: BTreeMap<u64, End>,
    events: BTreeMap<(Duration, u64), Event>,
    count: u64,
    lives: u64,
    pub max_delay: u64,
    /// Of a hundred datagrams, so many are lost, and as many come twice.
    pub loss: u32,
    /// Nodes that no datagram and no connection reaches.
    pub cut: Vec<usize>,
    /// Borrowings that took from several creditors.
    pub split: u64,
}

impl World {
    pub fn new(seed: u64) -> Self {
        Self {
            now: Duration::ZERO,
            nodes: Vec::new(),
            rng: ChaCha8Rng::seed_from_u64(seed),
            log: String::new(),
            ends: BTreeMap::new(),
            events: BTreeMap::new(),
            count: 0,
            lives: 0,
            max_delay: 30,
            loss: 2,
            cut: Vec::new(),
            split: 0,
        }
    }

    /// Starts a node.
    pub fn start(&mut self, plan: Plan) -> usize {
        self.lives += 1;
        let instance = InstanceId(self.rng.random_range(1..1 << 40) << 8 | self.lives);
        self.start_as(plan, instance, self.lives)
    }

    pub fn start_as(&mut self, plan: Plan, instance: InstanceId, started: u64) -> usize {
        let shape = shape(2);
        let pool = (!plan.lender).then(|| Arc::new(KvPool::new(shape, plan.blocks).unwrap()));
        let source = match &pool {
            Some(pool) => PoolSource::Pool { pool: pool.clone(), prefix: None },
            None => PoolSource::Bytes(shape.block_bytes() * plan.blocks as usize),
        };
        let profile = Profile {
            role: if plan.lender { Role::Lender } else { Role::Engine },
            model: (!plan.lender).then_some([7; 32]),
            host: 1,
            rank: 0,
            control: vec![plan.address.clone()],
            creditor: vec![format!("creditor-of-{}", plan.address)],
            http: String::new(),
            peers: None,
        };
        let config = Config {
            started,
            shape: (!plan.lender).then_some(shape),
            join: plan.join.iter().map(|address| gossip(address)).collect(),
            ..Config::new(instance, [plan.cluster; 16], profile, gossip(&plan.address))
        };
        let seed = self.rng.random();
        let control = Controller::new(config, RManager::new(source, plan.lend, LEASE), seed).unwrap();
        self.nodes.push(Node {
            plan,
            instance,
            control,
            pool,
            local: Vec::new(),
            loans: BTreeMap::new(),
            borrowing: BTreeMap::new(),
            refused: Vec::new(),
            leaving: None,
            leases: BTreeMap::new(),
            moves: Vec::new(),
            lost: Vec::new(),
            creditors: BTreeMap::new(),
            notes: Vec::new(),
            drained: false,
            alive: true,
        });
        let node = self.nodes.len() - 1;
        self.input(node, Input::Tick);
        node
    }

    /// The process is gone, and its connections with it.
    pub fn kill(&mut self, node: usize) {
        let _ = writeln!(self.log, "{:?} kill {node}", self.now);
        self.nodes[node].alive = false;
        let conns: Vec<_> = self.ends.iter().filter(|(_, e)| e.node == node && e.open).map(|(c, _)| *c).collect();
        conns.into_iter().for_each(|conn| self.hang_up(conn));
    }

    /// A random open connection breaks: both ends hear of it.
    pub fn break_connection(&mut self) {
        if let Some(conn) = self.any_connection() {
            let _ = writeln!(self.log, "{:?} break {conn}", self.now);
            let peer = self.ends[&conn].peer;
            self.post(conn, Event::Closed { conn });
            self.post(peer, Event::Closed { conn: peer });
        }
    }

    /// Nothing passes over a random open connection any more, and nobody is
    /// told.
    pub fn stall_connection(&mut self) {
        if let Some(conn) = self.any_connection() {
            let _ = writeln!(self.log, "{:?} stall {conn}", self.now);
            let peer = self.ends[&conn].peer;
            for conn in [conn, peer] {
                self.ends.get_mut(&conn).unwrap().stalled = true;
            }
        }
    }

    /// Bytes out of nowhere on a random open connection.
    pub fn garble(&mut self, bytes: Vec<u8>) {
        if let Some(conn) = self.any_connection() {
            self.post(conn, Event::Message { conn, bytes });
        }
    }

    /// A connection to `node` of somebody who is no controller; returns its
    /// name at the node.
    pub fn stranger(&mut self, node: usize) -> u64 {
        let (conn, peer) = (self.name(), self.name());
        let end = |node, peer| End { node, peer, open: true, stalled: false, last: Duration::ZERO };
        self.ends.insert(conn, end(node, peer));
        self.ends.insert(peer, End { open: false, ..end(usize::MAX, conn) });
        self.input(node, Input::PeerAccepted { conn });
        conn
    }

    pub fn is_open(&self, conn: u64) -> bool {
        self.ends[&conn].open
    }

    fn any_connection(&mut self) -> Option<u64> {
        let open: Vec<_> = self.ends.iter().filter(|(_, e)| e.open && !e.stalled).map(|(c, _)| *c).collect();
        (!open.is_empty()).then(|| open[self.rng.random_range(0..open.len())])
    }

    /// Runs until `until`, every event and deadline in its turn.
    pub fn run_until(&mut self, until: Duration) {
        loop {
            let event = self.events.keys().next().map(|(at, _)| *at);
            let alive = self.nodes.iter().enumerate().filter(|(_, n)| n.alive);
            let timer = alive.filter_map(|(i, n)| Some((n.control.deadline()?, i))).min();
            let timer_first = timer.is_some_and(|(at, _)| event.is_none_or(|event| at < event));
            let at = if timer_first { timer.map(|t| t.0) } else { event };
            let Some(at) = at.filter(|at| *at <= until) else { break };
            self.now = self.now.max(at);
            match timer {
                Some((_, node)) if timer_first => self.input(node, Input::Tick),
                _ => {
                    let (_, event) = self.events.pop_first().unwrap();
                    self.event(event);
                }
            }
        }
        self.now = until;
    }

    pub fn run_for(&mut self, duration: Duration) {
        self.run_until(self.now + duration);
    }

    fn event(&mut self, event: Event) {
        let open = |world: &Self, conn: &u64| {
            let end = world.ends.get(conn).filter(|e| e.open)?;
            world.nodes.get(end.node).is_some_and(|n| n.alive).then_some(end.node)
        };
        match event {
            Event::Connected { conn, address } => {
                if let Some(node) = open(self, &conn) {
                    self.input(node, Input::PeerConnected { conn, address: &address });
                }
            }
            Event::Accepted { conn } => {
                if let Some(node) = open(self, &conn) {
                    self.input(node, Input::PeerAccepted { conn });
                }
            }
            Event::Dial { node, address } => self.dial(node, address),
            Event::ConnectFailed { node, address } => {
                if self.nodes[node].alive {
                    self.input(node, Input::ConnectFailed { address: &address });
                }
            }
            Event::Message { conn, bytes } => {
                if let Some(node) = open(self, &conn).filter(|_| !self.ends[&conn].stalled) {
                    self.input(node, Input::PeerMessage { conn, bytes: &bytes });
                }
            }
            Event::Datagram { from, to, bytes } => {
                let there = |n: &Node| n.alive && gossip(&n.plan.address) == to;
                let target = self.nodes.iter().position(there);
                if let Some(node) = target.filter(|node| !self.cut.contains(node)) {
                    self.input(node, Input::Datagram { from, bytes: &bytes });
                }
            }
            Event::Closed { conn } => {
                if let Some(node) = open(self, &conn) {
                    self.ends.get_mut(&conn).unwrap().open = false;
                    self.input(node, Input::PeerClosed { conn });
                }
            }
        }
    }

    /// Gives a node one input and carries out what it wants.
    pub fn input(&mut self, node: usize, input: Input<'_>) {
        let _ = writeln!(self.log, "{:?} {node} < {input:?}", self.now);
        if let Input::Borrow { request, blocks, .. } = input {
            self.nodes[node].borrowing.insert(request, blocks);
        }
        self.nodes[node].control.handle(self.now, input);
        while let Some(output) = self.nodes[node].control.poll_output() {
            let _ = writeln!(self.log, "{:?} {node} > {output:?}", self.now);
            self.output(node, output);
        }
        self.check(node);
    }

    fn output(&mut self, node: usize, output: Output) {
        let now = self.now;
        match output {
            Output::Datagram { to, bytes } => {
                assert!(bytes.len() <= 1400, "a datagram of {} bytes", bytes.len());
                let from = gossip(&self.nodes[node].plan.address);
                let mut copies = 1;
                if self.rng.random_range(0..100) < self.loss {
                    copies = self.rng.random_range(0..=1) * 2;
                }
                for _ in 0..if self.cut.contains(&node) { 0 } else { copies } {
                    let at = now + Duration::from_micros(self.rng.random_range(100..=self.max_delay * 1000));
                    let key = (at, self.name());
                    self.events.insert(key, Event::Datagram { from, to, bytes: bytes.clone() });
                }
            }
            Output::Connect { address } => {
                let at = now + Duration::from_micros(self.rng.random_range(100..=self.max_delay * 1000));
                let key = (at, self.name());
                self.events.insert(key, Event::Dial { node, address });
            }
            Output::Send { conn, bytes } => {
                assert!(bytes.len() <= distkv_fabric::MAX_SEND);
                let end = self.ends[&conn];
                if end.open && !end.stalled {
                    self.post(end.peer, Event::Message { conn: end.peer, bytes });
                }
            }
            Output::Disconnect { conn } => self.hang_up(conn),
            output => self.engine(node, output),
        }
    }

    /// A node's call arrives at whoever has the address by now.
    fn dial(&mut self, node: usize, address: String) {
        if !self.nodes[node].alive {
            return;
        }
        let cut = |node: usize| self.cut.contains(&node);
        let target = self.nodes.iter().position(|n| n.alive && n.plan.address == address);
        let Some(target) = target.filter(|target| !cut(node) && !cut(*target)) else {
            let key = (self.now + ms(self.rng.random_range(1..50)), self.name());
            self.events.insert(key, Event::ConnectFailed { node, address });
            return;
        };
        let (here, there, last) = (self.name(), self.name(), self.now);
        let end = |node, peer| End { node, peer, open: true, stalled: false, last };
        self.ends.insert(here, end(node, there));
        self.ends.insert(there, end(target, here));
        self.post(there, Event::Accepted { conn: there });
        self.post(here, Event::Connected { conn: here, address });
    }

    /// What the node's engine does with an output.
    fn engine(&mut self, node: usize, output: Output) {
        let now = self.now;
        let node = &mut self.nodes[node];
        match output {
            Output::Granted { request, loans } => {
                self.split += u64::from(loans.len() > 1);
                let wanted = node.borrowing.remove(&request).expect("nobody asked");
                assert_eq!(loans.iter().map(|l| l.blocks.len() as u32).sum::<u32>(), wanted);
                for loan in loans {
                    assert_eq!(loan.request, request);
                    assert_ne!(loan.creditor, node.instance, "borrowed of itself");
                    node.loans.entry(request).or_default().push(loan);
                }
            }
            Output::Moves(moves) => node.moves = moves,
            Output::CreditorLeaves { creditor } => node.leaving = Some(creditor),
            Output::Refused { request, .. } => {
                assert!(node.borrowing.remove(&request).is_some(), "nobody asked");
                node.refused.push(request);
            }
            Output::LoansLost { loans } => {
                for lost in loans {
                    let held = node.loans.get_mut(&lost.request).expect("lost what was never granted");
                    let at = held.iter().position(|l| *l == lost).expect("lost what was never granted");
                    held.remove(at);
                    if held.is_empty() {
                        node.loans.remove(&lost.request);
                    }
                    node.lost.push(lost);
                }
            }
            Output::CreditorUp { instance, endpoints, .. } => {
                node.creditors.insert(instance, endpoints);
            }
            Output::CreditorDown { instance } => {
                node.creditors.remove(&instance);
            }
            Output::Note(note) => node.notes.push(note),
            Output::LeaseUntil { creditor, until } => {
                assert!(until > now, "told of a lease that is over");
                node.leases.insert(creditor, until);
            }
            Output::Drained => node.drained = true,
            Output::Datagram { .. } | Output::Connect { .. } | Output::Send { .. } | Output::Disconnect { .. } => {
                unreachable!()
            }
        }
    }

    fn hang_up(&mut self, conn: u64) {
        let Some(end) = self.ends.get_mut(&conn) else { return };
        let peer = end.peer;
        if std::mem::replace(&mut end.open, false) && !end.stalled {
            self.post(peer, Event::Closed { conn: peer });
        }
    }

    /// Schedules an event at one end of a connection, after all before it.
    fn post(&mut self, conn: u64, event: Event) {
        let at = self.now + Duration::from_micros(self.rng.random_range(100..=self.max_delay * 1000));
        let name = self.name();
        let Some(end) = self.ends.get_mut(&conn) else { return };
        end.last = end.last.max(at);
        self.events.insert((end.last, name), event);
    }

    fn name(&mut self) -> u64 {
        self.count += 1;
        self.count
    }

    /// What holds after every step.
    fn check(&self, node: usize) {
        let node = &self.nodes[node];
        let manager = node.control.rmanager();
        let lent: u32 = manager.loans().map(|l| l.blocks.len() as u32).sum();
        assert_eq!(lent, manager.lent());
        assert!(lent <= manager.lend_cap());
        if let Some(pool) = manager.pool() {
            let counts = pool.table().check_invariants().unwrap();
            assert_eq!(lent + counts.free + counts.held, counts.total, "lost or lent twice");
            assert_eq!(counts.held as usize, node.local.len());
        }
        // What the engine was told it holds is what the controller counts.
        let mut told: Vec<_> = node.loans.values().flatten().map(|l| (l.creditor, l.loan)).collect();
        told.sort();
        let known = node
            .control
            .debts()
            .loans()
            .filter(|l| !node.borrowing.contains_key(&l.request) || told.contains(&(l.creditor, l.loan)));
        assert_eq!(known.map(|l| (l.creditor, l.loan)).collect::<Vec<_>>(), told);
        // Until the time it was told of, its creditors keep what they lent.
        for loan in node.loans.values().flatten() {
            let creditor = self.nodes.iter().find(|n| n.instance == loan.creditor && n.alive);
            let in_force = node.leases.get(&loan.creditor).is_some_and(|until| self.now < *until);
            if let Some(creditor) = creditor.filter(|_| node.alive && in_force) {
                let kept = creditor.control.rmanager().loans().any(|l| l.loan == loan.loan && l.epoch == loan.epoch);
                assert!(kept, "{:?} ended a loan of {:?} early", creditor.instance, node.instance);
            }
        }
    }

    /// What holds once nothing has happened for a while.
    pub fn check_quiet(&self) {
        let alive: Vec<_> = self.nodes.iter().filter(|n| n.alive).collect();
        type Key = (InstanceId, InstanceId, LoanId, u32, Vec<u32>);
        let (mut given, mut taken): (Vec<Key>, Vec<Key>) = (Vec::new(), Vec::new());
        for node in &alive {
            assert!(node.borrowing.is_empty(), "a borrowing was never answered");
            assert_eq!(node.control.members(), alive.len() - 1, "{:?} does not see everybody", node.instance);
            let record = |l: &Arc<crate::control::rmanager::LoanRecord>| {
                (node.instance, l.debtor, l.loan, l.epoch, l.blocks.clone())
            };
            given.extend(node.control.rmanager().loans().map(record));
            let loan = |l: &Loan| (l.creditor, node.instance, l.loan, l.epoch, l.blocks.clone());
            taken.extend(node.loans.values().flatten().map(loan));
        }
        given.sort();
        taken.sort();
        assert_eq!(given, taken, "creditors and debtors disagree");
    }

    pub fn up(&self, node: usize, other: usize) -> bool {
        let id = self.nodes[other].instance.to_string();
        self.nodes[node].control.view(self.now).instances.iter().any(|entry| entry.id == id)
    }
}
