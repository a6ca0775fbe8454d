//! A weight file mapped into memory, read once and given back page by page.

#![allow(unsafe_code)]

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use memmap2::{Mmap, UncheckedAdvice};

use crate::device::disk::StoredFile;
use crate::model::error::{ModelError, Result};

/// A read-only mapping of a whole file. The pages are the file's: they cost
/// memory only between being read and being [`release`](Self::release)d.
pub struct Mapping {
    map: Mmap,
    file: Arc<StoredFile>,
}

impl Mapping {
    /// Maps `path`.
    ///
    /// As with every mapped file, a file that another process truncates while
    /// it is being read kills this one (SIGBUS); weight files are not edited in
    /// place.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|e| ModelError::io(path, e))?;
        let meta = file.metadata().map_err(|e| ModelError::io(path, e))?;
        if !meta.is_file() {
            return Err(ModelError::file(&path.display().to_string(), "not a regular file"));
        }
        if meta.len() == 0 {
            return Err(ModelError::file(&path.display().to_string(), "the file is empty"));
        }
        // SAFETY: the mapping is private and read-only. Bytes may change under
        // us only if someone edits the weights in place, which would give wrong
        // numbers but no invalid value: everything read from it is plain bytes
        // whose ranges were checked against the mapping's own length.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| ModelError::io(path, e))?;
        Ok(Self { map, file: Arc::new(StoredFile::new(file, path.display().to_string())) })
    }

    /// For messages.
    pub fn name(&self) -> &str {
        self.file.name()
    }

    /// The file itself, to be read rather than mapped.
    pub fn file(&self) -> &Arc<StoredFile> {
        &self.file
    }

    /// What the file holds.
    pub fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// Drops the whole pages inside `start .. start + len` from this process's
    /// memory. Reading them again reads the file again.
    pub fn release(&self, start: usize, len: usize) {
        let page = rustix::param::page_size();
        let end = start.saturating_add(len).min(self.map.len()) / page * page;
        let start = start.div_ceil(page) * page;
        if start >= end {
            return;
        }
        // SAFETY: MADV_DONTNEED discards changes, and this mapping is read-only
        // and file-backed, so a later read sees the file's bytes as before.
        let released = unsafe { self.map.unchecked_advise_range(UncheckedAdvice::DontNeed, start, end - start) };
        if let Err(error) = released {
            // Costs memory, nothing else.
            tracing::debug!(file = self.name(), %error, "pages kept");
        }
    }
}
