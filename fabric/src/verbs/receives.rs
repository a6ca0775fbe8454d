//! The receives that a rail's peers fill: buffers of one length behind one
//! shared receive queue.
//!
//! Each connection adds as many as it may fill ([`CREDITS`] and a few for the
//! return of credits), so that a peer within its credits always meets one. When
//! the connection is gone they stay for the next.

use std::sync::Arc;

use super::device::{Mr, MrAccess, Pd};
use super::objects::{CHAIN, Receive, Srq};
use crate::{Error, Memory, Result};

/// Bytes of a buffer: the longest piece of a message.
pub const BUFFER: usize = 8 << 10;

/// Receives that a peer may fill before it is told that some are free again.
pub const CREDITS: u16 = 32;

/// Receives kept for messages that return credits; how many can be under way at
/// most follows from what makes one due (see `credit.rs`).
pub const SPARE: u16 = 8;

/// At most so many free receives, of all connections together, wait until nothing
/// has arrived: an answer to what was just handed over goes before them.
pub const LATE: usize = 2;

/// Receives of a connection.
pub const PER_CONNECTION: usize = (CREDITS + SPARE) as usize;

struct Slab {
    memory: Arc<Memory>,
    mr: Mr,
}

/// Buffers, and which of them the device has.
pub struct Receives {
    srq: Arc<Srq>,
    slabs: Vec<Slab>,
    /// Most slabs.
    limit: usize,
    /// Connections that use some.
    users: usize,
    /// Free ones that are to be posted.
    idle: Vec<Receive>,
}

impl Receives {
    /// Without buffers; for at most `connections`.
    pub fn new(srq: &Arc<Srq>, connections: usize) -> Self {
        Self { srq: Arc::clone(srq), slabs: Vec::new(), limit: connections, users: 0, idle: Vec::new() }
    }

    /// One more connection: its buffers are posted.
    pub fn join(&mut self, pd: &Arc<Pd>) -> Result<()> {
        if self.users == self.limit {
            let what = format!("{} connections have all receives of this device; raise the peers limit", self.limit);
            return Err(Error::os("adding a connection", what));
        }
        if self.users == self.slabs.len() {
            let memory = Memory::new(PER_CONNECTION * BUFFER)?;
            let mr = Mr::register(pd, &memory, MrAccess::Local)?;
            let base = self.slabs.len() * PER_CONNECTION;
            let receive = |i: usize| Receive {
                id: (base + i) as u64,
                address: mr.address() + (i * BUFFER) as u64,
                len: BUFFER as u32,
                lkey: mr.lkey(),
            };
            self.idle.extend((0..PER_CONNECTION).map(receive));
            self.slabs.push(Slab { memory, mr });
        }
        self.users += 1;
        self.post()
    }

    /// A connection is gone.
    pub fn leave(&mut self) -> Result<()> {
        self.users -= 1;
        self.post()
    }

    /// Copies the bytes of a filled buffer to the front of `into`. `None` if
    /// there is no such buffer or it is not that long.
    pub fn read<'a>(&self, id: u64, len: u32, into: &'a mut [u8; BUFFER]) -> Option<&'a [u8]> {
        let (slab, at) = (id as usize / PER_CONNECTION, id as usize % PER_CONNECTION);
        let bytes = into.get_mut(..len as usize)?;
        self.slabs.get(slab)?.memory.read(at * BUFFER, bytes).ok()?;
        Some(bytes)
    }

    /// A buffer is free again; the device gets it with the next
    /// [`post`](Self::post).
    #[inline]
    pub fn give_back(&mut self, id: u64) {
        let (slab, at) = (id as usize / PER_CONNECTION, id as usize % PER_CONNECTION);
        if let Some(slab) = self.slabs.get(slab) {
            let address = slab.mr.address() + (at * BUFFER) as u64;
            self.idle.push(Receive { id, address, len: BUFFER as u32, lkey: slab.mr.lkey() });
        }
    }

    /// Posts what is free, unless it is so few that they can wait and something
    /// `arrived`.
    #[inline]
    pub fn follow(&mut self, arrived: bool) -> Result<()> {
        let free = self.idle.len();
        if free > LATE || (free > 0 && !arrived) { self.post() } else { Ok(()) }
    }

    /// Posts what is free.
    pub fn post(&mut self) -> Result<()> {
        while !self.idle.is_empty() {
            let from = self.idle.len().saturating_sub(CHAIN);
            self.srq.post(&self.idle[from..])?;
            self.idle.truncate(from);
        }
        Ok(())
    }
}
