//! KV of running requests moves by plan, and their clients notice nothing.

use distkv::engine::Stream;
use distkv::kv::rblock::KvDtype;
use distkv::node::Node;
use distkv::node::transports::FabricChoice;
use serde_json::json;

use crate::cluster::{Cluster, Setup, model, prompt, until};
use crate::recovery::{alone, held, next};

const PROMPT: usize = 2_700;

fn lent(lender: &Node) -> bool {
    lender.lent_pool().is_some_and(|pool| pool.table().counts().free < pool.blocks())
}

/// A long answer whose creditors drain one after the other, as long as the
/// others have room for what lies with them.
fn drained(fabric: FabricChoice, own: usize, lenders: &[usize], drains: usize) {
    let dir = tempfile::tempdir().unwrap();
    let files = model(dir.path(), json!({}));
    let tokens: Vec<usize> = std::iter::once(own).chain(lenders.iter().copied()).collect();
    let cluster = Setup::new(fabric, KvDtype::F32, &tokens).start(&files);
    let room: usize = tokens.iter().sum::<usize>() - 512;
    let mut stream = cluster.submit(prompt(1, PROMPT), room - PROMPT, false);
    let mut found = vec![next(&mut stream).unwrap()];
    let mut left: Vec<&Node> = cluster.lenders.iter().collect();
    for _ in 0..drains {
        until("a creditor to hold KV", || left.iter().any(|l| held(l) > 0));
        let most = (0..left.len()).max_by_key(|&i| held(left[i])).unwrap();
        let leaving = left.remove(most);
        leaving.drain();
        until("what lies there to be elsewhere", || leaving.view().drained() && !lent(leaving));
        let stats = cluster.node.stats();
        let view = cluster.node.view().ledger();
        assert!(stats.running == 1, "the request was over first: {stats:?}, {:?}, {:?}", view.decisions, view.control);
    }
    let after = found.len();
    found.extend((after..after + 300).map_while(|_| next(&mut stream)));
    let stats = cluster.node.stats();
    println!("{fabric:?}, {own} own tokens: {} tokens read, {stats:?}", found.len());
    assert!(stats.blocks_fetched > 0);
    assert_eq!((stats.recoveries, stats.recomputed_tokens, stats.preemptions, stats.partials_rejected), (0, 0, 0, 0));
    let decisions = cluster.node.view().ledger().decisions;
    assert!(decisions.iter().any(|d| d.why == "creditor_leaves"), "{decisions:?}");
    ended(cluster, stream);
    assert_eq!(found, alone(&files, 8192, &[(1, PROMPT)], found.len()).remove(0));
}

fn ended(cluster: Cluster, stream: Stream) {
    drop(stream);
    cluster.assert_all_returned();
    cluster.stop();
}

#[test]
fn what_lies_with_a_creditor_that_drains_comes_home_where_there_is_room() {
    // The prompt did not fit beside the room it leaves to others; its KV does.
    drained(FabricChoice::Shm, 3_200, &[1_500], 1);
}

#[test]
fn what_lies_with_a_creditor_that_drains_goes_to_others_over_shm() {
    drained(FabricChoice::Shm, 1_024, &[2_048; 4], 2);
}

#[test]
fn what_lies_with_a_creditor_that_drains_goes_to_others_over_tcp() {
    drained(FabricChoice::Tcp, 1_024, &[2_048; 4], 1);
}
