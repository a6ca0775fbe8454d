//! What a remote exchange costs, by stage.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use hdrhistogram::Histogram;

use super::wire::SlotHeader;

/// A stage of one layer's exchange with a creditor, as the debtor sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Copying the queries out and posting them.
    Post,
    /// From post until the creditor took the query up (between hosts, whose
    /// clocks differ: half of wire and return together).
    Wire,
    /// The creditor's MicroAttention.
    Attention,
    /// From the creditor's post until the debtor saw the partial.
    Return,
    /// What the debtor still waited once its own attention was done.
    Wait,
    /// Merging the partials.
    Merge,
}

impl Stage {
    /// All stages in the order they happen.
    pub const ALL: [Self; 6] = [Self::Post, Self::Wire, Self::Attention, Self::Return, Self::Wait, Self::Merge];

    /// As in metrics and tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Post => "post",
            Self::Wire => "wire",
            Self::Attention => "attention",
            Self::Return => "return",
            Self::Wait => "wait",
            Self::Merge => "merge",
        }
    }
}

/// Histograms of the stages, nanoseconds, and the count of answers refused.
/// The engine thread writes, anyone reads; the lock is taken by the writer a
/// few times a layer and is uncontended but for a scrape.
pub struct ExchangeStats {
    stages: Mutex<[Histogram<u64>; 6]>,
    rejected: AtomicU64,
}

impl Default for ExchangeStats {
    fn default() -> Self {
        let empty = || {
            let bounds = Histogram::new_with_bounds(1, 60_000_000_000, 3);
            bounds.expect("the bounds are constants that hdrhistogram accepts")
        };
        Self { stages: Mutex::new(std::array::from_fn(|_| empty())), rejected: AtomicU64::new(0) }
    }
}

impl ExchangeStats {
    /// Records one stage.
    pub fn record(&self, stage: Stage, ns: u64) {
        if let Ok(mut stages) = self.stages.lock() {
            stages[stage as usize].saturating_record(ns.max(1));
        }
    }

    /// Records what an arrived partial tells of its journey.
    pub fn round_trip(&self, posted_ns: u64, header: &SlotHeader, arrived_ns: u64, same_host: bool) {
        let attention = header.answered_ns.saturating_sub(header.taken_ns);
        let total = arrived_ns.saturating_sub(posted_ns);
        let travel = total.saturating_sub(attention);
        let wire = if same_host { header.taken_ns.saturating_sub(posted_ns).min(travel) } else { travel / 2 };
        self.record(Stage::Wire, wire);
        self.record(Stage::Attention, attention.min(total));
        self.record(Stage::Return, travel - wire);
    }

    /// Counts an answer that was late, foreign or malformed.
    pub fn reject(&self) {
        self.rejected.fetch_add(1, Ordering::Relaxed);
    }

    /// Answers refused so far.
    pub fn rejected(&self) -> u64 {
        self.rejected.load(Ordering::Relaxed)
    }

    /// A copy of the histograms, in [`Stage::ALL`]'s order.
    pub fn histograms(&self) -> Vec<(Stage, Histogram<u64>)> {
        let Ok(stages) = self.stages.lock() else { return Vec::new() };
        Stage::ALL.into_iter().zip(stages.iter().cloned()).collect()
    }
}
