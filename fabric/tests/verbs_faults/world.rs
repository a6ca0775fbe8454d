//! Transports over the software HCA, and what a test asks of them.

use std::sync::MutexGuard;

use distkv_fabric::secure::Secret;
use distkv_fabric::verbs::device::VerbsConfig;
use distkv_fabric::verbs::{Config, VerbsTransport};
use distkv_fabric::{Access, Error, PeerId, Transport};

use crate::node::{Node, bytes, drive, join, pattern, write};
use crate::rig;

pub type Verbs = Node<VerbsTransport>;

/// The devices for one test, as new before and after.
pub struct Devices {
    _alone: MutexGuard<'static, ()>,
}

pub fn devices() -> Devices {
    Devices { _alone: rig::alone() }
}

impl Drop for Devices {
    fn drop(&mut self) {
        for device in 0..2 {
            rig::knob("software_hca_cut", (device, 0));
            rig::knob("software_hca_port", (device, 1));
            rig::knob("software_hca_silent", (device, 0));
        }
    }
}

pub fn secret() -> Secret {
    Secret::new([7; 32])
}

/// One rail over soft0 unless it is changed; a lost packet is given up after
/// 31 ms.
pub fn config() -> Config {
    let ports = VerbsConfig { devices: vec!["soft0".into()], timeout: 10, ..Default::default() };
    Config { ports, ..Default::default() }
}

/// Both devices, two rails.
pub fn two_rails() -> Config {
    let mut config = config();
    config.ports.devices = vec!["soft0".into(), "soft1".into()];
    config.ports.max_rails = 2;
    config
}

pub fn with(secret: Secret, config: Config) -> Verbs {
    let transport = VerbsTransport::over(rig::lib(), ([127, 0, 0, 1], 0).into(), secret, config).unwrap();
    Node { transport: Box::new(transport), seen: Vec::new() }
}

pub fn node(config: Config) -> Verbs {
    with(secret(), config)
}

/// Two nodes, connected; and how each names the other.
pub fn pair(config: &Config) -> (Verbs, Verbs, PeerId, PeerId) {
    let (mut a, mut b) = (node(config.clone()), node(config.clone()));
    let (to_b, to_a) = join(&mut a, &mut b, b"a");
    (a, b, to_b, to_a)
}

/// A message and a write with notification arrive in both directions.
pub fn works(a: &mut Verbs, b: &mut Verbs, to_b: PeerId, to_a: PeerId) {
    one_way(a, b, to_b);
    one_way(b, a, to_a);
}

fn one_way(from: &mut Verbs, to: &mut Verbs, peer: PeerId) {
    const LEN: usize = 100_000;
    let (landing, theirs, key) = to.target(LEN);
    let (source, ours) = from.region(LEN, Access::LocalOnly);
    source.write(0, &pattern(LEN, 3)).unwrap();
    let (messages, notified) = (to.messages_len(), to.notified().len());
    from.transport.send(peer, b"a word").unwrap();
    from.transport.write(peer, write(ours, LEN as u64, &key, Some(77))).unwrap();
    drive([from, to], |[_, to]| to.notified().len() > notified);
    assert_eq!((to.messages_len(), to.notified().last()), (messages + 1, Some(&77)));
    assert!(bytes(&landing, 0, LEN) == pattern(LEN, 3));
    drive([from, to], |[from, _]| from.transport.pending(peer) == 0);
    from.transport.deregister(ours).unwrap();
    to.transport.deregister(theirs).unwrap();
}

/// A new connection between them works.
pub fn works_anew(a: &mut Verbs, b: &mut Verbs) -> (PeerId, PeerId) {
    let (to_b, to_a) = join(a, b, b"again");
    works(a, b, to_b, to_a);
    (to_b, to_a)
}

/// Polls until each has lost that connection, once; the reasons.
pub fn ends(a: &mut Verbs, b: &mut Verbs, to_b: PeerId, to_a: PeerId) -> (Error, Error) {
    let of = |node: &Verbs, peer| -> Vec<Error> {
        node.closed().into_iter().filter(|(p, _)| *p == peer).map(|(_, reason)| reason).collect()
    };
    drive([a, b], |[a, b]| !of(a, to_b).is_empty() && !of(b, to_a).is_empty());
    for _ in 0..200 {
        a.poll();
        b.poll();
    }
    assert_eq!((of(a, to_b).len(), of(b, to_a).len()), (1, 1));
    assert_eq!(a.transport.send(to_b, b""), Err(Error::UnknownPeer(to_b)));
    assert_eq!(b.transport.send(to_a, b""), Err(Error::UnknownPeer(to_a)));
    (of(a, to_b).remove(0), of(b, to_a).remove(0))
}

/// Is the connection lost, for a reason that contains `what`?
#[track_caller]
pub fn assert_lost(reason: &Error, what: &str) {
    assert!(matches!(reason, Error::Lost(why) if why.contains(what)), "{reason:?}, not lost: {what}");
}
