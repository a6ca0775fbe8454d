//! What happens to a controller, and what it wants done.

use core::net::SocketAddr;

use serde::{Deserialize, Serialize};

use super::debts::{BorrowError, Loan};
use super::message::Refusal;
use super::perf::PerfModel;
use super::plan::{Held, Move};
use crate::kv::rblock::{InstanceId, LoanId};

/// The engine's share of the instance's ledger row.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LocalStats {
    /// Requests in the batch.
    pub running: u32,
    /// Requests in the queue.
    pub waiting: u32,
    /// rBlocks that the first of them needs of others, being too long for this
    /// instance alone; else 0.
    pub wanted: u32,
    /// Tokens generated a second, smoothed.
    pub tokens_s: u32,
    /// How its steps take time, once that is known.
    pub perf: Option<PerfModel>,
}

/// What happens to a controller. Connections are named by the driver and never
/// named alike twice.
#[derive(Clone, Debug)]
pub enum Input<'a> {
    /// A datagram; untrusted.
    Datagram {
        /// Where it came from: where an answer goes.
        from: SocketAddr,
        /// What.
        bytes: &'a [u8],
    },
    /// A connection asked for by [`Output::Connect`] is open.
    PeerConnected {
        /// Its name from now on.
        conn: u64,
        /// As it was asked for.
        address: &'a str,
    },
    /// One that was asked for did not come about.
    ConnectFailed {
        /// As it was asked for.
        address: &'a str,
    },
    /// A peer connected to us.
    PeerAccepted {
        /// Its name from now on.
        conn: u64,
    },
    /// A message; untrusted.
    PeerMessage {
        /// From where.
        conn: u64,
        /// What.
        bytes: &'a [u8],
    },
    /// A connection is gone. Not told of those closed by
    /// [`Output::Disconnect`] (harmless if it is).
    PeerClosed {
        /// Which.
        conn: u64,
    },
    /// The engine needs blocks elsewhere; ends in [`Output::Granted`] or
    /// [`Output::Refused`].
    Borrow {
        /// For this request.
        request: u64,
        /// So many.
        blocks: u32,
        /// Not from these.
        avoid: &'a [InstanceId],
        /// From this one alone, where one is named.
        only: Option<InstanceId>,
    },
    /// The engine's requests: what a plan is made from. Answered by
    /// [`Output::Moves`].
    Plan {
        /// Those that run.
        requests: Vec<Held>,
        /// What each waiting one needs, rBlocks, first come first.
        queue: Vec<u32>,
    },
    /// Of one loan only the first `keep` blocks, at least 1, are needed still.
    ShrinkLoan {
        /// From whom.
        creditor: InstanceId,
        /// Which.
        loan: LoanId,
        /// How many.
        keep: u32,
    },
    /// A request needs none of its loans any more, nor the borrowing that may
    /// be under way.
    RepayRequest {
        /// Which.
        request: u64,
    },
    /// One loan is not needed any more.
    RepayLoan {
        /// From whom.
        creditor: InstanceId,
        /// Which.
        loan: LoanId,
    },
    /// The engine's figures.
    LocalRow(LocalStats),
    /// Time has passed.
    Tick,
    /// Take nothing new; see [`Output::Drained`].
    Drain,
    /// Leave the cluster and close every connection.
    Leave,
}

/// What a controller wants done.
#[derive(Clone, Debug, PartialEq)]
pub enum Output {
    /// Send a datagram; it may be lost.
    Datagram {
        /// Where to.
        to: SocketAddr,
        /// What, sealed.
        bytes: Vec<u8>,
    },
    /// Connect to a control address.
    Connect {
        /// Where.
        address: String,
    },
    /// Send a message, in order.
    Send {
        /// Where to.
        conn: u64,
        /// What.
        bytes: Vec<u8>,
    },
    /// Close a connection.
    Disconnect {
        /// Which.
        conn: u64,
    },
    /// A borrowing went well.
    Granted {
        /// For this request.
        request: u64,
        /// Together as many blocks as asked for; by creditor and loan.
        loans: Vec<Loan>,
    },
    /// A borrowing did not; nothing of it is held.
    Refused {
        /// For this request.
        request: u64,
        /// Why.
        reason: BorrowError,
    },
    /// What the engine should move, in place of what the last such output said.
    Moves(Vec<Move>),
    /// The loans of a creditor are certainly in force until then; whether they
    /// are after it only the creditor knows. Told before the first is granted and
    /// with each renewal. A process that was stopped must look before it writes.
    LeaseUntil {
        /// Whose.
        creditor: InstanceId,
        /// As the time given to `handle`.
        until: std::time::Duration,
    },
    /// A creditor whose loans are held is draining: what it holds ready and is
    /// not used should go back. Told with each plan while it lasts.
    CreditorLeaves {
        /// Who.
        creditor: InstanceId,
    },
    /// Loans that were [granted](Output::Granted) are gone, and with them the
    /// KV in their blocks.
    LoansLost {
        /// Which.
        loans: Vec<Loan>,
    },
    /// A member whose memory may be borrowed is there; told again when it
    /// returns.
    CreditorUp {
        /// Who.
        instance: InstanceId,
        /// Names its host.
        host: u64,
        /// Where its creditor is reached, best first.
        endpoints: Vec<String>,
    },
    /// It is gone. Its loans follow as [`Output::LoansLost`].
    CreditorDown {
        /// Who.
        instance: InstanceId,
    },
    /// For the log.
    Note(Note),
    /// Draining is done: nothing is lent or borrowed.
    Drained,
}

/// Things worth a line in the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Note {
    /// A member is up.
    Up(InstanceId),
    /// A member is down that had not said it would leave.
    Down(InstanceId),
    /// A member is gone that had said it would leave.
    Left(InstanceId),
    /// This instance was taken for dead by others and returned.
    Renewed(u32),
    /// A connection was closed for what came over it.
    Dropped {
        /// Which.
        conn: u64,
        /// Why.
        reason: String,
    },
    /// A creditor refused.
    CreditorRefused(InstanceId, Refusal),
    /// A debtor's loan ended without being repaid.
    Lapsed {
        /// Whose.
        debtor: InstanceId,
        /// Which.
        loan: LoanId,
        /// Blocks freed.
        blocks: u32,
    },
}

/// Figures since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ControlStats {
    /// Messages that were none, or out of place; their connections were closed.
    pub garbage: u64,
    /// Hellos of another cluster.
    pub foreign: u64,
    /// Datagrams that were not sealed with the cluster's key.
    pub unsealed: u64,
    /// Datagrams sent.
    pub datagrams: u64,
    /// Their bytes.
    pub datagram_bytes: u64,
    /// Loans given.
    pub granted: u64,
    /// Asks refused as creditor.
    pub refused: u64,
    /// Loans given that ended without being repaid.
    pub lapsed: u64,
    /// Loans taken that were lost.
    pub lost: u64,
    /// Moves planned for throughput.
    pub planned_throughput: u64,
    /// Moves planned to cancel debt circles.
    pub planned_circles: u64,
    /// Moves planned because a creditor was short of memory.
    pub planned_short: u64,
    /// Moves planned because a creditor was leaving.
    pub planned_leaves: u64,
}
