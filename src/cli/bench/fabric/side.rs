//! One side of a measurement: a transport, its memory, and who is linked to it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use distkv_fabric::{Access, Address, Error, Event, Memory, Notify, PeerId, RegionId, RemoteKey, Transport, Write};
use hdrhistogram::Histogram;

use crate::cli::options::RdmaOptions;

use super::patience::Patience;
use super::subject::{Subject, Verb};
use super::{Lap, REGION, SLOTS, slots};

/// A message that begins with this carries nothing but bytes; any other is an
/// order or an answer.
const DATA: u8 = 0;
/// What a side's key is said with.
const KEY: u8 = b'k';

/// Another side as this one sees it.
pub(super) struct Link {
    peer: PeerId,
    /// Its landing region.
    remote: RemoteKey,
    heard: VecDeque<Vec<u8>>,
    /// Writes and messages of bytes that have come, and those of them that were
    /// waited for.
    pub arrived: u64,
    awaited: u64,
}

pub(super) struct Side {
    transport: Box<dyn Transport>,
    pub links: Vec<Link>,
    /// Source of our writes.
    local: RegionId,
    /// Where others write.
    landing: RegionId,
    /// Source of our messages.
    payload: Vec<u8>,
    closed: Option<Error>,
    _memory: [Arc<Memory>; 2],
}

/// Bytes that are not all alike.
fn fill(bytes: &mut [u8]) {
    let mut state = 1u32;
    for byte in bytes {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        *byte = (state >> 24) as u8;
    }
}

impl Side {
    pub fn new(subject: Subject, rdma: &RdmaOptions, first: bool) -> Result<Self> {
        let mut transport = subject.bind(rdma, first)?;
        let (source, target) = (Memory::new(REGION)?, Memory::new(REGION)?);
        // Touched now, so that no page fault is measured.
        let mut bytes = vec![0; 1 << 20];
        fill(&mut bytes);
        for memory in [&source, &target] {
            (0..REGION).step_by(bytes.len()).try_for_each(|at| memory.write(at, &bytes))?;
        }
        let local = transport.register(&source, Access::LocalOnly)?;
        let landing = transport.register(&target, Access::RemoteWrite)?;
        Ok(Self {
            transport,
            links: Vec::new(),
            local,
            landing,
            payload: Vec::new(),
            closed: None,
            _memory: [source, target],
        })
    }

    pub fn address(&self) -> Address {
        self.transport.address()
    }

    /// Takes in what has come. Returns how many events.
    pub fn poll(&mut self) -> Result<usize> {
        let Self { transport, links, closed, .. } = self;
        let seen = transport.poll(&mut |event| match event {
            Event::Notified { peer, .. } => {
                if let Some(link) = links.iter_mut().find(|link| link.peer == peer) {
                    link.arrived += 1;
                }
            }
            Event::Message { peer, payload } => {
                if let Some(link) = links.iter_mut().find(|link| link.peer == peer) {
                    match payload.first() {
                        Some(&DATA) => link.arrived += 1,
                        _ => link.heard.push_back(payload.to_vec()),
                    }
                }
            }
            Event::Accepted { peer, .. } => links.push(Link::new(peer)),
            Event::Connected { .. } => {}
            Event::Closed { reason, .. } => *closed = Some(reason),
        })?;
        match self.closed.take() {
            Some(reason) => Err(reason).context("another side is gone"),
            None => Ok(seen),
        }
    }

    /// The first side's beginning: waits for `peers` others.
    pub fn meet(&mut self, peers: usize) -> Result<()> {
        let start = Instant::now();
        while self.links.len() < peers {
            ensure!(
                start.elapsed() < Duration::from_secs(20),
                "{} of {peers} other sides did not connect",
                peers - self.links.len()
            );
            self.transport.wait(Duration::from_millis(50))?;
            self.poll()?;
        }
        (0..peers).try_for_each(|link| self.exchange_keys(link))
    }

    /// A second side's beginning.
    pub fn join(&mut self, address: &Address) -> Result<()> {
        let peer = self.transport.connect(address, b"bench")?;
        self.links.push(Link::new(peer));
        self.exchange_keys(0)
    }

    fn exchange_keys(&mut self, link: usize) -> Result<()> {
        let mut said = vec![KEY];
        said.extend(self.transport.remote_key(self.landing)?.0);
        self.transport.send(self.links[link].peer, &said)?;
        let heard = self.hear_bytes(link)?;
        let key = heard.strip_prefix(&[KEY]).context("something else than a key")?;
        self.links[link].remote = RemoteKey(key.to_vec());
        Ok(())
    }

    pub fn tell(&mut self, link: usize, order: &str) -> Result<()> {
        let peer = self.links[link].peer;
        while !posted(self.transport.send(peer, order.as_bytes()))? {
            self.poll()?;
        }
        Ok(())
    }

    /// The next order or answer of a link.
    pub fn hear(&mut self, link: usize) -> Result<String> {
        String::from_utf8(self.hear_bytes(link)?).context("an order that is no text")
    }

    fn hear_bytes(&mut self, link: usize) -> Result<Vec<u8>> {
        loop {
            if let Some(payload) = self.links[link].heard.pop_front() {
                return Ok(payload);
            }
            self.transport.wait(Duration::from_secs(1))?;
            self.poll()?;
        }
    }

    /// Polls until `done` says so.
    pub fn spin(&mut self, mut done: impl FnMut(&mut Self) -> bool) -> Result<()> {
        let mut patience = Patience::new();
        while !done(self) {
            self.poll()?;
            patience.after_poll(|nap| Ok(self.transport.wait(nap)?))?;
        }
        Ok(())
    }

    /// Spins until one more has come.
    fn await_arrival(&mut self, link: usize) -> Result<()> {
        self.links[link].awaited += 1;
        self.spin(|side| side.links[link].arrived >= side.links[link].awaited)
    }

    /// Forgets what has come and was not waited for.
    pub fn settle(&mut self, link: usize) {
        self.links[link].awaited = self.links[link].arrived;
    }

    /// Makes ready to send messages of `size` bytes.
    pub fn prepare(&mut self, verb: Verb, size: usize) {
        if verb == Verb::Send {
            self.payload.resize(size * SLOTS, 0);
            fill(&mut self.payload);
            self.payload.iter_mut().step_by(size).for_each(|first| *first = DATA);
        }
    }

    /// Posts the `i`th of `size` bytes, of places that follow one another.
    /// False: there is no room for it now.
    pub fn try_post(&mut self, link: usize, verb: Verb, i: usize, places: usize, size: usize) -> Result<bool> {
        let Link { peer, remote, .. } = &self.links[link];
        match verb {
            Verb::Write => {
                let at = (i % places * size) as u64;
                let write = Write {
                    local: self.local,
                    local_offset: at,
                    len: size as u64,
                    remote,
                    remote_offset: at,
                    notify: Some(Notify(size as u32)),
                };
                posted(self.transport.write(*peer, write))
            }
            Verb::Send => {
                let at = i % SLOTS * size;
                posted(self.transport.send(*peer, &self.payload[at..at + size]))
            }
        }
    }

    pub fn post(&mut self, link: usize, verb: Verb, i: usize, places: usize, size: usize) -> Result<()> {
        while !self.try_post(link, verb, i, places, size)? {
            self.poll()?;
        }
        Ok(())
    }

    /// Round trips with one link. Where one ends the next begins; its time is noted
    /// while the next is under way, so that it costs none itself.
    pub fn ping(&mut self, link: usize, verb: Verb, size: usize, rounds: u32, into: &mut Histogram<u64>) -> Result<()> {
        self.tell(link, &format!("ping {} {size} {rounds}", verb.name()))?;
        let mut lap = Lap::new();
        for i in 0..rounds as usize {
            self.post(link, verb, i, slots(size), size)?;
            lap.note(into);
            self.await_arrival(link)?;
            lap.end();
        }
        lap.note(into);
        Ok(())
    }

    /// The other side of [`ping`](Self::ping).
    pub fn pong(&mut self, verb: Verb, size: usize, rounds: u32) -> Result<()> {
        self.prepare(verb, size);
        for i in 0..rounds as usize {
            self.await_arrival(0)?;
            self.post(0, verb, i, slots(size), size)?;
        }
        Ok(())
    }

    /// The other side of a stream: tells of every `acknowledge` that have come,
    /// and at its end how many they were.
    pub fn drain(&mut self, acknowledge: u64) -> Result<()> {
        // The first may have come with the order.
        let (before, mut told) = (self.links[0].awaited, 0);
        loop {
            self.spin(|Side { links, .. }| {
                links[0].arrived - before >= told + acknowledge || !links[0].heard.is_empty()
            })?;
            while self.links[0].arrived - before >= told + acknowledge {
                self.post(0, Verb::Write, 0, 1, 8)?;
                told += acknowledge;
            }
            if !self.links[0].heard.is_empty() {
                let order = self.hear(0)?;
                ensure!(order == "end", "an order in the midst of a stream: {order}");
                self.settle(0);
                // What was posted before this order has come before it.
                return self.tell(0, &(self.links[0].arrived - before).to_string());
            }
        }
    }
}

impl Link {
    fn new(peer: PeerId) -> Self {
        Self { peer, remote: RemoteKey(Vec::new()), heard: VecDeque::new(), arrived: 0, awaited: 0 }
    }
}

/// Was it posted, or was there no room?
fn posted(result: distkv_fabric::Result<()>) -> Result<bool> {
    match result {
        Ok(()) => Ok(true),
        Err(Error::Full { .. }) => Ok(false),
        Err(e) => Err(e.into()),
    }
}
