//! Direct reads by io_uring: many under way, one system call for many.

#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsRawFd;

use io_uring::{IoUring, Probe, opcode, types};

use super::block::{Block, Next};
use super::threads::Outcome;

/// A ring, and the blocks that it was given.
pub struct Uring {
    ring: IoUring,
    /// What the kernel works on, by place.
    flying: Vec<Option<Block>>,
    free: Vec<usize>,
    /// What it has no room for yet.
    backlog: VecDeque<Block>,
}

impl Uring {
    /// A ring for so many reads at once. The error says why the kernel gives none.
    pub fn new(depth: usize) -> io::Result<Self> {
        let depth = depth.clamp(1, 4096);
        let ring = IoUring::builder().setup_coop_taskrun().build(depth as u32)?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        if !probe.is_supported(opcode::Read::CODE) {
            return Err(io::Error::other("its io_uring does not read (Linux 5.6 does)"));
        }
        let flying = std::iter::repeat_with(|| None).take(depth).collect();
        Ok(Self { ring, flying, free: (0..depth).collect(), backlog: VecDeque::new() })
    }

    /// Takes a block; it is read from the next [`turn`](Self::turn) on.
    pub fn push(&mut self, block: Block) {
        self.backlog.push_back(block);
    }

    /// Nothing is under way or waits.
    pub fn is_idle(&self) -> bool {
        self.backlog.is_empty() && self.is_landed()
    }

    fn is_landed(&self) -> bool {
        self.free.len() == self.flying.len()
    }

    /// Gives the kernel what it has room for, and collects what is done into
    /// `outcomes`; with `wait`, waits until that is something, if anything is under
    /// way. The error means that the ring itself failed.
    pub fn turn(&mut self, wait: bool, outcomes: &mut Vec<Outcome>) -> io::Result<()> {
        loop {
            self.fill(outcomes)?;
            let want = usize::from(wait && outcomes.is_empty() && !self.is_landed());
            let entered = self.ring.submit_and_wait(want);
            self.collect(outcomes);
            match entered {
                Err(e) if !matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)) => return Err(e),
                _ => {}
            }
            // A read that came short goes on; a wait may have been broken off.
            let again = wait && outcomes.is_empty() && !self.is_idle();
            if !again && (self.backlog.is_empty() || self.free.is_empty()) {
                return Ok(());
            }
        }
    }

    fn fill(&mut self, outcomes: &mut Vec<Outcome>) -> io::Result<()> {
        while !self.free.is_empty() {
            let Some(block) = self.backlog.pop_front() else { return Ok(()) };
            let file = match block.file.direct() {
                Ok(direct) => direct.file.as_raw_fd(),
                Err(because) => {
                    let refused = Next::Refused(because.to_owned());
                    outcomes.push((block, refused));
                    continue;
                }
            };
            let (offset, to, len) = block.rest();
            let Some(place) = self.free.pop() else { return Ok(()) };
            // The kernel reads at most 2 GiB at once; what is missing is asked for again.
            let len = len.min(1 << 30) as u32;
            let entry = opcode::Read::new(types::Fd(file), to, len).offset(offset).build().user_data(place as u64);
            self.flying[place] = Some(block);
            // SAFETY: the block owns the memory and keeps the file open, and it stays
            // in `flying` until the kernel has said that it is done with both.
            let pushed = unsafe { self.ring.submission().push(&entry) };
            if pushed.is_err() {
                // As many entries as places: this does not happen, and would lose nothing.
                self.backlog.extend(self.flying[place].take());
                self.free.push(place);
                return Err(io::Error::other("io_uring took no more reads"));
            }
        }
        Ok(())
    }

    fn collect(&mut self, outcomes: &mut Vec<Outcome>) {
        for completion in self.ring.completion() {
            let place = completion.user_data() as usize;
            let Some(mut block) = self.flying.get_mut(place).and_then(Option::take) else { continue };
            self.free.push(place);
            let result = completion.result();
            match block.advance(usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result))) {
                Next::Again => self.backlog.push_front(block),
                next => outcomes.push((block, next)),
            }
        }
    }

    /// Forgets what was not begun and waits for the rest. The error means that the
    /// kernel may write to blocks' memory still.
    pub fn drain(&mut self) -> io::Result<()> {
        let mut outcomes = Vec::new();
        while !self.is_landed() {
            self.backlog.clear();
            self.turn(true, &mut outcomes)?;
            outcomes.clear();
        }
        self.backlog.clear();
        Ok(())
    }
}
