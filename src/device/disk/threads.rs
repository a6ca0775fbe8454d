//! Threads that read blocks: one alone does not keep up with the bus.

use std::collections::VecDeque;
use std::io;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use super::block::{Block, Next};

/// A block that has been read, and how that ended: never in [`Next::Again`].
pub type Outcome = (Block, Next);

#[derive(Default)]
struct Queue {
    blocks: VecDeque<Block>,
    stop: bool,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    news: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The threads.
pub struct Threads {
    shared: Arc<Shared>,
    outcomes: Receiver<Outcome>,
    threads: Vec<JoinHandle<()>>,
}

impl Threads {
    /// Starts `count` of them.
    pub fn start(count: usize) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let (sender, outcomes) = mpsc::channel();
        let mut this = Self { shared, outcomes, threads: Vec::new() };
        for i in 0..count.max(1) {
            let (shared, sender) = (this.shared.clone(), sender.clone());
            let thread = std::thread::Builder::new().name(format!("reader-{i}")).spawn(move || work(&shared, &sender));
            this.threads.push(thread?);
        }
        Ok(this)
    }

    /// Gives them a block.
    pub fn push(&self, block: Block) {
        self.shared.lock().blocks.push_back(block);
        self.shared.news.notify_one();
    }

    /// A block that is done; with `wait`, as soon as there is one. `None` also
    /// where no thread lives any more.
    pub fn take(&self, wait: bool) -> Option<Outcome> {
        if wait { self.outcomes.recv().ok() } else { self.outcomes.try_recv().ok() }
    }
}

fn work(shared: &Shared, outcomes: &Sender<Outcome>) {
    loop {
        let mut queue = shared.lock();
        let mut block = loop {
            if queue.stop {
                return;
            }
            match queue.blocks.pop_front() {
                Some(block) => break block,
                None => queue = shared.news.wait(queue).unwrap_or_else(PoisonError::into_inner),
            }
        };
        drop(queue);
        let next = block.read();
        if outcomes.send((block, next)).is_err() {
            return;
        }
    }
}

/// When this returns, no thread touches any block's memory.
impl Drop for Threads {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.news.notify_all();
        for thread in self.threads.drain(..) {
            // A panic of its own was reported when it happened.
            let _ = thread.join();
        }
    }
}
