//! Queue pairs: their states, and what is posted to send.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::ffi::c_int;
use std::ptr;

use distkv_fabric::verbs::sys::*;

use crate::device::{MAX_QP, MAX_WR};
use crate::state::{Bind, Hca, MAX_SGE, Qp, Request, Settings, Told, lock, refuse, until_settled};

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_create_qp(pd: *mut ibv_pd, init: *mut ibv_qp_init_attr) -> *mut ibv_qp {
    // SAFETY: alive; the caller's.
    let (context, domain, init) = unsafe { ((*pd).context, (*pd).handle, &mut *init) };
    if init.qp_type != IBV_QPT_RC {
        return refuse(libc::EOPNOTSUPP);
    }
    let mut hca = lock();
    let mut cap = init.cap;
    if !init.srq.is_null() {
        (cap.max_recv_wr, cap.max_recv_sge) = (0, 0);
    }
    let sges = MAX_SGE as u32;
    let fits = cap.max_send_wr <= MAX_WR
        && cap.max_recv_wr <= MAX_WR
        && cap.max_send_sge <= sges
        && cap.max_recv_sge <= sges
        && cap.max_inline_data <= Settings::get().inline
        && hca.qps.len() < MAX_QP as usize;
    if !fits || init.send_cq.is_null() || init.recv_cq.is_null() {
        return refuse(libc::EINVAL);
    }
    // SAFETY: alive.
    let (send_cq, recv_cq) = unsafe { ((*init.send_cq).handle, (*init.recv_cq).handle) };
    // SAFETY: alive if there is one.
    let srq = (!init.srq.is_null()).then(|| unsafe { (*init.srq).handle });
    let Some(device) = hca.device_of(context) else { return refuse(libc::EINVAL) };
    let known = hca.pds.get(domain).is_some()
        && [send_cq, recv_cq].iter().all(|cq| hca.cqs.get(*cq).is_some())
        && srq.is_none_or(|srq| hca.srqs.get(srq).is_some());
    if !known {
        return refuse(libc::EINVAL);
    }
    init.cap = cap;
    let made = hca.qps.insert(|number| {
        let qp = ibv_qp {
            context,
            qp_context: init.qp_context,
            pd,
            send_cq: init.send_cq,
            recv_cq: init.recv_cq,
            srq: init.srq,
            handle: number,
            qp_num: number,
            state: IBV_QPS_RESET,
            qp_type: IBV_QPT_RC,
            mutex: libc::PTHREAD_MUTEX_INITIALIZER,
            cond: libc::PTHREAD_COND_INITIALIZER,
            events_completed: 0,
        };
        Qp {
            raw: Box::into_raw(Box::new(qp)),
            device,
            pd: domain,
            send_cq,
            recv_cq,
            srq,
            state: IBV_QPS_RESET,
            signal_all: init.sq_sig_all != 0,
            cap,
            attr: ibv_qp_attr::default(),
            requests: VecDeque::with_capacity((cap.max_send_wr as usize).min(1024)),
            posted: 0,
            retired: 0,
            inline: vec![0; cap.max_send_wr as usize * cap.max_inline_data as usize].into(),
            receives: VecDeque::new(),
            receives_used: 0,
            stall: None,
            waiting: false,
            runnable: false,
            heard: false,
            incidents: Told::default(),
        }
    });
    let Some(number) = made else { return refuse(libc::ENOMEM) };
    hca.hold(pd, 1);
    hca.count_users(send_cq, recv_cq, srq, 1);
    hca.qps.get(number).map_or(ptr::null_mut(), |qp| qp.raw)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_destroy_qp(qp: *mut ibv_qp) -> c_int {
    // SAFETY: alive.
    let (context, pd, number) = unsafe { ((*qp).context, (*qp).pd, (*qp).qp_num) };
    let mut hca = lock();
    let Some(this) = hca.qps.get_mut(number) else { return libc::EINVAL };
    // Nothing arrives any more, and nothing goes out.
    this.state = IBV_QPS_RESET;
    this.requests.clear();
    let (send_cq, recv_cq, srq) = (this.send_cq, this.recv_cq, this.srq);
    if !Settings::get().keep_completions {
        hca.purge(send_cq, number);
        hca.purge(recv_cq, number);
    }
    let of_it = |event: &ibv_async_event| {
        let kinds = [
            IBV_EVENT_QP_FATAL,
            IBV_EVENT_QP_REQ_ERR,
            IBV_EVENT_QP_ACCESS_ERR,
            IBV_EVENT_COMM_EST,
            IBV_EVENT_QP_LAST_WQE_REACHED,
        ];
        // SAFETY: every pattern of bits is a pointer; it is only compared.
        kinds.contains(&event.event_type) && unsafe { event.element.qp } == qp
    };
    hca.forget_events(context, of_it);
    let mut hca = until_settled(hca, |hca| hca.qps.get(number).is_none_or(|qp| qp.incidents.settled()));
    hca.qps.remove(number);
    hca.count_users(send_cq, recv_cq, srq, -1);
    hca.hold(pd, -1);
    hca.waiting.retain(|waiting| *waiting != number);
    hca.runnable.retain(|runnable| *runnable != number);
    hca.stirred = true;
    hca.settle();
    // SAFETY: made by `ibv_create_qp`.
    drop(unsafe { Box::from_raw(qp) });
    0
}

const TO_INIT: c_int = IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS;
const TO_RTR: c_int =
    IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN | IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER;
const TO_RTS: c_int = IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_SQ_PSN | IBV_QP_MAX_QP_RD_ATOMIC;

/// What a change of state asks for and what else it may change; `None` if there
/// is no such change.
fn masks(from: ibv_enum, to: ibv_enum) -> Option<(c_int, c_int)> {
    match (from, to) {
        (_, IBV_QPS_RESET | IBV_QPS_ERR) => Some((0, 0)),
        (IBV_QPS_RESET, IBV_QPS_INIT) => Some((TO_INIT, 0)),
        (IBV_QPS_INIT, IBV_QPS_INIT) => Some((0, TO_INIT)),
        (IBV_QPS_INIT, IBV_QPS_RTR) => Some((TO_RTR, IBV_QP_ACCESS_FLAGS | IBV_QP_PKEY_INDEX)),
        (IBV_QPS_RTR, IBV_QPS_RTS) => Some((TO_RTS, IBV_QP_CUR_STATE | IBV_QP_ACCESS_FLAGS | IBV_QP_MIN_RNR_TIMER)),
        (IBV_QPS_RTS, IBV_QPS_RTS) => Some((0, IBV_QP_CUR_STATE | IBV_QP_ACCESS_FLAGS | IBV_QP_MIN_RNR_TIMER)),
        _ => None,
    }
}

/// Are the values that `mask` names possible ones?
fn possible(attr: &ibv_qp_attr, mask: c_int) -> bool {
    let ah = &attr.ah_attr;
    let checks = [
        (IBV_QP_PORT, attr.port_num == 1),
        (IBV_QP_PKEY_INDEX, attr.pkey_index == 0),
        // Ethernet: every packet has a GID, and only the first of ours is one.
        (IBV_QP_AV, ah.is_global == 1 && ah.grh.sgid_index == 0 && ah.port_num == 1 && ah.sl < 16),
        (IBV_QP_PATH_MTU, (IBV_MTU_256..=IBV_MTU_4096).contains(&attr.path_mtu)),
        (IBV_QP_DEST_QPN, attr.dest_qp_num < 1 << 24),
        (IBV_QP_RQ_PSN, attr.rq_psn < 1 << 24),
        (IBV_QP_SQ_PSN, attr.sq_psn < 1 << 24),
        (IBV_QP_MIN_RNR_TIMER, attr.min_rnr_timer < 32),
        (IBV_QP_TIMEOUT, attr.timeout < 32),
        (IBV_QP_RETRY_CNT, attr.retry_cnt < 8),
        (IBV_QP_RNR_RETRY, attr.rnr_retry < 8),
        (IBV_QP_MAX_QP_RD_ATOMIC, attr.max_rd_atomic <= 16),
        (IBV_QP_MAX_DEST_RD_ATOMIC, attr.max_dest_rd_atomic <= 16),
    ];
    checks.iter().all(|(bit, fine)| mask & bit == 0 || *fine)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_modify_qp(qp: *mut ibv_qp, attr: *mut ibv_qp_attr, mask: c_int) -> c_int {
    // SAFETY: alive; the caller's.
    let (number, new) = unsafe { ((*qp).qp_num, *attr) };
    let mut hca = lock();
    let Some(this) = hca.qps.get_mut(number) else { return libc::EINVAL };
    let to = if mask & IBV_QP_STATE != 0 { new.qp_state } else { this.state };
    let Some((asked, optional)) = masks(this.state, to) else { return libc::EINVAL };
    let rest = mask & !IBV_QP_STATE;
    if rest & asked != asked || rest & !(asked | optional) != 0 || !possible(&new, rest) {
        return libc::EINVAL;
    }
    let attr = &mut this.attr;
    let mut take = |bit: c_int, set: fn(&mut ibv_qp_attr, &ibv_qp_attr)| {
        if mask & bit != 0 {
            set(attr, &new);
        }
    };
    take(IBV_QP_ACCESS_FLAGS, |a, n| a.qp_access_flags = n.qp_access_flags);
    take(IBV_QP_PORT, |a, n| a.port_num = n.port_num);
    take(IBV_QP_AV, |a, n| a.ah_attr = n.ah_attr);
    take(IBV_QP_PATH_MTU, |a, n| a.path_mtu = n.path_mtu);
    take(IBV_QP_DEST_QPN, |a, n| a.dest_qp_num = n.dest_qp_num);
    take(IBV_QP_RQ_PSN, |a, n| a.rq_psn = n.rq_psn);
    take(IBV_QP_SQ_PSN, |a, n| a.sq_psn = n.sq_psn);
    take(IBV_QP_MIN_RNR_TIMER, |a, n| a.min_rnr_timer = n.min_rnr_timer);
    take(IBV_QP_TIMEOUT, |a, n| a.timeout = n.timeout);
    take(IBV_QP_RETRY_CNT, |a, n| a.retry_cnt = n.retry_cnt);
    take(IBV_QP_RNR_RETRY, |a, n| a.rnr_retry = n.rnr_retry);
    take(IBV_QP_MAX_QP_RD_ATOMIC, |a, n| a.max_rd_atomic = n.max_rd_atomic);
    take(IBV_QP_MAX_DEST_RD_ATOMIC, |a, n| a.max_dest_rd_atomic = n.max_dest_rd_atomic);
    match to {
        IBV_QPS_ERR => hca.fail(number),
        IBV_QPS_RESET => {
            this.requests.clear();
            this.receives.clear();
            (this.posted, this.retired, this.receives_used) = (0, 0, 0);
            (this.stall, this.heard) = (None, false);
            this.attr = ibv_qp_attr::default();
            let (send_cq, recv_cq) = (this.send_cq, this.recv_cq);
            hca.purge(send_cq, number);
            hca.purge(recv_cq, number);
            hca.enter(number, IBV_QPS_RESET);
        }
        _ => hca.enter(number, to),
    }
    hca.settle();
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_query_qp(
    qp: *mut ibv_qp,
    attr: *mut ibv_qp_attr,
    _mask: c_int,
    init: *mut ibv_qp_init_attr,
) -> c_int {
    // SAFETY: alive.
    let raw = unsafe { &*qp };
    let hca = lock();
    let Some(this) = hca.qps.get(raw.qp_num) else { return libc::EINVAL };
    let state = this.state;
    let told = ibv_qp_attr { qp_state: state, cur_qp_state: state, cap: this.cap, ..this.attr };
    let made = ibv_qp_init_attr {
        qp_context: raw.qp_context,
        send_cq: raw.send_cq,
        recv_cq: raw.recv_cq,
        srq: raw.srq,
        cap: this.cap,
        qp_type: IBV_QPT_RC,
        sq_sig_all: c_int::from(this.signal_all),
    };
    // SAFETY: the caller's.
    unsafe {
        attr.write(told);
        init.write(made);
    }
    0
}

/// A request as it is kept, its inline bytes copied; or an errno.
///
/// # Safety
/// `wr`, its list and its inline bytes are readable.
unsafe fn keep(qp: &mut Qp, wr: *mut ibv_send_wr) -> Result<Request, c_int> {
    // SAFETY: the caller's promise.
    let wr = unsafe { &*wr };
    if matches!(qp.state, IBV_QPS_RESET | IBV_QPS_INIT | IBV_QPS_RTR) {
        return Err(libc::EINVAL);
    }
    if qp.posted - qp.retired >= u64::from(qp.cap.max_send_wr) {
        return Err(libc::ENOMEM);
    }
    let len = usize::try_from(wr.num_sge).map_err(|_| libc::EINVAL)?;
    if len > qp.cap.max_send_sge as usize {
        return Err(libc::EINVAL);
    }
    let mut request = Request {
        id: wr.wr_id,
        number: qp.posted,
        opcode: wr.opcode,
        signalled: qp.signal_all || wr.send_flags & IBV_SEND_SIGNALED != 0,
        solicited: wr.send_flags & IBV_SEND_SOLICITED != 0,
        immediate: wr.imm_data,
        address: 0,
        rkey: 0,
        runs: [ibv_sge::default(); MAX_SGE],
        len,
        inline: None,
        bind: Bind::default(),
    };
    match wr.opcode {
        IBV_WR_SEND | IBV_WR_SEND_WITH_IMM => {}
        IBV_WR_RDMA_WRITE | IBV_WR_RDMA_WRITE_WITH_IMM => {
            // SAFETY: what these requests fill in.
            let target = unsafe { wr.wr.rdma };
            (request.address, request.rkey) = (target.remote_addr, target.rkey);
        }
        IBV_WR_BIND_MW => {
            // SAFETY: what this request fills in.
            let bind = unsafe { wr.extra.bind_mw };
            let info = bind.bind_info;
            if bind.mw.is_null() || info.mr.is_null() || wr.num_sge != 0 {
                return Err(libc::EINVAL);
            }
            // SAFETY: both are alive while the request is posted.
            let (window, region) = unsafe { ((*bind.mw).handle, (*info.mr).handle) };
            let (rkey, address, len, access) = (bind.rkey, info.addr, info.length, info.mw_access_flags);
            request.bind = Bind { window, rkey, region, address, len, access };
        }
        _ => return Err(libc::EINVAL),
    }
    let most = qp.cap.max_inline_data as usize;
    let mut at = (qp.posted % u64::from(qp.cap.max_send_wr)) as usize * most;
    let mut total = 0;
    for (i, kept) in request.runs.iter_mut().enumerate().take(len) {
        // SAFETY: the caller's promise.
        let run = unsafe { *wr.sg_list.add(i) };
        *kept = run;
        if wr.send_flags & IBV_SEND_INLINE != 0 {
            total += run.length as usize;
            if total > most {
                return Err(libc::ENOMEM);
            }
            let from = ptr::with_exposed_provenance::<u8>(run.addr as usize);
            // SAFETY: the caller's promise; the slot of this request has room for
            // `most` bytes. Inline bytes may be written by others meanwhile, as
            // with a device that copies them.
            unsafe { ptr::copy_nonoverlapping(from, qp.inline.as_mut_ptr().add(at), run.length as usize) };
            at += run.length as usize;
        }
    }
    if wr.send_flags & IBV_SEND_INLINE != 0 {
        request.inline = Some(total as u32);
    }
    Ok(request)
}

pub unsafe extern "C" fn post_send(qp: *mut ibv_qp, mut wr: *mut ibv_send_wr, bad: *mut *mut ibv_send_wr) -> c_int {
    // SAFETY: alive.
    let number = unsafe { (*qp).qp_num };
    let mut hca = lock();
    hca.counts.posts += 1;
    let mut errno = 0;
    while !wr.is_null() {
        let hca = &mut *hca;
        let Some(this) = hca.qps.get_mut(number) else { return libc::EINVAL };
        // SAFETY: the caller's promise.
        match unsafe { keep(this, wr) } {
            Ok(request) => {
                this.posted += 1;
                this.requests.push_back(request);
                hca.counts.requests += 1;
            }
            Err(why) => {
                // SAFETY: the caller's.
                unsafe { *bad = wr };
                errno = why;
                break;
            }
        }
        // SAFETY: the caller's promise.
        wr = unsafe { (*wr).next };
    }
    if hca.qps.get(number).is_some_and(|qp| qp.state == IBV_QPS_ERR) {
        hca.flush(number);
    }
    hca.may_run(number);
    hca.settle();
    errno
}

impl Hca {
    /// A queue pair more or less uses these.
    fn count_users(&mut self, send_cq: u32, recv_cq: u32, srq: Option<u32>, change: isize) {
        for cq in [send_cq, recv_cq] {
            if let Some(cq) = self.cqs.get_mut(cq) {
                cq.users = cq.users.wrapping_add_signed(change);
            }
        }
        if let Some(srq) = srq.and_then(|srq| self.srqs.get_mut(srq)) {
            srq.users = srq.users.wrapping_add_signed(change);
        }
    }

    /// A queue pair is in another state; others may have waited for that.
    pub fn enter(&mut self, number: u32, state: ibv_enum) {
        if let Some(qp) = self.qps.get_mut(number) {
            qp.state = state;
            // SAFETY: alive: it is in the table.
            unsafe { (*qp.raw).state = state };
            self.stirred = true;
        }
    }
}
