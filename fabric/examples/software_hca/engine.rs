//! Carries requests out: one at a time of each queue pair, in order.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_void};
use std::ptr;
use std::sync::{Condvar, Once, PoisonError};
use std::time::{Duration, Instant};

use distkv_fabric::verbs::sys::*;

use crate::device::{MAX_MESSAGE, gid};
use crate::memory::Run;
use crate::state::{Completion, Hca, MAX_SGE, Qp, Receive, Request, Settings, Slot, Stall, Why, lock};

/// What became of a request.
enum Outcome {
    /// It is done: its status.
    Done(ibv_enum),
    Waits(Why),
}
use Outcome::{Done, Waits};

/// Ranges of memory, one after the other.
#[derive(Clone, Copy)]
struct Runs {
    runs: [Run; MAX_SGE],
    len: usize,
    bytes: u64,
}

impl Runs {
    const NONE: Self = Self { runs: [(0, 0); MAX_SGE], len: 0, bytes: 0 };

    fn push(&mut self, run: Run) {
        self.runs[self.len] = run;
        self.len += 1;
        self.bytes += run.1 as u64;
    }

    fn one(run: Run) -> Self {
        let mut runs = Self::NONE;
        runs.push(run);
        runs
    }
}

/// Copies all of `from` to the front of `into`, which is as long at least.
///
/// # Safety
/// All ranges are mapped, and `into` is writable.
unsafe fn copy(from: &Runs, into: &Runs) {
    let mut targets = into.runs[..into.len].iter().copied();
    let (mut to, mut room) = (0, 0);
    for (mut at, mut left) in from.runs[..from.len].iter().copied() {
        while left > 0 {
            while room == 0 {
                let Some(next) = targets.next() else { return };
                (to, room) = next;
            }
            let len = left.min(room);
            let (source, target) = (ptr::with_exposed_provenance::<u8>(at), ptr::with_exposed_provenance_mut(to));
            // SAFETY: the caller's promise. A device copies without a lock of
            // those who read and write meanwhile, and so does this.
            unsafe { ptr::copy::<u8>(source, target, len) };
            (at, left, to, room) = (at + len, left - len, to + len, room - len);
        }
    }
}

/// How long a responder without a receive asks to wait, in units of 10 µs, by
/// the number that stands for it.
const RNR_TIMERS: [u32; 32] = [
    65536, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096,
    6144, 8192, 12288, 16384, 24576, 32768, 49152,
];

/// Wakes the thread.
static WORK: Condvar = Condvar::new();

impl Hca {
    /// A queue pair may have something that can go on.
    pub fn may_run(&mut self, number: u32) {
        if let Some(qp) = self.qps.get_mut(number)
            && !std::mem::replace(&mut qp.runnable, true)
        {
            self.runnable.push_back(number);
        }
    }

    /// Whatever waits looks again.
    fn stir(&mut self) {
        self.stirred = false;
        while let Some(number) = self.waiting.pop_front() {
            if let Some(qp) = self.qps.get_mut(number) {
                qp.waiting = false;
            }
            self.may_run(number);
        }
    }

    fn next_runnable(&mut self) -> Option<u32> {
        if self.stirred {
            self.stir();
        }
        let number = self.runnable.pop_front()?;
        if let Some(qp) = self.qps.get_mut(number) {
            qp.runnable = false;
        }
        Some(number)
    }

    /// Carries out what can be, or has the thread do so.
    pub fn settle(&mut self) {
        if Settings::get().with_thread {
            if self.stirred || !self.runnable.is_empty() {
                start_thread();
                WORK.notify_all();
            }
            return;
        }
        while let Some(number) = self.next_runnable() {
            while self.step(number) {}
        }
        let timed = |number: &u32| self.qps.get(*number).and_then(|qp| qp.stall).is_some_and(|s| s.until.is_some());
        if self.waiting.iter().any(timed) {
            start_thread();
            WORK.notify_all();
        }
    }

    /// Carries out a queue pair's first request; false if it cannot go on.
    fn step(&mut self, number: u32) -> bool {
        let Some(qp) = self.qps.get_mut(number) else { return false };
        if qp.state != IBV_QPS_RTS || self.devices[qp.device].held {
            return false;
        }
        let Some(request) = qp.requests.pop_front() else { return false };
        match self.execute(number, &request) {
            Done(status) => {
                self.finish(number, &request, status);
                true
            }
            Waits(why) => {
                self.stall(number, request, why);
                false
            }
        }
    }

    fn stall(&mut self, number: u32, request: Request, why: Why) {
        let until = self.patience(number, why).map(|patience| Instant::now() + patience);
        let Some(qp) = self.qps.get_mut(number) else { return };
        qp.requests.push_front(request);
        if qp.stall.is_none_or(|stall| stall.why != why) {
            qp.stall = Some(Stall { why, until });
            self.counts.waits += u64::from(why == Why::NoReceive);
        }
        if !std::mem::replace(&mut qp.waiting, true) {
            self.waiting.push_back(number);
        }
    }

    /// How long a queue pair tries.
    fn patience(&self, number: u32, why: Why) -> Option<Duration> {
        let attr = &self.qps.get(number)?.attr;
        match why {
            Why::Silence if attr.timeout == 0 => None,
            Why::Silence => Some(Duration::from_nanos(4096 << attr.timeout) * (u32::from(attr.retry_cnt) + 1)),
            Why::NoReceive if attr.rnr_retry == 7 => None,
            Why::NoReceive => {
                let timer = self.qps.get(attr.dest_qp_num)?.attr.min_rnr_timer;
                let units = RNR_TIMERS[usize::from(timer) % RNR_TIMERS.len()];
                Some(Duration::from_micros(10) * units * (u32::from(attr.rnr_retry) + 1))
            }
        }
    }

    /// A request is done; a failed one ends its queue pair.
    fn finish(&mut self, number: u32, request: &Request, status: ibv_enum) {
        let Some(qp) = self.qps.get_mut(number) else { return };
        qp.stall = None;
        if request.signalled || status != IBV_WC_SUCCESS {
            let cq = qp.send_cq;
            self.complete(cq, sent(number, request, status), false);
        }
        if status != IBV_WC_SUCCESS {
            self.fail(number);
        }
    }

    /// Ends a queue pair: nothing that is queued will be done.
    pub fn fail(&mut self, number: u32) {
        let Some(qp) = self.qps.get_mut(number) else { return };
        if qp.state == IBV_QPS_ERR {
            return;
        }
        let shared = qp.srq.is_some();
        self.enter(number, IBV_QPS_ERR);
        self.flush(number);
        if shared {
            self.tell_of(number, IBV_EVENT_QP_LAST_WQE_REACHED);
        }
    }

    /// Completes all that is queued as not done.
    pub fn flush(&mut self, number: u32) {
        while let Some(qp) = self.qps.get_mut(number) {
            qp.stall = None;
            let (cq, completion) = if let Some(request) = qp.requests.pop_front() {
                (qp.send_cq, sent(number, &request, IBV_WC_WR_FLUSH_ERR))
            } else if let Some(receive) = qp.receives.pop_front() {
                let wc = ibv_wc {
                    wr_id: receive.id,
                    status: IBV_WC_WR_FLUSH_ERR,
                    opcode: IBV_WC_RECV,
                    qp_num: number,
                    ..Default::default()
                };
                (qp.recv_cq, Completion { wc, slot: Slot::Receive })
            } else {
                return;
            };
            self.complete(cq, completion, false);
        }
    }

    /// An event of a queue pair.
    pub fn tell_of(&mut self, number: u32, event: ibv_enum) {
        let Some(raw) = self.qps.get(number).map(|qp| qp.raw) else { return };
        // SAFETY: alive: it is in the table.
        let context = unsafe { (*raw).context };
        self.tell(context, event, ibv_async_element { qp: raw });
    }

    fn execute(&mut self, number: u32, request: &Request) -> Outcome {
        if request.opcode == IBV_WR_BIND_MW {
            return Done(self.bind(number, &request.bind).map_or(IBV_WC_MW_BIND_ERR, |()| IBV_WC_SUCCESS));
        }
        let Some(qp) = self.qps.get(number) else { return Done(IBV_WC_WR_FLUSH_ERR) };
        let Some(bytes) = self.gather(qp, request) else { return Done(IBV_WC_LOC_PROT_ERR) };
        if bytes.bytes > u64::from(MAX_MESSAGE) {
            return Done(IBV_WC_LOC_LEN_ERR);
        }
        let Some(peer) = self.peer(number, qp) else { return Waits(Why::Silence) };
        if let Some(first) = self.qps.get_mut(peer)
            && first.state == IBV_QPS_RTR
            && !std::mem::replace(&mut first.heard, true)
        {
            self.tell_of(peer, IBV_EVENT_COMM_EST);
        }
        self.deliver(number, peer, request, &bytes)
    }

    /// The queue pair that packets of `qp` arrive at and that takes them.
    fn peer(&self, number: u32, qp: &Qp) -> Option<u32> {
        let to = qp.attr.dest_qp_num;
        let peer = self.qps.get(to)?;
        let carried = [qp.device, peer.device].iter().all(|d| self.devices[*d].up && !self.devices[*d].cut);
        let named = qp.attr.ah_attr.grh.dgid == gid(peer.device) && peer.attr.ah_attr.grh.dgid == gid(qp.device);
        let takes = matches!(peer.state, IBV_QPS_RTR | IBV_QPS_RTS)
            && peer.attr.dest_qp_num == number
            && peer.attr.rq_psn == qp.attr.sq_psn;
        (carried && named && takes).then_some(to)
    }

    /// The bytes of a request; `None` if it may not read them.
    fn gather(&self, qp: &Qp, request: &Request) -> Option<Runs> {
        if let Some(len) = request.inline {
            let at = (request.number % u64::from(qp.cap.max_send_wr)) as usize * qp.cap.max_inline_data as usize;
            return Some(Runs::one((qp.inline[at..].as_ptr().expose_provenance(), len as usize)));
        }
        let mut runs = Runs::NONE;
        for run in request.runs[..request.len].iter().filter(|run| run.length > 0) {
            runs.push(self.local(qp.pd, run, false)?);
        }
        Some(runs)
    }

    /// At the responder.
    fn deliver(&mut self, from: u32, to: u32, request: &Request, bytes: &Runs) -> Outcome {
        let write = matches!(request.opcode, IBV_WR_RDMA_WRITE | IBV_WR_RDMA_WRITE_WITH_IMM);
        let with_immediate = matches!(request.opcode, IBV_WR_SEND_WITH_IMM | IBV_WR_RDMA_WRITE_WITH_IMM);
        let takes_receive = !write || with_immediate;
        let (Some(sender), Some(peer)) = (self.qps.get(from), self.qps.get(to)) else { return Waits(Why::Silence) };
        let mtus = (sender.attr.path_mtu, peer.attr.path_mtu);
        let writable = peer.attr.qp_access_flags & IBV_ACCESS_REMOTE_WRITE != 0;
        // Packets of another length than the path's, or a kind that is not taken.
        if (write && !writable) || (mtus.0 != mtus.1 && bytes.bytes > 128 << mtus.0.min(mtus.1)) {
            self.fail_by_peer(to, IBV_EVENT_QP_REQ_ERR);
            return Done(IBV_WC_REM_INV_REQ_ERR);
        }
        let mut into = Runs::NONE;
        if write && bytes.bytes > 0 {
            let Some(run) = self.remote(to, request.rkey, request.address, bytes.bytes) else {
                self.fail_by_peer(to, IBV_EVENT_QP_ACCESS_ERR);
                return Done(IBV_WC_REM_ACCESS_ERR);
            };
            into = Runs::one(run);
        }
        let mut receive = None;
        if takes_receive {
            let Some((taken, slot)) = self.take_receive(to) else { return Waits(Why::NoReceive) };
            receive = Some((taken, slot));
            if !write {
                match self.scatter(to, &taken, bytes.bytes) {
                    Ok(runs) => into = runs,
                    Err((ours, theirs)) => {
                        self.received(to, from, (taken.id, slot), request, (ours, 0));
                        self.fail(to);
                        return Done(theirs);
                    }
                }
            }
        }
        // SAFETY: both sides were looked up in their registrations, whose owners
        // keep the memory while they are.
        unsafe { copy(bytes, &into) };
        if let Some((taken, slot)) = receive {
            self.received(to, from, (taken.id, slot), request, (IBV_WC_SUCCESS, bytes.bytes as u32));
        }
        Done(IBV_WC_SUCCESS)
    }

    fn fail_by_peer(&mut self, number: u32, event: ibv_enum) {
        let silent = self.qps.get(number).is_some_and(|qp| self.devices[qp.device].silent);
        if silent {
            self.enter(number, IBV_QPS_ERR);
            return self.flush(number);
        }
        self.tell_of(number, event);
        self.fail(number);
    }

    fn take_receive(&mut self, number: u32) -> Option<(Receive, Slot)> {
        let qp = self.qps.get_mut(number)?;
        let Some(srq) = qp.srq else { return Some((qp.receives.pop_front()?, Slot::Receive)) };
        let taken = self.srqs.get_mut(srq)?.queue.pop_front()?;
        self.look_at_limit(srq);
        Some((taken, Slot::Shared(srq)))
    }

    /// Where `len` bytes of a SEND go; or the statuses of both sides.
    fn scatter(&self, number: u32, receive: &Receive, len: u64) -> Result<Runs, (ibv_enum, ibv_enum)> {
        let qp = self.qps.get(number);
        let pd = qp.map(|qp| qp.srq.and_then(|srq| self.srqs.get(srq)).map_or(qp.pd, |srq| srq.pd)).unwrap_or(0);
        let mut runs = Runs::NONE;
        for run in receive.runs[..receive.len].iter().filter(|run| run.length > 0) {
            if runs.bytes >= len {
                break;
            }
            runs.push(self.local(pd, run, true).ok_or((IBV_WC_LOC_PROT_ERR, IBV_WC_REM_OP_ERR))?);
        }
        if runs.bytes < len { Err((IBV_WC_LOC_LEN_ERR, IBV_WC_REM_INV_REQ_ERR)) } else { Ok(runs) }
    }

    /// Completes a receive.
    fn received(
        &mut self,
        to: u32,
        from: u32,
        (wr_id, slot): (u64, Slot),
        request: &Request,
        (status, byte_len): (ibv_enum, u32),
    ) {
        let Some(cq) = self.qps.get(to).map(|qp| qp.recv_cq) else { return };
        let write = request.opcode == IBV_WR_RDMA_WRITE_WITH_IMM;
        let with_immediate = write || request.opcode == IBV_WR_SEND_WITH_IMM;
        let wc = ibv_wc {
            wr_id,
            status,
            opcode: if write { IBV_WC_RECV_RDMA_WITH_IMM } else { IBV_WC_RECV },
            byte_len,
            imm_data: if with_immediate { request.immediate } else { 0 },
            qp_num: to,
            src_qp: from,
            wc_flags: if with_immediate { IBV_WC_WITH_IMM } else { 0 },
            ..Default::default()
        };
        self.complete(cq, Completion { wc, slot }, request.solicited);
    }

    /// Fails what has waited too long; when that is to be looked at again.
    fn expire(&mut self) -> Option<Instant> {
        let now = Instant::now();
        let mut next: Option<Instant> = None;
        for i in 0..self.waiting.len() {
            let number = self.waiting[i];
            let Some(qp) = self.qps.get_mut(number) else { continue };
            let Some(Stall { why, until: Some(until) }) = qp.stall else { continue };
            if until > now {
                next = Some(next.map_or(until, |next| next.min(until)));
            } else if let Some(request) = qp.requests.pop_front() {
                let status = if why == Why::Silence { IBV_WC_RETRY_EXC_ERR } else { IBV_WC_RNR_RETRY_EXC_ERR };
                self.finish(number, &request, status);
            }
        }
        next
    }
}

/// The completion of a send request.
fn sent(number: u32, request: &Request, status: ibv_enum) -> Completion {
    let opcode = match request.opcode {
        IBV_WR_RDMA_WRITE | IBV_WR_RDMA_WRITE_WITH_IMM => IBV_WC_RDMA_WRITE,
        IBV_WR_BIND_MW => IBV_WC_BIND_MW,
        _ => IBV_WC_SEND,
    };
    let wc = ibv_wc { wr_id: request.id, status, opcode, qp_num: number, ..Default::default() };
    Completion { wc, slot: Slot::Send(request.number) }
}

/// The thread that fails what waits too long, and carries requests out where
/// that is asked for. It runs as long as the process.
fn start_thread() {
    static STARTED: Once = Once::new();
    STARTED.call_once(|| {
        keep_loaded();
        let made = std::thread::Builder::new().name("software-hca".into()).spawn(run);
        assert!(made.is_ok(), "software HCA: no thread: {made:?}");
    });
}

fn run() {
    let mut hca = lock();
    loop {
        let next = hca.expire();
        if let Some(number) = hca.next_runnable() {
            if hca.step(number) {
                hca.may_run(number);
            }
            // Others take turns with it.
            drop(hca);
            std::thread::yield_now();
            hca = lock();
            continue;
        }
        hca = match next {
            Some(next) => {
                let wait = next.saturating_duration_since(Instant::now());
                WORK.wait_timeout(hca, wait).unwrap_or_else(PoisonError::into_inner).0
            }
            None => WORK.wait(hca).unwrap_or_else(PoisonError::into_inner),
        };
    }
}

/// The thread's code has to stay though the library is closed.
fn keep_loaded() {
    // SAFETY: all zeroes is a value of every field.
    let mut found: libc::Dl_info = unsafe { std::mem::zeroed() };
    let here = keep_loaded as fn() as *const c_void;
    // SAFETY: writes the struct; the name in it is a C string.
    let opened = unsafe {
        let known = libc::dladdr(here, &mut found) != 0 && !CStr::from_ptr(found.dli_fname).is_empty();
        known && !libc::dlopen(found.dli_fname, libc::RTLD_NOW | libc::RTLD_NOLOAD | libc::RTLD_NODELETE).is_null()
    };
    assert!(opened, "software HCA: cannot keep the library loaded");
}
