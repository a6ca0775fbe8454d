//! Receives: shared receive queues, and those of queue pairs.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::ffi::c_int;
use std::ptr;

use distkv_fabric::verbs::sys::*;

use crate::device::MAX_WR;
use crate::state::{Hca, MAX_SGE, Receive, Srq, Told, lock, refuse, until_settled};

/// Bits of `ibv_modify_srq`'s mask.
const SRQ_MAX_WR: c_int = 1;
const SRQ_LIMIT: c_int = 2;

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_create_srq(pd: *mut ibv_pd, init: *mut ibv_srq_init_attr) -> *mut ibv_srq {
    // SAFETY: alive; the caller's.
    let (context, domain, srq_context, attr) =
        unsafe { ((*pd).context, (*pd).handle, (*init).srq_context, (*init).attr) };
    let mut hca = lock();
    if hca.pds.get(domain).is_none()
        || !(1..=MAX_WR).contains(&attr.max_wr)
        || !(1..=MAX_SGE as u32).contains(&attr.max_sge)
    {
        return refuse(libc::EINVAL);
    }
    let made = hca.srqs.insert(|handle| {
        let srq = ibv_srq {
            context,
            srq_context,
            pd,
            handle,
            mutex: libc::PTHREAD_MUTEX_INITIALIZER,
            cond: libc::PTHREAD_COND_INITIALIZER,
            events_completed: 0,
        };
        Srq {
            raw: Box::into_raw(Box::new(srq)),
            pd: domain,
            depth: attr.max_wr as usize,
            runs: attr.max_sge as usize,
            limit: 0,
            queue: VecDeque::with_capacity((attr.max_wr as usize).min(1024)),
            used: 0,
            users: 0,
            incidents: Told::default(),
        }
    });
    let Some(number) = made else { return refuse(libc::ENOMEM) };
    hca.hold(pd, 1);
    hca.srqs.get(number).map_or(ptr::null_mut(), |srq| srq.raw)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_modify_srq(srq: *mut ibv_srq, attr: *mut ibv_srq_attr, mask: c_int) -> c_int {
    // SAFETY: alive; the caller's.
    let (number, limit) = unsafe { ((*srq).handle, (*attr).srq_limit) };
    let mut hca = lock();
    match hca.srqs.get_mut(number) {
        // It keeps its size, as with most devices.
        Some(_) if mask & SRQ_MAX_WR != 0 => libc::EINVAL,
        Some(srq) if mask == SRQ_LIMIT && limit as usize <= srq.depth => {
            srq.limit = limit;
            hca.look_at_limit(number);
            0
        }
        _ => libc::EINVAL,
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_destroy_srq(srq: *mut ibv_srq) -> c_int {
    // SAFETY: alive.
    let (context, pd, number) = unsafe { ((*srq).context, (*srq).pd, (*srq).handle) };
    let mut hca = lock();
    match hca.srqs.get_mut(number) {
        None => return libc::EINVAL,
        Some(srq) if srq.users > 0 => return libc::EBUSY,
        Some(srq) => srq.limit = 0,
    }
    // SAFETY: every pattern of bits is a pointer; it is only compared.
    let of_it = |event: &ibv_async_event| unsafe {
        event.event_type == IBV_EVENT_SRQ_LIMIT_REACHED && event.element.srq == srq
    };
    hca.forget_events(context, of_it);
    let mut hca = until_settled(hca, |hca| hca.srqs.get(number).is_none_or(|srq| srq.incidents.settled()));
    hca.srqs.remove(number);
    hca.hold(pd, -1);
    // SAFETY: made by `ibv_create_srq`.
    drop(unsafe { Box::from_raw(srq) });
    0
}

/// A request as it is kept; `None` if it has more runs than it may.
///
/// # Safety
/// `wr` and its list are readable.
unsafe fn keep(wr: *mut ibv_recv_wr, most: usize) -> Option<Receive> {
    // SAFETY: the caller's promise.
    let (id, list, count) = unsafe { ((*wr).wr_id, (*wr).sg_list, (*wr).num_sge) };
    let len = usize::try_from(count).ok().filter(|len| *len <= most)?;
    let mut runs = [ibv_sge::default(); MAX_SGE];
    for (i, run) in runs.iter_mut().enumerate().take(len) {
        // SAFETY: the caller's promise.
        *run = unsafe { *list.add(i) };
    }
    Some(Receive { id, runs, len })
}

/// Walks a chain; stops at the first request that `post` refuses.
///
/// # Safety
/// The chain is readable and `bad` can be written.
unsafe fn post_chain(
    hca: &mut Hca,
    mut wr: *mut ibv_recv_wr,
    bad: *mut *mut ibv_recv_wr,
    most: usize,
    mut post: impl FnMut(&mut Hca, Receive) -> c_int,
) -> c_int {
    hca.counts.receive_posts += 1;
    while !wr.is_null() {
        // SAFETY: the caller's promise.
        let errno = match unsafe { keep(wr, most) } {
            Some(receive) => post(hca, receive),
            None => libc::EINVAL,
        };
        if errno != 0 {
            // SAFETY: the caller's promise.
            unsafe { *bad = wr };
            return errno;
        }
        hca.counts.receives += 1;
        // SAFETY: the caller's promise.
        wr = unsafe { (*wr).next };
    }
    0
}

pub unsafe extern "C" fn post_srq_recv(srq: *mut ibv_srq, wr: *mut ibv_recv_wr, bad: *mut *mut ibv_recv_wr) -> c_int {
    // SAFETY: alive.
    let number = unsafe { (*srq).handle };
    let mut hca = lock();
    let Some(most) = hca.srqs.get(number).map(|srq| srq.runs) else { return libc::EINVAL };
    let post = |hca: &mut Hca, receive| match hca.srqs.get_mut(number) {
        Some(srq) if srq.used < srq.depth => {
            srq.used += 1;
            srq.queue.push_back(receive);
            0
        }
        _ => libc::ENOMEM,
    };
    // SAFETY: the caller's promise.
    let errno = unsafe { post_chain(&mut hca, wr, bad, most, post) };
    hca.stirred = true;
    hca.settle();
    errno
}

pub unsafe extern "C" fn post_recv(qp: *mut ibv_qp, wr: *mut ibv_recv_wr, bad: *mut *mut ibv_recv_wr) -> c_int {
    // SAFETY: alive.
    let number = unsafe { (*qp).qp_num };
    let mut hca = lock();
    let Some(most) = hca.qps.get(number).map(|qp| qp.cap.max_recv_sge as usize) else { return libc::EINVAL };
    let post = |hca: &mut Hca, receive| match hca.qps.get_mut(number) {
        Some(qp) if qp.srq.is_some() || qp.state == IBV_QPS_RESET => libc::EINVAL,
        Some(qp) if qp.receives_used < qp.cap.max_recv_wr as usize => {
            qp.receives_used += 1;
            qp.receives.push_back(receive);
            0
        }
        _ => libc::ENOMEM,
    };
    // SAFETY: the caller's promise.
    let errno = unsafe { post_chain(&mut hca, wr, bad, most, post) };
    if hca.qps.get(number).is_some_and(|qp| qp.state == IBV_QPS_ERR) {
        hca.flush(number);
    }
    hca.stirred = true;
    hca.settle();
    errno
}

impl Hca {
    /// Tells once that a shared receive queue has fewer receives than its limit.
    pub fn look_at_limit(&mut self, number: u32) {
        let Some(srq) = self.srqs.get_mut(number) else { return };
        if srq.limit > 0 && srq.queue.len() < srq.limit as usize {
            srq.limit = 0;
            let raw = srq.raw;
            // SAFETY: alive: it is in the table.
            let context = unsafe { (*raw).context };
            self.tell(context, IBV_EVENT_SRQ_LIMIT_REACHED, ibv_async_element { srq: raw });
        }
    }
}
