//! What is opened and registered, each freed when the last that needs it goes:
//! a region holds its protection domain and memory, that its context.
#![allow(unsafe_code)]

use std::any::Any;
use std::ffi::CStr;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::path::Path;
use std::ptr::NonNull;
use std::sync::Arc;

use crate::verbs::sys::{self, Lib, ibv_context, ibv_device, ibv_mr, ibv_pd};
use crate::{Error, Memory, Result};

use super::gid::{Gid, GidKind};
use super::gpu_direct::DmabufSupport;
use super::{Link, Port, PortState, Transport, mtu_bytes};

/// A list of the machine's devices, valid while it lives.
struct List {
    lib: &'static Lib,
    first: NonNull<*mut ibv_device>,
    len: usize,
}

impl List {
    fn new(lib: &'static Lib) -> Result<Self> {
        let mut len = 0;
        // SAFETY: `len` can be written.
        let first = unsafe { (lib.ibv_get_device_list)(&raw mut len) };
        match NonNull::new(first) {
            Some(first) => Ok(Self { lib, first, len: usize::try_from(len).unwrap_or(0) }),
            None => {
                let error = io::Error::last_os_error();
                let because = match error.raw_os_error() {
                    Some(libc::ENOSYS) => "the kernel offers no RDMA: load the module ib_uverbs".to_string(),
                    _ => format!("listing the RDMA devices: {error}"),
                };
                Err(unavailable(because))
            }
        }
    }

    /// Name, device and transport of each.
    fn devices(&self) -> impl Iterator<Item = (String, *mut ibv_device, Transport)> + '_ {
        (0..self.len).filter_map(|i| {
            // SAFETY: the list has `len` entries.
            let device = unsafe { *self.first.as_ptr().add(i) };
            if device.is_null() {
                return None;
            }
            // SAFETY: the device is of this list, which is alive.
            let (name, kind) = unsafe { ((self.lib.ibv_get_device_name)(device), (*device).transport_type) };
            if name.is_null() {
                return None;
            }
            // SAFETY: a string of the device, which the list keeps.
            let name = unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned();
            Some((name, device, Transport::of_number(kind)))
        })
    }
}

impl Drop for List {
    fn drop(&mut self) {
        // SAFETY: made by `ibv_get_device_list`; opened devices outlive it.
        unsafe { (self.lib.ibv_free_device_list)(self.first.as_ptr()) };
    }
}

/// The names of the machine's RDMA devices and how they talk.
pub fn names(lib: &'static Lib) -> Result<Vec<(String, Transport)>> {
    Ok(List::new(lib)?.devices().map(|(name, _, transport)| (name, transport)).collect())
}

/// An opened device.
pub struct Context {
    lib: &'static Lib,
    raw: NonNull<ibv_context>,
    name: String,
}

// SAFETY: libibverbs may be called from any thread, on one object at a time or
// on many at once.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    /// Opens the device of this name.
    pub fn open(lib: &'static Lib, name: &str) -> Result<Arc<Self>> {
        let list = List::new(lib)?;
        let found = list.devices().find(|(other, ..)| other == name);
        let (_, device, _) = found.ok_or_else(|| unavailable(format!("there is no RDMA device {name}")))?;
        // SAFETY: the device is of a living list.
        let raw = unsafe { (lib.ibv_open_device)(device) };
        let raw = NonNull::new(raw).ok_or_else(|| {
            let error = io::Error::last_os_error();
            unavailable(format!("opening {name}: {error}; may this user open /dev/infiniband/uverbs*?"))
        })?;
        Ok(Arc::new(Self { lib, raw, name: name.to_string() }))
    }

    /// Its name, e.g. `mlx5_0`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The library it was opened with.
    pub fn lib(&self) -> &'static Lib {
        self.lib
    }

    /// For calls to the library. Valid while `self` lives.
    pub fn raw(&self) -> *mut ibv_context {
        self.raw.as_ptr()
    }

    /// What the device can do.
    pub fn attributes(&self) -> Result<sys::ibv_device_attr> {
        let mut attributes = MaybeUninit::zeroed();
        // SAFETY: open; `attributes` can be written.
        let answer = unsafe { (self.lib.ibv_query_device)(self.raw(), attributes.as_mut_ptr()) };
        check("querying an RDMA device", answer)?;
        // SAFETY: all fields are integers, zeroed and then filled.
        Ok(unsafe { attributes.assume_init() })
    }

    fn port_attributes(&self, number: u8) -> Result<sys::ibv_port_attr> {
        let mut attributes = MaybeUninit::zeroed();
        // SAFETY: open; `attributes` can be written.
        let answer = unsafe { sys::query_port(self.lib, self.raw(), number, attributes.as_mut_ptr()) };
        check("querying a port", answer)?;
        // SAFETY: all fields are integers, zeroed and then filled.
        Ok(unsafe { attributes.assume_init() })
    }

    /// Bytes of the longest request that a port carries.
    pub fn max_message(&self, number: u8) -> Result<u64> {
        Ok(self.port_attributes(number)?.max_msg_sz.into())
    }

    /// The state of a port, the first being 1, with the GIDs it has in use.
    pub fn port(&self, number: u8, sysfs: &Path) -> Result<Port> {
        let attributes = self.port_attributes(number)?;
        let link = Link::of_number(attributes.link_layer);
        let folder = sysfs.join("class/infiniband").join(&self.name).join("ports").join(number.to_string());
        // A queue pair names a GID with eight bits.
        let entries = attributes.gid_tbl_len.clamp(0, 256);
        let gids = (0..=u8::MAX).take(entries as usize).filter_map(|index| self.gid(number, index, link, &folder));
        let rate = std::fs::read_to_string(folder.join("rate")).ok();
        Ok(Port {
            number,
            state: PortState::of_number(attributes.state),
            link,
            mtu: mtu_bytes(attributes.active_mtu),
            lid: attributes.lid,
            grh_required: attributes.flags & sys::IBV_QPF_GRH_REQUIRED != 0,
            gigabits: rate.and_then(|text| super::parse_rate(&text)),
            gids: gids.collect(),
        })
    }

    /// The GID at an index, if there is one of a known kind.
    fn gid(&self, port: u8, index: u8, link: Link, folder: &Path) -> Option<Gid> {
        if let Some(query) = self.lib._ibv_query_gid_ex {
            let mut entry = sys::ibv_gid_entry::default();
            let size = size_of::<sys::ibv_gid_entry>();
            // SAFETY: open; `entry` can be written and has this size.
            let answer = unsafe { query(self.raw(), port.into(), index.into(), &raw mut entry, 0, size) };
            if answer == 0 {
                let kind = GidKind::of_number(entry.gid_type)?;
                return Some(Gid { index, raw: entry.gid, kind }).filter(in_use);
            }
            // No entry there. Another error: a kernel without this call, which
            // sysfs serves.
            if answer == libc::ENODATA {
                return None;
            }
        }
        let mut raw = sys::ibv_gid::default();
        // SAFETY: open; `raw` can be written.
        if unsafe { (self.lib.ibv_query_gid)(self.raw(), port, index.into(), &raw mut raw) } != 0 {
            return None;
        }
        let kind = std::fs::read_to_string(folder.join("gid_attrs/types").join(index.to_string()));
        Some(Gid { index, raw, kind: GidKind::of_sysfs(&kind.ok()?, link)? }).filter(in_use)
    }
}

fn in_use(gid: &Gid) -> bool {
    gid.raw != sys::ibv_gid::default()
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: opened by us; what was made of it holds it and is gone.
        let answer = unsafe { (self.lib.ibv_close_device)(self.raw()) };
        if answer != 0 {
            tracing::warn!(device = self.name, answer, "closing an RDMA device failed");
        }
    }
}

/// A protection domain.
pub struct Pd {
    context: Arc<Context>,
    raw: NonNull<ibv_pd>,
}

// SAFETY: as for `Context`.
unsafe impl Send for Pd {}
// SAFETY: as for `Context`.
unsafe impl Sync for Pd {}

impl Pd {
    /// A new one.
    pub fn new(context: &Arc<Context>) -> Result<Arc<Self>> {
        // SAFETY: open.
        let raw = unsafe { (context.lib.ibv_alloc_pd)(context.raw()) };
        let raw = NonNull::new(raw).ok_or_else(|| last_error("making a protection domain"))?;
        Ok(Arc::new(Self { context: Arc::clone(context), raw }))
    }

    /// Its device.
    pub fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// For calls to the library. Valid while `self` lives.
    pub fn raw(&self) -> *mut ibv_pd {
        self.raw.as_ptr()
    }

    /// Does the device register dmabufs?
    pub fn dmabuf(&self) -> DmabufSupport {
        match self.register_dmabuf_raw(-1, 0, 4096, 0, sys::IBV_ACCESS_LOCAL_WRITE) {
            Err(None) => DmabufSupport::No { because: "this libibverbs is older than dmabufs (rdma-core 34)".into() },
            Err(Some(error)) => DmabufSupport::of_errno(error.raw_os_error().unwrap_or(0)),
            Ok(mr) => {
                // SAFETY: registered just now, and unused.
                unsafe { (self.context.lib.ibv_dereg_mr)(mr.as_ptr()) };
                DmabufSupport::No { because: "the driver registered a dmabuf that does not exist".into() }
            }
        }
    }

    /// `Err(None)`: the library cannot.
    fn register_dmabuf_raw(
        &self,
        fd: RawFd,
        offset: u64,
        len: usize,
        address: u64,
        access: u32,
    ) -> std::result::Result<NonNull<ibv_mr>, Option<io::Error>> {
        let register = self.context.lib.ibv_reg_dmabuf_mr.ok_or(None)?;
        // SAFETY: the kernel checks the descriptor and the range.
        let mr = unsafe { register(self.raw(), offset, len, address, fd, access as i32) };
        NonNull::new(mr).ok_or_else(|| Some(io::Error::last_os_error()))
    }
}

impl Drop for Pd {
    fn drop(&mut self) {
        // SAFETY: made by us; what was made of it holds it and is gone.
        let answer = unsafe { (self.context.lib.ibv_dealloc_pd)(self.raw()) };
        if answer != 0 {
            tracing::warn!(device = self.context.name, answer, "freeing a protection domain failed");
        }
    }
}

/// What a registered region may be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MrAccess {
    /// As a source of our own writes, and for messages received.
    Local,
    /// Peers that hold its key may write to it, too.
    RemoteWrite,
    /// Windows on it may be opened to peers; its own key is not for them.
    Windows,
}

impl MrAccess {
    fn flags(self) -> u32 {
        // Nothing here waits for the order in which bytes of one write land:
        // completions tell that all are there.
        let base = sys::IBV_ACCESS_LOCAL_WRITE | sys::IBV_ACCESS_RELAXED_ORDERING;
        match self {
            Self::Local => base,
            Self::RemoteWrite => base | sys::IBV_ACCESS_REMOTE_WRITE,
            Self::Windows => base | sys::IBV_ACCESS_MW_BIND,
        }
    }
}

/// A registered region of memory.
pub struct Mr {
    pd: Arc<Pd>,
    raw: NonNull<ibv_mr>,
    address: u64,
    len: usize,
    _owner: Arc<dyn Any + Send + Sync>,
}

// SAFETY: as for `Context`.
unsafe impl Send for Mr {}
// SAFETY: as for `Context`.
unsafe impl Sync for Mr {}

impl Mr {
    /// Registers all of `memory`, under its own addresses. Its pages stay in
    /// memory until this is dropped.
    pub fn register(pd: &Arc<Pd>, memory: &Arc<Memory>, access: MrAccess) -> Result<Self> {
        let owner: Arc<dyn Any + Send + Sync> = Arc::clone(memory) as _;
        // SAFETY: mapped for `len` bytes while `owner` lives.
        unsafe { Self::register_raw(pd, memory.as_ptr(), memory.len(), access, owner) }
    }

    /// Registers `len` bytes at `start`, of the host or, with nvidia-peermem, of
    /// a GPU.
    ///
    /// # Safety
    /// The range is valid, and nothing of it is lent to code that expects it
    /// unchanged, for as long as `owner` lives.
    pub unsafe fn register_raw(
        pd: &Arc<Pd>,
        start: *mut u8,
        len: usize,
        access: MrAccess,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> Result<Self> {
        let address = start.addr() as u64;
        // SAFETY: the caller's promise.
        let raw = unsafe { (pd.context.lib.ibv_reg_mr_iova2)(pd.raw(), start.cast(), len, address, access.flags()) };
        let raw = NonNull::new(raw).ok_or_else(|| registration(&io::Error::last_os_error(), len))?;
        Ok(Self { pd: Arc::clone(pd), raw, address, len, _owner: owner })
    }

    /// Registers `len` bytes of a dmabuf from `offset`; work requests and peers
    /// name the first by `address`.
    pub fn register_dmabuf(
        pd: &Arc<Pd>,
        dmabuf: BorrowedFd<'_>,
        offset: u64,
        len: usize,
        address: u64,
        access: MrAccess,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> Result<Self> {
        // This call passes flags on as they are, so an old kernel would refuse
        // the optional one.
        let flags = access.flags() & !sys::IBV_ACCESS_RELAXED_ORDERING;
        let registered = pd
            .register_dmabuf_raw(dmabuf.as_raw_fd(), offset, len, address, access.flags())
            .or_else(|_| pd.register_dmabuf_raw(dmabuf.as_raw_fd(), offset, len, address, flags));
        let raw = registered.map_err(|error| match error {
            Some(error) => registration(&error, len),
            None => unavailable("this libibverbs cannot register dmabufs; it is older than rdma-core 34".into()),
        })?;
        Ok(Self { pd: Arc::clone(pd), raw, address, len, _owner: owner })
    }

    /// Names the region in our own work requests.
    pub fn lkey(&self) -> u32 {
        // SAFETY: alive.
        unsafe { (*self.raw.as_ptr()).lkey }
    }

    /// Names the region in a peer's work requests.
    pub fn rkey(&self) -> u32 {
        // SAFETY: alive.
        unsafe { (*self.raw.as_ptr()).rkey }
    }

    /// The first byte's address, as work requests give it.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Has it no bytes?
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The domain it is registered in.
    pub fn pd(&self) -> &Arc<Pd> {
        &self.pd
    }

    /// For calls to the library. Valid while `self` lives.
    pub fn raw(&self) -> *mut ibv_mr {
        self.raw.as_ptr()
    }
}

impl Drop for Mr {
    fn drop(&mut self) {
        // SAFETY: registered by us. Its owner is dropped after this.
        let answer = unsafe { (self.pd.context.lib.ibv_dereg_mr)(self.raw()) };
        if answer != 0 {
            tracing::warn!(device = self.pd.context.name, answer, "deregistering memory failed");
        }
    }
}

fn unavailable(because: String) -> Error {
    Error::Unavailable { transport: "verbs", because }
}

fn last_error(what: &'static str) -> Error {
    Error::os(what, io::Error::last_os_error())
}

/// The error in the answer of a function of the library that returns 0, an
/// errno, or −1 with errno set.
#[inline]
pub fn check(what: &'static str, answer: i32) -> Result<()> {
    match answer {
        0 => Ok(()),
        errno @ 1.. => Err(Error::os(what, io::Error::from_raw_os_error(errno))),
        _ => Err(last_error(what)),
    }
}

/// Why memory could not be registered: most often, the limit on locked memory.
fn registration(error: &io::Error, len: usize) -> Error {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Memlock).current;
    let hint = match (error.raw_os_error(), limit) {
        (Some(libc::ENOMEM | libc::EAGAIN | libc::EPERM), Some(limit)) => {
            format!(" ({len} bytes; the limit on locked memory is {limit}: raise it with ulimit -l or LimitMEMLOCK=)")
        }
        _ => format!(" ({len} bytes)"),
    };
    Error::os("registering memory", format!("{error}{hint}"))
}
