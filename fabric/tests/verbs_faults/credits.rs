//! Receives come back to whoever filled them: on what goes the other way where
//! something does, by messages of their own otherwise, and in time.

use distkv_fabric::verbs::wire::MAX_NOTED;
use distkv_fabric::{Access, Transport};

use crate::node::{drive, pattern, write};
use crate::rig::requests;
use crate::world::{config, devices, pair};

#[test]
fn where_posts_are_answered_nothing_else_is_sent() {
    const ROUNDS: u32 = 500;
    let _devices = devices();
    let (mut a, mut b, to_b, to_a) = pair(&config());
    let (_at_a, _, key_of_a) = a.target(64);
    let (_at_b, _, key_of_b) = b.target(64);
    let (_from_a, of_a) = a.region(64, Access::LocalOnly);
    let (_from_b, of_b) = b.region(64, Access::LocalOnly);
    let mut before = requests();
    // The regions are opened by the first.
    for round in 0..=ROUNDS {
        a.transport.write(to_b, write(of_a, 64, &key_of_b, Some(round))).unwrap();
        drive([&mut a, &mut b], |[_, b]| b.notified().len() as u32 > round);
        b.transport.write(to_a, write(of_b, 64, &key_of_a, Some(round))).unwrap();
        drive([&mut a, &mut b], |[a, _]| a.notified().len() as u32 > round);
        if round == 0 {
            before = requests();
        }
    }
    for _ in 0..ROUNDS {
        let seen = (a.messages_len(), b.messages_len());
        a.transport.send(to_b, b"a word").unwrap();
        drive([&mut a, &mut b], |[_, b]| b.messages_len() > seen.1);
        b.transport.send(to_a, &pattern(300, 1)).unwrap();
        drive([&mut a, &mut b], |[a, _]| a.messages_len() > seen.0);
    }
    let after = requests();
    assert_eq!(after.0 - before.0, u64::from(4 * ROUNDS));
    assert_eq!(after.1, before.1, "an empty queue was met");
    assert!(a.closed().is_empty() && b.closed().is_empty());
}

/// One way only, or both at once, and with notifications that no immediate holds:
/// all arrives in order, and nobody within his credits meets an empty queue.
#[test]
fn a_flood_gets_its_receives_back_in_time() {
    const POSTS: u32 = 3000;
    let _devices = devices();
    for both in [false, true] {
        let (mut a, mut b, to_b, to_a) = pair(&config());
        let (_at_a, _, key_of_a) = a.target(4096);
        let (_at_b, _, key_of_b) = b.target(4096);
        let (_from_a, of_a) = a.region(4096, Access::LocalOnly);
        let (_from_b, of_b) = b.region(4096, Access::LocalOnly);
        let (_, before) = requests();
        let notify = |i: u32| if i.is_multiple_of(3) { u32::MAX - i } else { MAX_NOTED + 1 - i };
        let all = |posts: u32| if both { posts } else { 0 };
        let (mut by_a, mut by_b) = (0, 0);
        drive([&mut a, &mut b], |[a, b]| {
            let a_posts = (&mut by_a, &mut **a, to_b, of_a, &key_of_b, POSTS);
            let b_posts = (&mut by_b, &mut **b, to_a, of_b, &key_of_a, all(POSTS));
            for (done, node, to, of, key, most) in [a_posts, b_posts] {
                // A message and a write in turns, as many as there is room for.
                while *done < 2 * most {
                    let i = *done / 2;
                    let posted = match done.is_multiple_of(2) {
                        true => node.transport.send(to, &pattern(i as usize % 900, 1)),
                        false => node.transport.write(to, write(of, u64::from(i % 5) * 1000, key, Some(notify(i)))),
                    };
                    if posted.is_err() {
                        break;
                    }
                    *done += 1;
                }
            }
            b.notified().len() == POSTS as usize && a.notified().len() == all(POSTS) as usize
        });
        assert!(b.notified().into_iter().eq((0..POSTS).map(notify)));
        assert!(a.notified().into_iter().eq((0..all(POSTS)).map(notify)));
        assert_eq!(requests().1, before, "an empty queue was met");
        assert!(a.closed().is_empty() && b.closed().is_empty());
    }
}
