//! KV of running requests moves by plan, and their clients notice nothing.

use distkv::engine::Stream;
use distkv::kv::rblock::KvDtype;
use distkv::node::Node;
use distkv::node::transports::FabricChoice;
use serde_json::json;

use crate::cluster::{Cluster, Setup, model, prompt, tokens, until};
use crate::recovery::{alone, held, next};

const PROMPT: usize = 2_700;

fn lent(lender: &Node) -> bool {
    lender.lent_pool().is_some_and(|pool| pool.table().counts().free < pool.blocks())
}

/// Nothing was computed again, and the plan said why it moved what.
fn moved_only(cluster: &Cluster, why: &[&str]) {
    let stats = cluster.node.stats();
    let view = cluster.node.view().ledger();
    assert!(stats.running == 1, "the request was over first: {stats:?}, {:?}, {:?}", view.decisions, view.control);
    assert!(stats.blocks_fetched > 0);
    assert_eq!((stats.recoveries, stats.recomputed_tokens, stats.preemptions, stats.partials_rejected), (0, 0, 0, 0));
    assert!(view.decisions.iter().any(|d| why.contains(&d.why.as_str())), "{:?}", view.decisions);
    println!("{} rBlocks sent, {} fetched", stats.blocks_sent, stats.blocks_fetched);
}

/// Reads on for a while, then ends it all; the tokens are those of one node.
fn ended(cluster: Cluster, mut stream: Stream, requests: &[(u64, usize)]) {
    let found: Vec<_> = (0..300).map_while(|_| next(&mut stream)).collect();
    assert_eq!(found.len(), 300);
    drop(stream);
    cluster.assert_all_returned();
    cluster.stop();
    let dir = tempfile::tempdir().unwrap();
    let files = model(dir.path(), json!({}));
    assert_eq!(found, alone(&files, 8192, requests, 300).remove(0));
}

/// A long answer whose creditors drain one after the other, the others having
/// room for what lies with them.
fn drained(fabric: FabricChoice, drains: usize) {
    let dir = tempfile::tempdir().unwrap();
    let files = model(dir.path(), json!({}));
    let cluster = Setup::new(fabric, KvDtype::F32, &[1_024, 4_096, 4_096, 4_096]).start(&files);
    let stream = cluster.submit(prompt(1, PROMPT), 6_000, false);
    let mut left: Vec<&Node> = cluster.lenders.iter().collect();
    for _ in 0..drains {
        until("a creditor to hold KV", || left.iter().any(|l| held(l) > 0));
        let most = (0..left.len()).max_by_key(|&i| held(left[i])).unwrap();
        let leaving = left.remove(most);
        leaving.drain();
        until("what lies there to be elsewhere", || leaving.view().drained() && !lent(leaving));
        moved_only(&cluster, &["creditor_leaves"]);
    }
    ended(cluster, stream, &[(1, PROMPT)]);
}

#[test]
fn what_lies_with_a_creditor_that_drains_goes_to_others_over_shm() {
    drained(FabricChoice::Shm, 1);
}

#[test]
fn what_lies_with_a_creditor_that_drains_goes_to_others_over_tcp() {
    drained(FabricChoice::Tcp, 1);
}

#[test]
fn what_lies_with_the_only_creditor_comes_home_when_it_drains_and_there_is_room() {
    let dir = tempfile::tempdir().unwrap();
    let files = model(dir.path(), json!({}));
    let cluster = Setup::new(FabricChoice::Shm, KvDtype::F32, &[8_192, 4_096]).start(&files);
    let first = cluster.submit(prompt(2, 6_000), 40, false);
    let stream = cluster.submit(prompt(1, PROMPT), 4_000, false);
    until("its KV to lie away", || held(&cluster.lenders[0]) > 0);
    tokens(first);
    // By now there is room here; nobody else could take it.
    cluster.lenders[0].drain();
    until("its KV to be here", || !lent(&cluster.lenders[0]) && cluster.node.stats().blocks_borrowed == 0);
    // Or it had come before, where the model says that it is faster so.
    moved_only(&cluster, &["creditor_leaves", "throughput"]);
    ended(cluster, stream, &[(1, PROMPT)]);
}
