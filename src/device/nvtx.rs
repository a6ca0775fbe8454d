//! Named ranges of time for profilers (Nsight Systems), by NVIDIA's NVTX library,
//! opened at run time. Where there is none, or before [`open`], a range costs one
//! branch and does nothing.

#![allow(unsafe_code)]

use std::ffi::{CStr, c_char, c_int, c_void};
use std::marker::PhantomData;
use std::sync::Once;
use std::sync::atomic::{AtomicPtr, Ordering};

/// Where the functions are: version 3 as a library, and the one before.
const LIBRARIES: [&CStr; 3] = [c"libnvtx3interop.so", c"libnvtx3interop.so.1", c"libnvToolsExt.so.1"];

type Push = unsafe extern "C" fn(*const c_char) -> c_int;
type Pop = unsafe extern "C" fn() -> c_int;

/// Null until a library was found. The first is set last.
static PUSH: AtomicPtr<c_void> = AtomicPtr::new(std::ptr::null_mut());
static POP: AtomicPtr<c_void> = AtomicPtr::new(std::ptr::null_mut());

/// Looks for the library, once. Ranges that begin afterwards are shown.
pub fn open() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        for name in LIBRARIES {
            // SAFETY: opens a library by its name and looks two functions up in it. It
            // stays open, so that they remain callable.
            let found = unsafe {
                let library = libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL);
                if library.is_null() {
                    continue;
                }
                [c"nvtxRangePushA", c"nvtxRangePop"].map(|function| libc::dlsym(library, function.as_ptr()))
            };
            if found.iter().any(|function| function.is_null()) {
                continue;
            }
            POP.store(found[1], Ordering::Relaxed);
            PUSH.store(found[0], Ordering::Release);
            tracing::debug!(library = ?name, "ranges of time are shown to profilers");
            return;
        }
    });
}

/// A range of time of this thread, which ends when it is dropped. Ranges of a
/// thread lie inside one another.
pub struct Range {
    open: bool,
    /// It ends in its own thread.
    _stays: PhantomData<*const ()>,
}

/// Begins a range.
#[inline]
pub fn range(name: &'static CStr) -> Range {
    let push = PUSH.load(Ordering::Acquire);
    let open = !push.is_null();
    if open {
        // SAFETY: the library's function, of this type by its documentation; the name
        // is a string that lives for ever.
        unsafe { std::mem::transmute::<*mut c_void, Push>(push)(name.as_ptr()) };
    }
    Range { open, _stays: PhantomData }
}

impl Drop for Range {
    #[inline]
    fn drop(&mut self) {
        if self.open {
            // SAFETY: set before the function that began it; of this type by its
            // documentation.
            unsafe { std::mem::transmute::<*mut c_void, Pop>(POP.load(Ordering::Relaxed))() };
        }
    }
}
