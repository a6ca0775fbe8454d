//! Strangers at a sealed transport: without the key, with what they recorded,
//! in the middle of the wire.

use std::io::{Read, Write as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use distkv_fabric::secure::{Kind, Purpose, Refused, Secret, Security, Session};
use distkv_fabric::tcp::{TcpConfig, TcpTransport};
use distkv_fabric::{Access, Error, Memory, PeerId, Stats, Transport, frame};

use crate::host::{Host, Member, hung_up};
use crate::node::{Node, Seen};
use crate::wire::Wire;

fn secret() -> Secret {
    Secret::new([1; 32])
}

fn sealed() -> TcpConfig {
    TcpConfig::new(Security::Sealed(secret()))
}

/// A transport that connects, with what it sees.
fn node(security: Security) -> Node {
    let transport = TcpTransport::bind(([127, 0, 0, 1], 0).into(), TcpConfig::new(security)).unwrap();
    Node { transport: Box::new(transport), seen: Vec::new() }
}

/// Polls both, asleep in between, until it is done.
fn until(host: &mut Host, node: &mut Node, mut done: impl FnMut(&Host, &Node) -> bool) {
    while !done(host, node) {
        host.poll();
        node.poll();
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// What a node's connection ended with.
fn ended(node: &Node) -> Option<Error> {
    node.closed().first().map(|(_, reason)| reason.clone())
}

/// A node and the host, joined over the wire.
fn joined(host: &mut Host, wire: &mut Wire) -> (Node, PeerId) {
    let mut node = node(Security::Sealed(secret()));
    let peer = node.transport.connect(&wire.address(), b"hello").unwrap();
    until(host, &mut node, |host, node| {
        wire.hand_on();
        host.accepted == 1 && node.seen.contains(&Seen::Connected(peer))
    });
    (node, peer)
}

#[test]
fn a_foreign_protocol_is_turned_away_unanswered() {
    let mut host = Host::new(sealed());
    let words: [&[u8]; 4] =
        [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01\x02\0\x01", &[0; 4096], b"\xd1kvfab\n\n"];
    for (i, words) in words.into_iter().enumerate() {
        let mut stream = host.knock();
        stream.write_all(words).unwrap();
        host.until(|_, stats| stats.foreign == i as u64 + 1);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        assert_eq!(answer, b"");
    }
    for _ in 0..20 {
        drop(host.knock());
    }
    host.until(|_, stats| stats.half_open_dropped == 24);
    assert_eq!(host.transport.stats().protocol_errors, 4, "a port scanner breaks no protocol");
    assert_eq!((host.accepted, host.closed.len()), (0, 0), "the owner hears nothing of strangers");
    host.is_well();
}

#[test]
fn a_node_without_the_key_is_turned_away_unanswered() {
    let mut host = Host::new(sealed());
    let mut stranger = node(Security::Sealed(Secret::new([2; 32])));
    let mut wire = Wire::to(&host.transport.address());
    let peer = stranger.transport.connect(&wire.address(), b"let me in").unwrap();
    until(&mut host, &mut stranger, |_, node| {
        wire.hand_on();
        ended(node).is_some()
    });
    assert_eq!(wire.heard[1], b"", "whoever has no key is told nothing");
    let told = stranger.closed();
    assert!(
        matches!(&told[..], [(p, Error::Unreachable(_, why))] if *p == peer && why.contains("another cluster key"))
    );
    let expected = Stats { accepted: 1, protocol_errors: 1, wrong_key: 1, half_open_dropped: 1, ..Stats::default() };
    assert_eq!((host.transport.stats(), host.accepted), (expected, 0));
    host.is_well();
}

#[test]
fn sealed_and_insecure_do_not_mix_and_say_so() {
    let mut host = Host::new(TcpConfig::new(Security::Insecure));
    let mut sealed_node = node(Security::Sealed(secret()));
    sealed_node.transport.connect(&host.transport.address(), b"").unwrap();
    until(&mut host, &mut sealed_node, |_, node| ended(node).is_some());
    assert_eq!(ended(&sealed_node), Some(Error::Refused(Refused::Insecure)));
    host.until(|_, stats| stats.mismatched == 1);

    let mut host = Host::new(sealed());
    let mut plain_node = node(Security::Insecure);
    plain_node.transport.connect(&host.transport.address(), b"").unwrap();
    until(&mut host, &mut plain_node, |_, node| ended(node).is_some());
    let Some(Error::Unreachable(_, why)) = ended(&plain_node) else { panic!("{:?}", plain_node.seen) };
    assert!(why.contains("is its fabric sealed"), "{why}");
    assert_eq!((host.transport.stats().mismatched, host.accepted), (1, 0));
    host.is_well();
}

#[test]
fn what_was_recorded_is_worth_nothing_again() {
    let mut host = Host::new(sealed());
    let mut wire = Wire::to(&host.transport.address());
    let (mut node, peer) = joined(&mut host, &mut wire);
    node.transport.send(peer, b"once").unwrap();
    until(&mut host, &mut node, |host, _| {
        wire.hand_on();
        host.messages == 1
    });
    let recorded = wire.heard[0].clone();
    for i in 0..3 {
        let mut again = host.knock();
        again.write_all(&recorded).unwrap();
        host.until(|_, stats| stats.tampered == i + 1);
        let mut answer = Vec::new();
        let _ = again.read_to_end(&mut answer);
        assert!(answer.is_empty() || answer.len() == 60, "one handshake message at most");
    }
    assert_eq!((host.accepted, host.messages, host.closed.len()), (1, 1, 0));
    assert_eq!(host.transport.stats().protocol_errors, 3);
    // The true one goes on.
    node.transport.send(peer, b"twice").unwrap();
    until(&mut host, &mut node, |host, _| {
        wire.hand_on();
        host.messages == 2
    });
    host.is_well();
}

/// A bit turned anywhere in a record, on either way, ends the connection before
/// anything of the record counts.
#[test]
fn a_tampered_record_closes_the_connection() {
    const MESSAGE: usize = 4 + 16 + 5 + 16;
    for at in [0, 3, 4, 19, 20, 25, MESSAGE - 1] {
        for side in 0..2 {
            let mut host = Host::new(sealed());
            let mut wire = Wire::to(&host.transport.address());
            let (mut node, peer) = joined(&mut host, &mut wire);
            wire.turn = Some((side, wire.heard[side].len() + at));
            // A record that seems longer for the turned bit is completed.
            for _ in 0..3 {
                match side {
                    0 => node.transport.send(peer, b"bytes").unwrap(),
                    _ => host.answer(b"bytes"),
                }
            }
            until(&mut host, &mut node, |host, node| {
                wire.hand_on();
                host.closed.len() == 1 && node.closed().len() == 1
            });
            for _ in 0..100 {
                host.poll();
                node.poll();
            }
            assert_eq!((host.messages, node.messages_len()), (0, 0), "byte {at} of {side}");
            let mut reasons = [host.closed[0].clone(), node.closed()[0].1.clone()];
            reasons.rotate_left(side);
            assert_eq!(reasons, [Error::Refused(Refused::Tampered), Error::PeerGone]);
            assert_eq!(host.transport.stats().tampered, 1 - side as u64);
            assert_eq!((host.closed.len(), node.closed().len()), (1, 1));
        }
    }
}

#[test]
fn a_tampered_write_does_not_land() {
    let mut host = Host::new(sealed());
    let landing = Memory::new(1 << 20).unwrap();
    let region = host.transport.register(&landing, Access::RemoteWrite).unwrap();
    let key = host.transport.remote_key(region).unwrap();
    let mut wire = Wire::to(&host.transport.address());
    let (mut node, peer) = joined(&mut host, &mut wire);
    let source = Memory::new(1 << 20).unwrap();
    source.write(0, &[7; 1 << 20]).unwrap();
    let local = node.transport.register(&source, Access::LocalOnly).unwrap();
    // In the middle of the fourth of the records it is cut into.
    wire.turn = Some((0, wire.heard[0].len() + (224 << 10)));
    let write =
        distkv_fabric::Write { local, local_offset: 0, len: 1 << 20, remote: &key, remote_offset: 0, notify: None };
    node.transport.write(peer, write).unwrap();
    until(&mut host, &mut node, |host, _| {
        wire.hand_on();
        host.closed.len() == 1
    });
    assert_eq!(host.closed, [Error::Refused(Refused::Tampered)]);
    let mut landed = vec![0; 1 << 20];
    landing.read(0, &mut landed).unwrap();
    let whole = landed.iter().position(|byte| *byte == 0).unwrap();
    assert!((190 << 10..224 << 10).contains(&whole), "what came before has landed: {whole}");
    assert!(landed[whole..].iter().all(|byte| *byte == 0), "nothing of a record that does not open");
}

#[test]
fn a_sealed_connection_may_come_byte_by_byte() {
    let mut host = Host::new(sealed());
    let mut wire = Wire::to(&host.transport.address());
    wire.piece = 1;
    let (mut node, peer) = joined(&mut host, &mut wire);
    for i in 0..3 {
        node.transport.send(peer, &vec![i; 10 * usize::from(i)]).unwrap();
    }
    until(&mut host, &mut node, |host, _| {
        (0..50).for_each(|_| wire.hand_on());
        host.messages == 3
    });
}

#[test]
fn half_open_handshakes_are_bounded_in_number_and_time() {
    let config = TcpConfig { max_half_open: 4, handshake_timeout: Duration::from_secs(1), ..sealed() };
    let mut host = Host::new(config);
    // Each as far as a recorded first message gets it: it has its answer.
    let first = Session::connect(&secret(), Purpose::Tcp).unwrap();
    let crowd: Vec<_> = (0..20)
        .map(|_| {
            let mut stream = host.knock();
            stream.write_all(first.output()).unwrap();
            stream
        })
        .collect();
    host.until(|_, stats| stats.half_open_dropped >= 16);
    host.is_well();
    assert_eq!(host.accepted, 1, "none of them is a peer");
    host.until(|_, stats| stats.half_open_dropped == 20);
    assert!(host.transport.stats().timeouts > 0);
    crowd.into_iter().for_each(hung_up);
}

/// A member of the cluster that does not keep to the protocol.
#[test]
fn a_member_that_breaks_the_protocol_loses_its_connection() {
    let mut host = Host::new(sealed());
    let header = frame::message_header(2);
    let cases: [(Kind, &[u8], &str); 4] = [
        (Kind::Ready, b"", "a greeting among the data"),
        (Kind::Greeting, b"again", "a greeting among the data"),
        (Kind::Data, &header[..15], "a header cut by its record"),
        (Kind::Data, &[9; 40], "unknown kind of frame"),
    ];
    for (i, (kind, content, why)) in cases.into_iter().enumerate() {
        let mut member = Member::join(&mut host);
        member.says(kind, content);
        host.until(|host, _| host.closed.len() == i + 1);
        assert!(host.closed[i].to_string().contains(why), "{}", host.closed[i]);
        assert_eq!(host.transport.stats().protocol_errors, i as u64 + 1);
        hung_up(member.stream);
    }
    host.is_well();
}

/// Counts what is logged.
struct Counter(Arc<AtomicUsize>);

impl tracing::Subscriber for Counter {
    fn enabled(&self, _: &tracing::Metadata<'_>) -> bool {
        true
    }
    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }
    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
    fn event(&self, _: &tracing::Event<'_>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
    fn enter(&self, _: &tracing::span::Id) {}
    fn exit(&self, _: &tracing::span::Id) {}
}

#[test]
fn strangers_are_counted_each_and_logged_once() {
    let lines = Arc::new(AtomicUsize::new(0));
    tracing::subscriber::with_default(Counter(Arc::clone(&lines)), || {
        let mut host = Host::new(sealed());
        let other = Session::connect(&Secret::new([2; 32]), Purpose::Tcp).unwrap();
        for i in 0..10 {
            let mut stream = host.knock();
            stream.write_all(other.output()).unwrap();
            host.until(|_, stats| stats.wrong_key == i + 1);
            hung_up(stream);
        }
        assert_eq!(lines.load(Ordering::Relaxed), 1);
    });
}
