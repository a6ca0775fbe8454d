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

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

pub use super::config::{Config, ConfigError};
use super::debts::{Ask, Debts, Progress};
pub use super::debts::{BorrowError, Loan};
pub use super::event::{ControlStats, Input, LocalStats, Note, Output};
use super::membership::{Greeting, Membership, Rejection, Timing};
use super::message::{Hello, LedgerRow, MAX_PEERS, MAX_RENEWALS, Message, Service, TierRow};
use super::rmanager::RManager;
use super::view::{InstanceEntry, LedgerView, LinkEntry, LoanEntry, id};
use crate::kv::rblock::InstanceId;

/// Loans are announced this long after the heartbeat before, at the earliest.
const SOON: Duration = Duration::from_millis(20);

/// One instance's control plane.
pub struct Controller {
    config: Config,
    rmanager: RManager,
    debts: Debts,
    membership: Membership,
    outputs: VecDeque<Output>,
    stats: ControlStats,
    local: LocalStats,
    seq: u64,
    /// When it was called last.
    last: Duration,
    beat_last: Duration,
    beat_next: Duration,
    introduce_next: Duration,
    draining: bool,
    drained: bool,
    left: bool,
}

impl Controller {
    /// A controller that knows nobody yet. Begin with an [`Input::Tick`].
    pub fn new(config: Config, rmanager: RManager, seed: u64) -> Result<Self, ConfigError> {
        config.check()?;
        let timing = Timing {
            lost_after: config.lost_after,
            hello_timeout: config.hello_timeout,
            redial_min: config.redial.0,
            redial_max: config.redial.1,
        };
        let rng = ChaCha8Rng::seed_from_u64(seed);
        let membership = Membership::new(&config.hello, &config.join, timing, rng);
        Ok(Self {
            config,
            rmanager,
            debts: Debts::default(),
            membership,
            outputs: VecDeque::new(),
            stats: ControlStats::default(),
            local: LocalStats::default(),
            seq: 0,
            last: Duration::ZERO,
            beat_last: Duration::ZERO,
            beat_next: Duration::ZERO,
            introduce_next: Duration::ZERO,
            draining: false,
            drained: false,
            left: false,
        })
    }

    /// Takes in one input at `now`, the time since any fixed moment.
    pub fn handle(&mut self, now: Duration, input: Input<'_>) {
        self.forgive(now);
        match input {
            Input::PeerConnected { conn, address } => {
                self.membership.connected(now, conn, address);
                self.send(conn, &Message::Hello(self.config.hello.clone()));
            }
            Input::ConnectFailed { address } => self.membership.failed(now, address),
            Input::PeerAccepted { conn } => self.membership.accepted(now, conn),
            Input::PeerMessage { conn, bytes } => self.message(now, conn, bytes),
            Input::PeerClosed { conn } => self.closed(now, conn, "connection closed"),
            Input::Borrow { request, blocks } => self.borrow(now, request, blocks, &[]),
            Input::BorrowApart { request, blocks, avoid } => self.borrow(now, request, blocks, avoid),
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
                self.beat_soon();
            }
            Input::Leave => self.leave(),
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
        let fixed = [self.beat_next, self.introduce_next].into_iter();
        let rest = [self.membership.deadline(), self.rmanager.next_expiry(), self.debts.next_overdue()];
        fixed.chain(rest.into_iter().flatten()).min()
    }

    /// Figures since the start.
    pub fn stats(&self) -> ControlStats {
        self.stats
    }

    /// The creditor's side of this instance.
    pub fn rmanager(&self) -> &RManager {
        &self.rmanager
    }

    /// The debtor's side of this instance.
    pub fn debts(&self) -> &Debts {
        &self.debts
    }

    /// Members that are up, without this one.
    pub fn members(&self) -> usize {
        self.membership.members().len()
    }

    /// Everything known, for people.
    pub fn ledger(&self, now: Duration) -> LedgerView {
        let me = self.config.hello.instance;
        let ms = |since: Duration| now.saturating_sub(since).as_millis() as u64;
        let entry = |hello: &Hello, row: Option<LedgerRow>, silent_ms| InstanceEntry {
            id: id(hello.instance),
            me: hello.instance == me,
            role: hello.role,
            rank: hello.rank,
            host: hello.host,
            http: hello.http.clone(),
            model: hello.model.map(|m| m.iter().map(|byte| format!("{byte:02x}")).collect()),
            row,
            silent_ms,
        };
        let mut ledger = LedgerView::default();
        ledger.instances.push(entry(&self.config.hello, Some(self.row()), 0));
        for member in self.membership.members().values() {
            let heard = self.membership.links().get(&member.conn).map_or(now, |link| link.heard);
            ledger.instances.push(entry(&member.hello, member.row.clone(), ms(heard)));
        }
        ledger.loans.extend(self.rmanager.loans().map(|record| LoanEntry {
            creditor: id(me),
            debtor: id(record.debtor),
            loan: record.loan,
            epoch: record.epoch,
            request: record.request,
            blocks: record.blocks.len() as u32,
        }));
        ledger.loans.extend(self.debts.loans().map(|loan| LoanEntry {
            creditor: id(loan.creditor),
            debtor: id(me),
            loan: loan.loan,
            epoch: loan.epoch,
            request: loan.request,
            blocks: loan.blocks.len() as u32,
        }));
        ledger.links.extend(self.membership.links().values().filter_map(|link| {
            let to = id(link.instance?);
            Some(LinkEntry { from: id(me), to, dialed: link.dialed.clone(), age_ms: ms(link.opened) })
        }));
        ledger
    }

    // ---- messages -------------------------------------------------------------

    fn message(&mut self, now: Duration, conn: u64, bytes: &[u8]) {
        let Some(link) = self.membership.links().get(&conn) else { return };
        let known = link.instance;
        let message = match Message::decode(bytes) {
            Ok(message) => message,
            Err(error) => return self.garbage(now, conn, error.to_string()),
        };
        match (known, message) {
            (None, Message::Hello(hello)) => self.greet(now, conn, hello),
            (None, _) => self.garbage(now, conn, "a message before the Hello".into()),
            (Some(_), Message::Hello(_)) => self.garbage(now, conn, "a second Hello".into()),
            (Some(from), message) => {
                self.membership.heard(now, conn);
                self.member_says(now, conn, from, message);
            }
        }
    }

    fn greet(&mut self, now: Duration, conn: u64, hello: Hello) {
        let accepted = self.membership.links().get(&conn).is_some_and(|link| link.dialed.is_none());
        let instance = hello.instance;
        let (new, replaced) = match self.membership.hello(now, conn, hello) {
            Greeting::Welcome { new, replaced } => (new, replaced),
            Greeting::Reject(rejection) => {
                let reason = match rejection {
                    // The end that dialed must learn whom it reached: it closes.
                    Rejection::Myself if accepted => {
                        return self.send(conn, &Message::Hello(self.config.hello.clone()));
                    }
                    Rejection::Myself => "the address is this instance's own",
                    Rejection::OlderLife => "a later life of that instance is known",
                    Rejection::ForeignCluster => {
                        self.stats.foreign += 1;
                        "it belongs to another cluster"
                    }
                };
                return self.drop_link(now, conn, reason.into());
            }
        };
        if accepted {
            self.send(conn, &Message::Hello(self.config.hello.clone()));
        }
        for older in replaced {
            self.down(now, older, "restarted", true);
        }
        if new {
            self.outputs.push_back(Output::Note(Note::Up(instance)));
            if let Some((host, endpoints)) = self.creditor(instance) {
                self.outputs.push_back(Output::CreditorUp { instance, host, endpoints });
            }
        }
        self.introduce(conn, instance);
        self.beat(conn, instance, &self.row());
    }

    fn member_says(&mut self, now: Duration, conn: u64, from: InstanceId, message: Message) {
        match message {
            Message::Hello(_) => {}
            Message::Heartbeat { seq, row, loans } => {
                for renewal in loans {
                    let (loan, epoch) = (renewal.loan, renewal.epoch);
                    if !self.rmanager.renew(now, from, loan, epoch) {
                        self.send(conn, &Message::Lapsed { loan, epoch });
                    }
                }
                if let Some(member) = self.membership.member_mut(from).filter(|m| seq >= m.seq) {
                    member.seq = seq;
                    member.row = Some(row);
                }
            }
            Message::TryMoveKvCache { ticket, request, blocks, shape } => {
                let answer = match self.rmanager.reserve(now, from, request, blocks, &shape) {
                    Ok(grant) => {
                        self.stats.granted += 1;
                        self.beat_soon();
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
            Message::Granted { ticket, loan, epoch, blocks, .. } => {
                let count: u64 = blocks.iter().map(|range| u64::from(range.count)).sum();
                let held = self.debts.holds(from, loan);
                let progress = self.debts.granted(from, ticket, loan, epoch, &blocks);
                if !held && !self.debts.holds(from, loan) {
                    self.send(conn, &Message::Repay { loan, epoch });
                } else if let Some(row) = self.membership.member_mut(from).and_then(|m| m.row.as_mut()) {
                    let count = u32::try_from(count).unwrap_or(u32::MAX);
                    row.free = row.free.saturating_sub(count);
                    row.lent = row.lent.saturating_add(count);
                }
                self.progress(now, progress);
            }
            Message::Refused { ticket, reason, free } => {
                if let Some(row) = self.membership.member_mut(from).and_then(|m| m.row.as_mut()) {
                    row.free = row.free.min(free);
                }
                self.outputs.push_back(Output::Note(Note::CreditorRefused(from, reason)));
                self.refused(now, from, ticket);
            }
            Message::Repay { loan, epoch } => {
                let answer = match self.rmanager.repay(from, loan, epoch) {
                    true => Message::Repaid { loan, epoch },
                    false => Message::Lapsed { loan, epoch },
                };
                self.beat_soon();
                self.send(conn, &answer);
            }
            Message::Repaid { .. } => {}
            Message::Lapsed { loan, epoch } => {
                let lost: Vec<_> = self.debts.lapsed(from, loan, epoch).into_iter().collect();
                self.lost(now, lost);
            }
            Message::Goodbye { instance } if instance == from => self.down(now, from, "left", true),
            Message::Goodbye { .. } => self.garbage(now, conn, "a goodbye for somebody else".into()),
            Message::Peers(peers) => {
                peers.iter().for_each(|(instance, address)| self.membership.introduce(*instance, address));
            }
        }
    }

    fn garbage(&mut self, now: Duration, conn: u64, reason: String) {
        self.stats.garbage += 1;
        self.drop_link(now, conn, reason);
    }

    fn drop_link(&mut self, now: Duration, conn: u64, reason: String) {
        self.outputs.push_back(Output::Note(Note::Dropped { conn, reason }));
        self.outputs.push_back(Output::Disconnect { conn });
        self.closed(now, conn, "connection dropped");
    }

    // ---- members ----------------------------------------------------------------

    fn closed(&mut self, now: Duration, conn: u64, reason: &'static str) {
        if let Some(instance) = self.membership.closed(now, conn) {
            self.down(now, instance, reason, false);
        }
    }

    fn down(&mut self, now: Duration, instance: InstanceId, reason: &'static str, forget: bool) {
        for conn in self.membership.remove(now, instance, forget) {
            self.outputs.push_back(Output::Disconnect { conn });
        }
        self.outputs.push_back(Output::Note(Note::Down(instance, reason)));
        self.outputs.push_back(Output::CreditorDown { instance });
        let ended = self.rmanager.debtor_gone(instance);
        self.note_lapsed(&ended);
        let (lost, tickets) = self.debts.creditor_lost(instance);
        self.lost(now, lost);
        for ticket in tickets {
            self.refused(now, instance, ticket);
        }
        self.beat_soon();
    }

    /// Host and endpoints of a member whose memory suits this instance.
    fn creditor(&self, instance: InstanceId) -> Option<(u64, Vec<String>)> {
        let mine = self.config.hello.shape?;
        let hello = &self.membership.members().get(&instance)?.hello;
        let suits = hello.shape.is_none_or(|shape| shape == mine) && !hello.creditor.is_empty();
        suits.then(|| (hello.host, hello.creditor.clone()))
    }

    fn introduce(&mut self, conn: u64, to: InstanceId) {
        let members = self.membership.members().values().map(|m| &m.hello).filter(|h| h.instance != to);
        let peers: Vec<_> = members.filter_map(|h| Some((h.instance, h.control.first()?.clone()))).collect();
        for part in peers.chunks(MAX_PEERS) {
            self.send(conn, &Message::Peers(part.to_vec()));
        }
    }

    fn leave(&mut self) {
        let instance = self.config.hello.instance;
        let conns: Vec<_> = self.membership.links().iter().map(|(conn, link)| (*conn, link.instance)).collect();
        for (conn, peer) in conns {
            if peer.is_some() {
                self.send(conn, &Message::Goodbye { instance });
            }
            self.outputs.push_back(Output::Disconnect { conn });
        }
        self.left = true;
    }

    // ---- debts ----------------------------------------------------------------

    /// Who can lend this instance how much, as far as known.
    fn lendable(&self) -> BTreeMap<InstanceId, u32> {
        let Some(shape) = self.config.hello.shape else { return BTreeMap::new() };
        let members = self.membership.members().iter().filter(|(instance, _)| self.creditor(**instance).is_some());
        let lendable = members.filter_map(|(instance, member)| {
            let asked = self.debts.outstanding(*instance);
            Some((*instance, member.row.as_ref()?.lendable(&shape).saturating_sub(asked)))
        });
        lendable.collect()
    }

    fn borrow(&mut self, now: Duration, request: u64, blocks: u32, avoid: &[InstanceId]) {
        if blocks == 0 {
            return self.outputs.push_back(Output::Granted { request, loans: Vec::new() });
        }
        let asks = match self.config.hello.shape {
            None => Err(BorrowError::NoShape),
            Some(_) => self.debts.borrow(now + self.config.ask_timeout, request, blocks, &self.lendable(), avoid),
        };
        match asks {
            Ok(asks) => self.ask(&asks),
            Err(reason) => self.outputs.push_back(Output::Refused { request, reason }),
        }
    }

    fn ask(&mut self, asks: &[Ask]) {
        let Some(shape) = self.config.hello.shape else { return };
        for ask in asks {
            let Some(conn) = self.membership.members().get(&ask.creditor).map(|m| m.conn) else { continue };
            let (ticket, request, blocks) = (ask.ticket, ask.request, ask.blocks);
            self.send(conn, &Message::TryMoveKvCache { ticket, request, blocks, shape });
        }
    }

    fn refused(&mut self, now: Duration, creditor: InstanceId, ticket: u64) {
        let lendable = self.lendable();
        let (progress, asks) = self.debts.refused(now + self.config.ask_timeout, creditor, ticket, &lendable);
        self.ask(&asks);
        self.progress(now, progress);
    }

    fn progress(&mut self, now: Duration, progress: Progress) {
        match progress {
            Progress::Waiting | Progress::Unknown => {}
            Progress::Done { request, loans } => self.outputs.push_back(Output::Granted { request, loans }),
            Progress::Failed { request, error, repay } => {
                repay.into_iter().for_each(|loan| self.repay(now, loan));
                self.outputs.push_back(Output::Refused { request, reason: error });
            }
        }
    }

    fn repay_request(&mut self, now: Duration, request: u64) {
        if let Some(loans) = self.debts.cancel(request) {
            loans.into_iter().for_each(|loan| self.repay(now, loan));
            self.outputs.push_back(Output::Refused { request, reason: BorrowError::Cancelled });
        }
        let loans = self.debts.repay_request(request);
        loans.into_iter().for_each(|loan| self.repay(now, loan));
    }

    /// Tells the creditor of a loan that is no longer held.
    fn repay(&mut self, _now: Duration, loan: Loan) {
        let Some(member) = self.membership.member_mut(loan.creditor) else { return };
        let conn = member.conn;
        if let Some(row) = &mut member.row {
            let blocks = loan.blocks.len() as u32;
            row.free = row.free.saturating_add(blocks).min(row.total);
            row.lent = row.lent.saturating_sub(blocks);
        }
        self.send(conn, &Message::Repay { loan: loan.loan, epoch: loan.epoch });
    }

    /// Loans are gone. Those of a borrowing under way were never told of: the
    /// borrowing fails.
    fn lost(&mut self, now: Duration, loans: Vec<Loan>) {
        self.stats.lost += loans.len() as u64;
        let (unfinished, told): (Vec<_>, Vec<_>) = loans.into_iter().partition(|l| self.debts.was_for_borrowing(l));
        for loan in unfinished {
            let request = loan.request;
            let wanted = self.debts.wanted(request).unwrap_or(0);
            if let Some(rest) = self.debts.cancel(request) {
                rest.into_iter().for_each(|loan| self.repay(now, loan));
                let reason = BorrowError::Short { wanted, lendable: 0 };
                self.outputs.push_back(Output::Refused { request, reason });
            }
        }
        if !told.is_empty() {
            self.outputs.push_back(Output::LoansLost { loans: told });
        }
    }

    // ---- time -----------------------------------------------------------------

    /// Whoever was not called for so long (stopped, starved, suspended) has
    /// heard nobody, and must not conclude that nobody spoke.
    fn forgive(&mut self, now: Duration) {
        let gap = now.saturating_sub(self.last);
        if gap > self.config.heartbeat * 2 && self.last > Duration::ZERO {
            self.membership.prolong(gap);
            self.rmanager.prolong(gap);
        }
        self.last = now;
    }

    fn maintain(&mut self, now: Duration) {
        if self.left {
            return;
        }
        for conn in self.membership.stale_links(now) {
            self.outputs.push_back(Output::Disconnect { conn });
            self.closed(now, conn, "silent");
        }
        let ended = self.rmanager.expire(now);
        if !ended.is_empty() {
            self.note_lapsed(&ended);
            for record in &ended {
                if let Some(conn) = self.membership.members().get(&record.debtor).map(|m| m.conn) {
                    self.send(conn, &Message::Lapsed { loan: record.loan, epoch: record.epoch });
                }
            }
            self.beat_soon();
        }
        for ask in self.debts.overdue(now) {
            self.refused(now, ask.creditor, ask.ticket);
        }
        if self.beat_next <= now {
            self.beat_last = now;
            self.beat_next = now + self.config.heartbeat;
            self.seq += 1;
            let row = self.row();
            self.for_members(|this, conn, instance| this.beat(conn, instance, &row));
        }
        if self.introduce_next <= now {
            self.introduce_next = now + self.config.introduce;
            self.for_members(Self::introduce);
        }
        for address in self.membership.dial(now) {
            self.outputs.push_back(Output::Connect { address });
        }
        let settled = self.draining && self.rmanager.lent() == 0 && self.debts.is_empty();
        if settled && !self.drained {
            self.drained = true;
            self.outputs.push_back(Output::Drained);
        }
    }

    fn for_members(&mut self, mut each: impl FnMut(&mut Self, u64, InstanceId)) {
        let members: Vec<_> = self.membership.members().iter().map(|(i, m)| (*i, m.conn)).collect();
        members.into_iter().for_each(|(instance, conn)| each(self, conn, instance));
    }

    /// A heartbeat as soon as the last one is not too fresh.
    fn beat_soon(&mut self) {
        self.beat_next = self.beat_next.min(self.beat_last + SOON);
    }

    fn beat(&mut self, conn: u64, to: InstanceId, row: &LedgerRow) {
        let renewals = self.debts.renewals(to);
        let mut rest = renewals.as_slice();
        loop {
            let (part, after) = rest.split_at(rest.len().min(MAX_RENEWALS));
            self.send(conn, &Message::Heartbeat { seq: self.seq, row: row.clone(), loans: part.to_vec() });
            rest = after;
            if rest.is_empty() {
                break;
            }
        }
    }

    fn row(&self) -> LedgerRow {
        let pool = self.rmanager.pool();
        let total = pool.as_ref().map_or(0, |pool| pool.blocks());
        let free = self.rmanager.free();
        LedgerRow {
            total,
            free,
            lent: self.rmanager.lent(),
            lend_cap: self.rmanager.lend_cap(),
            borrowed: self.debts.borrowed(),
            shape: pool.as_ref().map(|pool| *pool.shape()),
            shapeable_bytes: self.rmanager.shapeable_bytes(),
            tiers: vec![TierRow { tier: self.config.tier, total, free }],
            running: self.local.running,
            waiting: self.local.waiting,
            service: if self.draining { Service::Draining } else { Service::Serving },
        }
    }

    fn note_lapsed(&mut self, ended: &[std::sync::Arc<super::rmanager::LoanRecord>]) {
        self.stats.lapsed += ended.len() as u64;
        for record in ended {
            let (debtor, loan, blocks) = (record.debtor, record.loan, record.blocks.len() as u32);
            self.outputs.push_back(Output::Note(Note::Lapsed { debtor, loan, blocks }));
        }
    }

    fn send(&mut self, conn: u64, message: &Message) {
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        self.outputs.push_back(Output::Send { conn, bytes });
    }
}
