//! The global debt ledger as one instance sees it, for `/cluster`, `status`
//! and people.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::controller::Controller;
use super::event::ControlStats;
use super::message::{Role, Service};
use super::perf::PerfModel;
use super::plan::{Move, Place, Reason};
use super::row::{Debt, LinkRow, Row, TierRow};
use crate::kv::rblock::{InstanceId, KvShape, LoanId};

/// All that is known of the cluster.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LedgerView {
    /// Members that are up, this one first, then by id.
    pub instances: Vec<InstanceEntry>,
    /// Loans that this instance gave or took.
    pub loans: Vec<LoanEntry>,
    /// Who owes whom how much, of all instances.
    pub debts: Vec<DebtEntry>,
    /// Connections of this instance's control plane to members.
    pub links: Vec<LinkEntry>,
    /// What its last plans decided, the latest first.
    pub decisions: Vec<DecisionEntry>,
    /// Its figures since the start.
    pub control: ControlStats,
}

/// A planned move of one request's rBlocks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DecisionEntry {
    /// Milliseconds since it was planned.
    pub age_ms: u64,
    /// Whose KV.
    pub request: u64,
    /// How many rBlocks.
    pub blocks: u32,
    /// An instance, or `home`.
    pub from: String,
    /// As `from`.
    pub to: String,
    /// `throughput`, `debt_circle`, `creditor_short` or `creditor_leaves`.
    pub why: String,
    /// The figures behind it.
    pub because: String,
}

impl DecisionEntry {
    /// `planned`, decided so many milliseconds ago.
    pub fn new(age_ms: u64, planned: &Move) -> Self {
        let place = |place: Place| match place {
            Place::Home => "home".to_string(),
            Place::At(instance) => id(instance),
        };
        let Move { request, blocks, from, to, why } = planned;
        let (from, to) = (place(*from), place(*to));
        let (why, because) = match why {
            Reason::Throughput { before, after } => {
                ("throughput", format!("debtor and creditor together {before:.1} -> {after:.1} tokens/s by the model"))
            }
            Reason::DebtCircle { circle, blocks } => {
                let names: Vec<_> = circle.iter().chain(circle.first()).map(|of| id(*of)).collect();
                ("debt_circle", format!("{}, each {blocks} rBlocks or more", names.join(" owes ")))
            }
            Reason::CreditorShort { free, low_water } => {
                ("creditor_short", format!("{free} rBlocks free there, short below {low_water}"))
            }
            Reason::CreditorLeaves => ("creditor_leaves", "it is draining".to_string()),
        };
        Self { age_ms, request: *request, blocks: *blocks, from, to, why: why.into(), because }
    }
}

/// One member.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct InstanceEntry {
    /// Its id, 16 hexadecimal digits.
    pub id: String,
    /// This is the instance that was asked.
    pub me: bool,
    /// How often it was taken for dead and was not.
    pub life: u32,
    /// Its own words; `None` before they came.
    pub row: Option<RowEntry>,
    /// Milliseconds since its row last changed here.
    pub row_age_ms: u64,
}

/// What an instance says of itself. Counts are rBlocks, of all tiers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RowEntry {
    /// Engine or lender.
    pub role: Role,
    /// Rank under a launcher.
    pub rank: u32,
    /// Names the host.
    pub host: u64,
    /// Address of its HTTP server; empty without one.
    pub http: String,
    /// Address at which other instances hand it requests, if it takes any in.
    pub peers: Option<String>,
    /// Fingerprint of its model, hexadecimal.
    pub model: Option<String>,
    /// Version of the row.
    pub version: u32,
    /// Takes new work?
    pub service: Service,
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
    /// Bytes that can still be cut to any shape and lent.
    pub shapeable_bytes: u64,
    /// The same by tier.
    pub tiers: Vec<TierRow>,
    /// Requests in the batch.
    pub running: u32,
    /// Requests in the queue.
    pub waiting: u32,
    /// Tokens generated a second.
    pub tokens_s: u32,
    /// How its steps take time.
    pub perf: Option<PerfModel>,
    /// Links it measured.
    pub links: Vec<LinkRow>,
}

impl Controller {
    /// Everything known, for people.
    pub fn view(&self, now: Duration) -> LedgerView {
        let me = self.config.instance;
        let ms = |since: Duration| now.saturating_sub(since).as_millis() as u64;
        let decisions = self.planning.view(now);
        let mut view = LedgerView { control: self.stats(), decisions, ..LedgerView::default() };
        let own = self.row();
        view.instances.push(InstanceEntry {
            id: id(me),
            me: true,
            life: self.swim.me().life,
            row: Some(RowEntry::from(&own)),
            row_age_ms: 0,
        });
        view.debts.extend(own.debts.iter().map(|debt| DebtEntry::new(me, debt)));
        for member in self.swim.up().values() {
            let row = self.gossip.ledger().get(member.instance);
            view.instances.push(InstanceEntry {
                id: id(member.instance),
                me: false,
                life: member.life,
                row: row.map(RowEntry::from),
                row_age_ms: self.news.get(&member.instance).map_or(0, |at| ms(*at)),
            });
            let debts = row.map_or(&[][..], |row| &row.debts);
            view.debts.extend(debts.iter().map(|debt| DebtEntry::new(member.instance, debt)));
        }
        view.loans.extend(self.rmanager.loans().map(|record| LoanEntry {
            creditor: id(me),
            debtor: id(record.debtor),
            loan: record.loan,
            epoch: record.epoch,
            request: record.request,
            blocks: record.blocks.len() as u32,
        }));
        view.loans.extend(self.debts.loans().map(|loan| LoanEntry {
            creditor: id(loan.creditor),
            debtor: id(me),
            loan: loan.loan,
            epoch: loan.epoch,
            request: loan.request,
            blocks: loan.blocks.len() as u32,
        }));
        view.links.extend(self.links.open().values().filter_map(|link| {
            let peer = link.instance?;
            Some(LinkEntry {
                from: id(me),
                to: id(peer),
                dialed: link.dialed.clone(),
                age_ms: ms(link.opened),
                rtt_us: self.links.rtt_us(peer),
            })
        }));
        view
    }
}

impl From<&Row> for RowEntry {
    fn from(row: &Row) -> Self {
        let profile = &row.profile;
        Self {
            role: profile.role,
            rank: profile.rank,
            host: profile.host,
            http: profile.http.clone(),
            peers: profile.peers.clone(),
            model: profile.model.map(|m| m.iter().map(|byte| format!("{byte:02x}")).collect()),
            version: row.stamp.version,
            service: row.service,
            total: row.total(),
            free: row.free(),
            lent: row.lent(),
            lend_cap: row.lend_cap(),
            borrowed: row.borrowed,
            shape: row.shape,
            shapeable_bytes: row.shapeable_bytes,
            tiers: row.tiers.clone(),
            running: row.running,
            waiting: row.waiting,
            tokens_s: row.tokens_s,
            perf: row.perf,
            links: row.links.clone(),
        }
    }
}

/// What one instance owes another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DebtEntry {
    /// Who lends.
    pub creditor: String,
    /// Who borrows.
    pub debtor: String,
    /// rBlocks.
    pub blocks: u32,
}

impl DebtEntry {
    /// One line of a creditor's row.
    pub fn new(creditor: InstanceId, debt: &Debt) -> Self {
        Self { creditor: id(creditor), debtor: id(debt.debtor), blocks: debt.blocks }
    }
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
    /// Round trip of a heartbeat, microseconds, smoothed; where one was sent.
    pub rtt_us: Option<u32>,
}

/// The instance that everything outside shows as `id`.
pub fn instance(id: &str) -> Option<InstanceId> {
    u64::from_str_radix(id, 16).ok().map(InstanceId)
}

/// As everything outside shows an id.
pub fn id(instance: InstanceId) -> String {
    instance.to_string()
}
