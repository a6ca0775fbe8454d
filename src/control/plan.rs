//! The gManager's planning, as one pure function that every instance runs for
//! itself: from the ledger and its own requests, which rBlocks should move
//! where, and why (paper, v2: greedy pairing by a performance model; v1: debt
//! circles). A plan is advice: the creditor's reservation decides.
//!
//! It says these things, in this order, each on the state that the moves before
//! it leave behind:
//!
//! 1. *Debt circles* (A owes B owes … owes A): each member brings its own share
//!    home, if it has room.
//! 2. *Recall*: a creditor that leaves, or has become short itself, is relieved
//!    by its largest debtor: to a third, or home.
//! 3. *Greedy*: while this instance is starved (requests wait for memory, or
//!    those that run will have outgrown it within the horizon), its longest
//!    request is paired with the freest and nearest creditor, and as many
//!    rBlocks move as make the pair's summed throughput greatest.
//! 4. *Homecoming*: what lies with a creditor although there is room for it here
//!    comes home where both are faster so.
//!
//! What would be taken back by the next plan is not done: home only where this
//! instance is not starved afterwards, to a creditor only what leaves it twice
//! its low water, and nothing below the hysteresis.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use serde::{Deserialize, Serialize};

use super::ledger::Ledger;
use super::message::Service;
use super::perf::PerfModel;
use super::row::{Debt, LinkRow, Row};
use crate::kv::moves::Errand;
pub use crate::kv::moves::Held;
use crate::kv::rblock::{InstanceId, KvShape};

/// Most requests of the queue that a plan makes room for.
const QUEUE: usize = 256;
/// Creditors tried for one request before the plan ends.
const TRIES: usize = 4;
/// Stands for an instance that has not said how its steps take time.
const NOMINAL: PerfModel = PerfModel { fixed_ns: 1e7, row_ns: 1e5, key_ns: 100.0 };

/// What a plan may do.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// Most moves of one plan.
    pub max_moves: usize,
    /// An instance with less than this share of its blocks free is short.
    pub low_water: f64,
    /// Tokens that each running request will generate before the plan's moves
    /// are done: room for them is found before they come.
    pub horizon: u32,
    /// Relative gain of a pair's throughput for which as many blocks as this
    /// instance's whole pool may move; for fewer, in proportion.
    pub hysteresis: f64,
    /// Round trip to a peer to which none was measured, µs.
    pub rtt_us: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self { max_moves: 32, low_water: 0.05, horizon: 64, hysteresis: 0.1, rtt_us: 50 }
    }
}

/// This instance, as only it knows itself. Counts are rBlocks.
#[derive(Clone, Debug)]
pub struct Own {
    /// Who.
    pub instance: InstanceId,
    /// Shape of its KV.
    pub shape: KvShape,
    /// Its pool.
    pub total: u32,
    /// Of these nobody's, or kept only for prefix reuse.
    pub free: u32,
    /// Its running requests.
    pub requests: Vec<Held>,
    /// What each waiting request needs, first come first.
    pub queue: Vec<u32>,
    /// What creditors hold ready for it: lent, and not filled yet.
    pub reserved: BTreeMap<InstanceId, u32>,
    /// Who owes it how much.
    pub lent: Vec<Debt>,
    /// Its links as measured.
    pub links: Vec<LinkRow>,
    /// Who refused it of late: not asked.
    pub refused: BTreeSet<InstanceId>,
    /// How its steps take time.
    pub perf: Option<PerfModel>,
    /// What a plan may do.
    pub limits: Limits,
}

/// A place of KV.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    /// With the instance whose request it is.
    Home,
    /// With a creditor.
    At(InstanceId),
}

/// Why a move is planned.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// Debtor and creditor together generate more tokens a second.
    Throughput {
        /// Without the move, by the model.
        before: f64,
        /// With it.
        after: f64,
    },
    /// A owes B owes … owes A.
    DebtCircle {
        /// A, B, …; this instance first.
        circle: Vec<InstanceId>,
        /// What each owes the next at least, rBlocks.
        blocks: u32,
    },
    /// The creditor has become short of memory itself.
    CreditorShort {
        /// rBlocks it has free.
        free: u32,
        /// With fewer than this it is short.
        low_water: u32,
    },
    /// The creditor is about to leave.
    CreditorLeaves,
}

/// rBlocks of one request that should be elsewhere.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Move {
    /// Whose KV.
    pub request: u64,
    /// How many rBlocks, never 0.
    pub blocks: u32,
    /// Where they are.
    pub from: Place,
    /// Where they should be.
    pub to: Place,
    /// Why.
    pub why: Reason,
}

impl From<&Move> for Errand {
    fn from(planned: &Move) -> Self {
        let place = |place: Place| match place {
            Place::Home => None,
            Place::At(instance) => Some(instance),
        };
        let Move { request, blocks, from, to, .. } = planned;
        Self { request: *request, blocks: *blocks, from: place(*from), to: place(*to) }
    }
}

/// What this instance should move, by the ledger and its own state. The same
/// arguments give the same plan; once it is carried out, the next is empty.
pub fn plan(ledger: &Ledger, own: &Own) -> Vec<Move> {
    let mut planner = Planner::new(ledger, own);
    // Nobody is in a circle to whom nothing is owed.
    let mut graph = (!own.lent.is_empty()).then(|| Debts::new(ledger, own));
    // Each on what the others leave behind, until none has anything to add: a
    // move to a creditor can make the room in which another block comes home.
    loop {
        let before = planner.moves.len();
        if let Some(graph) = &mut graph {
            planner.circles(graph);
        }
        planner.recall();
        planner.greedy();
        planner.homecoming();
        if planner.moves.len() == before {
            return planner.moves;
        }
    }
}

/// A creditor as the plan so far leaves it.
struct Creditor {
    /// rBlocks it can lend and stay above twice its low water.
    spare: u32,
    free: u32,
    low_water: u32,
    /// Owed by this instance, and is this its largest debtor?
    mine: u32,
    largest: bool,
    leaves: bool,
    batch: f64,
    keys: f64,
    perf: PerfModel,
    rtt_ns: f64,
}

impl Creditor {
    fn new(row: &Row, own: &Own, mine: u32) -> Self {
        let low_water = water(row.total(), own.limits.low_water);
        let block = f64::from(own.shape.block_tokens);
        let rtt = own.links.iter().find(|link| link.peer == row.instance).map_or(own.limits.rtt_us, |l| l.rtt_us);
        // Nobody who owes lends on, least of all to whom it owes.
        let owes = row.borrowed > 0 || own.lent.iter().any(|debt| debt.debtor == row.instance && debt.blocks > 0);
        let suits = !own.refused.contains(&row.instance) && !owes && row.waiting == 0;
        // What it has lent to us and we have not filled is there for us still.
        let reserved = own.reserved.get(&row.instance).copied().unwrap_or(0);
        let lendable = if suits { row.lendable(&own.shape).saturating_add(reserved) } else { 0 };
        // What a lender without a model could cut is not free yet, nor short.
        let cut = row.shape.as_ref() == Some(&own.shape);
        let free = if cut { row.free().saturating_add(reserved) } else { lendable };
        let owed = row.owed_by(own.instance);
        Self {
            spare: lendable.min(free.saturating_sub(low_water * 2)),
            free,
            low_water: if cut { low_water } else { 0 },
            mine,
            largest: row.debts.iter().map(|d| (d.blocks, d.debtor)).max() == Some((owed, own.instance)),
            leaves: row.service == Service::Draining,
            batch: f64::from(row.running),
            keys: f64::from(row.total().saturating_sub(row.free())) * block,
            perf: row.perf.unwrap_or(own.perf.unwrap_or(NOMINAL)),
            rtt_ns: f64::from(rtt) * 1e3,
        }
    }

    fn throughput(&self, more_keys: f64) -> f64 {
        self.batch / self.perf.step_ns(self.batch, self.keys + more_keys) * 1e9
    }
}

/// Blocks below which an instance of `total` blocks is short.
fn water(total: u32, share: f64) -> u32 {
    (f64::from(total) * share).ceil() as u32
}

struct Planner<'a> {
    own: &'a Own,
    free: u32,
    /// Own requests that a move may concern: the longest, and those that owe.
    requests: BTreeMap<u64, Held>,
    creditors: BTreeMap<InstanceId, Creditor>,
    /// Keys here, and with creditors, over all running requests.
    keys_here: f64,
    keys_away: f64,
    /// rBlocks that running requests fill within the horizon.
    growth: u32,
    perf: PerfModel,
    moves: Vec<Move>,
}

impl<'a> Planner<'a> {
    fn new(ledger: &Ledger, own: &'a Own) -> Self {
        let block = f64::from(own.shape.block_tokens);
        let away: u64 = own.requests.iter().flat_map(|r| r.remote.values()).map(|b| u64::from(*b)).sum();
        let tokens: u64 = own.requests.iter().map(|r| u64::from(r.tokens)).sum();
        let keys_away = away as f64 * block;
        let growth =
            own.requests.len() as u64 * u64::from(own.limits.horizon) / u64::from(own.shape.block_tokens.max(1));
        // As many of the longest as there can be moves, and whoever owes.
        let mut longest: Vec<&Held> = own.requests.iter().filter(|r| r.local > 0).collect();
        let most = own.limits.max_moves + 1;
        if longest.len() > most {
            longest.select_nth_unstable_by_key(most, |r| (std::cmp::Reverse(r.local), r.request));
            longest.truncate(most);
        }
        let owing = own.requests.iter().filter(|r| !r.remote.is_empty());
        let mut mine: BTreeMap<InstanceId, u32> = BTreeMap::new();
        for (creditor, blocks) in own.requests.iter().flat_map(|r| &r.remote) {
            *mine.entry(*creditor).or_default() += blocks;
        }
        let creditors = ledger.rows().filter(|row| row.instance != own.instance);
        let creditor = |row: &Row| Creditor::new(row, own, mine.get(&row.instance).copied().unwrap_or(0));
        Self {
            own,
            free: own.free,
            requests: longest.into_iter().chain(owing).map(|r| (r.request, r.clone())).collect(),
            creditors: creditors.map(|row| (row.instance, creditor(row))).collect(),
            keys_here: (tokens as f64 - keys_away).max(0.0),
            keys_away,
            growth: u32::try_from(growth).unwrap_or(u32::MAX),
            perf: own.perf.unwrap_or(NOMINAL),
            moves: Vec::new(),
        }
    }

    // ---- what this instance can run --------------------------------------------

    /// Requests that run once `free` blocks are free: those that run now, less
    /// those that outgrow the memory, plus those of the queue that fit (of the
    /// first that does not, the part that does: its room may come from several
    /// moves); and how many blocks the latter fill.
    fn batch_with(&self, free: u32) -> (f64, f64) {
        let running = self.own.requests.len() as f64;
        if free < self.growth {
            // Whoever is preempted gives up an average request's blocks.
            let held = f64::from(self.own.total.saturating_sub(self.own.free).max(1));
            let each = (held / running.max(1.0)).max(1.0);
            let preempted = f64::from(self.growth - free) / each;
            return ((running - preempted).max(0.0), 0.0);
        }
        let mut room = free - self.growth;
        let mut fits = 0.0;
        for need in self.own.queue.iter().take(QUEUE) {
            if *need > room {
                fits += f64::from(room) / f64::from(*need);
                room = 0;
                break;
            }
            fits += 1.0;
            room -= need;
        }
        (running + fits, f64::from(free - self.growth - room))
    }

    /// Blocks that would have to be free for everything that runs or waits.
    fn wanted(&self) -> u32 {
        let queue = self.own.queue.iter().take(QUEUE).fold(0u32, |sum, need| sum.saturating_add(*need));
        self.growth.saturating_add(queue)
    }

    /// Blocks that can come home without starving this instance.
    fn room(&self) -> u32 {
        let kept = self.wanted().saturating_add(water(self.own.total, self.own.limits.low_water));
        self.free.saturating_sub(kept)
    }

    /// Tokens a second of this instance if `blocks` more of its blocks lie with
    /// `creditor` (fewer, where negative). Local attention and the exchange go on at the same time.
    fn throughput(&self, creditor: &Creditor, blocks: i64) -> f64 {
        let moved = blocks as f64 * f64::from(self.own.shape.block_tokens);
        let free = (i64::from(self.free) + blocks).clamp(0, i64::from(u32::MAX)) as u32;
        let (batch, filled) = self.batch_with(free);
        let here = self.keys_here - moved + filled * f64::from(self.own.shape.block_tokens);
        let away = self.keys_away + moved;
        let exchange = if away > 0.0 { f64::from(self.own.shape.layers) * creditor.rtt_ns } else { 0.0 };
        let local = f64::from(self.perf.key_ns) * here.max(0.0);
        let remote = f64::from(creditor.perf.key_ns) * away + exchange;
        batch / (self.perf.step_ns(batch, 0.0) + local.max(remote)) * 1e9
    }

    // ---- the four decisions ------------------------------------------------------

    fn circles(&mut self, graph: &mut Debts) {
        if self.keys_away == 0.0 {
            return;
        }
        while self.moves.len() < self.own.limits.max_moves && self.room() > 0 {
            let Some((circle, blocks)) = graph.circle(self.own.instance) else { return };
            let creditor = circle[1];
            // Each circle is looked at once, whether or not all of it can come.
            graph.cancel(&circle, blocks);
            let why = Reason::DebtCircle { circle, blocks };
            let room = self.room();
            self.bring_home(creditor, blocks.min(room), &why);
        }
    }

    fn recall(&mut self) {
        let creditors: Vec<_> = self.creditors.iter().filter(|(_, c)| c.mine > 0).map(|(i, _)| *i).collect();
        for instance in creditors {
            let c = &self.creditors[&instance];
            let (mut blocks, why) = if c.leaves {
                (c.mine, Reason::CreditorLeaves)
            } else if c.largest && c.free < c.low_water {
                let why = Reason::CreditorShort { free: c.free, low_water: c.low_water };
                (c.mine.min(c.low_water * 2 - c.free), why)
            } else {
                continue;
            };
            while blocks > 0 && self.moves.len() < self.own.limits.max_moves {
                let third = self.best(|id, c| id != instance && c.spare > 0).first().copied();
                let moved = match third {
                    Some(third) => {
                        let most = blocks.min(self.creditors[&third].spare);
                        self.rehome(instance, third, most, &why)
                    }
                    None => {
                        let most = blocks.min(self.room());
                        self.bring_home(instance, most, &why)
                    }
                };
                if moved == 0 {
                    break;
                }
                blocks -= moved;
            }
        }
    }

    fn greedy(&mut self) {
        while self.moves.len() < self.own.limits.max_moves && self.free < self.wanted() {
            let Some((request, local)) =
                self.requests.values().map(|r| (r.request, r.local)).max_by_key(|(r, l)| (*l, std::cmp::Reverse(*r)))
            else {
                return;
            };
            let creditors = self.best(|_, c| c.spare > 0 && !c.leaves);
            let pairs = creditors.into_iter().take(TRIES);
            let found = pairs.filter_map(|creditor| Some((creditor, self.best_count(creditor, local)?))).next();
            let Some((creditor, (blocks, before, after))) = found else { return };
            let why = Reason::Throughput { before, after };
            self.lend_out(request, creditor, blocks, why);
        }
    }

    /// Brings home what lies with a creditor although there is room for it here
    /// and both would be faster so: a query that need not travel.
    fn homecoming(&mut self) {
        if self.own.perf.is_none() || self.keys_away <= 0.0 {
            return;
        }
        let low_water = water(self.own.total, self.own.limits.low_water);
        let creditors: Vec<_> = self.creditors.iter().filter(|(_, c)| c.mine > 0).map(|(i, _)| *i).collect();
        for instance in creditors {
            let c = &self.creditors[&instance];
            let blocks = c.mine.min(self.room().saturating_sub(low_water));
            let keys = f64::from(blocks) * f64::from(self.own.shape.block_tokens);
            let before = self.throughput(c, 0) + c.throughput(0.0);
            let after = self.throughput(c, -i64::from(blocks)) + c.throughput(-keys);
            let worth = self.own.limits.hysteresis * f64::from(blocks) / f64::from(self.own.total.max(1));
            if after > before * (1.0 + worth) {
                self.bring_home(instance, blocks, &Reason::Throughput { before, after });
            }
        }
    }

    /// The count of blocks that makes the pair's summed throughput greatest,
    /// and that throughput before and after. `None`: not worth a move.
    fn best_count(&self, creditor: InstanceId, local: u32) -> Option<(u32, f64, f64)> {
        let c = &self.creditors[&creditor];
        let most = local.min(c.spare);
        let pair = |blocks: u32| {
            let keys = f64::from(blocks) * f64::from(self.own.shape.block_tokens);
            self.throughput(c, i64::from(blocks)) + c.throughput(keys)
        };
        // The batch changes where another request fits; in between, fewer
        // blocks are better or an even share of the keys is: halves find it.
        let mut counts: BTreeSet<u32> = (0..8).map(|half| most >> half).collect();
        let mut need = self.growth;
        counts.insert(need.saturating_sub(self.free));
        for queued in self.own.queue.iter().take(QUEUE) {
            need = need.saturating_add(*queued);
            counts.insert(need.saturating_sub(self.free));
        }
        let before = pair(0);
        let mut best: Option<(u32, f64)> = None;
        for blocks in counts.into_iter().filter(|n| (1..=most).contains(n)) {
            let after = pair(blocks);
            if best.is_none_or(|(_, greatest)| after > greatest) {
                best = Some((blocks, after));
            }
        }
        let (blocks, after) = best?;
        let worth = self.own.limits.hysteresis * f64::from(blocks) / f64::from(self.own.total.max(1));
        (after > before * (1.0 + worth)).then_some((blocks, before, after))
    }

    /// Creditors that suit, the freest and nearest first.
    fn best(&self, suits: impl Fn(InstanceId, &Creditor) -> bool) -> Vec<InstanceId> {
        let usual = f64::from(self.own.limits.rtt_us.max(1)) * 1e3;
        let score = |c: &Creditor| f64::from(c.spare) / (1.0 + c.rtt_ns / usual);
        let found = self.creditors.iter().filter(|(i, c)| suits(**i, c));
        let mut found: Vec<_> = found.map(|(i, c)| (score(c), *i)).collect();
        let order = |a: &(f64, InstanceId), b: &(f64, InstanceId)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
        if found.len() > TRIES {
            found.select_nth_unstable_by(TRIES, order);
            found.truncate(TRIES);
        }
        found.sort_by(order);
        found.into_iter().map(|(_, instance)| instance).collect()
    }

    // ---- moves, and the state they leave -----------------------------------------

    fn lend_out(&mut self, request: u64, creditor: InstanceId, blocks: u32, why: Reason) {
        let (Some(held), Some(c)) = (self.requests.get_mut(&request), self.creditors.get_mut(&creditor)) else {
            return;
        };
        held.local -= blocks;
        *held.remote.entry(creditor).or_default() += blocks;
        self.free = self.free.saturating_add(blocks);
        take(c, blocks, self.own);
        self.shift_keys(blocks, 1.0);
        self.moves.push(Move { request, blocks, from: Place::Home, to: Place::At(creditor), why });
    }

    /// Brings up to `most` blocks home from `creditor`; how many.
    fn bring_home(&mut self, creditor: InstanceId, most: u32, why: &Reason) -> u32 {
        let mut moved = 0;
        for (request, blocks) in self.owed(creditor, most) {
            if let Some(held) = self.requests.get_mut(&request) {
                held.local += blocks;
            }
            self.free -= blocks;
            self.shift_keys(blocks, -1.0);
            self.give_back(request, creditor, blocks);
            let (from, to) = (Place::At(creditor), Place::Home);
            self.moves.push(Move { request, blocks, from, to, why: why.clone() });
            moved += blocks;
        }
        moved
    }

    /// Moves up to `most` blocks from one creditor to another; how many.
    fn rehome(&mut self, from: InstanceId, to: InstanceId, most: u32, why: &Reason) -> u32 {
        let mut moved = 0;
        for (request, blocks) in self.owed(from, most) {
            if let Some(held) = self.requests.get_mut(&request) {
                *held.remote.entry(to).or_default() += blocks;
            }
            if let Some(c) = self.creditors.get_mut(&to) {
                take(c, blocks, self.own);
            }
            self.give_back(request, from, blocks);
            let (from, to) = (Place::At(from), Place::At(to));
            self.moves.push(Move { request, blocks, from, to, why: why.clone() });
            moved += blocks;
        }
        moved
    }

    /// Whose blocks at `creditor` go, `most` in all: those of whom least is
    /// there, so that as few requests as can be stay in its debt.
    fn owed(&self, creditor: InstanceId, most: u32) -> Vec<(u64, u32)> {
        let of = |r: &Held| Some((*r.remote.get(&creditor)?, r.request));
        let mut owing: Vec<_> = self.requests.values().filter_map(of).collect();
        owing.sort_unstable();
        let mut left = most;
        let room = self.own.limits.max_moves - self.moves.len();
        let mut chosen = Vec::new();
        for (blocks, request) in owing.into_iter().take(room) {
            let blocks = blocks.min(left);
            if blocks > 0 {
                chosen.push((request, blocks));
            }
            left -= blocks;
        }
        chosen
    }

    fn give_back(&mut self, request: u64, creditor: InstanceId, blocks: u32) {
        if let Some(held) = self.requests.get_mut(&request) {
            match held.remote.get_mut(&creditor) {
                Some(left) if *left > blocks => *left -= blocks,
                _ => drop(held.remote.remove(&creditor)),
            }
        }
        if let Some(c) = self.creditors.get_mut(&creditor) {
            // Not counted as spare: what was just given back is not taken again.
            c.free += blocks;
            c.mine -= blocks.min(c.mine);
            c.keys -= f64::from(blocks) * f64::from(self.own.shape.block_tokens);
        }
    }

    fn shift_keys(&mut self, blocks: u32, away: f64) {
        let keys = f64::from(blocks) * f64::from(self.own.shape.block_tokens) * away;
        self.keys_here -= keys;
        self.keys_away += keys;
    }
}

fn take(c: &mut Creditor, blocks: u32, own: &Own) {
    c.spare -= blocks.min(c.spare);
    c.free -= blocks.min(c.free);
    c.mine += blocks;
    c.keys += f64::from(blocks) * f64::from(own.shape.block_tokens);
}

/// Who owes whom: the debt graph.
struct Debts {
    names: Vec<InstanceId>,
    /// Of each debtor: creditor and rBlocks, by creditor.
    owes: Vec<Vec<(usize, u32)>>,
}

impl Debts {
    fn new(ledger: &Ledger, own: &Own) -> Self {
        let mut names: Vec<_> = ledger.rows().map(|row| row.instance).collect();
        if let Err(at) = names.binary_search(&own.instance) {
            names.insert(at, own.instance);
        }
        let mut owes = vec![Vec::new(); names.len()];
        let me = names.binary_search(&own.instance).unwrap_or(0);
        for (creditor, name) in names.iter().enumerate() {
            // Its own debtors, and its own debts, this instance knows best.
            let debts = if creditor == me { Some(&own.lent) } else { ledger.get(*name).map(|row| &row.debts) };
            for debt in debts.into_iter().flatten() {
                if let Ok(debtor) = names.binary_search(&debt.debtor)
                    && debtor != me
                    && debt.blocks > 0
                {
                    owes[debtor].push((creditor, debt.blocks));
                }
            }
        }
        let mut mine: BTreeMap<usize, u32> = BTreeMap::new();
        for (creditor, blocks) in own.requests.iter().flat_map(|r| &r.remote) {
            if let Ok(creditor) = names.binary_search(creditor) {
                *mine.entry(creditor).or_default() += blocks;
            }
        }
        owes[me] = mine.into_iter().collect();
        Self { names, owes }
    }

    /// The shortest circle through `me` (of the shortest, the first by name),
    /// beginning with it, and what each owes the next at least.
    fn circle(&self, me: InstanceId) -> Option<(Vec<InstanceId>, u32)> {
        let start = self.names.binary_search(&me).ok()?;
        let mut from = vec![None; self.names.len()];
        let mut queue = VecDeque::from([start]);
        while let Some(debtor) = queue.pop_front() {
            for &(creditor, _) in self.owes[debtor].iter().filter(|(_, blocks)| *blocks > 0) {
                if creditor == start {
                    return Some(self.path(&from, start, debtor));
                }
                if from[creditor].is_none() {
                    from[creditor] = Some(debtor);
                    queue.push_back(creditor);
                }
            }
        }
        None
    }

    fn path(&self, from: &[Option<usize>], start: usize, last: usize) -> (Vec<InstanceId>, u32) {
        let mut path = vec![last];
        while let Some(before) = path.last().filter(|at| **at != start).and_then(|at| from[*at]) {
            path.push(before);
        }
        path.reverse();
        let next = path.iter().skip(1).chain([&start]);
        let least = path.iter().zip(next).map(|(debtor, creditor)| self.owed(*debtor, *creditor)).min();
        (path.into_iter().map(|at| self.names[at]).collect(), least.unwrap_or(0))
    }

    fn owed(&self, debtor: usize, creditor: usize) -> u32 {
        self.owes[debtor].iter().find(|(c, _)| *c == creditor).map_or(0, |(_, blocks)| *blocks)
    }

    /// Takes `blocks` off every debt of the circle.
    fn cancel(&mut self, circle: &[InstanceId], blocks: u32) {
        let at: Vec<_> = circle.iter().filter_map(|name| self.names.binary_search(name).ok()).collect();
        for (debtor, creditor) in at.iter().zip(at.iter().cycle().skip(1)) {
            if let Some(debt) = self.owes[*debtor].iter_mut().find(|(c, _)| c == creditor) {
                debt.1 -= blocks.min(debt.1);
            }
        }
    }
}
