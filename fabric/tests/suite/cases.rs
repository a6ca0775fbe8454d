//! What every transport must do. Each case is named for the sentence of the
//! contract that it holds.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use distkv_fabric::{Access, Address, Error, Event, MAX_SEND, Notify, QUEUE_LIMIT, RemoteKey, Write, WriteGuard};

use crate::node::{Make, Node, Seen, bytes, drive, join, pair, pattern, rounds, write};

pub fn hello_is_handed_over(make: Make) {
    let (mut a, mut b) = (Node::new(make), Node::new(make));
    let hello = pattern(MAX_SEND, 1);
    let to_b = a.transport.connect(&b.transport.address(), &hello).unwrap();
    drive([&mut a, &mut b], |[a, b]| !a.seen.is_empty() && !b.seen.is_empty());
    assert_eq!(a.seen, [Seen::Connected(to_b)]);
    assert!(matches!(&b.seen[..], [Seen::Accepted(_, said)] if *said == hello));
    let too_long = a.transport.connect(&b.transport.address(), &vec![0; MAX_SEND + 1]);
    assert_eq!(too_long, Err(Error::TooLong(MAX_SEND + 1)));
    assert!(matches!(a.transport.connect(&Address("smoke://signal".into()), b""), Err(Error::BadAddress(..))));
}

pub fn nobody_at_the_address_ends_in_closed(make: Make) {
    let mut a = Node::new(make);
    let gone = make().address();
    let peer = a.transport.connect(&gone, b"").unwrap();
    a.transport.send(peer, b"queued").unwrap();
    drive([&mut a], |[a]| !a.closed().is_empty());
    assert!(matches!(&a.seen[..], [Seen::Closed(p, Error::Unreachable(to, _))] if *p == peer && *to == gone));
    assert_eq!(a.transport.send(peer, b""), Err(Error::UnknownPeer(peer)));
}

pub fn posts_before_connected_are_queued(make: Make) {
    let (mut a, mut b) = (Node::new(make), Node::new(make));
    let (landing, _, key) = b.target(4096);
    let (source, local) = a.region(4096, Access::LocalOnly);
    source.write(0, b"early").unwrap();
    let to_b = a.transport.connect(&b.transport.address(), b"x").unwrap();
    a.transport.send(to_b, b"first").unwrap();
    a.transport.write(to_b, write(local, 5, &key, Some(2))).unwrap();
    a.transport.send(to_b, b"third").unwrap();
    drive([&mut a, &mut b], |[a, b]| b.seen.len() == 4 && !a.seen.is_empty());
    let to_a = b.accepted()[0];
    assert_eq!(
        b.seen[1..],
        [Seen::Message(to_a, b"first".to_vec()), Seen::Notified(to_a, 2), Seen::Message(to_a, b"third".to_vec())]
    );
    assert_eq!(bytes(&landing, 0, 5), b"early");
}

pub fn what_is_posted_arrives_once_and_in_order(make: Make) {
    const ROUNDS: u32 = 400;
    let (mut a, mut b, to_b, to_a) = pair(make);
    let (landing, _, key) = b.target(ROUNDS as usize * 64);
    let (source, local) = a.region(ROUNDS as usize * 64, Access::LocalOnly);
    source.write(0, &pattern(ROUNDS as usize * 64, 3)).unwrap();
    b.seen.clear();
    let mut expected = Vec::new();
    for i in 0..ROUNDS {
        let payload = pattern((i as usize * 37) % 5000, i as usize);
        a.transport.send(to_b, &payload).unwrap();
        expected.push(Seen::Message(to_a, payload));
        let at = u64::from(i) * 64;
        // All 32 bits are the caller's.
        let notify = (i % 3 != 0).then_some(Notify(if i % 2 == 0 { i } else { u32::MAX - i }));
        let write = Write { local, local_offset: at, len: 64, remote: &key, remote_offset: at, notify };
        a.transport.write(to_b, write).unwrap();
        expected.extend(notify.map(|n| Seen::Notified(to_a, n.0)));
        if i % 50 == 0 {
            b.poll();
        }
    }
    drive([&mut a, &mut b], |[a, b]| b.seen.len() >= expected.len() && a.transport.pending(to_b) == 0);
    assert_eq!(b.seen, expected);
    assert_eq!(bytes(&landing, 0, ROUNDS as usize * 64), pattern(ROUNDS as usize * 64, 3));
}

pub fn messages_of_every_length_arrive(make: Make) {
    let (mut a, mut b, to_b, _) = pair(make);
    let lengths = [0, 1, 15, 16, 4095, 16_368, 16_369, 65_536, 65_537, 300_000, MAX_SEND - 1, MAX_SEND];
    for (i, len) in lengths.into_iter().enumerate() {
        a.transport.send(to_b, &pattern(len, i)).unwrap();
    }
    drive([&mut a, &mut b], |[_, b]| b.messages().len() == lengths.len());
    for (i, (got, len)) in b.messages().iter().zip(lengths).enumerate() {
        assert!(*got == pattern(len, i), "message of {len} bytes");
    }
    assert_eq!(a.transport.send(to_b, &vec![0; MAX_SEND + 1]), Err(Error::TooLong(MAX_SEND + 1)));
}

pub fn a_notification_comes_after_the_data(make: Make) {
    let (mut a, mut b, to_b, _) = pair(make);
    let len = 300 << 10;
    let (landing, _, key) = b.target(len);
    let (source, local) = a.region(len, Access::LocalOnly);
    for round in 0..50u32 {
        source.write(0, &vec![round as u8 + 1; len]).unwrap();
        a.transport.write(to_b, write(local, len as u64, &key, Some(round))).unwrap();
        drive([&mut a, &mut b], |[_, b]| {
            let told = b.notified().len() == round as usize + 1;
            assert!(!told || bytes(&landing, 0, len).iter().all(|byte| *byte == round as u8 + 1));
            told
        });
        drive([&mut a, &mut b], |[a, _]| a.transport.pending(to_b) == 0);
    }
    // None of its own, but the next one speaks for it too.
    source.write(0, &vec![99; len]).unwrap();
    a.transport.write(to_b, write(local, len as u64, &key, None)).unwrap();
    a.transport.write(to_b, write(local, 0, &key, Some(99))).unwrap();
    drive([&mut a, &mut b], |[_, b]| b.notified().last() == Some(&99));
    assert!(bytes(&landing, 0, len).iter().all(|byte| *byte == 99));
}

pub fn small_messages_keep_their_place_behind_big_writes(make: Make) {
    let (mut a, mut b, to_b, to_a) = pair(make);
    let len = rounds(64) << 20;
    let (landing, _, key) = b.target(len);
    let (source, local) = a.region(len, Access::LocalOnly);
    source.write(0, &pattern(len, 5)).unwrap();
    b.seen.clear();
    a.transport.write(to_b, write(local, len as u64, &key, Some(1))).unwrap();
    a.transport.send(to_b, b"behind").unwrap();
    a.transport.write(to_b, write(local, len as u64, &key, Some(2))).unwrap();
    a.transport.send(to_b, b"last").unwrap();
    drive([&mut a, &mut b], |[_, b]| b.seen.len() == 4);
    assert_eq!(
        b.seen,
        [
            Seen::Notified(to_a, 1),
            Seen::Message(to_a, b"behind".to_vec()),
            Seen::Notified(to_a, 2),
            Seen::Message(to_a, b"last".to_vec())
        ]
    );
    assert!(bytes(&landing, 0, len) == pattern(len, 5));
    drive([&mut a, &mut b], |[a, _]| a.transport.pending(to_b) == 0);
}

pub fn many_peers_are_told_apart(make: Make) {
    let mut hub = Node::new(make);
    let (landing, _, key) = hub.target(4096);
    let mut rim: Vec<_> = (0..48u8)
        .map(|i| {
            let mut node = Node::new(make);
            let (to_hub, from_hub) = join(&mut node, &mut hub, &[i]);
            let (source, local) = node.region(4096, Access::LocalOnly);
            source.write(0, &[i + 1]).unwrap();
            (node, to_hub, from_hub, local)
        })
        .collect();
    for (i, (node, to_hub, from_hub, local)) in rim.iter_mut().enumerate() {
        node.transport.send(*to_hub, &[i as u8]).unwrap();
        let at = i as u64 * 8;
        let notify = Some(Notify(i as u32));
        let write = Write { local: *local, local_offset: 0, len: 1, remote: &key, remote_offset: at, notify };
        node.transport.write(*to_hub, write).unwrap();
        hub.transport.send(*from_hub, &[i as u8 + 100]).unwrap();
    }
    for (i, (node, to_hub, from_hub, _)) in rim.iter_mut().enumerate() {
        drive([node, &mut hub], |[node, hub]| {
            node.messages().len() == 1 && hub.seen.contains(&Seen::Notified(*from_hub, i as u32))
        });
        assert!(hub.seen.contains(&Seen::Message(*from_hub, vec![i as u8])));
        assert_eq!(node.seen.last(), Some(&Seen::Message(*to_hub, vec![i as u8 + 100])));
        assert_eq!(bytes(&landing, i * 8, 1), [i as u8 + 1]);
    }
}

pub fn a_post_that_cannot_be_is_refused_at_once(make: Make) {
    let (mut a, mut b, to_b, _) = pair(make);
    let (_landing, region, key) = b.target(4096);
    let (_source, local) = a.region(8192, Access::LocalOnly);
    let mut post = |write: Write<'_>| a.transport.write(to_b, write).unwrap_err();
    let good = write(local, 4096, &key, None);
    assert!(matches!(post(Write { remote_offset: 1, ..good }), Error::OutOfRange { size: 4096, .. }));
    assert!(matches!(post(Write { remote_offset: u64::MAX, ..good }), Error::OutOfRange { .. }));
    assert!(matches!(post(Write { local_offset: 4097, ..good }), Error::OutOfRange { size: 8192, .. }));
    let stranger = distkv_fabric::RegionId(77);
    assert_eq!(post(Write { local: stranger, ..good }), Error::UnknownRegion(stranger));
    assert_eq!(post(Write { remote: &RemoteKey(b"no key".to_vec()), ..good }), Error::BadKey);
    assert_eq!(a.transport.remote_key(local), Err(Error::NotExported(local)));
    assert_eq!(a.transport.remote_key(stranger), Err(Error::UnknownRegion(stranger)));
    assert!(a.transport.remote_key(local).is_err() && b.transport.remote_key(region).is_ok());
    // Nothing of it reached the peer.
    a.transport.send(to_b, b"still here").unwrap();
    drive([&mut a, &mut b], |[_, b]| b.messages().len() == 1);
    assert!(a.closed().is_empty() && b.closed().is_empty());
}

/// Posts a write with `key`, which the receiver must answer with a closed
/// connection; both sides hear of it once and the transports go on.
fn refused(make: Make, mut b: Node, key: &RemoteKey, offset: u64) -> Node {
    let mut a = Node::new(make);
    let (to_b, to_a) = join(&mut a, &mut b, b"a");
    let (_source, local) = a.region(4096, Access::LocalOnly);
    let bad = Write { remote_offset: offset, ..write(local, 64, key, Some(1)) };
    a.transport.write(to_b, bad).unwrap();
    drive([&mut a, &mut b], |[a, b]| !a.closed().is_empty() && !b.closed().is_empty());
    assert!(matches!(&b.closed()[..], [(peer, Error::Protocol(_))] if *peer == to_a), "{:?}", b.closed());
    assert_eq!(a.closed().len(), 1);
    assert_eq!(a.transport.pending(to_b), 0);
    assert!(b.notified().is_empty());
    let (to_b, _) = join(&mut a, &mut b, b"again");
    a.transport.send(to_b, b"the transport goes on").unwrap();
    drive([&mut a, &mut b], |[_, b]| b.messages().len() == 1);
    b
}

pub fn a_forged_key_closes_the_connection(make: Make) {
    let mut b = Node::new(make);
    let (landing, _, key) = b.target(4096);
    let mut forged = key.clone();
    *forged.0.last_mut().unwrap() ^= 1;
    let b = refused(make, b, &forged, 0);
    drop(b);
    assert_eq!(bytes(&landing, 0, 64), [0; 64]);
}

pub fn the_key_of_another_transport_closes_the_connection(make: Make) {
    let (mut b, mut other) = (Node::new(make), Node::new(make));
    let (landing, _, _) = b.target(4096);
    let (_, _, key) = other.target(4096);
    refused(make, b, &key, 0);
    assert_eq!(bytes(&landing, 0, 64), [0; 64]);
}

pub fn a_deregistered_region_is_closed_to_writes(make: Make) {
    let mut b = Node::new(make);
    let (_landing, region, key) = b.target(4096);
    b.transport.deregister(region).unwrap();
    assert_eq!(b.transport.deregister(region), Err(Error::UnknownRegion(region)));
    assert_eq!(b.transport.remote_key(region), Err(Error::UnknownRegion(region)));
    refused(make, b, &key, 0);
}

pub fn a_region_deregistered_after_use_is_closed_to_writes(make: Make) {
    let (mut a, mut b, to_b, to_a) = pair(make);
    let (landing, region, key) = b.target(4096);
    let (source, local) = a.region(4096, Access::LocalOnly);
    source.write(0, b"before").unwrap();
    a.transport.write(to_b, write(local, 6, &key, Some(1))).unwrap();
    drive([&mut a, &mut b], |[_, b]| b.notified() == [1]);
    b.transport.deregister(region).unwrap();
    b.transport.send(to_a, b"it is gone").unwrap();
    drive([&mut a, &mut b], |[a, _]| a.messages().len() == 1);
    source.write(0, b"behind").unwrap();
    a.transport.write(to_b, write(local, 6, &key, Some(2))).unwrap();
    drive([&mut a, &mut b], |[a, b]| !a.closed().is_empty() && !b.closed().is_empty());
    assert_eq!(bytes(&landing, 0, 6), b"before");
    assert_eq!(b.notified(), [1]);
}

struct Fence {
    asked: AtomicUsize,
}

impl WriteGuard for Fence {
    fn may_write(&self, hello: &[u8], offset: u64, len: u64) -> bool {
        self.asked.fetch_add(1, Ordering::Relaxed);
        hello == b"friend" && offset + len <= 2048
    }
}

pub fn the_guard_decides(make: Make) {
    let (mut a, mut b) = (Node::new(make), Node::new(make));
    let (to_b, _) = join(&mut a, &mut b, b"friend");
    let fence = Arc::new(Fence { asked: AtomicUsize::new(0) });
    let (landing, region) = b.region(4096, Access::Guarded(fence.clone()));
    let key = b.transport.remote_key(region).unwrap();
    let (source, local) = a.region(4096, Access::LocalOnly);
    source.write(0, &[7; 64]).unwrap();
    let to = |remote_offset| Write { remote_offset, ..write(local, 64, &key, Some(1)) };
    a.transport.write(to_b, to(1984)).unwrap();
    drive([&mut a, &mut b], |[_, b]| b.notified() == [1]);
    assert_eq!(bytes(&landing, 1984, 64), [7; 64]);
    a.transport.write(to_b, to(1985)).unwrap();
    drive([&mut a, &mut b], |[a, b]| !a.closed().is_empty() && !b.closed().is_empty());
    assert_eq!(bytes(&landing, 2048, 64), [0; 64]);
    assert!(matches!(b.closed()[0].1, Error::Protocol(_)));
    assert_eq!(fence.asked.load(Ordering::Relaxed), 2);
    // `refused` greets as "a", whom the guard does not know.
    let mut b = b;
    b.seen.clear();
    refused(make, b, &key, 0);
}

pub fn disconnect_is_seen_once_and_only_by_the_other(make: Make) {
    let (mut a, mut b, to_b, to_a) = pair(make);
    a.transport.send(to_b, b"last words").unwrap();
    drive([&mut a, &mut b], |[_, b]| b.messages().len() == 1);
    b.transport.send(to_a, b"lost").unwrap();
    a.seen.clear();
    a.transport.disconnect(to_b);
    drive([&mut a, &mut b], |[_, b]| !b.closed().is_empty());
    for _ in 0..200 {
        a.poll();
        b.poll();
    }
    assert_eq!(b.closed().len(), 1);
    assert_eq!(b.closed()[0].0, to_a);
    assert_eq!(a.seen, []);
    assert_eq!(a.transport.send(to_b, b""), Err(Error::UnknownPeer(to_b)));
    assert_eq!(b.transport.send(to_a, b""), Err(Error::UnknownPeer(to_a)));
    a.transport.disconnect(to_b);
    let (again, _) = join(&mut a, &mut b, b"again");
    assert_ne!(again, to_b, "ids are not reused");
}

pub fn a_dropped_transport_closes_its_connections(make: Make) {
    let (a, mut b, _, to_a) = pair(make);
    drop(a);
    drive([&mut b], |[b]| !b.closed().is_empty());
    assert_eq!(b.closed(), [(to_a, Error::PeerGone)]);
}

pub fn a_waker_ends_a_wait(make: Make) {
    let mut a = Node::new(make);
    let waker = a.transport.waker();
    // Used before the wait: it returns at once. A transport that forgot would
    // sleep for an hour.
    for _ in 0..3 {
        waker.wake();
        a.transport.wait(Duration::from_secs(3600)).unwrap();
    }
    let stop = Arc::new(AtomicUsize::new(0));
    let waiting = std::thread::spawn({
        let stop = Arc::clone(&stop);
        move || {
            while stop.load(Ordering::Acquire) == 0 {
                a.transport.wait(Duration::from_secs(3600)).unwrap();
            }
        }
    });
    stop.store(1, Ordering::Release);
    waker.wake();
    waiting.join().unwrap();
}

pub fn a_wait_ends_by_itself(make: Make) {
    let (mut a, mut b, _, _) = pair(make);
    drive([&mut a, &mut b], |[a, b]| {
        a.transport.wait(Duration::from_millis(1)).unwrap();
        b.transport.wait(Duration::ZERO).unwrap();
        true
    });
}

/// Two threads answer each other and sleep whenever nothing is there: one lost
/// wakeup and the test stands still.
pub fn a_wait_misses_no_wakeup(make: Make) {
    let all = rounds(100_000) as u32;
    let (mut a, mut b, to_b, to_a) = pair(make);
    let (_landing_a, _, key_a) = a.target(4096);
    let (_landing_b, _, key_b) = b.target(4096);
    let (_source_a, local_a) = a.region(4096, Access::LocalOnly);
    let (_source_b, local_b) = b.region(4096, Access::LocalOnly);
    let play = move |mut node: Node, peer, local, key: RemoteKey, serve: bool| {
        if serve {
            node.transport.write(peer, write(local, 8, &key, Some(0))).unwrap();
        }
        let mut next = u32::from(!serve);
        let mut last = false;
        while !last {
            let mut got = None;
            node.transport
                .poll(&mut |event| match event {
                    Event::Notified { notify, .. } => assert!(got.replace(notify.0).is_none()),
                    other => panic!("unexpected {other:?}"),
                })
                .unwrap();
            match got {
                Some(n) => {
                    next = n + 1;
                    last = next >= all;
                    if next <= all {
                        node.transport.write(peer, write(local, 8, &key, Some(next))).unwrap();
                    }
                }
                None => node.transport.wait(Duration::from_secs(3600)).unwrap(),
            }
        }
        (node, next)
    };
    let other = std::thread::spawn(move || play(b, to_a, local_b, key_a, false));
    let (_a, last) = play(a, to_b, local_a, key_b, true);
    let (_b, second) = other.join().unwrap();
    assert!(last.max(second) >= all);
}

pub fn a_peer_that_does_not_poll_holds_nobody_up(make: Make) {
    let (mut a, mut b, to_b, _) = pair(make);
    let payload = pattern(60_000, 1);
    let mut posted = 0usize;
    let full = loop {
        match a.transport.send(to_b, &payload) {
            Ok(()) => posted += 1,
            Err(e) => break e,
        }
        assert!(posted * payload.len() < 64 * QUEUE_LIMIT, "the queue has no bound");
    };
    assert!(matches!(full, Error::Full { peer, queued } if peer == to_b && queued <= QUEUE_LIMIT), "{full:?}");
    // Nothing that was accepted is lost, and what was refused can be posted
    // when the queue has drained.
    drive([&mut a, &mut b], |[a, _]| a.transport.send(to_b, b"at last").is_ok());
    drive([&mut a, &mut b], |[_, b]| b.messages().len() == posted + 1);
    assert!(b.messages()[..posted].iter().all(|m| *m == payload));
    assert_eq!(b.messages()[posted], b"at last");
    assert!(a.closed().is_empty() && b.closed().is_empty());
}

pub fn writes_to_a_peer_that_does_not_poll_wait_for_it(make: Make) {
    let (mut a, mut b, to_b, _) = pair(make);
    let len = 1 << 20;
    let (landing, _, key) = b.target(len);
    let (source, local) = a.region(len, Access::LocalOnly);
    source.write(0, &pattern(len, 9)).unwrap();
    for i in 0..2000 {
        let len = if i % 100 == 0 { len as u64 } else { 8 };
        a.transport.write(to_b, write(local, len, &key, Some(i))).unwrap();
    }
    drive([&mut a, &mut b], |[a, b]| b.notified().len() == 2000 && a.transport.pending(to_b) == 0);
    assert!(b.notified().into_iter().eq(0..2000));
    assert!(bytes(&landing, 0, len) == pattern(len, 9));
}

pub fn both_sides_may_flood_at_once(make: Make) {
    let (mut a, mut b, to_b, to_a) = pair(make);
    let payload = pattern(50_000, 2);
    let (mut from_a, mut from_b) = (0, 0);
    let all = rounds(1000);
    drive([&mut a, &mut b], |[a, b]| {
        while from_a < all && a.transport.send(to_b, &payload).is_ok() {
            from_a += 1;
        }
        while from_b < all && b.transport.send(to_a, &payload).is_ok() {
            from_b += 1;
        }
        a.messages_len() == all && b.messages_len() == all
    });
}

/// A hub that sleeps between polls answers many connections of a peer that does
/// the same; then each says a last word and hangs up at once.
pub fn a_crowd_wakes_its_hub(make: Make) {
    const PEERS: usize = 12;
    let all = rounds(2000);
    let (mut hub, mut rim) = (Node::new(make), Node::new(make));
    let to_hub: Vec<_> = (0..PEERS).map(|_| join(&mut rim, &mut hub, b"rim").0).collect();
    hub.seen.clear();
    let serving = std::thread::spawn(move || {
        let mut farewells = Vec::new();
        let mut closed = 0;
        while closed < PEERS {
            hub.transport.wait(Duration::from_secs(3600)).unwrap();
            hub.poll();
            for seen in std::mem::take(&mut hub.seen) {
                match seen {
                    Seen::Message(peer, word) if word == b"bye" => farewells.push(peer),
                    Seen::Message(peer, word) => hub.transport.send(peer, &word).unwrap(),
                    Seen::Closed(peer, reason) => {
                        assert_eq!(reason, Error::PeerGone);
                        assert!(farewells.contains(&peer), "its last word came before its end");
                        closed += 1;
                    }
                    other => panic!("{other:?}"),
                }
            }
        }
        assert_eq!(farewells.len(), PEERS);
    });
    rim.seen.clear();
    for round in 0..all {
        // Sometimes all speak, sometimes few.
        let speakers = if round % 3 == 0 { &to_hub[..] } else { &to_hub[round % PEERS..][..1] };
        let word = pattern(1 + (round * 97) % 3000, round);
        for peer in speakers {
            rim.transport.send(*peer, &word).unwrap();
        }
        while rim.seen.len() < speakers.len() {
            rim.transport.wait(Duration::from_secs(3600)).unwrap();
            rim.poll();
        }
        assert!(rim.seen.drain(..).all(|seen| matches!(seen, Seen::Message(_, got) if got == word)));
    }
    for peer in to_hub {
        rim.transport.send(peer, b"bye").unwrap();
        rim.transport.disconnect(peer);
    }
    serving.join().unwrap();
}
