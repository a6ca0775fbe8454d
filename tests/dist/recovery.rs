//! A creditor goes without a word while requests run whose keys it holds: the
//! clients see the tokens of an undisturbed run.

use std::process::{Child, Command, Stdio};
use std::sync::atomic::Ordering;
use std::time::Duration;

use distkv::engine::{FinishReason, Output, Stream};
use distkv::kv::entry::State;
use distkv::kv::rblock::KvDtype;
use distkv::model::load::ModelFiles;
use distkv::node::Node;
use distkv::node::transports::FabricChoice;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use crate::cluster::{Cluster, Setup, model, outcome, prompt, tokens, until};

const FOUR_NODES: [usize; 4] = [1024; 4];
const PROMPT: usize = 2_700;

/// The next token; `None` at the stream's good end.
pub fn next(stream: &mut Stream) -> Option<u32> {
    loop {
        match stream.blocking_next().expect("a last word") {
            Output::Token { id, .. } => return Some(id),
            Output::Finished { reason } => {
                assert_eq!(reason, FinishReason::Length);
                return None;
            }
            Output::Failed { message } => panic!("{message}"),
            Output::Started { .. } | Output::PromptLogprobs(_) => {}
        }
    }
}

/// Tokens whose KV a lender holds, as far as it has been told.
pub fn held(lender: &Node) -> usize {
    let Some(pool) = lender.lent_pool() else { return 0 };
    let live = |&block: &u32| pool.table().entry(block).is_some_and(|e| e.state == State::Live);
    (0..pool.blocks()).filter(live).count() * 16
}

/// Kills the lender with most of the node's rBlocks; how many tokens it held.
fn kill(cluster: &mut Cluster) -> usize {
    let victim = (0..cluster.lenders.len()).max_by_key(|&i| held(&cluster.lenders[i])).unwrap();
    let victim = cluster.lenders.remove(victim);
    let lost = held(&victim);
    victim.vanish();
    lost
}

pub fn alone(files: &ModelFiles, tokens_of: usize, requests: &[(u64, usize)], count: usize) -> Vec<Vec<u32>> {
    let big = Setup::new(FabricChoice::Shm, KvDtype::F32, &[tokens_of]).start(files);
    let found = requests.iter().map(|&(seed, len)| tokens(big.submit(prompt(seed, len), count, false))).collect();
    big.stop();
    found
}

/// One long request over four nodes; `when` says when a creditor is killed.
fn killed(fabric: FabricChoice, when: impl Fn(&Cluster, &mut Stream) -> Vec<u32>) {
    let dir = tempfile::tempdir().unwrap();
    let files = model(dir.path(), json!({}));
    let expected = alone(&files, 4096, &[(1, PROMPT)], 64).remove(0);
    let mut cluster = Setup::new(fabric, KvDtype::F32, &FOUR_NODES).start(&files);
    let mut stream = cluster.submit(prompt(1, PROMPT), 64, false);
    let mut found = when(&cluster, &mut stream);
    let lost = kill(&mut cluster);
    while let Some(token) = next(&mut stream) {
        found.push(token);
    }
    assert_eq!(found, expected);
    let stats = cluster.node.stats();
    println!("{fabric:?}: {lost} tokens lost, {} computed again, {stats:?}", stats.recomputed_tokens);
    assert!(lost > 0 && stats.recoveries >= 1);
    assert!(stats.recomputed_tokens >= lost as u64 && stats.recomputed_tokens < PROMPT as u64);
    assert_eq!((stats.preemptions, stats.partials_rejected), (0, 0));
    cluster.assert_all_returned();
    cluster.stop();
}

fn while_decoding(_: &Cluster, stream: &mut Stream) -> Vec<u32> {
    (0..20).map(|_| next(stream).unwrap()).collect()
}

fn while_prefilling(cluster: &Cluster, _: &mut Stream) -> Vec<u32> {
    until("the prompt to be half computed", || cluster.node.stats().prompt_tokens as usize > PROMPT / 2);
    Vec::new()
}

#[test]
fn a_creditor_is_killed_while_its_debtor_decodes_over_shm() {
    killed(FabricChoice::Shm, while_decoding);
}

#[test]
fn a_creditor_is_killed_while_its_debtor_decodes_over_tcp() {
    killed(FabricChoice::Tcp, while_decoding);
}

#[test]
fn a_creditor_is_killed_while_the_prompt_is_computed_over_shm() {
    killed(FabricChoice::Shm, while_prefilling);
}

#[test]
fn a_creditor_is_killed_while_the_prompt_is_computed_over_tcp() {
    killed(FabricChoice::Tcp, while_prefilling);
}

#[test]
fn twelve_requests_at_once_outlive_a_creditor() {
    let dir = tempfile::tempdir().unwrap();
    let files = model(dir.path(), json!({}));
    let lengths = [900, 17, 300, 1500, 64, 640, 5, 1100, 33, 450, 128, 720];
    let requests: Vec<(u64, usize)> = (0..).zip(lengths).collect();
    let expected = alone(&files, 8192, &requests, 64);
    for fabric in [FabricChoice::Shm, FabricChoice::Tcp] {
        let mut cluster = Setup::new(fabric, KvDtype::F32, &FOUR_NODES).start(&files);
        let streams: Vec<_> = requests.iter().map(|&(i, len)| cluster.submit(prompt(i, len), 64, false)).collect();
        until("creditors to hold something", || cluster.lenders.iter().map(held).sum::<usize>() >= 500);
        let lost = kill(&mut cluster);
        let found: Vec<_> = streams.into_iter().map(tokens).collect();
        assert_eq!(found, expected, "{fabric:?}");
        let stats = cluster.node.stats();
        println!("{fabric:?}: {lost} tokens lost, {stats:?}");
        assert!(stats.recoveries >= 1);
        cluster.assert_all_returned();
        cluster.stop();
    }
}

#[test]
fn creditors_are_killed_one_after_the_other() {
    let dir = tempfile::tempdir().unwrap();
    let files = model(dir.path(), json!({}));
    // Long enough that it still runs when the second is killed.
    let expected = alone(&files, 4096, &[(1, 1_500)], 400).remove(0);
    let mut cluster = Setup::new(FabricChoice::Shm, KvDtype::F32, &[1024, 1024, 1024, 1024]).start(&files);
    let mut stream = cluster.submit(prompt(1, 1_500), 400, false);
    let mut found = Vec::new();
    while let Some(token) = next(&mut stream) {
        found.push(token);
        if found.len() == 20 || found.len() == 40 {
            assert!(kill(&mut cluster) > 0);
        }
    }
    assert_eq!(found, expected);
    assert_eq!(cluster.node.stats().recoveries, 2);
    cluster.assert_all_returned();
    cluster.stop();
}

#[test]
fn with_two_replicas_a_killed_creditor_costs_no_recompute() {
    let dir = tempfile::tempdir().unwrap();
    let files = model(dir.path(), json!({}));
    let expected = alone(&files, 4096, &[(1, 2_000)], 64).remove(0);
    for fabric in [FabricChoice::Shm, FabricChoice::Tcp] {
        let setup = Setup { replicas: 2, ..Setup::new(fabric, KvDtype::F32, &[1024, 2048, 2048, 2048]) };
        let mut cluster = setup.start(&files);
        let mut stream = cluster.submit(prompt(1, 2_000), 64, false);
        let mut found: Vec<_> = (0..20).map(|_| next(&mut stream).unwrap()).collect();
        assert_eq!(cluster.node.stats().unreplicated_blocks, 0);
        // The one that is asked, not the one that holds the copy.
        let asked = |l: &Node| l.creditor_stats().answered.load(Ordering::Relaxed);
        let victim = (0..3).max_by_key(|&i| asked(&cluster.lenders[i])).unwrap();
        cluster.lenders.remove(victim).vanish();
        while let Some(token) = next(&mut stream) {
            found.push(token);
        }
        assert_eq!(found, expected, "{fabric:?}");
        let stats = cluster.node.stats();
        assert_eq!(stats.recomputed_tokens, 0);
        cluster.assert_all_returned();
        cluster.stop();
    }
}

#[test]
fn a_request_that_nobody_can_hold_any_more_ends_and_takes_nobody_along() {
    let dir = tempfile::tempdir().unwrap();
    let files = model(dir.path(), json!({}));
    for fabric in [FabricChoice::Shm, FabricChoice::Tcp] {
        let mut cluster = Setup::new(fabric, KvDtype::Bf16, &[256, 4096]).start(&files);
        let mut long = cluster.submit(prompt(1, 700), 3000, false);
        assert!(next(&mut long).is_some());
        let short = cluster.submit(prompt(2, 30), 60, false);
        cluster.lenders.pop().unwrap().vanish();
        let message = outcome(long).unwrap_err();
        assert!(message.contains("rBlocks of KV memory"), "{message}");
        assert_eq!(tokens(short).len(), 60);
        cluster.assert_all_returned();
        cluster.stop();
    }
}

/// A lender in a process of its own, which can be stopped as if it were cut off.
struct Process(Child);

impl Process {
    fn lender(cluster: &Cluster, fabric: &str, bytes: usize) -> Self {
        let any = "127.0.0.1:0";
        let child = Command::new(env!("CARGO_BIN_EXE_distkv"))
            .args(["serve", "--no-model", "--listen", any, "--fabric-listen", any, "--fabric", fabric])
            .args(["--cluster", &cluster.name, "--kv-memory", &bytes.to_string()])
            .args(["--join", cluster.node.control_address()])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Self(child)
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.0), signal).unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may be dead, and the test is over.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_creditor_that_falls_silent_is_done_without_and_frees_what_it_lent_when_it_is_back() {
    // Long enough for the ledger to hear of the loan while it is in force.
    const TOKENS: usize = 700;
    let dir = tempfile::tempdir().unwrap();
    let files = model(dir.path(), json!({}));
    let expected = alone(&files, 4096, &[(1, 1_500)], TOKENS).remove(0);
    for (fabric, name) in [(FabricChoice::Shm, "shm"), (FabricChoice::Tcp, "tcp")] {
        let mut setup = Setup::new(fabric, KvDtype::F32, &[512]);
        setup.tuning.deadline = Duration::from_millis(300);
        let cluster = setup.start(&files);
        let block = files.config.kv_shape(16, KvDtype::F32).block_bytes();
        let others = || -> Vec<(String, u32)> {
            let ledger = cluster.node.view().ledger();
            let known = ledger.instances.iter().filter(|i| !i.me);
            known.filter_map(|i| Some((i.id.clone(), i.row.as_ref()?.lent))).collect()
        };
        // Either has room for all: the one that is chosen falls silent, the other
        // takes its place.
        let mut lenders: Vec<(String, Process)> = Vec::new();
        for count in 1..=2 {
            let process = Process::lender(&cluster, name, 128 * block);
            until("the process to join", || others().len() == count);
            let new = others().into_iter().find(|(id, _)| lenders.iter().all(|(known, _)| known != id)).unwrap();
            lenders.push((new.0, process));
        }
        until("their memory to be in reach", || cluster.node.stats().reach_tokens >= 4_096);
        let mut stream = cluster.submit(prompt(1, 1_500), TOKENS, false);
        let mut found: Vec<_> = (0..20).map(|_| next(&mut stream).unwrap()).collect();
        until("one to say what it lends", || others().iter().any(|(_, lent)| *lent > 0));
        let chosen = others().into_iter().max_by_key(|(_, lent)| *lent).unwrap().0;
        let lent = || others().into_iter().find(|(id, _)| *id == chosen).map(|(_, lent)| lent);
        let silent = &lenders.iter().find(|(id, _)| *id == chosen).unwrap().1;
        silent.signal(Signal::STOP);
        while let Some(token) = next(&mut stream) {
            found.push(token);
        }
        assert_eq!(found, expected, "{fabric:?}");
        assert!(cluster.node.stats().recomputed_tokens > 0);
        cluster.assert_all_returned();
        silent.signal(Signal::CONT);
        until("the process to free what it lent", || lent() == Some(0));
        let again = tokens(cluster.submit(prompt(1, 1_500), TOKENS, false));
        assert_eq!(again, expected, "{fabric:?}");
        cluster.stop();
    }
}
