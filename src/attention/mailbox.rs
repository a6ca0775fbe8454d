//! The memory that queries and partials land in.
//!
//! A lane has [`SLOTS`] query slots at the creditor and as many partial slots
//! at the debtor. A slot's life: the debtor fills the same-numbered slot of its
//! outbox, writes it to the creditor's inbox with a `Query` notification; the
//! creditor computes straight from its inbox into its outbox and writes that to
//! the debtor's inbox with a `Partial` notification, which also tells the
//! debtor that the slot is free again. Layer l+1 cannot start before layer l's
//! partials are merged, so a lane never has more than one exchange under way
//! and two slots are more than enough.
#![allow(unsafe_code)]

use std::sync::Arc;

use distkv_fabric::Memory;

use super::wire::SlotHeader;

/// Slots of a lane, each way.
pub const SLOTS: usize = 2;

/// Sizes of a lane's slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Query heads.
    pub heads: usize,
    /// Elements a head.
    pub head_dim: usize,
    /// Most query rows of one exchange.
    pub max_rows: usize,
}

impl Geometry {
    /// f32s of the queries (or of `o`) of one row.
    pub fn width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Bytes that travel for `rows` queries.
    pub fn query_bytes(&self, rows: usize) -> usize {
        SlotHeader::BYTES + rows * self.width() * 4
    }

    /// Bytes that travel for the partials of `rows` queries: `o`, then `lse`.
    pub fn partial_bytes(&self, rows: usize) -> usize {
        SlotHeader::BYTES + rows * (self.width() + self.heads) * 4
    }

    /// Bytes from one slot to the next; the same for queries and partials.
    pub fn stride(&self) -> usize {
        self.partial_bytes(self.max_rows).next_multiple_of(4096)
    }

    /// Offset of a slot in its mailbox.
    pub fn offset(&self, slot: u8) -> usize {
        slot as usize * self.stride()
    }
}

/// One side's slots of one direction.
pub struct Mailbox {
    memory: Arc<Memory>,
    geometry: Geometry,
}

impl Mailbox {
    /// Allocates [`SLOTS`] slots.
    pub fn new(geometry: Geometry) -> distkv_fabric::Result<Self> {
        Ok(Self { memory: Memory::new(SLOTS * geometry.stride())?, geometry })
    }

    /// The memory, to register.
    pub fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// Its sizes.
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// A slot's header, copied out before it is looked at.
    pub fn header(&self, slot: u8) -> crate::codec::Result<SlotHeader> {
        let mut raw = [0; SlotHeader::BYTES];
        let out_of_range = crate::codec::DecodeError::Invalid("a slot that does not exist");
        self.memory.read(self.geometry.offset(slot), &mut raw).map_err(|_| out_of_range)?;
        SlotHeader::decode(&raw)
    }

    /// Writes a slot's header.
    pub fn set_header(&mut self, slot: u8, header: &SlotHeader) {
        assert!((slot as usize) < SLOTS);
        self.memory.write(self.geometry.offset(slot), &header.encode()).expect("slots lie inside their mailbox");
    }

    /// The first `count` f32s of a slot's body.
    ///
    /// An inbox is written by the peer. Between its notification and our answer
    /// the protocol leaves the slot to us; a peer that writes all the same
    /// changes numbers that it alone gave and that only its own sequences see,
    /// and any bit pattern is an f32.
    pub fn floats(&self, slot: u8, count: usize) -> &[f32] {
        let start = self.body(slot, count);
        // SAFETY: in range and aligned to 64 bytes (`body` checks); see above
        // for concurrent writes.
        unsafe { std::slice::from_raw_parts(start, count) }
    }

    /// As [`floats`](Self::floats), to fill an outbox: its memory is exported to
    /// nobody, and the transport only reads it between post and arrival.
    pub fn floats_mut(&mut self, slot: u8, count: usize) -> &mut [f32] {
        let start = self.body(slot, count);
        // SAFETY: in range and aligned; `&mut self` is the only handle on it.
        unsafe { std::slice::from_raw_parts_mut(start, count) }
    }

    fn body(&self, slot: u8, count: usize) -> *mut f32 {
        assert!((slot as usize) < SLOTS && SlotHeader::BYTES + count * 4 <= self.geometry.stride());
        // SAFETY: the assertion keeps the range inside the mailbox's memory.
        unsafe { self.memory.as_ptr().add(self.geometry.offset(slot) + SlotHeader::BYTES).cast() }
    }
}
