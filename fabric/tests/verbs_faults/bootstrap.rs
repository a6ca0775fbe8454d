//! Strangers at the control channel, and handshakes that meet.

use std::io::{Read, Write as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use distkv_fabric::secure::{Refused, Secret};
use distkv_fabric::verbs::Config;
use distkv_fabric::{Error, Stats, Transport};

use crate::node::{Seen, drive};
use crate::rig::living;
use crate::wire::Wire;
use crate::world::{Verbs, config, devices, node, with, works, works_anew};

fn knock(host: &Verbs) -> TcpStream {
    TcpStream::connect(host.transport.address().0.strip_prefix("verbs://").unwrap()).unwrap()
}

/// Polls, asleep in between, until the counts say so.
#[track_caller]
fn until(host: &mut Verbs, done: impl Fn(Stats) -> bool) {
    let start = Instant::now();
    while !done(host.transport.stats()) {
        assert!(start.elapsed() < Duration::from_secs(20), "{:?}", host.transport.stats());
        host.poll();
        host.transport.wait(Duration::from_millis(10)).unwrap();
    }
}

/// It heard nothing of strangers, and serves a peer.
fn is_well(host: &mut Verbs) {
    assert_eq!(host.seen, []);
    works_anew(&mut node(config()), host);
}

#[test]
fn a_foreign_protocol_is_turned_away_unanswered() {
    let _devices = devices();
    let mut host = node(config());
    let living_before = living();
    let words: [&[u8]; 4] =
        [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01\x02\0\x01", &[0; 4096], b"\xd1kvfab\n\n"];
    for (i, words) in words.into_iter().enumerate() {
        let mut stream = knock(&host);
        stream.write_all(words).unwrap();
        until(&mut host, |stats| stats.foreign == i as u64 + 1);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        assert_eq!(answer, b"");
    }
    for _ in 0..20 {
        drop(knock(&host));
    }
    until(&mut host, |stats| stats.half_open_dropped == 24);
    assert_eq!(host.transport.stats().protocol_errors, 4, "a port scanner breaks no protocol");
    assert_eq!(living(), living_before, "nothing of a device is spent on strangers");
    is_well(&mut host);
}

#[test]
fn a_node_without_the_cluster_key_is_turned_away_unanswered() {
    let _devices = devices();
    let mut host = node(config());
    let mut stranger = with(Secret::new([8; 32]), config());
    let mut wire = Wire::to(&host.transport.address());
    let peer = stranger.transport.connect(&wire.address(), b"let me in").unwrap();
    drive([&mut host, &mut stranger], |[_, stranger]| {
        wire.hand_on();
        !stranger.closed().is_empty()
    });
    assert_eq!(wire.heard[1], b"", "whoever has no key is told nothing");
    let told = stranger.closed();
    assert!(
        matches!(&told[..], [(p, Error::Unreachable(_, why))] if *p == peer && why.contains("another cluster key")),
        "{told:?}"
    );
    let expected = Stats { accepted: 1, protocol_errors: 1, wrong_key: 1, half_open_dropped: 1, ..Stats::default() };
    assert_eq!(host.transport.stats(), expected);
    is_well(&mut host);
}

#[test]
fn what_was_recorded_is_worth_nothing_again() {
    let _devices = devices();
    let mut host = node(config());
    let mut wire = Wire::to(&host.transport.address());
    let mut member = node(config());
    let peer = member.transport.connect(&wire.address(), b"hello").unwrap();
    drive([&mut host, &mut member], |[_, member]| {
        wire.hand_on();
        member.seen.contains(&Seen::Connected(peer))
    });
    let before = living();
    for i in 0..3 {
        let mut again = knock(&host);
        again.write_all(&wire.heard[0]).unwrap();
        until(&mut host, |stats| stats.tampered == i + 1);
    }
    assert_eq!((living(), host.accepted().len()), (before, 1), "no queue pair was made for it");
    let first = host.accepted()[0];
    member.transport.send(peer, b"and goes on").unwrap();
    host.transport.send(first, b"and answers").unwrap();
    drive([&mut host, &mut member], |[host, member]| host.messages_len() == 1 && member.messages_len() == 1);
}

#[test]
fn a_record_that_was_changed_ends_the_connection() {
    let _devices = devices();
    // The handshake's message is 60 bytes; the offer's record follows. Of a record
    // whose length was changed the rest is awaited, until the time is up.
    for at in [20, 59, 70, 100] {
        let mut host = node(config());
        let mut wire = Wire::to(&host.transport.address());
        wire.turn = Some((0, at));
        let mut member = node(config());
        let peer = member.transport.connect(&wire.address(), b"hello").unwrap();
        drive([&mut host, &mut member], |[_, member]| {
            wire.hand_on();
            !member.closed().is_empty()
        });
        assert!(matches!(&member.closed()[..], [(p, Error::Unreachable(..))] if *p == peer), "{:?}", member.closed());
        let stats = host.transport.stats();
        assert_eq!((stats.wrong_key + stats.tampered, stats.protocol_errors), (1, 1), "byte {at}");
        is_well(&mut host);
    }
    // The accepting side's words, as the connecting side hears them.
    for at in [20, 70, 100] {
        let mut host = node(config());
        let mut wire = Wire::to(&host.transport.address());
        wire.turn = Some((1, at));
        let mut member = node(config());
        member.transport.connect(&wire.address(), b"hello").unwrap();
        drive([&mut host, &mut member], |[_, member]| {
            wire.hand_on();
            !member.closed().is_empty()
        });
        let (_, reason) = &member.closed()[0];
        assert!(matches!(reason, Error::Refused(Refused::Key | Refused::Tampered)), "{reason:?}");
        drive([&mut host], |[host]| {
            wire.hand_on();
            host.transport.stats().half_open_dropped == 1
        });
        is_well(&mut host);
    }
}

#[test]
fn a_record_that_is_changed_later_closes_the_connection() {
    let _devices = devices();
    let mut host = node(config());
    let mut wire = Wire::to(&host.transport.address());
    let mut member = node(config());
    let peer = member.transport.connect(&wire.address(), b"hello").unwrap();
    drive([&mut host, &mut member], |[_, member]| {
        wire.hand_on();
        member.seen.contains(&Seen::Connected(peer))
    });
    wire.turn = Some((0, wire.heard[0].len() + 3));
    // A write asks for a region: the next word on the control channel.
    let (_landing, _, key) = host.target(100);
    let (_source, local) = member.region(100, distkv_fabric::Access::LocalOnly);
    member.transport.write(peer, crate::node::write(local, 100, &key, Some(1))).unwrap();
    drive([&mut host, &mut member], |[host, member]| {
        wire.hand_on();
        !host.closed().is_empty() && !member.closed().is_empty()
    });
    assert_eq!(host.closed()[0].1, Error::Refused(Refused::Tampered));
    assert_eq!((host.transport.stats().tampered, host.notified()), (1, vec![]));
    assert_eq!(member.closed(), [(peer, Error::PeerGone)]);
    works_anew(&mut node(config()), &mut host);
}

#[test]
fn handshakes_are_bounded_in_number_and_time() {
    let _devices = devices();
    let mut host = node(Config { max_half_open: 4, handshake_timeout: Duration::from_millis(300), ..config() });
    let before = living();
    let crowd: Vec<_> = (0..20).map(|_| knock(&host)).collect();
    until(&mut host, |stats| stats.half_open_dropped >= 16);
    assert_eq!(living(), before, "nothing of a device is spent on them");
    is_well(&mut host);
    // The four that stay have their time.
    until(&mut host, |stats| stats.half_open_dropped == 20);
    let stats = host.transport.stats();
    assert!(stats.timeouts >= 3 && stats.accepted == 21, "{stats:?}");
    for mut stream in crowd {
        assert!(matches!(stream.read(&mut [0]), Ok(0) | Err(_)), "hung up");
    }
}

#[test]
fn nobody_who_answers_ends_in_unreachable() {
    let _devices = devices();
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut node = node(Config { handshake_timeout: Duration::from_millis(50), ..config() });
    let before = living();
    let address = distkv_fabric::Address(format!("verbs://{}", silent.local_addr().unwrap()));
    let peer = node.transport.connect(&address, b"").unwrap();
    drive([&mut node], |[node]| !node.closed().is_empty());
    assert_eq!(node.closed(), [(peer, Error::Unreachable(address, "no answer in time".into()))]);
    // Receives and their buffers stay with the rail, for the next.
    assert!(living() <= before + 1);
}

#[test]
fn two_that_connect_to_each_other_have_two_connections() {
    let _devices = devices();
    for _ in 0..20 {
        let (mut a, mut b) = (node(config()), node(config()));
        let to_b = a.transport.connect(&b.transport.address(), b"a").unwrap();
        let to_a = b.transport.connect(&a.transport.address(), b"b").unwrap();
        drive([&mut a, &mut b], |[a, b]| {
            let joined = |node: &Verbs, peer| node.accepted().len() == 1 && node.seen.contains(&Seen::Connected(peer));
            joined(a, to_b) && joined(b, to_a)
        });
        let (from_b, from_a) = (a.accepted()[0], b.accepted()[0]);
        works(&mut a, &mut b, to_b, from_a);
        works(&mut a, &mut b, from_b, to_a);
        a.transport.disconnect(to_b);
        drive([&mut a, &mut b], |[_, b]| !b.closed().is_empty());
        assert_eq!(b.closed(), [(from_a, Error::PeerGone)]);
        works(&mut a, &mut b, from_b, to_a);
    }
}
