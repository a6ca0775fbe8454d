//! One end of a connection over the software HCA, with all it is made from.
#![allow(unsafe_code)]

use std::ffi::c_int;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use distkv_fabric::verbs::sys::*;

use crate::place;

/// Bytes of a slot of an end's memory; a receive takes one.
pub const SLOT: usize = 64;
/// Bytes of an end's memory.
pub const MEMORY: usize = 64 * SLOT;

/// The library, opened once.
pub fn lib() -> &'static Lib {
    static LIB: OnceLock<Lib> = OnceLock::new();
    LIB.get_or_init(|| Lib::open(&place::path()).unwrap())
}

/// Calls one of the library's knobs.
pub fn knob(name: &str, arguments: (c_int, c_int)) {
    // SAFETY: the library is open already, with nothing to initialise.
    let library = unsafe { libloading::Library::new(place::path()) }.unwrap();
    // SAFETY: knobs take one or two integers and return one.
    let answer = unsafe {
        let knob = library.get::<unsafe extern "C" fn(c_int, c_int) -> c_int>(name.as_bytes()).unwrap();
        knob(arguments.0, arguments.1)
    };
    assert_eq!(answer, 0, "{name}");
}

/// How many objects there are.
pub fn living() -> u64 {
    // SAFETY: as above.
    let library = unsafe { libloading::Library::new(place::path()) }.unwrap();
    // SAFETY: the function's type.
    unsafe { library.get::<unsafe extern "C" fn() -> u64>(b"software_hca_living").unwrap()() }
}

/// Requests that were posted so far, and those of them that had to wait for a receive.
pub fn requests() -> (u64, u64) {
    let mut counts = [0u64; 10];
    // SAFETY: as above.
    let library = unsafe { libloading::Library::new(place::path()) }.unwrap();
    // SAFETY: the function's type; it writes ten of these numbers.
    unsafe { library.get::<unsafe extern "C" fn(*mut u64)>(b"software_hca_counts").unwrap()(counts.as_mut_ptr()) };
    let [_, requests, .., waits] = counts;
    (requests, waits)
}

/// Tests share the devices: one at a time.
pub fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What an end is like.
#[derive(Clone, Copy)]
pub struct Shape {
    pub device: usize,
    pub depth: u32,
    pub cq: c_int,
    /// Receives of a shared queue, or of its own.
    pub shared: bool,
    pub receives: u32,
    pub memory_access: u32,
    pub qp_access: u32,
    pub timeout: u8,
    pub retry_cnt: u8,
    pub rnr_retry: u8,
    pub psn: u32,
}

pub const SHAPE: Shape = Shape {
    device: 0,
    depth: 8,
    cq: 32,
    shared: true,
    receives: 16,
    memory_access: IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_MW_BIND,
    qp_access: IBV_ACCESS_REMOTE_WRITE,
    timeout: 10,
    retry_cnt: 7,
    rnr_retry: 7,
    psn: 7,
};

pub struct End {
    pub context: *mut ibv_context,
    pub pd: *mut ibv_pd,
    pub channel: *mut ibv_comp_channel,
    pub send_cq: *mut ibv_cq,
    pub recv_cq: *mut ibv_cq,
    pub srq: *mut ibv_srq,
    pub qp: *mut ibv_qp,
    pub mr: *mut ibv_mr,
    memory: *mut u8,
    pub shape: Shape,
}

/// A request to post.
#[derive(Clone, Copy)]
pub struct Wr {
    pub id: u64,
    pub opcode: ibv_enum,
    pub flags: u32,
    /// Where its bytes are in the end's memory.
    pub from: (usize, u32),
    pub immediate: u32,
    pub to: (u64, u32),
    pub lkey: Option<u32>,
    pub bind: Option<ibv_wr_bind_mw>,
}

impl Wr {
    pub fn new(id: u64, opcode: ibv_enum, from: (usize, u32)) -> Self {
        let flags = IBV_SEND_SIGNALED;
        Self { id, opcode, flags, from, immediate: 0, to: (0, 0), lkey: None, bind: None }
    }

    pub fn send(id: u64, from: (usize, u32), immediate: u32) -> Self {
        Self { immediate, ..Self::new(id, IBV_WR_SEND_WITH_IMM, from) }
    }

    pub fn write(id: u64, from: (usize, u32), to: (u64, u32)) -> Self {
        Self { to, ..Self::new(id, IBV_WR_RDMA_WRITE, from) }
    }

    pub fn bind(id: u64, mw: *mut ibv_mw, rkey: u32, mr: *mut ibv_mr, range: (u64, u64)) -> Self {
        let (addr, length) = range;
        let bind_info = ibv_mw_bind_info { mr, addr, length, mw_access_flags: IBV_ACCESS_REMOTE_WRITE };
        Self { bind: Some(ibv_wr_bind_mw { mw, rkey, bind_info }), ..Self::new(id, IBV_WR_BIND_MW, (0, 0)) }
    }

    pub fn quiet(self) -> Self {
        Self { flags: self.flags & !IBV_SEND_SIGNALED, ..self }
    }

    pub fn inline(self) -> Self {
        Self { flags: self.flags | IBV_SEND_INLINE, ..self }
    }
}

/// Id and status of completions.
pub fn ids(completions: &[ibv_wc]) -> Vec<(u64, u32)> {
    completions.iter().map(|wc| (wc.wr_id, wc.status)).collect()
}

pub fn open(device: usize) -> *mut ibv_context {
    // SAFETY: the list is freed after use, its devices stay.
    unsafe {
        let mut count = 0;
        let list = (lib().ibv_get_device_list)(&mut count);
        assert!((device as c_int) < count);
        let context = (lib().ibv_open_device)(*list.add(device));
        (lib().ibv_free_device_list)(list);
        assert!(!context.is_null());
        context
    }
}

impl End {
    pub fn new(shape: Shape) -> Self {
        let context = open(shape.device);
        // SAFETY: each object is made of living ones.
        unsafe {
            let pd = (lib().ibv_alloc_pd)(context);
            let channel = (lib().ibv_create_comp_channel)(context);
            let flags = libc::fcntl((*channel).fd, libc::F_GETFL);
            libc::fcntl((*channel).fd, libc::F_SETFL, flags | libc::O_NONBLOCK);
            libc::fcntl((*context).async_fd, libc::F_SETFL, flags | libc::O_NONBLOCK);
            let cq = || (lib().ibv_create_cq)(context, shape.cq, ptr::null_mut(), channel, 0);
            let (send_cq, recv_cq) = (cq(), cq());
            let attr = ibv_srq_attr { max_wr: shape.receives, max_sge: 1, srq_limit: 0 };
            let mut init = ibv_srq_init_attr { srq_context: ptr::null_mut(), attr };
            let srq = if shape.shared { (lib().ibv_create_srq)(pd, &mut init) } else { ptr::null_mut() };
            let memory = Box::into_raw(Box::new([0u8; MEMORY])).cast::<u8>();
            let start = memory.expose_provenance() as u64;
            let mr = (lib().ibv_reg_mr_iova2)(pd, memory.cast(), MEMORY, start, shape.memory_access);
            assert!(!send_cq.is_null() && !recv_cq.is_null() && !mr.is_null() && (srq.is_null() != shape.shared));
            let mut end = Self { context, pd, channel, send_cq, recv_cq, srq, qp: ptr::null_mut(), mr, memory, shape };
            end.qp = end.another_qp();
            end
        }
    }

    /// One more queue pair, to be destroyed by who asked for it.
    pub fn another_qp(&self) -> *mut ibv_qp {
        let cap = ibv_qp_cap {
            max_send_wr: self.shape.depth,
            max_recv_wr: self.shape.receives,
            max_send_sge: 1,
            max_recv_sge: 1,
            max_inline_data: 64,
        };
        let (send_cq, recv_cq, srq) = (self.send_cq, self.recv_cq, self.srq);
        let qp_context = ptr::null_mut();
        let mut init = ibv_qp_init_attr { qp_context, send_cq, recv_cq, srq, cap, qp_type: IBV_QPT_RC, sq_sig_all: 0 };
        // SAFETY: all parts are alive.
        let qp = unsafe { (lib().ibv_create_qp)(self.pd, &mut init) };
        assert!(!qp.is_null());
        assert_eq!(init.cap.max_send_wr, self.shape.depth, "exactly what was asked for");
        qp
    }

    pub fn number(&self) -> u32 {
        // SAFETY: alive.
        unsafe { (*self.qp).qp_num }
    }

    pub fn state(&self) -> u32 {
        let (mut attr, mut init) = (ibv_qp_attr::default(), MaybeUninit::uninit());
        // SAFETY: alive; both can be written.
        unsafe { assert_eq!((lib().ibv_query_qp)(self.qp, &mut attr, IBV_QP_STATE, init.as_mut_ptr()), 0) };
        attr.qp_state
    }

    pub fn modify(&self, qp: *mut ibv_qp, mut attr: ibv_qp_attr, mask: c_int) -> c_int {
        // SAFETY: alive.
        unsafe { (lib().ibv_modify_qp)(qp, &mut attr, mask) }
    }

    pub fn to_init(&self, qp: *mut ibv_qp) -> c_int {
        let qp_access_flags = self.shape.qp_access;
        let attr = ibv_qp_attr { qp_state: IBV_QPS_INIT, port_num: 1, qp_access_flags, ..Default::default() };
        self.modify(qp, attr, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS)
    }

    /// Ready to receive from a peer's queue pair.
    pub fn to_rtr(&self, qp: *mut ibv_qp, peer: &Shape, number: u32) -> c_int {
        let dgid = gid(peer.device);
        let grh = ibv_global_route { dgid, hop_limit: 64, ..Default::default() };
        let attr = ibv_qp_attr {
            qp_state: IBV_QPS_RTR,
            ah_attr: ibv_ah_attr { grh, is_global: 1, port_num: 1, ..Default::default() },
            path_mtu: IBV_MTU_4096,
            dest_qp_num: number,
            rq_psn: peer.psn,
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
        self.modify(qp, attr, mask)
    }

    pub fn to_rts(&self, qp: *mut ibv_qp) -> c_int {
        let attr = ibv_qp_attr {
            qp_state: IBV_QPS_RTS,
            sq_psn: self.shape.psn,
            timeout: self.shape.timeout,
            retry_cnt: self.shape.retry_cnt,
            rnr_retry: self.shape.rnr_retry,
            ..Default::default()
        };
        let mask = IBV_QP_STATE
            | IBV_QP_SQ_PSN
            | IBV_QP_TIMEOUT
            | IBV_QP_RETRY_CNT
            | IBV_QP_RNR_RETRY
            | IBV_QP_MAX_QP_RD_ATOMIC;
        self.modify(qp, attr, mask)
    }

    pub fn connect(&self, qp: *mut ibv_qp, peer: &Shape, number: u32) {
        assert_eq!((self.to_init(qp), self.to_rtr(qp, peer, number), self.to_rts(qp)), (0, 0, 0));
    }

    pub fn to_err(&self) {
        let attr = ibv_qp_attr { qp_state: IBV_QPS_ERR, ..Default::default() };
        assert_eq!(self.modify(self.qp, attr, IBV_QP_STATE), 0);
    }

    /// Address of a byte of its memory.
    pub fn at(&self, offset: usize) -> u64 {
        self.memory.addr() as u64 + offset as u64
    }

    pub fn rkey(&self) -> u32 {
        // SAFETY: alive.
        unsafe { (*self.mr).rkey }
    }

    pub fn fill(&self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= MEMORY);
        // SAFETY: in range.
        unsafe { ptr::copy(bytes.as_ptr(), self.memory.add(offset), bytes.len()) };
    }

    pub fn read(&self, offset: usize, len: usize) -> Vec<u8> {
        assert!(offset + len <= MEMORY);
        // SAFETY: in range.
        unsafe { std::slice::from_raw_parts(self.memory.add(offset), len) }.to_vec()
    }

    /// Posts a chain with one call: an errno, and how many were posted.
    pub fn post(&self, wrs: &[Wr]) -> Result<(), (c_int, usize)> {
        self.post_to(self.qp, wrs)
    }

    pub fn post_to(&self, qp: *mut ibv_qp, wrs: &[Wr]) -> Result<(), (c_int, usize)> {
        // SAFETY: alive.
        let lkey = unsafe { (*self.mr).lkey };
        let run = |wr: &Wr| ibv_sge { addr: self.at(wr.from.0), length: wr.from.1, lkey: wr.lkey.unwrap_or(lkey) };
        let mut runs: Vec<ibv_sge> = wrs.iter().map(run).collect();
        let runs = runs.as_mut_ptr();
        let request = |(i, wr): (usize, &Wr)| ibv_send_wr {
            wr_id: wr.id,
            next: ptr::null_mut(),
            sg_list: runs.wrapping_add(i),
            num_sge: c_int::from(wr.from.1 > 0),
            opcode: wr.opcode,
            send_flags: wr.flags,
            imm_data: wr.immediate,
            wr: ibv_wr_target { rdma: ibv_wr_rdma { remote_addr: wr.to.0, rkey: wr.to.1 } },
            xrc_remote_srqn: 0,
            extra: match wr.bind {
                Some(bind_mw) => ibv_wr_extra { bind_mw },
                None => ibv_wr_extra { tso: ibv_wr_tso { hdr: ptr::null_mut(), hdr_sz: 0, mss: 0 } },
            },
        };
        let mut requests: Vec<ibv_send_wr> = wrs.iter().enumerate().map(request).collect();
        let (first, len) = (requests.as_mut_ptr(), requests.len());
        for i in 1..len {
            // SAFETY: both are in the vector.
            unsafe { (*first.add(i - 1)).next = first.add(i) };
        }
        let mut bad = ptr::null_mut();
        // SAFETY: alive for the call.
        match unsafe { post_send(qp, first, &mut bad) } {
            0 => Ok(()),
            errno => Err((errno, (bad.addr() - first.addr()) / size_of::<ibv_send_wr>())),
        }
    }

    /// Posts receives of a slot each: its number is the id.
    pub fn receive(&self, slots: impl IntoIterator<Item = usize>) -> c_int {
        self.receive_of(slots, SLOT as u32)
    }

    pub fn receive_of(&self, slots: impl IntoIterator<Item = usize>, length: u32) -> c_int {
        for slot in slots {
            // SAFETY: alive.
            let mut run = ibv_sge { addr: self.at(slot * SLOT), length, lkey: unsafe { (*self.mr).lkey } };
            let mut wr = ibv_recv_wr { wr_id: slot as u64, next: ptr::null_mut(), sg_list: &mut run, num_sge: 1 };
            let mut bad = ptr::null_mut();
            // SAFETY: alive for the call.
            let errno = unsafe {
                match self.srq.is_null() {
                    true => post_recv(self.qp, &mut wr, &mut bad),
                    false => post_srq_recv(self.srq, &mut wr, &mut bad),
                }
            };
            if errno != 0 {
                assert_eq!(bad, &raw mut wr);
                return errno;
            }
        }
        0
    }

    pub fn poll(&self, cq: *mut ibv_cq, most: usize) -> Vec<ibv_wc> {
        let mut into = vec![ibv_wc::default(); most];
        // SAFETY: alive, with so much room.
        let got = unsafe { poll_cq(cq, most as c_int, into.as_mut_ptr()) };
        into.truncate(usize::try_from(got).unwrap());
        into
    }

    /// Waits for so many completions.
    pub fn take(&self, cq: *mut ibv_cq, count: usize) -> Vec<ibv_wc> {
        let start = Instant::now();
        let mut taken = Vec::new();
        while taken.len() < count {
            taken.extend(self.poll(cq, count - taken.len()));
            assert!(start.elapsed() < Duration::from_secs(10), "only {:?} came", ids(&taken));
        }
        taken
    }

    /// Id and status of sends, when so many have come.
    pub fn sent(&self, count: usize) -> Vec<(u64, u32)> {
        ids(&self.take(self.send_cq, count))
    }

    pub fn received(&self, count: usize) -> Vec<ibv_wc> {
        self.take(self.recv_cq, count)
    }

    pub fn arm(&self, cq: *mut ibv_cq) {
        // SAFETY: alive.
        assert_eq!(unsafe { req_notify_cq(cq, false) }, 0);
    }

    /// Takes completion events without waiting and acknowledges them.
    pub fn events(&self) -> Vec<*mut ibv_cq> {
        let mut taken = Vec::new();
        let (mut cq, mut context) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: alive.
        while unsafe { (lib().ibv_get_cq_event)(self.channel, &mut cq, &mut context) } == 0 {
            // SAFETY: alive.
            unsafe { (lib().ibv_ack_cq_events)(cq, 1) };
            taken.push(cq);
        }
        taken
    }

    /// Takes asynchronous events without waiting and acknowledges them.
    pub fn incidents(&self) -> Vec<u32> {
        incidents(self.context)
    }
}

pub fn incidents(context: *mut ibv_context) -> Vec<u32> {
    let mut taken = Vec::new();
    let mut event = ibv_async_event { element: ibv_async_element { port_num: 0 }, event_type: 0 };
    // SAFETY: open.
    while unsafe { (lib().ibv_get_async_event)(context, &mut event) } == 0 {
        // SAFETY: as it was taken.
        unsafe { (lib().ibv_ack_async_event)(&mut event) };
        taken.push(event.event_type);
    }
    taken
}

pub fn gid(device: usize) -> ibv_gid {
    let context = open(device);
    let mut gid = ibv_gid::default();
    // SAFETY: open.
    unsafe {
        assert_eq!((lib().ibv_query_gid)(context, 1, 0, &mut gid), 0);
        assert_eq!((lib().ibv_close_device)(context), 0);
    }
    gid
}

impl Drop for End {
    fn drop(&mut self) {
        if std::thread::panicking() {
            return;
        }
        // SAFETY: in the order that frees users first; nothing is used after.
        let answers = unsafe {
            [
                if self.qp.is_null() { 0 } else { (lib().ibv_destroy_qp)(self.qp) },
                if self.srq.is_null() { 0 } else { (lib().ibv_destroy_srq)(self.srq) },
                (lib().ibv_destroy_cq)(self.send_cq),
                (lib().ibv_destroy_cq)(self.recv_cq),
                (lib().ibv_destroy_comp_channel)(self.channel),
                (lib().ibv_dereg_mr)(self.mr),
                (lib().ibv_dealloc_pd)(self.pd),
                (lib().ibv_close_device)(self.context),
            ]
        };
        assert_eq!(answers, [0; 8]);
        // SAFETY: made by `new`; no region has it any more.
        drop(unsafe { Box::from_raw(self.memory.cast::<[u8; MEMORY]>()) });
    }
}

/// Two ends, connected.
pub fn pair(a: Shape, b: Shape) -> (End, End) {
    let (a, b) = (End::new(a), End::new(b));
    a.connect(a.qp, &b.shape, b.number());
    b.connect(b.qp, &a.shape, a.number());
    (a, b)
}
