//! Connections that come and go under traffic leave nothing behind and lose
//! nothing that the next one needs.

use distkv_fabric::{Access, Transport};

use crate::hand::Hand;
use crate::node::{drive, join, pattern, write};
use crate::rig::living;
use crate::world::{config, devices, pair, works};

#[test]
fn two_hundred_connections_lose_no_receive_and_leave_nothing() {
    let _devices = devices();
    let before = living();
    const LEN: usize = 300_000;
    let (mut a, mut b, first, first_at_b) = pair(&config());
    let (_at_b, _, key) = b.target(LEN);
    let (_source, local) = a.region(LEN, Access::LocalOnly);
    a.transport.disconnect(first);
    drive([&mut a, &mut b], |[_, b]| b.closed().len() == 1);
    assert_eq!(b.closed()[0].0, first_at_b);
    for round in 0..200usize {
        let (to_b, to_a) = join(&mut a, &mut b, b"once more");
        (a.seen, b.seen) = (Vec::new(), Vec::new());
        for i in 0..40 {
            a.transport.send(to_b, &pattern(1 + 523 * i, i)).unwrap();
            b.transport.send(to_a, &pattern(1 + 311 * i, i)).unwrap();
            a.transport.write(to_b, write(local, (LEN * (i % 3) / 2) as u64, &key, Some(i as u32))).unwrap();
        }
        // It ends while they are on their way, at another point each time.
        let most = round % 41;
        drive([&mut a, &mut b], |[_, b]| b.notified().len() >= most);
        match round % 4 {
            0 => a.transport.disconnect(to_b),
            1 => b.transport.disconnect(to_a),
            2 => a.transport.break_queue_pair(to_b).unwrap(),
            _ => b.transport.break_queue_pair(to_a).unwrap(),
        }
        drive([&mut a, &mut b], |[a, b]| match round % 4 {
            0 => !b.closed().is_empty(),
            1 => !a.closed().is_empty(),
            _ => !a.closed().is_empty() && !b.closed().is_empty(),
        });
        assert!(b.messages().iter().enumerate().all(|(i, m)| *m == pattern(1 + 523 * i, i)), "in order");
        assert!(b.notified().into_iter().eq(0..b.notified().len() as u32), "in order");
    }
    let (to_b, to_a) = join(&mut a, &mut b, b"the last");
    works(&mut a, &mut b, to_b, to_a);
    b.transport.disconnect(to_a);
    drive([&mut a, &mut b], |[a, _]| !a.closed().is_empty());
    // Every receive is there: as many as some number of connections has.
    let mut hand = Hand::join(&mut b, b"hand");
    let receives = hand.fill_every_receive();
    assert!(receives > 0 && receives.is_multiple_of(40), "{receives} receives");
    drop((hand, a, b));
    assert_eq!(living(), before);
}
