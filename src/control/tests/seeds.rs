//! Random clusters under random load and faults. A seed that fails is a bug
//! report: put it into `one_seed`.

use rand::Rng;

use super::network::{LEASE, Plan, World, ms};
use crate::control::controller::{ControlStats, Input, LocalStats};
use crate::kv::table::Owner;

/// What may go wrong.
#[derive(Clone, Copy, PartialEq)]
enum Faults {
    None,
    Links,
    All,
}

fn act(world: &mut World, faults: Faults) {
    let node = world.rng.random_range(0..world.nodes.len());
    if !world.nodes[node].alive {
        // Comes back at the same address as another instance.
        if world.rng.random_bool(0.3) {
            let plan = world.nodes[node].plan.clone();
            if !world.nodes.iter().any(|n| n.alive && n.plan.address == plan.address) {
                world.start(plan);
            }
        }
        return;
    }
    let what = world.rng.random_range(0..100);
    match what {
        0..30 => {
            let (request, blocks) = (world.rng.random_range(0..1000), world.rng.random_range(0..30));
            let borrowing = &world.nodes[node].borrowing;
            if !borrowing.contains_key(&request) && !world.nodes[node].plan.lender {
                world.input(node, Input::Borrow { request, blocks, avoid: &[], only: None });
            }
        }
        30..60 => {
            let n = &world.nodes[node];
            let requests: Vec<u64> = n.loans.keys().chain(n.borrowing.keys()).copied().collect();
            if !requests.is_empty() {
                let request = requests[world.rng.random_range(0..requests.len())];
                let told = world.nodes[node].loans.remove(&request).unwrap_or_default();
                let one_by_one = world.rng.random_bool(0.3) && !told.is_empty();
                if one_by_one {
                    for (i, loan) in told.iter().enumerate() {
                        world.nodes[node].loans.insert(request, told[i + 1..].to_vec());
                        world.input(node, Input::RepayLoan { creditor: loan.creditor, loan: loan.loan });
                    }
                    world.nodes[node].loans.remove(&request);
                } else {
                    world.input(node, Input::RepayRequest { request });
                }
            }
        }
        60..80 => {
            let n = world.rng.random_range(0..6);
            let node = &mut world.nodes[node];
            let Some(pool) = &node.pool else { return };
            if what < 70 {
                let _ = pool.table().alloc_many(n, Owner::Sequence(1), &mut node.local);
            } else {
                for block in node.local.drain(..(n as usize).min(node.local.len())) {
                    assert_eq!(pool.table().release(block), Ok(true));
                }
            }
        }
        80..85 => {
            world.input(node, Input::LocalRow(LocalStats { running: what as u32, waiting: 1, ..LocalStats::default() }))
        }
        85..90 if faults != Faults::None => world.break_connection(),
        90..93 if faults != Faults::None => world.stall_connection(),
        93..95 if faults == Faults::All => {
            let bytes = (0..world.rng.random_range(0..40)).map(|_| world.rng.random()).collect();
            world.garble(bytes);
        }
        95..97 if faults == Faults::All => world.kill(node),
        97 if faults == Faults::All && world.cut.is_empty() => world.cut.push(node),
        98 if faults == Faults::All => world.cut.clear(),
        _ => {}
    }
}

fn run(seed: u64) -> World {
    let mut world = World::new(seed);
    let faults = [Faults::None, Faults::Links, Faults::All][seed as usize % 3];
    let nodes = world.rng.random_range(2..=6);
    world.max_delay = world.rng.random_range(1..=60);
    for i in 0..nodes {
        // Everybody joins by somebody, the first also by itself.
        let address = format!("node-{i}");
        let seed_node = format!("node-{}", if i == 0 { 0 } else { world.rng.random_range(0..i) });
        let mut plan = Plan::new(&address, &["node-0", &seed_node], world.rng.random_range(10..60));
        plan.lender = i > 0 && world.rng.random_bool(0.3);
        plan.lend = world.rng.random_range(0.0..1.0);
        world.start(plan);
        world.run_for(ms(world.rng.clone().random_range(0..200)));
    }
    for _ in 0..150 {
        act(&mut world, faults);
        let pause = world.rng.random_range(0..120);
        world.run_for(ms(pause));
    }
    // Faults end; nothing more is asked.
    world.cut.clear();
    world.run_for(ms(20_000));
    world.check_quiet();
    if faults == Faults::None {
        assert!(world.nodes.iter().all(|n| n.lost.is_empty()), "a loan was lost without a fault");
    }
    // Everything is repaid: every block comes back.
    for node in 0..world.nodes.len() {
        while world.nodes[node].alive && !world.nodes[node].loans.is_empty() {
            let Some((request, _)) = world.nodes[node].loans.pop_first() else { break };
            world.input(node, Input::RepayRequest { request });
        }
    }
    // A repayment that does not arrive is made up for by the lease.
    world.run_for(LEASE + ms(1_000));
    world.check_quiet();
    assert!(world.nodes.iter().filter(|n| n.alive).all(|n| n.control.rmanager().lent() == 0));
    world
}

#[test]
fn invariants_hold_after_every_step_of_every_seed() {
    let seeds = std::env::var("DISTKV_TEST_SEEDS").map_or(150, |n| n.parse().unwrap());
    let mut seen = ControlStats::default();
    let mut split = 0;
    for seed in 0..seeds {
        let Ok(world) = std::panic::catch_unwind(|| run(seed)) else {
            panic!("seed {seed} fails: see above, and run it alone");
        };
        for stats in world.nodes.iter().map(|node| node.control.stats()) {
            seen.garbage += stats.garbage;
            seen.granted += stats.granted;
            seen.refused += stats.refused;
            seen.lapsed += stats.lapsed;
            seen.lost += stats.lost;
        }
        split += world.split;
    }
    // The seeds came by everything that they are there for.
    let counts = [seen.garbage, seen.granted, seen.refused, seen.lapsed, seen.lost, split];
    assert!(counts.iter().all(|count| *count > seeds / 5), "{seen:?}, {split} borrowings from several creditors");
}

#[test]
fn the_same_seed_gives_the_same_log() {
    for seed in [1, 2, 3] {
        let (first, second) = (run(seed).log, run(seed).log);
        assert!(first.len() > 10_000, "the log says what happened");
        assert!(first == second, "seed {seed} ran differently");
    }
    assert!(run(4).log != run(5).log);
}
