//! Devices, contexts, ports, protection domains and asynchronous events.
#![allow(unsafe_code)]

use std::ffi::{c_char, c_int};
use std::mem::{MaybeUninit, size_of};
use std::net::Ipv4Addr;
use std::ptr;
use std::sync::OnceLock;

use distkv_fabric::verbs::sys::*;

use crate::state::{ACKNOWLEDGED, Context, Pd, Settings, lock, refuse, set_errno};
use crate::{completion, mailbox, memory, queue_pair, receive};

/// Entries of a port's table of GIDs, of which the first is in use.
const GIDS: u32 = 8;
pub const MAX_QP: u32 = 16384;
pub const MAX_WR: u32 = 32767;
pub const MAX_CQE: u32 = (1 << 22) - 1;
pub const MAX_MESSAGE: u32 = 1 << 30;
pub const VECTORS: c_int = 4;

struct Devices(Vec<ibv_device>);

// SAFETY: never written after they were made.
unsafe impl Send for Devices {}
// SAFETY: as above.
unsafe impl Sync for Devices {}

fn put(into: &mut [c_char], text: &str) {
    for (into, byte) in into.iter_mut().zip(text.bytes()) {
        *into = byte as c_char;
    }
}

/// `soft0`, `soft1`, … for as long as the process runs.
fn devices() -> &'static [ibv_device] {
    static DEVICES: OnceLock<Devices> = OnceLock::new();
    let make = |i: usize| {
        // SAFETY: all zeroes is a value of every field.
        let mut device: ibv_device = unsafe { MaybeUninit::zeroed().assume_init() };
        device.node_type = IBV_NODE_CA;
        device.transport_type = IBV_TRANSPORT_IB;
        put(&mut device.name, &format!("soft{i}"));
        put(&mut device.dev_name, &format!("software-hca{i}"));
        // It has no files: whoever looks there finds nothing.
        put(&mut device.dev_path, &format!("/sys/class/infiniband_verbs/software-hca{i}"));
        put(&mut device.ibdev_path, &format!("/sys/class/infiniband/soft{i}"));
        device
    };
    &DEVICES.get_or_init(|| Devices((0..Settings::get().devices).map(make).collect())).0
}

/// The GID of a device's port.
pub fn gid(device: usize) -> ibv_gid {
    ibv_gid { raw: Ipv4Addr::new(192, 0, 2, 1 + device as u8).to_ipv6_mapped().octets() }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_get_device_list(count: *mut c_int) -> *mut *mut ibv_device {
    let devices = devices();
    let pointers = devices.iter().map(|d| ptr::from_ref(d).cast_mut()).chain([ptr::null_mut()]);
    let list: Box<[*mut ibv_device]> = pointers.collect();
    if !count.is_null() {
        // SAFETY: the caller's.
        unsafe { *count = devices.len() as c_int };
    }
    Box::into_raw(list).cast()
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_free_device_list(list: *mut *mut ibv_device) {
    let list = ptr::slice_from_raw_parts_mut(list, devices().len() + 1);
    // SAFETY: made by `ibv_get_device_list`, with this length.
    drop(unsafe { Box::from_raw(list) });
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_get_device_name(device: *mut ibv_device) -> *const c_char {
    // SAFETY: one of ours.
    unsafe { (*device).name.as_ptr() }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_open_device(device: *mut ibv_device) -> *mut ibv_context {
    let Some(at) = devices().iter().position(|d| ptr::eq(d, device)) else { return refuse(libc::ENODEV) };
    let Some(events) = mailbox::Mailbox::new() else { return ptr::null_mut() };
    // SAFETY: all zeroes is a value of every field.
    let mut whole: Box<verbs_context> = Box::new(unsafe { MaybeUninit::zeroed().assume_init() });
    whole.sz = size_of::<verbs_context>();
    whole.query_port = Some(query_port);
    let context = &mut whole.context;
    context.device = device;
    context.cmd_fd = -1;
    context.async_fd = events.fd();
    context.num_comp_vectors = VECTORS;
    context.mutex = libc::PTHREAD_MUTEX_INITIALIZER;
    context.abi_compat = ptr::without_provenance_mut(usize::MAX);
    context.ops.poll_cq = Some(completion::poll);
    context.ops.req_notify_cq = Some(completion::arm);
    context.ops.post_send = Some(queue_pair::post_send);
    context.ops.post_recv = Some(receive::post_recv);
    context.ops.post_srq_recv = Some(receive::post_srq_recv);
    if Settings::get().windows {
        context.ops.alloc_mw = Some(memory::alloc_mw);
        context.ops.dealloc_mw = Some(memory::dealloc_mw);
    }
    let whole = Box::into_raw(whole);
    // SAFETY: just made.
    let raw = unsafe { &raw mut (*whole).context };
    lock().contexts.push(Context { raw, device: at, events, objects: 0 });
    raw
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_close_device(context: *mut ibv_context) -> c_int {
    let mut hca = lock();
    let Some(at) = hca.contexts.iter().position(|c| c.raw == context) else { return libc::EINVAL };
    if hca.contexts[at].objects > 0 {
        set_errno(libc::EBUSY);
        return -1;
    }
    hca.contexts.swap_remove(at);
    let whole = context.wrapping_byte_sub(std::mem::offset_of!(verbs_context, context)).cast::<verbs_context>();
    // SAFETY: made by `ibv_open_device`; nothing refers to it any more.
    drop(unsafe { Box::from_raw(whole) });
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_query_device(context: *mut ibv_context, attr: *mut ibv_device_attr) -> c_int {
    let Some(device) = lock().device_of(context) else { return libc::EINVAL };
    // SAFETY: all zeroes is a value of every field.
    let mut limits: ibv_device_attr = unsafe { MaybeUninit::zeroed().assume_init() };
    put(&mut limits.fw_ver, "1.0");
    limits.node_guid = (0x0200_5eff_fe00_0001 + device as u64).to_be();
    limits.sys_image_guid = limits.node_guid;
    limits.max_mr_size = u64::MAX;
    limits.page_size_cap = 0xffff_f000;
    limits.max_qp = MAX_QP as c_int;
    limits.max_qp_wr = MAX_WR as c_int;
    limits.max_sge = crate::state::MAX_SGE as c_int;
    limits.max_cq = 1 << 15;
    limits.max_cqe = MAX_CQE as c_int;
    limits.max_mr = 1 << 15;
    limits.max_pd = 1 << 15;
    limits.max_qp_rd_atom = 16;
    limits.max_qp_init_rd_atom = 16;
    limits.max_srq = 1 << 15;
    limits.max_srq_wr = MAX_WR as c_int;
    limits.max_srq_sge = crate::state::MAX_SGE as c_int;
    limits.max_pkeys = 1;
    limits.local_ca_ack_delay = 15;
    limits.phys_port_cnt = 1;
    if Settings::get().windows {
        limits.max_mw = 1 << 15;
        limits.device_cap_flags = IBV_DEVICE_MEM_WINDOW | IBV_DEVICE_MEM_WINDOW_TYPE_2B;
    }
    // SAFETY: the caller's.
    unsafe { attr.write(limits) };
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_query_port(context: *mut ibv_context, port: u8, attr: *mut ibv_port_attr) -> c_int {
    let hca = lock();
    let Some(device) = hca.device_of(context).filter(|_| port == 1) else { return libc::EINVAL };
    let up = hca.devices[device].up;
    // SAFETY: all zeroes is a value of every field.
    let mut told: ibv_port_attr = unsafe { MaybeUninit::zeroed().assume_init() };
    told.state = if up { IBV_PORT_ACTIVE } else { IBV_PORT_DOWN };
    told.max_mtu = IBV_MTU_4096;
    told.active_mtu = IBV_MTU_4096;
    told.gid_tbl_len = GIDS as c_int;
    told.max_msg_sz = MAX_MESSAGE;
    told.pkey_tbl_len = 1;
    told.active_width = 2;
    told.active_speed = 32;
    // Link up, or disabled.
    told.phys_state = if up { 5 } else { 3 };
    told.link_layer = IBV_LINK_LAYER_ETHERNET;
    // SAFETY: the caller's.
    unsafe { attr.write(told) };
    0
}

/// As [`ibv_query_port`], for a struct of `len` bytes.
unsafe extern "C" fn query_port(context: *mut ibv_context, port: u8, attr: *mut ibv_port_attr, len: usize) -> c_int {
    let mut told = MaybeUninit::<ibv_port_attr>::zeroed();
    // SAFETY: the struct is ours.
    let errno = unsafe { ibv_query_port(context, port, told.as_mut_ptr()) };
    if errno == 0 {
        let len = len.min(size_of::<ibv_port_attr>());
        // SAFETY: the caller has `len` bytes.
        unsafe { ptr::copy_nonoverlapping(told.as_ptr().cast::<u8>(), attr.cast::<u8>(), len) };
    }
    errno
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_query_gid(context: *mut ibv_context, port: u8, index: c_int, into: *mut ibv_gid) -> c_int {
    let device = lock().device_of(context).filter(|_| port == 1);
    match (device, index) {
        // SAFETY: the caller's.
        (Some(device), 0) => unsafe { into.write(gid(device)) },
        // SAFETY: the caller's.
        (Some(_), 1..8) => unsafe { into.write(ibv_gid::default()) },
        _ => {
            set_errno(libc::EINVAL);
            return -1;
        }
    }
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn _ibv_query_gid_ex(
    context: *mut ibv_context,
    port: u32,
    index: u32,
    entry: *mut ibv_gid_entry,
    flags: u32,
    len: usize,
) -> c_int {
    let device = lock().device_of(context).filter(|_| port == 1 && flags == 0 && len >= size_of::<ibv_gid_entry>());
    let Some(device) = device.filter(|_| index < GIDS) else { return libc::EINVAL };
    if index > 0 {
        return libc::ENODATA;
    }
    let gid_type = IBV_GID_TYPE_ROCE_V2;
    // The loopback interface, which every machine has.
    let found = ibv_gid_entry { gid: gid(device), gid_index: 0, port_num: 1, gid_type, ndev_ifindex: 1 };
    // SAFETY: the caller's.
    unsafe { entry.write(found) };
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_alloc_pd(context: *mut ibv_context) -> *mut ibv_pd {
    let mut hca = lock();
    if hca.device_of(context).is_none() {
        return refuse(libc::EINVAL);
    }
    let made = hca.pds.insert(|handle| Pd { raw: Box::into_raw(Box::new(ibv_pd { context, handle })), objects: 0 });
    let Some(number) = made else { return refuse(libc::ENOMEM) };
    hca.count(context, 1);
    hca.pds.get(number).map_or(ptr::null_mut(), |pd| pd.raw)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_dealloc_pd(pd: *mut ibv_pd) -> c_int {
    // SAFETY: alive.
    let (context, number) = unsafe { ((*pd).context, (*pd).handle) };
    let mut hca = lock();
    match hca.pds.get(number) {
        None => return libc::EINVAL,
        Some(pd) if pd.objects > 0 => return libc::EBUSY,
        Some(_) => {}
    }
    hca.pds.remove(number);
    hca.count(context, -1);
    // SAFETY: made by `ibv_alloc_pd`.
    drop(unsafe { Box::from_raw(pd) });
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_get_async_event(context: *mut ibv_context, event: *mut ibv_async_event) -> c_int {
    // SAFETY: open.
    let fd = unsafe { (*context).async_fd };
    let taken = mailbox::next(fd, |hca| {
        let context = hca.contexts.iter_mut().find(|c| c.raw == context)?;
        let event = context.events.pop()?;
        if let Some(told) = hca.told(&event) {
            told.taken += 1;
        }
        Some(event)
    });
    let Some(taken) = taken else { return -1 };
    // SAFETY: the caller's.
    unsafe { event.write(taken) };
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_ack_async_event(event: *mut ibv_async_event) {
    // SAFETY: the caller's.
    let event = unsafe { *event };
    if let Some(told) = lock().told(&event) {
        told.acknowledged += 1;
    }
    ACKNOWLEDGED.notify_all();
}

#[unsafe(no_mangle)]
extern "C" fn ibv_fork_init() -> c_int {
    0
}
