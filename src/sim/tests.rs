//! Planted bugs are found, seeds repeat themselves.

use super::fault::{Fault, Timed};
use super::lender::Sabotage;
use super::world::{Config, Outcome, World};

fn small(seed: u64, sabotage: Sabotage) -> Outcome {
    let mut config = Config { keep_log: true, ..Config::small(seed, sabotage) };
    if sabotage == Sabotage::Lease {
        // A debtor that is stopped for longer than a lease comes back to blocks
        // that are another's.
        let pause = |n: usize| Timed {
            at_ms: 2000 + 1500 * n as u64,
            fault: Fault::Pause { node: n % config.instances, ms: 5000 },
        };
        config.faults = (0..10).map(pause).collect();
    }
    if sabotage == Sabotage::Epoch {
        // A creditor that is back before anybody takes it for dead.
        let crash = |n: usize| Timed {
            at_ms: 2000 + 1500 * n as u64,
            fault: Fault::Crash { node: n % config.instances, back_ms: 40 },
        };
        config.faults = (0..10).map(crash).collect();
    }
    if sabotage == Sabotage::LatePartial {
        // A creditor that answers when the wait for it has just ended.
        let pause = |n: usize| Timed {
            at_ms: 2000 + 1700 * n as u64,
            fault: Fault::Pause { node: n % config.instances, ms: 1100 },
        };
        config.faults = (0..10).map(pause).collect();
    }
    World::new(config).run()
}

/// The planted bug is found within so many seeds. Found first: reservation by
/// seed 0, lease by 58, epoch by 1, merge by 1, late partial by 8.
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
    // Few borrow for long enough.
    found(Sabotage::Lease, 150);
}

#[test]
fn a_creditor_that_answers_for_its_former_life_is_found() {
    found(Sabotage::Epoch, 20);
}

#[test]
fn an_older_row_that_replaces_a_newer_one_is_found() {
    found(Sabotage::Merge, 3);
}

#[test]
fn a_late_partial_that_is_merged_is_found() {
    found(Sabotage::LatePartial, 120);
}

#[test]
fn the_same_seed_gives_the_same_log() {
    let (first, second) = (small(3, Sabotage::None), small(3, Sabotage::None));
    assert!(first.log.len() > 10_000 && first.log == second.log);
    assert_eq!(first.report, second.report);
    assert_ne!(first.log, small(4, Sabotage::None).log);
}
