//! Planted bugs are found, seeds repeat themselves.

use super::lender::Sabotage;
use super::world::{Config, Outcome, World};

fn small(seed: u64, sabotage: Sabotage) -> Outcome {
    World::new(Config { keep_log: true, ..Config::small(seed, sabotage) }).run()
}

/// The planted bug is found within so many seeds.
fn found(sabotage: Sabotage, seeds: u64) {
    for seed in 0..seeds {
        if let Some(violation) = small(seed, sabotage).report.violation {
            println!("{sabotage:?}: seed {seed}, event {}: {}: {}", violation.event, violation.what, violation.broken);
            return;
        }
    }
    panic!("{sabotage:?} was not found in {seeds} seeds");
}

#[test]
fn a_grant_that_reserves_nothing_is_found() {
    found(Sabotage::Reservation, 3);
}

#[test]
fn a_loan_used_after_its_end_is_found() {
    found(Sabotage::Lease, 60);
}

#[test]
fn a_late_partial_that_is_merged_is_found() {
    found(Sabotage::LatePartial, 60);
}

#[test]
fn the_same_seed_gives_the_same_log() {
    let (first, second) = (small(3, Sabotage::None), small(3, Sabotage::None));
    assert!(first.log.len() > 10_000 && first.log == second.log);
    assert_eq!(first.report, second.report);
    assert_ne!(first.log, small(4, Sabotage::None).log);
}
