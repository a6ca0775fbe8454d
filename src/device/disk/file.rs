//! A file to read from, by way of the page cache or past it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};

use rustix::fs::{Advice, AtFlags, OFlags, StatxFlags};

/// Direct reads begin and end at multiples of this, in the file and in memory, or
/// of what the filesystem asks for where that is more.
pub const ALIGN: usize = 4096;
/// Looks after which it is believed that none of a file's pages are cached.
const BELIEVED: u32 = 4;
/// A filesystem that asks for more is read through the page cache.
const MOST_ALIGN: usize = 1 << 20;

/// Where a run of bytes lies.
#[derive(Clone, Copy, Debug)]
pub struct Stored<'a> {
    /// The file.
    pub file: &'a Arc<StoredFile>,
    /// Bytes before it.
    pub offset: u64,
}

/// An open file.
#[derive(Debug)]
pub struct StoredFile {
    name: String,
    file: File,
    buffered: OnceLock<File>,
    direct: OnceLock<Result<Direct, String>>,
    /// Why direct reads were given up, although the file could be opened for them.
    refused: OnceLock<String>,
    /// Looks at the page cache that spoke for the kernel's count of this file's pages.
    counted: AtomicU32,
}

/// The same file, opened for direct reads.
#[derive(Debug)]
pub struct Direct {
    pub file: File,
    /// Reads begin and end at multiples of this.
    pub align: usize,
}

impl StoredFile {
    /// Opens `path`.
    pub fn open(path: &Path) -> io::Result<Self> {
        Ok(Self::new(File::open(path)?, path.display().to_string()))
    }

    /// An open file, `name` for messages.
    pub fn new(file: File, name: String) -> Self {
        Self {
            name,
            file,
            buffered: OnceLock::new(),
            direct: OnceLock::new(),
            refused: OnceLock::new(),
            counted: AtomicU32::new(0),
        }
    }

    /// For messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// As it was opened.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Fills `to` from `offset` on. The error names file and place.
    pub fn read(&self, to: &mut [u8], offset: u64) -> Result<(), String> {
        let end = offset + to.len() as u64;
        self.buffered().read_exact_at(to, offset).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => format!("{}: the file ends before byte {end}", self.name),
            _ => format!("{}: reading bytes {offset} to {end}: {error}", self.name),
        })
    }

    /// The same file, for reads through the page cache that bring nothing but what
    /// they ask for.
    pub(super) fn buffered(&self) -> &File {
        if let Some(file) = self.buffered.get() {
            return file;
        }
        let opened = self.again(OFlags::empty()).and_then(|file| {
            rustix::fs::fadvise(&file, 0, None, Advice::Random)?;
            Ok(file)
        });
        match opened {
            Ok(file) => self.buffered.get_or_init(|| file),
            // Without /proc there is no second handle: more may be read than is asked for.
            Err(_) => &self.file,
        }
    }

    /// The same file for direct reads, or why there are none.
    pub(super) fn direct(&self) -> Result<&Direct, &str> {
        if let Some(because) = self.refused.get() {
            return Err(because);
        }
        self.direct.get_or_init(|| self.open_direct()).as_ref().map_err(String::as_str)
    }

    /// Direct reads do not work after all.
    pub(super) fn refuse(&self, because: String) {
        let _ = self.refused.set(because);
    }

    /// That the kernel counts no page of the file in the cache can be believed.
    pub(super) fn is_counted(&self) -> bool {
        self.counted.load(Ordering::Relaxed) >= BELIEVED
    }

    /// The kernel counted so many pages, and nothing spoke against it.
    pub(super) fn count_is(&self, pages: u64) {
        let looks = if pages > 0 { BELIEVED } else { 1 };
        self.counted.fetch_add(looks, Ordering::Relaxed);
    }

    /// The same file, opened once more.
    fn again(&self, flags: OFlags) -> io::Result<File> {
        let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        OpenOptions::new().read(true).custom_flags(flags.bits() as i32).open(path)
    }

    fn open_direct(&self) -> Result<Direct, String> {
        let refused = |error: io::Error| format!("it takes no direct reads: {error}");
        let file = self.again(OFlags::DIRECT).map_err(refused)?;
        let asked = rustix::fs::statx(&file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN);
        let align = match asked {
            Ok(found) if found.stx_mask & StatxFlags::DIOALIGN.bits() != 0 => {
                (found.stx_dio_mem_align as usize).max(found.stx_dio_offset_align as usize)
            }
            // An older kernel, or a filesystem that does not say: the block of nearly all.
            _ => ALIGN,
        };
        match align {
            0 => Err("its filesystem takes no direct reads of it".into()),
            align if align.is_power_of_two() && align <= MOST_ALIGN => Ok(Direct { file, align: align.max(ALIGN) }),
            align => Err(format!("its filesystem takes direct reads of multiples of {align} bytes only")),
        }
    }
}
