//! The fork-join pool: a few threads that share one step's loops.
//!
//! Chunks of a loop are claimed, not assigned, and the caller works too: it
//! never waits for a worker that the system has not scheduled, only for chunks
//! that a worker has begun. That matters where several nodes or processes
//! share the cores. Idle workers spin for a moment (forks follow each other
//! within microseconds during a step), then sleep.
#![allow(unsafe_code)]

use std::any::Any;
use std::cell::UnsafeCell;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

use crossbeam_utils::CachePadded;

use crate::device::{DeviceError, Result};

/// Spinning is worth it while a step's forks follow each other.
const SPIN: Duration = Duration::from_micros(50);
/// With more pool threads than cores a spinner keeps another one from working.
const SPIN_CROWDED: Duration = Duration::from_micros(2);
/// A spinner that lost its core for this long knows that others want it.
const PREEMPTED: Duration = Duration::from_micros(200);
/// Waits that then go without spinning.
const BACK_OFF: u32 = 64;

const ACTIVE: u64 = 0xffff;
const OPEN: u64 = 1 << 16;
const WAITING: u64 = 1 << 17;
const EPOCH: u64 = 1 << 32;

/// Threads of all pools of this process.
static POOL_THREADS: AtomicUsize = AtomicUsize::new(0);
/// The core that the next pinned worker takes.
static NEXT_CORE: AtomicUsize = AtomicUsize::new(0);

type Body = dyn Fn(usize, Range<usize>) + Sync;

#[derive(Clone, Copy)]
struct Job {
    body: *const Body,
    items: usize,
    grain: usize,
}

struct Shared {
    /// Epoch in the upper half; whether workers may still enter the job; whether
    /// the caller sleeps until they left; how many are inside.
    state: CachePadded<AtomicU64>,
    /// First item not yet claimed.
    next: CachePadded<AtomicUsize>,
    job: UnsafeCell<Option<Job>>,
    asleep: Box<[CachePadded<AtomicBool>]>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    caller: Mutex<Option<Thread>>,
    stop: AtomicBool,
    cores: usize,
}

// SAFETY: `job` is written only by the one caller (`run` takes `&mut`) while no
// worker is inside and none may enter; workers read it only between entering
// (acquire on `state`) and leaving (release on `state`).
unsafe impl Sync for Shared {}
// SAFETY: as above; the pointer in `job` is used only while `run` keeps its
// target alive.
unsafe impl Send for Shared {}

/// A pool of `threads − 1` workers and the thread that calls it.
pub struct ThreadPool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    spinner: Spinner,
}

impl ThreadPool {
    /// Starts a pool of `threads` threads, the caller's included. With `pin`
    /// each worker keeps to one core of the process's affinity mask.
    pub fn new(threads: usize, pin: bool) -> Result<Self> {
        let threads = threads.clamp(1, ACTIVE as usize);
        let allowed = allowed_cores();
        let shared = Arc::new(Shared {
            state: CachePadded::new(AtomicU64::new(0)),
            next: CachePadded::new(AtomicUsize::new(0)),
            job: UnsafeCell::new(None),
            asleep: (1..threads).map(|_| CachePadded::new(AtomicBool::new(false))).collect(),
            panic: Mutex::new(None),
            caller: Mutex::new(None),
            stop: AtomicBool::new(false),
            cores: allowed.len().max(1),
        });
        POOL_THREADS.fetch_add(threads, Ordering::Relaxed);
        let mut pool = Self { shared, workers: Vec::with_capacity(threads - 1), spinner: Spinner::default() };
        // The caller is presumed on the first of the cores it would be given.
        let first = NEXT_CORE.fetch_add(threads, Ordering::Relaxed);
        for index in 1..threads {
            let shared = Arc::clone(&pool.shared);
            let core = if pin && !allowed.is_empty() { Some(allowed[(first + index) % allowed.len()]) } else { None };
            let worker = std::thread::Builder::new()
                .name(format!("cpu-{index}"))
                .spawn(move || {
                    if let Some(core) = core {
                        pin_to(core);
                    }
                    work(&shared, index);
                })
                .map_err(|e| DeviceError::System(format!("starting a worker thread: {e}")))?;
            pool.workers.push(worker);
        }
        Ok(pool)
    }

    /// Threads, the caller's included.
    pub fn threads(&self) -> usize {
        self.shared.asleep.len() + 1
    }

    /// Runs `body(thread, range)` over all of `0..items` in ranges of at most
    /// `grain` items, each range once. `thread` is below
    /// [`threads`](Self::threads) and no two calls at the same time have the
    /// same. Returns when all are done; a panic in any of them is raised here.
    pub fn run(&mut self, items: usize, grain: usize, body: &(dyn Fn(usize, Range<usize>) + Sync)) {
        if items == 0 {
            return;
        }
        let grain = grain.max(1);
        if items <= grain || self.workers.is_empty() {
            let mut start = 0;
            while start < items {
                let end = items.min(start + grain);
                body(0, start..end);
                start = end;
            }
            return;
        }
        let shared = &*self.shared;
        // SAFETY: only the lifetime is erased. Nobody reads the pointer after
        // this call: it closes the job and waits for all who entered.
        let body =
            unsafe { std::mem::transmute::<*const (dyn Fn(usize, Range<usize>) + Sync + '_), *const Body>(body) };
        let job = Job { body, items, grain };
        // SAFETY: no worker is inside (the last call waited) and none may enter
        // (it is closed), and `&mut self` keeps other callers away.
        unsafe { *shared.job.get() = Some(job) };
        shared.next.store(0, Ordering::Relaxed);
        let epoch = (shared.state.load(Ordering::Relaxed) & !(EPOCH - 1)).wrapping_add(EPOCH);
        shared.state.store(epoch | OPEN, Ordering::SeqCst);
        let wanted = items.div_ceil(grain) - 1;
        for (asleep, worker) in shared.asleep.iter().zip(&self.workers).take(wanted) {
            if asleep.load(Ordering::SeqCst) && asleep.swap(false, Ordering::SeqCst) {
                worker.thread().unpark();
            }
        }
        take_chunks(shared, job, 0);
        let state = shared.state.fetch_and(!OPEN, Ordering::SeqCst);
        if state & ACTIVE != 0 {
            self.wait();
        }
        let panic = lock(&self.shared.panic).take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }

    /// Waits until every worker has left the closed job.
    #[cold]
    fn wait(&mut self) {
        let shared = &*self.shared;
        let empty = || shared.state.load(Ordering::Acquire) & ACTIVE == 0;
        if self.spinner.until(shared.cores, empty) {
            return;
        }
        *lock(&shared.caller) = Some(std::thread::current());
        if shared.state.fetch_or(WAITING, Ordering::SeqCst) & ACTIVE != 0 {
            while !empty() {
                std::thread::park();
            }
        }
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.state.fetch_add(EPOCH, Ordering::SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker catches its panics, so there is nothing to hear here.
            let _ = worker.join();
        }
        POOL_THREADS.fetch_sub(self.threads(), Ordering::Relaxed);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Claims and runs chunks until none is left. A panic ends the whole job: the
/// rest of its chunks are given up.
fn take_chunks(shared: &Shared, job: Job, thread: usize) {
    let result = catch_unwind(AssertUnwindSafe(|| {
        loop {
            let start = shared.next.fetch_add(job.grain, Ordering::Relaxed);
            if start >= job.items {
                break;
            }
            // SAFETY: the caller keeps the closure alive until everybody who
            // entered the job has left it.
            unsafe { (*job.body)(thread, start..job.items.min(start + job.grain)) };
        }
    }));
    if let Err(panic) = result {
        shared.next.store(job.items, Ordering::Relaxed);
        lock(&shared.panic).get_or_insert(panic);
    }
}

fn work(shared: &Shared, index: usize) {
    let mut spinner = Spinner::default();
    let mut seen = 0;
    let epoch = |order| shared.state.load(order) & !(EPOCH - 1);
    loop {
        if !spinner.until(shared.cores, || epoch(Ordering::Acquire) != seen) {
            let asleep = &shared.asleep[index - 1];
            loop {
                asleep.store(true, Ordering::SeqCst);
                if epoch(Ordering::SeqCst) != seen {
                    asleep.store(false, Ordering::SeqCst);
                    break;
                }
                std::thread::park();
            }
        }
        if shared.stop.load(Ordering::SeqCst) {
            return;
        }
        let mut state = shared.state.load(Ordering::Acquire);
        seen = state & !(EPOCH - 1);
        // Enter only the job that was seen, and only while it is open.
        let entered = loop {
            if state & OPEN == 0 || state & !(EPOCH - 1) != seen {
                break false;
            }
            match shared.state.compare_exchange_weak(state, state + 1, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => break true,
                Err(now) => state = now,
            }
        };
        if !entered {
            continue;
        }
        // SAFETY: entered: the caller does not write the job until we left.
        if let Some(job) = unsafe { *shared.job.get() } {
            take_chunks(shared, job, index);
        }
        let before = shared.state.fetch_sub(1, Ordering::SeqCst);
        if before & ACTIVE == 1
            && before & WAITING != 0
            && let Some(caller) = lock(&shared.caller).as_ref()
        {
            caller.unpark();
        }
    }
}

/// Bounded spinning that shortens itself where the cores are wanted by others.
#[derive(Default)]
struct Spinner {
    back_off: u32,
}

impl Spinner {
    /// Spins until `ready`, at most for a while; whether it was ready.
    fn until(&mut self, cores: usize, ready: impl Fn() -> bool) -> bool {
        if ready() {
            return true;
        }
        if self.back_off > 0 {
            self.back_off -= 1;
            return false;
        }
        let crowded = POOL_THREADS.load(Ordering::Relaxed) > cores;
        let limit = if crowded { SPIN_CROWDED } else { SPIN };
        let start = Instant::now();
        let mut last = start;
        loop {
            for _ in 0..8 {
                std::hint::spin_loop();
                if ready() {
                    return true;
                }
            }
            let now = Instant::now();
            if now - last > PREEMPTED {
                self.back_off = BACK_OFF;
                return ready();
            }
            if now - start > limit {
                return false;
            }
            last = now;
        }
    }
}

#[cfg(target_os = "linux")]
fn allowed_cores() -> Vec<usize> {
    let Ok(set) = rustix::thread::sched_getaffinity(None) else { return Vec::new() };
    (0..rustix::thread::CpuSet::MAX_CPU).filter(|&core| set.is_set(core)).collect()
}

#[cfg(not(target_os = "linux"))]
fn allowed_cores() -> Vec<usize> {
    (0..std::thread::available_parallelism().map_or(1, |n| n.get())).collect()
}

#[cfg(target_os = "linux")]
fn pin_to(core: usize) {
    let mut set = rustix::thread::CpuSet::new();
    set.set(core);
    if let Err(error) = rustix::thread::sched_setaffinity(None, &set) {
        tracing::warn!(core, %error, "a worker thread stays unpinned");
    }
}

#[cfg(not(target_os = "linux"))]
fn pin_to(_core: usize) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_runs_exactly_once() {
        for threads in [1, 2, 3, 5] {
            let mut pool = ThreadPool::new(threads, false).unwrap();
            for (items, grain) in [(0, 1), (1, 1), (7, 2), (1000, 1), (1000, 33), (5, 100)] {
                let counts: Vec<AtomicUsize> = (0..items).map(|_| AtomicUsize::new(0)).collect();
                for _ in 0..20 {
                    pool.run(items, grain, &|thread, range| {
                        assert!(thread < threads && range.len() <= grain);
                        for i in range {
                            counts[i].fetch_add(1, Ordering::Relaxed);
                        }
                    });
                }
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 20));
            }
        }
    }

    #[test]
    fn a_thread_index_is_never_used_twice_at_a_time() {
        let mut pool = ThreadPool::new(4, true).unwrap();
        let busy: Vec<AtomicBool> = (0..4).map(|_| AtomicBool::new(false)).collect();
        for _ in 0..200 {
            pool.run(64, 1, &|thread, _| {
                assert!(!busy[thread].swap(true, Ordering::SeqCst));
                std::hint::black_box((0..500).sum::<u64>());
                busy[thread].store(false, Ordering::SeqCst);
            });
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let mut pool = ThreadPool::new(3, false).unwrap();
        for bad in [0, 50, 99] {
            let hit = catch_unwind(AssertUnwindSafe(|| {
                pool.run(100, 1, &|_, range| assert!(range.start != bad, "item {bad}"));
            }));
            let message = *hit.unwrap_err().downcast::<String>().unwrap();
            assert_eq!(message, format!("item {bad}"));
            let sum = AtomicUsize::new(0);
            pool.run(100, 1, &|_, range| {
                sum.fetch_add(range.start, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 4950);
        }
    }

    #[test]
    fn sleeping_workers_are_woken() {
        let mut pool = ThreadPool::new(2, false).unwrap();
        // Two items that wait for each other: only two threads can finish them.
        for _ in 0..3 {
            while !pool.shared.asleep[0].load(Ordering::SeqCst) {
                std::thread::yield_now();
            }
            let met = AtomicUsize::new(0);
            pool.run(2, 1, &|_, _| {
                met.fetch_add(1, Ordering::SeqCst);
                while met.load(Ordering::SeqCst) < 2 {
                    std::thread::yield_now();
                }
            });
        }
    }
}
