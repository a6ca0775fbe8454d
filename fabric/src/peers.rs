//! Connections by [`PeerId`]: an array whose indices are part of the id, so
//! that a post finds its connection without hashing.

use crate::{Error, PeerId, Result};

/// Low bits of an id: the slot. The others count connections ever made.
const SLOT_BITS: u32 = 20;

/// The connections of one transport.
pub(crate) struct Peers<C> {
    slots: Vec<Option<(PeerId, C)>>,
    free: Vec<usize>,
    made: u64,
}

impl<C> Default for Peers<C> {
    fn default() -> Self {
        Self { slots: Vec::new(), free: Vec::new(), made: 0 }
    }
}

impl<C> Peers<C> {
    pub fn insert(&mut self, connection: C) -> Result<PeerId> {
        let slot = self.free.pop().unwrap_or(self.slots.len());
        if slot >= 1 << SLOT_BITS {
            return Err(Error::os("adding a connection", "2^20 are open"));
        }
        self.made += 1;
        let id = PeerId(self.made << SLOT_BITS | slot as u64);
        if slot == self.slots.len() {
            self.slots.push(None);
        }
        self.slots[slot] = Some((id, connection));
        Ok(id)
    }

    pub fn get(&self, id: PeerId) -> Option<&C> {
        match self.slots.get(slot(id)) {
            Some(Some((at, connection))) if *at == id => Some(connection),
            _ => None,
        }
    }

    #[inline]
    pub fn get_mut(&mut self, id: PeerId) -> Result<&mut C> {
        match self.slots.get_mut(slot(id)) {
            Some(Some((at, connection))) if *at == id => Ok(connection),
            _ => Err(Error::UnknownPeer(id)),
        }
    }

    pub fn remove(&mut self, id: PeerId) -> Option<C> {
        let connection = self.take(id)?;
        self.release(id);
        Some(connection)
    }

    /// Lends a connection out; its place is kept until it is
    /// [put](Self::put) back or [released](Self::release).
    pub fn take(&mut self, id: PeerId) -> Option<C> {
        self.get(id)?;
        self.slots[slot(id)].take().map(|(_, connection)| connection)
    }

    /// Puts back what was lent out.
    pub fn put(&mut self, id: PeerId, connection: C) {
        self.slots[slot(id)] = Some((id, connection));
    }

    /// Gives up the place of a connection that was lent out.
    pub fn release(&mut self, id: PeerId) {
        self.free.push(slot(id));
    }

    /// How many slots there are: indices for [`at`](Self::at).
    pub fn slots(&self) -> usize {
        self.slots.len()
    }

    /// The connection in a slot.
    pub fn at(&mut self, slot: usize) -> Option<(PeerId, &mut C)> {
        match self.slots.get_mut(slot) {
            Some(Some((id, connection))) => Some((*id, connection)),
            _ => None,
        }
    }

    pub fn iter_mut(&mut self) -> impl Iterator<Item = (PeerId, &mut C)> {
        self.slots.iter_mut().flatten().map(|(id, connection)| (*id, connection))
    }

    pub fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }
}

/// The slot of an id.
fn slot(id: PeerId) -> usize {
    (id.0 & ((1 << SLOT_BITS) - 1)) as usize
}
