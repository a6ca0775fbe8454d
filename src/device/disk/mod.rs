//! Files read past their mapping, in order, into memory that a device reaches.
//!
//! A [`Reader`] has one stretch of memory and cuts a piece off it for each run of
//! bytes that it is asked for. Many reads are under way at once; pieces are
//! handed out in the order in which they were asked for, and given back in that
//! order, so that the stretch is a ring.
//!
//! What lies in the page cache is copied from there by threads. The rest comes
//! straight from the disk (`O_DIRECT`), by io_uring, and leaves nothing in the
//! cache. Where the kernel allows no io_uring the threads do that too; where the
//! filesystem takes no direct reads, all goes through the cache. Each is said once
//! in the log. A file that ends early is an error on all of these ways, as is
//! whatever the disk refuses, with the file's name and the place.

mod block;
mod cached;
mod file;
mod reader;
mod threads;
mod uring;

pub use file::{Stored, StoredFile};
pub use reader::{How, Reader, Room, Sums};

#[cfg(test)]
mod tests;
