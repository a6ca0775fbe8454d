//! One case at a time: what may happen between two or three nodes.

use proptest::prelude::*;

use super::network::{LEASE, Plan, World, gossip, ms};
use super::shape;
use crate::control::controller::{BorrowError, Config, ConfigError, Controller, Input, Note};
use crate::control::message::{BlockRange, Digest, Message, Packet, Refusal, Renewal, Role, Service};
use crate::control::plan::{Held, Place, Reason};
use crate::control::rmanager::{PoolSource, RManager};
use crate::control::row::{MAX_ADDRESS, Profile, Row, Stamp, Tier, TierRow};
use crate::control::seal::Seal;
use crate::control::swim::{Change, Member, Swim};
use crate::kv::rblock::{InstanceId, LoanId};
use crate::kv::table::Owner;

/// Nodes that know each other, `blocks[i]` at node i.
fn cluster(seed: u64, blocks: &[u32]) -> World {
    let mut world = World::new(seed);
    for (i, blocks) in blocks.iter().enumerate() {
        world.start(Plan::new(&format!("node-{i}"), &["node-0"], *blocks));
    }
    world.run_for(ms(3000));
    world.check_quiet();
    world
}

fn dropped(world: &World, node: usize, why: &str) -> bool {
    let dropped = |note: &Note| matches!(note, Note::Dropped { reason, .. } if reason.contains(why));
    world.nodes[node].notes.iter().any(dropped)
}

fn hello(instance: u64) -> Message {
    Message::Hello { cluster: [1; 16], instance: InstanceId(instance) }
}

fn profile(address: &str) -> Profile {
    Profile {
        role: Role::Engine,
        model: None,
        host: 1,
        rank: 0,
        control: vec![address.into()],
        creditor: vec!["somewhere".into()],
        http: String::new(),
        peers: None,
    }
}

fn bytes(message: &Message) -> Vec<u8> {
    let mut bytes = Vec::new();
    message.encode(&mut bytes);
    bytes
}

#[test]
fn joining_any_member_introduces_the_rest() {
    let mut world = World::new(1);
    for i in 0..6 {
        // A chain: everybody knows only the one before.
        let before = format!("node-{}", i32::max(i - 1, 0));
        world.start(Plan::new(&format!("node-{i}"), &[&before], 8));
    }
    world.run_for(ms(3000));
    world.check_quiet();
    let view = world.nodes[3].control.view(world.now);
    assert_eq!((view.instances.len(), view.links.len()), (6, 0), "nobody has had to say anything to anybody");
    assert!(view.instances[0].me && view.instances.iter().all(|i| i.row.is_some()));
    let json = serde_json::to_value(&view).unwrap();
    assert_eq!(json["instances"][0]["row"]["service"], "serving");
    assert_eq!(serde_json::from_value::<crate::control::view::LedgerView>(json).unwrap(), view);
}

#[test]
fn two_nodes_that_dial_each_other_at_once_both_get_through() {
    for seed in 0..50 {
        let mut world = World::new(seed);
        world.start(Plan::new("a", &["b"], 8));
        world.start(Plan::new("b", &["a"], 8));
        world.run_for(ms(3000));
        for node in 0..2 {
            world.input(node, Input::Borrow { request: 1, blocks: 2, avoid: &[], only: None });
        }
        world.run_for(ms(500));
        assert!(world.log.matches("PeerAccepted").count() == 2, "both were dialed");
        assert!(world.nodes.iter().all(|n| n.loans.len() == 1), "seed {seed}");
    }
}

#[test]
fn a_node_that_is_told_to_join_itself_stays_alone() {
    let mut world = World::new(1);
    world.start(Plan::new("node-0", &["node-0"], 8));
    world.run_for(ms(10_000));
    assert_eq!(world.nodes[0].control.members(), 0);
    assert!(!world.log.contains("Datagram"));
}

#[test]
fn who_has_another_name_or_another_key_is_not_heard() {
    let mut world = World::new(1);
    world.start(Plan::new("node-0", &[], 8));
    world.start(Plan { cluster: 2, ..Plan::new("node-1", &["node-0"], 8) });
    world.run_for(ms(5000));
    assert_eq!((world.nodes[0].control.members(), world.nodes[1].control.members()), (0, 0));
    let stats = world.nodes[0].control.stats();
    assert!(stats.unsealed > 0 && stats.garbage == 0);
    assert!(!world.log.contains(" 0 > Datagram"), "the stranger is not even answered");
    // Nor does a connection help.
    let conn = world.stranger(0);
    let foreign = bytes(&Message::Hello { cluster: [2; 16], instance: InstanceId(9) });
    world.input(0, Input::PeerMessage { conn, bytes: &foreign });
    assert!(!world.is_open(conn) && world.nodes[0].control.stats().foreign == 1);
}

#[test]
fn a_creditor_is_down_within_two_seconds_and_a_cut_one_returns() {
    let mut world = cluster(1, &[8, 40, 40, 40, 40]);
    world.input(0, Input::Borrow { request: 1, blocks: 20, avoid: &[], only: None });
    world.run_for(ms(500));
    let creditor = world.nodes.iter().position(|n| n.control.rmanager().lent() > 0).unwrap();
    world.cut.push(creditor);
    world.run_for(ms(2000));
    assert!(world.nodes[0].loans.is_empty() && world.nodes[0].lost.len() == 1, "its KV is out of reach");
    assert!(!world.up(0, creditor));
    assert_eq!(world.nodes[creditor].control.rmanager().lent(), 20, "it does not know why nothing comes");
    world.run_for(LEASE);
    assert_eq!(world.nodes[creditor].control.rmanager().lent(), 0, "the lease is over");
    world.cut.clear();
    world.run_for(ms(6000));
    world.check_quiet();
    assert!(world.nodes[creditor].notes.iter().any(|note| matches!(note, Note::Renewed(_))));
    world.input(0, Input::Borrow { request: 2, blocks: 60, avoid: &[], only: None });
    world.run_for(ms(500));
    assert!(world.nodes[0].loans[&2].iter().any(|l| l.creditor == world.nodes[creditor].instance), "it lends again");
}

#[test]
fn a_mirror_is_not_borrowed_where_the_original_lies() {
    let mut world = cluster(1, &[8, 40, 40]);
    world.input(0, Input::Borrow { request: 1, blocks: 10, avoid: &[], only: None });
    world.run_for(ms(500));
    let first = world.nodes[0].loans[&1][0].creditor;
    world.input(0, Input::Borrow { request: 1, blocks: 10, avoid: &[first], only: None });
    world.run_for(ms(500));
    assert_ne!(world.nodes[0].loans[&1][1].creditor, first);
    world.input(0, Input::Borrow { request: 2, blocks: 20, avoid: &[first], only: None });
    world.run_for(ms(500));
    assert_eq!(world.nodes[0].refused, [2], "rather none than one in the same place");
}

#[test]
fn garbage_costs_the_connection_and_nothing_else() {
    let mut world = cluster(1, &[32, 32]);
    let before_hello = bytes(&Message::Heard { sent_us: 1 });
    let truncated = bytes(&hello(9))[..20].to_vec();
    let future = vec![99, 1, 2, 3];
    for message in [b"GET / HTTP/1.1\r\n\r\n".to_vec(), Vec::new(), before_hello, truncated, future] {
        let conn = world.stranger(0);
        let garbage = world.nodes[0].control.stats().garbage;
        world.input(0, Input::PeerMessage { conn, bytes: &message });
        assert!(!world.is_open(conn));
        assert_eq!(world.nodes[0].control.stats().garbage, garbage + 1);
    }
    assert!(dropped(&world, 0, "version 99"), "says what to do");
    // Who says nothing at all is shown the door too.
    let silent = world.stranger(0);
    world.run_for(ms(2500));
    assert!(!world.is_open(silent));
    world.check_quiet();
}

#[test]
fn a_restarted_node_replaces_its_earlier_life() {
    let mut world = cluster(1, &[32, 32]);
    let (first, known) = (world.nodes[1].instance, world.nodes[1].plan.clone());
    world.input(1, Input::Borrow { request: 1, blocks: 4, avoid: &[], only: None });
    world.run_for(ms(500));
    assert_eq!(world.nodes[0].control.rmanager().lent(), 4);
    // The old process is dead, and nobody has said so.
    world.nodes[1].alive = false;
    let second = world.start(known);
    world.run_for(ms(1500));
    assert!(world.nodes[0].notes.contains(&Note::Down(first)));
    assert!(world.up(0, second) && !world.up(0, 1));
    assert_eq!(world.nodes[0].control.rmanager().lent(), 0, "it cannot write any more: its loans went with it");
    world.check_quiet();
}

#[test]
fn a_message_to_an_earlier_life_does_not_reach_the_next() {
    let mut world = cluster(1, &[8, 40]);
    let known = world.nodes[1].plan.clone();
    world.nodes[1].alive = false;
    world.start(Plan { join: Vec::new(), ..known });
    // Before the news has come, it asks the creditor that it believes to be there.
    world.input(0, Input::Borrow { request: 1, blocks: 4, avoid: &[], only: None });
    world.run_for(ms(150));
    assert!(dropped(&world, 0, "another instance"), "{:?}", world.nodes[0].notes);
    assert_eq!(world.nodes[2].control.rmanager().lent(), 0);
    world.run_for(ms(2000));
    assert_eq!(world.nodes[0].refused, [1]);
}

#[test]
fn the_freest_creditor_is_asked_first_and_several_share_what_one_cannot() {
    let mut world = cluster(1, &[8, 20, 40, 60]);
    world.input(0, Input::Borrow { request: 1, blocks: 30, avoid: &[], only: None });
    world.run_for(ms(300));
    let creditors = |world: &World, request| {
        let loans = &world.nodes[0].loans[&request];
        loans
            .iter()
            .map(|l| (world.nodes.iter().position(|n| n.instance == l.creditor).unwrap(), l.blocks.len()))
            .collect::<std::collections::BTreeMap<_, _>>()
    };
    assert_eq!(creditors(&world, 1), [(3, 30)].into(), "half of 60 may be lent");
    world.input(0, Input::Borrow { request: 2, blocks: 25, avoid: &[], only: None });
    world.run_for(ms(300));
    assert_eq!(creditors(&world, 2), [(1, 5), (2, 20)].into());
    // All or nothing: 5 are left in all.
    world.input(0, Input::Borrow { request: 3, blocks: 6, avoid: &[], only: None });
    world.run_for(ms(300));
    assert_eq!(world.nodes[0].refused, [3]);
    let view = world.nodes[0].control.view(world.now);
    assert_eq!(view.loans.iter().map(|l| l.blocks).sum::<u32>(), 55);
    assert!(world.log.contains("Short { wanted: 6, lendable: 5 }"));
    for request in [2, 1] {
        // (The harness checks after each step what the engine holds.)
        world.nodes[0].loans.remove(&request);
        world.input(0, Input::RepayRequest { request });
    }
    world.run_for(ms(300));
    world.check_quiet();
}

#[test]
fn a_stale_view_costs_a_refusal_and_the_next_is_asked() {
    let mut world = cluster(1, &[8, 40, 30]);
    // Node 1 fills up before its next heartbeat.
    let pool = world.nodes[1].pool.clone().unwrap();
    let mut local = Vec::new();
    assert!(pool.table().alloc_many(38, Owner::Sequence(1), &mut local));
    world.nodes[1].local = local;
    world.input(0, Input::Borrow { request: 1, blocks: 10, avoid: &[], only: None });
    world.run_for(ms(400));
    let refusal = Note::CreditorRefused(world.nodes[1].instance, Refusal::NoRoom);
    assert!(world.nodes[0].notes.contains(&refusal));
    assert_eq!(world.nodes[0].loans[&1][0].creditor, world.nodes[2].instance);
    world.check_quiet();
}

#[test]
fn a_creditor_that_dies_while_it_is_asked_has_refused() {
    let mut world = cluster(1, &[8, 40, 30]);
    world.input(0, Input::Borrow { request: 1, blocks: 10, avoid: &[], only: None });
    world.kill(1);
    world.run_for(ms(3000));
    assert_eq!(world.nodes[0].loans[&1][0].creditor, world.nodes[2].instance);
    world.check_quiet();
}

#[test]
fn a_lost_creditor_is_told_with_its_loans_and_its_debtor_goes_on() {
    let mut world = cluster(1, &[8, 40, 40]);
    world.input(0, Input::Borrow { request: 1, blocks: 30, avoid: &[], only: None });
    world.input(0, Input::Borrow { request: 2, blocks: 30, avoid: &[], only: None });
    world.run_for(ms(500));
    assert_eq!(world.nodes[0].refused, [2], "one request took from both, nothing is left");
    world.kill(1);
    world.run_for(ms(2500));
    let gone = world.nodes[1].instance;
    assert!(world.nodes[0].lost.iter().all(|l| l.creditor == gone) && world.nodes[0].lost.len() == 1);
    assert!(!world.nodes[0].creditors.contains_key(&gone));
    assert!(world.nodes[0].loans[&1].iter().all(|l| l.creditor == world.nodes[2].instance));
    world.check_quiet();
}

#[test]
fn a_loan_shrinks_at_its_debtors_word_and_what_is_free_again_is_lent_again() {
    let mut world = cluster(1, &[8, 40, 8]);
    let creditor = world.nodes[1].instance;
    world.input(0, Input::Borrow { request: 1, blocks: 18, avoid: &[], only: Some(creditor) });
    world.run_for(ms(300));
    let loan = world.nodes[0].loans[&1][0].clone();
    assert_eq!((loan.creditor, loan.blocks.len()), (creditor, 18), "nobody else was asked");
    world.input(0, Input::ShrinkLoan { creditor, loan: loan.loan, keep: 5 });
    world.nodes[0].loans.get_mut(&1).unwrap()[0].blocks.truncate(5);
    world.run_for(ms(300));
    assert_eq!(world.nodes[1].control.rmanager().lent(), 5);
    let record = world.nodes[1].control.rmanager().loans().next().unwrap().clone();
    assert_eq!(record.blocks, loan.blocks[..5]);
    world.input(2, Input::Borrow { request: 9, blocks: 15, avoid: &[], only: Some(creditor) });
    world.run_for(ms(300));
    assert_eq!(world.nodes[2].loans[&9][0].blocks.len(), 15);
    world.check_quiet();
}

#[test]
fn where_a_creditor_drains_its_debtor_plans_to_move_and_says_why() {
    let mut world = cluster(1, &[20, 40, 40]);
    world.input(0, Input::Borrow { request: 1, blocks: 15, avoid: &[], only: None });
    world.run_for(ms(300));
    let creditor = world.nodes[0].loans[&1][0].creditor;
    let at = world.nodes.iter().position(|n| n.instance == creditor).unwrap();
    let held = Held { request: 1, tokens: 100, local: 8, remote: [(creditor, 15)].into() };
    let plan = || Input::Plan { requests: vec![held.clone()], queue: Vec::new() };
    world.input(0, plan());
    assert!(world.nodes[0].moves.is_empty(), "{:?}", world.nodes[0].moves);
    world.input(at, Input::Drain);
    world.run_for(ms(500));
    world.input(0, plan());
    let other = world.nodes[3 - at].instance;
    assert_eq!(world.nodes[0].leaving, Some(creditor));
    let moves = &world.nodes[0].moves;
    assert_eq!(moves.iter().map(|m| m.blocks).sum::<u32>(), 15);
    assert!(moves.iter().all(|m| m.from == Place::At(creditor) && m.why == Reason::CreditorLeaves), "{moves:?}");
    assert!(moves.iter().any(|m| m.to == Place::At(other)), "{moves:?}");
    let decisions = world.nodes[0].control.view(world.now).decisions;
    assert_eq!(decisions[0].why, "creditor_leaves");
    assert_eq!(world.nodes[0].control.stats().planned_leaves, moves.len() as u64);
    // The same again is the same decision.
    world.input(0, plan());
    assert_eq!(world.nodes[0].control.view(world.now).decisions.len(), decisions.len());
}

#[test]
fn a_lost_debtor_gives_everything_back_even_if_nobody_says_so() {
    let mut world = cluster(1, &[8, 40]);
    world.input(0, Input::Borrow { request: 1, blocks: 20, avoid: &[], only: None });
    world.run_for(ms(500));
    assert_eq!(world.nodes[1].control.rmanager().lent(), 20);
    // The process hangs: its connections stay open, nothing comes.
    world.nodes[0].alive = false;
    world.run_for(LEASE + ms(500));
    assert_eq!(world.nodes[1].control.rmanager().lent(), 0);
    assert_eq!(world.nodes[1].control.stats().lapsed, 1);
}

/// One controller and a peer that is the test.
struct Played {
    world: World,
    conn: u64,
    swim: Swim,
    seal: Seal,
}

const PEER: &str = "the-peer";

impl Played {
    fn new() -> Self {
        let mut world = World::new(1);
        world.start(Plan::new("node-0", &[], 16));
        let me = Member { address: gossip(PEER), instance: InstanceId(u64::MAX), started: 5, life: 0 };
        let mut swim = Swim::new(me, 1);
        swim.announce(ms(0), gossip("node-0"));
        let conn = world.stranger(0);
        let mut played = Self { world, conn, swim, seal: Seal::new(&[0; 32], [1; 16]) };
        played.listen();
        played.row(1, |_| {});
        played.say(hello(u64::MAX));
        played
    }

    /// Lets the membership protocol have its say.
    fn listen(&mut self) {
        let mut changes: Vec<Change> = Vec::new();
        self.swim.tick(self.world.now, &mut changes);
        while let Some((_, bytes)) = self.swim.next_datagram() {
            self.post(&Packet::Swim(bytes));
        }
    }

    fn post(&mut self, packet: &Packet) {
        let mut plain = Vec::new();
        packet.encode(&mut plain);
        let sealed = self.seal.seal([3; 24], &plain);
        self.world.input(0, Input::Datagram { from: gossip(PEER), bytes: &sealed });
    }

    fn row(&mut self, version: u32, change: impl FnOnce(&mut Row)) {
        let mut row = Row {
            instance: InstanceId(u64::MAX),
            stamp: Stamp { incarnation: 0, version },
            profile: profile(PEER),
            service: Service::Serving,
            shape: Some(shape(2)),
            shapeable_bytes: 0,
            tiers: vec![TierRow { tier: Tier::Host, total: 100, free: 100, lent: 0, lend_cap: 100 }],
            debts: Vec::new(),
            borrowed: 0,
            running: 0,
            waiting: 0,
            wanted: 0,
            tokens_s: 0,
            perf: None,
            links: Vec::new(),
        };
        change(&mut row);
        self.post(&Packet::Rows(vec![row]));
    }

    fn say(&mut self, message: Message) {
        let (conn, bytes) = (self.conn, bytes(&message));
        self.world.input(0, Input::PeerMessage { conn, bytes: &bytes });
    }

    fn heartbeat(&mut self, loans: Vec<Renewal>) {
        self.say(Message::Heartbeat { sent_us: 1, loans });
    }

    fn grant(&mut self, ticket: u64, loan: u32, count: u32) {
        let blocks = vec![BlockRange { start: 0, count }];
        self.say(Message::Granted { ticket, loan: LoanId(loan), epoch: 1, lease_ms: 1000, blocks });
    }

    fn was_told(&self, message: &Message) -> bool {
        self.world.log.contains(&format!("Send {{ conn: {}, bytes: {:?} }}", self.conn, bytes(message)))
    }

    fn node(&mut self) -> &mut super::network::Node {
        &mut self.world.nodes[0]
    }
}

#[test]
fn a_creditor_that_does_not_answer_has_refused_and_its_late_grant_is_repaid() {
    let mut played = Played::new();
    played.world.input(0, Input::Borrow { request: 1, blocks: 10, avoid: &[], only: None });
    let ask = Message::TryMoveKvCache { ticket: 1, request: 1, blocks: 10, shape: shape(2) };
    assert!(played.was_told(&ask) && played.node().borrowing.contains_key(&1));
    played.world.run_for(ms(1100));
    assert_eq!(played.node().refused, [1], "its time is over");
    played.grant(1, 5, 10);
    assert!(played.was_told(&Message::Repay { loan: LoanId(5), epoch: 1 }));
    // A grant of another number of blocks is none, and goes back too.
    played.world.input(0, Input::Borrow { request: 2, blocks: 10, avoid: &[], only: None });
    played.grant(2, 6, 9);
    assert_eq!(played.node().refused, [1, 2]);
    assert!(played.was_told(&Message::Repay { loan: LoanId(6), epoch: 1 }));
    // One that nobody asked for likewise.
    played.grant(77, 7, 1);
    assert!(played.was_told(&Message::Repay { loan: LoanId(7), epoch: 1 }));
    assert_eq!(played.node().control.debts().borrowed(), 0);
}

#[test]
fn a_borrowing_is_cancelled_and_not_begun_twice() {
    let mut played = Played::new();
    played.world.input(0, Input::Borrow { request: 3, blocks: 10, avoid: &[], only: None });
    played.world.input(0, Input::Borrow { request: 3, blocks: 10, avoid: &[], only: None });
    assert_eq!(played.node().refused, [3], "busy");
    played.node().borrowing.insert(3, 10);
    played.world.input(0, Input::RepayRequest { request: 3 });
    assert_eq!(played.node().refused, [3, 3], "cancelled");
    played.grant(1, 5, 10);
    assert!(played.was_told(&Message::Repay { loan: LoanId(5), epoch: 1 }));
    assert!(played.node().control.debts().is_empty());
}

#[test]
fn both_sides_are_told_of_a_loan_that_is_no_more() {
    let mut played = Played::new();
    // As debtor: the creditor's word counts, for the right epoch.
    played.world.input(0, Input::Borrow { request: 1, blocks: 10, avoid: &[], only: None });
    played.grant(1, 5, 10);
    let loan = played.node().loans[&1][0].clone();
    played.say(Message::Lapsed { loan: LoanId(5), epoch: 2 });
    assert!(played.node().lost.is_empty());
    played.say(Message::Lapsed { loan: LoanId(5), epoch: 1 });
    assert_eq!(played.node().lost, [loan]);
    // As creditor: a loan that is unknown is denied.
    let unknown = Renewal { loan: LoanId(9), epoch: 4, blocks: 3 };
    played.heartbeat(vec![unknown]);
    assert!(played.was_told(&Message::Lapsed { loan: LoanId(9), epoch: 4 }));
    played.say(Message::Repay { loan: LoanId(8), epoch: 1 });
    assert!(played.was_told(&Message::Lapsed { loan: LoanId(8), epoch: 1 }));
    // And one that is not renewed ends, though its debtor is heard.
    played.say(Message::TryMoveKvCache { ticket: 1, request: 1, blocks: 8, shape: shape(2) });
    assert_eq!(played.node().control.rmanager().lent(), 8);
    for _ in 0..7 {
        played.world.run_for(ms(500));
        played.heartbeat(Vec::new());
    }
    assert_eq!((played.node().control.rmanager().lent(), played.node().control.stats().lapsed), (0, 1));
}

#[test]
fn who_speaks_out_of_turn_is_dropped() {
    let mut played = Played::new();
    played.say(hello(u64::MAX));
    assert!(!played.world.is_open(played.conn) && dropped(&played.world, 0, "second Hello"));
}

#[test]
fn of_two_rows_the_newer_counts_in_whatever_order_they_come() {
    let mut played = Played::new();
    let free = |played: &mut Played| played.node().control.ledger().get(InstanceId(u64::MAX)).unwrap().free();
    played.row(7, |row| row.tiers[0].free = 70);
    assert_eq!(free(&mut played), 70);
    played.row(6, |row| row.tiers[0].free = 60);
    played.row(7, |row| row.tiers[0].free = 71);
    assert_eq!(free(&mut played), 70, "older, or no newer: nothing changes");
    played.row(1, |row| (row.stamp.incarnation, row.tiers[0].free) = (1, 10));
    assert_eq!(free(&mut played), 10, "another life counts anew");
    // A row of somebody who is not a member is not kept.
    played.row(9, |row| row.instance = InstanceId(5));
    assert!(played.node().control.ledger().get(InstanceId(5)).is_none());
}

#[test]
fn a_digest_is_answered_with_what_is_newer_and_asks_for_what_is_lacking() {
    let mut played = Played::new();
    let asked = played.world.log.matches("> Datagram").count();
    let me = (InstanceId(u64::MAX), Stamp { incarnation: 0, version: 99 });
    let digest = Digest { from: InstanceId(0), until: None, stamps: vec![me], answer: false };
    played.post(&Packet::Digest(digest.clone()));
    // Its own row, which the digest lacks, and its stamps, as its row of us is old.
    assert_eq!(played.world.log.matches("> Datagram").count() - asked, 2);
    let asked = played.world.log.matches("> Datagram").count();
    played.post(&Packet::Digest(Digest { answer: true, ..digest.clone() }));
    assert_eq!(played.world.log.matches("> Datagram").count() - asked, 1, "an answer is not asked back");
    // Bounds that cross, as only a broken peer sends them, are an empty range.
    played.post(&Packet::Digest(Digest { from: InstanceId(9), until: Some(InstanceId(3)), ..digest }));
}

#[test]
fn a_pure_lender_lends_to_whoever_comes_first_and_never_borrows() {
    let mut world = World::new(1);
    world.start(Plan::new("node-0", &[], 8));
    world.start(Plan { lender: true, lend: 1.0, ..Plan::new("lender", &["node-0"], 64) });
    world.run_for(ms(1000));
    world.input(0, Input::Borrow { request: 1, blocks: 64, avoid: &[], only: None });
    world.input(1, Input::Borrow { request: 1, blocks: 1, avoid: &[], only: None });
    assert!(world.log.contains(&format!("reason: {:?}", BorrowError::NoShape)));
    world.run_for(ms(500));
    assert_eq!(world.nodes[0].loans[&1][0].blocks, (0..64).collect::<Vec<_>>());
    let row = world.nodes[0].control.view(world.now).instances[1].row.clone().unwrap();
    assert_eq!((row.total, row.free, row.lent, row.shape), (64, 0, 64, Some(shape(2))));
    assert!(world.nodes[1].creditors.is_empty() && world.nodes[0].creditors.len() == 1);
    world.check_quiet();
}

#[test]
fn nobody_is_taken_for_gone_by_one_who_was_stopped() {
    let mut world = cluster(1, &[8, 40]);
    world.input(0, Input::Borrow { request: 1, blocks: 10, avoid: &[], only: None });
    world.run_for(ms(500));
    // The machine sleeps for longer than any time limit.
    world.now += LEASE * 4;
    world.run_for(ms(5000));
    assert!(
        world.nodes.iter().all(|n| !n.notes.iter().any(|note| matches!(note, Note::Down(..) | Note::Lapsed { .. })))
    );
    assert_eq!(world.nodes[0].loans.len(), 1);
    world.check_quiet();
}

#[test]
fn a_draining_node_lends_nothing_new_and_says_when_it_is_free() {
    let mut world = cluster(1, &[8, 40]);
    world.input(0, Input::Borrow { request: 1, blocks: 10, avoid: &[], only: None });
    world.run_for(ms(500));
    world.input(1, Input::Drain);
    world.run_for(ms(400));
    world.input(0, Input::Borrow { request: 2, blocks: 1, avoid: &[], only: None });
    assert_eq!(world.nodes[0].refused, [2], "its row says so");
    assert!(!world.nodes[1].drained);
    world.nodes[0].loans.clear();
    world.input(0, Input::RepayRequest { request: 1 });
    world.run_for(ms(500));
    assert!(world.nodes[1].drained);
    world.input(1, Input::Leave);
    assert_eq!(world.nodes[1].control.deadline(), None);
    world.run_for(ms(1000));
    assert_eq!(world.nodes[0].control.members(), 0);
    let gone = world.nodes[1].instance;
    assert!(world.nodes[0].notes.contains(&Note::Left(gone)) && !world.nodes[0].notes.contains(&Note::Down(gone)));
}

#[test]
fn a_configuration_that_cannot_work_is_refused_with_advice() {
    let new = |change: fn(&mut Config)| {
        let mut config = Config::new(InstanceId(1), [1; 16], profile("node-0"), gossip("node-0"));
        change(&mut config);
        Controller::new(config, RManager::new(PoolSource::Nothing, 0.0, LEASE), 1).err()
    };
    assert_eq!(new(|_| {}), None);
    assert_eq!(new(|c| c.lost_after = c.heartbeat), Some(ConfigError::Times));
    assert_eq!(new(|c| c.profile.control = vec![String::new(); 9]), Some(ConfigError::Addresses(9)));
    let long = new(|c| c.profile.http = "x".repeat(MAX_ADDRESS + 1));
    assert!(matches!(long, Some(ConfigError::Address(_))));
}

proptest! {
    /// Whatever members say, in whatever order: no panic, no block lost.
    #[test]
    fn no_message_breaks_a_controller(
        messages in prop::collection::vec((0usize..3, crate::control::codec::tests::message(), 0u64..400), 1..60)
    ) {
        let mut world = World::new(7);
        let node = world.start(Plan::new("node-0", &[], 16));
        let mut conns = [0; 3];
        for (i, conn) in conns.iter_mut().enumerate() {
            *conn = world.stranger(node);
            let bytes = bytes(&hello(50 + i as u64));
            world.input(node, Input::PeerMessage { conn: *conn, bytes: &bytes });
        }
        for (who, message, pause) in messages {
            // Let some asks be such as can be granted.
            let message = match message {
                Message::TryMoveKvCache { ticket, request, blocks, .. } => {
                    Message::TryMoveKvCache { ticket, request, blocks: blocks % 6, shape: shape(2) }
                }
                Message::Repay { loan, .. } => Message::Repay { loan: LoanId(loan.0 % 8), epoch: 1 },
                other => other,
            };
            if world.is_open(conns[who]) {
                let bytes = bytes(&message);
                world.input(node, Input::PeerMessage { conn: conns[who], bytes: &bytes });
            }
            world.run_for(ms(pause));
        }
        world.run_for(LEASE * 3);
        prop_assert_eq!(world.nodes[node].control.rmanager().lent(), 0);
    }
}
