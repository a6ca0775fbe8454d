//! What it costs to open memory to one peer and to close it again: a registration
//! of its own, or a memory window of type 2 on one that is there; beside what the
//! transport does now, a copy out of a landing zone.
//!
//!     cargo run --release -p distkv-fabric --example window_cost -- [DEVICE [ROUNDS]]
//!
//! `scripts/verbs-perf --windows` runs it in a guest with a software device, whose
//! times mean something beside each other only. A device without windows of type 2
//! says so. First it is shown that a window lets the peer in, and out again.
#![allow(unsafe_code)]

use std::path::Path;
use std::process::ExitCode;
use std::ptr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use distkv_fabric::Memory;
use distkv_fabric::verbs::device::{
    Context, Link, Mr, MrAccess, Pd, Place, Rail, SYSFS, VerbsConfig, check, mtu_number, rails, survey,
};
use distkv_fabric::verbs::sys::*;

/// Bytes that are opened at once: one layer of one rBlock of an 8B model, and of 32.
const SIZES: [usize; 2] = [64 << 10, 2 << 20];
/// Windows of one rBlock, a range a layer.
const LAYERS: usize = 32;
const PSN: u32 = 77;
/// What follows is given up when a completion takes longer.
const PATIENCE: Duration = Duration::from_secs(20);

type Outcome<T> = Result<T, String>;

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let device = arguments.next();
    let rounds = arguments.next().map_or(Ok(200), |text| text.parse::<usize>());
    let Ok(rounds @ 1..) = rounds else {
        eprintln!("usage: window_cost [DEVICE [ROUNDS]]");
        return ExitCode::from(2);
    };
    match run(device, rounds) {
        Ok(()) => ExitCode::SUCCESS,
        Err(because) => {
            eprintln!("error: {because}");
            ExitCode::FAILURE
        }
    }
}

fn run(device: Option<String>, rounds: usize) -> Outcome<()> {
    let lib = Lib::get()?;
    let found = survey(lib, Path::new(SYSFS)).map_err(text)?;
    let config = VerbsConfig { devices: device.into_iter().collect(), ..VerbsConfig::default() };
    let mut chosen = rails(&found.devices, &Place::default(), &config);
    if chosen.chosen.is_empty() {
        return Err(format!("no port can be used: {:?} {:?}", chosen.passed_over, found.failed));
    }
    let rail = chosen.chosen.remove(0);
    let pair = Pair::new(lib, &rail)?;
    let limits = pair.context.attributes().map_err(text)?;
    if limits.device_cap_flags & IBV_DEVICE_MEM_WINDOW_TYPE_2B == 0 {
        return Err(format!("{} has no memory windows of type 2B", rail.device));
    }
    Pair::new(lib, &rail)?.shows()?;
    let memory = Memory::new(LAYERS * SIZES[1]).map_err(text)?;
    // Every page is there before anything is timed.
    (0..memory.len()).step_by(4096).try_for_each(|at| memory.write(at, &[1])).map_err(text)?;
    println!("{}:{}, {rounds} rounds, memory on {}", rail.device, rail.port, memory.pages());
    println!("{:46} {:>9} {:>9}", "microseconds", "min", "median");
    for size in SIZES {
        let name = format!("{} KiB", size >> 10);
        registrations(&pair, &memory, size, rounds, &name)?;
        windows(&pair, &memory, size, rounds, &name)?;
        let landing = Memory::new(size).map_err(text)?;
        landing.copy_to(0, &memory, 0, size).map_err(text)?;
        let copies = times(rounds, |_| landing.copy_to(0, &memory, 0, size).map_err(text))?;
        tell(&format!("{name}: copy"), copies, 1);
    }
    Ok(())
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// The time of each of `rounds`.
fn times(rounds: usize, mut act: impl FnMut(usize) -> Outcome<()>) -> Outcome<Vec<Duration>> {
    (0..rounds)
        .map(|round| {
            let start = Instant::now();
            act(round)?;
            Ok(start.elapsed())
        })
        .collect()
}

/// Minimum and median of one of `each` things that were done at once.
fn tell(what: &str, mut times: Vec<Duration>, each: usize) {
    times.sort_unstable();
    let micros = |time: Duration| time.as_secs_f64() * 1e6 / each as f64;
    println!("{what:46} {:9.2} {:9.2}", micros(times[0]), micros(times[times.len() / 2]));
}

fn registrations(pair: &Pair, memory: &Arc<Memory>, size: usize, rounds: usize, name: &str) -> Outcome<()> {
    let (mut made, mut gone) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        let start = Instant::now();
        // SAFETY: the range is of `memory`, which is the owner.
        let region = unsafe {
            Mr::register_raw(&pair.pd, memory.as_ptr(), size, MrAccess::RemoteWrite, Arc::new(memory.clone()))
        };
        let region = region.map_err(text)?;
        made.push(start.elapsed());
        let start = Instant::now();
        drop(region);
        gone.push(start.elapsed());
    }
    tell(&format!("{name}: register"), made, 1);
    tell(&format!("{name}: deregister"), gone, 1);
    Ok(())
}

fn windows(pair: &Pair, memory: &Arc<Memory>, size: usize, rounds: usize, name: &str) -> Outcome<()> {
    let region = Mr::register(&pair.pd, memory, MrAccess::Windows).map_err(text)?;
    let allocations = times(rounds, |_| Window::new(&pair.pd).map(drop))?;
    tell(&format!("{name}: make and free a window"), allocations, 1);
    for count in [1, LAYERS] {
        let mut windows = (0..count).map(|_| Window::new(&pair.pd)).collect::<Outcome<Vec<_>>>()?;
        let (mut bound, mut gone) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            let binds: Vec<ibv_send_wr> =
                windows.iter_mut().enumerate().map(|(i, w)| w.bind(&region, i * size, size)).collect();
            let start = Instant::now();
            pair.does(binds)?;
            bound.push(start.elapsed());
            windows.iter_mut().for_each(Window::is_bound);
            let ends: Vec<ibv_send_wr> = windows.iter().map(Window::invalidate).collect();
            let start = Instant::now();
            pair.does(ends)?;
            gone.push(start.elapsed());
        }
        let many = if count == 1 { String::new() } else { format!(", one of {count} posted at once") };
        tell(&format!("{name}: bind{many}"), bound, count);
        tell(&format!("{name}: invalidate{many}"), gone, count);
    }
    Ok(())
}

/// A request without bytes.
fn request(opcode: ibv_enum) -> ibv_send_wr {
    ibv_send_wr {
        wr_id: 0,
        next: ptr::null_mut(),
        sg_list: ptr::null_mut(),
        num_sge: 0,
        opcode,
        send_flags: 0,
        imm_data: 0,
        wr: ibv_wr_target { rdma: ibv_wr_rdma { remote_addr: 0, rkey: 0 } },
        xrc_remote_srqn: 0,
        extra: ibv_wr_extra { tso: ibv_wr_tso { hdr: ptr::null_mut(), hdr_sz: 0, mss: 0 } },
    }
}

struct Window {
    raw: *mut ibv_mw,
    rkey: u32,
    _pd: Arc<Pd>,
}

impl Window {
    fn new(pd: &Arc<Pd>) -> Outcome<Self> {
        // SAFETY: the domain is alive.
        let raw = unsafe { alloc_mw(pd.raw(), IBV_MW_TYPE_2) };
        if raw.is_null() {
            return Err(format!("making a window: {}", std::io::Error::last_os_error()));
        }
        // SAFETY: alive.
        Ok(Self { raw, rkey: unsafe { (*raw).rkey }, _pd: pd.clone() })
    }

    /// To a part of `region`, under the next of its keys.
    fn bind(&mut self, region: &Mr, at: usize, len: usize) -> ibv_send_wr {
        self.rkey = (self.rkey & !0xff) | (self.rkey.wrapping_add(1) & 0xff);
        let bind_info = ibv_mw_bind_info {
            mr: region.raw(),
            addr: region.address() + at as u64,
            length: len as u64,
            mw_access_flags: IBV_ACCESS_REMOTE_WRITE,
        };
        let bind_mw = ibv_wr_bind_mw { mw: self.raw, rkey: self.rkey, bind_info };
        ibv_send_wr { extra: ibv_wr_extra { bind_mw }, ..request(IBV_WR_BIND_MW) }
    }

    /// It is bound under its new key: a driver that looks a window up by the key in
    /// the library's object finds it by no other from now on.
    fn is_bound(&mut self) {
        // SAFETY: alive.
        unsafe { (*self.raw).rkey = self.rkey };
    }

    fn invalidate(&self) -> ibv_send_wr {
        // The key lies where other requests have their immediate.
        ibv_send_wr { imm_data: self.rkey, ..request(IBV_WR_LOCAL_INV) }
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: made by `new`; no request names it any more.
        unsafe { dealloc_mw(self.raw) };
    }
}

/// Two queue pairs of one device, connected: `owner` opens memory to `peer`.
struct Pair {
    owner: *mut ibv_qp,
    peer: *mut ibv_qp,
    cq: *mut ibv_cq,
    pd: Arc<Pd>,
    context: Arc<Context>,
    lib: &'static Lib,
}

impl Pair {
    fn new(lib: &'static Lib, rail: &Rail) -> Outcome<Self> {
        let context = Context::open(lib, &rail.device).map_err(text)?;
        let pd = Pd::new(&context).map_err(text)?;
        let failed = |what: &str| format!("{what}: {}", std::io::Error::last_os_error());
        // SAFETY: the context is open; no channel.
        let cq = unsafe { (lib.ibv_create_cq)(context.raw(), 2 * LAYERS as i32, ptr::null_mut(), ptr::null_mut(), 0) };
        if cq.is_null() {
            return Err(failed("making a completion queue"));
        }
        let mut pair = Self { owner: ptr::null_mut(), peer: ptr::null_mut(), cq, pd, context, lib };
        let cap = ibv_qp_cap {
            max_send_wr: 2 * LAYERS as u32,
            max_recv_wr: 1,
            max_send_sge: 1,
            max_recv_sge: 1,
            max_inline_data: 0,
        };
        let (qp_context, srq) = (ptr::null_mut(), ptr::null_mut());
        for qp in [&mut pair.owner, &mut pair.peer] {
            let mut init =
                ibv_qp_init_attr { qp_context, send_cq: cq, recv_cq: cq, srq, cap, qp_type: IBV_QPT_RC, sq_sig_all: 0 };
            // SAFETY: all parts are alive.
            *qp = unsafe { (lib.ibv_create_qp)(pair.pd.raw(), &mut init) };
            if qp.is_null() {
                return Err(failed("making a queue pair"));
            }
        }
        pair.join(pair.owner, pair.peer, rail)?;
        pair.join(pair.peer, pair.owner, rail)?;
        Ok(pair)
    }

    fn join(&self, qp: *mut ibv_qp, to: *mut ibv_qp, rail: &Rail) -> Outcome<()> {
        let modify = |mut attr: ibv_qp_attr, mask| {
            // SAFETY: alive; `attr` is read during the call only.
            check("connecting a queue pair", unsafe { (self.lib.ibv_modify_qp)(qp, &mut attr, mask) }).map_err(text)
        };
        let attr = ibv_qp_attr {
            qp_state: IBV_QPS_INIT,
            port_num: rail.port,
            qp_access_flags: IBV_ACCESS_REMOTE_WRITE,
            ..Default::default()
        };
        modify(attr, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS)?;
        let grh =
            ibv_global_route { dgid: rail.gid.raw, sgid_index: rail.gid.index, hop_limit: 64, ..Default::default() };
        let is_global = u8::from(rail.global || rail.link == Link::Ethernet);
        let attr = ibv_qp_attr {
            qp_state: IBV_QPS_RTR,
            ah_attr: ibv_ah_attr { grh, dlid: rail.lid, is_global, port_num: rail.port, ..Default::default() },
            path_mtu: mtu_number(rail.mtu).ok_or("no such MTU")?,
            // SAFETY: alive.
            dest_qp_num: unsafe { (*to).qp_num },
            rq_psn: PSN,
            min_rnr_timer: 12,
            ..Default::default()
        };
        let mask = IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN;
        modify(attr, mask | IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER)?;
        let attr = ibv_qp_attr {
            qp_state: IBV_QPS_RTS,
            sq_psn: PSN,
            timeout: 14,
            retry_cnt: 6,
            rnr_retry: 6,
            ..Default::default()
        };
        let mask = IBV_QP_STATE | IBV_QP_SQ_PSN | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT;
        modify(attr, mask | IBV_QP_RNR_RETRY | IBV_QP_MAX_QP_RD_ATOMIC)
    }

    /// The owner posts all with one call and waits for the last.
    fn does(&self, requests: Vec<ibv_send_wr>) -> Outcome<()> {
        match self.status(self.owner, requests)? {
            0 => Ok(()),
            status => Err(format!("a request of the owner's ended with status {status}")),
        }
    }

    /// The status of the last of some requests, or of the first that failed.
    fn status(&self, qp: *mut ibv_qp, mut requests: Vec<ibv_send_wr>) -> Outcome<u32> {
        let (first, last) = (requests.as_mut_ptr(), requests.len() - 1);
        for i in 0..last {
            // SAFETY: both are in the vector.
            unsafe { (*first.add(i)).next = first.add(i + 1) };
        }
        // SAFETY: in the vector.
        unsafe { (*first.add(last)).send_flags |= IBV_SEND_SIGNALED };
        let mut bad = ptr::null_mut();
        // SAFETY: alive; the chain lives during the call.
        check("posting", unsafe { post_send(qp, first, &mut bad) }).map_err(text)?;
        let start = Instant::now();
        loop {
            let mut completion = std::mem::MaybeUninit::<ibv_wc>::uninit();
            // SAFETY: alive; there is room for one.
            match unsafe { poll_cq(self.cq, 1, completion.as_mut_ptr()) } {
                0 if start.elapsed() > PATIENCE => return Err("a request does not complete".into()),
                0 => std::hint::spin_loop(),
                // SAFETY: it was filled.
                1 => return Ok(unsafe { completion.assume_init() }.status),
                error => return Err(format!("polling failed: {error}")),
            }
        }
    }

    /// A write of the peer's lands through a window that is bound, and is refused
    /// once it is invalidated. Ends both queue pairs' use, so on a pair of its own.
    fn shows(&self) -> Outcome<()> {
        let (source, target) = (Memory::new(4096).map_err(text)?, Memory::new(4096).map_err(text)?);
        source.write(0, b"let in").map_err(text)?;
        let from = Mr::register(&self.pd, &source, MrAccess::Local).map_err(text)?;
        let to = Mr::register(&self.pd, &target, MrAccess::Windows).map_err(text)?;
        let mut window = Window::new(&self.pd)?;
        self.does(vec![window.bind(&to, 1024, 64)])?;
        window.is_bound();
        let mut run = ibv_sge { addr: from.address(), length: 6, lkey: from.lkey() };
        let write = |at: u64, run: &mut ibv_sge| ibv_send_wr {
            sg_list: run,
            num_sge: 1,
            wr: ibv_wr_target { rdma: ibv_wr_rdma { remote_addr: to.address() + at, rkey: window.rkey } },
            ..request(IBV_WR_RDMA_WRITE)
        };
        let landed = self.status(self.peer, vec![write(1024, &mut run)])?;
        let mut bytes = [0; 6];
        target.read(1024, &mut bytes).map_err(text)?;
        if landed != 0 || &bytes != b"let in" {
            return Err(format!("a write through a bound window ended with status {landed}, {bytes:?}"));
        }
        self.does(vec![window.invalidate()])?;
        target.write(1024, b"closed").map_err(text)?;
        // Status 10: remote access error.
        let refused = self.status(self.peer, vec![write(1024, &mut run)])?;
        target.read(1024, &mut bytes).map_err(text)?;
        if refused != IBV_WC_REM_ACCESS_ERR || &bytes != b"closed" {
            return Err(format!("a write through an invalidated window ended with status {refused}, {bytes:?}"));
        }
        println!("a bound window lets the peer write, an invalidated one does not");
        Ok(())
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        for qp in [self.owner, self.peer] {
            if !qp.is_null() {
                // SAFETY: made in `new`; nothing refers to it.
                unsafe { (self.lib.ibv_destroy_qp)(qp) };
            }
        }
        // SAFETY: made in `new`; its queue pairs are gone.
        unsafe { (self.lib.ibv_destroy_cq)(self.cq) };
    }
}
