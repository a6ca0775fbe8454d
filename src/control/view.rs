//! The global debt ledger as one instance sees it, for `/cluster`, `status`
//! and people.

use serde::{Deserialize, Serialize};

use super::message::{LedgerRow, Role};
use crate::kv::rblock::{InstanceId, LoanId};

/// All that is known of the cluster.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LedgerView {
    /// Members that are up, this one first, then by id.
    pub instances: Vec<InstanceEntry>,
    /// Loans that this instance gave or took.
    pub loans: Vec<LoanEntry>,
    /// Connections of this instance's control plane to members.
    pub links: Vec<LinkEntry>,
}

/// One member.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct InstanceEntry {
    /// Its id, 16 hexadecimal digits.
    pub id: String,
    /// This is the instance that was asked.
    pub me: bool,
    /// Engine or lender.
    pub role: Role,
    /// Rank under a launcher.
    pub rank: u32,
    /// Names the host.
    pub host: u64,
    /// Address of its HTTP server; empty without one.
    pub http: String,
    /// Fingerprint of its model, hexadecimal.
    pub model: Option<String>,
    /// Its own words; `None` before its first heartbeat.
    pub row: Option<LedgerRow>,
    /// Milliseconds since it was last heard.
    pub silent_ms: u64,
}

/// One loan.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoanEntry {
    /// Who lends.
    pub creditor: String,
    /// Who borrows.
    pub debtor: String,
    /// Its id at the creditor.
    pub loan: LoanId,
    /// Epoch of the creditor's pool.
    pub epoch: u32,
    /// The debtor's request.
    pub request: u64,
    /// rBlocks.
    pub blocks: u32,
}

/// One connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkEntry {
    /// This instance.
    pub from: String,
    /// The member.
    pub to: String,
    /// Its control address, if this instance dialed it.
    pub dialed: Option<String>,
    /// Milliseconds since it opened.
    pub age_ms: u64,
}

/// As everything outside shows an id.
pub fn id(instance: InstanceId) -> String {
    instance.to_string()
}
