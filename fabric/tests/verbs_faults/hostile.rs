//! Members of the cluster that break the protocol: each loses its connection,
//! is counted, and has changed nothing but what it may write.

use std::sync::Arc;
use std::time::{Duration, Instant};

use distkv_fabric::verbs::wire::{Control, Landed, MAX_RIDING, Noted, Said, Target};
use distkv_fabric::{Access, Error, MAX_SEND, Memory, PeerId, RemoteKey, Transport, WriteGuard};

use crate::hand::{Hand, region};
use crate::node::{bytes, drive, join, pattern};
use crate::world::{Verbs, config, devices, node, works};

const LEN: usize = 8192;
/// What the guard lets through: the front.
const ALLOWED: u64 = 1024;
/// Bytes of a slot of a landing zone.
const SLOT: u32 = 256 << 10;

struct Front;

impl WriteGuard for Front {
    fn may_write(&self, _hello: &[u8], offset: u64, len: u64) -> bool {
        offset + len <= ALLOWED
    }
}

/// A host with a region of each kind, a peer that behaves, and one that will not.
struct Scene {
    host: Verbs,
    friend: Verbs,
    to_host: PeerId,
    to_friend: PeerId,
    open: (Arc<Memory>, RemoteKey),
    guarded: (Arc<Memory>, RemoteKey),
    hand: Hand,
}

/// What the regions hold before a test.
fn before() -> Vec<u8> {
    pattern(LEN, 5)
}

impl Scene {
    fn new() -> Self {
        let (mut host, mut friend) = (node(config()), node(config()));
        let (to_host, to_friend) = join(&mut friend, &mut host, b"friend");
        let mut make = |access: Access| {
            let (memory, region) = host.region(LEN, access);
            memory.write(0, &before()).unwrap();
            (memory, host.transport.remote_key(region).unwrap())
        };
        let (open, guarded) = (make(Access::RemoteWrite), make(Access::Guarded(Arc::new(Front))));
        let hand = Hand::join(&mut host, b"hand");
        Self { host, friend, to_host, to_friend, open, guarded, hand }
    }

    /// Opens the guarded region; address and key of the landing zone.
    fn zone(&mut self) -> (u64, u32) {
        let target = self.hand.opens(&mut self.host, &self.guarded.1);
        let Target::Landing { address, rkey, slot: SLOT, slots: 8 } = target else { panic!("{target:?}") };
        (address, rkey)
    }

    /// Opens the other region.
    fn window(&mut self) -> (u64, u32) {
        let target = self.hand.opens(&mut self.host, &self.open.1);
        let Target::Region { address, rkey, size } = target else { panic!("{target:?}") };
        assert_eq!(size, LEN as u64);
        (address, rkey)
    }

    fn landed(&self, offset: u64, len: u32) -> Landed {
        Landed { region: region(&self.guarded.1), offset, len, notify: Some(1) }
    }

    /// The hand has done it: it alone is closed, for that cause, and counted.
    fn end_of_the_hand(mut self, cause: &str) {
        let (peer, errors) = (self.hand.peer, self.host.transport.stats().protocol_errors);
        drive([&mut self.host, &mut self.friend], |[host, _]| !host.closed().is_empty());
        for _ in 0..200 {
            self.host.poll();
            self.friend.poll();
        }
        assert_eq!(self.host.closed(), [(peer, Error::Protocol(cause.into()))]);
        assert_eq!(self.host.transport.stats().protocol_errors, errors + 1);
        assert_eq!(
            (self.host.messages_len(), self.host.notified(), self.friend.closed()),
            (0, vec![], vec![]),
            "{cause}"
        );
        for (memory, _) in [&self.open, &self.guarded] {
            assert!(bytes(memory, 0, LEN) == before(), "{cause}: a byte was changed");
        }
        let Self { mut host, mut friend, to_host, to_friend, hand, .. } = self;
        works(&mut friend, &mut host, to_host, to_friend);
        drop(hand);
        let next = Hand::join(&mut host, b"next").peer;
        drive([&mut host], |[host]| host.closed().iter().any(|(p, why)| *p == next && *why == Error::PeerGone));
    }
}

const LANDED: Said = Said::Landed { receives: 0 };

/// A piece of a message that returns nothing.
fn piece(rest: u32) -> Said {
    Said::Piece { rest, receives: 0 }
}

/// What the hand does.
type Act = fn(&mut Scene);

/// A scene, what the hand does in it, and what it is thrown out for.
fn thrown_out(acts: &[(&str, Act)]) {
    let _devices = devices();
    for (cause, act) in acts {
        let mut scene = Scene::new();
        act(&mut scene);
        scene.end_of_the_hand(cause);
    }
}

#[test]
fn a_peer_by_hand_that_behaves_is_served() {
    let _devices = devices();
    let mut scene = Scene::new();
    let (zone, window) = (scene.zone(), scene.window());
    scene.hand.says_by_send(piece(0), b"whole");
    scene.hand.says_by_send(piece(3), b"in ");
    scene.hand.says_by_send(piece(0), b"two");
    scene.hand.writes((window.0 + 100, window.1), b"straight");
    scene.hand.notifies(7);
    scene.hand.writes(zone, b"landed");
    let landed = Landed { notify: Some(8), ..scene.landed(10, 6) };
    scene.hand.tells(landed);
    scene.hand.says_by_send(Said::Notified { receives: 0 }, &u32::MAX.to_le_bytes());
    drive([&mut scene.host], |[host]| host.notified().len() == 3);
    assert_eq!(scene.host.messages(), [b"whole".to_vec(), b"in two".to_vec()]);
    assert_eq!(scene.host.notified(), [7, 8, u32::MAX]);
    let [mut open, mut guarded] = [before(), before()];
    open[100..108].copy_from_slice(b"straight");
    guarded[10..16].copy_from_slice(b"landed");
    assert!(bytes(&scene.open.0, 0, LEN) == open && bytes(&scene.guarded.0, 0, LEN) == guarded);
    assert_eq!((scene.host.closed(), scene.host.transport.stats().protocol_errors), (vec![], 0));
}

#[test]
fn whoever_overdraws_its_credits_end_of_the_hand() {
    thrown_out(&[("more posts than there were credits for", |scene| {
        // Within a message, so that the host has nothing to hand out.
        for rest in (100..133).rev() {
            scene.hand.says_by_send(piece(rest), b"x");
        }
    })]);
}

#[test]
fn whoever_returns_what_it_has_not_end_of_the_hand() {
    const NOT_FILLED: &str = "receives returned that were not filled";
    thrown_out(&[
        (NOT_FILLED, |s| {
            s.hand.says_by_send(Said::Credits { receives: 1, slots: 0 }, b"");
        }),
        // Or has it ride on what it says.
        (NOT_FILLED, |s| s.hand.says_by_send(Said::Piece { rest: 0, receives: 1 }, b"x")),
        (NOT_FILLED, |s| s.hand.says_by_send(Said::Notified { receives: 1 }, &[7; 4])),
        (NOT_FILLED, |s| s.hand.notifies(Noted { notify: 7, receives: MAX_RIDING }.encode())),
        (NOT_FILLED, |s| {
            let zone = s.zone();
            s.hand.writes(zone, b"0123");
            let landed = s.landed(0, 1).encode();
            s.hand.says_by_send(Said::Landed { receives: 1 }, &landed);
        }),
        ("slots of a landing zone that there is not", |s| {
            s.hand.says_by_send(Said::Credits { receives: 0, slots: 1 }, b"");
        }),
        ("credits that return nothing", |s| s.hand.says_by_send(Said::Credits { receives: 0, slots: 0 }, b"")),
        ("credits with a payload", |s| s.hand.says_by_send(Said::Credits { receives: 1, slots: 0 }, b"x")),
    ]);
}

#[test]
fn a_corrupt_immediate_end_of_the_hand() {
    const NOTHING: &str = "an immediate that says nothing known";
    thrown_out(&[
        (NOTHING, |s| s.hand.sends(3 << 30 | 1, &[0; 4])),
        (NOTHING, |s| s.hand.sends(u32::MAX, b"x")),
        (NOTHING, |s| s.hand.sends(MAX_SEND as u32 + 1, b"x")),
        (NOTHING, |s| s.hand.sends(1 << 30 | 1 << 24 | 1, b"")),
        (NOTHING, |s| s.hand.sends(2 << 30 | 1, &[0; 24])),
        ("a notification of another length", |s| s.hand.says_by_send(Said::Notified { receives: 0 }, &[0; 3])),
        ("a notification of another length", |s| s.hand.says_by_send(Said::Notified { receives: 0 }, &[0; 5])),
        ("a post that says nothing", |s| s.hand.sends_plainly(b"x")),
    ]);
}

#[test]
fn pieces_that_make_no_message_are_thrown_out() {
    const NONE: &str = "pieces that do not make a message";
    thrown_out(&[
        (NONE, |s| s.hand.says_by_send(piece(10), b"")),
        (NONE, |s| {
            s.hand.says_by_send(piece(10), b"12345");
            s.hand.says_by_send(piece(6), b"12345");
        }),
        (NONE, |s| {
            s.hand.says_by_send(piece(10), b"12345");
            s.hand.says_by_send(piece(0), b"12345");
        }),
        (NONE, |s| {
            s.hand.says_by_send(piece(10), b"12345");
            s.hand.says_by_send(piece(10), b"");
        }),
        ("a message over the limit", |s| s.hand.says_by_send(piece(MAX_SEND as u32), b"1")),
        ("a notification within a message", |s| {
            s.hand.says_by_send(piece(10), b"12345");
            s.hand.notifies(1);
        }),
        ("a notification within a message", |s| {
            s.hand.says_by_send(piece(10), b"12345");
            s.hand.says_by_send(Said::Notified { receives: 0 }, &[1; 4]);
        }),
        ("a write within a message", |s| {
            s.zone();
            s.hand.says_by_send(piece(10), b"12345");
            s.hand.tells(s.landed(0, 1));
        }),
    ]);
}

#[test]
fn a_false_note_of_what_landed_end_of_the_hand() {
    const CLOSED: &str = "write to a region that is not, or no longer, open";
    const MALFORMED: &str = "a malformed note of what landed";
    const OUTSIDE: &str = "write to a range outside the region";
    thrown_out(&[
        ("a write to a landing zone that there is not", |s| s.hand.tells(s.landed(0, 1))),
        ("a write longer than its slot", |s| {
            let zone = s.zone();
            s.hand.writes(zone, b"0123");
            s.hand.tells(s.landed(0, SLOT + 1));
        }),
        ("a write longer than its slot", |s| {
            s.zone();
            s.hand.tells(s.landed(0, u32::MAX));
        }),
        (CLOSED, |s| {
            s.zone();
            s.hand.tells(Landed { region: 12345, ..s.landed(0, 1) });
        }),
        // One that is there, and is not opened to it.
        (CLOSED, |s| {
            s.zone();
            s.hand.tells(Landed { region: region(&s.open.1), ..s.landed(0, 1) });
        }),
        // One that is opened to it by another way.
        (CLOSED, |s| {
            s.zone();
            s.window();
            s.hand.tells(Landed { region: region(&s.open.1), ..s.landed(0, 1) });
        }),
        (OUTSIDE, |s| {
            s.zone();
            s.hand.tells(s.landed(LEN as u64, 1));
        }),
        (OUTSIDE, |s| {
            s.zone();
            s.hand.tells(s.landed(u64::MAX, 64));
        }),
        (OUTSIDE, |s| {
            s.zone();
            s.hand.tells(s.landed(LEN as u64 - 1, 2));
        }),
        ("write to a range that its guard refuses", |s| {
            let zone = s.zone();
            s.hand.writes(zone, b"0123");
            s.hand.tells(s.landed(ALLOWED - 1, 2));
        }),
        (MALFORMED, |s| {
            s.zone();
            s.hand.says_by_send(LANDED, &[0; 25]);
        }),
        ("a control message that is too short", |s| {
            s.zone();
            s.hand.says_by_send(LANDED, &[0; 23]);
        }),
    ]);
}

#[test]
fn a_key_of_another_or_of_nobody_opens_nothing() {
    const NOT_ALLOWED: &str = "a write that its key does not allow";
    thrown_out(&[
        // Past the end of what it may write.
        (NOT_ALLOWED, |s| {
            let (address, rkey) = s.window();
            s.hand.writes((address + LEN as u64 - 1, rkey), b"01");
        }),
        (NOT_ALLOWED, |s| {
            let (address, rkey) = s.zone();
            s.hand.writes((address + 8 * u64::from(SLOT), rkey), b"0");
        }),
        (NOT_ALLOWED, |s| {
            let (address, rkey) = s.window();
            s.hand.writes((address, rkey ^ 1), b"0");
        }),
        ("write to a forged key", |s| s.hand.says(&Control::Open { region: region(&s.open.1), token: [9; 16] })),
    ]);
}

#[test]
fn the_window_of_another_connection_opens_nothing() {
    let _devices = devices();
    for zone in [false, true] {
        let mut scene = Scene::new();
        let (address, rkey) = if zone { scene.zone() } else { scene.window() };
        // What one was given is tried by another.
        let other = Hand::join(&mut scene.host, b"other");
        let first = std::mem::replace(&mut scene.hand, other);
        scene.hand.writes((address, rkey), b"stolen");
        let mut owner = first;
        // The owner of the window still has it.
        owner.writes((address, rkey), &before()[..6]);
        owner.notifies(5);
        drive([&mut scene.host], |[host]| host.notified() == [5]);
        scene.host.seen.retain(|seen| !matches!(seen, crate::node::Seen::Notified(..)));
        scene.end_of_the_hand("a write that its key does not allow");
        drop(owner);
    }
}

#[test]
fn control_messages_out_of_turn_are_thrown_out() {
    const TURN: &str = "a control message out of turn";
    thrown_out(&[
        (TURN, |s| s.hand.says(&s.hand.offer(b"again"))),
        (TURN, |s| s.hand.says(&Control::Answer(s.hand.endpoint()))),
        (TURN, |s| s.hand.says(&Control::Ready)),
        (TURN, |s| s.hand.says(&Control::ReadyAck)),
        (TURN, |s| {
            s.hand.says(&Control::Bye { posts: 1000 });
            s.hand.says(&Control::Bye { posts: 1000 });
        }),
        ("an answer that was not asked for", |s| {
            let target = Target::Region { address: 0, rkey: 0, size: 1 };
            s.hand.says(&Control::Opened { region: 1, target });
        }),
        ("a region that was opened before", |s| {
            s.window();
            let token = s.open.1.0[14..].try_into().unwrap();
            s.hand.says(&Control::Open { region: region(&s.open.1), token });
        }),
    ]);
}

#[test]
fn a_bye_in_the_middle_ends_the_connection() {
    let _devices = devices();
    for posts in [0, 1, 2, u64::MAX] {
        let mut scene = Scene::new();
        scene.hand.says_by_send(piece(10), b"12345");
        scene.hand.says(&Control::Bye { posts });
        // Posts that it told of and does not send are not waited for without end.
        let start = Instant::now();
        drive([&mut scene.host], |[host]| !host.closed().is_empty());
        assert!(start.elapsed() < Duration::from_secs(8));
        assert_eq!(scene.host.closed(), [(scene.hand.peer, Error::PeerGone)]);
        assert_eq!(scene.host.messages_len(), 0);
        let Scene { mut host, mut friend, to_host, to_friend, .. } = scene;
        works(&mut friend, &mut host, to_host, to_friend);
    }
}

#[test]
fn a_bye_within_the_handshake_ends_it() {
    let _devices = devices();
    let mut host = node(config());
    for offered in [false, true] {
        let mut hand = Hand::knock(&host);
        if offered {
            hand.says(&hand.offer(b"hand"));
        }
        hand.says(&Control::Bye { posts: 0 });
        let errors = host.transport.stats().protocol_errors;
        let start = Instant::now();
        while host.transport.stats().protocol_errors == errors {
            assert!(start.elapsed() < Duration::from_secs(10));
            host.poll();
            let _ = hand.link.receive(&mut Vec::new()).and_then(|_| hand.link.flush());
        }
    }
    assert_eq!((host.accepted(), host.closed()), (vec![], vec![]), "the owner hears nothing of strangers");
    Hand::join(&mut host, b"next");
}
