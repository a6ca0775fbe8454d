//! Tests with peers that follow no rule: what they write into shared memory or
//! send over the socket must cost them their connection, and us nothing.

use std::sync::atomic::Ordering::Release;

use proptest::prelude::*;
use rustix::net::SendFlags;

use super::*;

/// A transport and what became of its connections.
struct Host {
    transport: ShmTransport,
    accepted: usize,
    messages: usize,
    closed: Vec<Error>,
}

impl Host {
    fn new(config: ShmConfig) -> Self {
        Self { transport: ShmTransport::bind(config).unwrap(), accepted: 0, messages: 0, closed: Vec::new() }
    }

    fn knock(&self) -> OwnedFd {
        socket::connect(&self.transport.path).unwrap()
    }

    fn poll(&mut self) {
        let Self { transport, accepted, messages, closed } = self;
        transport
            .poll(&mut |event| match event {
                Event::Accepted { .. } => *accepted += 1,
                Event::Message { .. } => *messages += 1,
                Event::Closed { reason, .. } => closed.push(reason),
                _ => {}
            })
            .unwrap();
    }

    fn until(&mut self, done: impl Fn(&Self, Stats) -> bool) {
        while !done(self, self.transport.stats()) {
            self.transport.wait(Duration::from_millis(10)).unwrap();
            self.poll();
        }
    }

    /// It still serves a peer.
    fn is_well(&mut self) {
        let (messages, closed) = (self.messages, self.closed.len());
        let mut peer = ShmTransport::bind(ShmConfig::default()).unwrap();
        let host = peer.connect(&self.transport.address(), b"me").unwrap();
        peer.send(host, b"hi").unwrap();
        self.until(|host, _| host.messages == messages + 1);
        drop(peer);
        self.until(|host, _| host.closed.len() == closed + 1);
    }
}

/// A link of the stranger's own making, whose memory it can scribble on.
fn link(host: &Host) -> (OwnedFd, LinkMemory) {
    let socket = host.knock();
    let memory = Memory::new(LINK).unwrap();
    socket::send(&socket, &Packet::Link { size: LINK as u64 }, Some(memory.file())).unwrap();
    (socket, LinkMemory::new(memory).unwrap())
}

/// Publishes an entry with any content.
fn publish(link: &LinkMemory, index: u32, control: u32, words: &[u64]) {
    for (i, word) in words.iter().enumerate() {
        link.entry(0, index, i + 1).store(*word, Release);
    }
    link.entry(0, index, 0).store(u64::from(control) << 32 | u64::from(index + 1), Release);
}

#[test]
fn strangers_at_the_socket_are_turned_away() {
    let mut host = Host::new(ShmConfig::default());
    let small = Memory::new(4096).unwrap();
    let pipe = rustix::pipe::pipe().unwrap().0;
    let good = socket::encode(&Packet::Link { size: LINK as u64 });
    let mut foreign = good;
    foreign[0] ^= 1;
    // Garbage, too long, a foreign version, no file, a bell before any link.
    for (i, words) in [&b"hello"[..], &[7; 60], &foreign, &good, &socket::encode(&Packet::Bell)].into_iter().enumerate()
    {
        let socket = host.knock();
        rustix::net::send(&socket, words, SendFlags::empty()).unwrap();
        host.until(|_, stats| stats.protocol_errors == i as u64 + 1);
    }
    // A file that is too short for what it says, too short for a link, or no
    // memory at all.
    for (i, (size, file)) in [(LINK, small.file()), (4096, small.file()), (LINK, pipe.as_fd())].into_iter().enumerate()
    {
        let socket = host.knock();
        socket::send(&socket, &Packet::Link { size: size as u64 }, Some(file)).unwrap();
        host.until(|_, stats| stats.half_open_dropped >= i as u64 + 6);
    }
    for _ in 0..5 {
        drop(host.knock());
    }
    host.until(|_, stats| stats.half_open_dropped >= 13);
    assert_eq!((host.accepted, host.closed.len()), (0, 0), "the owner hears nothing of strangers");
    host.is_well();
}

#[test]
fn memory_that_could_shrink_is_refused() {
    let mut host = Host::new(ShmConfig::default());
    let file = rustix::fs::memfd_create("loose", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&file, LINK as u64).unwrap();
    let socket = host.knock();
    socket::send(&socket, &Packet::Link { size: LINK as u64 }, Some(file.as_fd())).unwrap();
    host.until(|_, stats| stats.protocol_errors == 1);
    host.is_well();
}

#[test]
fn handshakes_have_bounded_time() {
    let mut host = Host::new(ShmConfig { handshake_timeout: Duration::from_millis(20), ..ShmConfig::default() });
    let _silent = host.knock();
    // A link without a hello is a handshake too.
    let _link = link(&host);
    host.until(|_, stats| stats.half_open_dropped >= 2);
    assert_eq!((host.accepted, host.closed.len()), (0, 0));
}

#[test]
fn handshakes_are_bounded_in_number() {
    let mut host = Host::new(ShmConfig { max_half_open: 2, ..ShmConfig::default() });
    let _crowd: Vec<_> = (0..6).map(|_| host.knock()).collect();
    // The newcomer is served all the same.
    host.is_well();
    assert!(host.transport.stats().half_open_dropped >= 5, "the crowd stays within its bound");
}

/// Entry words of a hello, which a stranger has to say first.
fn hello(link: &LinkMemory) {
    let part = entry::Part { last: true, len: 0, at: None };
    publish(link, 0, entry::encode(&entry::Entry::Hello(part), &[]).0, &[]);
}

#[test]
fn a_head_that_runs_ahead_closes_the_connection() {
    let mut host = Host::new(ShmConfig::default());
    let (_socket, link) = link(&host);
    hello(&link);
    host.until(|host, _| host.accepted == 1);
    link.head(1).store(u64::from(ring::ENTRIES) * 3, Release);
    let peer = host.transport.peers.at(0).unwrap().0;
    // It looks at the head once its ring seems full.
    for _ in 0..=ring::ENTRIES {
        host.transport.send(peer, b"x").unwrap();
    }
    host.until(|host, _| host.closed.len() == 1);
    assert!(matches!(host.closed[0], Error::Protocol(_)));
    host.is_well();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn scribbled_entries_do_no_harm(
        entries in prop::collection::vec((0u8..9, 0u8..5, 0u8..60, prop::array::uniform7(any::<u64>()), 0u32..300_000), 1..40),
    ) {
        let mut host = Host::new(ShmConfig::default());
        let (socket, link) = link(&host);
        hello(&link);
        for (i, (kind, flags, len, mut words, small)) in entries.into_iter().enumerate() {
            if flags & 2 != 0 {
                // A place that could almost be.
                words[0] = u64::from(small) | u64::from(small % 70_000) << 32;
            }
            publish(&link, i as u32 + 1, u32::from_le_bytes([kind, flags, len, 0]), &words);
        }
        drop(socket);
        host.until(|host, _| host.closed.len() == 1);
        prop_assert_eq!(host.accepted, 1);
        host.is_well();
    }
}
