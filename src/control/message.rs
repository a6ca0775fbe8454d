//! What control planes say to each other. The bytes are in `codec.rs`; every
//! list has a limit that holds on both sides.

use serde::{Deserialize, Serialize};

use crate::kv::rblock::{BlockIndex, InstanceId, KvShape, LoanId};

pub use super::codec::DecodeError;

/// Version of the wire format; a peer of another is refused.
pub const VERSION: u8 = 1;
/// Most addresses of one endpoint.
pub const MAX_ADDRESSES: usize = 8;
/// Longest address, bytes.
pub const MAX_ADDRESS: usize = 256;
/// Most tiers in a row.
pub const MAX_TIERS: usize = 4;
/// Most loans renewed by one heartbeat; more go in further heartbeats.
pub const MAX_RENEWALS: usize = 1024;
/// Most block ranges of one grant; what is more scattered is refused.
pub const MAX_RANGES: usize = 32 * 1024;
/// Most peers introduced at once.
pub const MAX_PEERS: usize = 256;

/// What a member does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Runs a model.
    Engine,
    /// Lends memory only.
    Lender,
}

/// Whether a member takes new work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Service {
    /// Yes.
    Serving,
    /// It is about to leave: nothing new, no new loans.
    Draining,
}

/// Kinds of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Tier {
    /// The device's own.
    Device,
    /// The host's.
    Host,
}

/// rBlocks of one tier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TierRow {
    /// Which.
    pub tier: Tier,
    /// Blocks in all.
    pub total: u32,
    /// Of these free.
    pub free: u32,
}

/// An instance's line in the global debt ledger. Counts are rBlocks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LedgerRow {
    /// In all.
    pub total: u32,
    /// Nobody's, or kept only for prefix reuse.
    pub free: u32,
    /// Lent to debtors.
    pub lent: u32,
    /// Most that may be lent.
    pub lend_cap: u32,
    /// Borrowed from creditors.
    pub borrowed: u32,
    /// Shape of the pool as it is cut now.
    pub shape: Option<KvShape>,
    /// Bytes that can still be cut to any shape and lent (a lender without a
    /// model of which nothing is lent), else 0.
    pub shapeable_bytes: u64,
    /// The same by tier.
    pub tiers: Vec<TierRow>,
    /// Requests in the batch.
    pub running: u32,
    /// Requests in the queue.
    pub waiting: u32,
    /// Takes new work?
    pub service: Service,
}

impl LedgerRow {
    /// Blocks of `shape` that a debtor may hope to borrow.
    pub fn lendable(&self, shape: &KvShape) -> u32 {
        if self.service == Service::Draining {
            0
        } else if self.shape.as_ref() == Some(shape) {
            self.free.min(self.lend_cap.saturating_sub(self.lent))
        } else {
            let block = shape.block_bytes() as u64;
            u32::try_from(self.shapeable_bytes.checked_div(block).unwrap_or(0)).unwrap_or(u32::MAX)
        }
    }
}

/// Who a member is. The first message on every connection, both ways.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Which cluster it means to join.
    pub cluster: [u8; 16],
    /// Its id: one process life.
    pub instance: InstanceId,
    /// When that life began, milliseconds since 1970: of two lives at the same
    /// address the later one is real.
    pub started: u64,
    /// What it does.
    pub role: Role,
    /// Fingerprint of its model, if it runs one.
    pub model: Option<[u8; 32]>,
    /// Shape of its model's KV, if it runs one.
    pub shape: Option<KvShape>,
    /// Where its control plane is reached, best first.
    pub control: Vec<String>,
    /// Where its creditor is reached, best first.
    pub creditor: Vec<String>,
    /// Names the host: equal for instances that can share memory.
    pub host: u64,
    /// Rank under a launcher, else 0.
    pub rank: u32,
    /// `host:port` of its HTTP server; empty without one.
    pub http: String,
}

/// A debtor still wants this loan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Renewal {
    /// Which.
    pub loan: LoanId,
    /// Its epoch.
    pub epoch: u32,
    /// Blocks of it.
    pub blocks: u32,
}

/// Why a creditor refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Refusal {
    /// Not that many blocks are free.
    NoRoom,
    /// The share that may be lent is lent.
    LendCap,
    /// Its pool has another KV shape.
    Shape,
    /// It is about to leave.
    Draining,
    /// It asked for nothing, or for what no pool can give.
    Invalid,
    /// It lends no memory.
    NotLending,
}

/// `count` consecutive blocks from `start`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockRange {
    /// First block.
    pub start: BlockIndex,
    /// Blocks.
    pub count: u32,
}

/// One message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// Who I am.
    Hello(Hello),
    /// I am alive; my row; and the loans of yours that I still need.
    Heartbeat {
        /// Rises by one; an older one is stale.
        seq: u64,
        /// The sender's row.
        row: LedgerRow,
        /// Loans held from the receiver.
        loans: Vec<Renewal>,
    },
    /// Debtor → creditor: reserve `blocks` before any data moves.
    TryMoveKvCache {
        /// The debtor's name for this ask.
        ticket: u64,
        /// The request that needs them.
        request: u64,
        /// How many.
        blocks: u32,
        /// Of which shape.
        shape: KvShape,
    },
    /// Creditor → debtor: reserved.
    Granted {
        /// The ask.
        ticket: u64,
        /// The loan.
        loan: LoanId,
        /// Epoch of the creditor's pool: its block indices mean nothing in
        /// another.
        epoch: u32,
        /// Ends unless renewed by a heartbeat within this time.
        lease_ms: u32,
        /// Ascending, disjoint.
        blocks: Vec<BlockRange>,
    },
    /// Creditor → debtor: not reserved, nothing changed.
    Refused {
        /// The ask.
        ticket: u64,
        /// Why.
        reason: Refusal,
        /// Blocks that could be lent just now.
        free: u32,
    },
    /// Debtor → creditor: the loan is no longer needed.
    Repay {
        /// Which.
        loan: LoanId,
        /// Its epoch.
        epoch: u32,
    },
    /// Creditor → debtor: the loan is closed, its blocks are free.
    Repaid {
        /// Which.
        loan: LoanId,
        /// Its epoch.
        epoch: u32,
    },
    /// Creditor → debtor: there is no such loan (any more): its lease ended, or
    /// the creditor took you for gone.
    Lapsed {
        /// Which.
        loan: LoanId,
        /// Its epoch.
        epoch: u32,
    },
    /// The sender leaves.
    Goodbye {
        /// Who.
        instance: InstanceId,
    },
    /// Members the sender knows, each with its control address.
    Peers(Vec<(InstanceId, String)>),
}

impl Message {
    /// Reads a message. Total: any bytes give a message or an error.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        super::codec::decode(bytes)
    }

    /// Appends the message's bytes. Lists must be within their limits.
    pub fn encode(&self, out: &mut Vec<u8>) {
        super::codec::encode(self, out);
    }
}
