//! The words of a link's shared memory: the one place where they are touched.
//!
//! The peer may write anything here at any time, so every access is atomic and
//! nothing read is believed before it is checked by the caller.
#![allow(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use crate::{Memory, Result};

/// Entries of one direction's ring.
pub(super) const ENTRIES: u32 = 256;
/// Bytes of an entry: one cache line.
pub(super) const ENTRY: usize = 64;
/// Bytes of one direction's byte ring.
pub(super) const BYTES: usize = 256 << 10;

/// Each word that one side writes and the other reads often has its own pair of
/// cache lines (they are fetched in pairs).
const LINE: usize = 128;
const BELLS: usize = 0;
const HEADS: usize = 2 * LINE;
const RINGS: usize = 4096;
const RING: usize = ENTRIES as usize * ENTRY;
const BYTE_RINGS: usize = RINGS + 2 * RING;

/// Bytes of a link's memory.
pub(super) const LINK: usize = BYTE_RINGS + 2 * BYTES;

/// One link's shared memory: two lanes, 0 from the side that connected to the
/// side that accepted, 1 back.
#[derive(Clone)]
pub(super) struct LinkMemory(Arc<Memory>);

impl LinkMemory {
    /// Lays a link over memory of at least [`LINK`] bytes.
    pub fn new(memory: Arc<Memory>) -> Option<Self> {
        (memory.len() >= LINK).then_some(Self(memory))
    }

    /// Non-zero while `side` sleeps; see [`bell`](super::bell).
    pub fn bell(&self, side: usize) -> &AtomicU64 {
        self.word(BELLS + (side & 1) * LINE)
    }

    /// How many entries of the lane its reader has consumed.
    pub fn head(&self, lane: usize) -> &AtomicU64 {
        self.word(HEADS + (lane & 1) * LINE)
    }

    /// A word (0 to 7) of a lane's entry; the index wraps.
    pub fn entry(&self, lane: usize, index: u32, word: usize) -> &AtomicU64 {
        let entry = (index % ENTRIES) as usize * ENTRY + (word & 7) * 8;
        self.word(RINGS + (lane & 1) * RING + entry)
    }

    /// Copies bytes into a lane's byte ring; they must fit behind `at`.
    pub fn put(&self, lane: usize, at: usize, from: &[u8]) -> Result<()> {
        self.0.write(BYTE_RINGS + (lane & 1) * BYTES + at, from)
    }

    /// Copies bytes out of a lane's byte ring.
    pub fn take(&self, lane: usize, at: usize, into: &mut [u8]) -> Result<()> {
        self.0.read(BYTE_RINGS + (lane & 1) * BYTES + at, into)
    }

    fn word(&self, at: usize) -> &AtomicU64 {
        debug_assert!(at.is_multiple_of(8) && at + 8 <= LINK);
        // SAFETY: every caller's `at` is a constant plus a masked index: a
        // multiple of 8 and inside LINK, which `new` found the memory to
        // cover; the mapping is page-aligned and lives as long as `self`. Both
        // processes access the word atomically only.
        unsafe { AtomicU64::from_ptr(self.0.as_ptr().add(at).cast()) }
    }
}
