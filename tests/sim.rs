//! The cluster in simulation: many seeds of faults, every token checked. A seed
//! that fails is a bug report: `distkv sim --small --seed N --world-log FILE` runs it
//! again.

use std::time::Duration;

use distkv::sim::cost::CostModel;
use distkv::sim::fault::{Fault, Timed};
use distkv::sim::instance::Setup;
use distkv::sim::lender::Sabotage;
use distkv::sim::report::Report;
use distkv::sim::workload::{Job, Synthetic};
use distkv::sim::world::{Config, World};

/// Runs the seeds on both cores; what each saw.
fn seeds(range: std::ops::Range<u64>) -> Vec<Report> {
    let half = range.start + (range.end - range.start) / 2;
    let run = |seeds: std::ops::Range<u64>| {
        seeds.map(|seed| World::new(Config::small(seed, Sabotage::None)).run().report).collect::<Vec<_>>()
    };
    std::thread::scope(|scope| {
        let first = scope.spawn(|| run(range.start..half));
        let mut rest = run(half..range.end);
        let mut all = first.join().expect("a world panicked");
        all.append(&mut rest);
        all
    })
}

#[test]
fn every_request_ends_with_its_own_tokens_whatever_breaks() {
    let count = std::env::var("DISTKV_TEST_SEEDS").map_or(240, |n| n.parse().expect("a number of seeds"));
    let reports = seeds(0..count);
    for report in &reports {
        assert_eq!(report.violation, None, "seed {}", report.seed);
        assert_eq!(report.finished + report.too_long, 24, "seed {}", report.seed);
    }
    // The seeds came by everything that they are there for.
    let sum = |of: fn(&Report) -> u64| reports.iter().map(of).sum::<u64>();
    let seen = [
        ("loans", sum(|r| r.loans)),
        ("moves", sum(|r| r.moves)),
        ("exchanges", sum(|r| r.exchanges)),
        ("lapsed", sum(|r| r.lapsed)),
        ("lost", sum(|r| r.lost)),
        ("recoveries", sum(|r| r.recoveries)),
        ("preemptions", sum(|r| r.preemptions)),
        ("retries", sum(|r| r.retries)),
        ("failed closed", sum(|r| r.failed_closed)),
        ("cached", sum(|r| r.cached_tokens)),
    ];
    println!("{seen:?}");
    assert!(seen.iter().all(|(_, count)| *count > reports.len() as u64 / 40), "{seen:?}");
}

#[test]
fn the_same_seed_is_the_same_world() {
    let run = |seed| World::new(Config { keep_log: true, ..Config::small(seed, Sabotage::None) }).run();
    for seed in [1, 2] {
        let (first, second) = (run(seed), run(seed));
        assert!(first.log == second.log, "seed {seed} ran differently");
        let json = |report| serde_json::to_string(report).expect("figures");
        assert_eq!(json(&first.report), json(&second.report));
    }
}

/// A world without faults whose instances are `small`.
fn calm(instances: usize, lend: f64, jobs: Vec<Job>) -> Config {
    let config = Config::small(1, Sabotage::None);
    let cost = CostModel::small(64);
    let setup = Setup { cost, lend, ..config.setup.clone() };
    Config { instances, setup, jobs, faults: Vec::new(), ..config }
}

#[test]
fn paper_pooled_instances_hold_contexts_that_one_alone_cannot() {
    let job = |prompt| vec![Job { at: Duration::ZERO, prompt, answer: 8, shared: Vec::new(), shared_tokens: 0 }];
    let alone = World::new(calm(1, 0.0, job(300))).run().report;
    assert_eq!((alone.finished, alone.too_long), (0, 1), "64 rBlocks of 4 tokens hold 256");
    // 4 instances of which 3 lend 0.95 of 64 blocks: 60 each.
    let pooled = World::new(calm(4, 0.95, job(920))).run().report;
    assert_eq!(pooled.violation, None);
    assert_eq!((pooled.finished, pooled.longest), (1, 928), "{pooled:?}");
    assert!(pooled.moves >= 160 && pooled.exchanges > 0, "{pooled:?}");
}

#[test]
fn a_creditor_that_dies_costs_a_pause_and_no_token() {
    let jobs =
        Synthetic { requests: 6, rate: 10.0, prompt: (300, 400), answer: (60, 60), long_share: 0.0, long: (1, 1) };
    let mut config = calm(3, 0.9, jobs.jobs(5));
    // Its device is slow enough for the fault to come in the middle.
    config.setup.cost.fixed_ns = 1e8;
    config.faults = vec![Timed { at_ms: 4000, fault: Fault::Crash { node: 2, back_ms: 3000 } }];
    let report = World::new(config).run().report;
    assert_eq!(report.violation, None);
    assert_eq!(report.finished, 6);
    assert!(report.recoveries + report.retries > 0, "{report:?}");
}
