//! How a side spins: the transport's and the floor's alike, or the comparison says
//! who of them is kinder to the others on a busy machine.

use std::time::{Duration, Instant};

use anyhow::Result;

/// A spinner lets others have its core after this time: longer than an answer takes
/// even where RDMA is emulated, or what is measured is how long that lasts.
const PATIENCE: Duration = Duration::from_micros(50);
/// And sleeps after this time: longer than 64 KiB take there (1.1 ms), or whoever
/// posts pays for waking it, 50 µs where a wake-up is emulated too.
const LIMIT: Duration = Duration::from_millis(2);

/// One wait's.
pub(super) struct Patience {
    start: Instant,
    polls: u32,
}

impl Patience {
    /// Of a wait that begins now.
    pub fn new() -> Self {
        Self { start: Instant::now(), polls: 0 }
    }

    /// After a look in vain. Where cores are short the other side, or the
    /// kernel's own work for a transport, may be waiting for this one. `sleep`
    /// lasts until there may be something, at most as long as it is told.
    pub fn after_poll(&mut self, sleep: impl FnOnce(Duration) -> Result<()>) -> Result<()> {
        self.polls = self.polls.wrapping_add(1);
        if self.polls.is_multiple_of(16) {
            match self.start.elapsed() {
                idle if idle > LIMIT => sleep(Duration::from_millis(50))?,
                idle if idle > PATIENCE => std::thread::yield_now(),
                _ => {}
            }
        }
        Ok(())
    }
}
