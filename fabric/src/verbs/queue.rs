//! A connection's send queue: how many requests are under way, and what each of
//! them holds until it completes.
//!
//! Not every request is signalled; a completion speaks for all before it. The
//! queue never holds more than its depth, and every completion has room in the
//! queue's own completion queue, even when all fail at once.

use std::sync::Arc;

use arrayvec::ArrayVec;

use super::objects::{CHAIN, Channel, Cq, Path, Qp, Srq};
use super::request::{Request, Source, Work};
use super::sys::{IBV_WC_SUCCESS, IBV_WC_WR_FLUSH_ERR, ibv_wc};
use super::wire::Endpoint;
use crate::Result;

/// At most so many requests follow each other without a completion.
const SIGNAL_EVERY: u32 = 16;

/// Completions taken with one call.
const TAKE: usize = 16;

/// What a request holds until it is done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Holds {
    /// A write of the caller's ends with it: its source is free afterwards.
    pub write: bool,
    /// A slot of the send ring.
    pub slot: bool,
    /// A window: the peer is told of this region once it is bound.
    pub window: Option<u32>,
}

/// A request that failed: the device's status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failed(pub u32);

/// A queue pair's sending half.
pub struct SendQueue {
    qp: Qp,
    cq: Arc<Cq>,
    /// By the request's number, modulo its length, a power of two that is not below
    /// the depth.
    held: Box<[Holds]>,
    posted: u64,
    done: u64,
    /// Requests since the last signalled one.
    quiet: u32,
    failed: Option<Failed>,
    /// It was we who ended it.
    ended: bool,
}

/// Several requests that are posted with one call.
pub struct Batch<'a> {
    requests: ArrayVec<Request<'a>, CHAIN>,
    holds: ArrayVec<Holds, CHAIN>,
}

impl<'a> Batch<'a> {
    /// Without requests.
    pub fn new() -> Self {
        Self { requests: ArrayVec::new(), holds: ArrayVec::new() }
    }

    /// Adds a request, of [`CHAIN`] at most.
    pub fn push(&mut self, work: Work<'a>, source: Source<'a>, holds: Holds) {
        self.requests.push(Request { id: 0, work, source, signalled: false });
        self.holds.push(holds);
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.requests.len()
    }
}

impl SendQueue {
    /// A queue of `depth` requests on a new queue pair.
    pub fn new(
        pd: &Arc<super::device::Pd>,
        channel: &Arc<Channel>,
        srq: &Arc<Srq>,
        recv_cq: &Arc<Cq>,
        depth: u32,
    ) -> Result<Self> {
        // One more: a queue that is exactly full has been taken for overrun.
        let cq = Arc::new(Cq::new(channel, depth + 1)?);
        let qp = Qp::new(pd, srq, &cq, recv_cq, depth)?;
        let held = vec![Holds::default(); (qp.depth as usize).next_power_of_two()].into();
        Ok(Self { qp, cq, held, posted: 0, done: 0, quiet: 0, failed: None, ended: false })
    }

    /// The queue pair's number.
    pub fn number(&self) -> u32 {
        self.qp.number()
    }

    /// Bytes that a request may carry itself.
    pub fn inline(&self) -> usize {
        self.qp.inline as usize
    }

    /// Prepares the queue pair for `port`.
    pub fn initialise(&self, port: u8) -> Result<()> {
        self.qp.initialise(port)
    }

    /// Connects it.
    pub fn join(&self, path: &Path, peer: &Endpoint, first_psn: u32) -> Result<()> {
        self.qp.join(path, peer, first_psn)
    }

    /// Ends it: what is queued fails.
    pub fn fail(&mut self) -> Result<()> {
        self.ended = true;
        self.qp.fail()
    }

    /// Has the device ended it for what the peer asked of it? Nothing of ours has
    /// failed, as far as [`reap`](Self::reap) has seen, and we have not ended it.
    pub fn was_ended_by_peer(&self) -> bool {
        self.failed.is_none() && !self.ended && self.qp.has_ended()
    }

    /// Requests that may be posted now.
    #[inline]
    pub fn room(&self) -> usize {
        self.qp.depth as usize - (self.posted - self.done) as usize
    }

    /// Was a request found to have failed?
    #[inline]
    pub fn has_failed(&self) -> bool {
        self.failed.is_some()
    }

    /// Is a request under way?
    #[inline]
    pub fn busy(&self) -> bool {
        self.posted > self.done
    }

    /// Posts a batch with one call; it fits the [`room`](Self::room).
    pub fn post(&mut self, batch: &mut Batch<'_>) -> Result<()> {
        debug_assert!(batch.len() <= self.room());
        for (request, holds) in batch.requests.iter_mut().zip(&batch.holds) {
            (request.id, request.signalled) = self.hold(*holds);
        }
        self.qp.post(&batch.requests)
    }

    /// Posts one request; there is [`room`](Self::room) for it. In line with its
    /// caller, who knows what it is: nothing is asked of it then.
    #[inline(always)]
    pub fn post_one(&mut self, work: Work<'_>, source: Source<'_>, holds: Holds) -> Result<()> {
        debug_assert!(self.room() > 0);
        let (id, signalled) = self.hold(holds);
        self.qp.post_one(&Request { id, work, source, signalled })
    }

    /// The next request holds this: its number, and whether it is signalled.
    #[inline(always)]
    fn hold(&mut self, holds: Holds) -> (u64, bool) {
        self.quiet += 1;
        // What somebody waits for is signalled, and every so often another,
        // so that the queue's slots come back.
        let signalled = holds.write || holds.window.is_some() || self.quiet >= SIGNAL_EVERY;
        if signalled {
            self.quiet = 0;
        }
        let id = self.posted;
        let at = self.place(id);
        self.held[at] = holds;
        self.posted += 1;
        (id, signalled)
    }

    /// Where a request's holds are.
    #[inline]
    fn place(&self, id: u64) -> usize {
        id as usize & (self.held.len() - 1)
    }

    /// Sees to it that the last request will be known to be done: where it was
    /// not signalled, an empty write follows that is.
    pub fn settle(&mut self) -> Result<()> {
        if self.quiet == 0 || self.room() == 0 {
            return Ok(());
        }
        self.quiet = SIGNAL_EVERY;
        self.post_one(Work::Write { address: 0, rkey: 0, immediate: None }, Source::Nothing, Holds::default())
    }

    /// Takes the completions there are and tells what was held and is free now.
    /// After a failure nothing is told any more, only the first cause.
    pub fn reap(&mut self, mut free: impl FnMut(Holds)) -> Result<std::result::Result<(), Failed>> {
        if self.posted == self.done {
            return Ok(Ok(()));
        }
        if let Some(failed) = self.failed {
            return Ok(Err(failed));
        }
        let mut completions = ArrayVec::<ibv_wc, TAKE>::new();
        loop {
            self.cq.poll(&mut completions)?;
            for completion in &completions {
                if completion.status != IBV_WC_SUCCESS {
                    let failed = Failed(completion.status);
                    self.failed = Some(failed);
                    return Ok(Err(failed));
                }
                // The number is ours; a device that made one up would only be
                // believed as far as what was posted.
                while self.done <= completion.wr_id && self.done < self.posted {
                    let at = self.place(self.done);
                    free(std::mem::take(&mut self.held[at]));
                    self.done += 1;
                }
            }
            if completions.len() < TAKE {
                return Ok(Ok(()));
            }
        }
    }

    /// The next completion makes the channel readable.
    pub fn arm(&self) -> Result<()> {
        self.cq.arm()
    }
}

/// Was the request only swept away by what ended the queue pair before it?
pub fn is_flush(failed: Failed) -> bool {
    failed.0 == IBV_WC_WR_FLUSH_ERR
}
