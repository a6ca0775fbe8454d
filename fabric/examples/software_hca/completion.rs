//! Completion channels and completion queues.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::ffi::{c_int, c_uint, c_void};
use std::ptr;

use distkv_fabric::verbs::sys::*;

use crate::device::{MAX_CQE, VECTORS};
use crate::mailbox;
use crate::state::{ACKNOWLEDGED, Arm, Channel, Completion, Cq, Hca, Slot, Told, lock, refuse, until_settled};

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_create_comp_channel(context: *mut ibv_context) -> *mut ibv_comp_channel {
    let mut hca = lock();
    if hca.device_of(context).is_none() {
        return refuse(libc::EINVAL);
    }
    let Some(events) = mailbox::Mailbox::new() else { return ptr::null_mut() };
    let fd = events.fd();
    let made = hca.channels.insert(|number| {
        // The count of its users is the library's own; here it is the number.
        let raw = Box::into_raw(Box::new(ibv_comp_channel { context, fd, refcnt: number as c_int }));
        Channel { raw, events, users: 0 }
    });
    let Some(number) = made else { return refuse(libc::ENOMEM) };
    hca.count(context, 1);
    hca.channels.get(number).map_or(ptr::null_mut(), |channel| channel.raw)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_destroy_comp_channel(channel: *mut ibv_comp_channel) -> c_int {
    // SAFETY: alive.
    let (context, number) = unsafe { ((*channel).context, (*channel).refcnt as u32) };
    let mut hca = lock();
    match hca.channels.get(number) {
        None => return libc::EINVAL,
        Some(channel) if channel.users > 0 => return libc::EBUSY,
        Some(_) => {}
    }
    hca.channels.remove(number);
    hca.count(context, -1);
    // SAFETY: made by `ibv_create_comp_channel`.
    drop(unsafe { Box::from_raw(channel) });
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_create_cq(
    context: *mut ibv_context,
    entries: c_int,
    cq_context: *mut c_void,
    channel: *mut ibv_comp_channel,
    vector: c_int,
) -> *mut ibv_cq {
    let mut hca = lock();
    if hca.device_of(context).is_none() || !(1..=MAX_CQE as c_int).contains(&entries) || !(0..VECTORS).contains(&vector)
    {
        return refuse(libc::EINVAL);
    }
    // SAFETY: alive if there is one.
    let number = (!channel.is_null()).then(|| unsafe { (*channel).refcnt as u32 });
    if number.is_some_and(|number| hca.channels.get(number).is_none()) {
        return refuse(libc::EINVAL);
    }
    let made = hca.cqs.insert(|handle| {
        let cq = ibv_cq {
            context,
            channel,
            cq_context,
            handle,
            cqe: entries,
            mutex: libc::PTHREAD_MUTEX_INITIALIZER,
            cond: libc::PTHREAD_COND_INITIALIZER,
            comp_events_completed: 0,
            async_events_completed: 0,
        };
        Cq {
            raw: Box::into_raw(Box::new(cq)),
            channel: number,
            depth: entries as usize,
            queue: VecDeque::with_capacity((entries as usize).min(4096)),
            armed: None,
            overrun: false,
            users: 0,
            told: Told::default(),
            incidents: Told::default(),
        }
    });
    let Some(made) = made else { return refuse(libc::ENOMEM) };
    hca.count(context, 1);
    if let Some(channel) = number.and_then(|number| hca.channels.get_mut(number)) {
        channel.users += 1;
    }
    hca.cqs.get(made).map_or(ptr::null_mut(), |cq| cq.raw)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_destroy_cq(cq: *mut ibv_cq) -> c_int {
    // SAFETY: alive.
    let (context, number) = unsafe { ((*cq).context, (*cq).handle) };
    let mut hca = lock();
    let channel = match hca.cqs.get_mut(number) {
        None => return libc::EINVAL,
        Some(cq) if cq.users > 0 => return libc::EBUSY,
        Some(cq) => {
            cq.armed = None;
            cq.channel
        }
    };
    if let Some(channel) = channel.and_then(|channel| hca.channels.get_mut(channel)) {
        channel.events.retain(|event| *event != number);
        channel.users -= 1;
    }
    hca.forget_events(context, |event| event.event_type == IBV_EVENT_CQ_ERR && cq_of(event) == cq);
    let settled = |hca: &Hca| hca.cqs.get(number).is_none_or(|cq| cq.told.settled() && cq.incidents.settled());
    let mut hca = until_settled(hca, settled);
    hca.cqs.remove(number);
    hca.count(context, -1);
    // SAFETY: made by `ibv_create_cq`.
    drop(unsafe { Box::from_raw(cq) });
    0
}

/// Of a completion queue's event.
fn cq_of(event: &ibv_async_event) -> *mut ibv_cq {
    // SAFETY: every pattern of bits is a pointer; it is only compared.
    unsafe { event.element.cq }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_get_cq_event(
    channel: *mut ibv_comp_channel,
    cq: *mut *mut ibv_cq,
    cq_context: *mut *mut c_void,
) -> c_int {
    // SAFETY: alive.
    let (fd, number) = unsafe { ((*channel).fd, (*channel).refcnt as u32) };
    let taken = mailbox::next(fd, |hca| {
        let event = hca.channels.get_mut(number)?.events.pop()?;
        let cq = hca.cqs.get_mut(event)?;
        cq.told.taken += 1;
        Some(cq.raw)
    });
    let Some(taken) = taken else { return -1 };
    // SAFETY: the caller's; the queue is alive until the event is acknowledged.
    unsafe {
        *cq = taken;
        *cq_context = (*taken).cq_context;
    }
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_ack_cq_events(cq: *mut ibv_cq, count: c_uint) {
    // SAFETY: alive.
    let number = unsafe { (*cq).handle };
    if let Some(cq) = lock().cqs.get_mut(number) {
        cq.told.acknowledged += count;
        assert!(cq.told.acknowledged <= cq.told.taken, "software HCA: more completion events acknowledged than taken");
    }
    ACKNOWLEDGED.notify_all();
}

pub unsafe extern "C" fn poll(cq: *mut ibv_cq, room: c_int, into: *mut ibv_wc) -> c_int {
    // SAFETY: alive.
    let number = unsafe { (*cq).handle };
    let mut guard = lock();
    let hca = &mut *guard;
    let Some(cq) = hca.cqs.get_mut(number) else { return -libc::EINVAL };
    let mut taken = 0;
    while taken < room
        && let Some(completion) = cq.queue.pop_front()
    {
        // SAFETY: the caller has room for so many.
        unsafe { into.add(taken as usize).write(completion.wc) };
        taken += 1;
        let qp = hca.qps.get_mut(completion.wc.qp_num);
        match (completion.slot, qp) {
            (Slot::Send(number), Some(qp)) => qp.retired = qp.retired.max(number + 1),
            (Slot::Receive, Some(qp)) => qp.receives_used -= 1,
            (Slot::Shared(srq), _) => {
                if let Some(srq) = hca.srqs.get_mut(srq) {
                    srq.used -= 1;
                }
            }
            (Slot::Send(_) | Slot::Receive, None) => {}
        }
    }
    hca.counts.polls += 1;
    hca.counts.empty_polls += u64::from(taken == 0);
    hca.counts.completions += taken as u64;
    if taken == 0 && !hca.runnable.is_empty() {
        // Whoever spins here must not keep the thread from its turn.
        drop(guard);
        std::thread::yield_now();
    }
    taken
}

pub unsafe extern "C" fn arm(cq: *mut ibv_cq, solicited_only: c_int) -> c_int {
    // SAFETY: alive.
    let number = unsafe { (*cq).handle };
    let mut hca = lock();
    hca.counts.arms += 1;
    let Some(cq) = hca.cqs.get_mut(number) else { return libc::EINVAL };
    // Of two the one that tells of more counts.
    if solicited_only == 0 {
        cq.armed = Some(Arm::Any);
    } else {
        cq.armed.get_or_insert(Arm::Solicited);
    }
    0
}

impl Hca {
    /// Something is done.
    pub fn complete(&mut self, cq: u32, completion: Completion, solicited: bool) {
        let Some(queue) = self.cqs.get_mut(cq) else { return };
        if queue.queue.len() == queue.depth {
            if !std::mem::replace(&mut queue.overrun, true) {
                let raw = queue.raw;
                // SAFETY: alive: it is in the table.
                let context = unsafe { (*raw).context };
                self.tell(context, IBV_EVENT_CQ_ERR, ibv_async_element { cq: raw });
            }
            return;
        }
        let matters = solicited || completion.wc.status != IBV_WC_SUCCESS;
        queue.queue.push_back(completion);
        if queue.armed == Some(Arm::Any) || (queue.armed == Some(Arm::Solicited) && matters) {
            queue.armed = None;
            if let Some(channel) = queue.channel.and_then(|channel| self.channels.get_mut(channel)) {
                channel.events.push(cq);
                self.counts.events += 1;
            }
        }
    }

    /// Takes the completions of a queue pair out of a queue.
    pub fn purge(&mut self, cq: u32, qp: u32) {
        let Some(queue) = self.cqs.get_mut(cq) else { return };
        let srqs = &mut self.srqs;
        queue.queue.retain(|completion| {
            let of_it = completion.wc.qp_num == qp;
            if let (true, Slot::Shared(srq)) = (of_it, completion.slot)
                && let Some(srq) = srqs.get_mut(srq)
            {
                srq.used -= 1;
            }
            !of_it
        });
    }

    /// Drops the events of an object that nobody has taken.
    pub fn forget_events(&mut self, context: *mut ibv_context, of_it: impl Fn(&ibv_async_event) -> bool) {
        if let Some(context) = self.contexts.iter_mut().find(|c| c.raw == context) {
            context.events.retain(|event| !of_it(event));
        }
    }

    /// The account of the object that an event is about.
    pub fn told(&mut self, event: &ibv_async_event) -> Option<&mut Told> {
        // SAFETY: the kind of event says which pointer it is; the object is alive
        // while an event of it is not acknowledged.
        unsafe {
            match event.event_type {
                IBV_EVENT_CQ_ERR => self.cqs.get_mut((*event.element.cq).handle).map(|cq| &mut cq.incidents),
                IBV_EVENT_SRQ_ERR | IBV_EVENT_SRQ_LIMIT_REACHED => {
                    self.srqs.get_mut((*event.element.srq).handle).map(|srq| &mut srq.incidents)
                }
                IBV_EVENT_QP_FATAL
                | IBV_EVENT_QP_REQ_ERR
                | IBV_EVENT_QP_ACCESS_ERR
                | IBV_EVENT_COMM_EST
                | IBV_EVENT_SQ_DRAINED
                | IBV_EVENT_QP_LAST_WQE_REACHED => {
                    self.qps.get_mut((*event.element.qp).handle).map(|qp| &mut qp.incidents)
                }
                _ => None,
            }
        }
    }
}
