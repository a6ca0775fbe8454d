//! Many receives in one system call, by io_uring.
//!
//! This is what io_uring is used for here, because it is what it was measured
//! to be good for: a hub that hears from many peers at once spends most of its
//! time entering the kernel. Sleeping stays with epoll, whose registration
//! costs nothing per message; io_uring's polls interrupt the spinning owner at
//! each arrival. See the transport's own page for the figures.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use io_uring::{IoUring, opcode, types};

/// Receives in one system call.
const ENTRIES: u32 = 64;

/// Below this many, plain calls are as fast.
pub(super) const WORTH: usize = 32;

pub(super) struct Batch {
    ring: IoUring,
}

impl Batch {
    /// None where the kernel has or allows no io_uring.
    pub fn new() -> Option<Self> {
        let ring = IoUring::builder().setup_coop_taskrun().build(ENTRIES).ok()?;
        let mut probe = io_uring::Probe::new();
        ring.submitter().register_probe(&mut probe).ok()?;
        probe.is_supported(opcode::Recv::CODE).then_some(Self { ring })
    }

    /// Receives once into each buffer from its socket, without blocking, and
    /// appends the results to `results` in the same order. The error means that
    /// the ring itself failed: it must be dropped, and with it what it did not
    /// submit; the results so far are valid.
    pub fn receive<'a>(
        &mut self,
        mut from: impl Iterator<Item = (BorrowedFd<'a>, &'a mut [u8])>,
        results: &mut Vec<io::Result<usize>>,
    ) -> io::Result<()> {
        loop {
            let first = results.len();
            for (socket, buffer) in from.by_ref().take(ENTRIES as usize) {
                let entry = opcode::Recv::new(types::Fd(socket.as_raw_fd()), buffer.as_mut_ptr(), buffer.len() as u32)
                    .flags(libc::MSG_DONTWAIT)
                    .build()
                    .user_data(results.len() as u64);
                // SAFETY: socket and buffer are borrowed for 'a, which outlives
                // this call, and the call returns only when every entry that
                // was submitted has completed: with MSG_DONTWAIT the kernel
                // completes each at once and keeps no reference.
                unsafe { self.ring.submission().push(&entry) }.map_err(io::Error::other)?;
                results.push(Err(io::ErrorKind::WouldBlock.into()));
            }
            let submitted = results.len() - first;
            if submitted == 0 {
                return Ok(());
            }
            self.submit(submitted, results)?;
        }
    }

    /// Submits, and collects that many completions.
    fn submit(&mut self, submitted: usize, results: &mut [io::Result<usize>]) -> io::Result<()> {
        let mut left = submitted;
        while left > 0 {
            let entered = self.ring.submit_and_wait(left);
            // First: what has completed counts, whatever became of the others.
            for completion in self.ring.completion() {
                let result = completion.result();
                if let Some(at) = results.get_mut(completion.user_data() as usize) {
                    *at = usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result));
                }
                left = left.saturating_sub(1);
            }
            match entered {
                Err(e) if !matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)) => return Err(e),
                _ => {}
            }
        }
        Ok(())
    }
}
