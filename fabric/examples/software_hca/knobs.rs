//! What a test does to the devices: functions found by name in the library. A
//! device is named by its number; all of them return -1 for one that there is
//! not, and 0.
#![allow(unsafe_code)]

use std::ffi::c_int;

use distkv_fabric::verbs::sys::*;

use crate::state::{Counts, Device, Hca, lock};

fn change(device: c_int, change: impl FnOnce(&mut Hca, usize)) -> c_int {
    let mut hca = lock();
    match usize::try_from(device) {
        Ok(device) if device < hca.devices.len() => {
            change(&mut hca, device);
            hca.stirred = true;
            hca.settle();
            0
        }
        _ => -1,
    }
}

fn set(hca: &mut Hca, device: usize, set: impl FnOnce(&mut Device)) {
    set(&mut hca.devices[device]);
}

/// Packets from and to the device are lost, or no more.
#[unsafe(no_mangle)]
extern "C" fn software_hca_cut(device: c_int, on: c_int) -> c_int {
    change(device, |hca, at| set(hca, at, |device| device.cut = on != 0))
}

/// The device carries nothing out, or goes on with what is queued.
#[unsafe(no_mangle)]
extern "C" fn software_hca_hold(device: c_int, on: c_int) -> c_int {
    change(device, |hca, at| {
        set(hca, at, |device| device.held = on != 0);
        let held: Vec<u32> = hca.qps.iter().filter(|(_, qp)| qp.device == at).map(|(number, _)| number).collect();
        for number in held {
            hca.may_run(number);
        }
    })
}

/// The device does not tell whose queue pair a peer has broken (rxe does not), or
/// tells it again.
#[unsafe(no_mangle)]
extern "C" fn software_hca_silent(device: c_int, on: c_int) -> c_int {
    change(device, |hca, at| set(hca, at, |device| device.silent = on != 0))
}

/// The device's port goes down or comes up; its contexts are told.
#[unsafe(no_mangle)]
extern "C" fn software_hca_port(device: c_int, up: c_int) -> c_int {
    change(device, |hca, at| {
        if hca.devices[at].up != (up != 0) {
            set(hca, at, |device| device.up = up != 0);
            let event = if up != 0 { IBV_EVENT_PORT_ACTIVE } else { IBV_EVENT_PORT_ERR };
            tell_all(hca, at, event);
        }
    })
}

/// The device breaks: its queue pairs end and its contexts are told.
#[unsafe(no_mangle)]
extern "C" fn software_hca_break(device: c_int) -> c_int {
    change(device, |hca, at| {
        let broken: Vec<u32> = hca.qps.iter().filter(|(_, qp)| qp.device == at).map(|(number, _)| number).collect();
        for number in broken {
            hca.fail(number);
        }
        tell_all(hca, at, IBV_EVENT_DEVICE_FATAL);
    })
}

/// A queue pair, by its number, breaks, and its context is told.
#[unsafe(no_mangle)]
extern "C" fn software_hca_break_qp(number: u32) -> c_int {
    let mut hca = lock();
    if hca.qps.get(number).is_none() {
        return -1;
    }
    hca.tell_of(number, IBV_EVENT_QP_FATAL);
    hca.fail(number);
    hca.settle();
    0
}

fn tell_all(hca: &mut Hca, device: usize, event_type: ibv_enum) {
    for context in hca.contexts.iter_mut().filter(|c| c.device == device) {
        context.events.push(ibv_async_event { element: ibv_async_element { port_num: 1 }, event_type });
    }
}

/// How many objects there are in this process, contexts among them.
#[unsafe(no_mangle)]
extern "C" fn software_hca_living() -> u64 {
    let hca = lock();
    let tables = [hca.pds.len(), hca.keys.len(), hca.channels.len(), hca.cqs.len(), hca.srqs.len(), hca.qps.len()];
    (hca.contexts.len() + tables.iter().sum::<usize>()) as u64
}

/// What was done so far in this process.
///
/// # Safety
/// `counts` can be written.
#[unsafe(no_mangle)]
unsafe extern "C" fn software_hca_counts(counts: *mut Counts) {
    // SAFETY: the caller's promise.
    unsafe { counts.write(lock().counts) };
}
