//! What travels on a lane, the connection from a debtor's engine to a
//! creditor: the lane's opening, one plan a step, and the headers of queries
//! and partials. Everything decoded here is untrusted.

use distkv_fabric::{Notify, RemoteKey};

use crate::codec::{DecodeError, Reader, Result, WriteExt};
use crate::kv::rblock::{BlockIndex, InstanceId, KvDtype, KvShape, LoanId};

/// Version of everything in this file; lanes of another version are refused.
pub const VERSION: u32 = 2;
const HELLO_MAGIC: u32 = 0x4c76_4b44; // "DKvL"
const MAX_LAYERS: usize = 4096;
const MAX_KEY: usize = 64;
/// Most sequences in one plan.
pub const MAX_ENTRIES: usize = 1 << 14;
/// Most loans of one sequence at one creditor.
pub const MAX_ENTRY_LOANS: usize = 1 << 12;
/// Most rBlocks placed by one plan; a debtor with more sends another message.
pub const MAX_PLACEMENTS: usize = 1 << 15;
const MAX_REASON: usize = 1 << 10;

/// The debtor's first words, carried by the connection's hello.
#[derive(Clone, Debug, PartialEq)]
pub struct LaneHello {
    /// Who borrows.
    pub debtor: InstanceId,
    /// Shape of its KV; the creditor's pool must have the same.
    pub shape: KvShape,
    /// Query heads.
    pub heads: u32,
    /// Factor on the scores.
    pub scale: f32,
    /// Sliding window by layer, 0 for none; empty where no layer has one.
    pub windows: Vec<u32>,
    /// Most query rows of one exchange.
    pub max_rows: u32,
    /// Where the creditor writes partials.
    pub partial_key: RemoteKey,
    /// Where the creditor writes rBlocks that come home.
    pub landing_key: RemoteKey,
}

/// A message on an open lane.
#[derive(Clone, Debug, PartialEq)]
pub enum LaneMessage {
    /// Creditor → debtor: the lane is open.
    Accept {
        /// Where the debtor writes queries.
        query_key: RemoteKey,
        /// Where the debtor writes KV, at the blocks it was granted.
        pool_key: RemoteKey,
        /// Blocks of the creditor's pool; fixes the layer stride.
        blocks: u32,
    },
    /// Creditor → debtor: the lane cannot be opened.
    Refuse {
        /// Why, for people.
        reason: String,
    },
    /// Debtor → creditor: what the coming exchanges are about.
    Plan(StepPlan),
    /// Debtor → creditor: an rBlock that is to come home.
    Fetch(Fetch),
    /// Creditor → debtor: the rBlock of this ticket will not come.
    FetchRefused {
        /// Names the fetch.
        ticket: u64,
        /// Why, for people.
        reason: String,
    },
    /// Creditor → debtor: a step's plan or query was not honoured; no partial
    /// of this step will come.
    StepRefused {
        /// The step.
        step: u64,
        /// Why, for people.
        reason: String,
    },
}

/// Everything about a step that is the same in all its layers.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepPlan {
    /// The debtor's step number; grows by at least one.
    pub step: u64,
    /// rBlocks whose KV is complete: their bytes were written on this lane
    /// before this plan.
    pub placements: Vec<Placement>,
    /// Sequences in the order of their rows in the query slot.
    pub entries: Vec<PlanEntry>,
}

/// One rBlock that now lies with the creditor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placement {
    /// Under which loan.
    pub loan: LoanId,
    /// Physical block at the creditor.
    pub block: BlockIndex,
    /// Position in the sequence of its first token.
    pub position: u32,
    /// Tokens filled.
    pub tokens: u32,
}

/// An rBlock that a debtor wants back, and the landing slot that waits for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fetch {
    /// Names it; comes back in the slot's header.
    pub ticket: u64,
    /// Under which loan it lies.
    pub loan: LoanId,
    /// The loan's epoch as granted.
    pub epoch: u32,
    /// Physical block at the creditor.
    pub block: BlockIndex,
    /// The debtor's landing slot.
    pub slot: u8,
}

/// One sequence's part of a step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PlanEntry {
    /// Query rows, of consecutive positions.
    pub rows: u32,
    /// Position of the first.
    pub position: u32,
    /// The loans that hold its KV here.
    pub loans: Vec<LoanView>,
}

/// How much of a loan a step attends to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoanView {
    /// The loan.
    pub loan: LoanId,
    /// Its epoch as granted.
    pub epoch: u32,
    /// rBlocks placed under it, counted from the first placement.
    pub visible: u32,
}

impl LaneHello {
    /// Appends the encoding.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.put_u32(HELLO_MAGIC);
        out.put_u32(VERSION);
        out.put_u64(self.debtor.0);
        put_shape(out, &self.shape);
        out.put_u32(self.heads);
        out.put_f32(self.scale);
        out.put_count(self.windows.len());
        for &window in &self.windows {
            out.put_u32(window);
        }
        out.put_u32(self.max_rows);
        out.put_bytes(&self.partial_key.0);
        out.put_bytes(&self.landing_key.0);
    }

    /// Decodes and checks what can be checked without knowing the pool.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let mut r = Reader::new(bytes);
        if r.u32()? != HELLO_MAGIC {
            return Err(DecodeError::Invalid("not a lane hello"));
        }
        if r.u32()? != VERSION {
            return Err(DecodeError::Invalid("a lane hello of another version"));
        }
        let hello = Self {
            debtor: InstanceId(r.u64()?),
            shape: get_shape(&mut r)?,
            heads: r.u32()?,
            scale: r.f32()?,
            windows: r.list("windows", MAX_LAYERS, 4, Reader::u32)?,
            max_rows: r.u32()?,
            partial_key: get_key(&mut r)?,
            landing_key: get_key(&mut r)?,
        };
        r.finish()?;
        let (heads, kv_heads) = (hello.heads, hello.shape.kv_heads);
        if heads == 0 || heads > 4096 || heads % kv_heads != 0 {
            return Err(DecodeError::Invalid("query heads that KV heads do not divide"));
        }
        if !(hello.scale.is_finite() && hello.scale > 0.0) {
            return Err(DecodeError::Invalid("a score factor that is not a positive number"));
        }
        if !hello.windows.is_empty() && hello.windows.len() != hello.shape.layers as usize {
            return Err(DecodeError::Invalid("a list of windows that does not fit the layers"));
        }
        if hello.max_rows == 0 || hello.max_rows > 1 << 16 {
            return Err(DecodeError::Invalid("a row limit of 0 or over 65,536"));
        }
        Ok(hello)
    }
}

impl LaneMessage {
    /// Appends the encoding.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Accept { query_key, pool_key, blocks } => {
                out.put_u8(1);
                out.put_bytes(&query_key.0);
                out.put_bytes(&pool_key.0);
                out.put_u32(*blocks);
            }
            Self::Refuse { reason } => {
                out.put_u8(2);
                out.put_bytes(clip(reason));
            }
            Self::Plan(plan) => plan.encode(out),
            Self::StepRefused { step, reason } => {
                out.put_u8(4);
                out.put_u64(*step);
                out.put_bytes(clip(reason));
            }
            Self::Fetch(fetch) => {
                out.put_u8(5);
                out.put_u64(fetch.ticket);
                out.put_u32(fetch.loan.0);
                out.put_u32(fetch.epoch);
                out.put_u32(fetch.block);
                out.put_u8(fetch.slot);
            }
            Self::FetchRefused { ticket, reason } => {
                out.put_u8(6);
                out.put_u64(*ticket);
                out.put_bytes(clip(reason));
            }
        }
    }

    /// Decodes a message.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let mut r = Reader::new(bytes);
        let message = match r.u8()? {
            1 => Self::Accept { query_key: get_key(&mut r)?, pool_key: get_key(&mut r)?, blocks: r.u32()? },
            2 => Self::Refuse { reason: r.text("reason", MAX_REASON)? },
            3 => Self::Plan(StepPlan::decode_body(&mut r)?),
            4 => Self::StepRefused { step: r.u64()?, reason: r.text("reason", MAX_REASON)? },
            5 => Self::Fetch(Fetch {
                ticket: r.u64()?,
                loan: LoanId(r.u32()?),
                epoch: r.u32()?,
                block: r.u32()?,
                slot: r.u8()?,
            }),
            6 => Self::FetchRefused { ticket: r.u64()?, reason: r.text("reason", MAX_REASON)? },
            _ => return Err(DecodeError::Invalid("an unknown lane message")),
        };
        r.finish()?;
        Ok(message)
    }
}

impl StepPlan {
    /// Appends the encoding of [`LaneMessage::Plan`].
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.put_u8(3);
        out.put_u64(self.step);
        out.put_count(self.placements.len());
        for p in &self.placements {
            out.put_u32(p.loan.0);
            out.put_u32(p.block);
            out.put_u32(p.position);
            out.put_u32(p.tokens);
        }
        out.put_count(self.entries.len());
        for e in &self.entries {
            out.put_u32(e.rows);
            out.put_u32(e.position);
            out.put_count(e.loans.len());
            for l in &e.loans {
                out.put_u32(l.loan.0);
                out.put_u32(l.epoch);
                out.put_u32(l.visible);
            }
        }
    }

    fn decode_body(r: &mut Reader<'_>) -> Result<Self> {
        Ok(Self {
            step: r.u64()?,
            placements: r.list("placements", MAX_PLACEMENTS, 16, |r| {
                Ok(Placement { loan: LoanId(r.u32()?), block: r.u32()?, position: r.u32()?, tokens: r.u32()? })
            })?,
            entries: r.list("entries", MAX_ENTRIES, 12, |r| {
                Ok(PlanEntry {
                    rows: r.u32()?,
                    position: r.u32()?,
                    loans: r.list("loans", MAX_ENTRY_LOANS, 12, |r| {
                        Ok(LoanView { loan: LoanId(r.u32()?), epoch: r.u32()?, visible: r.u32()? })
                    })?,
                })
            })?,
        })
    }

    /// Query rows of all entries.
    pub fn rows(&self) -> usize {
        self.entries.iter().map(|e| e.rows as usize).sum()
    }
}

/// A KV shape in 20 bytes.
pub fn put_shape(out: &mut Vec<u8>, shape: &KvShape) {
    out.put_u32(shape.layers);
    out.put_u32(shape.kv_heads);
    out.put_u32(shape.head_dim);
    out.put_u32(shape.block_tokens);
    out.put_u32(match shape.dtype {
        KvDtype::Bf16 => 1,
        KvDtype::F16 => 2,
        KvDtype::F32 => 3,
        KvDtype::Fp8 => 4,
    });
}

/// A KV shape, refused where a size computed from it could be 0 or overflow.
pub fn get_shape(r: &mut Reader<'_>) -> Result<KvShape> {
    let shape = KvShape {
        layers: r.u32()?,
        kv_heads: r.u32()?,
        head_dim: r.u32()?,
        block_tokens: r.u32()?,
        dtype: match r.u32()? {
            1 => KvDtype::Bf16,
            2 => KvDtype::F16,
            3 => KvDtype::F32,
            4 => KvDtype::Fp8,
            _ => return Err(DecodeError::Invalid("an unknown KV element type")),
        },
    };
    let within = |v: u32, limit: u32| v >= 1 && v <= limit;
    if within(shape.layers, MAX_LAYERS as u32)
        && within(shape.kv_heads, 1024)
        && within(shape.head_dim, 1024)
        && within(shape.block_tokens, 4096)
    {
        Ok(shape)
    } else {
        Err(DecodeError::Invalid("a KV shape with a size of 0 or out of all proportion"))
    }
}

fn get_key(r: &mut Reader<'_>) -> Result<RemoteKey> {
    r.bytes("remote key", MAX_KEY).map(|k| RemoteKey(k.to_vec()))
}

fn clip(reason: &str) -> &[u8] {
    let mut end = reason.len().min(MAX_REASON);
    while !reason.is_char_boundary(end) {
        end -= 1;
    }
    &reason.as_bytes()[..end]
}

/// What a notification on a lane says: a slot was filled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotNotify {
    /// Queries lie in the creditor's slot.
    Query(u8),
    /// Partials lie in the debtor's slot.
    Partial(u8),
    /// An rBlock lies in the debtor's landing slot.
    Landed(u8),
}

impl SlotNotify {
    /// As the 32 bits that travel with the write.
    pub fn encode(self) -> Notify {
        Notify(match self {
            Self::Query(slot) => 0x5100 | u32::from(slot),
            Self::Partial(slot) => 0x5200 | u32::from(slot),
            Self::Landed(slot) => 0x5300 | u32::from(slot),
        })
    }

    /// From those bits, if they are ours.
    pub fn decode(notify: Notify) -> Option<Self> {
        let slot = (notify.0 & 0xff) as u8;
        match notify.0 & !0xff {
            0x5100 => Some(Self::Query(slot)),
            0x5200 => Some(Self::Partial(slot)),
            0x5300 => Some(Self::Landed(slot)),
            _ => None,
        }
    }
}

/// The first bytes of a filled slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotHeader {
    /// The debtor's step.
    pub step: u64,
    /// Layer of the exchange.
    pub layer: u32,
    /// Query rows that follow.
    pub rows: u32,
    /// In a partial: when the creditor took the query up, its monotonic clock
    /// in nanoseconds.
    pub taken_ns: u64,
    /// In a partial: when it posted the answer, same clock.
    pub answered_ns: u64,
}

impl SlotHeader {
    /// Bytes it takes; what follows is aligned for any vector width.
    pub const BYTES: usize = 64;
    const MAGIC: u32 = 0x536b_7644;

    /// As bytes.
    pub fn encode(&self) -> [u8; Self::BYTES] {
        let mut out = [0; Self::BYTES];
        out[0..4].copy_from_slice(&Self::MAGIC.to_le_bytes());
        out[4..8].copy_from_slice(&self.layer.to_le_bytes());
        out[8..16].copy_from_slice(&self.step.to_le_bytes());
        out[16..20].copy_from_slice(&self.rows.to_le_bytes());
        out[24..32].copy_from_slice(&self.taken_ns.to_le_bytes());
        out[32..40].copy_from_slice(&self.answered_ns.to_le_bytes());
        out
    }

    /// From bytes.
    pub fn decode(bytes: &[u8; Self::BYTES]) -> Result<Self> {
        let mut r = Reader::new(bytes);
        if r.u32()? != Self::MAGIC {
            return Err(DecodeError::Invalid("not a slot header"));
        }
        let (layer, step, rows) = (r.u32()?, r.u64()?, r.u32()?);
        r.u32()?;
        Ok(Self { step, layer, rows, taken_ns: r.u64()?, answered_ns: r.u64()? })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message() -> impl Strategy<Value = LaneMessage> {
        let key = prop::collection::vec(any::<u8>(), 0..=MAX_KEY).prop_map(RemoteKey);
        let placement = any::<(u32, u32, u32, u32)>().prop_map(|(l, block, position, tokens)| Placement {
            loan: LoanId(l),
            block,
            position,
            tokens,
        });
        let view =
            any::<(u32, u32, u32)>().prop_map(|(l, epoch, visible)| LoanView { loan: LoanId(l), epoch, visible });
        let entry = (any::<u32>(), any::<u32>(), prop::collection::vec(view, 0..4))
            .prop_map(|(rows, position, loans)| PlanEntry { rows, position, loans });
        let plan = (any::<u64>(), prop::collection::vec(placement, 0..6), prop::collection::vec(entry, 0..6))
            .prop_map(|(step, placements, entries)| LaneMessage::Plan(StepPlan { step, placements, entries }));
        prop_oneof![
            (key.clone(), key, any::<u32>()).prop_map(|(query_key, pool_key, blocks)| LaneMessage::Accept {
                query_key,
                pool_key,
                blocks
            }),
            "[a-zä ]{0,40}".prop_map(|reason| LaneMessage::Refuse { reason }),
            (any::<u64>(), "[a-z ]{0,40}").prop_map(|(step, reason)| LaneMessage::StepRefused { step, reason }),
            plan,
            any::<(u64, u32, u32, u32, u8)>().prop_map(|(ticket, loan, epoch, block, slot)| {
                LaneMessage::Fetch(Fetch { ticket, loan: LoanId(loan), epoch, block, slot })
            }),
            (any::<u64>(), "[a-z ]{0,40}").prop_map(|(ticket, reason)| LaneMessage::FetchRefused { ticket, reason }),
        ]
    }

    fn hello() -> LaneHello {
        LaneHello {
            debtor: InstanceId(7),
            shape: KvShape { layers: 2, kv_heads: 2, head_dim: 64, block_tokens: 16, dtype: KvDtype::Bf16 },
            heads: 6,
            scale: 0.125,
            windows: vec![0, 4096],
            max_rows: 320,
            partial_key: RemoteKey(vec![1, 2, 3]),
            landing_key: RemoteKey(vec![4, 5]),
        }
    }

    proptest! {
        #[test]
        fn every_message_comes_back_and_no_part_of_it_does(message in message(), cut in any::<prop::sample::Index>()) {
            let mut bytes = Vec::new();
            message.encode(&mut bytes);
            prop_assert_eq!(LaneMessage::decode(&bytes), Ok(message));
            prop_assert!(LaneMessage::decode(&bytes[..cut.index(bytes.len())]).is_err());
        }

        #[test]
        fn any_bytes_are_a_message_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut again = Vec::new();
            if let Ok(message) = LaneMessage::decode(&bytes) {
                message.encode(&mut again);
                prop_assert_eq!(again, bytes);
            }
        }
    }

    #[test]
    fn a_hello_that_cannot_be_served_is_refused() {
        let decode = |hello: &LaneHello| {
            let mut bytes = Vec::new();
            hello.encode(&mut bytes);
            LaneHello::decode(&bytes)
        };
        assert_eq!(decode(&hello()), Ok(hello()));
        let shape = hello().shape;
        let wrong = [
            LaneHello { heads: 5, ..hello() },
            LaneHello { heads: 0, ..hello() },
            LaneHello { scale: f32::NAN, ..hello() },
            LaneHello { windows: vec![1], ..hello() },
            LaneHello { max_rows: 0, ..hello() },
            LaneHello { max_rows: u32::MAX, ..hello() },
            LaneHello { shape: KvShape { layers: 0, ..shape }, ..hello() },
            LaneHello { shape: KvShape { head_dim: u32::MAX, ..shape }, ..hello() },
        ];
        for hello in wrong {
            assert!(decode(&hello).is_err(), "{hello:?}");
        }
    }

    #[test]
    fn slots_are_told_by_their_notifications() {
        for slot in [0, 1, 255] {
            for notify in [SlotNotify::Query(slot), SlotNotify::Partial(slot), SlotNotify::Landed(slot)] {
                assert_eq!(SlotNotify::decode(notify.encode()), Some(notify));
            }
        }
        assert_eq!(SlotNotify::decode(Notify(0)), None);
        let header = SlotHeader { step: 9, layer: 3, rows: 17, taken_ns: 5, answered_ns: 6 };
        assert_eq!(SlotHeader::decode(&header.encode()), Ok(header));
        assert!(SlotHeader::decode(&[0; SlotHeader::BYTES]).is_err());
    }
}
