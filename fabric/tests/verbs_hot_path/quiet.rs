//! Counts a thread's allocations, and its system calls by forbidding them.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

/// Allocations and reallocations of this thread so far. The software HCA has an
/// allocator of its own: what it does is not among them.
pub fn allocations() -> u64 {
    ALLOCATIONS.get()
}

struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn count() {
    // A thread that ends has no count any more.
    let _ = ALLOCATIONS.try_with(|n| n.set(n.get() + 1));
}

// SAFETY: all is the system's.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, len: usize) -> *mut u8 {
        count();
        // SAFETY: the caller's promise.
        unsafe { System.realloc(at, layout, len) }
    }
}

#[cfg(target_arch = "x86_64")]
pub use forbidden::forbid_system_calls;

#[cfg(target_arch = "x86_64")]
mod forbidden {
    use std::ffi::{c_int, c_void};
    use std::io::Write as _;
    use std::mem::zeroed;
    use std::ptr;
    use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
    use std::time::Duration;

    static LOOKS: AtomicU64 = AtomicU64::new(0);
    static OTHERS: AtomicU64 = AtomicU64::new(0);
    static LAST: AtomicI64 = AtomicI64::new(-1);

    /// System calls that were tried.
    pub struct Counts(());

    /// From here on this thread makes no system call: one that it tries is
    /// counted, and answered without being made.
    pub fn forbid_system_calls() -> Counts {
        // SAFETY: the handler does only what one may do; the filter is on this
        // stack for the call.
        unsafe {
            let mut action: libc::sigaction = zeroed();
            action.sa_sigaction = tried as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO;
            assert_eq!(libc::sigaction(libc::SIGSYS, &action, ptr::null_mut()), 0);
            let allowed = [libc::SYS_write, libc::SYS_exit_group, libc::SYS_rt_sigreturn];
            let op = |code: u32, jt: usize, k: u32| libc::sock_filter { code: code as u16, jt: jt as u8, jf: 0, k };
            let mut program = vec![op(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0)];
            for (i, number) in allowed.iter().enumerate() {
                let to_the_end = allowed.len() - i;
                program.push(op(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, to_the_end, *number as u32));
            }
            program.push(op(libc::BPF_RET | libc::BPF_K, 0, libc::SECCOMP_RET_TRAP));
            program.push(op(libc::BPF_RET | libc::BPF_K, 0, libc::SECCOMP_RET_ALLOW));
            let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
            assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
            assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &filter), 0);
            // Freed it might go back to the system by a call.
            std::mem::forget(program);
            // It works: this call is one, and is not made.
            assert_eq!(libc::syscall(libc::SYS_getppid), -1);
            assert_eq!(OTHERS.swap(0, Ordering::Relaxed), 1);
        }
        Counts(())
    }

    extern "C" fn tried(_: c_int, _: *mut libc::siginfo_t, context: *mut c_void) {
        // SAFETY: the signal's context, which the return goes by.
        let answer = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs[libc::REG_RAX as usize] };
        let number = *answer;
        *answer = match number {
            // Nothing is ready.
            libc::SYS_epoll_wait | libc::SYS_epoll_pwait | libc::SYS_epoll_pwait2 => {
                LOOKS.fetch_add(1, Ordering::Relaxed);
                0
            }
            _ => {
                OTHERS.fetch_add(1, Ordering::Relaxed);
                LAST.store(number, Ordering::Relaxed);
                -i64::from(libc::ENOSYS)
            }
        };
    }

    impl Counts {
        /// Says what was counted and ends the process.
        pub fn report_and_exit(self, rounds: usize, took: Duration) -> ! {
            let mut line = [0u8; 200];
            let room = line.len();
            let mut rest = &mut line[..];
            let [looks, others] = [&LOOKS, &OTHERS].map(|n| n.load(Ordering::Relaxed));
            let (last, took) = (LAST.load(Ordering::Relaxed), took.as_millis());
            let _ = writeln!(
                rest,
                "\nin {rounds} rounds {looks} looks and {others} other system calls within {took} ms (last:{last})"
            );
            let len = room - rest.len();
            // SAFETY: the line is there; the process ends.
            unsafe {
                libc::write(1, line.as_ptr().cast(), len);
                libc::_exit(if others == 0 { 0 } else { 1 });
            }
        }
    }
}
