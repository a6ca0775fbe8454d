//! All devices and their objects, behind one lock.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::ffi::c_int;
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

use distkv_fabric::verbs::sys::*;

use crate::mailbox::Mailbox;
use crate::slab::Slab;

/// Most runs of memory of a request.
pub const MAX_SGE: usize = 8;

/// What the environment says.
#[derive(Clone, Copy)]
pub struct Settings {
    pub devices: usize,
    pub inline: u32,
    pub windows: bool,
    pub with_thread: bool,
    pub keep_completions: bool,
}

impl Settings {
    pub fn get() -> Self {
        static SETTINGS: OnceLock<Settings> = OnceLock::new();
        *SETTINGS.get_or_init(|| Self {
            devices: variable("SOFTWARE_HCA_DEVICES", 2).min(16) as usize,
            inline: variable("SOFTWARE_HCA_INLINE", 220).min(4096),
            windows: variable("SOFTWARE_HCA_WINDOWS", 1) != 0,
            with_thread: variable("SOFTWARE_HCA_ASYNC", 0) != 0,
            keep_completions: variable("SOFTWARE_HCA_KEEP_COMPLETIONS", 0) != 0,
        })
    }
}

fn variable(name: &str, default: u32) -> u32 {
    match std::env::var(name) {
        Err(_) => default,
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("software HCA: {name}={text} is no number")),
    }
}

/// A device's port and what was done to it.
#[derive(Clone, Copy)]
pub struct Device {
    pub up: bool,
    /// No packet arrives anywhere.
    pub cut: bool,
    /// Requests stay queued.
    pub held: bool,
    /// Nobody is told that a peer has broken its queue pair.
    pub silent: bool,
}

pub struct Context {
    pub raw: *mut ibv_context,
    pub device: usize,
    pub events: Mailbox<ibv_async_event>,
    pub objects: usize,
}

pub struct Pd {
    pub raw: *mut ibv_pd,
    pub objects: usize,
}

/// What a key stands for. Regions and windows share their numbers; a key is the
/// number and eight more bits.
pub enum Key {
    Region(Region),
    Window(Window),
}

pub struct Region {
    pub raw: *mut ibv_mr,
    pub pd: u32,
    pub key: u32,
    /// Where the memory is here.
    pub host: usize,
    /// What it is called by those who use the key.
    pub iova: u64,
    pub len: u64,
    pub access: u32,
    /// Windows bound to it.
    pub windows: usize,
}

pub struct Window {
    pub raw: *mut ibv_mw,
    pub pd: u32,
    pub key: u32,
    pub bound: Option<Bound>,
}

#[derive(Clone, Copy)]
pub struct Bound {
    pub qp: u32,
    pub region: u32,
    pub address: u64,
    pub len: u64,
    pub access: u32,
}

/// Events of an object that its owner has taken and has acknowledged.
#[derive(Clone, Copy, Default)]
pub struct Told {
    pub taken: u32,
    pub acknowledged: u32,
}

impl Told {
    pub fn settled(&self) -> bool {
        self.taken == self.acknowledged
    }
}

pub struct Channel {
    pub raw: *mut ibv_comp_channel,
    pub events: Mailbox<u32>,
    pub users: usize,
}

/// Whose slot a polled completion gives back.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Slot {
    /// Of a send queue: of all requests up to this one.
    Send(u64),
    /// Of the queue pair's receive queue.
    Receive,
    /// Of a shared receive queue.
    Shared(u32),
}

pub struct Completion {
    pub wc: ibv_wc,
    pub slot: Slot,
}

pub struct Cq {
    pub raw: *mut ibv_cq,
    pub channel: Option<u32>,
    pub depth: usize,
    pub queue: VecDeque<Completion>,
    /// The next completion is told of; or the next that is solicited or failed.
    pub armed: Option<Arm>,
    pub overrun: bool,
    pub users: usize,
    pub told: Told,
    pub incidents: Told,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Arm {
    Any,
    Solicited,
}

#[derive(Clone, Copy)]
pub struct Receive {
    pub id: u64,
    pub runs: [ibv_sge; MAX_SGE],
    pub len: usize,
}

pub struct Srq {
    pub raw: *mut ibv_srq,
    pub pd: u32,
    pub depth: usize,
    pub runs: usize,
    pub limit: u32,
    pub queue: VecDeque<Receive>,
    /// Slots that are not free.
    pub used: usize,
    pub users: usize,
    pub incidents: Told,
}

#[derive(Clone, Copy)]
pub struct Request {
    pub id: u64,
    pub number: u64,
    pub opcode: ibv_enum,
    pub signalled: bool,
    pub solicited: bool,
    pub immediate: u32,
    pub address: u64,
    pub rkey: u32,
    pub runs: [ibv_sge; MAX_SGE],
    pub len: usize,
    /// Bytes that were copied when it was posted.
    pub inline: Option<u32>,
    pub bind: Bind,
}

/// What a bind names, by number.
#[derive(Clone, Copy, Default)]
pub struct Bind {
    pub window: u32,
    pub rkey: u32,
    pub region: u32,
    pub address: u64,
    pub len: u64,
    pub access: u32,
}

/// Why a request does not go on.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// Nobody answers.
    Silence,
    /// The peer has no receive.
    NoReceive,
}

#[derive(Clone, Copy)]
pub struct Stall {
    pub why: Why,
    /// When retries are used up; never if `None`.
    pub until: Option<Instant>,
}

pub struct Qp {
    pub raw: *mut ibv_qp,
    pub device: usize,
    pub pd: u32,
    pub send_cq: u32,
    pub recv_cq: u32,
    pub srq: Option<u32>,
    pub state: ibv_enum,
    pub signal_all: bool,
    pub cap: ibv_qp_cap,
    pub attr: ibv_qp_attr,
    pub requests: VecDeque<Request>,
    pub posted: u64,
    pub retired: u64,
    /// As many bytes a request as it may carry itself.
    pub inline: Box<[u8]>,
    pub receives: VecDeque<Receive>,
    pub receives_used: usize,
    pub stall: Option<Stall>,
    /// It is on the list of those that wait.
    pub waiting: bool,
    /// It is on the list of those that can go on.
    pub runnable: bool,
    /// A first packet has arrived.
    pub heard: bool,
    pub incidents: Told,
}

/// What was done so far.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct Counts {
    /// Calls of `post_send` and their requests.
    pub posts: u64,
    pub requests: u64,
    /// Calls of `post_recv` and `post_srq_recv` and their receives.
    pub receive_posts: u64,
    pub receives: u64,
    /// Calls of `poll_cq`, those that found nothing, and completions taken.
    pub polls: u64,
    pub empty_polls: u64,
    pub completions: u64,
    /// Calls of `req_notify_cq`, and events that followed.
    pub arms: u64,
    pub events: u64,
    /// Requests that had to wait for a receive.
    pub waits: u64,
}

#[derive(Default)]
pub struct Hca {
    pub devices: Vec<Device>,
    pub contexts: Vec<Context>,
    pub pds: Slab<Pd>,
    pub keys: Slab<Key>,
    pub channels: Slab<Channel>,
    pub cqs: Slab<Cq>,
    pub srqs: Slab<Srq>,
    pub qps: Slab<Qp>,
    /// Queue pairs whose first request waits for something.
    pub waiting: VecDeque<u32>,
    /// Queue pairs that may go on.
    pub runnable: VecDeque<u32>,
    /// Something that one of them may wait for has happened.
    pub stirred: bool,
    pub counts: Counts,
}

// SAFETY: the pointers are to what the library's user holds; they are followed
// while the object is alive, under the lock.
unsafe impl Send for Hca {}

/// Told when an event is acknowledged.
pub static ACKNOWLEDGED: Condvar = Condvar::new();

/// The one lock.
pub fn lock() -> MutexGuard<'static, Hca> {
    static HCA: OnceLock<Mutex<Hca>> = OnceLock::new();
    let hca = HCA.get_or_init(|| {
        let device = Device { up: true, cut: false, held: false, silent: false };
        Mutex::new(Hca { devices: vec![device; Settings::get().devices], ..Hca::default() })
    });
    hca.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits on until the events of an object are acknowledged.
pub fn until_settled<'a>(mut hca: MutexGuard<'a, Hca>, settled: impl Fn(&Hca) -> bool) -> MutexGuard<'a, Hca> {
    while !settled(&hca) {
        hca = ACKNOWLEDGED.wait(hca).unwrap_or_else(PoisonError::into_inner);
    }
    hca
}

pub fn set_errno(errno: c_int) {
    // SAFETY: this thread's errno.
    unsafe { *libc::__errno_location() = errno };
}

/// No object; says why.
pub fn refuse<T>(errno: c_int) -> *mut T {
    set_errno(errno);
    std::ptr::null_mut()
}

impl Hca {
    /// An event of an open context.
    pub fn tell(&mut self, context: *mut ibv_context, event_type: ibv_enum, element: ibv_async_element) {
        if let Some(context) = self.contexts.iter_mut().find(|c| c.raw == context) {
            context.events.push(ibv_async_event { element, event_type });
        }
    }

    /// As many objects as a context has one more or less of.
    pub fn count(&mut self, context: *mut ibv_context, change: isize) {
        if let Some(context) = self.contexts.iter_mut().find(|c| c.raw == context) {
            context.objects = context.objects.wrapping_add_signed(change);
        }
    }

    /// Which device a context is of; `None` for one that is not open.
    pub fn device_of(&self, context: *mut ibv_context) -> Option<usize> {
        self.contexts.iter().find(|c| c.raw == context).map(|c| c.device)
    }
}
