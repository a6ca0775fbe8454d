//! How the ledger's rows travel: news is pushed to a few peers, and what was
//! missed is found by comparing digests.
//!
//! A round: rows that are *hot* (new here) are sent to [`PUSH_PEERS`] random
//! members, each row in [`PUSH_ROUNDS`] rounds; and one page of the digest, the
//! stamps of a range of instances, goes to one random member, who answers with
//! what it has newer and with the stamps of what it lacks. Pushing reaches most
//! within O(log N) rounds; the digests reach the rest, and whoever was cut off.

use std::collections::BTreeMap;
use std::time::Duration;

use core::net::SocketAddr;

use rand::Rng;

use super::ledger::Ledger;
use super::message::{Digest, Packet};
use super::row::{Row, Stamp};
use super::swim::Member;
use crate::kv::rblock::InstanceId;

/// Time between rounds.
pub const ROUND: Duration = Duration::from_millis(100);
/// Members that a hot row is sent to in a round.
const PUSH_PEERS: usize = 2;
/// Rounds in which a row is hot.
const PUSH_ROUNDS: u8 = 2;
/// Most stamps of one digest page: they fit into one datagram.
pub const MAX_STAMPS: usize = 64;
/// Bytes of rows put into one datagram.
pub const MAX_ROW_BYTES: usize = 1180;
/// Most datagrams of hot rows a round and peer.
const MAX_PUSH: usize = 4;

/// The rows, and what is to be done to spread them.
#[derive(Default)]
pub struct Gossip {
    ledger: Ledger,
    /// Rounds that each is still hot for, and when it became so.
    hot: BTreeMap<InstanceId, (u8, u64)>,
    /// Rows learned so far.
    learned: u64,
    /// The instance with which the next digest page begins; 0: the first.
    page: u64,
    next: Duration,
}

impl Gossip {
    /// The rows known.
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// As [`ledger`](Self::ledger), for corrections.
    pub fn ledger_mut(&mut self) -> &mut Ledger {
        &mut self.ledger
    }

    /// When the next round is due.
    pub fn deadline(&self) -> Duration {
        self.next
    }

    /// Takes a row in, one's own or one that came. True: it is news.
    pub fn learn(&mut self, row: Row) -> bool {
        let instance = row.instance;
        let news = self.ledger.merge(row);
        if news {
            self.learned += 1;
            self.hot.insert(instance, (PUSH_ROUNDS, self.learned));
        }
        news
    }

    /// Forgets an instance that is gone.
    pub fn forget(&mut self, instance: InstanceId) {
        self.ledger.remove(instance);
        self.hot.remove(&instance);
    }

    /// A round, if one is due: what to send to whom.
    pub fn round<R: Rng>(
        &mut self,
        now: Duration,
        up: &BTreeMap<InstanceId, Member>,
        rng: &mut R,
        send: &mut impl FnMut(SocketAddr, Packet),
    ) {
        if now < self.next {
            return;
        }
        self.next = now + ROUND;
        if up.is_empty() {
            return;
        }
        // The newest first: where a round has no room for all, as when a whole
        // cluster starts, what is older has most likely arrived by other ways.
        let mut order: Vec<InstanceId> = self.hot.keys().copied().collect();
        order.sort_by_key(|instance| std::cmp::Reverse(self.hot.get(instance).map(|(_, learned)| *learned)));
        let hot: Vec<&Row> = order.iter().filter_map(|instance| self.ledger.get(*instance)).collect();
        let batches = batches(hot, MAX_PUSH);
        let pushed: usize = batches.iter().map(Vec::len).sum();
        for _ in 0..PUSH_PEERS.min(up.len()) {
            let peer = choose(up, rng);
            for rows in &batches {
                send(peer.address, Packet::Rows(rows.clone()));
            }
        }
        // Those that found no room stay as hot as they were.
        for instance in &order[..pushed.min(order.len())] {
            match self.hot.get_mut(instance) {
                Some((rounds, _)) if *rounds > 1 => *rounds -= 1,
                _ => drop(self.hot.remove(instance)),
            }
        }
        let (digest, next) = self.page(InstanceId(self.page), None);
        self.page = next.map_or(0, |instance| instance.0);
        send(choose(up, rng).address, Packet::Digest(digest));
    }

    /// Answers a digest page: the rows that are newer here, and, where the page
    /// has something newer, a page of this side's stamps (once: the answer to
    /// an answer is only rows).
    pub fn compare(&self, digest: &Digest, reply: &mut impl FnMut(Packet)) {
        let theirs: BTreeMap<InstanceId, Stamp> = digest.stamps.iter().copied().collect();
        let mine = || self.ledger.range(digest.from, digest.until);
        let newer: Vec<&Row> =
            mine().filter(|row| theirs.get(&row.instance).is_none_or(|stamp| *stamp < row.stamp)).collect();
        for rows in batches(newer, usize::MAX) {
            reply(Packet::Rows(rows));
        }
        let known: BTreeMap<InstanceId, Stamp> = mine().map(|row| (row.instance, row.stamp)).collect();
        let lacking = theirs.iter().any(|(instance, stamp)| known.get(instance).is_none_or(|mine| mine < stamp));
        if lacking && !digest.answer {
            let (mut page, _) = self.page(digest.from, digest.until);
            page.answer = true;
            reply(Packet::Digest(page));
        }
    }

    /// Stamps from `from` on, before `until`, as many as a page holds; and where
    /// the next page begins, if there is more.
    fn page(&self, from: InstanceId, until: Option<InstanceId>) -> (Digest, Option<InstanceId>) {
        let mut rows = self.ledger.range(from, until);
        let stamps: Vec<_> = rows.by_ref().take(MAX_STAMPS).map(|row| (row.instance, row.stamp)).collect();
        let next = rows.next().map(|row| row.instance);
        (Digest { from, until: next.or(until), stamps, answer: false }, next)
    }
}

/// Rows in groups that fit into one datagram each; at most `most` groups.
fn batches(rows: Vec<&Row>, most: usize) -> Vec<Vec<Row>> {
    let mut groups: Vec<Vec<Row>> = Vec::new();
    let mut room = 0;
    for row in rows {
        let bytes = row.encoded_len();
        if bytes > room || groups.is_empty() {
            if groups.len() == most {
                break;
            }
            groups.push(Vec::new());
            room = MAX_ROW_BYTES;
        }
        room = room.saturating_sub(bytes);
        if let Some(group) = groups.last_mut() {
            group.push(row.clone());
        }
    }
    groups
}

fn choose<'a, R: Rng>(up: &'a BTreeMap<InstanceId, Member>, rng: &mut R) -> &'a Member {
    let n = rng.random_range(0..up.len());
    up.values().nth(n).expect("below the length")
}

/// Time between two versions of one's own row in a cluster of `members`: the
/// more there are, the rarer each speaks, so that what a node takes in and
/// passes on stays within some tens of kilobytes a second, and within what the
/// rounds have room for.
pub fn pace(members: usize) -> Duration {
    Duration::from_millis(15 * members as u64).clamp(Duration::from_millis(100), Duration::from_secs(15))
}
