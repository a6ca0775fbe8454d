//! What can go wrong on the fabric, and whose turn it is then.

use crate::{Address, PeerId, RegionId};

/// Result of a fabric call.
pub type Result<T> = std::result::Result<T, Error>;

/// A fabric error. Unless a variant says otherwise nothing was posted and no
/// state changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The connection is not, or no longer, known.
    #[error("no connection {0:?}: it was closed or never made")]
    UnknownPeer(PeerId),
    /// The region is not registered.
    #[error("no region {0:?}: it was deregistered or never registered")]
    UnknownRegion(RegionId),
    /// A range reaches past the end of its region.
    #[error("range {offset}+{len} is outside a region of {size} bytes")]
    OutOfRange {
        /// First byte asked for.
        offset: u64,
        /// Bytes asked for.
        len: u64,
        /// Bytes there are.
        size: u64,
    },
    /// The payload of a send or hello is too long.
    #[error("a message of {0} bytes is over the limit of {limit}", limit = crate::MAX_SEND)]
    TooLong(usize),
    /// Too much is queued for this peer already: it does not read as fast as we
    /// post. Poll the transport until the queue has drained, then post again.
    #[error("{queued} bytes are queued for {peer:?}: poll, then post again")]
    Full {
        /// The slow peer.
        peer: PeerId,
        /// Bytes of messages and of write descriptors that wait for it.
        queued: usize,
    },
    /// A region registered for local use was asked for its key.
    #[error("region {0:?} is not registered for remote writes")]
    NotExported(RegionId),
    /// A key that this transport cannot have made.
    #[error("malformed remote key")]
    BadKey,
    /// An address of another transport or of no known form.
    #[error("cannot use the address {0}: {1}")]
    BadAddress(Address, &'static str),
    /// Nobody answers at the address.
    #[error("cannot connect to {0}: {1}")]
    Unreachable(Address, String),
    /// The peer closed the connection or its process ended.
    #[error("the peer closed the connection")]
    PeerGone,
    /// The network or a device gave the connection up.
    #[error("the connection was lost: {0}")]
    Lost(String),
    /// The peer broke the protocol; the connection was closed by us.
    #[error("protocol violation by the peer: {0}")]
    Protocol(String),
    /// An accelerator refused a copy to or from its memory.
    #[error("the device refused a copy: {0}")]
    Device(String),
    /// A transport that this machine cannot offer.
    #[error("{transport} cannot be used: {because}")]
    Unavailable {
        /// Its name.
        transport: &'static str,
        /// What is missing and, where known, how to come by it.
        because: String,
    },
    /// The peer was refused in the handshake, or a record of it did not open;
    /// the connection was closed by us.
    #[error("the peer was refused: {0}")]
    Refused(crate::secure::Refused),
    /// Our own operating system refused something.
    #[error("{what}: {errno}")]
    Os {
        /// What was being done.
        what: &'static str,
        /// The system's error.
        errno: String,
    },
}

impl Error {
    /// An operating-system error while doing `what`.
    pub(crate) fn os(what: &'static str, errno: impl std::fmt::Display) -> Self {
        Self::Os { what, errno: errno.to_string() }
    }
}
