//! The two system calls of the data path, on region memory: `sendmsg` and
//! `readv`. Region bytes go between socket and memory without a slice being
//! made of them, since devices and peers may change them meanwhile.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::Memory;

/// How many parts one call takes.
pub(super) const MAX_PARTS: usize = 64;

/// One run of bytes to send.
#[derive(Clone, Copy)]
pub(super) enum Part<'a> {
    /// Plain bytes.
    Bytes(&'a [u8]),
    /// `len` bytes of a region from an offset.
    Region(&'a Memory, usize, usize),
}

impl Part<'_> {
    fn iovec(&self) -> io::Result<libc::iovec> {
        match *self {
            Part::Bytes(bytes) => Ok(libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() }),
            Part::Region(memory, offset, len) => region(memory, offset, len),
        }
    }
}

const NOTHING: libc::iovec = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };

fn region(memory: &Memory, offset: usize, len: usize) -> io::Result<libc::iovec> {
    if offset.checked_add(len).is_none_or(|end| end > memory.len()) {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    // SAFETY: `offset` is at most the mapping's length.
    let base = unsafe { memory.as_ptr().add(offset) };
    Ok(libc::iovec { iov_base: base.cast(), iov_len: len })
}

/// Sends what the socket takes of up to [`MAX_PARTS`] parts, without blocking.
/// Returns the bytes taken.
pub(super) fn send(socket: BorrowedFd<'_>, parts: &[Part<'_>]) -> io::Result<usize> {
    let mut vectors = [NOTHING; MAX_PARTS];
    let count = parts.len().min(MAX_PARTS);
    for (vector, part) in vectors.iter_mut().zip(parts) {
        *vector = part.iovec()?;
    }
    // SAFETY: all-zero is a valid msghdr: no name, no control data.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = vectors.as_mut_ptr();
    message.msg_iovlen = count as _;
    loop {
        // SAFETY: the vectors describe live memory, borrowed for this call.
        let n = unsafe { libc::sendmsg(socket.as_raw_fd(), &message, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) };
        if n >= 0 {
            return Ok(n as usize);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// Receives without blocking: first into `len` bytes of a region, if one is
/// given, then into `buffer`. Returns the bytes received; 0 is the end.
pub(super) fn receive(
    socket: BorrowedFd<'_>,
    target: Option<(&Memory, usize, usize)>,
    buffer: &mut [u8],
) -> io::Result<usize> {
    let tail = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    let (vectors, count) = match target {
        Some((memory, offset, len)) => ([region(memory, offset, len)?, tail], 2),
        None => ([tail, NOTHING], 1),
    };
    loop {
        // SAFETY: the vectors describe memory that is ours to write: `buffer`
        // is borrowed mutably; the region's range was opened to this peer, and
        // its users know that its bytes change under them.
        let n = unsafe {
            if count == 1 {
                libc::recv(socket.as_raw_fd(), vectors[0].iov_base, vectors[0].iov_len, libc::MSG_DONTWAIT)
            } else {
                libc::readv(socket.as_raw_fd(), vectors.as_ptr(), count)
            }
        };
        if n >= 0 {
            return Ok(n as usize);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}
