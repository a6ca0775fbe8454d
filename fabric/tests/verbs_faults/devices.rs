//! Queue pairs, wires, ports and devices that fail.

use std::ffi::c_int;
use std::time::{Duration, Instant};

use distkv_fabric::{Access, Error, Transport};

use crate::node::{bytes, drive, join, pattern, write};
use crate::rig::knob;
use crate::world::{assert_lost, config, devices, ends, node, pair, two_rails, works, works_anew};

fn cut(on: bool) {
    knob("software_hca_cut", (0, c_int::from(on)));
}

fn port(device: c_int, up: bool) {
    knob("software_hca_port", (device, c_int::from(up)));
}

#[test]
fn a_broken_queue_pair_ends_its_connection_alone() {
    let _devices = devices();
    let (mut a, mut b, first, first_at_b) = pair(&config());
    let (second, second_at_b) = join(&mut a, &mut b, b"second");
    works(&mut a, &mut b, first, first_at_b);
    a.transport.break_queue_pair(first).unwrap();
    let _ = a.transport.send(first, b"into the void");
    let (ours, theirs) = ends(&mut a, &mut b, first, first_at_b);
    assert_lost(&ours, "soft0:1");
    assert_eq!(theirs, Error::PeerGone);
    works(&mut a, &mut b, second, second_at_b);
    works_anew(&mut a, &mut b);
}

#[test]
fn an_idle_queue_pair_that_breaks_is_noticed() {
    let _devices = devices();
    let (mut a, mut b, to_b, to_a) = pair(&config());
    works(&mut a, &mut b, to_b, to_a);
    a.transport.break_queue_pair(to_b).unwrap();
    // Asleep: the device's word has to wake it.
    let start = Instant::now();
    while a.closed().is_empty() {
        assert!(start.elapsed() < Duration::from_secs(10), "nobody noticed");
        a.transport.wait(Duration::from_secs(1)).unwrap();
        a.poll();
    }
    let (ours, theirs) = ends(&mut a, &mut b, to_b, to_a);
    assert_lost(&ours, "the device ended the queue pair");
    assert_eq!(theirs, Error::PeerGone);
    works_anew(&mut a, &mut b);
}

#[test]
fn a_queue_pair_that_the_device_breaks_under_writes() {
    let _devices = devices();
    let (mut a, mut b, to_b, to_a) = pair(&config());
    let (_landing, _, key) = b.target(1 << 20);
    let (_source, local) = a.region(1 << 20, Access::LocalOnly);
    for i in 0..200 {
        a.transport.write(to_b, write(local, 1 << 20, &key, Some(i))).unwrap();
    }
    drive([&mut a, &mut b], |[_, b]| b.notified().len() > 20);
    let number = a.transport.queue_pair(to_b).unwrap();
    knob("software_hca_break_qp", (number as c_int, 0));
    let (ours, theirs) = ends(&mut a, &mut b, to_b, to_a);
    assert_lost(&ours, "soft0:1");
    assert_eq!(theirs, Error::PeerGone);
    assert!(b.notified().into_iter().eq(0..b.notified().len() as u32), "up to there all came, in order");
    assert_eq!(a.transport.pending(to_b), 0);
    works_anew(&mut a, &mut b);
}

#[test]
fn a_cut_wire_is_lost_to_the_writer_and_heard_by_the_other() {
    let _devices = devices();
    let (mut a, mut b, to_b, to_a) = pair(&config());
    works(&mut a, &mut b, to_b, to_a);
    for _ in 0..3 {
        let (to_b, to_a) = join(&mut a, &mut b, b"through what is left");
        cut(true);
        a.transport.send(to_b, b"into the cut").unwrap();
        let (ours, theirs) = ends(&mut a, &mut b, to_b, to_a);
        assert_lost(&ours, "retries exceeded");
        assert_eq!(theirs, Error::PeerGone);
        cut(false);
        works_anew(&mut a, &mut b);
    }
    works(&mut a, &mut b, to_b, to_a);
}

#[test]
fn a_short_cut_is_survived() {
    let _devices = devices();
    let mut config = config();
    // Half a minute of retries.
    config.ports.timeout = 20;
    let (mut a, mut b, to_b, to_a) = pair(&config);
    cut(true);
    for i in 0..100u8 {
        a.transport.send(to_b, &[i]).unwrap();
    }
    let until = Instant::now() + Duration::from_millis(50);
    drive([&mut a, &mut b], |_| Instant::now() > until);
    assert_eq!((b.messages_len(), a.closed(), b.closed()), (0, vec![], vec![]));
    cut(false);
    drive([&mut a, &mut b], |[_, b]| b.messages_len() == 100);
    assert!(b.messages().into_iter().eq((0..100u8).map(|i| vec![i])));
    works(&mut a, &mut b, to_b, to_a);
}

#[test]
fn a_port_that_goes_down_closes_its_connections_and_connect_says_so() {
    let _devices = devices();
    let (mut a, mut b, to_b, to_a) = pair(&config());
    let (second, second_at_b) = join(&mut a, &mut b, b"second");
    port(0, false);
    let (ours, theirs) = ends(&mut a, &mut b, to_b, to_a);
    assert_lost(&ours, "soft0:1: the port is down");
    // Whichever it heard first.
    assert!(matches!(theirs, Error::Lost(_) | Error::PeerGone));
    ends(&mut a, &mut b, second, second_at_b);
    let refused = a.transport.connect(&b.transport.address(), b"");
    assert!(
        matches!(&refused, Err(Error::Os { errno, .. }) if errno.contains("every RDMA port is down")),
        "{refused:?}"
    );
    port(0, true);
    drive([&mut a, &mut b], |[a, b]| a.transport.connect(&b.transport.address(), b"").is_ok());
    drive([&mut a, &mut b], |[_, b]| b.accepted().len() == 3);
    works_anew(&mut a, &mut b);
}

#[test]
fn a_port_that_was_down_for_a_moment_has_lost_its_connections() {
    let _devices = devices();
    let (mut a, mut b, to_b, to_a) = pair(&config());
    port(0, false);
    port(0, true);
    let (ours, _) = ends(&mut a, &mut b, to_b, to_a);
    assert_lost(&ours, "the port is down");
    works_anew(&mut a, &mut b);
}

#[test]
fn the_other_rail_is_taken_when_a_port_is_down() {
    let _devices = devices();
    let (mut a, mut b, to_b, to_a) = pair(&two_rails());
    assert!(a.transport.rails().eq(["soft0:1", "soft1:1"]));
    port(0, false);
    ends(&mut a, &mut b, to_b, to_a);
    let (to_b, to_a) = works_anew(&mut a, &mut b);
    port(0, true);
    port(1, false);
    ends(&mut a, &mut b, to_b, to_a);
    let (to_b, to_a) = works_anew(&mut a, &mut b);
    // That it came back has nothing to say to those of the other.
    port(1, true);
    works(&mut a, &mut b, to_b, to_a);
}

#[test]
fn the_next_attempt_takes_the_other_rail() {
    let _devices = devices();
    let (mut a, mut b, to_b, to_a) = pair(&two_rails());
    // No port says that it is down: only posts find out.
    cut(true);
    a.transport.send(to_b, b"into the cut").unwrap();
    let (ours, _) = ends(&mut a, &mut b, to_b, to_a);
    assert_lost(&ours, "soft0:1");
    works_anew(&mut a, &mut b);
}

#[test]
fn a_device_that_fails_is_not_used_again() {
    let _devices = devices();
    let (mut a, mut b, to_b, to_a) = pair(&config());
    knob("software_hca_break", (0, 0));
    let (ours, _) = ends(&mut a, &mut b, to_b, to_a);
    assert_lost(&ours, "soft0:1");
    // A port that comes up again does not mend the device.
    port(0, false);
    port(0, true);
    let until = Instant::now() + Duration::from_millis(20);
    drive([&mut a, &mut b], |_| Instant::now() > until);
    let refused = a.transport.connect(&b.transport.address(), b"");
    assert!(matches!(&refused, Err(Error::Os { errno, .. }) if errno.contains("device has failed")), "{refused:?}");
    // Who opens it anew may use it.
    drop(a);
    works_anew(&mut node(config()), &mut node(config()));
}

#[test]
fn another_device_takes_over_from_one_that_fails() {
    let _devices = devices();
    let (mut a, mut b, to_b, to_a) = pair(&two_rails());
    knob("software_hca_break", (0, 0));
    ends(&mut a, &mut b, to_b, to_a);
    cut(true);
    works_anew(&mut a, &mut b);
}

#[test]
fn a_stale_key_is_counted_whether_the_owners_device_tells_of_it_or_not() {
    const LEN: usize = 4096;
    let _devices = devices();
    for silent in [0, 1] {
        knob("software_hca_silent", (0, silent));
        let (mut a, mut b, to_b, to_a) = pair(&config());
        let (landing, theirs, key) = b.target(LEN);
        let (source, ours) = a.region(LEN, Access::LocalOnly);
        source.write(0, &pattern(LEN, 1)).unwrap();
        a.transport.write(to_b, write(ours, LEN as u64, &key, Some(1))).unwrap();
        drive([&mut a, &mut b], |[a, b]| b.notified() == [1] && a.transport.pending(to_b) == 0);
        // The writer's device still has the address and the key.
        b.transport.deregister(theirs).unwrap();
        landing.write(0, &[0; LEN]).unwrap();
        a.transport.write(to_b, write(ours, LEN as u64, &key, Some(2))).unwrap();
        let (at_a, at_b) = ends(&mut a, &mut b, to_b, to_a);
        assert_lost(&at_a, "soft0:1");
        assert!(matches!(&at_b, Error::Protocol(what) if what.contains("its key does not allow")), "{silent}: {at_b}");
        let counted = [&a, &b].map(|node| node.transport.stats().protocol_errors);
        assert_eq!((counted, bytes(&landing, 0, LEN)), ([0, 1], vec![0; LEN]), "silent: {silent}");
        works_anew(&mut a, &mut b);
    }
}

#[test]
fn a_peer_that_closes_or_dies_has_broken_nothing() {
    let _devices = devices();
    for goes in [
        |a: &mut crate::world::Verbs, peer| a.transport.disconnect(peer),
        |a: &mut crate::world::Verbs, _| {
            *a = node(config());
        },
    ] {
        let (mut a, mut b, to_b, to_a) = pair(&config());
        works(&mut a, &mut b, to_b, to_a);
        goes(&mut a, to_b);
        drive([&mut a, &mut b], |[_, b]| !b.closed().is_empty());
        assert_eq!(b.closed()[0].1, Error::PeerGone);
        assert_eq!(b.transport.stats().protocol_errors, 0);
    }
}
