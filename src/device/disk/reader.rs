//! The reader: pieces of a ring of memory, filled in order.

#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::io;
use std::mem::ManuallyDrop;
use std::ops::Range;
use std::sync::Arc;

use super::block::{Block, Next, Way};
use super::cached::{Looker, Share};
use super::file::{ALIGN, Stored, StoredFile};
use super::threads::{Outcome, Threads};
use super::uring::Uring;

/// Memory that is read into: it stays where it is, and nobody else touches it
/// while a reader has it.
///
/// # Safety
///
/// `pointer` is that of `len` bytes that can be written, at a multiple of 4096,
/// as long as the value lives, wherever it is moved.
pub unsafe trait Room {
    /// Its first byte.
    fn pointer(&self) -> *mut u8;
    /// Its bytes.
    fn size(&self) -> usize;
}

/// How to read.
#[derive(Clone, Copy, Debug)]
pub struct How {
    /// Most bytes of one read.
    pub block: usize,
    /// Direct reads under way at once.
    pub depth: usize,
    /// Threads that copy out of the page cache.
    pub threads: usize,
    /// Use io_uring where the kernel allows it.
    pub io_uring: bool,
    /// Read past the page cache where the filesystem allows it.
    pub direct: bool,
}

impl Default for How {
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self { block: 1 << 20, depth: 128, threads: cores.clamp(2, 16), io_uring: true, direct: true }
    }
}

/// Bytes that were read, by their way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sums {
    /// Straight from the disk.
    pub direct: u64,
    /// Out of the page cache, where they lay.
    pub cached: u64,
    /// Through the page cache, as direct reads were refused.
    pub through: u64,
    /// Out of memory of the process.
    pub copied: u64,
}

impl Sums {
    /// All of them.
    pub fn total(&self) -> u64 {
        self.direct + self.cached + self.through + self.copied
    }
}

struct Piece {
    /// What it takes of the room.
    taken: Range<usize>,
    /// Its bytes, inside.
    bytes: Range<usize>,
    /// Blocks that io_uring and the threads have not brought yet.
    flying: usize,
    working: usize,
    failed: Option<String>,
}

/// Reads runs of bytes in order. See the module's page.
pub struct Reader<M: Room> {
    room: ManuallyDrop<M>,
    /// Not given back yet, oldest first: `handed` that were handed out, then those
    /// that are being read.
    pieces: VecDeque<Piece>,
    handed: usize,
    /// Number of the oldest.
    first: u64,
    how: How,
    looker: Looker,
    uring: Option<Uring>,
    threads: Option<Threads>,
    outcomes: Vec<Outcome>,
    sums: Sums,
    said: bool,
}

impl<M: Room> Reader<M> {
    /// A reader into `room`.
    pub fn new(room: M, how: How) -> io::Result<Self> {
        assert!(room.pointer().addr().is_multiple_of(ALIGN), "memory of whole pages");
        let how = How { block: how.block.next_multiple_of(ALIGN).max(ALIGN), ..how };
        let uring = match (how.direct && how.io_uring).then(|| Uring::new(how.depth)) {
            None => None,
            Some(Ok(uring)) => Some(uring),
            Some(Err(error)) => {
                tracing::info!(%error, threads = how.threads, "io_uring cannot be used: threads read from the disk");
                None
            }
        };
        Ok(Self {
            room: ManuallyDrop::new(room),
            pieces: VecDeque::new(),
            handed: 0,
            first: 0,
            how,
            looker: Looker::new(),
            uring,
            threads: Some(Threads::start(how.threads)?),
            outcomes: Vec::new(),
            sums: Sums::default(),
            said: false,
        })
    }

    /// The memory.
    pub fn room(&self) -> &M {
        &self.room
    }

    /// Bytes that were read so far.
    pub fn sums(&self) -> Sums {
        self.sums
    }

    /// Most bytes of a piece: two of them fit whatever their alignment.
    pub fn most(&self) -> usize {
        (self.room.size() / 2 / ALIGN * ALIGN).saturating_sub(2 * ALIGN)
    }

    /// Begins to read `len` bytes from `from` on. False where there is no room: the
    /// oldest piece must be given back first.
    pub fn begin(&mut self, from: Stored<'_>, len: usize) -> Result<bool, String> {
        assert!(0 < len && len <= self.most(), "a piece of {len} bytes, of {} at most", self.most());
        let Some(end) = from.offset.checked_add(len as u64) else {
            return Err(format!("{}: no file has bytes {} and {len} more", from.file.name(), from.offset));
        };
        let direct = if self.how.direct { from.file.direct().map(|d| d.align) } else { Err("") };
        let align = direct.unwrap_or(ALIGN) as u64;
        let outer = from.offset / align * align..end.next_multiple_of(align);
        let room = (outer.end - outer.start) as usize;
        let Some(at) = self.place(room, align as usize) else {
            if self.pieces.is_empty() {
                return Err(format!(
                    "{}: direct reads of multiples of {align} bytes need more memory",
                    from.file.name()
                ));
            }
            return Ok(false);
        };
        let head = (from.offset - outer.start) as usize;
        let number = self.first + self.pieces.len() as u64;
        self.pieces.push_back(Piece {
            taken: at..at + room,
            bytes: at + head..at + head + len,
            flying: 0,
            working: 0,
            failed: None,
        });
        let because = direct.err().map(str::to_owned);
        let share = self.looker.look(from.file, from.offset..end);
        let step = self.how.block as u64;
        let mut start = outer.start;
        while start < end {
            // Cut where the file's own blocks end.
            let next = (start / step * step).saturating_add(step).max(start + align).min(outer.end) / align * align;
            let inner = start.max(from.offset)..next.min(end);
            let cached = match share {
                Share::Some => self.looker.look(from.file, inner.clone()) == Share::All,
                share => share == Share::All,
            };
            let way = match &because {
                _ if cached => Way::Cached,
                None => Way::Direct,
                Some(because) => {
                    self.say(from.file, because);
                    Way::Through
                }
            };
            let (offset, last) = if way == Way::Direct { (start, next) } else { (inner.start, inner.end) };
            let to = self.room.pointer().wrapping_add(at + (offset - outer.start) as usize);
            let (room, need) = ((last - offset) as usize, (inner.end - offset) as usize);
            let asked = (inner.end - inner.start) as usize;
            // SAFETY: the place was found free, blocks of a piece do not overlap, and a
            // piece is handed out only when all of its blocks have come back. The room
            // is not given up before (`drop`).
            let block = unsafe { Block::new(number, from.file, way, offset, room, need, asked, to) };
            self.give(block);
            start = next;
        }
        self.gather(false).map(|()| true)
    }

    /// As [`begin`](Self::begin), of bytes that lie in this process's memory.
    pub fn copy(&mut self, from: &[u8]) -> bool {
        assert!(!from.is_empty() && from.len() <= self.most(), "a piece of {} bytes", from.len());
        let room = from.len().next_multiple_of(ALIGN);
        let Some(at) = self.place(room, ALIGN) else { return false };
        // SAFETY: the place was found free and inside the room; the source is
        // another memory, as nobody else has the room.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), self.room.pointer().wrapping_add(at), from.len()) };
        self.sums.copied += from.len() as u64;
        let bytes = at..at + from.len();
        self.pieces.push_back(Piece { taken: at..at + room, bytes, flying: 0, working: 0, failed: None });
        true
    }

    /// Where in the room the oldest piece lies that was not handed out yet, once it
    /// has been read. `None`: with `wait`, if there is none; else also if it is still
    /// on its way.
    pub fn next(&mut self, wait: bool) -> Result<Option<Range<usize>>, String> {
        loop {
            let Some(piece) = self.pieces.get_mut(self.handed) else { return Ok(None) };
            if piece.flying + piece.working == 0 {
                if let Some(failed) = piece.failed.take() {
                    return Err(failed);
                }
                self.handed += 1;
                return Ok(Some(piece.bytes.clone()));
            }
            self.gather(wait)?;
            let piece = &self.pieces[self.handed];
            if !wait && piece.flying + piece.working > 0 {
                return Ok(None);
            }
        }
    }

    /// The bytes of a piece that was handed out and not given back, as
    /// [`next`](Self::next) gave it.
    pub fn bytes(&self, piece: &Range<usize>) -> &[u8] {
        assert!(self.pieces.iter().take(self.handed).any(|p| p.bytes == *piece), "a piece that is out");
        // SAFETY: inside the room, read whole, and nobody writes to it before it is
        // given back, which needs `self` alone.
        unsafe { std::slice::from_raw_parts(self.room.pointer().wrapping_add(piece.start), piece.len()) }
    }

    /// Gives the oldest piece back, which was handed out.
    pub fn give_back(&mut self) {
        assert!(self.handed > 0, "no piece is out");
        self.pieces.pop_front();
        self.handed -= 1;
        self.first += 1;
    }

    /// Pieces handed out and not given back.
    pub fn handed(&self) -> usize {
        self.handed
    }

    /// Pieces asked for and not handed out.
    pub fn waiting(&self) -> usize {
        self.pieces.len() - self.handed
    }

    /// A free place of `len` bytes behind the newest piece, or at the beginning.
    fn place(&self, len: usize, align: usize) -> Option<usize> {
        let base = self.room.pointer().addr();
        let aligned = |at: usize| (base + at).next_multiple_of(align) - base;
        let (Some(oldest), Some(newest)) = (self.pieces.front(), self.pieces.back()) else {
            return (aligned(0) + len <= self.room.size()).then_some(aligned(0));
        };
        let (tail, head) = (oldest.taken.start, newest.taken.end);
        // The newest lies before the oldest: all between them is free.
        if newest.taken.start < tail {
            return (aligned(head) + len <= tail).then_some(aligned(head));
        }
        if aligned(head) + len <= self.room.size() {
            return Some(aligned(head));
        }
        (aligned(0) + len <= tail).then_some(aligned(0))
    }

    fn say(&mut self, file: &StoredFile, because: &str) {
        if !std::mem::replace(&mut self.said, true) && self.how.direct {
            tracing::info!(file = file.name(), because, "read through the page cache");
        }
    }

    /// Hands a block to whoever reads it.
    fn give(&mut self, block: Block) {
        let index = (block.piece - self.first) as usize;
        let Some(piece) = self.pieces.get_mut(index) else { return };
        match (&mut self.uring, &self.threads) {
            (Some(uring), _) if block.way == Way::Direct => {
                piece.flying += 1;
                uring.push(block);
            }
            (_, Some(threads)) => {
                piece.working += 1;
                threads.push(block);
            }
            (_, None) => piece.failed = Some("the reader has ended".into()),
        }
    }

    /// Takes in what has been read; with `wait`, waits for something of the oldest
    /// piece that is being read.
    fn gather(&mut self, wait: bool) -> Result<(), String> {
        let mut outcomes = std::mem::take(&mut self.outcomes);
        while let Some(outcome) = self.threads.as_ref().and_then(|threads| threads.take(false)) {
            self.settle(outcome, false);
        }
        let (flying, working) = self.pieces.get(self.handed).map_or((0, 0), |p| (p.flying, p.working));
        if let Some(uring) = self.uring.as_mut().filter(|uring| !uring.is_idle()) {
            let turned = uring.turn(wait && flying > 0, &mut outcomes);
            outcomes.drain(..).for_each(|outcome| self.settle(outcome, true));
            turned.map_err(|error| format!("io_uring: {error}"))?;
        }
        self.outcomes = outcomes;
        if wait && flying == 0 && working > 0 {
            match self.threads.as_ref().and_then(|threads| threads.take(true)) {
                Some(outcome) => self.settle(outcome, false),
                None => return Err("the threads that read have ended".into()),
            }
        }
        Ok(())
    }

    fn settle(&mut self, (mut block, next): Outcome, flew: bool) {
        let index = (block.piece - self.first) as usize;
        let Some(piece) = self.pieces.get_mut(index) else { return };
        *if flew { &mut piece.flying } else { &mut piece.working } -= 1;
        match next {
            Next::Refused(because) => {
                // Once for all that is still to come of this file.
                let file: Arc<StoredFile> = block.file.clone();
                self.say(&file, &because);
                file.refuse(because);
                block.restart(Way::Through);
                self.give(block);
            }
            _ if block.failed.is_some() => piece.failed = piece.failed.take().or(block.failed),
            _ => {
                *match block.way {
                    Way::Direct => &mut self.sums.direct,
                    Way::Cached => &mut self.sums.cached,
                    Way::Through => &mut self.sums.through,
                } += block.asked as u64;
            }
        }
    }
}

impl<M: Room> Drop for Reader<M> {
    fn drop(&mut self) {
        // No thread writes from here on.
        self.threads = None;
        let landed = self.uring.as_mut().map_or(Ok(()), Uring::drain);
        match landed {
            // SAFETY: dropped once, here, and nobody reads into it any more.
            Ok(()) => unsafe { ManuallyDrop::drop(&mut self.room) },
            // The kernel may write to it still: it is never given back.
            Err(error) => tracing::error!(%error, "io_uring failed: memory that it was reading into is kept"),
        }
    }
}
