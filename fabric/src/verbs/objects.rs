//! The objects of a device that a connection uses, freed in the right order:
//! completion channels and queues, the shared receive queue, queue pairs,
//! memory windows. Safe to use as far as memory goes: the device reaches only
//! what is registered, a registration keeps its memory, and an object keeps
//! what it was made from.
#![allow(unsafe_code)]

use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, RawFd};
use std::ptr;
use std::sync::Arc;

use arrayvec::ArrayVec;

use super::device::{Context, Mr, Pd, check, mtu_number};
use super::request::Request;
use super::sys::*;
use super::wire::Endpoint;
use crate::{Error, Result};

/// The error that a call left in `errno`.
fn last(what: &'static str) -> Error {
    Error::os(what, std::io::Error::last_os_error())
}

/// A completion channel: a file that becomes readable when an armed completion
/// queue gets something.
pub struct Channel {
    raw: *mut ibv_comp_channel,
    context: Arc<Context>,
}

// SAFETY: libibverbs locks what threads could share; only the owner uses it.
unsafe impl Send for Channel {}
// SAFETY: as above.
unsafe impl Sync for Channel {}

impl Channel {
    /// A channel that never blocks its reader.
    pub fn new(context: &Arc<Context>) -> Result<Self> {
        // SAFETY: the context is open.
        let raw = unsafe { (context.lib().ibv_create_comp_channel)(context.raw()) };
        if raw.is_null() {
            return Err(last("making a completion channel"));
        }
        let channel = Self { raw, context: Arc::clone(context) };
        let flags = rustix::fs::OFlags::NONBLOCK;
        rustix::fs::fcntl_setfl(channel.fd(), flags).map_err(|e| Error::os("making a completion channel", e))?;
        Ok(channel)
    }

    /// Readable while there are events.
    pub fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the channel's file is open while the channel is.
        unsafe { BorrowedFd::borrow_raw((*self.raw).fd) }
    }

    /// Takes all events there are.
    pub fn drain(&self) {
        let (mut cq, mut context) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: the channel is open and not blocking; an event's queue is
        // alive, for its destruction takes back the events of it.
        unsafe {
            while (self.context.lib().ibv_get_cq_event)(self.raw, &mut cq, &mut context) == 0 {
                (self.context.lib().ibv_ack_cq_events)(cq, 1);
            }
        }
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        // SAFETY: made by `new`; queues that use it keep it alive.
        unsafe { (self.context.lib().ibv_destroy_comp_channel)(self.raw) };
    }
}

/// A completion queue.
pub struct Cq {
    raw: *mut ibv_cq,
    channel: Arc<Channel>,
}

// SAFETY: as for `Channel`.
unsafe impl Send for Cq {}
// SAFETY: as for `Channel`.
unsafe impl Sync for Cq {}

impl Cq {
    /// A queue of at least `entries`.
    pub fn new(channel: &Arc<Channel>, entries: u32) -> Result<Self> {
        let context = &channel.context;
        let entries = i32::try_from(entries).map_err(|e| Error::os("making a completion queue", e))?;
        // SAFETY: context and channel are open.
        let raw = unsafe { (context.lib().ibv_create_cq)(context.raw(), entries, ptr::null_mut(), channel.raw, 0) };
        if raw.is_null() {
            return Err(last("making a completion queue"));
        }
        Ok(Self { raw, channel: Arc::clone(channel) })
    }

    /// Takes completions in place of what is in `into`, without blocking.
    #[inline]
    pub fn poll<const N: usize>(&self, into: &mut ArrayVec<ibv_wc, N>) -> Result<()> {
        into.clear();
        let room = N.min(i32::MAX as usize) as i32;
        // SAFETY: the queue is alive and the room is there.
        let got = unsafe { poll_cq(self.raw, room, into.as_mut_ptr()) };
        // SAFETY: the device has filled as many as it says, of so much room; an
        // error is below 0.
        unsafe { into.set_len(got.clamp(0, room) as usize) };
        if got < 0 {
            return Err(Error::os("polling a completion queue", format!("error {got}")));
        }
        Ok(())
    }

    /// The next completion makes the channel readable.
    pub fn arm(&self) -> Result<()> {
        // SAFETY: the queue is alive.
        check("arming a completion queue", unsafe { req_notify_cq(self.raw, false) })
    }
}

impl Drop for Cq {
    fn drop(&mut self) {
        // SAFETY: made by `new`; what uses it keeps it alive; every event was
        // acknowledged where it was taken.
        unsafe { (self.channel.context.lib().ibv_destroy_cq)(self.raw) };
    }
}

/// A receive to post: where a message may land.
#[derive(Clone, Copy)]
pub struct Receive {
    /// Comes back with its completion.
    pub id: u64,
    /// Address of the first byte.
    pub address: u64,
    /// Bytes.
    pub len: u32,
    /// Registration of the memory.
    pub lkey: u32,
}

/// A shared receive queue.
pub struct Srq {
    raw: *mut ibv_srq,
    pd: Arc<Pd>,
}

// SAFETY: as for `Channel`.
unsafe impl Send for Srq {}
// SAFETY: as for `Channel`.
unsafe impl Sync for Srq {}

/// Most receives or requests posted with one call.
pub const CHAIN: usize = 32;

impl Srq {
    /// A queue for `depth` receives of one run of memory each.
    pub fn new(pd: &Arc<Pd>, depth: u32) -> Result<Self> {
        let attr = ibv_srq_attr { max_wr: depth, max_sge: 1, srq_limit: 0 };
        let mut init = ibv_srq_init_attr { srq_context: ptr::null_mut(), attr };
        // SAFETY: the protection domain is alive; `init` is read and written
        // during the call only.
        let raw = unsafe { (pd.context().lib().ibv_create_srq)(pd.raw(), &mut init) };
        if raw.is_null() {
            return Err(last("making a shared receive queue"));
        }
        Ok(Self { raw, pd: Arc::clone(pd) })
    }

    /// Posts receives. Their memory has to stay registered while the queue is.
    pub fn post(&self, receives: &[Receive]) -> Result<()> {
        for receives in receives.chunks(CHAIN) {
            let mut runs = [const { MaybeUninit::<ibv_sge>::uninit() }; CHAIN];
            let mut requests = [const { MaybeUninit::<ibv_recv_wr>::uninit() }; CHAIN];
            let (run, first) = (runs.as_mut_ptr().cast::<ibv_sge>(), requests.as_mut_ptr().cast::<ibv_recv_wr>());
            for (i, receive) in receives.iter().enumerate() {
                // SAFETY: `i` is below CHAIN, the length of both arrays, and
                // neither is reached in another way until the call is over.
                unsafe {
                    run.add(i).write(ibv_sge { addr: receive.address, length: receive.len, lkey: receive.lkey });
                    let next = if i + 1 < receives.len() { first.add(i + 1) } else { ptr::null_mut() };
                    first.add(i).write(ibv_recv_wr { wr_id: receive.id, next, sg_list: run.add(i), num_sge: 1 });
                }
            }
            let mut bad = ptr::null_mut();
            // SAFETY: the queue is alive, the chain is on this stack; the
            // device checks each run against its registration.
            check("posting receives", unsafe { post_srq_recv(self.raw, first, &mut bad) })?;
        }
        Ok(())
    }
}

impl Drop for Srq {
    fn drop(&mut self) {
        // SAFETY: made by `new`; queue pairs that use it keep it alive.
        unsafe { (self.pd.context().lib().ibv_destroy_srq)(self.raw) };
    }
}

/// A memory window of type 2: a key to a part of a registration that only the
/// queue pair it was bound on accepts. Gone when dropped.
pub struct Window {
    raw: *mut ibv_mw,
    mr: Arc<Mr>,
    rkey: u32,
}

// SAFETY: as for `Channel`.
unsafe impl Send for Window {}
// SAFETY: as for `Channel`.
unsafe impl Sync for Window {}

impl Window {
    /// A window that is to be bound to the whole of `mr`.
    pub fn new(mr: &Arc<Mr>) -> Result<Self> {
        // SAFETY: the protection domain is alive.
        let raw = unsafe { alloc_mw(mr.pd().raw(), IBV_MW_TYPE_2) };
        if raw.is_null() {
            return Err(last("making a memory window"));
        }
        // SAFETY: alive.
        let unbound = unsafe { (*raw).rkey };
        // The low eight bits are the user's; what they were before is void.
        let rkey = (unbound & !0xff) | (unbound.wrapping_add(1) & 0xff);
        Ok(Self { raw, mr: Arc::clone(mr), rkey })
    }

    /// The key that it has once it is bound.
    pub fn rkey(&self) -> u32 {
        self.rkey
    }

    /// What a request binds.
    pub(super) fn bind(&self) -> ibv_wr_bind_mw {
        let bind_info = ibv_mw_bind_info {
            mr: self.mr.raw(),
            addr: self.mr.address(),
            length: self.mr.len() as u64,
            mw_access_flags: IBV_ACCESS_REMOTE_WRITE,
        };
        ibv_wr_bind_mw { mw: self.raw, rkey: self.rkey, bind_info }
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: made by `new`. A bind of it that is still queued fails.
        unsafe { dealloc_mw(self.raw) };
    }
}

/// How packets find the peer.
#[derive(Clone, Copy, Debug)]
pub struct Path {
    /// Our port.
    pub port: u8,
    /// Index of our GID.
    pub gid_index: u8,
    /// Bytes of a packet's payload.
    pub mtu: u32,
    /// Packets carry GIDs.
    pub global: bool,
    /// The IP header's traffic class (DSCP and ECN bits).
    pub traffic_class: u8,
    /// InfiniBand service level.
    pub service_level: u8,
    /// How often a packet is sent again.
    pub retries: u8,
    /// The wait before, 4.096 µs × 2^timeout.
    pub timeout: u8,
}

/// A reliable connection's queue pair.
pub struct Qp {
    raw: *mut ibv_qp,
    pd: Arc<Pd>,
    _srq: Arc<Srq>,
    _cqs: [Arc<Cq>; 2],
    /// Bytes that a request may carry itself.
    pub inline: u32,
    /// Requests that the send queue holds.
    pub depth: u32,
}

// SAFETY: as for `Channel`.
unsafe impl Send for Qp {}
// SAFETY: as for `Channel`.
unsafe impl Sync for Qp {}

/// Inline bytes asked for, until one is granted.
const INLINE: [u32; 5] = [512, 220, 128, 64, 0];

impl Qp {
    /// A queue pair whose send queue holds `depth` requests.
    pub fn new(pd: &Arc<Pd>, srq: &Arc<Srq>, send_cq: &Arc<Cq>, recv_cq: &Arc<Cq>, depth: u32) -> Result<Self> {
        for inline in INLINE {
            let cap = ibv_qp_cap {
                max_send_wr: depth,
                max_recv_wr: 0,
                max_send_sge: 1,
                max_recv_sge: 0,
                max_inline_data: inline,
            };
            let mut init = ibv_qp_init_attr {
                qp_context: ptr::null_mut(),
                send_cq: send_cq.raw,
                recv_cq: recv_cq.raw,
                srq: srq.raw,
                cap,
                qp_type: IBV_QPT_RC,
                sq_sig_all: 0,
            };
            // SAFETY: all parts are alive; `init` is read and written during
            // the call only.
            let raw = unsafe { (pd.context().lib().ibv_create_qp)(pd.raw(), &mut init) };
            if !raw.is_null() {
                let cqs = [Arc::clone(send_cq), Arc::clone(recv_cq)];
                let (inline, depth) = (init.cap.max_inline_data, init.cap.max_send_wr.min(depth));
                return Ok(Self { raw, pd: Arc::clone(pd), _srq: Arc::clone(srq), _cqs: cqs, inline, depth });
            }
        }
        Err(last("making a queue pair"))
    }

    /// Its number.
    pub fn number(&self) -> u32 {
        // SAFETY: alive.
        unsafe { (*self.raw).qp_num }
    }

    fn modify(&self, what: &'static str, mut attr: ibv_qp_attr, mask: i32) -> Result<()> {
        // SAFETY: alive; `attr` is read during the call only.
        check(what, unsafe { (self.pd.context().lib().ibv_modify_qp)(self.raw, &mut attr, mask) })
    }

    /// RESET → INIT.
    pub fn initialise(&self, port: u8) -> Result<()> {
        let attr = ibv_qp_attr {
            qp_state: IBV_QPS_INIT,
            pkey_index: 0,
            port_num: port,
            qp_access_flags: IBV_ACCESS_REMOTE_WRITE,
            ..Default::default()
        };
        let mask = IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS;
        self.modify("preparing a queue pair", attr, mask)
    }

    /// INIT → ready to receive from `peer` → ready to send, with `first_psn`.
    pub fn join(&self, path: &Path, peer: &Endpoint, first_psn: u32) -> Result<()> {
        let grh = ibv_global_route {
            dgid: ibv_gid { raw: peer.gid },
            flow_label: 0,
            sgid_index: path.gid_index,
            hop_limit: 64,
            traffic_class: path.traffic_class,
        };
        let ah_attr = ibv_ah_attr {
            grh,
            dlid: peer.lid,
            sl: path.service_level,
            src_path_bits: 0,
            static_rate: 0,
            is_global: u8::from(path.global),
            port_num: path.port,
        };
        let attr = ibv_qp_attr {
            qp_state: IBV_QPS_RTR,
            ah_attr,
            path_mtu: mtu_number(path.mtu.min(peer.mtu.into())).ok_or_else(|| Error::Protocol("no such MTU".into()))?,
            dest_qp_num: peer.queue_pair,
            rq_psn: peer.first_psn,
            max_dest_rd_atomic: 0,
            // 0.64 ms; credits see to it that it is never needed.
            min_rnr_timer: 12,
            ..Default::default()
        };
        let mask = IBV_QP_STATE
            | IBV_QP_AV
            | IBV_QP_PATH_MTU
            | IBV_QP_DEST_QPN
            | IBV_QP_RQ_PSN
            | IBV_QP_MAX_DEST_RD_ATOMIC
            | IBV_QP_MIN_RNR_TIMER;
        self.modify("readying a queue pair to receive", attr, mask)?;
        let attr = ibv_qp_attr {
            qp_state: IBV_QPS_RTS,
            sq_psn: first_psn,
            timeout: path.timeout,
            retry_cnt: path.retries,
            // Without end: a third peer that overdraws its credits at the
            // receiver must not break this connection. Whether the receiver
            // lives is for the control channel and for gossip to say.
            rnr_retry: 7,
            max_rd_atomic: 0,
            ..Default::default()
        };
        let mask = IBV_QP_STATE
            | IBV_QP_SQ_PSN
            | IBV_QP_TIMEOUT
            | IBV_QP_RETRY_CNT
            | IBV_QP_RNR_RETRY
            | IBV_QP_MAX_QP_RD_ATOMIC;
        self.modify("readying a queue pair to send", attr, mask)
    }

    /// Whatever is queued fails from now on.
    pub fn fail(&self) -> Result<()> {
        let attr = ibv_qp_attr { qp_state: IBV_QPS_ERR, ..Default::default() };
        self.modify("ending a queue pair", attr, IBV_QP_STATE)
    }

    /// Is it in the error state?
    pub fn has_ended(&self) -> bool {
        let mut attr = ibv_qp_attr::default();
        let mut init = MaybeUninit::<ibv_qp_init_attr>::uninit();
        let query = self.pd.context().lib().ibv_query_qp;
        // SAFETY: alive; both are written during the call only, and the second is
        // not read.
        let told = unsafe { query(self.raw, &mut attr, IBV_QP_STATE, init.as_mut_ptr()) };
        told == 0 && attr.qp_state == IBV_QPS_ERR
    }

    /// Posts up to [`CHAIN`] requests with one call. The caller has made sure
    /// that the queue has room, and ranges are inside their registrations.
    pub fn post(&self, requests: &[Request<'_>]) -> Result<()> {
        debug_assert!(requests.len() <= CHAIN);
        if requests.is_empty() {
            return Ok(());
        }
        let mut runs = [const { MaybeUninit::<ibv_sge>::uninit() }; CHAIN];
        let mut chain = [const { MaybeUninit::<ibv_send_wr>::uninit() }; CHAIN];
        let (run, first) = (runs.as_mut_ptr().cast::<ibv_sge>(), chain.as_mut_ptr().cast::<ibv_send_wr>());
        for (i, request) in requests.iter().take(CHAIN).enumerate() {
            // SAFETY: `i` is below CHAIN, the length of both arrays, and
            // neither is reached in another way until the call is over.
            unsafe {
                let next = if i + 1 < requests.len().min(CHAIN) { first.add(i + 1) } else { ptr::null_mut() };
                request.lay_out(run.add(i), first.add(i), next);
            }
        }
        self.post_chain(first)
    }

    /// As [`post`](Self::post), one.
    #[inline(always)]
    pub fn post_one(&self, request: &Request<'_>) -> Result<()> {
        let mut run = MaybeUninit::<ibv_sge>::uninit();
        let mut first = MaybeUninit::<ibv_send_wr>::uninit();
        // SAFETY: neither is reached in another way until the call is over.
        unsafe { request.lay_out(run.as_mut_ptr(), first.as_mut_ptr(), ptr::null_mut()) };
        self.post_chain(first.as_mut_ptr())
    }

    #[inline(always)]
    fn post_chain(&self, first: *mut ibv_send_wr) -> Result<()> {
        let mut bad = ptr::null_mut();
        // SAFETY: alive; the chain and inline bytes are there for the call; all
        // else the device reads through its registrations, which check it.
        check("posting to a queue pair", unsafe { post_send(self.raw, first, &mut bad) })
    }
}

impl Drop for Qp {
    fn drop(&mut self) {
        // SAFETY: made by `new`; nothing refers to it.
        unsafe { (self.pd.context().lib().ibv_destroy_qp)(self.raw) };
    }
}

/// What the library calls a completion's status.
pub fn status_text(context: &Context, status: u32) -> String {
    // SAFETY: returns a static string for every number.
    let text = unsafe { (context.lib().ibv_wc_status_str)(status) };
    if text.is_null() {
        return format!("status {status}");
    }
    // SAFETY: a static C string.
    unsafe { std::ffi::CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

/// What happened to a device, a port or a queue pair outside its queues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Incident {
    /// A queue pair can go on no more; with its number and whether the peer
    /// reached for what it may not.
    QueuePair {
        /// Its number.
        number: u32,
        /// The peer's fault.
        by_peer: bool,
    },
    /// The port is down.
    PortDown(u8),
    /// The port is up.
    PortUp(u8),
    /// The device or a shared queue is broken.
    Device,
}

/// Takes the incidents of a device that there are. Its asynchronous file is set
/// not to block.
pub fn incidents(context: &Context, mut tell: impl FnMut(Incident)) {
    let mut event = ibv_async_event { element: ibv_async_element { port_num: 0 }, event_type: 0 };
    // SAFETY: the context is open, its file does not block; a queue pair's
    // pointer is read before the event is acknowledged, until when the queue
    // pair's destruction waits.
    unsafe {
        while (context.lib().ibv_get_async_event)(context.raw(), &mut event) == 0 {
            let incident = match event.event_type {
                // The second is all that is said of an idle queue pair that ended.
                IBV_EVENT_QP_FATAL | IBV_EVENT_QP_LAST_WQE_REACHED => {
                    Some(Incident::QueuePair { number: (*event.element.qp).qp_num, by_peer: false })
                }
                IBV_EVENT_QP_REQ_ERR | IBV_EVENT_QP_ACCESS_ERR => {
                    Some(Incident::QueuePair { number: (*event.element.qp).qp_num, by_peer: true })
                }
                IBV_EVENT_PORT_ERR => Some(Incident::PortDown(event.element.port_num as u8)),
                IBV_EVENT_PORT_ACTIVE => Some(Incident::PortUp(event.element.port_num as u8)),
                IBV_EVENT_DEVICE_FATAL | IBV_EVENT_CQ_ERR | IBV_EVENT_SRQ_ERR => Some(Incident::Device),
                _ => None,
            };
            (context.lib().ibv_ack_async_event)(&mut event);
            if let Some(incident) = incident {
                tell(incident);
            }
        }
    }
}

/// Makes the device's asynchronous file one that does not block.
pub fn unblock_incidents(context: &Context) -> Result<BorrowedFd<'_>> {
    // SAFETY: the file is open while the context is.
    let fd = unsafe { BorrowedFd::borrow_raw((*context.raw()).async_fd as RawFd) };
    let flags = rustix::fs::OFlags::NONBLOCK;
    rustix::fs::fcntl_setfl(fd, flags).map_err(|e| Error::os("watching a device", e))?;
    Ok(fd)
}
