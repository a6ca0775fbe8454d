//! Small worlds: planted bugs are found, seeds repeat themselves.

use std::time::Duration;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::cost::CostModel;
use super::fault;
use super::instance::Setup;
use super::lender::Sabotage;
use super::workload::Synthetic;
use super::world::{Config, Outcome, World};
use crate::schedule::scheduler::SchedulerConfig;

/// A small world of `seed`, with faults by chance.
fn small(seed: u64, sabotage: Sabotage) -> Outcome {
    let mut rng = ChaCha8Rng::seed_from_u64(seed ^ 0x5eed);
    let instances = rng.random_range(2..=5);
    let blocks = rng.random_range(16..48);
    let tokens = blocks * 4;
    let synthetic = Synthetic {
        requests: 24,
        rate: 1.5,
        prompt: (4, tokens / 3),
        answer: (4, tokens / 2),
        long_share: 0.25,
        long: (tokens / 2, tokens * 5 / 4),
    };
    let setup = Setup {
        cost: CostModel { fixed_ns: 2e7, ..CostModel::small(blocks) },
        lend: 0.6,
        lease: Duration::from_secs(10),
        schedule: SchedulerConfig { max_rows: 48, chunk_rows: 24, max_logits: 16, max_sequences: 8 },
        sabotage,
    };
    let faults = fault::chance(&mut rng, instances, Duration::from_secs(25));
    let config = Config {
        mode: "pooled".into(),
        seed,
        instances,
        setup,
        jobs: synthetic.jobs(seed),
        faults,
        every_event: true,
        keep_log: true,
        patience: Duration::from_secs(600),
    };
    World::new(config).run()
}

/// The first seed at which the planted bug is found.
fn found(sabotage: Sabotage, seeds: u64) -> u64 {
    for seed in 0..seeds {
        if let Some(violation) = small(seed, sabotage).report.violation {
            println!("{sabotage:?}: seed {seed}, event {}: {}: {}", violation.event, violation.what, violation.broken);
            return seed;
        }
    }
    panic!("{sabotage:?} was not found in {seeds} seeds");
}

#[test]
fn a_grant_that_reserves_nothing_is_found() {
    assert!(found(Sabotage::Reservation, 3) < 3);
}

#[test]
fn a_loan_used_after_its_end_is_found() {
    assert!(found(Sabotage::Lease, 40) < 40);
}

#[test]
fn a_late_partial_that_is_merged_is_found() {
    assert!(found(Sabotage::LatePartial, 40) < 40);
}

#[test]
fn without_a_planted_bug_nothing_is_found() {
    let mut recoveries = 0;
    for seed in 0..20 {
        let outcome = small(seed, Sabotage::None);
        assert_eq!(outcome.report.violation, None, "seed {seed}");
        recoveries += outcome.report.recoveries;
    }
    assert!(recoveries > 0, "faults hit what was lent");
}

#[test]
fn the_same_seed_gives_the_same_log() {
    let (first, second) = (small(3, Sabotage::None), small(3, Sabotage::None));
    assert!(first.log.len() > 10_000 && first.log == second.log);
    assert_eq!(first.report, second.report);
    assert_ne!(first.log, small(4, Sabotage::None).log);
}
