//! `libibverbs`, opened at run time: its functions as pointers in a [`Lib`], and
//! what its header does in inline functions, which no library exports.
//!
//! Nothing here is safe to call beyond what `man 3 ibv_…` promises; the safe
//! side is in the modules next to this one.
#![allow(unsafe_code)]

mod types;
mod work;

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::mem::{offset_of, size_of};
use std::sync::OnceLock;

pub use types::*;
pub use work::*;

/// The library's name where [`LIBRARY_VARIABLE`] names no other.
pub const LIBRARY: &str = "libibverbs.so.1";

/// Environment variable with the name or path of the library to open instead
/// of [`LIBRARY`].
pub const LIBRARY_VARIABLE: &str = "DISTKV_LIBIBVERBS";

/// Declares [`Lib`]: one field a function, read from the symbol of that name.
macro_rules! library {
    (
        needed { $($(#[$doc:meta])* fn $name:ident($($arg:ty),*) $(-> $ret:ty)?;)* }
        optional { $($(#[$odoc:meta])* fn $oname:ident($($oarg:ty),*) $(-> $oret:ty)?;)* }
    ) => {
        /// The functions of `libibverbs`. A needed one is always there; an
        /// optional one is `None` in a library that is older than it.
        #[allow(missing_docs)]
        pub struct Lib {
            $($(#[$doc])* pub $name: unsafe extern "C" fn($($arg),*) $(-> $ret)?,)*
            $($(#[$odoc])* pub $oname: Option<unsafe extern "C" fn($($oarg),*) $(-> $oret)?>,)*
            // The pointers above are valid as long as this is open.
            _library: libloading::Library,
        }

        impl Lib {
            fn bind(library: libloading::Library, name: &str) -> Result<Self, String> {
                $(
                    // SAFETY: the symbol of this name has this type in every
                    // libibverbs.so.1, the library's ABI promise.
                    let $name = *unsafe { library.get(stringify!($name)) }
                        .map_err(|_| lacks(name, stringify!($name)))?;
                )*
                $(
                    // SAFETY: as above.
                    let $oname = unsafe { library.get(stringify!($oname)) }.ok().map(|symbol| *symbol);
                )*
                Ok(Self { $($name,)* $($oname,)* _library: library })
            }
        }
    };
}

library! {
    needed {
        fn ibv_get_device_list(*mut c_int) -> *mut *mut ibv_device;
        fn ibv_free_device_list(*mut *mut ibv_device);
        fn ibv_get_device_name(*mut ibv_device) -> *const c_char;
        fn ibv_open_device(*mut ibv_device) -> *mut ibv_context;
        fn ibv_close_device(*mut ibv_context) -> c_int;
        fn ibv_query_device(*mut ibv_context, *mut ibv_device_attr) -> c_int;
        /// Fills no more than the oldest fields: call [`query_port`] instead.
        fn ibv_query_port(*mut ibv_context, u8, *mut ibv_port_attr) -> c_int;
        fn ibv_query_gid(*mut ibv_context, u8, c_int, *mut ibv_gid) -> c_int;
        fn ibv_alloc_pd(*mut ibv_context) -> *mut ibv_pd;
        fn ibv_dealloc_pd(*mut ibv_pd) -> c_int;
        /// Arguments: pd, address, length, the address that peers use, access.
        /// Drops the optional access flags that the kernel does not know.
        fn ibv_reg_mr_iova2(*mut ibv_pd, *mut c_void, usize, u64, c_uint) -> *mut ibv_mr;
        fn ibv_dereg_mr(*mut ibv_mr) -> c_int;
        fn ibv_create_comp_channel(*mut ibv_context) -> *mut ibv_comp_channel;
        fn ibv_destroy_comp_channel(*mut ibv_comp_channel) -> c_int;
        /// Arguments: context, entries, cq_context, channel, completion vector.
        fn ibv_create_cq(*mut ibv_context, c_int, *mut c_void, *mut ibv_comp_channel, c_int) -> *mut ibv_cq;
        fn ibv_destroy_cq(*mut ibv_cq) -> c_int;
        fn ibv_get_cq_event(*mut ibv_comp_channel, *mut *mut ibv_cq, *mut *mut c_void) -> c_int;
        fn ibv_ack_cq_events(*mut ibv_cq, c_uint);
        fn ibv_create_srq(*mut ibv_pd, *mut ibv_srq_init_attr) -> *mut ibv_srq;
        fn ibv_modify_srq(*mut ibv_srq, *mut ibv_srq_attr, c_int) -> c_int;
        fn ibv_destroy_srq(*mut ibv_srq) -> c_int;
        fn ibv_create_qp(*mut ibv_pd, *mut ibv_qp_init_attr) -> *mut ibv_qp;
        fn ibv_modify_qp(*mut ibv_qp, *mut ibv_qp_attr, c_int) -> c_int;
        fn ibv_query_qp(*mut ibv_qp, *mut ibv_qp_attr, c_int, *mut ibv_qp_init_attr) -> c_int;
        fn ibv_destroy_qp(*mut ibv_qp) -> c_int;
        fn ibv_get_async_event(*mut ibv_context, *mut ibv_async_event) -> c_int;
        fn ibv_ack_async_event(*mut ibv_async_event);
        fn ibv_wc_status_str(ibv_enum) -> *const c_char;
        fn ibv_event_type_str(ibv_enum) -> *const c_char;
        fn ibv_fork_init() -> c_int;
    }
    optional {
        /// Arguments: context, port, index, entry, flags (0), the entry's size.
        fn _ibv_query_gid_ex(*mut ibv_context, u32, u32, *mut ibv_gid_entry, u32, usize) -> c_int;
        /// Arguments: pd, offset, length, the address that peers use, fd, access.
        fn ibv_reg_dmabuf_mr(*mut ibv_pd, u64, usize, u64, c_int, c_int) -> *mut ibv_mr;
    }
}

fn lacks(library: &str, symbol: &str) -> String {
    format!("{library} lacks {symbol}: it is older than rdma-core 28, or no libibverbs; install libibverbs1")
}

impl Lib {
    /// The library, opened at the first call and kept; the error says why it
    /// cannot be used and is the same at every call.
    pub fn get() -> Result<&'static Self, &'static str> {
        static LIB: OnceLock<Result<Lib, String>> = OnceLock::new();
        LIB.get_or_init(|| {
            let named = std::env::var(LIBRARY_VARIABLE).ok().filter(|name| !name.is_empty());
            Self::open(named.as_deref().unwrap_or(LIBRARY))
        })
        .as_ref()
        .map_err(String::as_str)
    }

    /// Opens the library of this name or path; for [`get`](Self::get) and for
    /// tests.
    pub fn open(name: &str) -> Result<Self, String> {
        // SAFETY: libibverbs has no initialisation that asks anything of its
        // caller; a library that the user names instead is the user's choice.
        let library = unsafe { libloading::Library::new(name) }.map_err(|error| {
            let why = std::error::Error::source(&error).map_or_else(|| error.to_string(), |cause| cause.to_string());
            let why = why.strip_prefix(&format!("{name}: ")).unwrap_or(&why);
            format!("{name} cannot be opened: {why}")
        })?;
        Self::bind(library, name)
    }
}

/// The extended part of a context, if it reaches up to the field at `offset`.
///
/// # Safety
/// `context` is open.
unsafe fn extended(context: *mut ibv_context, offset: usize) -> Option<*mut verbs_context> {
    // SAFETY: the caller's promise.
    if unsafe { (*context).abi_compat }.addr() != usize::MAX {
        return None;
    }
    // Kept as an address: `verbs_context` may reach further up here than the
    // library's own, until `sz` has been seen.
    let whole = context.wrapping_byte_sub(offset_of!(verbs_context, context)).cast::<verbs_context>();
    // SAFETY: a context with this mark is the last field of a `verbs_context`,
    // and `sz`, next to it, has been there in every version.
    let size = unsafe { (*whole).sz };
    (size >= size_of::<verbs_context>() - offset).then_some(whole)
}

/// `ibv_query_port` as C programs get it: all fields of `attr` that the library
/// knows, the others zero. Returns 0 or an errno.
///
/// # Safety
/// `context` is open; `attr` can be written.
pub unsafe fn query_port(lib: &Lib, context: *mut ibv_context, port: u8, attr: *mut ibv_port_attr) -> c_int {
    // SAFETY: the caller's promise; zero is a value of every field.
    unsafe { attr.write_bytes(0, 1) };
    // SAFETY: the caller's promise.
    let whole = unsafe { extended(context, offset_of!(verbs_context, query_port)) };
    // SAFETY: `extended` says that the field is there.
    match whole.and_then(|whole| unsafe { (*whole).query_port }) {
        // SAFETY: the function's contract, given the struct's true size.
        Some(query) => unsafe { query(context, port, attr, size_of::<ibv_port_attr>()) },
        // SAFETY: the old symbol fills a prefix of the struct.
        None => unsafe { (lib.ibv_query_port)(context, port, attr) },
    }
}

/// Calls a function of the table of `$object`'s context; `EOPNOTSUPP` where the
/// driver has none.
macro_rules! call {
    ($object:expr, $op:ident($($arg:expr),*)) => {
        // SAFETY: the caller promises that the object is alive, and so is its
        // context; the call's own contract is the caller's too.
        unsafe {
            match (*(*$object).context).ops.$op {
                Some(op) => op($($arg),*),
                None => libc::EOPNOTSUPP,
            }
        }
    };
}

/// Takes up to `entries` completions; the number taken, or negative on failure.
///
/// # Safety
/// `cq` is alive; `wc` has room for `entries`.
#[inline]
pub unsafe fn poll_cq(cq: *mut ibv_cq, entries: c_int, wc: *mut ibv_wc) -> c_int {
    // SAFETY: the caller's promise. Every driver has this function; one without
    // would fail here, not poll nothing for ever.
    match unsafe { (*(*cq).context).ops.poll_cq } {
        // SAFETY: the caller's promise.
        Some(poll) => unsafe { poll(cq, entries, wc) },
        None => -libc::EOPNOTSUPP,
    }
}

/// Asks for an event on the next completion. Returns 0 or an errno.
///
/// # Safety
/// `cq` is alive.
#[inline]
pub unsafe fn req_notify_cq(cq: *mut ibv_cq, solicited_only: bool) -> c_int {
    call!(cq, req_notify_cq(cq, c_int::from(solicited_only)))
}

/// Posts a chain of send requests. Returns 0, or an errno with the first
/// request that was not posted in `bad`.
///
/// # Safety
/// `qp` is alive; the chain and what it points to are valid for the call, and
/// the memory it names until its completion.
#[inline]
pub unsafe fn post_send(qp: *mut ibv_qp, wr: *mut ibv_send_wr, bad: *mut *mut ibv_send_wr) -> c_int {
    call!(qp, post_send(qp, wr, bad))
}

/// Posts a chain of receive requests to a queue pair. As [`post_send`].
///
/// # Safety
/// As [`post_send`].
#[inline]
pub unsafe fn post_recv(qp: *mut ibv_qp, wr: *mut ibv_recv_wr, bad: *mut *mut ibv_recv_wr) -> c_int {
    call!(qp, post_recv(qp, wr, bad))
}

/// Posts a chain of receive requests to a shared receive queue. As
/// [`post_send`].
///
/// # Safety
/// As [`post_send`].
#[inline]
pub unsafe fn post_srq_recv(srq: *mut ibv_srq, wr: *mut ibv_recv_wr, bad: *mut *mut ibv_recv_wr) -> c_int {
    call!(srq, post_srq_recv(srq, wr, bad))
}

/// Makes a memory window of `kind` ([`IBV_MW_TYPE_1`] or [`IBV_MW_TYPE_2`]).
/// Null with errno set where it fails, or where the driver has none.
///
/// # Safety
/// `pd` is alive.
pub unsafe fn alloc_mw(pd: *mut ibv_pd, kind: ibv_enum) -> *mut ibv_mw {
    // SAFETY: the caller's promise.
    match unsafe { (*(*pd).context).ops.alloc_mw } {
        // SAFETY: the caller's promise.
        Some(alloc) => unsafe { alloc(pd, kind) },
        None => {
            // SAFETY: the address of this thread's errno.
            unsafe { *libc::__errno_location() = libc::EOPNOTSUPP };
            std::ptr::null_mut()
        }
    }
}

/// Binds a type 1 window; type 2 windows are bound by [`post_send`] with
/// [`IBV_WR_BIND_MW`]. Returns 0 or an errno.
///
/// # Safety
/// `qp`, `mw` and the region in `bind` are alive and of one protection domain.
pub unsafe fn bind_mw(qp: *mut ibv_qp, mw: *mut ibv_mw, bind: *mut ibv_mw_bind) -> c_int {
    // The checks that the header makes before it calls the driver.
    // SAFETY: the caller's promise.
    let (kind, info, pd) = unsafe { ((*mw).r#type, (*bind).bind_info, (*mw).pd) };
    if kind != IBV_MW_TYPE_1 || (info.mr.is_null() && (info.addr != 0 || info.length != 0)) {
        return libc::EINVAL;
    }
    // SAFETY: the caller's promise.
    if !info.mr.is_null() && unsafe { (*info.mr).pd } != pd {
        return libc::EPERM;
    }
    call!(mw, bind_mw(qp, mw, bind))
}

/// Frees a memory window. Returns 0 or an errno.
///
/// # Safety
/// `mw` is alive and bound to nothing in use.
pub unsafe fn dealloc_mw(mw: *mut ibv_mw) -> c_int {
    call!(mw, dealloc_mw(mw))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_library_is_named_with_the_reason() {
        let error = Lib::open("/nonexistent/libibverbs.so.1").err().expect("opened a library that is not there");
        assert!(error.starts_with("/nonexistent/libibverbs.so.1 cannot be opened: cannot open shared"), "{error}");
        assert!(error.contains("No such file"), "{error}");
    }

    #[test]
    fn a_library_without_the_functions_is_refused_by_name_of_the_first() {
        // The C library is there, and is not libibverbs.
        let error = Lib::open("libc.so.6").err().expect("took the C library for libibverbs");
        assert_eq!(
            error,
            "libc.so.6 lacks ibv_get_device_list: it is older than rdma-core 28, or no libibverbs; install libibverbs1"
        );
    }
}
