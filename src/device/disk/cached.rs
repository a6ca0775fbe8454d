//! How much of a file lies in the page cache.

#![allow(unsafe_code)]

use std::fs::File;
use std::hash::{BuildHasher, RandomState};
use std::io::IoSliceMut;
use std::ops::Range;
use std::os::fd::AsRawFd;

use rustix::io::ReadWriteFlags;
use rustix::mm::{MapFlags, ProtFlags};

use super::file::StoredFile;

/// The same number on every architecture.
const SYS_CACHESTAT: libc::c_long = 451;
/// Pages looked at where the kernel does not count.
const SAMPLES: u64 = 16;

/// How much of a range is cached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Share {
    /// Nothing.
    None,
    /// Something.
    Some,
    /// Every page.
    All,
}

#[repr(C)]
struct CacheRange {
    offset: u64,
    len: u64,
}

#[repr(C)]
#[derive(Default)]
struct CacheCounts {
    cached: u64,
    dirty: u64,
    writeback: u64,
    evicted: u64,
    recently_evicted: u64,
}

/// Looks into the page cache, in the way that works here.
pub struct Looker {
    /// The kernel counts pages (Linux 6.5), and tells this user.
    counts: bool,
    page: u64,
}

impl Looker {
    pub fn new() -> Self {
        Self { counts: true, page: rustix::param::page_size() as u64 }
    }

    /// As on a kernel that does not count.
    #[cfg(test)]
    pub fn that_samples() -> Self {
        Self { counts: false, ..Self::new() }
    }

    /// How much of `range`, which is not empty, is cached.
    pub fn look(&mut self, file: &StoredFile, range: Range<u64>) -> Share {
        let pages = range.end.div_ceil(self.page) - range.start / self.page;
        if self.counts {
            match count(file.file(), &range) {
                Some(0) if file.is_counted() => return Share::None,
                // The pages of a file in an overlay are the file's below, which a mapping
                // finds.
                Some(0) => match self.resident(file.file(), &range) {
                    0 => {
                        file.count_is(0);
                        return Share::None;
                    }
                    cached => return share(cached, pages),
                },
                Some(cached) => {
                    file.count_is(cached);
                    return share(cached, pages);
                }
                None => self.counts = false,
            }
        }
        self.sample(file, range)
    }

    /// Pages of a range that a mapping of it would find in the cache; 0 where it
    /// cannot be mapped. For a user whom the kernel counts for: to others it says
    /// that all are.
    pub(super) fn resident(&self, file: &File, range: &Range<u64>) -> u64 {
        let offset = range.start / self.page * self.page;
        let len = (range.end - offset) as usize;
        let mut found = vec![0u8; len.div_ceil(self.page as usize)];
        // SAFETY: a new mapping aliases nothing; it is not read, and is gone before
        // this returns. One byte is written for each of its pages.
        unsafe {
            let flags = (ProtFlags::READ, MapFlags::SHARED);
            let Ok(at) = rustix::mm::mmap(std::ptr::null_mut(), len, flags.0, flags.1, file, offset) else { return 0 };
            let looked = libc::mincore(at, len, found.as_mut_ptr());
            let unmapped = rustix::mm::munmap(at, len);
            debug_assert!(unmapped.is_ok(), "it was mapped just now");
            if looked != 0 {
                return 0;
            }
        }
        found.iter().map(|page| u64::from(page & 1)).sum()
    }

    /// Asks for single bytes that must not be waited for, one somewhere in each part
    /// of the range. A page that is not there may be fetched for that, but none
    /// beside it; so the places are others each time.
    fn sample(&self, file: &StoredFile, range: Range<u64>) -> Share {
        let (len, chance) = (range.end - range.start, RandomState::new());
        let (mut there, mut all) = (0, 0);
        for part in 0..SAMPLES.min(len) {
            let (from, to) = (len * part / SAMPLES.min(len), len * (part + 1) / SAMPLES.min(len));
            let place = range.start + from + chance.hash_one(part) % (to - from);
            let mut byte = [0];
            let read =
                rustix::io::preadv2(file.buffered(), &mut [IoSliceMut::new(&mut byte)], place, ReadWriteFlags::NOWAIT);
            there += u64::from(read == Ok(1));
            all += 1;
        }
        share(there, all)
    }
}

fn share(cached: u64, pages: u64) -> Share {
    match cached {
        0 => Share::None,
        cached if cached >= pages => Share::All,
        _ => Share::Some,
    }
}

/// Pages of a range that are cached; `None` where the kernel does not say.
pub fn count(file: &File, range: &Range<u64>) -> Option<u64> {
    let asked = CacheRange { offset: range.start, len: range.end - range.start };
    let mut counts = CacheCounts::default();
    // SAFETY: the kernel reads the one struct and writes the other, both as it
    // defines them, during the call.
    let result = unsafe { libc::syscall(SYS_CACHESTAT, file.as_raw_fd(), &raw const asked, &raw mut counts, 0) };
    (result == 0).then_some(counts.cached)
}
