//! Faults of a wire between devices of the kernel's: in the guest of
//! scripts/softroce, by its job `fabric-faults`. The control channel is on the
//! loopback and stays up.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use distkv_fabric::verbs::device::VerbsConfig;
use distkv_fabric::verbs::{Config, VerbsTransport};
use distkv_fabric::{Access, Address, Error, RemoteKey, Transport};

use crate::node::{Node, bytes, drive, join, pattern, write};
use crate::world::{Verbs, assert_lost, ends, secret, works, works_anew};

/// Two RDMA devices, one on each end of the wire: `rxe0,rxe1`.
pub const DEVICES: &str = "DISTKV_TEST_VERBS_DEVICES";
/// Tells the peer that is killed what to do: address and key.
const ORDERS: &str = "DISTKV_TEST_PEER";
const LEN: usize = 64 << 10;

fn at(end: usize) -> Verbs {
    let devices = std::env::var(DEVICES).expect("DISTKV_TEST_VERBS_DEVICES=rxe0,rxe1");
    let device = devices.split(',').nth(end).expect("two devices");
    let ports = VerbsConfig { devices: vec![device.into()], ..Default::default() };
    let config = Config { ports, ..Default::default() };
    let transport = VerbsTransport::bind(([127, 0, 0, 1], 0).into(), secret(), config).unwrap();
    Node { transport: Box::new(transport), seen: Vec::new() }
}

/// The wire, as new when a test ends.
struct Wire;

impl Wire {
    fn suffers(&self, what: &str) {
        let done = Command::new("bash").args(["-c", &format!("source /host/lib.sh; {what}")]).status();
        assert!(done.unwrap().success(), "{what}");
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.suffers("heal");
    }
}

/// Polls both while `a` writes to `b`, until it is done.
fn stream(a: &mut Verbs, b: &mut Verbs, mut done: impl FnMut(&Verbs, &Verbs) -> bool) {
    let to_b = a.transport.connect(&b.transport.address(), b"writer").unwrap();
    let (_landing, theirs, key) = b.target(LEN);
    let (_source, ours) = a.region(LEN, Access::LocalOnly);
    let (mut next, before) = (0, b.notified().len());
    drive([a, b], |[a, b]| {
        while a.transport.pending(to_b) < 8
            && a.transport.write(to_b, write(ours, LEN as u64, &key, Some(next))).is_ok()
        {
            next += 1;
        }
        done(a, b)
    });
    assert!(b.notified()[before..].iter().copied().eq(0..(b.notified().len() - before) as u32), "in order, once");
    a.transport.deregister(ours).unwrap();
    b.transport.deregister(theirs).unwrap();
}

#[test]
#[ignore = "in the guest of scripts/softroce"]
fn a_cut_link_is_lost_and_comes_back() {
    let wire = Wire;
    let (mut a, mut b) = (at(0), at(1));
    let mut cut = None;
    stream(&mut a, &mut b, |a, b| {
        if cut.is_none() && b.notified().len() >= 20 {
            wire.suffers("cut");
            cut = Some(Instant::now());
        }
        !a.closed().is_empty() && !b.closed().is_empty()
    });
    let took = cut.unwrap().elapsed();
    println!("lost {} ms after the cut", took.as_millis());
    // Seven times 67 ms, four times that at most.
    assert!(took < Duration::from_secs(10), "{took:?}");
    // Both had something under way, credits at least; one found out first, and
    // the other may have heard of it before it did.
    let reasons = [a.closed(), b.closed()].map(|closed| closed[0].1.clone());
    let lost = |reason: &&Error| matches!(reason, Error::Lost(why) if why.contains("retry counter exceeded"));
    assert!(reasons.iter().all(|reason| lost(&reason) || *reason == Error::PeerGone), "{reasons:?}");
    assert!(reasons.iter().any(|reason| lost(&reason)), "{reasons:?}");
    drop(wire);
    works_anew(&mut a, &mut b);
}

#[test]
#[ignore = "in the guest of scripts/softroce"]
fn what_a_wire_loses_is_sent_again() {
    const ROUNDS: usize = 300;
    let wire = Wire;
    let (mut a, mut b) = (at(0), at(1));
    let (to_b, _) = join(&mut a, &mut b, b"a");
    let (landing, _, key) = b.target(LEN);
    let (source, ours) = a.region(LEN, Access::LocalOnly);
    source.write(0, &pattern(LEN, 1)).unwrap();
    for loss in ["heal", "loss 1"] {
        wire.suffers(loss);
        let start = Instant::now();
        (a.seen, b.seen) = (Vec::new(), Vec::new());
        let mut posted = 0;
        drive([&mut a, &mut b], |[a, b]| {
            while posted < ROUNDS && a.transport.pending(to_b) < 8 {
                a.transport.send(to_b, &pattern(1 + 97 * posted, posted)).unwrap();
                let len = 1 + posted as u64 * 433 % LEN as u64;
                a.transport.write(to_b, write(ours, len, &key, Some(posted as u32))).unwrap();
                posted += 1;
            }
            b.notified().len() == ROUNDS && b.messages_len() == ROUNDS && a.transport.pending(to_b) == 0
        });
        println!("{loss}: {ROUNDS} messages and writes in {} ms", start.elapsed().as_millis());
        assert!(b.notified().into_iter().eq(0..ROUNDS as u32));
        assert!(b.messages().into_iter().enumerate().all(|(i, message)| message == pattern(1 + 97 * i, i)));
        assert!(bytes(&landing, 0, LEN / 2) == pattern(LEN / 2, 1));
        assert_eq!((a.closed(), b.closed()), (vec![], vec![]));
    }
    // Some were lost indeed.
    wire.suffers("for net in $NET_A $NET_B; do tc -s qdisc show dev $net; done | grep 'dropped [1-9]'");
}

/// Ends the child even if the test fails.
struct Reaped(Child);

impl Drop for Reaped {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
#[ignore = "in the guest of scripts/softroce"]
fn a_killed_peer_is_gone() {
    let mut node = at(0);
    let (_landing, _, key) = node.target(LEN);
    let hex: String = key.0.iter().map(|byte| format!("{byte:02x}")).collect();
    let mut child = Reaped(
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "guest::peer", "--ignored", "--test-threads=1"])
            .env(ORDERS, format!("{} {hex}", node.transport.address()))
            .stdout(Stdio::null())
            .spawn()
            .unwrap(),
    );
    drive([&mut node], |[node]| node.notified().len() > 50);
    let peer = node.accepted()[0];
    child.0.kill().unwrap();
    let start = Instant::now();
    // Asleep: the death has to wake it.
    while node.closed().is_empty() {
        node.transport.wait(Duration::from_secs(60)).unwrap();
        node.poll();
    }
    println!("gone {} ms after the kill", start.elapsed().as_millis());
    assert!(start.elapsed() < Duration::from_secs(10));
    assert_eq!(node.closed(), [(peer, Error::PeerGone)]);
    works_anew(&mut at(1), &mut node);
}

#[test]
#[ignore = "the peer that a test of the guest starts and kills"]
fn peer() {
    let Ok(orders) = std::env::var(ORDERS) else { return };
    let (address, hex) = orders.split_once(' ').unwrap();
    let key = (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(&hex[i..i + 2], 16).unwrap()).collect();
    let key = RemoteKey(key);
    let mut node = at(1);
    let (_source, local) = node.region(LEN, Access::LocalOnly);
    let to = node.transport.connect(&Address(address.into()), b"child").unwrap();
    drive([&mut node], |[node]| {
        while node.transport.pending(to) < 8 {
            if node.transport.write(to, write(local, LEN as u64, &key, Some(1))).is_err() {
                return true;
            }
        }
        !node.closed().is_empty()
    });
}

#[test]
#[ignore = "in the guest of scripts/softroce"]
fn a_broken_queue_pair_ends_its_connection_alone() {
    let (mut a, mut b) = (at(0), at(1));
    let (first, first_at_b) = join(&mut a, &mut b, b"first");
    let (second, second_at_b) = join(&mut a, &mut b, b"second");
    works(&mut a, &mut b, first, first_at_b);
    a.transport.break_queue_pair(first).unwrap();
    // It may be noticed before.
    let _ = a.transport.send(first, b"into the void");
    let (ours, theirs) = ends(&mut a, &mut b, first, first_at_b);
    assert_lost(&ours, "rxe0:1");
    assert_eq!(theirs, Error::PeerGone);
    works(&mut a, &mut b, second, second_at_b);
    works_anew(&mut a, &mut b);
}

#[test]
#[ignore = "in the guest of scripts/softroce"]
fn a_stale_key_writes_nothing() {
    let (mut a, mut b) = (at(0), at(1));
    let (to_b, to_a) = join(&mut a, &mut b, b"a");
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
    println!("writer: {at_a}; owner: {at_b}");
    assert!(matches!(at_a, Error::Lost(_) | Error::PeerGone), "{at_a:?}");
    // Its device says nothing of it; the queue pair's state does.
    assert!(matches!(at_b, Error::Protocol(_)), "{at_b:?}");
    assert_eq!((a.transport.stats().protocol_errors, b.transport.stats().protocol_errors), (0, 1));
    assert_eq!((bytes(&landing, 0, LEN), b.notified()), (vec![0; LEN], vec![1]));
    works_anew(&mut a, &mut b);
}
