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

/// Sends what the socket takes of one run of bytes, without blocking. Returns
/// the bytes taken. Cheaper for the kernel than a list of parts.
pub(super) fn send_run(socket: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<usize> {
    let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
    // SAFETY: `bytes` is live memory, borrowed for this call.
    retry(|| unsafe { libc::send(socket.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), flags) })
}

/// The result of a system call, which is made again when a signal broke it off.
fn retry(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        match call() {
            n if n >= 0 => return Ok(n as usize),
            _ => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
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
    let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
    // SAFETY: the vectors describe live memory, borrowed for this call.
    retry(|| unsafe { libc::sendmsg(socket.as_raw_fd(), &message, flags) })
}

/// Receives without blocking: first into `len` bytes of a region, if one is
/// given, then into `buffer`. Returns the bytes received; 0 is the end.
pub(super) fn receive(
    socket: BorrowedFd<'_>,
    target: Option<(&Memory, usize, usize)>,
    buffer: &mut [u8],
) -> io::Result<usize> {
    let tail = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    let Some((memory, offset, len)) = target else {
        // SAFETY: `buffer` is borrowed mutably for this call.
        return retry(|| unsafe { libc::recv(socket.as_raw_fd(), tail.iov_base, tail.iov_len, libc::MSG_DONTWAIT) });
    };
    let vectors = [region(memory, offset, len)?, tail];
    // SAFETY: `buffer` as above; the region's range was opened to this peer,
    // and its users know that its bytes change under them. The socket is
    // non-blocking.
    retry(|| unsafe { libc::readv(socket.as_raw_fd(), vectors.as_ptr(), 2) })
}
