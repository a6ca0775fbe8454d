//! One instance's line in the global debt ledger: everything that others need
//! to know to borrow from it, to plan around it, and to send requests to it.
//!
//! A row is a full state, never a difference: whoever holds the newest needs no
//! older one, and taking a row in twice changes nothing. Of two rows of one
//! instance the greater ([`Stamp`]) is newer.

use serde::{Deserialize, Serialize};

use super::message::{Role, Service};
use super::perf::PerfModel;
use crate::kv::rblock::{InstanceId, KvShape};

/// Most tiers in a row.
pub const MAX_TIERS: usize = 4;
/// Most debtors named in a row. Where more owe, the largest are named, and
/// [`TierRow::lent`] still counts all.
pub const MAX_DEBTORS: usize = 32;
/// Most peers in a row to which the link was measured: the most used ones.
pub const MAX_LINKS: usize = 16;
/// Most addresses of one endpoint.
pub const MAX_ADDRESSES: usize = 8;
/// Longest address, bytes.
pub const MAX_ADDRESS: usize = 256;

/// Kinds of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Tier {
    /// The device's own.
    Device,
    /// The host's.
    Host,
}

/// rBlocks of one tier. Counts are rBlocks of the instance's shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TierRow {
    /// Which.
    pub tier: Tier,
    /// In all.
    pub total: u32,
    /// Nobody's, or kept only for prefix reuse.
    pub free: u32,
    /// Lent to debtors.
    pub lent: u32,
    /// Most that may be lent.
    pub lend_cap: u32,
}

/// What one debtor owes the row's instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Debt {
    /// Who.
    pub debtor: InstanceId,
    /// rBlocks, of all its loans.
    pub blocks: u32,
}

/// A link as the row's instance measured it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkRow {
    /// To whom.
    pub peer: InstanceId,
    /// Round trip of a small message, microseconds, smoothed.
    pub rtt_us: u32,
    /// Bandwidth of bulk writes, MB/s; 0 where none was measured yet.
    pub mb_s: u32,
}

/// What does not change while the instance lives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Profile {
    /// What it does.
    pub role: Role,
    /// Fingerprint of its model, if it runs one.
    pub model: Option<[u8; 32]>,
    /// Names the host: equal for instances that can share memory.
    pub host: u64,
    /// Rank under a launcher, else 0.
    pub rank: u32,
    /// Where its control plane is reached, best first.
    pub control: Vec<String>,
    /// Where its creditor is reached, best first.
    pub creditor: Vec<String>,
    /// `host:port` of its HTTP server; empty without one.
    pub http: String,
    /// `ip:port` at which other instances hand it requests; `None` where it
    /// takes none in, or where they cannot reach its HTTP server.
    pub peers: Option<String>,
}

/// How new a row is. Compared first by incarnation, then by version.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Stamp {
    /// Raised by a member that was taken for dead and was not.
    pub incarnation: u32,
    /// Raised with every change.
    pub version: u32,
}

/// An instance's row.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// Whose.
    pub instance: InstanceId,
    /// How new.
    pub stamp: Stamp,
    /// What does not change.
    pub profile: Profile,
    /// Takes new work?
    pub service: Service,
    /// Shape of the pool as it is cut now.
    pub shape: Option<KvShape>,
    /// Bytes that can still be cut to any shape and lent (a lender without a
    /// model of which nothing is lent), else 0.
    pub shapeable_bytes: u64,
    /// Its memory.
    pub tiers: Vec<TierRow>,
    /// Who owes it how much, greatest first.
    pub debts: Vec<Debt>,
    /// rBlocks it borrowed itself.
    pub borrowed: u32,
    /// Requests in the batch.
    pub running: u32,
    /// Requests in the queue.
    pub waiting: u32,
    /// rBlocks that its first waiting request needs of others, being too long
    /// for it alone; else 0.
    pub wanted: u32,
    /// Tokens generated a second, smoothed.
    pub tokens_s: u32,
    /// How its steps take time, as fitted; `None` before it has run enough.
    pub perf: Option<PerfModel>,
    /// Links to the peers it exchanges most with.
    pub links: Vec<LinkRow>,
}

impl Row {
    /// Bytes of the row in a datagram.
    pub fn encoded_len(&self) -> usize {
        super::codec::row_len(self)
    }

    /// rBlocks of all tiers.
    pub fn total(&self) -> u32 {
        self.tiers.iter().map(|t| t.total).sum()
    }

    /// Free rBlocks of all tiers.
    pub fn free(&self) -> u32 {
        self.tiers.iter().map(|t| t.free).sum()
    }

    /// Lent rBlocks of all tiers.
    pub fn lent(&self) -> u32 {
        self.tiers.iter().map(|t| t.lent).sum()
    }

    /// Most rBlocks that may be lent.
    pub fn lend_cap(&self) -> u32 {
        self.tiers.iter().map(|t| t.lend_cap).sum()
    }

    /// rBlocks of `shape` that a debtor may hope to borrow.
    pub fn lendable(&self, shape: &KvShape) -> u32 {
        if self.service == Service::Draining {
            0
        } else if self.shape.as_ref() == Some(shape) {
            self.tiers.iter().map(|t| t.free.min(t.lend_cap.saturating_sub(t.lent))).sum()
        } else {
            let block = shape.block_bytes() as u64;
            u32::try_from(self.shapeable_bytes.checked_div(block).unwrap_or(0)).unwrap_or(u32::MAX)
        }
    }

    /// What `debtor` owes it.
    pub fn owed_by(&self, debtor: InstanceId) -> u32 {
        self.debts.iter().find(|d| d.debtor == debtor).map_or(0, |d| d.blocks)
    }
}
