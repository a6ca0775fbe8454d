//! One read: a run of a file's bytes on its way to memory.

#![allow(unsafe_code)]

use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::file::StoredFile;

/// How bytes come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Straight from the disk.
    Direct,
    /// Out of the page cache, where they lie.
    Cached,
    /// Through the page cache, since direct reads are refused.
    Through,
}

/// A run of bytes to be read. For the direct way `offset` and `to` are multiples
/// of the file's alignment, and so is `room`.
pub struct Block {
    /// The piece that it belongs to.
    pub piece: u64,
    pub file: Arc<StoredFile>,
    pub way: Way,
    /// Place of its first byte in the file.
    pub offset: u64,
    /// Bytes of memory at `to` that are its own.
    pub room: usize,
    /// Bytes that must come.
    pub need: usize,
    /// Of these, those that were asked for.
    pub asked: usize,
    /// Bytes that came.
    done: usize,
    to: *mut u8,
    /// What it failed with.
    pub failed: Option<String>,
}

// SAFETY: `to` points to memory that is this block's alone until it is done
// (`Block::new`).
unsafe impl Send for Block {}

/// What becomes of a read that has returned.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    /// It is done, well or not.
    Over,
    /// Something is missing: read again, as [`Block::rest`] says.
    Again,
    /// Direct reads are refused here: another way must be found.
    Refused(String),
}

impl Block {
    /// # Safety
    ///
    /// `room` bytes at `to` can be written, and are this block's alone until it has
    /// come back.
    pub unsafe fn new(
        piece: u64,
        file: &Arc<StoredFile>,
        way: Way,
        offset: u64,
        room: usize,
        need: usize,
        asked: usize,
        to: *mut u8,
    ) -> Self {
        assert!(0 < asked && asked <= need && need <= room, "a block of bytes");
        Self { piece, file: file.clone(), way, offset, room, need, asked, done: 0, to, failed: None }
    }

    /// What is to be read now: place in the file, address, bytes.
    pub fn rest(&self) -> (u64, *mut u8, usize) {
        let skip = self.skip();
        let len = if self.way == Way::Direct { self.room } else { self.need } - skip;
        (self.offset + skip as u64, self.to.wrapping_add(skip), len)
    }

    /// Bytes that are not read again: a direct read goes on at a multiple of the
    /// alignment.
    fn skip(&self) -> usize {
        match (self.way, self.file.direct()) {
            (Way::Direct, Ok(direct)) => self.done / direct.align * direct.align,
            _ => self.done,
        }
    }

    /// Takes in what a read of [`rest`](Self::rest) gave.
    pub fn advance(&mut self, result: io::Result<usize>) -> Next {
        let skip = self.skip();
        match result {
            Ok(read) if skip + read >= self.need => return Next::Over,
            // Not further than before: the file ends here.
            Ok(read) if skip + read <= self.done => {
                let end = self.offset + self.done as u64;
                self.fail(&format!("the file ends at byte {end}"));
            }
            Ok(read) => {
                self.done = skip + read;
                return Next::Again;
            }
            Err(error) => match error.raw_os_error() {
                Some(libc::EINTR | libc::EAGAIN) => return Next::Again,
                // What filesystems and drivers say that take no such read.
                Some(libc::EINVAL | libc::EOPNOTSUPP | libc::EFAULT | libc::ENOSYS) if self.way == Way::Direct => {
                    return Next::Refused(format!("a direct read of it was refused: {error}"));
                }
                _ => self.fail(&error.to_string()),
            },
        }
        Next::Over
    }

    fn fail(&mut self, what: &str) {
        let end = self.offset + self.need as u64;
        self.failed = Some(format!("{}: reading bytes {} to {end}: {what}", self.file.name(), self.offset));
    }

    /// All of it is to come another way, from its beginning.
    pub fn restart(&mut self, way: Way) {
        (self.way, self.done) = (way, 0);
    }

    /// Reads it in this thread, until it is done or refused.
    pub fn read(&mut self) -> Next {
        loop {
            let (offset, to, len) = self.rest();
            // SAFETY: inside the memory that is this block's (`new`), and plain bytes.
            let to = unsafe { std::slice::from_raw_parts_mut(to, len) };
            let result = match (self.way, self.file.direct()) {
                (Way::Direct, Ok(direct)) => direct.file.read_at(to, offset),
                (Way::Direct, Err(because)) => return Next::Refused(because.to_owned()),
                _ => self.file.buffered().read_at(to, offset),
            };
            match self.advance(result) {
                Next::Again => {}
                next => return next,
            }
        }
    }
}
