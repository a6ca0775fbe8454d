//! The controller: one instance's whole control plane as a value that inputs
//! change and outputs leave.
//!
//! **The driving contract, in one sentence:** call [`handle`] with the time and
//! one input, then [`poll_output`] until it gives `None`, and call `handle`
//! with [`Input::Tick`] no later than [`deadline`]; time never goes back, and
//! the same seed and inputs give the same outputs.
//!
//! [`handle`]: Controller::handle
//! [`poll_output`]: Controller::poll_output
//! [`deadline`]: Controller::deadline

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use core::net::SocketAddr;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

pub use super::config::{Config, ConfigError};
use super::debts::Debts;
pub use super::debts::{BorrowError, Loan};
pub use super::event::{ControlStats, Input, LocalStats, Note, Output};
use super::gossip::{Gossip, pace};
use super::ledger::Ledger;
use super::links::{Links, Route};
use super::message::{MAX_RENEWALS, Message, Packet, Role, Service};
use super::planning::Planning;
use super::rmanager::RManager;
use super::row::{MAX_DEBTORS, MAX_LINKS, Row, Stamp, TierRow};
use super::seal::{NONCE_BYTES, Seal};
use super::swim::{Change, Member, Swim};
use crate::kv::rblock::InstanceId;

/// A row that matters to others (memory lent or given back) is told this long
/// after the one before, at the earliest.
const SOON: Duration = Duration::from_millis(20);

/// One instance's control plane.
pub struct Controller {
    pub(super) config: Config,
    pub(super) seal: Seal,
    pub(super) rmanager: RManager,
    pub(super) debts: Debts,
    pub(super) swim: Swim,
    pub(super) gossip: Gossip,
    pub(super) links: Links,
    pub(super) planning: Planning,
    /// How long the loans of each creditor last unrenewed.
    pub(super) leases: BTreeMap<InstanceId, Duration>,
    pub(super) rng: ChaCha8Rng,
    pub(super) outputs: VecDeque<Output>,
    pub(super) stats: ControlStats,
    pub(super) local: LocalStats,
    pub(super) stamp: Stamp,
    /// When each row last brought news.
    pub(super) news: BTreeMap<InstanceId, Duration>,
    /// Creditors announced to the engine: up, and with a row.
    pub(super) announced: BTreeMap<InstanceId, u32>,
    /// When it was called last.
    pub(super) last: Duration,
    pub(super) beat_next: Duration,
    pub(super) row_last: Duration,
    pub(super) row_next: Duration,
    pub(super) announce_next: Duration,
    pub(super) draining: bool,
    pub(super) drained: bool,
    pub(super) left: bool,
}

impl Controller {
    /// A controller that knows nobody yet. Begin with an [`Input::Tick`].
    pub fn new(config: Config, rmanager: RManager, seed: u64) -> Result<Self, ConfigError> {
        config.check()?;
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let me = Member { address: config.gossip, instance: config.instance, started: config.started, life: 0 };
        Ok(Self {
            seal: Seal::new(&config.key, config.cluster),
            config,
            rmanager,
            debts: Debts::default(),
            swim: Swim::new(me, rng.random()),
            gossip: Gossip::default(),
            links: Links::default(),
            planning: Planning::default(),
            leases: BTreeMap::new(),
            rng,
            outputs: VecDeque::new(),
            stats: ControlStats::default(),
            local: LocalStats::default(),
            stamp: Stamp::default(),
            news: BTreeMap::new(),
            announced: BTreeMap::new(),
            last: Duration::ZERO,
            beat_next: Duration::ZERO,
            row_last: Duration::ZERO,
            row_next: Duration::ZERO,
            announce_next: Duration::ZERO,
            draining: false,
            drained: false,
            left: false,
        })
    }

    /// Takes in one input at `now`, the time since any fixed moment.
    pub fn handle(&mut self, now: Duration, input: Input<'_>) {
        self.forgive(now);
        match input {
            Input::Datagram { from, bytes } => self.datagram(now, from, bytes),
            Input::PeerConnected { conn, address } => {
                self.links.connected(now, conn, address);
                self.greet(conn);
            }
            Input::ConnectFailed { address } => self.links.failed(now, address),
            Input::PeerAccepted { conn } => self.links.accepted(now, conn),
            Input::PeerMessage { conn, bytes } => self.message(now, conn, bytes),
            Input::PeerClosed { conn } => self.links.closed(conn),
            Input::Borrow { request, blocks, avoid, only } => self.borrow(now, request, blocks, avoid, only),
            Input::Plan { requests, queue } => self.plan(now, requests, queue),
            Input::ShrinkLoan { creditor, loan, keep } => self.shrink(now, creditor, loan, keep),
            Input::RepayRequest { request } => self.repay_request(now, request),
            Input::RepayLoan { creditor, loan } => {
                if let Some(loan) = self.debts.repay_loan(creditor, loan) {
                    self.repay(now, loan);
                }
            }
            Input::LocalRow(stats) => self.local = stats,
            Input::Tick => {}
            Input::Drain => {
                self.draining = true;
                self.rmanager.drain();
                self.tell_soon();
            }
            Input::Leave => self.leave(now),
        }
        self.maintain(now);
    }

    /// The next thing to be done; `None` when all is done for now.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// When [`Input::Tick`] is due at the latest.
    pub fn deadline(&self) -> Option<Duration> {
        if self.left {
            return None;
        }
        let fixed = [self.row_next, self.announce_next, self.gossip.deadline()];
        let beat = self.debts.creditors().next().map(|_| self.beat_next);
        let links =
            self.links.deadline(self.config.hello_timeout, self.config.lost_after, |peer| self.debts.owes(peer));
        let rest = [beat, links, self.swim.deadline(), self.rmanager.next_expiry(), self.debts.next_overdue()];
        fixed.into_iter().chain(rest.into_iter().flatten()).min()
    }

    /// Figures since the start.
    pub fn stats(&self) -> ControlStats {
        ControlStats { garbage: self.stats.garbage + self.swim.refused(), ..self.stats }
    }

    /// The creditor's side of this instance.
    pub fn rmanager(&self) -> &RManager {
        &self.rmanager
    }

    /// The debtor's side of this instance.
    pub fn debts(&self) -> &Debts {
        &self.debts
    }

    /// This instance.
    pub fn own(&self) -> InstanceId {
        self.config.instance
    }

    /// Members that are up, without this one.
    pub fn members(&self) -> usize {
        self.swim.up().len()
    }

    /// The newest rows known, this instance's own among them.
    pub fn ledger(&self) -> &Ledger {
        self.gossip.ledger()
    }

    /// Rows of the members whose memory suits this instance.
    pub fn creditors(&self) -> impl Iterator<Item = &Row> {
        self.announced.keys().filter_map(|instance| self.gossip.ledger().get(*instance))
    }

    // ---- datagrams --------------------------------------------------------------

    fn datagram(&mut self, now: Duration, from: SocketAddr, bytes: &[u8]) {
        let Some(plain) = self.seal.open(bytes) else {
            self.stats.unsealed += 1;
            return;
        };
        match Packet::decode(&plain) {
            Ok(Packet::Swim(bytes)) => {
                let mut changes = Vec::new();
                self.swim.receive(now, &bytes, &mut changes);
                self.changed(now, changes);
            }
            Ok(Packet::Digest(digest)) => {
                let mut replies = Vec::new();
                self.gossip.compare(&digest, &mut |packet| replies.push(packet));
                replies.iter().for_each(|packet| self.post(from, packet));
            }
            Ok(Packet::Rows(rows)) => rows.into_iter().for_each(|row| self.learn(now, row)),
            Err(_) => self.stats.garbage += 1,
        }
    }

    fn learn(&mut self, now: Duration, row: Row) {
        let instance = row.instance;
        // Rows of the dead still travel for a moment.
        if self.swim.up().contains_key(&instance) && self.gossip.learn(row) {
            self.news.insert(instance, now);
            self.announce_creditor(instance);
        }
    }

    /// Tells the engine of a member whose memory suits it, once a life.
    fn announce_creditor(&mut self, instance: InstanceId) {
        let Some(life) = self.swim.up().get(&instance).map(|member| member.life) else { return };
        let Some((host, endpoints)) = self.creditor(instance) else { return };
        if self.announced.get(&instance) != Some(&life) {
            self.announced.insert(instance, life);
            if host == self.config.profile.host {
                self.debts.near.insert(instance);
            }
            self.outputs.push_back(Output::CreditorUp { instance, host, endpoints });
        }
    }

    fn changed(&mut self, now: Duration, changes: Vec<Change>) {
        for change in changes {
            match change {
                Change::Up(member) => {
                    self.outputs.push_back(Output::Note(Note::Up(member.instance)));
                    // It knows nothing of us yet.
                    self.tell_soon();
                }
                Change::Down(member) => self.down(now, member.instance),
                Change::Replaced(member) => self.replaced(now, member.instance),
                Change::Renewed(me) => {
                    self.stamp = Stamp { incarnation: me.life, version: 0 };
                    self.outputs.push_back(Output::Note(Note::Renewed(me.life)));
                    self.row_next = now;
                }
            }
        }
    }

    fn post(&mut self, to: SocketAddr, packet: &Packet) {
        let mut plain = Vec::with_capacity(1300);
        packet.encode(&mut plain);
        let nonce: [u8; NONCE_BYTES] = self.rng.random();
        let bytes = self.seal.seal(nonce, &plain);
        self.stats.datagrams += 1;
        self.stats.datagram_bytes += bytes.len() as u64;
        self.outputs.push_back(Output::Datagram { to, bytes });
    }

    // ---- messages -------------------------------------------------------------

    fn greet(&mut self, conn: u64) {
        let (cluster, instance) = (self.config.cluster, self.config.instance);
        self.send(conn, &Message::Hello { cluster, instance });
    }

    fn message(&mut self, now: Duration, conn: u64, bytes: &[u8]) {
        let Some(link) = self.links.get(conn) else { return };
        let known = link.instance;
        let message = match Message::decode(bytes) {
            Ok(message) => message,
            Err(error) => return self.garbage(conn, error.to_string()),
        };
        match (known, message) {
            (None, Message::Hello { cluster, instance }) => self.hello(now, conn, cluster, instance),
            (None, _) => self.garbage(conn, "a message before the Hello".into()),
            (Some(_), Message::Hello { .. }) => self.garbage(conn, "a second Hello".into()),
            (Some(from), message) => {
                self.links.heard(now, conn);
                self.peer_says(now, conn, from, message);
            }
        }
    }

    fn hello(&mut self, now: Duration, conn: u64, cluster: [u8; 16], instance: InstanceId) {
        let accepted = self.links.get(conn).is_some_and(|link| link.dialed.is_none());
        if cluster != self.config.cluster {
            self.stats.foreign += 1;
            return self.drop_link(conn, "it belongs to another cluster".into());
        }
        if instance == self.config.instance {
            return self.drop_link(conn, "the address is this instance's own".into());
        }
        if accepted {
            self.greet(conn);
        }
        match self.links.hello(now, conn, instance) {
            Ok(waiting) => {
                waiting.into_iter().for_each(|bytes| self.outputs.push_back(Output::Send { conn, bytes }));
            }
            Err(reason) => self.drop_link(conn, reason.into()),
        }
    }

    fn peer_says(&mut self, now: Duration, conn: u64, from: InstanceId, message: Message) {
        match message {
            // Taken care of where the message was read.
            Message::Hello { .. } => {}
            Message::Heartbeat { sent_us, loans } => {
                let lent = self.rmanager.lent();
                for renewal in loans {
                    let (loan, epoch) = (renewal.loan, renewal.epoch);
                    if !self.rmanager.renew(now, from, loan, epoch, renewal.blocks) {
                        self.send(conn, &Message::Lapsed { loan, epoch });
                    }
                }
                if self.rmanager.lent() != lent {
                    self.tell_soon();
                }
                self.send(conn, &Message::Heard { sent_us });
            }
            Message::Heard { sent_us } => {
                let sent = Duration::from_micros(sent_us);
                if let Some(rtt) = now.checked_sub(sent) {
                    self.links.measured(from, rtt);
                    // It heard the renewal after it was sent.
                    self.lease_until(from, sent);
                }
            }
            Message::TryMoveKvCache { ticket, request, blocks, shape } => {
                let answer = match self.rmanager.reserve(now, from, request, blocks, &shape) {
                    Ok(grant) => {
                        self.stats.granted += 1;
                        self.tell_soon();
                        let lease_ms = u32::try_from(self.rmanager.lease().as_millis()).unwrap_or(u32::MAX);
                        Message::Granted {
                            ticket,
                            loan: grant.loan,
                            epoch: grant.epoch,
                            lease_ms,
                            blocks: grant.blocks,
                        }
                    }
                    Err(reason) => {
                        self.stats.refused += 1;
                        Message::Refused { ticket, reason, free: self.row().lendable(&shape) }
                    }
                };
                self.send(conn, &answer);
            }
            Message::Granted { ticket, loan, epoch, blocks, lease_ms } => {
                // It reserved after it was asked. Older loans end earlier.
                if !self.debts.owes(from)
                    && let Some(ask) = self.debts.asked(from, ticket)
                {
                    self.leases.insert(from, Duration::from_millis(u64::from(lease_ms)));
                    self.lease_until(from, ask.until.saturating_sub(self.config.ask_timeout));
                }
                let count: u64 = blocks.iter().map(|range| u64::from(range.count)).sum();
                let held = self.debts.holds(from, loan);
                let progress = self.debts.granted(from, ticket, loan, epoch, &blocks);
                if !held && !self.debts.holds(from, loan) {
                    self.send(conn, &Message::Repay { loan, epoch });
                } else {
                    self.correct(from, |tier| {
                        let count = u32::try_from(count).unwrap_or(u32::MAX);
                        tier.free = tier.free.saturating_sub(count);
                        tier.lent = tier.lent.saturating_add(count);
                    });
                }
                self.progress(now, progress);
            }
            Message::Refused { ticket, reason, free } => {
                self.correct(from, |tier| tier.free = tier.free.min(free));
                self.planning.refused(now, from);
                self.outputs.push_back(Output::Note(Note::CreditorRefused(from, reason)));
                self.refused(now, from, ticket);
            }
            Message::Repay { loan, epoch } => {
                let answer = match self.rmanager.repay(from, loan, epoch) {
                    true => Message::Repaid { loan, epoch },
                    false => Message::Lapsed { loan, epoch },
                };
                self.tell_soon();
                self.send(conn, &answer);
            }
            Message::Repaid { .. } => {}
            Message::Lapsed { loan, epoch } => {
                let lost: Vec<_> = self.debts.lapsed(from, loan, epoch).into_iter().collect();
                self.lost(now, lost);
            }
        }
    }

    /// Loans of `creditor` were in force at `since`, and are for a lease.
    fn lease_until(&mut self, creditor: InstanceId, since: Duration) {
        if let Some(lease) = self.leases.get(&creditor) {
            self.outputs.push_back(Output::LeaseUntil { creditor, until: since + *lease });
        }
    }

    fn garbage(&mut self, conn: u64, reason: String) {
        self.stats.garbage += 1;
        self.drop_link(conn, reason);
    }

    fn drop_link(&mut self, conn: u64, reason: String) {
        self.outputs.push_back(Output::Note(Note::Dropped { conn, reason }));
        self.outputs.push_back(Output::Disconnect { conn });
        self.links.closed(conn);
    }

    // ---- members ----------------------------------------------------------------

    /// Its loans to this instance are lost with it. What it borrowed here stays
    /// its own until the leases end: it may only be cut off, and still be
    /// writing.
    fn down(&mut self, now: Duration, instance: InstanceId) {
        for conn in self.links.remove(instance) {
            self.outputs.push_back(Output::Disconnect { conn });
        }
        let row = self.gossip.ledger().get(instance);
        let left = row.is_some_and(|row| row.service == Service::Draining);
        self.outputs.push_back(Output::Note(if left { Note::Left(instance) } else { Note::Down(instance) }));
        self.gossip.forget(instance);
        self.news.remove(&instance);
        self.debts.near.remove(&instance);
        self.leases.remove(&instance);
        if self.announced.remove(&instance).is_some() {
            self.outputs.push_back(Output::CreditorDown { instance });
        }
        let (lost, tickets) = self.debts.creditor_lost(instance);
        self.lost(now, lost);
        for ticket in tickets {
            self.refused(now, instance, ticket);
        }
    }

    /// A later process answers at its address, so its own is dead: nothing of
    /// it can write any more.
    fn replaced(&mut self, now: Duration, instance: InstanceId) {
        self.down(now, instance);
        let ended = self.rmanager.debtor_gone(instance);
        self.note_lapsed(&ended);
        self.tell_soon();
    }

    /// Host and endpoints of a member whose memory suits this instance.
    fn creditor(&self, instance: InstanceId) -> Option<(u64, Vec<String>)> {
        let mine = self.config.shape?;
        let row = self.gossip.ledger().get(instance)?;
        // A lender's shape may be cut anew; an engine's is its model's.
        let suits = row.profile.role == Role::Lender || row.shape == Some(mine);
        (suits && !row.profile.creditor.is_empty()).then(|| (row.profile.host, row.profile.creditor.clone()))
    }

    fn leave(&mut self, now: Duration) {
        self.swim.leave(now);
        self.flush_swim();
        let conns: Vec<_> = self.links.open().keys().copied().collect();
        for conn in conns {
            self.outputs.push_back(Output::Disconnect { conn });
        }
        self.left = true;
    }

    // ---- time -----------------------------------------------------------------

    /// Whoever was not called for so long (stopped, starved, suspended) has
    /// heard nobody, and must not conclude that nobody spoke.
    fn forgive(&mut self, now: Duration) {
        let gap = now.saturating_sub(self.last);
        if gap > self.config.heartbeat * 2 && self.last > Duration::ZERO {
            self.links.prolong(gap);
            self.rmanager.prolong(gap);
        }
        self.last = now;
    }

    fn maintain(&mut self, now: Duration) {
        if self.left {
            return;
        }
        let mut changes = Vec::new();
        self.swim.tick(now, &mut changes);
        self.changed(now, changes);
        let (hello, lost) = (self.config.hello_timeout, self.config.lost_after);
        for conn in self.links.stale(now, hello, lost, |peer| self.debts.owes(peer)) {
            self.outputs.push_back(Output::Disconnect { conn });
            self.links.closed(conn);
        }
        let ended = self.rmanager.expire(now);
        if !ended.is_empty() {
            self.note_lapsed(&ended);
            for record in &ended {
                let (loan, epoch) = (record.loan, record.epoch);
                if self.swim.up().contains_key(&record.debtor) {
                    self.send_to(now, record.debtor, &Message::Lapsed { loan, epoch });
                }
            }
            self.tell_soon();
        }
        for ask in self.debts.overdue(now) {
            self.refused(now, ask.creditor, ask.ticket);
        }
        if self.beat_next <= now {
            self.beat_next = now + self.config.heartbeat;
            let creditors: Vec<_> = self.debts.creditors().collect();
            creditors.into_iter().for_each(|creditor| self.beat(now, creditor));
        }
        if self.row_next <= now {
            self.row_last = now;
            self.row_next = now + pace(self.swim.up().len());
            self.publish();
        }
        if self.announce_next <= now {
            let alone = self.swim.up().is_empty();
            self.announce_next = now + if alone { self.config.announce.0 } else { self.config.announce.1 };
            let known: Vec<_> = self.swim.up().values().map(|m| m.address).collect();
            for address in self.config.join.iter().filter(|address| !known.contains(address)) {
                self.swim.announce(now, *address);
            }
        }
        self.flush_swim();
        let mut packets = Vec::new();
        self.gossip.round(now, self.swim.up(), &mut self.rng, &mut |to, packet| packets.push((to, packet)));
        packets.iter().for_each(|(to, packet)| self.post(*to, packet));
        let settled = self.draining && self.rmanager.lent() == 0 && self.debts.is_empty();
        if settled && !self.drained {
            self.drained = true;
            self.outputs.push_back(Output::Drained);
        }
    }

    fn flush_swim(&mut self) {
        while let Some((to, bytes)) = self.swim.next_datagram() {
            self.post(to, &Packet::Swim(bytes));
        }
    }

    /// Puts this instance's row out, if it says anything new.
    fn publish(&mut self) {
        let mut row = self.row();
        let known = self.gossip.ledger().get(row.instance);
        if known.is_some_and(|known| Row { stamp: row.stamp, ..known.clone() } == row) {
            return;
        }
        self.stamp.version = self.stamp.version.saturating_add(1);
        row.stamp = self.stamp;
        self.gossip.learn(row);
    }

    /// The row goes out as soon as the last one is not too fresh.
    fn tell_soon(&mut self) {
        self.row_next = self.row_next.min(self.row_last + SOON.max(pace(self.swim.up().len()) / 4));
    }

    pub(super) fn beat(&mut self, now: Duration, to: InstanceId) {
        let renewals = self.debts.renewals(to);
        let sent_us = now.as_micros() as u64;
        for part in renewals.chunks(MAX_RENEWALS) {
            self.send_to(now, to, &Message::Heartbeat { sent_us, loans: part.to_vec() });
        }
    }

    pub(super) fn row(&self) -> Row {
        let pool = self.rmanager.pool();
        let total = pool.as_ref().map_or(0, |pool| pool.blocks());
        let mut debts = self.rmanager.debts();
        debts.sort_by_key(|debt| (std::cmp::Reverse(debt.blocks), debt.debtor));
        debts.truncate(MAX_DEBTORS);
        let mut links: Vec<_> = self.links.rows().collect();
        links.truncate(MAX_LINKS);
        Row {
            instance: self.config.instance,
            stamp: self.stamp,
            profile: self.config.profile.clone(),
            service: if self.draining { Service::Draining } else { Service::Serving },
            shape: pool.as_ref().map(|pool| *pool.shape()),
            shapeable_bytes: self.rmanager.shapeable_bytes(),
            tiers: vec![TierRow {
                tier: self.config.tier,
                total,
                free: self.rmanager.free(),
                lent: self.rmanager.lent(),
                lend_cap: self.rmanager.lend_cap(),
            }],
            debts,
            borrowed: self.debts.borrowed(),
            running: self.local.running,
            waiting: self.local.waiting,
            wanted: self.local.wanted,
            tokens_s: self.local.tokens_s,
            perf: self.local.perf,
            links,
        }
    }

    fn note_lapsed(&mut self, ended: &[std::sync::Arc<super::rmanager::LoanRecord>]) {
        self.stats.lapsed += ended.len() as u64;
        for record in ended {
            let (debtor, loan, blocks) = (record.debtor, record.loan, record.blocks.len() as u32);
            self.outputs.push_back(Output::Note(Note::Lapsed { debtor, loan, blocks }));
        }
    }

    /// Says something to an instance, over a connection that may have to be
    /// made first. What cannot be said now is dropped: asks have a time limit,
    /// loans a lease, heartbeats a successor.
    pub(super) fn send_to(&mut self, now: Duration, instance: InstanceId, message: &Message) {
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        let row = self.gossip.ledger().get(instance);
        let address = row.and_then(|row| row.profile.control.first()).cloned();
        match self.links.route(now, instance, address.as_deref(), &bytes) {
            Route::Send(conn) => self.outputs.push_back(Output::Send { conn, bytes }),
            Route::Connect => {
                if let Some(address) = address {
                    self.outputs.push_back(Output::Connect { address });
                }
            }
            Route::Wait | Route::Unreachable => {}
        }
    }

    fn send(&mut self, conn: u64, message: &Message) {
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        self.outputs.push_back(Output::Send { conn, bytes });
    }
}
