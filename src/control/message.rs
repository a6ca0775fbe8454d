//! What control planes say to each other. The bytes are in `codec.rs`; every
//! list has a limit that holds on both sides.

use serde::{Deserialize, Serialize};

use super::row::{Row, Stamp};
use crate::kv::rblock::{BlockIndex, InstanceId, KvShape, LoanId};

pub use super::codec::DecodeError;

/// Version of the wire format; a peer of another is refused.
pub const VERSION: u8 = 3;
/// Most loans renewed by one heartbeat; more go in further heartbeats.
pub const MAX_RENEWALS: usize = 1024;
/// Most block ranges of one grant; what is more scattered is refused.
pub const MAX_RANGES: usize = 32 * 1024;
/// Most rows in one datagram.
pub const MAX_ROWS: usize = 64;

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
    /// Who speaks, and in which cluster. The first message on every
    /// connection, both ways.
    Hello {
        /// Which cluster it means to join.
        cluster: [u8; 16],
        /// Its id: one process life.
        instance: InstanceId,
    },
    /// Debtor → creditor: I am alive, and these loans of yours I still need.
    Heartbeat {
        /// The debtor's clock, microseconds; comes back in the answer.
        sent_us: u64,
        /// Loans held from the receiver.
        loans: Vec<Renewal>,
    },
    /// Creditor → debtor: heard, and renewed but for those that
    /// [`Lapsed`](Self::Lapsed) names.
    Heard {
        /// As it was sent.
        sent_us: u64,
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
}

/// One datagram, before sealing.
#[derive(Clone, Debug, PartialEq)]
pub enum Packet {
    /// A message of the membership protocol.
    Swim(Vec<u8>),
    /// How new the sender's rows of a range of instances are.
    Digest(Digest),
    /// Rows, each of which counts if it is newer.
    Rows(Vec<Row>),
}

/// A page of the ledger's digest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Digest {
    /// First instance that it speaks of.
    pub from: InstanceId,
    /// The first instance that it does not speak of any more; `None`: none.
    pub until: Option<InstanceId>,
    /// What the sender has of these, ascending.
    pub stamps: Vec<(InstanceId, Stamp)>,
    /// It answers another one: answer with rows only.
    pub answer: bool,
}

impl Packet {
    /// Reads a datagram that was opened. Total.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        super::codec::decode_packet(bytes)
    }

    /// Appends its bytes. Lists must be within their limits.
    pub fn encode(&self, out: &mut Vec<u8>) {
        super::codec::encode_packet(self, out);
    }
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
