//! The fabric: how bytes travel between DistKV nodes.
//!
//! A [`Transport`] has two verbs. [`send`](Transport::send) carries a small
//! message; [`write`](Transport::write) places bytes in memory that the peer
//! has exported and, if asked, hands the peer a 32-bit [`Notify`] once they are
//! there. There is no remote read.
//!
//! **The contract, in one sentence:** one thread owns a transport; what it
//! posts to one peer arrives once and in the order posted, a notification
//! arrives only after every byte posted to that peer before it, and whatever
//! goes wrong with a peer ends as exactly one [`Event::Closed`], after which
//! nothing more from that connection is seen.
//!
//! Every transport passes the one suite in `tests/suite.rs`.

mod door;
mod error;
#[doc(hidden)]
pub mod frame;
mod gpu;
mod key;
pub mod loopback;
mod memory;
mod pages;
mod peers;
mod regions;
pub mod secure;
pub mod select;
pub mod shm;
mod stats;
pub mod tcp;
pub mod verbs;

use std::sync::Arc;
use std::time::Duration;

pub use error::{Error, Result};
pub use gpu::{Dmabuf, GpuRange};
pub use memory::Memory;
pub use pages::Pages;
pub use stats::Stats;

/// Largest payload of [`Transport::send`] and of a connection's hello, bytes.
pub const MAX_SEND: usize = 1 << 20;

/// How much may be queued for one peer, in bytes: a message counts with its
/// payload and header, a write only with its descriptor. A post beyond it is
/// refused with [`Error::Full`], except that an empty queue takes any post.
pub const QUEUE_LIMIT: usize = 8 << 20;

/// A connection, as the transport that owns it names it. Never reused within
/// one transport, so an event of a closed connection cannot be mistaken for
/// one of its successor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PeerId(pub u64);

/// A registered region of local memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RegionId(pub u32);

/// 32 bits that a write delivers to the peer together with its data (the
/// immediate of RDMA WRITE WITH IMMEDIATE).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Notify(pub u32);

/// Where others reach a transport: `tcp://host:port`, `shm:///path/of/socket`,
/// `loopback://name`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Address(pub String);

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a peer needs to write into one of our regions. Opaque, at most 64
/// bytes, made by [`Transport::remote_key`] and carried to the peer over an
/// authenticated channel.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RemoteKey(pub Vec<u8>);

/// Decides, write by write, whether a peer may place bytes in a region. Asked
/// by the transports in which the receiver sees a write before it lands
/// (tcp, loopback); where it cannot be asked (shm), the file permissions of
/// the memory and of the socket stand in its place.
pub trait WriteGuard: Send + Sync {
    /// May the peer that said `hello` when it connected write
    /// `[offset, offset + len)`? The range is inside the region.
    fn may_write(&self, hello: &[u8], offset: u64, len: u64) -> bool;
}

/// What remote peers may do with a registered region.
#[derive(Clone)]
pub enum Access {
    /// A source of our own writes only.
    LocalOnly,
    /// Any connected peer that holds the key may write anywhere in it.
    RemoteWrite,
    /// A peer that holds the key may write where the guard allows.
    Guarded(Arc<dyn WriteGuard>),
}

/// One write: `len` bytes from `local` at `local_offset` to the region behind
/// `remote` at `remote_offset`. The source bytes must stay as they are until
/// [`Transport::pending`] for the peer has returned to zero or the protocol
/// above proves their arrival.
#[derive(Clone, Copy, Debug)]
pub struct Write<'a> {
    /// Source region.
    pub local: RegionId,
    /// First source byte.
    pub local_offset: u64,
    /// Bytes to place.
    pub len: u64,
    /// Target region's key, as the peer exported it.
    pub remote: &'a RemoteKey,
    /// First target byte.
    pub remote_offset: u64,
    /// Told to the peer once the data, and everything posted to it before, is
    /// in place.
    pub notify: Option<Notify>,
}

/// What [`Transport::poll`] yields.
#[derive(Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// A connection we asked for is usable.
    Connected {
        /// The connection, as `connect` named it.
        peer: PeerId,
    },
    /// A peer connected to us.
    Accepted {
        /// The new connection.
        peer: PeerId,
        /// What it said of itself; untrusted.
        hello: &'a [u8],
    },
    /// A message; untrusted.
    Message {
        /// Who sent it.
        peer: PeerId,
        /// Its payload.
        payload: &'a [u8],
    },
    /// A peer's write with notification has landed.
    Notified {
        /// Who wrote.
        peer: PeerId,
        /// What it said with it.
        notify: Notify,
    },
    /// The connection is gone; nothing more will come from it.
    Closed {
        /// The connection.
        peer: PeerId,
        /// Why.
        reason: Error,
    },
}

/// A fabric transport. See the crate's first page for the contract.
pub trait Transport: Send {
    /// `tcp`, `shm`, `loopback` …
    fn name(&self) -> &'static str;

    /// Where peers connect to this transport.
    fn address(&self) -> Address;

    /// Makes memory known, as a source of writes and, if `access` says so, as
    /// a target of peers' writes.
    fn register(&mut self, memory: &Arc<Memory>, access: Access) -> Result<RegionId>;

    /// Forgets a region. Writes by peers that still hold its key are refused
    /// from now on (their connection is closed) wherever the transport sees
    /// them before they land.
    fn deregister(&mut self, region: RegionId) -> Result<()>;

    /// The key that lets a peer write into `region`; an error where the region
    /// was registered [`Access::LocalOnly`].
    fn remote_key(&self, region: RegionId) -> Result<RemoteKey>;

    /// Starts to connect; `hello` (at most [`MAX_SEND`] bytes) is handed to the
    /// other side with its `Accepted`. Ends in `Connected` or `Closed`; posts
    /// made before are queued.
    fn connect(&mut self, address: &Address, hello: &[u8]) -> Result<PeerId>;

    /// Closes a connection. The other side sees `Closed`; this side sees
    /// nothing more of it. What is still queued here is dropped.
    fn disconnect(&mut self, peer: PeerId);

    /// Posts a message of at most [`MAX_SEND`] bytes; copied before return.
    /// [`Error::Full`] where the peer lags by more than [`QUEUE_LIMIT`].
    fn send(&mut self, peer: PeerId, payload: &[u8]) -> Result<()>;

    /// Posts a write. Errors are those the caller can mend (unknown peer or
    /// region, range outside the region, queue full); what the network does to
    /// it shows as `Closed`.
    fn write(&mut self, peer: PeerId, write: Write<'_>) -> Result<()>;

    /// Writes to `peer` whose source bytes are still needed.
    fn pending(&self, peer: PeerId) -> usize;

    /// Moves the transport along and hands every event that is ready to
    /// `sink`, without blocking. Returns how many.
    fn poll(&mut self, sink: &mut dyn FnMut(Event<'_>)) -> Result<usize>;

    /// Sleeps until [`poll`](Self::poll) may have something to do, a
    /// [`Waker`] is used, or `timeout` has passed. May return early.
    fn wait(&mut self, timeout: Duration) -> Result<()>;

    /// Ends a [`wait`](Self::wait) from another thread.
    fn waker(&self) -> Waker;
}

/// Ends a transport's [`wait`](Transport::wait) from any thread.
#[derive(Clone)]
pub struct Waker(Arc<dyn Fn() + Send + Sync>);

impl Waker {
    /// A waker that calls `wake`.
    pub fn new(wake: impl Fn() + Send + Sync + 'static) -> Self {
        Self(Arc::new(wake))
    }

    /// Wakes the owner if it waits; otherwise its next wait returns at once.
    pub fn wake(&self) {
        (self.0)();
    }
}
