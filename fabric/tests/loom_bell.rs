//! Every interleaving of the shared-memory transport's sleep protocol, walked
//! by loom: no entry is left to a sleeper that nobody wakes.
//!
//! `RUSTFLAGS="--cfg loom" cargo test -p distkv-fabric --test loom_bell --release`
#![cfg(loom)]

#[path = "../src/shm/bell.rs"]
mod bell;

use bell::{AWAKE, FOR_ENTRIES, FOR_ENTRIES_OR_SPACE, Word};
use loom::sync::Arc;
use loom::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use loom::sync::atomic::{AtomicBool, AtomicU64, fence};
use loom::thread;

struct Bell<'a>(&'a AtomicU64);

impl Word for Bell<'_> {
    fn load(&self) -> u64 {
        self.0.load(Relaxed)
    }
    fn store(&self, value: u64) {
        self.0.store(value, Relaxed);
    }
    fn swap(&self, value: u64) -> u64 {
        self.0.swap(value, Relaxed)
    }
    fn fence() {
        fence(SeqCst);
    }
}

#[derive(Default)]
struct Link {
    bell: AtomicU64,
    published: AtomicU64,
    /// The doorbell's packet is in the socket.
    rung: AtomicBool,
}

/// Posters publish; the sleeper must find everything, or be rung.
fn nothing_is_missed(posters: u64, waits_for: u64, publishes: u64) {
    loom::model(move || {
        let link = Arc::new(Link::default());
        let threads: Vec<_> = (0..posters)
            .map(|_| {
                let link = Arc::clone(&link);
                thread::spawn(move || {
                    link.published.fetch_add(1, Release);
                    if bell::must_ring(&Bell(&link.bell), publishes) {
                        link.rung.store(true, Release);
                    }
                })
            })
            .collect();
        bell::lie_down([(Bell(&link.bell), waits_for)].into_iter());
        let seen = link.published.load(Acquire);
        for thread in threads {
            thread.join().unwrap();
        }
        // Had it found something it would not sleep; what came later must ring.
        let published = link.published.load(Acquire);
        assert_eq!(published, posters);
        assert!(seen > 0 || link.rung.load(Acquire), "asleep, and an entry is there");
        bell::get_up(&Bell(&link.bell));
        assert_eq!(link.bell.load(Relaxed), AWAKE);
    });
}

#[test]
fn an_entry_wakes_whoever_sleeps_for_entries() {
    nothing_is_missed(1, FOR_ENTRIES, FOR_ENTRIES);
    nothing_is_missed(2, FOR_ENTRIES, FOR_ENTRIES);
    nothing_is_missed(1, FOR_ENTRIES_OR_SPACE, FOR_ENTRIES);
}

#[test]
fn space_wakes_whoever_sleeps_for_space() {
    nothing_is_missed(1, FOR_ENTRIES_OR_SPACE, FOR_ENTRIES_OR_SPACE);
}

#[test]
fn space_does_not_wake_whoever_sleeps_for_entries() {
    loom::model(|| {
        let bell = Arc::new(AtomicU64::new(AWAKE));
        let poster = thread::spawn({
            let bell = Arc::clone(&bell);
            move || assert!(!bell::must_ring(&Bell(&bell), FOR_ENTRIES_OR_SPACE))
        });
        bell::lie_down([(Bell(&bell), FOR_ENTRIES)].into_iter());
        poster.join().unwrap();
        assert_eq!(bell.load(Relaxed), FOR_ENTRIES, "and its bell still stands");
    });
}
