//! Memory regions, memory windows, and what their keys allow.
#![allow(unsafe_code)]

use std::ffi::{c_int, c_uint, c_void};
use std::ptr;

use distkv_fabric::verbs::sys::*;

use crate::state::{Bind, Bound, Hca, Key, Region, Window, lock, refuse};

/// Flags that a device may ignore.
const OPTIONAL: c_uint = 0x3ff0_0000;
/// Flags that are understood.
const KNOWN: c_uint = IBV_ACCESS_LOCAL_WRITE
    | IBV_ACCESS_REMOTE_WRITE
    | IBV_ACCESS_REMOTE_READ
    | IBV_ACCESS_REMOTE_ATOMIC
    | IBV_ACCESS_MW_BIND;
const REMOTE_CHANGES: c_uint = IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_ATOMIC;

/// A range of this process's memory.
pub type Run = (usize, usize);

/// Can the whole range be pinned?
fn mapped(address: usize, len: usize) -> bool {
    const PAGE: usize = 4096;
    let mut there = [0u8; PAGE];
    let end = address + len;
    (address & !(PAGE - 1)..end).step_by(PAGE * there.len()).all(|start| {
        let len = (end - start).min(PAGE * there.len());
        // SAFETY: a byte for each page; the range need not be mapped.
        unsafe { libc::mincore(ptr::without_provenance_mut(start), len, there.as_mut_ptr()) == 0 }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_reg_mr_iova2(
    pd: *mut ibv_pd,
    address: *mut c_void,
    length: usize,
    iova: u64,
    access: c_uint,
) -> *mut ibv_mr {
    let access = access & !OPTIONAL;
    let writable = access & IBV_ACCESS_LOCAL_WRITE != 0;
    let overflows = iova.checked_add(length as u64).is_none() || address.addr().checked_add(length).is_none();
    if access & !KNOWN != 0 || length == 0 || overflows || (access & REMOTE_CHANGES != 0 && !writable) {
        return refuse(libc::EINVAL);
    }
    if !mapped(address.addr(), length) {
        return refuse(libc::EFAULT);
    }
    // SAFETY: alive.
    let (context, domain) = unsafe { ((*pd).context, (*pd).handle) };
    let mut hca = lock();
    if hca.pds.get(domain).is_none() {
        return refuse(libc::EINVAL);
    }
    let made = hca.keys.insert(|handle| {
        let key = handle << 8 | 0x5a;
        let mr = ibv_mr { context, pd, addr: address, length, handle, lkey: key, rkey: key };
        let (raw, host) = (Box::into_raw(Box::new(mr)), address.expose_provenance());
        Key::Region(Region { raw, pd: domain, key, host, iova, len: length as u64, access, windows: 0 })
    });
    let raw = match made.and_then(|number| hca.keys.get(number)) {
        Some(Key::Region(region)) => region.raw,
        _ => return refuse(libc::ENOMEM),
    };
    hca.hold(pd, 1);
    raw
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_dereg_mr(mr: *mut ibv_mr) -> c_int {
    // SAFETY: alive.
    let (pd, number) = unsafe { ((*mr).pd, (*mr).handle) };
    let mut hca = lock();
    match hca.keys.get(number) {
        Some(Key::Region(region)) if region.windows > 0 => return libc::EBUSY,
        Some(Key::Region(region)) if region.raw == mr => {}
        _ => return libc::EINVAL,
    }
    hca.keys.remove(number);
    hca.hold(pd, -1);
    // SAFETY: made by `ibv_reg_mr_iova2`.
    drop(unsafe { Box::from_raw(mr) });
    0
}

pub unsafe extern "C" fn alloc_mw(pd: *mut ibv_pd, kind: ibv_enum) -> *mut ibv_mw {
    if kind != IBV_MW_TYPE_2 {
        return refuse(libc::EOPNOTSUPP);
    }
    // SAFETY: alive.
    let (context, domain) = unsafe { ((*pd).context, (*pd).handle) };
    let mut hca = lock();
    let made = hca.keys.insert(|handle| {
        let key = handle << 8 | 0xff;
        let raw = Box::into_raw(Box::new(ibv_mw { context, pd, rkey: key, handle, r#type: kind }));
        Key::Window(Window { raw, pd: domain, key, bound: None })
    });
    let raw = match made.and_then(|number| hca.keys.get(number)) {
        Some(Key::Window(window)) => window.raw,
        _ => return refuse(libc::ENOMEM),
    };
    hca.hold(pd, 1);
    raw
}

pub unsafe extern "C" fn dealloc_mw(mw: *mut ibv_mw) -> c_int {
    // SAFETY: alive.
    let (pd, number) = unsafe { ((*mw).pd, (*mw).handle) };
    let mut hca = lock();
    let bound = match hca.keys.get(number) {
        Some(Key::Window(window)) if window.raw == mw => window.bound,
        _ => return libc::EINVAL,
    };
    hca.keys.remove(number);
    if let Some(Key::Region(region)) = bound.and_then(|bound| hca.keys.get_mut(bound.region)) {
        region.windows -= 1;
    }
    hca.hold(pd, -1);
    // SAFETY: made by `alloc_mw`.
    drop(unsafe { Box::from_raw(mw) });
    0
}

/// Is `address`, `len` within?
fn within(address: u64, len: u64, (start, size): (u64, u64)) -> bool {
    address >= start && address.checked_add(len).is_some_and(|end| end <= start + size)
}

impl Region {
    fn run(&self, address: u64, len: u64) -> Option<Run> {
        let inside = within(address, len, (self.iova, self.len));
        inside.then(|| (self.host + (address - self.iova) as usize, len as usize))
    }
}

impl Hca {
    /// One object of a protection domain, and of its context, more or less.
    pub fn hold(&mut self, pd: *mut ibv_pd, change: isize) {
        // SAFETY: alive: objects of it are.
        let (context, number) = unsafe { ((*pd).context, (*pd).handle) };
        if let Some(pd) = self.pds.get_mut(number) {
            pd.objects = pd.objects.wrapping_add_signed(change);
        }
        self.count(context, change);
    }

    /// Memory that the owner of `pd` names by a local key.
    pub fn local(&self, pd: u32, run: &ibv_sge, write: bool) -> Option<Run> {
        match self.keys.get(run.lkey >> 8) {
            Some(Key::Region(region))
                if region.key == run.lkey
                    && region.pd == pd
                    && (!write || region.access & IBV_ACCESS_LOCAL_WRITE != 0) =>
            {
                region.run(run.addr, u64::from(run.length))
            }
            _ => None,
        }
    }

    /// Memory that a peer of the queue pair `qp` names to write it.
    pub fn remote(&self, qp: u32, rkey: u32, address: u64, len: u64) -> Option<Run> {
        let pd = self.qps.get(qp)?.pd;
        match self.keys.get(rkey >> 8)? {
            Key::Region(region) => {
                let allowed = region.key == rkey && region.pd == pd && region.access & IBV_ACCESS_REMOTE_WRITE != 0;
                allowed.then(|| region.run(address, len)).flatten()
            }
            Key::Window(window) => {
                let bound = window.bound.filter(|bound| bound.qp == qp && window.key == rkey && window.pd == pd)?;
                let inside = within(address, len, (bound.address, bound.len));
                match self.keys.get(bound.region) {
                    Some(Key::Region(region)) if inside && bound.access & IBV_ACCESS_REMOTE_WRITE != 0 => {
                        region.run(address, len)
                    }
                    _ => None,
                }
            }
        }
    }

    /// Binds a window on a queue pair; `None` if that cannot be.
    pub fn bind(&mut self, qp: u32, bind: &Bind) -> Option<()> {
        let pd = self.qps.get(qp)?.pd;
        let Some(Key::Region(region)) = self.keys.get(bind.region) else { return None };
        let changes = bind.access & REMOTE_CHANGES != 0;
        let allowed = region.pd == pd
            && region.access & IBV_ACCESS_MW_BIND != 0
            && (!changes || region.access & IBV_ACCESS_LOCAL_WRITE != 0)
            && bind.len > 0
            && within(bind.address, bind.len, (region.iova, region.len));
        let Some(Key::Window(window)) = self.keys.get_mut(bind.window) else { return None };
        // A window of type 2 is bound once, under a key that it did not have.
        let fresh = window.bound.is_none() && window.key >> 8 == bind.rkey >> 8 && window.key != bind.rkey;
        if !allowed || window.pd != pd || !fresh {
            return None;
        }
        window.key = bind.rkey;
        let (region, address, len, access) = (bind.region, bind.address, bind.len, bind.access);
        window.bound = Some(Bound { qp, region, address, len, access });
        if let Some(Key::Region(region)) = self.keys.get_mut(region) {
            region.windows += 1;
        }
        Some(())
    }
}
