//! The controller as gManager: plans for its own instance, and remembers what
//! it decided and why.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use super::controller::Controller;
use super::event::Output;
use super::message::Service;
use super::plan::{Held, Limits, Move, Own, Reason, plan};
use super::view::DecisionEntry;
use crate::kv::rblock::InstanceId;

/// How long a refusal speaks against planning with its creditor again.
const REFUSED: Duration = Duration::from_secs(2);
/// Decisions remembered, for people.
const REMEMBERED: usize = 64;

/// What was planned of late.
#[derive(Default)]
pub(super) struct Planning {
    refused: BTreeMap<InstanceId, Duration>,
    /// The plan that is being carried out.
    current: Vec<Move>,
    decisions: VecDeque<(Duration, Move)>,
}

impl Planning {
    pub(super) fn refused(&mut self, now: Duration, creditor: InstanceId) {
        self.refused.insert(creditor, now + REFUSED);
    }

    /// Decisions of late, the last one first.
    pub(super) fn view(&self, now: Duration) -> Vec<DecisionEntry> {
        let entry =
            |(at, planned): &(Duration, Move)| DecisionEntry::new(now.saturating_sub(*at).as_millis() as u64, planned);
        self.decisions.iter().rev().map(entry).collect()
    }
}

/// Would `a` and `b` move the same request's KV the same way, for a like reason?
fn alike(a: &Move, b: &Move) -> bool {
    let kind = std::mem::discriminant::<Reason>;
    a.request == b.request && a.from == b.from && a.to == b.to && kind(&a.why) == kind(&b.why)
}

impl Controller {
    pub(super) fn plan(&mut self, now: Duration, requests: Vec<Held>, queue: Vec<u32>) {
        let Some(shape) = self.config.shape else { return };
        self.planning.refused.retain(|_, until| *until > now);
        let mut reserved = self.debts.by_creditor();
        for (creditor, placed) in requests.iter().flat_map(|held| &held.remote) {
            if let Some(blocks) = reserved.get_mut(creditor) {
                *blocks = blocks.saturating_sub(*placed);
            }
        }
        let own = Own {
            reserved,
            instance: self.config.instance,
            shape,
            total: self.rmanager.pool().map_or(0, |pool| pool.blocks()),
            free: self.rmanager.free(),
            requests,
            queue,
            lent: self.rmanager.debts(),
            links: self.links.rows().collect(),
            refused: self.planning.refused.keys().copied().collect::<BTreeSet<_>>(),
            perf: self.local.perf,
            limits: Limits::default(),
        };
        let moves = plan(self.gossip.ledger(), &own);
        for new in moves.iter().filter(|new| !self.planning.current.iter().any(|old| alike(old, new))) {
            match new.why {
                Reason::Throughput { .. } => self.stats.planned_throughput += 1,
                Reason::DebtCircle { .. } => self.stats.planned_circles += 1,
                Reason::CreditorShort { .. } => self.stats.planned_short += 1,
                Reason::CreditorLeaves => self.stats.planned_leaves += 1,
            }
            self.planning.decisions.push_back((now, new.clone()));
            if self.planning.decisions.len() > REMEMBERED {
                self.planning.decisions.pop_front();
            }
        }
        let leaves = |creditor: &InstanceId| {
            self.gossip.ledger().get(*creditor).is_some_and(|row| row.service == Service::Draining)
        };
        let leaving: Vec<_> = self.debts.creditors().filter(leaves).collect();
        self.outputs.extend(leaving.into_iter().map(|creditor| Output::CreditorLeaves { creditor }));
        // Said again while it is not done: a move may have been given up.
        if !moves.is_empty() || !self.planning.current.is_empty() {
            self.planning.current.clone_from(&moves);
            self.outputs.push_back(Output::Moves(moves));
        }
    }
}
