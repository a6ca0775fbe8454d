//! Planning against its goal: 1,024 instances and 100K requests in 10 ms. Also
//! with all 100K requests on the instance that plans.

use std::collections::{BTreeMap, BTreeSet};
use std::hint::black_box;
use std::time::Instant;

use distkv::control::ledger::Ledger;
use distkv::control::message::{Role, Service};
use distkv::control::perf::PerfModel;
use distkv::control::plan::{Held, Limits, Own, plan};
use distkv::control::row::{Debt, LinkRow, Profile, Row, Stamp, Tier, TierRow};
use distkv::kv::rblock::{InstanceId, KvDtype, KvShape};
use hdrhistogram::Histogram;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const INSTANCES: u64 = 1024;
const BLOCKS: u32 = 7680;

fn main() {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let shape = KvShape { layers: 32, kv_heads: 32, head_dim: 128, block_tokens: 16, dtype: KvDtype::F16 };
    let perf = PerfModel { fixed_ns: 1e7, row_ns: 5e4, key_ns: 300.0 };
    let mut ledger = Ledger::default();
    for i in 1..=INSTANCES {
        let free = rng.random_range(0..BLOCKS);
        let mut debts: Vec<_> = (0..32)
            .map(|_| Debt { debtor: InstanceId(rng.random_range(1..=INSTANCES)), blocks: rng.random_range(1..60) })
            .collect();
        debts.sort_by_key(|d| std::cmp::Reverse(d.blocks));
        let profile = Profile {
            role: Role::Engine,
            model: None,
            host: i / 8,
            rank: 0,
            control: Vec::new(),
            creditor: Vec::new(),
            http: String::new(),
            peers: None,
        };
        ledger.merge(Row {
            instance: InstanceId(i),
            stamp: Stamp { incarnation: 0, version: 1 },
            profile,
            service: Service::Serving,
            shape: Some(shape),
            shapeable_bytes: 0,
            tiers: vec![TierRow { tier: Tier::Device, total: BLOCKS, free, lent: 1000, lend_cap: BLOCKS }],
            debts,
            borrowed: if rng.random_bool(0.3) { 100 } else { 0 },
            // Half of them idle: whoever generates loses by attending for another.
            running: if i % 2 == 0 { 0 } else { 8 },
            waiting: if rng.random_bool(0.3) { 5 } else { 0 },
            wanted: 0,
            tokens_s: 1000,
            perf: Some(perf),
            links: Vec::new(),
        });
    }
    println!("{INSTANCES} instances, 32 debts each; milliseconds a plan");
    println!("{:>16} {:>6} {:>8} {:>8} {:>8}", "requests of mine", "moves", "p50", "p99", "max");
    for requests in [100u64, 100_000] {
        for own_debts in [false, true] {
            let held = (0..requests).map(|request| {
                let local = rng.random_range(1..400);
                let mut remote = BTreeMap::new();
                if own_debts && rng.random_bool(0.1) {
                    remote.insert(InstanceId(rng.random_range(2..=INSTANCES)), rng.random_range(1..50));
                }
                let away: u32 = remote.values().sum();
                Held { request, tokens: (local + away) * 16 + 3, local, remote }
            });
            let own = Own {
                instance: InstanceId(1),
                shape,
                total: BLOCKS,
                free: if own_debts { 2000 } else { 20 },
                requests: held.collect(),
                queue: (0..1000).map(|_| rng.random_range(10..200)).collect(),
                reserved: BTreeMap::new(),
                lent: vec![Debt { debtor: InstanceId(7), blocks: 40 }],
                links: vec![LinkRow { peer: InstanceId(3), rtt_us: 8, mb_s: 20_000 }],
                refused: BTreeSet::new(),
                perf: Some(perf),
                limits: Limits::default(),
            };
            let mut times = Histogram::<u64>::new_with_bounds(1, 100_000_000_000, 3).expect("bounds that suit");
            let moves = plan(&ledger, &own).len();
            for _ in 0..100 {
                let start = Instant::now();
                black_box(plan(black_box(&ledger), black_box(&own)));
                times.saturating_record(start.elapsed().as_nanos() as u64);
            }
            let ms = |ns: u64| ns as f64 / 1e6;
            let (p50, p99) = (times.value_at_quantile(0.5), times.value_at_quantile(0.99));
            println!("{requests:>16} {moves:>6} {:>8.3} {:>8.3} {:>8.3}", ms(p50), ms(p99), ms(times.max()));
        }
    }
}
