//! One connection: posts into the outgoing lane, entries out of the incoming
//! one, and the peer's regions that we have mapped.

use std::collections::{HashSet, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use super::bell;
use super::entry::{Entry, INLINE, PART, Part};
use super::lane::{Receiver, Sender};
use super::ring::LinkMemory;
use super::socket::{self, Packet, Received};
use crate::key::{Key, Maker, Token};
use crate::regions::Regions;
use crate::{Address, Error, Event, MAX_SEND, Memory, Notify, PeerId, QUEUE_LIMIT, RegionId, Result};

/// Entries taken from one connection in one poll, so that it does not keep the
/// others waiting.
const BATCH: usize = 512;

/// Regions whose files a peer may have asked for and not yet taken.
const GRANTS: usize = 1024;

/// What a queued entry or descriptor counts, bytes.
const ENTRY_COST: usize = super::ring::ENTRY;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// The side that connected waits for the welcome, the other for the hello,
    /// until the instant.
    Greeting {
        until: Instant,
    },
    Open,
}

/// Something that the rings had no room for, or that waits for a region.
enum Post {
    Payload { hello: bool, bytes: Vec<u8>, done: usize },
    Entry(Entry),
    Copy(Copy),
}

/// A write whose source range was checked: `len` bytes from `source` at `at` to
/// the region behind `key` at `to`.
pub(super) struct Copy {
    pub key: Key,
    pub source: Arc<Memory>,
    pub at: usize,
    pub to: usize,
    pub len: usize,
    pub notify: Option<Notify>,
}

impl Copy {
    fn run(&self, target: &Memory) -> Result<()> {
        self.source.copy_to(self.at, target, self.to, self.len)
    }
}

/// A region of the peer.
struct Mapped {
    region: u32,
    token: Token,
    memory: Arc<Memory>,
}

pub(super) struct Connection {
    pub socket: OwnedFd,
    pub phase: Phase,
    /// Where we connected to; none if the peer connected to us.
    pub target: Option<Address>,
    link: LinkMemory,
    side: usize,
    sender: Sender,
    receiver: Receiver,
    hello: Vec<u8>,
    /// The parts so far of the payload that is being received.
    partial: Vec<u8>,
    scratch: Box<[u8]>,
    queue: VecDeque<Post>,
    /// What the queue counts, and the writes in it.
    queued: usize,
    writes: usize,
    mapped: Vec<Mapped>,
    /// Index of the mapped region used last: mostly the one used next.
    recent: usize,
    /// Keys whose files we have asked for.
    asked: Vec<(u32, Token)>,
    /// Regions of ours whose files the peer was granted, and those of them that
    /// its socket had no room for.
    granted: HashSet<u32>,
    grants: VecDeque<u32>,
    /// Why the connection ends, once the entries that are there are consumed.
    pub ended: Option<Error>,
}

impl Connection {
    /// A connection over a link. `target` if it is we who connect.
    pub fn new(socket: OwnedFd, link: LinkMemory, target: Option<Address>, until: Instant) -> Self {
        let side = usize::from(target.is_none());
        Self {
            socket,
            phase: Phase::Greeting { until },
            target,
            side,
            sender: Sender::new(link.clone(), side),
            receiver: Receiver::new(link.clone(), 1 - side),
            link,
            hello: Vec::new(),
            partial: Vec::new(),
            scratch: vec![0; PART].into(),
            queue: VecDeque::new(),
            queued: 0,
            writes: 0,
            mapped: Vec::new(),
            recent: 0,
            asked: Vec::new(),
            granted: HashSet::new(),
            grants: VecDeque::new(),
            ended: None,
        }
    }

    /// May the owner of the transport know of it? Not of a stranger that has
    /// not greeted.
    pub fn is_known(&self) -> bool {
        self.target.is_some() || self.phase == Phase::Open
    }

    /// Writes whose source is still needed.
    pub fn pending(&self) -> usize {
        self.writes
    }

    // ---- out ----

    /// Is there room for `cost` bytes more in the queue?
    fn reserve(&mut self, peer: PeerId, cost: usize) -> Result<()> {
        if self.queued > 0 && self.queued + cost > QUEUE_LIMIT {
            return Err(Error::Full { peer, queued: self.queued });
        }
        Ok(())
    }

    fn enqueue(&mut self, post: Post) {
        self.queued += post.cost();
        self.writes += usize::from(matches!(post, Post::Copy(_)));
        self.queue.push_back(post);
    }

    /// What our own rings refuse is the peer's doing: it shows as `Closed`.
    fn fail(&mut self, error: Error) {
        self.queue.clear();
        (self.queued, self.writes) = (0, 0);
        self.ended.get_or_insert(error);
    }

    /// Says hello.
    pub fn greet(&mut self, hello: &[u8]) {
        self.enqueue(Post::Payload { hello: true, bytes: hello.to_vec(), done: 0 });
        self.flush();
    }

    pub fn send(&mut self, peer: PeerId, payload: &[u8]) -> Result<()> {
        if !self.queue.is_empty() {
            self.flush();
        }
        if self.ended.is_some() {
            return Ok(());
        }
        let mut done = 0;
        if self.queue.is_empty() {
            match self.sender.push_payload(false, payload, 0) {
                Ok(None) => {
                    self.ring(bell::FOR_ENTRIES);
                    return Ok(());
                }
                Ok(Some(published)) => done = published,
                Err(e) => {
                    self.fail(e);
                    return Ok(());
                }
            }
        } else {
            self.reserve(peer, payload.len() + ENTRY_COST)?;
        }
        self.enqueue(Post::Payload { hello: false, bytes: payload[done..].to_vec(), done: 0 });
        if done > 0 {
            self.ring(bell::FOR_ENTRIES);
        }
        Ok(())
    }

    /// Posts a write.
    pub fn write(&mut self, peer: PeerId, copy: Copy) -> Result<()> {
        if !self.queue.is_empty() {
            self.flush();
        }
        if self.ended.is_some() {
            return Ok(());
        }
        if !self.queue.is_empty() {
            self.reserve(peer, ENTRY_COST)?;
        }
        // Not past a write that waits for its region.
        let mapped = if self.writes == 0 { self.find(&copy.key) } else { None };
        let Some(mapped) = mapped else {
            self.enqueue(Post::Copy(copy));
            self.flush();
            return Ok(());
        };
        copy.run(&self.mapped[mapped].memory)?;
        let Some(notify) = copy.notify else { return Ok(()) };
        if self.queue.is_empty() {
            match self.sender.push(&Entry::Notify(notify)) {
                Ok(true) => {
                    self.ring(bell::FOR_ENTRIES);
                    return Ok(());
                }
                Ok(false) => {}
                Err(e) => {
                    self.fail(e);
                    return Ok(());
                }
            }
        }
        self.enqueue(Post::Entry(Entry::Notify(notify)));
        Ok(())
    }

    /// Tells the peer that a region is gone, if it has it.
    pub fn revoke(&mut self, region: RegionId) {
        if self.granted.remove(&region.0) {
            self.enqueue(Post::Entry(Entry::Revoke(region.0)));
            self.flush();
        }
    }

    fn find(&mut self, key: &Key) -> Option<usize> {
        let is = |m: &Mapped| m.region == key.region && m.token == key.token;
        if !self.mapped.get(self.recent).is_some_and(is) {
            self.recent = self.mapped.iter().position(is)?;
        }
        Some(self.recent)
    }

    /// Publishes what is queued, as far as there is room.
    pub fn flush(&mut self) {
        match self.try_flush() {
            Ok(true) => self.ring(bell::FOR_ENTRIES),
            Ok(false) => {}
            Err(e) => self.fail(e),
        }
    }

    /// True: something was published.
    fn try_flush(&mut self) -> Result<bool> {
        let mut published = false;
        while let Some(mut front) = self.queue.pop_front() {
            let cost = front.cost();
            let rest = match &mut front {
                Post::Payload { hello, bytes, done } => match self.sender.push_payload(*hello, bytes, *done)? {
                    None => None,
                    Some(now) => {
                        published |= now > *done;
                        *done = now;
                        Some(front)
                    }
                },
                Post::Entry(entry) => (!self.sender.push(entry)?).then_some(front),
                Post::Copy(copy) => match self.find(&copy.key) {
                    Some(mapped) => {
                        copy.run(&self.mapped[mapped].memory)?;
                        self.writes -= 1;
                        match copy.notify {
                            Some(notify) if !self.sender.push(&Entry::Notify(notify))? => {
                                Some(Post::Entry(Entry::Notify(notify)))
                            }
                            _ => None,
                        }
                    }
                    None => {
                        published |= self.ask(copy.key)?;
                        Some(front)
                    }
                },
            };
            if let Some(rest) = rest {
                self.queue.push_front(rest);
                break;
            }
            self.queued -= cost;
            published = true;
        }
        Ok(published)
    }

    /// Asks for the file of a region, once. True: an entry was published.
    fn ask(&mut self, key: Key) -> Result<bool> {
        if self.asked.contains(&(key.region, key.token)) {
            return Ok(false);
        }
        let mut bytes = [0; crate::key::LEN];
        bytes.copy_from_slice(&key.encode(Maker::Shm).0);
        if !self.sender.push(&Entry::Ask(bytes))? {
            return Ok(false);
        }
        self.asked.push((key.region, key.token));
        Ok(true)
    }

    /// Wakes the peer, if it sleeps for this.
    fn ring(&self, least: u64) {
        if bell::must_ring(&self.link.bell(1 - self.side), least) {
            // A full socket holds bells that will wake it; a broken one shows
            // when we receive from it.
            let _ = socket::send(&self.socket, &Packet::Bell, None);
        }
    }

    // ---- sleep ----

    /// Our bell, and what we would sleep for.
    pub fn bell(&self) -> (&std::sync::atomic::AtomicU64, u64) {
        let stuck = !self.queue.is_empty();
        (self.link.bell(self.side), if stuck { bell::FOR_ENTRIES_OR_SPACE } else { bell::FOR_ENTRIES })
    }

    /// Is there something to do without any packet coming in?
    pub fn is_ready(&self) -> bool {
        // What is queued had no room, or waits for a region's file, which comes
        // by the socket.
        self.ended.is_some() || self.receiver.is_ready() || (!self.queue.is_empty() && self.sender.is_freed())
    }

    pub fn is_greeting(&self) -> bool {
        self.phase != Phase::Open
    }

    // ---- in ----

    /// Does the socket need a look in every poll?
    pub fn expects_packets(&self) -> bool {
        !self.asked.is_empty() || !self.grants.is_empty()
    }

    /// Takes in what the socket brought, and hands out files.
    pub fn exchange(&mut self, regions: &Regions) -> Result<()> {
        while let Some(&region) = self.grants.front() {
            // Deregistered meanwhile: the peer is told so by the ring.
            if let Ok(memory) = regions.still(region) {
                let packet = Packet::Region { region, size: memory.len() as u64 };
                match socket::send(&self.socket, &packet, Some(memory.file())) {
                    Ok(()) => {}
                    Err(rustix::io::Errno::AGAIN) => break,
                    Err(_) => return Ok(()),
                }
            }
            self.grants.pop_front();
        }
        for _ in 0..GRANTS {
            match socket::receive(&self.socket)? {
                Received::Nothing => break,
                Received::End => {
                    let end = self.end();
                    self.ended.get_or_insert(end);
                    break;
                }
                Received::Packet(Packet::Bell, None) => {}
                Received::Packet(Packet::Region { region, size }, Some(file)) => {
                    // Not asked for, or no longer: dropped.
                    if let Some(at) = self.asked.iter().position(|(asked, _)| *asked == region) {
                        let size = usize::try_from(size).map_err(|_| Error::Protocol("a region's size".into()))?;
                        let memory = Memory::from_peer(file, size)?;
                        let (_, token) = self.asked.swap_remove(at);
                        self.mapped.push(Mapped { region, token, memory });
                    }
                }
                Received::Packet(..) => return Err(Error::Protocol("an unexpected packet".into())),
            }
        }
        Ok(())
    }

    fn end(&self) -> Error {
        match (&self.target, self.phase) {
            (Some(address), Phase::Greeting { .. }) => {
                Error::Unreachable(address.clone(), "the connection was closed during the handshake".into())
            }
            _ => Error::PeerGone,
        }
    }

    /// Consumes entries. Events go to `sink`; the error is why the connection
    /// has to be closed.
    pub fn receive(&mut self, peer: PeerId, regions: &Regions, sink: &mut dyn FnMut(Event<'_>)) -> Result<()> {
        // First: what was published before the peer's end is seen below.
        let ended = self.ended.is_some();
        for _ in 0..BATCH {
            let Some((entry, words)) = self.receiver.next()? else {
                self.tell(true);
                return match &self.ended {
                    Some(reason) if ended => Err(reason.clone()),
                    _ => Ok(()),
                };
            };
            self.take(peer, entry, &words, regions, sink)?;
            self.tell(false);
        }
        self.tell(true);
        Ok(())
    }

    /// Tells the peer what was consumed; wakes it if it waits for that.
    fn tell(&mut self, now: bool) {
        if self.receiver.tell(now) {
            self.ring(bell::FOR_ENTRIES_OR_SPACE);
        }
    }

    fn take(
        &mut self,
        peer: PeerId,
        entry: Entry,
        words: &[u8; INLINE],
        regions: &Regions,
        sink: &mut dyn FnMut(Event<'_>),
    ) -> Result<()> {
        let greeting = self.phase != Phase::Open;
        match entry {
            Entry::Hello(part) if greeting && self.target.is_none() => {
                if self.collect(part, words)? {
                    self.hello = std::mem::take(&mut self.partial);
                    self.phase = Phase::Open;
                    sink(Event::Accepted { peer, hello: &self.hello });
                    self.enqueue(Post::Entry(Entry::Welcome));
                    self.flush();
                }
            }
            Entry::Welcome if greeting && self.target.is_some() => {
                self.phase = Phase::Open;
                sink(Event::Connected { peer });
            }
            Entry::Message(part) if !greeting => match part {
                // The usual case: nothing to put together.
                Part { last: true, len, at } if self.partial.is_empty() => {
                    let payload = match at {
                        None => &words[..len],
                        Some(at) => {
                            self.receiver.take(at, &mut self.scratch[..len])?;
                            &self.scratch[..len]
                        }
                    };
                    sink(Event::Message { peer, payload });
                }
                part => {
                    if self.collect(part, words)? {
                        sink(Event::Message { peer, payload: &self.partial });
                        self.partial.clear();
                    }
                }
            },
            Entry::Notify(notify) if !greeting => sink(Event::Notified { peer, notify }),
            Entry::Ask(bytes) if !greeting => {
                let refused = |_| Error::Protocol("a malformed key".into());
                let key = Key::decode(&bytes, Maker::Shm).map_err(refused)?;
                regions.exported(key.region, &key.token)?;
                if self.grants.len() >= GRANTS {
                    return Err(Error::Protocol("too many regions asked for at once".into()));
                }
                self.granted.insert(key.region);
                self.grants.push_back(key.region);
                self.exchange(regions)?;
            }
            Entry::Revoke(region) if !greeting => {
                // A file that is still under way is not taken; the next write
                // asks again and is refused.
                self.asked.retain(|(asked, _)| *asked != region);
                self.mapped.retain(|m| m.region != region);
                self.recent = 0;
            }
            _ => return Err(Error::Protocol("a ring entry out of its turn".into())),
        }
        Ok(())
    }

    /// Adds a part to the payload under way. True: it is complete.
    fn collect(&mut self, part: Part, words: &[u8; INLINE]) -> Result<bool> {
        if self.partial.len() + part.len > MAX_SEND {
            return Err(Error::Protocol("a message over the limit".into()));
        }
        match part.at {
            None => self.partial.extend(&words[..part.len]),
            Some(at) => {
                self.receiver.take(at, &mut self.scratch[..part.len])?;
                self.partial.extend(&self.scratch[..part.len]);
            }
        }
        Ok(part.last)
    }
}

impl Post {
    fn cost(&self) -> usize {
        match self {
            Post::Payload { bytes, .. } => bytes.len() + ENTRY_COST,
            Post::Entry(_) | Post::Copy(_) => ENTRY_COST,
        }
    }
}
