//! The record that a sealed connection is sending. Frames are poured into it,
//! it is sealed where it lies, and only when the socket has taken all of it is
//! the next one made: so its memory serves all of them.

use std::io;
use std::os::fd::BorrowedFd;

use super::io::send_run;
use super::outbox::taken;
use crate::Memory;
use crate::secure::record::HEADER;
use crate::secure::{Kind, MAX_PLAIN, OVERHEAD, Sealer};

/// Memory to begin with; small messages need no more.
const SMALL: usize = 2048;

pub(super) struct Sealing {
    sealer: Sealer,
    room: Vec<u8>,
    /// Content of the record in the making.
    filled: usize,
    /// What the socket has not taken of the sealed one.
    start: usize,
    end: usize,
}

impl Sealing {
    pub fn new(sealer: Sealer) -> Self {
        Self { sealer, room: Vec::new(), filled: 0, start: 0, end: 0 }
    }

    /// Has the socket taken the whole record?
    pub fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// Bytes that the socket has not taken.
    pub fn len(&self) -> usize {
        self.end - self.start
    }

    /// Begins a record for `content` bytes, or as many as a record holds.
    pub fn begin(&mut self, content: usize) {
        let wanted = content.min(MAX_PLAIN) + OVERHEAD;
        if self.room.len() < wanted {
            let size = wanted.next_power_of_two().clamp(SMALL, MAX_PLAIN + OVERHEAD);
            self.room.resize(size, 0);
        }
        self.filled = 0;
    }

    /// How much more the record holds.
    pub fn left(&self) -> usize {
        self.room.len().saturating_sub(OVERHEAD + self.filled)
    }

    /// Pours in the front of `bytes`; returns how many.
    pub fn pour(&mut self, bytes: &[u8]) -> usize {
        let n = bytes.len().min(self.left());
        let at = HEADER + self.filled;
        self.room[at..at + n].copy_from_slice(&bytes[..n]);
        self.filled += n;
        n
    }

    /// Pours in the front of a region's bytes; returns how many.
    pub fn pour_region(&mut self, memory: &Memory, offset: usize, len: usize) -> io::Result<usize> {
        let n = len.min(self.left());
        let at = HEADER + self.filled;
        memory.read(offset, &mut self.room[at..at + n]).map_err(io::Error::other)?;
        self.filled += n;
        Ok(n)
    }

    /// Seals what was poured in.
    pub fn seal(&mut self) -> io::Result<()> {
        let sealed = self.sealer.seal_in_place(Kind::Data, self.filled, &mut self.room);
        (self.start, self.end) = (0, sealed.map_err(io::Error::other)?);
        Ok(())
    }

    /// Sends what the socket takes; is that all?
    pub fn send(&mut self, socket: BorrowedFd<'_>) -> io::Result<bool> {
        if !self.is_empty() {
            self.start += taken(send_run(socket, &self.room[self.start..self.end]))?;
        }
        Ok(self.is_empty())
    }
}
