//! What a post and a poll of the verbs transport cost on a connected pair:
//! allocations and system calls, which are none, and under
//! `scripts/verbs-instructions` the instructions.

#[path = "software_hca/place.rs"]
mod place;
#[path = "verbs_hot_path/quiet.rs"]
mod quiet;
#[path = "verbs_hot_path/rig.rs"]
mod rig;

use std::process::Command;
use std::time::Instant;

use quiet::{allocations, forbid_system_calls};
use rig::{CASES, Case, Rig};

/// Rounds before anything is counted: queues and vectors have their size then.
const WARM: usize = 2000;
/// Tells the ignored tests what to do.
const ORDERS: &str = "DISTKV_TEST_HOT_PATH";

#[test]
fn posts_and_polls_allocate_nothing() {
    const ROUNDS: usize = 20_000;
    let mut rig = Rig::new();
    println!("{:<24}{:>12}{:>12}   allocations in {ROUNDS} rounds", "", "posts", "polls");
    for case in CASES {
        rig.run(case, WARM);
        let (mut posts, mut polls) = (0, 0);
        for _ in 0..ROUNDS {
            let before = allocations();
            rig.post(case);
            let between = allocations();
            rig.deliver(case);
            rig.reap();
            posts += between - before;
            polls += allocations() - between;
        }
        println!("{:<24}{posts:>12}{polls:>12}", case.name());
        assert_eq!((posts, polls), (0, 0), "{}", case.name());
    }
    // The counter counts.
    let before = allocations();
    drop(std::hint::black_box(vec![0u8; 100]));
    assert_eq!(allocations(), before + 1);
}

/// The loop runs in a process of its own, in a thread that may make no system
/// call: each is counted and not carried out. What remains is a transport's look
/// at its sockets, once a millisecond.
#[test]
#[cfg(target_arch = "x86_64")]
fn posts_and_polls_make_no_system_call() {
    for case in CASES {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "without_system_calls", "--ignored", "--test-threads=1", "--nocapture"])
            .env(ORDERS, case.name())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&child.stdout).into_owned();
        let line = said.lines().find(|line| line.contains("looks")).unwrap_or_else(|| panic!("{child:?}"));
        println!("{:<24}{line}", case.name());
        assert!(child.status.success(), "{child:?}");
        let numbers: Vec<u64> = line.split(' ').filter_map(|word| word.parse().ok()).collect();
        let [rounds, looks, others, milliseconds] = numbers[..] else { panic!("{line}") };
        assert_eq!((rounds, others), (20_000, 0), "{line}");
        // Two transports.
        assert!(looks <= 2 * (milliseconds + 1), "{line}");
    }
}

#[test]
#[ignore = "a part of the test beside it"]
#[cfg(target_arch = "x86_64")]
fn without_system_calls() {
    let Some(case) = ordered() else { return };
    let mut rig = Rig::new();
    rig.run(case, WARM);
    let start = Instant::now();
    let counts = forbid_system_calls();
    rig.run(case, 20_000);
    counts.report_and_exit(20_000, start.elapsed());
}

/// What scripts/verbs-instructions runs under callgrind, which counts within
/// one of the functions of `rig` at a time.
#[test]
#[ignore = "run by scripts/verbs-instructions"]
fn instructions() {
    let Some(case) = ordered() else { return };
    let mut rig = Rig::new();
    rig.run(case, WARM);
    for _ in 0..1024 {
        rig::measured_post(&mut rig, case);
        rig::measured_deliver(&mut rig, case);
        rig::measured_reap(&mut rig);
    }
}

fn ordered() -> Option<Case> {
    let name = std::env::var(ORDERS).ok()?;
    CASES.into_iter().find(|case| case.name() == name)
}
