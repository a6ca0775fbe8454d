//! The death of a peer's process. The test starts its own binary again as the
//! peer (the ignored test `child`), and kills it while it writes.

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use distkv_fabric::secure::{Secret, Security};
use distkv_fabric::select::Kind;
use distkv_fabric::{Access, Address, Error, RemoteKey};

use crate::node::{Node, Seen, drive, join, rounds, write};

/// Tells the child what to do: kind, address and key.
const ORDERS: &str = "DISTKV_TEST_PEER";
const LEN: usize = 256 << 10;

fn make(kind: Kind) -> Node {
    let security = Security::Sealed(Secret::new([1; 32]));
    Node { transport: kind.bind(([127, 0, 0, 1], 0).into(), &security.into()).unwrap(), seen: Vec::new() }
}

/// Ends the child even if the test fails.
struct Reaped(Child);

impl Drop for Reaped {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn a_killed_peer_is_seen_as_closed(kind: Kind) {
    let mut node = make(kind);
    let (_landing, _, key) = node.target(LEN);
    let hex: String = key.0.iter().map(|byte| format!("{byte:02x}")).collect();
    let mut child = Reaped(
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "death::child", "--ignored", "--test-threads=1"])
            .env(ORDERS, format!("{kind} {} {hex}", node.transport.address()))
            .stdout(Stdio::null())
            .spawn()
            .unwrap(),
    );
    // It writes and writes.
    drive([&mut node], |[node]| node.notified().len() > rounds(1000));
    child.0.kill().unwrap();
    child.0.wait().unwrap();
    // Asleep whenever nothing is there: the death itself has to wake it.
    while node.closed().is_empty() {
        node.transport.wait(Duration::from_secs(3600)).unwrap();
        node.poll();
    }
    for _ in 0..1000 {
        node.poll();
    }
    let peer = node.accepted()[0];
    assert_eq!(node.closed(), [(peer, Error::PeerGone)]);
    assert!(matches!(node.seen.last(), Some(Seen::Closed(..))), "and nothing after it");
    assert_eq!(node.transport.send(peer, b""), Err(Error::UnknownPeer(peer)));
    // It goes on, and a spinning owner sees a death too.
    let mut other = make(kind);
    join(&mut other, &mut node, b"next");
    drop(other);
    drive([&mut node], |[node]| node.closed().len() == 2);
}

#[test]
fn tcp() {
    a_killed_peer_is_seen_as_closed(Kind::Tcp);
}

#[test]
fn shm() {
    a_killed_peer_is_seen_as_closed(Kind::Shm);
}

#[test]
#[ignore = "needs an RDMA device: scripts/softroce brings one"]
fn rdma() {
    a_killed_peer_is_seen_as_closed(Kind::Verbs);
}

#[test]
#[ignore = "the peer that the tests beside it start and kill"]
fn child() {
    let Ok(orders) = std::env::var(ORDERS) else { return };
    let [kind, address, hex] = orders.split(' ').collect::<Vec<_>>().try_into().unwrap();
    let key = (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(&hex[i..i + 2], 16).unwrap()).collect();
    let key = RemoteKey(key);
    let mut node = make(kind.parse().unwrap());
    let (_source, local) = node.region(LEN, Access::LocalOnly);
    let peer = node.transport.connect(&Address(address.into()), b"child").unwrap();
    drive([&mut node], |[node]| {
        // Until the parent kills it, or is gone itself.
        while node.transport.pending(peer) < 8 {
            if node.transport.write(peer, write(local, LEN as u64, &key, Some(1))).is_err() {
                return true;
            }
            let _ = node.transport.write(peer, write(local, 64, &key, Some(2)));
            node.poll();
        }
        !node.closed().is_empty()
    });
}
