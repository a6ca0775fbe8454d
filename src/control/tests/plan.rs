//! Planning, held to the paper's sentences and to what a plan must never do.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::shape;
use crate::control::ledger::Ledger;
use crate::control::message::{Role, Service};
use crate::control::perf::PerfModel;
use crate::control::plan::{Held, Limits, Move, Own, Place, Reason, plan};
use crate::control::row::{Debt, LinkRow, Profile, Row, Stamp, Tier, TierRow};
use crate::kv::rblock::InstanceId;

const ME: InstanceId = InstanceId(1);

fn row(instance: u64, total: u32, free: u32) -> Row {
    let profile = Profile {
        role: Role::Engine,
        model: None,
        host: 1,
        rank: 0,
        control: Vec::new(),
        creditor: Vec::new(),
        http: String::new(),
        peers: None,
    };
    Row {
        instance: InstanceId(instance),
        stamp: Stamp::default(),
        profile,
        service: Service::Serving,
        shape: Some(shape(2)),
        shapeable_bytes: 0,
        tiers: vec![TierRow { tier: Tier::Device, total, free, lent: 0, lend_cap: total / 2 }],
        debts: Vec::new(),
        borrowed: 0,
        running: 4,
        waiting: 0,
        wanted: 0,
        tokens_s: 0,
        perf: Some(PerfModel { fixed_ns: 1e7, row_ns: 1e4, key_ns: 50.0 }),
        links: Vec::new(),
    }
}

fn ledger(rows: impl IntoIterator<Item = Row>) -> Ledger {
    let mut ledger = Ledger::default();
    for row in rows {
        assert!(ledger.merge(row));
    }
    ledger
}

fn held(request: u64, local: u32, remote: &[(u64, u32)]) -> Held {
    let remote: BTreeMap<_, _> = remote.iter().map(|(i, n)| (InstanceId(*i), *n)).collect();
    let blocks = local + remote.values().sum::<u32>();
    Held { request, tokens: blocks * 4 + 1, local, remote }
}

fn own(total: u32, free: u32, requests: Vec<Held>, queue: &[u32]) -> Own {
    Own {
        instance: ME,
        shape: shape(2),
        total,
        free,
        requests,
        queue: queue.to_vec(),
        reserved: BTreeMap::new(),
        lent: Vec::new(),
        links: Vec::new(),
        refused: BTreeSet::new(),
        perf: Some(PerfModel { fixed_ns: 1e7, row_ns: 1e4, key_ns: 50.0 }),
        limits: Limits { max_moves: 10_000, horizon: 8, ..Limits::default() },
    }
}

/// Carries a plan out, as the instances would report it.
fn apply(ledger: &mut Ledger, own: &mut Own, moves: &[Move]) {
    let mut cancelled = Vec::new();
    for m in moves {
        if let Reason::DebtCircle { circle, blocks } = &m.why
            && !cancelled.contains(circle)
        {
            // The others bring their shares home as well; of a circle of two
            // that is what is owed to me.
            cancelled.push(circle.clone());
            let last = own.lent.iter_mut().find(|d| Some(&d.debtor) == circle.last()).expect("it owes me");
            last.blocks -= blocks;
        }
        let request = own.requests.iter_mut().find(|r| r.request == m.request).expect("a request of mine");
        assert!(m.blocks > 0 && m.from != m.to);
        match m.from {
            Place::Home => {
                request.local = request.local.checked_sub(m.blocks).expect("more than there is");
                own.free += m.blocks;
            }
            Place::At(creditor) => {
                let left = request.remote.get_mut(&creditor).expect("nothing there");
                *left = left.checked_sub(m.blocks).expect("more than there is");
                request.remote.retain(|_, n| *n > 0);
                debt(ledger, creditor, -i64::from(m.blocks));
            }
        }
        match m.to {
            Place::Home => {
                request.local += m.blocks;
                own.free = own.free.checked_sub(m.blocks).expect("no room at home");
            }
            Place::At(creditor) => {
                *request.remote.entry(creditor).or_default() += m.blocks;
                debt(ledger, creditor, i64::from(m.blocks));
            }
        }
    }
}

fn debt(ledger: &mut Ledger, creditor: InstanceId, blocks: i64) {
    let row = ledger.get_mut(creditor).expect("somebody known");
    let tier = &mut row.tiers[0];
    tier.lent = u32::try_from(i64::from(tier.lent) + blocks).expect("lent");
    tier.free = u32::try_from(i64::from(tier.free) - blocks).expect("free");
    match row.debts.iter_mut().find(|d| d.debtor == ME) {
        Some(debt) => debt.blocks = u32::try_from(i64::from(debt.blocks) + blocks).expect("owed"),
        None => row.debts.push(Debt { debtor: ME, blocks: u32::try_from(blocks).expect("owed") }),
    }
    row.debts.retain(|d| d.blocks > 0);
}

#[test]
fn what_lies_away_comes_home_where_there_is_room_and_both_are_faster_so() {
    let lent = |mine: u32| {
        let mut row = row(2, 1000, 500);
        row.tiers[0].lent = mine;
        row.debts = vec![Debt { debtor: ME, blocks: mine }];
        row
    };
    let requests = || vec![held(1, 100, &[(2, 60)])];
    let ledger = ledger([row(1, 1000, 800), lent(60)]);
    let far = |own: Own| Own { links: vec![LinkRow { peer: InstanceId(2), rtt_us: 2000, mb_s: 0 }], ..own };
    let mut free = far(own(1000, 800, requests(), &[]));
    let moves = plan(&ledger, &free);
    assert_eq!(
        moves.iter().map(|m| (m.blocks, m.from, m.to)).collect::<Vec<_>>(),
        [(60, Place::At(InstanceId(2)), Place::Home)]
    );
    assert!(matches!(moves[0].why, Reason::Throughput { before, after } if after > before));
    // Not where it would be wanted soon, nor where nothing is known of the time.
    assert!(plan(&ledger, &far(own(1000, 130, requests(), &[40]))).is_empty());
    free.perf = None;
    assert!(plan(&ledger, &free).is_empty());
}

#[test]
fn what_a_creditor_has_lent_already_and_is_not_filled_does_not_make_it_short() {
    let mut near_empty = row(2, 1000, 20);
    near_empty.tiers[0].lent = 300;
    near_empty.debts = vec![Debt { debtor: ME, blocks: 300 }];
    let ledger = ledger([row(1, 1000, 5), near_empty]);
    let mut own = own(1000, 5, vec![held(1, 900, &[(2, 50)])], &[100]);
    own.reserved = [(InstanceId(2), 250)].into();
    let moves = plan(&ledger, &own);
    assert!(!moves.is_empty());
    assert!(moves.iter().all(|m| m.from == Place::Home && m.to == Place::At(InstanceId(2))), "{moves:?}");
    own.reserved.clear();
    assert!(plan(&ledger, &own).iter().all(|m| m.from != Place::Home), "it could lend no more");
}

#[test]
fn paper_v2_take_the_debtors_longest_request_and_pair_it_with_the_freest_creditor() {
    let ledger = ledger([row(1, 1000, 10), row(2, 1000, 300), row(3, 1000, 900), row(4, 1000, 500)]);
    let own = own(1000, 10, vec![held(1, 100, &[]), held(2, 800, &[]), held(3, 90, &[])], &[50, 50, 50]);
    let moves = plan(&ledger, &own);
    let first = moves.first().expect("a starved debtor moves");
    assert_eq!((first.request, first.from, first.to), (2, Place::Home, Place::At(InstanceId(3))));
    assert!(matches!(first.why, Reason::Throughput { before, after } if after > before), "{first:?}");
    // Enough for the whole queue, and the growth of three requests.
    assert!(moves.iter().map(|m| m.blocks).sum::<u32>() >= 150 - 10, "{moves:?}");
}

#[test]
fn paper_v2_placement_is_proactive_before_the_owner_is_full() {
    let ledger = ledger([row(1, 1000, 20), row(2, 1000, 900)]);
    let mut own = own(1000, 20, (0..10).map(|i| held(i, 98, &[])).collect(), &[]);
    own.limits.horizon = 4;
    assert_eq!(plan(&ledger, &own), [], "10 requests fill 10 blocks within 4 tokens each: 20 are enough");
    own.limits.horizon = 16;
    let moves = plan(&ledger, &own);
    assert!(!moves.is_empty(), "they fill 40 blocks within 16 tokens each, though 20 are free yet");
}

#[test]
fn paper_v1_debt_circles_are_cancelled_by_bringing_blocks_home() {
    // 1 owes 2 owes 3 owes 1; 4 owes 2, in no circle.
    let mut rows = [row(1, 1000, 500), row(2, 1000, 500), row(3, 1000, 500), row(4, 1000, 500)];
    rows[0].debts = vec![Debt { debtor: InstanceId(3), blocks: 30 }];
    rows[1].debts = vec![Debt { debtor: ME, blocks: 40 }, Debt { debtor: InstanceId(4), blocks: 5 }];
    rows[2].debts = vec![Debt { debtor: InstanceId(2), blocks: 50 }];
    let mut own = own(1000, 500, vec![held(1, 100, &[(2, 35)]), held(2, 10, &[(2, 5)])], &[]);
    own.lent = rows[0].debts.clone();
    // So that nothing moves for the sake of throughput.
    own.perf = None;
    let moves = plan(&ledger(rows.clone()), &own);
    let circle = vec![ME, InstanceId(2), InstanceId(3)];
    let why = Reason::DebtCircle { circle, blocks: 30 };
    let home = |request, blocks| {
        let (from, to) = (Place::At(InstanceId(2)), Place::Home);
        Move { request, blocks, from, to, why: why.clone() }
    };
    // Its own share, and of whom least is there first.
    assert_eq!(moves, [home(2, 5), home(1, 25)]);
    own.free = 10;
    assert_eq!(plan(&ledger(rows), &own), [], "no room at home");
}

#[test]
fn a_creditor_that_is_short_is_relieved_by_its_largest_debtor() {
    let mut rows = [row(1, 1000, 500), row(2, 1000, 10), row(3, 1000, 900)];
    rows[1].tiers[0].lent = 110;
    rows[1].debts = vec![Debt { debtor: ME, blocks: 60 }, Debt { debtor: InstanceId(3), blocks: 50 }];
    let own = own(1000, 500, vec![held(1, 100, &[(2, 60)])], &[]);
    let moves = plan(&ledger(rows.clone()), &own);
    let why = Reason::CreditorShort { free: 10, low_water: 50 };
    let (from, to) = (Place::At(InstanceId(2)), Place::At(InstanceId(3)));
    assert_eq!(moves, [Move { request: 1, blocks: 60, from, to, why: why.clone() }]);
    // Nobody else: home.
    let mut alone = rows.clone();
    alone[2].borrowed = 50;
    assert_eq!(plan(&ledger(alone), &own)[0].to, Place::Home);
    rows[1].debts.reverse();
    rows[1].debts[0].blocks = 70;
    assert_eq!(plan(&ledger(rows), &own), [], "the other one owes more");
}

#[test]
fn a_near_creditor_is_preferred_to_a_slightly_freer_one() {
    let ledger = ledger([row(1, 1000, 0), row(2, 1000, 800), row(3, 1000, 900)]);
    let mut own = own(1000, 0, vec![held(1, 900, &[])], &[50]);
    own.links = vec![
        LinkRow { peer: InstanceId(2), rtt_us: 5, mb_s: 0 },
        LinkRow { peer: InstanceId(3), rtt_us: 200, mb_s: 0 },
    ];
    assert_eq!(plan(&ledger, &own)[0].to, Place::At(InstanceId(2)));
}

#[test]
fn a_plan_over_1024_instances_is_the_same_every_time() {
    let rows = || {
        (1..=1024u64).map(|i| {
            let mut r = row(i, 8192, (i * 37 % 5000) as u32);
            r.debts = (1..=32).map(|d| Debt { debtor: InstanceId((i * 7 + d * 31) % 1024 + 1), blocks: 3 }).collect();
            r
        })
    };
    let ledger = ledger(rows());
    let requests: Vec<_> = (0..100).map(|i| held(i, 60 + (i * 13 % 50) as u32, &[])).collect();
    let own = own(8192, 100, requests, &[500; 40]);
    let first = plan(&ledger, &own);
    assert!(!first.is_empty());
    assert_eq!(first, plan(&ledger, &own));
}

#[derive(Clone, Debug)]
struct Peer {
    free: u32,
    kind: u8,
    running: u32,
    owes_me: bool,
    owed: u32,
}

fn peer() -> impl Strategy<Value = Peer> {
    (0u32..800, 0u8..9, 0u32..9, any::<bool>(), 0u32..60).prop_map(|(free, kind, running, owes_me, owed)| Peer {
        free,
        kind,
        running,
        owes_me,
        owed,
    })
}

proptest! {
    #[test]
    fn a_plan_moves_what_exists_to_where_it_may_go_and_is_done_once_done(
        peers in prop::collection::vec(peer(), 1..8),
        locals in prop::collection::vec(0u32..150, 0..8),
        queue in prop::collection::vec(1u32..120, 0..6),
        free in 0u32..300,
    ) {
        let mut rows = vec![row(1, 1000, free)];
        let mut requests: Vec<_> = locals.iter().zip(0..).map(|(local, i)| held(i, *local, &[])).collect();
        let mut lent = Vec::new();
        let mut refused = BTreeSet::new();
        for (peer, id) in peers.iter().zip(2u64..) {
            let mut r = row(id, 1000, peer.free);
            r.running = peer.running;
            match peer.kind {
                0 => r.service = Service::Draining,
                1 => r.shape = Some(shape(4)),
                2 => drop(refused.insert(r.instance)),
                3 => r.borrowed = 7,
                4 => r.waiting = 2,
                _ => {}
            }
            if peer.owed > 0 && peer.kind != 1 && !requests.is_empty() {
                let at = id as usize % requests.len();
                requests[at].remote.insert(r.instance, peer.owed);
                requests[at].tokens += peer.owed * 4;
                r.debts.push(Debt { debtor: ME, blocks: peer.owed });
                r.tiers[0].lent = peer.owed;
            }
            if peer.owes_me {
                lent.push(Debt { debtor: r.instance, blocks: 20 });
            }
            rows.push(r);
        }
        let mut ledger = ledger(rows);
        let mut own = own(1000, free, requests, &queue);
        own.lent = lent;
        own.refused = refused;
        let moves = plan(&ledger, &own);
        prop_assert_eq!(&moves, &plan(&ledger, &own), "the same twice");
        for m in &moves {
            let Place::At(to) = m.to else { continue };
            let r = ledger.get(to).unwrap();
            prop_assert!(to != ME && !own.refused.contains(&to), "{:?}", m);
            prop_assert!(r.service == Service::Serving && r.shape == Some(shape(2)) && r.borrowed == 0, "{:?}", m);
        }
        apply(&mut ledger, &mut own, &moves);
        for r in ledger.rows() {
            prop_assert!(r.lent() <= r.lend_cap().max(60), "over the cap: {:?}", r);
        }
        // Where a circle was, the others' shares came home as well: who owed
        // this instance may lend to it now. That too comes to an end.
        let mut rest = plan(&ledger, &own);
        for _ in 0..4 {
            if rest.is_empty() || !moves.iter().any(|m| matches!(m.why, Reason::DebtCircle { .. })) {
                break;
            }
            apply(&mut ledger, &mut own, &rest);
            rest = plan(&ledger, &own);
        }
        prop_assert_eq!(rest, vec![], "after {:?}", moves);
    }
}
