//! Events behind a file: it is readable while there are some.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::ffi::c_int;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::state::{Hca, lock, set_errno};

/// Events that wait, and an eventfd whose counter is not zero while they do. All
/// is done under the global lock, so that no read of the counter ever blocks.
pub struct Mailbox<T> {
    fd: OwnedFd,
    queue: VecDeque<T>,
}

impl<T> Mailbox<T> {
    /// `None`, with errno set, without a file.
    pub fn new() -> Option<Self> {
        // SAFETY: no pointers.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
        // SAFETY: a file that nobody else has.
        (fd >= 0).then(|| Self { fd: unsafe { OwnedFd::from_raw_fd(fd) }, queue: VecDeque::with_capacity(64) })
    }

    pub fn fd(&self) -> c_int {
        self.fd.as_raw_fd()
    }

    /// Each event is written to the file, so that those who are told of edges
    /// hear of all.
    pub fn push(&mut self, event: T) {
        self.queue.push_back(event);
        let one = 1u64.to_ne_bytes();
        // SAFETY: eight readable bytes.
        let written = unsafe { libc::write(self.fd(), one.as_ptr().cast(), one.len()) };
        assert_eq!(written, 8, "software HCA: an eventfd takes no event");
    }

    pub fn pop(&mut self) -> Option<T> {
        let event = self.queue.pop_front()?;
        self.quieten();
        Some(event)
    }

    /// Drops events unseen.
    pub fn retain(&mut self, keep: impl FnMut(&T) -> bool) {
        if !self.queue.is_empty() {
            self.queue.retain(keep);
            self.quieten();
        }
    }

    fn quieten(&mut self) {
        if self.queue.is_empty() {
            let mut count = [0u8; 8];
            // SAFETY: eight writable bytes. The counter is not zero, for there
            // was an event.
            let read = unsafe { libc::read(self.fd(), count.as_mut_ptr().cast(), count.len()) };
            assert_eq!(read, 8, "software HCA: an eventfd lost its events");
        }
    }
}

/// Takes the next event as a read of `fd` would: waits for one, or sets errno to
/// `EAGAIN` if the file is set not to block. `take` looks for one.
pub fn next<T>(fd: c_int, mut take: impl FnMut(&mut Hca) -> Option<T>) -> Option<T> {
    loop {
        if let Some(event) = take(&mut lock()) {
            return Some(event);
        }
        // SAFETY: no pointers.
        let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
        if flags < 0 {
            return None;
        }
        if flags & libc::O_NONBLOCK != 0 {
            set_errno(libc::EAGAIN);
            return None;
        }
        let mut file = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        // SAFETY: one writable struct. Interrupted like a blocking read.
        if unsafe { libc::poll(&mut file, 1, -1) } < 0 {
            return None;
        }
    }
}
