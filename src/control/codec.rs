//! The bytes of control messages and of datagrams: version, kind, then the
//! fields as `wire.rs` writes them.

use super::gossip::MAX_STAMPS;
use super::message::*;
use super::perf::PerfModel;
use super::row::*;
pub use super::wire::DecodeError;
use super::wire::{Reader, Result, Writer};
use crate::kv::rblock::{InstanceId, LoanId};

const HELLO: u8 = 1;
const HEARTBEAT: u8 = 2;
const HEARD: u8 = 3;
const TRY_MOVE: u8 = 4;
const GRANTED: u8 = 5;
const REFUSED: u8 = 6;
const REPAY: u8 = 7;
const REPAID: u8 = 8;
const LAPSED: u8 = 9;

const SWIM: u8 = 1;
const DIGEST: u8 = 2;
const ROWS: u8 = 3;

impl Reader<'_> {
    fn loan(&mut self) -> Result<(LoanId, u32)> {
        Ok((LoanId(self.u32("loan")?), self.u32("epoch")?))
    }

    fn instance(&mut self) -> Result<InstanceId> {
        self.u64("instance").map(InstanceId)
    }

    fn stamp(&mut self) -> Result<Stamp> {
        Ok(Stamp { incarnation: self.u32("stamp")?, version: self.u32("stamp")? })
    }

    fn row(&mut self) -> Result<Row> {
        Ok(Row {
            instance: self.instance()?,
            stamp: self.stamp()?,
            profile: self.profile()?,
            service: match self.u8("service")? {
                0 => Service::Serving,
                1 => Service::Draining,
                _ => return Err(DecodeError::Value("service")),
            },
            shape: self.option("row", Self::shape)?,
            shapeable_bytes: self.u64("row")?,
            tiers: self.list("tiers", MAX_TIERS, |r| {
                let tier = match r.u8("tier")? {
                    0 => Tier::Device,
                    1 => Tier::Host,
                    _ => return Err(DecodeError::Value("tier")),
                };
                let (total, free) = (r.u32("tier")?, r.u32("tier")?);
                Ok(TierRow { tier, total, free, lent: r.u32("tier")?, lend_cap: r.u32("tier")? })
            })?,
            debts: self.list("debts", MAX_DEBTORS, |r| Ok(Debt { debtor: r.instance()?, blocks: r.u32("debt")? }))?,
            borrowed: self.u32("row")?,
            running: self.u32("row")?,
            waiting: self.u32("row")?,
            wanted: self.u32("row")?,
            tokens_s: self.u32("row")?,
            perf: self.option("performance model", |r| {
                let mut ns = || Some(f32::from_bits(r.u32("performance model").ok()?)).filter(|ns| *ns >= 0.0);
                let model = (|| Some(PerfModel { fixed_ns: ns()?, row_ns: ns()?, key_ns: ns()? }))();
                let finite = |m: &PerfModel| (m.fixed_ns + m.row_ns + m.key_ns).is_finite();
                model.filter(finite).ok_or(DecodeError::Value("performance model"))
            })?,
            links: self.list("links", MAX_LINKS, |r| {
                Ok(LinkRow { peer: r.instance()?, rtt_us: r.u32("link")?, mb_s: r.u32("link")? })
            })?,
        })
    }

    fn profile(&mut self) -> Result<Profile> {
        Ok(Profile {
            role: match self.u8("role")? {
                0 => Role::Engine,
                1 => Role::Lender,
                _ => return Err(DecodeError::Value("role")),
            },
            model: self.option("model", |r| r.array("model"))?,
            host: self.u64("host")?,
            rank: self.u32("rank")?,
            control: self.list("control addresses", MAX_ADDRESSES, |r| r.string("control address"))?,
            creditor: self.list("creditor addresses", MAX_ADDRESSES, |r| r.string("creditor address"))?,
            http: self.string("http address")?,
            peers: self.option("address for peers", |r| r.string("address for peers"))?,
        })
    }

    fn refusal(&mut self) -> Result<Refusal> {
        Ok(match self.u8("refusal")? {
            0 => Refusal::NoRoom,
            1 => Refusal::LendCap,
            2 => Refusal::Shape,
            3 => Refusal::Draining,
            4 => Refusal::Invalid,
            5 => Refusal::NotLending,
            _ => return Err(DecodeError::Value("refusal")),
        })
    }

    /// Ascending, disjoint, not empty ranges.
    fn ranges(&mut self) -> Result<Vec<BlockRange>> {
        let mut end = 0;
        self.list("blocks", MAX_RANGES, |r| {
            let range = BlockRange { start: r.u32("blocks")?, count: r.u32("blocks")? };
            if range.count == 0 || range.start < end {
                return Err(DecodeError::Value("blocks"));
            }
            end = range.start.checked_add(range.count).ok_or(DecodeError::Value("blocks"))?;
            Ok(range)
        })
    }
}

pub(super) fn decode(bytes: &[u8]) -> Result<Message> {
    let mut r = Reader { rest: bytes };
    r.version()?;
    let message = match r.u8("kind")? {
        HELLO => Message::Hello { cluster: r.array("cluster")?, instance: r.instance()? },
        HEARTBEAT => Message::Heartbeat {
            sent_us: r.u64("sent")?,
            loans: r.list("loans", MAX_RENEWALS, |r| {
                let (loan, epoch) = r.loan()?;
                Ok(Renewal { loan, epoch, blocks: r.u32("loans")? })
            })?,
        },
        HEARD => Message::Heard { sent_us: r.u64("sent")? },
        TRY_MOVE => Message::TryMoveKvCache {
            ticket: r.u64("ticket")?,
            request: r.u64("request")?,
            blocks: r.u32("blocks")?,
            shape: r.shape()?,
        },
        GRANTED => {
            let ticket = r.u64("ticket")?;
            let (loan, epoch) = r.loan()?;
            Message::Granted { ticket, loan, epoch, lease_ms: r.u32("lease")?, blocks: r.ranges()? }
        }
        REFUSED => Message::Refused { ticket: r.u64("ticket")?, reason: r.refusal()?, free: r.u32("free")? },
        REPAY => r.loan().map(|(loan, epoch)| Message::Repay { loan, epoch })?,
        REPAID => r.loan().map(|(loan, epoch)| Message::Repaid { loan, epoch })?,
        LAPSED => r.loan().map(|(loan, epoch)| Message::Lapsed { loan, epoch })?,
        kind => return Err(DecodeError::Kind(kind)),
    };
    r.end(message)
}

pub(super) fn decode_packet(bytes: &[u8]) -> Result<Packet> {
    let mut r = Reader { rest: bytes };
    r.version()?;
    let packet = match r.u8("kind")? {
        SWIM => Packet::Swim(std::mem::take(&mut r.rest).to_vec()),
        DIGEST => Packet::Digest(Digest {
            from: r.instance()?,
            until: r.option("until", Reader::instance)?,
            stamps: r.list("stamps", MAX_STAMPS, |r| Ok((r.instance()?, r.stamp()?)))?,
            answer: match r.u8("answer")? {
                0 => false,
                1 => true,
                _ => return Err(DecodeError::Value("answer")),
            },
        }),
        ROWS => Packet::Rows(r.list("rows", MAX_ROWS, Reader::row)?),
        kind => return Err(DecodeError::Kind(kind)),
    };
    r.end(packet)
}

impl Writer<'_> {
    fn loan(&mut self, kind: u8, loan: LoanId, epoch: u32) {
        self.u8(kind);
        self.u32(loan.0);
        self.u32(epoch);
    }

    fn stamp(&mut self, stamp: Stamp) {
        self.u32(stamp.incarnation);
        self.u32(stamp.version);
    }

    fn row(&mut self, row: &Row) {
        self.u64(row.instance.0);
        self.stamp(row.stamp);
        self.profile(&row.profile);
        self.u8(match row.service {
            Service::Serving => 0,
            Service::Draining => 1,
        });
        self.option(&row.shape, Self::shape);
        self.u64(row.shapeable_bytes);
        self.list(&row.tiers, MAX_TIERS, |w, tier| {
            w.u8(match tier.tier {
                Tier::Device => 0,
                Tier::Host => 1,
            });
            [tier.total, tier.free, tier.lent, tier.lend_cap].into_iter().for_each(|count| w.u32(count));
        });
        self.list(&row.debts, MAX_DEBTORS, |w, debt| {
            w.u64(debt.debtor.0);
            w.u32(debt.blocks);
        });
        [row.borrowed, row.running, row.waiting, row.wanted, row.tokens_s]
            .into_iter()
            .for_each(|count| self.u32(count));
        self.option(&row.perf, |w, perf| {
            [perf.fixed_ns, perf.row_ns, perf.key_ns].into_iter().for_each(|ns| w.u32(ns.to_bits()));
        });
        self.list(&row.links, MAX_LINKS, |w, link| {
            w.u64(link.peer.0);
            w.u32(link.rtt_us);
            w.u32(link.mb_s);
        });
    }

    fn profile(&mut self, profile: &Profile) {
        self.u8(match profile.role {
            Role::Engine => 0,
            Role::Lender => 1,
        });
        self.option(&profile.model, |w, model| w.0.extend_from_slice(model));
        self.u64(profile.host);
        self.u32(profile.rank);
        self.list(&profile.control, MAX_ADDRESSES, |w, address| w.string(address));
        self.list(&profile.creditor, MAX_ADDRESSES, |w, address| w.string(address));
        self.string(&profile.http);
        self.option(&profile.peers, |w, address| w.string(address));
    }
}

/// Bytes of a row.
pub(super) fn row_len(row: &Row) -> usize {
    let mut bytes = Vec::with_capacity(512);
    Writer(&mut bytes).row(row);
    bytes.len()
}

pub(super) fn encode_packet(packet: &Packet, out: &mut Vec<u8>) {
    let mut w = Writer(out);
    w.u8(VERSION);
    match packet {
        Packet::Swim(bytes) => {
            w.u8(SWIM);
            w.0.extend_from_slice(bytes);
        }
        Packet::Digest(digest) => {
            w.u8(DIGEST);
            w.u64(digest.from.0);
            w.option(&digest.until, |w, until| w.u64(until.0));
            w.list(&digest.stamps, MAX_STAMPS, |w, (instance, stamp)| {
                w.u64(instance.0);
                w.stamp(*stamp);
            });
            w.u8(digest.answer.into());
        }
        Packet::Rows(rows) => {
            w.u8(ROWS);
            w.list(rows, MAX_ROWS, Writer::row);
        }
    }
}

pub(super) fn encode(message: &Message, out: &mut Vec<u8>) {
    let mut w = Writer(out);
    w.u8(VERSION);
    match message {
        Message::Hello { cluster, instance } => {
            w.u8(HELLO);
            w.0.extend_from_slice(cluster);
            w.u64(instance.0);
        }
        Message::Heartbeat { sent_us, loans } => {
            w.u8(HEARTBEAT);
            w.u64(*sent_us);
            w.list(loans, MAX_RENEWALS, |w, renewal| {
                w.u32(renewal.loan.0);
                w.u32(renewal.epoch);
                w.u32(renewal.blocks);
            });
        }
        Message::Heard { sent_us } => {
            w.u8(HEARD);
            w.u64(*sent_us);
        }
        Message::TryMoveKvCache { ticket, request, blocks, shape } => {
            w.u8(TRY_MOVE);
            w.u64(*ticket);
            w.u64(*request);
            w.u32(*blocks);
            w.shape(shape);
        }
        Message::Granted { ticket, loan, epoch, lease_ms, blocks } => {
            w.u8(GRANTED);
            w.u64(*ticket);
            w.u32(loan.0);
            w.u32(*epoch);
            w.u32(*lease_ms);
            w.list(blocks, MAX_RANGES, |w, range| {
                w.u32(range.start);
                w.u32(range.count);
            });
        }
        Message::Refused { ticket, reason, free } => {
            w.u8(REFUSED);
            w.u64(*ticket);
            w.u8(match reason {
                Refusal::NoRoom => 0,
                Refusal::LendCap => 1,
                Refusal::Shape => 2,
                Refusal::Draining => 3,
                Refusal::Invalid => 4,
                Refusal::NotLending => 5,
            });
            w.u32(*free);
        }
        Message::Repay { loan, epoch } => w.loan(REPAY, *loan, *epoch),
        Message::Repaid { loan, epoch } => w.loan(REPAID, *loan, *epoch),
        Message::Lapsed { loan, epoch } => w.loan(LAPSED, *loan, *epoch),
    }
}

#[cfg(test)]
#[path = "codec_tests.rs"]
pub(super) mod tests;
