//! The unix socket beside a link: it carries the files of shared memory, wakes
//! a sleeping peer, and its end is the peer's end.
//!
//! A packet is 24 bytes, little-endian, with at most one file:
//!
//! | bytes | what |
//! |---|---|
//! | 0..8 | `dkvshm` and the version, u16 |
//! | 8..12 | kind: 1 link (with its file), 2 region (with its file), 3 bell |
//! | 12..16 | region, or 0 |
//! | 16..24 | bytes of the file, or 0 |

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketAddrUnix, SocketFlags, SocketType, sockopt,
};

use crate::{Error, Result};

const MAGIC: [u8; 8] = [b'd', b'k', b'v', b's', b'h', b'm', 1, 0];
const LEN: usize = 24;
/// Strangers that may wait to be accepted.
const BACKLOG: i32 = 1024;

/// A decoded packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packet {
    /// The memory of a new link.
    Link {
        /// Bytes of it.
        size: u64,
    },
    /// The memory of a region that was asked for.
    Region {
        /// Its number.
        region: u32,
        /// Bytes of it.
        size: u64,
    },
    /// Wake up.
    Bell,
}

/// A packet's bytes.
pub fn encode(packet: &Packet) -> [u8; LEN] {
    let (kind, region, size) = match *packet {
        Packet::Link { size } => (1u32, 0, size),
        Packet::Region { region, size } => (2, region, size),
        Packet::Bell => (3, 0, 0),
    };
    let mut bytes = [0; LEN];
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..12].copy_from_slice(&kind.to_le_bytes());
    bytes[12..16].copy_from_slice(&region.to_le_bytes());
    bytes[16..].copy_from_slice(&size.to_le_bytes());
    bytes
}

/// Reads a packet. The error names what is wrong with it.
pub fn decode(bytes: &[u8]) -> std::result::Result<Packet, &'static str> {
    let bytes: &[u8; LEN] = bytes.try_into().map_err(|_| "a packet of another length")?;
    if bytes[..8] != MAGIC {
        return Err("not this version of the DistKV shared-memory protocol");
    }
    let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    let size = u64::from(word(16)) | u64::from(word(20)) << 32;
    match (word(8), word(12), size) {
        (1, 0, size) => Ok(Packet::Link { size }),
        (2, region, size) => Ok(Packet::Region { region, size }),
        (3, 0, 0) => Ok(Packet::Bell),
        _ => Err("unknown kind of packet"),
    }
}

/// A socket that listens at `path`, and has the name only once it does.
pub(super) fn listen(path: &Path) -> Result<OwnedFd> {
    let os = |e| Error::os("listening for peers on this host", e);
    let hidden = path.with_extension("new");
    let socket = plain().map_err(os)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(&hidden).map_err(os)?).map_err(os)?;
    rustix::net::listen(&socket, BACKLOG).map_err(os)?;
    std::fs::rename(&hidden, path).map_err(|e| Error::os("listening for peers on this host", e))?;
    Ok(socket)
}

/// A socket connected to the one at `path`, which must be of our own user.
pub(super) fn connect(path: &Path) -> std::result::Result<OwnedFd, Errno> {
    let socket = plain()?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    if is_ours(&socket) { Ok(socket) } else { Err(Errno::PERM) }
}

/// A socket that is connected to nobody.
pub(super) fn plain() -> std::result::Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
}

/// The next stranger, if one is there and of our own user.
pub(super) fn accept(listener: &OwnedFd) -> std::result::Result<Option<OwnedFd>, Errno> {
    let socket = rustix::net::accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?;
    Ok(is_ours(&socket).then_some(socket))
}

fn is_ours(socket: &OwnedFd) -> bool {
    sockopt::socket_peercred(socket).is_ok_and(|peer| peer.uid == rustix::process::geteuid())
}

/// Sends a packet without blocking.
pub(super) fn send(socket: &OwnedFd, packet: &Packet, file: Option<BorrowedFd<'_>>) -> std::result::Result<(), Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let files = file.map(|file| [file]);
    if let Some(files) = &files {
        control.push(SendAncillaryMessage::ScmRights(files));
    }
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    rustix::net::sendmsg(socket, &[IoSlice::new(&encode(packet))], &mut control, flags).map(drop)
}

/// What a look at a socket found.
pub(super) enum Received {
    Nothing,
    End,
    Packet(Packet, Option<OwnedFd>),
}

/// Receives a packet without blocking.
pub(super) fn receive(socket: &OwnedFd) -> Result<Received> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut bytes = [0; LEN + 1];
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let received = rustix::net::recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags);
    let len = match received {
        Ok(message) => message.bytes,
        Err(Errno::AGAIN | Errno::INTR) => return Ok(Received::Nothing),
        Err(_) => return Ok(Received::End),
    };
    let mut file = None;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(files) = message {
            file = files.last();
        }
    }
    if len == 0 {
        return Ok(Received::End);
    }
    let packet = decode(&bytes[..len.min(bytes.len())]).map_err(|what| Error::Protocol(what.into()))?;
    Ok(Received::Packet(packet, file))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn whatever_decodes_encodes_to_the_same_bytes(kind in 0u8..5, tail: [u8; 15], raw in prop::collection::vec(any::<u8>(), 0..40)) {
            let mut bytes = MAGIC.to_vec();
            bytes.push(kind);
            bytes.extend([0; 3]);
            bytes.extend(&tail[..12]);
            for bytes in [bytes, raw] {
                if let Ok(packet) = decode(&bytes) {
                    prop_assert_eq!(&encode(&packet)[..], &bytes[..]);
                }
            }
        }
    }

    #[test]
    fn every_packet_survives_its_encoding() {
        for packet in [Packet::Link { size: 1 << 33 }, Packet::Region { region: 3, size: u64::MAX }, Packet::Bell] {
            assert_eq!(decode(&encode(&packet)), Ok(packet));
        }
    }
}
