//! The bytes of a control message: version, kind, fields in order; little
//! endian; a list is its length (u16 or u32) and its elements; an option one
//! byte and the value. Hand-written, so that every bound is in sight.

use super::message::*;
use crate::kv::rblock::{InstanceId, KvDtype, KvShape, LoanId};

/// What is wrong with a message's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// They end in the middle of `field`.
    #[error("the message ends inside {0}")]
    Truncated(&'static str),
    /// They go on after the message.
    #[error("{0} bytes follow the message")]
    Trailing(usize),
    /// The peer speaks another version.
    #[error(
        "the peer speaks version {0} of the control protocol, this node speaks {VERSION}: run the same release everywhere"
    )]
    Version(u8),
    /// No such kind of message.
    #[error("unknown kind of message {0}")]
    Kind(u8),
    /// A value that `field` cannot have.
    #[error("invalid value of {0}")]
    Value(&'static str),
    /// A list longer than its limit.
    #[error("{field}: {len} elements, at most {limit}")]
    TooMany {
        /// Which list.
        field: &'static str,
        /// Said length.
        len: usize,
        /// Limit.
        limit: usize,
    },
}

type Result<T> = std::result::Result<T, DecodeError>;

const HELLO: u8 = 1;
const HEARTBEAT: u8 = 2;
const TRY_MOVE: u8 = 3;
const GRANTED: u8 = 4;
const REFUSED: u8 = 5;
const REPAY: u8 = 6;
const REPAID: u8 = 7;
const LAPSED: u8 = 8;
const GOODBYE: u8 = 9;
const PEERS: u8 = 10;

struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    fn bytes(&mut self, n: usize, field: &'static str) -> Result<&'a [u8]> {
        let (head, rest) = self.rest.split_at_checked(n).ok_or(DecodeError::Truncated(field))?;
        self.rest = rest;
        Ok(head)
    }

    fn array<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N]> {
        let (head, rest) = self.rest.split_first_chunk().ok_or(DecodeError::Truncated(field))?;
        self.rest = rest;
        Ok(*head)
    }

    fn u8(&mut self, field: &'static str) -> Result<u8> {
        self.array(field).map(u8::from_le_bytes)
    }

    fn u16(&mut self, field: &'static str) -> Result<u16> {
        self.array(field).map(u16::from_le_bytes)
    }

    fn u32(&mut self, field: &'static str) -> Result<u32> {
        self.array(field).map(u32::from_le_bytes)
    }

    fn u64(&mut self, field: &'static str) -> Result<u64> {
        self.array(field).map(u64::from_le_bytes)
    }

    fn option<T>(&mut self, field: &'static str, read: impl FnOnce(&mut Self) -> Result<T>) -> Result<Option<T>> {
        match self.u8(field)? {
            0 => Ok(None),
            1 => read(self).map(Some),
            _ => Err(DecodeError::Value(field)),
        }
    }

    /// Elements are at least one byte, so a length beyond the bytes at hand is
    /// refused before anything is allocated for it.
    fn list<T>(
        &mut self,
        field: &'static str,
        limit: usize,
        mut read: impl FnMut(&mut Self) -> Result<T>,
    ) -> Result<Vec<T>> {
        let len = self.u32(field)? as usize;
        if len > limit {
            return Err(DecodeError::TooMany { field, len, limit });
        }
        if len > self.rest.len() {
            return Err(DecodeError::Truncated(field));
        }
        (0..len).map(|_| read(self)).collect()
    }

    fn string(&mut self, field: &'static str) -> Result<String> {
        let len = self.u16(field)? as usize;
        if len > MAX_ADDRESS {
            return Err(DecodeError::TooMany { field, len, limit: MAX_ADDRESS });
        }
        let bytes = self.bytes(len, field)?;
        std::str::from_utf8(bytes).map(str::to_owned).map_err(|_| DecodeError::Value(field))
    }

    fn loan(&mut self) -> Result<(LoanId, u32)> {
        Ok((LoanId(self.u32("loan")?), self.u32("epoch")?))
    }

    fn shape(&mut self) -> Result<KvShape> {
        const FIELD: &str = "kv shape";
        let shape = KvShape {
            layers: self.u32(FIELD)?,
            kv_heads: self.u32(FIELD)?,
            head_dim: self.u32(FIELD)?,
            block_tokens: self.u32(FIELD)?,
            dtype: match self.u8(FIELD)? {
                0 => KvDtype::Bf16,
                1 => KvDtype::F16,
                2 => KvDtype::F32,
                _ => return Err(DecodeError::Value(FIELD)),
            },
        };
        // Bounds under which no size computed from a shape can overflow.
        let sane = |value: u32, most: u32| (1..=most).contains(&value);
        if sane(shape.layers, 4096)
            && sane(shape.kv_heads, 4096)
            && sane(shape.head_dim, 4096)
            && sane(shape.block_tokens, 4096)
        {
            Ok(shape)
        } else {
            Err(DecodeError::Value(FIELD))
        }
    }

    fn service(&mut self) -> Result<Service> {
        match self.u8("service")? {
            0 => Ok(Service::Serving),
            1 => Ok(Service::Draining),
            _ => Err(DecodeError::Value("service")),
        }
    }

    fn row(&mut self) -> Result<LedgerRow> {
        Ok(LedgerRow {
            total: self.u32("row")?,
            free: self.u32("row")?,
            lent: self.u32("row")?,
            lend_cap: self.u32("row")?,
            borrowed: self.u32("row")?,
            shape: self.option("row", Self::shape)?,
            shapeable_bytes: self.u64("row")?,
            tiers: self.list("tiers", MAX_TIERS, |r| {
                let tier = match r.u8("tier")? {
                    0 => Tier::Device,
                    1 => Tier::Host,
                    _ => return Err(DecodeError::Value("tier")),
                };
                Ok(TierRow { tier, total: r.u32("tier")?, free: r.u32("tier")? })
            })?,
            running: self.u32("row")?,
            waiting: self.u32("row")?,
            service: self.service()?,
        })
    }

    fn hello(&mut self) -> Result<Hello> {
        Ok(Hello {
            cluster: self.array("cluster")?,
            instance: InstanceId(self.u64("instance")?),
            started: self.u64("started")?,
            role: match self.u8("role")? {
                0 => Role::Engine,
                1 => Role::Lender,
                _ => return Err(DecodeError::Value("role")),
            },
            model: self.option("model", |r| r.array("model"))?,
            shape: self.option("kv shape", Self::shape)?,
            control: self.list("control addresses", MAX_ADDRESSES, |r| r.string("control address"))?,
            creditor: self.list("creditor addresses", MAX_ADDRESSES, |r| r.string("creditor address"))?,
            host: self.u64("host")?,
            rank: self.u32("rank")?,
            http: self.string("http address")?,
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
    match r.u8("version")? {
        VERSION => {}
        other => return Err(DecodeError::Version(other)),
    }
    let message = match r.u8("kind")? {
        HELLO => Message::Hello(r.hello()?),
        HEARTBEAT => Message::Heartbeat {
            seq: r.u64("seq")?,
            row: r.row()?,
            loans: r.list("loans", MAX_RENEWALS, |r| {
                let (loan, epoch) = r.loan()?;
                Ok(Renewal { loan, epoch, blocks: r.u32("loans")? })
            })?,
        },
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
        GOODBYE => Message::Goodbye { instance: InstanceId(r.u64("instance")?) },
        PEERS => Message::Peers(
            r.list("peers", MAX_PEERS, |r| Ok((InstanceId(r.u64("peer")?), r.string("peer's address")?)))?,
        ),
        kind => return Err(DecodeError::Kind(kind)),
    };
    match r.rest.len() {
        0 => Ok(message),
        n => Err(DecodeError::Trailing(n)),
    }
}

struct Writer<'a>(&'a mut Vec<u8>);

impl Writer<'_> {
    fn u8(&mut self, value: u8) {
        self.0.push(value);
    }

    fn u32(&mut self, value: u32) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    fn u64(&mut self, value: u64) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    fn option<T>(&mut self, value: &Option<T>, write: impl FnOnce(&mut Self, &T)) {
        self.u8(value.is_some().into());
        if let Some(value) = value {
            write(self, value);
        }
    }

    fn list<T>(&mut self, values: &[T], limit: usize, mut write: impl FnMut(&mut Self, &T)) {
        debug_assert!(values.len() <= limit);
        self.u32(values.len() as u32);
        values.iter().for_each(|value| write(self, value));
    }

    fn string(&mut self, value: &str) {
        debug_assert!(value.len() <= MAX_ADDRESS);
        self.0.extend_from_slice(&(value.len() as u16).to_le_bytes());
        self.0.extend_from_slice(value.as_bytes());
    }

    fn loan(&mut self, kind: u8, loan: LoanId, epoch: u32) {
        self.u8(kind);
        self.u32(loan.0);
        self.u32(epoch);
    }

    fn shape(&mut self, shape: &KvShape) {
        for value in [shape.layers, shape.kv_heads, shape.head_dim, shape.block_tokens] {
            self.u32(value);
        }
        self.u8(match shape.dtype {
            KvDtype::Bf16 => 0,
            KvDtype::F16 => 1,
            KvDtype::F32 => 2,
        });
    }

    fn row(&mut self, row: &LedgerRow) {
        for value in [row.total, row.free, row.lent, row.lend_cap, row.borrowed] {
            self.u32(value);
        }
        self.option(&row.shape, Self::shape);
        self.u64(row.shapeable_bytes);
        self.list(&row.tiers, MAX_TIERS, |w, tier| {
            w.u8(match tier.tier {
                Tier::Device => 0,
                Tier::Host => 1,
            });
            w.u32(tier.total);
            w.u32(tier.free);
        });
        self.u32(row.running);
        self.u32(row.waiting);
        self.u8(match row.service {
            Service::Serving => 0,
            Service::Draining => 1,
        });
    }

    fn hello(&mut self, hello: &Hello) {
        self.0.extend_from_slice(&hello.cluster);
        self.u64(hello.instance.0);
        self.u64(hello.started);
        self.u8(match hello.role {
            Role::Engine => 0,
            Role::Lender => 1,
        });
        self.option(&hello.model, |w, model| w.0.extend_from_slice(model));
        self.option(&hello.shape, Self::shape);
        self.list(&hello.control, MAX_ADDRESSES, |w, address| w.string(address));
        self.list(&hello.creditor, MAX_ADDRESSES, |w, address| w.string(address));
        self.u64(hello.host);
        self.u32(hello.rank);
        self.string(&hello.http);
    }
}

pub(super) fn encode(message: &Message, out: &mut Vec<u8>) {
    let mut w = Writer(out);
    w.u8(VERSION);
    match message {
        Message::Hello(hello) => {
            w.u8(HELLO);
            w.hello(hello);
        }
        Message::Heartbeat { seq, row, loans } => {
            w.u8(HEARTBEAT);
            w.u64(*seq);
            w.row(row);
            w.list(loans, MAX_RENEWALS, |w, renewal| {
                w.u32(renewal.loan.0);
                w.u32(renewal.epoch);
                w.u32(renewal.blocks);
            });
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
        Message::Goodbye { instance } => {
            w.u8(GOODBYE);
            w.u64(instance.0);
        }
        Message::Peers(peers) => {
            w.u8(PEERS);
            w.list(peers, MAX_PEERS, |w, (instance, address)| {
                w.u64(instance.0);
                w.string(address);
            });
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    fn shape() -> impl Strategy<Value = KvShape> {
        let size = 1u32..=4096;
        let dtype = prop_oneof![Just(KvDtype::Bf16), Just(KvDtype::F16), Just(KvDtype::F32)];
        (size.clone(), size.clone(), size.clone(), size, dtype).prop_map(
            |(layers, kv_heads, head_dim, block_tokens, dtype)| KvShape {
                layers,
                kv_heads,
                head_dim,
                block_tokens,
                dtype,
            },
        )
    }

    fn row() -> impl Strategy<Value = LedgerRow> {
        let tier = (any::<bool>(), any::<u32>(), any::<u32>()).prop_map(|(device, total, free)| TierRow {
            tier: if device { Tier::Device } else { Tier::Host },
            total,
            free,
        });
        let options = (prop::option::of(shape()), any::<u64>(), vec(tier, 0..=MAX_TIERS), any::<bool>());
        (any::<[u32; 7]>(), options).prop_map(|(n, (shape, shapeable_bytes, tiers, serving))| LedgerRow {
            total: n[0],
            free: n[1],
            lent: n[2],
            lend_cap: n[3],
            borrowed: n[4],
            shape,
            shapeable_bytes,
            tiers,
            running: n[5],
            waiting: n[6],
            service: if serving { Service::Serving } else { Service::Draining },
        })
    }

    fn hello() -> impl Strategy<Value = Hello> {
        let address = || "[a-z:/.0-9é]{0,40}";
        (
            (any::<[u8; 16]>(), any::<u64>(), any::<u64>(), any::<bool>(), any::<u64>(), any::<u32>(), address()),
            (prop::option::of(any::<[u8; 32]>()), prop::option::of(shape())),
            (vec(address(), 0..=MAX_ADDRESSES), vec(address(), 0..=MAX_ADDRESSES)),
        )
            .prop_map(|(ids, (model, shape), (control, creditor))| Hello {
                cluster: ids.0,
                instance: InstanceId(ids.1),
                started: ids.2,
                role: if ids.3 { Role::Engine } else { Role::Lender },
                model,
                shape,
                control,
                creditor,
                host: ids.4,
                rank: ids.5,
                http: ids.6,
            })
    }

    pub(crate) fn message() -> impl Strategy<Value = Message> {
        let loan = || (any::<u32>().prop_map(LoanId), any::<u32>());
        let refusal = prop_oneof![
            Just(Refusal::NoRoom),
            Just(Refusal::LendCap),
            Just(Refusal::Shape),
            Just(Refusal::Draining),
            Just(Refusal::Invalid),
            Just(Refusal::NotLending),
        ];
        let renewal = (loan(), any::<u32>()).prop_map(|((loan, epoch), blocks)| Renewal { loan, epoch, blocks });
        let ranges = vec((0u32..100, 1u32..100), 0..20).prop_map(|steps| {
            let mut end = 0;
            let next = |(gap, count)| {
                let range = BlockRange { start: end + gap, count };
                end = range.start + count;
                range
            };
            steps.into_iter().map(next).collect::<Vec<_>>()
        });
        prop_oneof![
            hello().prop_map(Message::Hello),
            (any::<u64>(), row(), vec(renewal, 0..9)).prop_map(|(seq, row, loans)| Message::Heartbeat {
                seq,
                row,
                loans
            }),
            (any::<u64>(), any::<u64>(), any::<u32>(), shape()).prop_map(|(ticket, request, blocks, shape)| {
                Message::TryMoveKvCache { ticket, request, blocks, shape }
            }),
            (any::<u64>(), loan(), any::<u32>(), ranges).prop_map(|(ticket, (loan, epoch), lease_ms, blocks)| {
                Message::Granted { ticket, loan, epoch, lease_ms, blocks }
            }),
            (any::<u64>(), refusal, any::<u32>()).prop_map(|(ticket, reason, free)| Message::Refused {
                ticket,
                reason,
                free
            }),
            loan().prop_map(|(loan, epoch)| Message::Repay { loan, epoch }),
            loan().prop_map(|(loan, epoch)| Message::Repaid { loan, epoch }),
            loan().prop_map(|(loan, epoch)| Message::Lapsed { loan, epoch }),
            any::<u64>().prop_map(|i| Message::Goodbye { instance: InstanceId(i) }),
            vec((any::<u64>().prop_map(InstanceId), "[a-z:/.0-9]{0,40}"), 0..9).prop_map(Message::Peers),
        ]
    }

    proptest! {
        #[test]
        fn a_message_comes_back_as_it_was(message in message()) {
            let mut bytes = Vec::new();
            message.encode(&mut bytes);
            prop_assert_eq!(Message::decode(&bytes), Ok(message));
            // Every prefix is an error, and so is one byte more.
            for end in 0..bytes.len() {
                prop_assert!(Message::decode(&bytes[..end]).is_err());
            }
            bytes.push(0);
            prop_assert!(Message::decode(&bytes).is_err());
        }

        #[test]
        fn damaged_bytes_give_a_message_or_an_error(message in message(), damage in vec((any::<prop::sample::Index>(), any::<u8>()), 1..8)) {
            let mut bytes = Vec::new();
            message.encode(&mut bytes);
            for (at, value) in damage {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            if let Ok(message) = Message::decode(&bytes) {
                let mut again = Vec::new();
                message.encode(&mut again);
                prop_assert_eq!(again, bytes, "one message has one encoding");
            }
        }

        #[test]
        fn any_bytes_give_a_message_or_an_error(mut bytes in vec(any::<u8>(), 0..300), kind in 0u8..12) {
            let _ = Message::decode(&bytes);
            if bytes.len() > 1 {
                bytes[..2].copy_from_slice(&[VERSION, kind]);
                let _ = Message::decode(&bytes);
            }
        }
    }

    #[test]
    fn a_long_list_is_refused_before_it_is_read() {
        let mut bytes = vec![VERSION, PEERS];
        bytes.extend_from_slice(&u32::MAX.to_le_bytes());
        let field = "peers";
        let refused = DecodeError::TooMany { field, len: u32::MAX as usize, limit: MAX_PEERS };
        assert_eq!(Message::decode(&bytes), Err(refused));
        assert_eq!(Message::decode(&[VERSION + 1, PEERS]), Err(DecodeError::Version(VERSION + 1)));
        assert_eq!(Message::decode(&[VERSION, 99]), Err(DecodeError::Kind(99)));
    }
}
