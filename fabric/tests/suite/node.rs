//! A transport and what it has seen, driven by a test.

use std::time::{Duration, Instant};

use distkv_fabric::{Access, Error, Event, Memory, Notify, PeerId, RegionId, RemoteKey, Transport, Write};

/// Makes a transport of the kind under test.
pub type Make = fn() -> Box<dyn Transport>;

/// Where the suite runs on a slow machine (an emulator): how many times slower it is
/// taken to be.
const SLOW: &str = "DISTKV_TEST_SLOW";

/// 1, or what [`SLOW`] says.
pub fn slowness() -> u32 {
    std::env::var(SLOW).ok().and_then(|n| n.parse().ok()).unwrap_or(1).max(1)
}

/// How many rounds a test does that would do `most`.
pub fn rounds(most: usize) -> usize {
    (most / slowness() as usize).max(10)
}

/// An event, kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen {
    Connected(PeerId),
    Accepted(PeerId, Vec<u8>),
    Message(PeerId, Vec<u8>),
    Notified(PeerId, u32),
    Closed(PeerId, Error),
}

pub struct Node<T: Transport + ?Sized = dyn Transport> {
    pub transport: Box<T>,
    pub seen: Vec<Seen>,
}

/// How long a test goes on before it is given up as hung.
const PATIENCE: Duration = Duration::from_secs(90);

impl Node {
    pub fn new(make: Make) -> Self {
        Self { transport: make(), seen: Vec::new() }
    }
}

impl<T: Transport + ?Sized> Node<T> {
    pub fn poll(&mut self) {
        let seen = &mut self.seen;
        let before = seen.len();
        let events = self
            .transport
            .poll(&mut |event| {
                seen.push(match event {
                    Event::Connected { peer } => Seen::Connected(peer),
                    Event::Accepted { peer, hello } => Seen::Accepted(peer, hello.to_vec()),
                    Event::Message { peer, payload } => Seen::Message(peer, payload.to_vec()),
                    Event::Notified { peer, notify } => Seen::Notified(peer, notify.0),
                    Event::Closed { peer, reason } => Seen::Closed(peer, reason),
                });
            })
            .unwrap();
        assert_eq!(events, self.seen.len() - before, "poll returns how many events it yielded");
    }

    pub fn messages(&self) -> Vec<Vec<u8>> {
        let payload = |s: &Seen| if let Seen::Message(_, payload) = s { Some(payload.clone()) } else { None };
        self.seen.iter().filter_map(payload).collect()
    }

    pub fn messages_len(&self) -> usize {
        self.seen.iter().filter(|s| matches!(s, Seen::Message(..))).count()
    }

    pub fn notified(&self) -> Vec<u32> {
        self.seen.iter().filter_map(|s| if let Seen::Notified(_, n) = s { Some(*n) } else { None }).collect()
    }

    pub fn closed(&self) -> Vec<(PeerId, Error)> {
        let closed = |s: &Seen| if let Seen::Closed(peer, why) = s { Some((*peer, why.clone())) } else { None };
        self.seen.iter().filter_map(closed).collect()
    }

    pub fn accepted(&self) -> Vec<PeerId> {
        self.seen.iter().filter_map(|s| if let Seen::Accepted(peer, _) = s { Some(*peer) } else { None }).collect()
    }

    /// A region of `len` bytes.
    pub fn region(&mut self, len: usize, access: Access) -> (std::sync::Arc<Memory>, RegionId) {
        let memory = Memory::new(len).unwrap();
        let region = self.transport.register(&memory, access).unwrap();
        (memory, region)
    }

    /// A region that peers may write, with its key.
    pub fn target(&mut self, len: usize) -> (std::sync::Arc<Memory>, RegionId, RemoteKey) {
        let (memory, region) = self.region(len, Access::RemoteWrite);
        let key = self.transport.remote_key(region).unwrap();
        (memory, region, key)
    }
}

/// Polls the nodes in turn until `done`.
pub fn drive<T: Transport + ?Sized, const N: usize>(
    mut nodes: [&mut Node<T>; N],
    mut done: impl FnMut(&mut [&mut Node<T>; N]) -> bool,
) {
    let start = Instant::now();
    while !done(&mut nodes) {
        for node in &mut nodes {
            node.poll();
        }
        if start.elapsed() > PATIENCE {
            let seen: Vec<_> = nodes.iter().map(|n| n.seen.iter().map(brief).collect::<Vec<_>>()).collect();
            panic!("gave up; seen so far: {seen:?}");
        }
    }
}

/// An event without the bulk of its payload.
fn brief(seen: &Seen) -> String {
    match seen {
        Seen::Message(peer, payload) => format!("Message({peer:?}, {} bytes)", payload.len()),
        other => format!("{other:?}"),
    }
}

/// Two connected nodes, and how each names the other.
pub fn pair(make: Make) -> (Node, Node, PeerId, PeerId) {
    let (mut a, mut b) = (Node::new(make), Node::new(make));
    let (to_b, to_a) = join(&mut a, &mut b, b"a");
    (a, b, to_b, to_a)
}

/// Connects `a` to `b`.
pub fn join<T: Transport + ?Sized>(a: &mut Node<T>, b: &mut Node<T>, hello: &[u8]) -> (PeerId, PeerId) {
    let (had, before) = (a.seen.len(), b.accepted().len());
    let to_b = a.transport.connect(&b.transport.address(), hello).unwrap();
    drive([a, b], |[a, b]| b.accepted().len() > before && a.seen[had..].contains(&Seen::Connected(to_b)));
    let to_a = *b.accepted().last().unwrap();
    (to_b, to_a)
}

/// A write of the first `len` bytes of `local` to the front of `remote`.
pub fn write(local: RegionId, len: u64, remote: &RemoteKey, notify: Option<u32>) -> Write<'_> {
    Write { local, local_offset: 0, len, remote, remote_offset: 0, notify: notify.map(Notify) }
}

/// Bytes that differ from place to place.
pub fn pattern(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|i| ((i + seed).wrapping_mul(2_654_435_761) >> 13) as u8).collect()
}

pub fn bytes(memory: &Memory, offset: usize, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    memory.read(offset, &mut bytes).unwrap();
    bytes
}
