//! How a sleeper is woken, and only a sleeper.
//!
//! Each side of a link has a bell word in shared memory: 0 while it runs, and
//! what it waits for while it sleeps. The protocol is Dekker's:
//!
//! | sleeper | poster |
//! |---|---|
//! | sets its bell | publishes an entry (or frees one) |
//! | full fence | full fence |
//! | looks at the rings once more; sleeps only if there is nothing | looks at the bell; rings if it is set |
//!
//! Of the two fences one comes first. If the sleeper's does, the poster sees
//! the bell; if the poster's does, the sleeper sees the entry. So an entry is
//! never left to a sleeper that nobody wakes. `tests/loom_bell.rs` walks every
//! interleaving of this file's code.

/// A shared word, as far as the protocol needs one. A trait so that the model
/// checker can put its own in its place.
pub trait Word {
    /// Relaxed load.
    fn load(&self) -> u64;
    /// Relaxed store.
    fn store(&self, value: u64);
    /// Relaxed swap.
    fn swap(&self, value: u64) -> u64;
    /// A sequentially consistent fence.
    fn fence();
}

/// Runs.
pub const AWAKE: u64 = 0;
/// Sleeps until entries arrive.
pub const FOR_ENTRIES: u64 = 1;
/// Sleeps until entries arrive or space for its own is freed.
pub const FOR_ENTRIES_OR_SPACE: u64 = 2;

/// The sleeper's side: says that it is about to sleep. It must then look once
/// more for what it waits for, and sleep only if that is not there.
pub fn lie_down<W: Word>(bells: impl Iterator<Item = (W, u64)>) {
    for (bell, why) in bells {
        bell.store(why);
    }
    W::fence();
}

/// The sleeper's side: it is up again.
pub fn get_up<W: Word>(bell: &W) {
    bell.store(AWAKE);
}

/// The poster's side, after something was published: does the sleeper have to
/// be woken? `least` is what was published: [`FOR_ENTRIES`] wakes every
/// sleeper, [`FOR_ENTRIES_OR_SPACE`] only one that waits for space.
pub fn must_ring<W: Word>(bell: &W, least: u64) -> bool {
    W::fence();
    // Taken down by whoever rings, so that one sleep costs one system call.
    bell.load() >= least && bell.swap(AWAKE) >= least
}

impl Word for &std::sync::atomic::AtomicU64 {
    fn load(&self) -> u64 {
        std::sync::atomic::AtomicU64::load(self, std::sync::atomic::Ordering::Relaxed)
    }

    fn store(&self, value: u64) {
        std::sync::atomic::AtomicU64::store(self, value, std::sync::atomic::Ordering::Relaxed);
    }

    fn swap(&self, value: u64) -> u64 {
        std::sync::atomic::AtomicU64::swap(self, value, std::sync::atomic::Ordering::Relaxed)
    }

    fn fence() {
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
    }
}
