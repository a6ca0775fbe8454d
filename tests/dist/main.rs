//! DistAttention end to end: a cluster's answers are one big node's answers.

#[path = "../common/cluster.rs"]
mod cluster;
mod moves;
mod paths;
#[path = "../../fabric/tests/software_hca/place.rs"]
mod place;
mod recovery;

use cluster::{Cluster, Logits, Setup, model, outcome, prompt, tokens, until};
use distkv::kv::rblock::KvDtype;
use distkv::model::load::ModelFiles;
use distkv::node::transports::FabricChoice;
use serde_json::json;

/// Largest difference of two runs' logits, as a share of the spread (largest
/// minus smallest) of the first run's.
fn difference(a: &Logits, b: &Logits) -> f32 {
    let (a, b) = (a.lock().unwrap(), b.lock().unwrap());
    let mut b: Vec<_> = b.iter().collect();
    let mut a: Vec<_> = a.iter().collect();
    a.sort_by_key(|(p, _)| *p);
    b.sort_by_key(|(p, _)| *p);
    assert_eq!(a.iter().map(|r| r.0).collect::<Vec<_>>(), b.iter().map(|r| r.0).collect::<Vec<_>>());
    let mut worst = 0.0f32;
    for ((_, a), (_, b)) in a.iter().zip(&b) {
        let spread = a.iter().copied().fold(f32::MIN, f32::max) - a.iter().copied().fold(f32::MAX, f32::min);
        let apart = a.iter().zip(b).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
        worst = worst.max(apart / spread);
    }
    worst
}

/// Prefill and decode of one prompt: greedy tokens, and all logits in the
/// cluster's tap.
fn run(files: &ModelFiles, setup: &Setup, prompt_len: usize) -> (Vec<u32>, Cluster) {
    let cluster = setup.start(files);
    let tokens = tokens(cluster.submit(prompt(1, prompt_len), 64, true));
    cluster.assert_all_returned();
    (tokens, cluster)
}

fn same_as_one_node(fabric: FabricChoice, dtype: KvDtype, nodes: &[usize], prompt_len: usize, tolerance: f32) {
    let dir = tempfile::tempdir().unwrap();
    let files = model(dir.path(), json!({}));
    let (expected, one) = run(&files, &Setup::new(fabric, dtype, &[prompt_len + 128]), prompt_len);
    let (found, many) = run(&files, &Setup::new(fabric, dtype, nodes), prompt_len);
    assert_eq!(expected.len(), 64);
    assert_eq!(found, expected);
    let apart = difference(&one.logits, &many.logits);
    println!("{fabric:?} {dtype:?} {nodes:?}: logits within {apart:.1e} of their spread");
    assert!(apart <= tolerance, "logits differ by {apart} of their spread");
    assert!(many.node.exchange().histograms().iter().all(|(_, h)| h.len() > 64), "nothing was exchanged");
    assert_eq!(many.node.stats().partials_rejected, 0);
    one.stop();
    many.stop();
}

const FOUR_NODES: [usize; 4] = [2048; 4];

/// RDMA in this process: no other test of it may have looked for libibverbs
/// before (each test is a process of its own where nextest runs them).
#[allow(unsafe_code)]
fn with_software_hca() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    // SAFETY: called once, before this test starts a thread.
    ONCE.call_once(|| unsafe { std::env::set_var("DISTKV_LIBIBVERBS", place::path()) });
}

#[test]
fn a_prompt_over_four_nodes_over_verbs_bf16() {
    with_software_hca();
    same_as_one_node(FabricChoice::Verbs, KvDtype::Bf16, &FOUR_NODES, 6_100, 2e-2);
}

#[test]
fn a_prompt_over_four_nodes_over_verbs_f32() {
    with_software_hca();
    same_as_one_node(FabricChoice::Verbs, KvDtype::F32, &FOUR_NODES, 6_100, 1e-4);
}

#[test]
fn a_prompt_over_four_nodes_over_shm_bf16() {
    same_as_one_node(FabricChoice::Shm, KvDtype::Bf16, &FOUR_NODES, 6_100, 2e-2);
}

#[test]
fn a_prompt_over_four_nodes_over_shm_f32() {
    same_as_one_node(FabricChoice::Shm, KvDtype::F32, &FOUR_NODES, 6_100, 1e-4);
}

#[test]
fn a_prompt_over_four_nodes_over_shm_fp8() {
    let dir = tempfile::tempdir().unwrap();
    let files = model(dir.path(), json!({}));
    let (_, one) = run(&files, &Setup::new(FabricChoice::Shm, KvDtype::Fp8, &[6_228]), 6_100);
    let (_, many) = run(&files, &Setup::new(FabricChoice::Shm, KvDtype::Fp8, &FOUR_NODES), 6_100);
    // Sums in another order round some elements the other way, an eighth of them
    // apart: the likeliest token may change, and what follows it.
    one.logits.lock().unwrap().retain(|(position, _)| *position < 6_100);
    many.logits.lock().unwrap().retain(|(position, _)| *position < 6_100);
    let apart = difference(&one.logits, &many.logits);
    println!("fp8: logits within {apart:.1e} of their spread");
    assert!(apart <= 5e-2, "logits differ by {apart} of their spread");
    one.stop();
    many.stop();
}

#[test]
fn a_prompt_over_four_nodes_over_tcp_bf16() {
    same_as_one_node(FabricChoice::Tcp, KvDtype::Bf16, &FOUR_NODES, 6_100, 2e-2);
}

#[test]
fn a_prompt_over_four_nodes_over_tcp_f32() {
    same_as_one_node(FabricChoice::Tcp, KvDtype::F32, &FOUR_NODES, 6_100, 1e-4);
}

#[test]
fn uneven_splits_make_no_difference() {
    for nodes in [vec![64, 4096], vec![512, 48, 1000, 336], vec![1024, 16, 16, 1024]] {
        same_as_one_node(FabricChoice::Shm, KvDtype::F32, &nodes, 1_500, 1e-4);
    }
}

#[test]
fn a_sliding_window_reaches_over_the_wire_as_far_as_at_home() {
    let dir = tempfile::tempdir().unwrap();
    let mistral = json!({"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 300});
    let files = model(dir.path(), mistral);
    let (expected, one) = run(&files, &Setup::new(FabricChoice::Shm, KvDtype::F32, &[2048]), 1_200);
    let (found, many) = run(&files, &Setup::new(FabricChoice::Shm, KvDtype::F32, &[512, 512, 512]), 1_200);
    assert_eq!(found, expected);
    let apart = difference(&one.logits, &many.logits);
    assert!(apart <= 1e-4, "logits differ by {apart} of their spread");
    one.stop();
    many.stop();
}

#[test]
fn a_sequence_that_outgrows_its_node_while_decoding_moves_on() {
    let dir = tempfile::tempdir().unwrap();
    let files = model(dir.path(), json!({}));
    let one = Setup::new(FabricChoice::Shm, KvDtype::F32, &[2048]).start(&files);
    let expected = tokens(one.submit(prompt(2, 100), 700, false));
    let many = Setup::new(FabricChoice::Shm, KvDtype::F32, &[256, 512, 512]).start(&files);
    let found = tokens(many.submit(prompt(2, 100), 700, false));
    assert_eq!(found, expected);
    many.assert_all_returned();
    one.stop();
    many.stop();
}

#[test]
fn many_requests_at_once_answer_as_they_would_alone() {
    let dir = tempfile::tempdir().unwrap();
    let files = model(dir.path(), json!({}));
    let lengths = [900, 17, 300, 1500, 64, 640, 5, 1100, 33, 450, 128, 720];
    let big = Setup::new(FabricChoice::Shm, KvDtype::F32, &[8192]).start(&files);
    let alone: Vec<_> = (0..).zip(lengths).map(|(i, len)| tokens(big.submit(prompt(i, len), 24, false))).collect();
    let many = Setup::new(FabricChoice::Shm, KvDtype::F32, &[1024, 1024, 1024, 1024]).start(&files);
    for round in 0..2 {
        let streams: Vec<_> = (0..).zip(lengths).map(|(i, len)| many.submit(prompt(i, len), 24, false)).collect();
        let found: Vec<_> = streams.into_iter().map(tokens).collect();
        assert_eq!(found, alone, "round {round}");
        many.assert_all_returned();
    }
    big.stop();
    many.stop();
}

#[test]
fn a_request_whose_client_goes_gives_everything_back() {
    let dir = tempfile::tempdir().unwrap();
    let files = model(dir.path(), json!({}));
    let cluster = Setup::new(FabricChoice::Shm, KvDtype::Bf16, &[256, 1024]).start(&files);
    let mut stream = cluster.submit(prompt(1, 800), 400, false);
    assert!(stream.blocking_next().is_some());
    until("a loan", || cluster.node.stats().blocks_borrowed > 0);
    drop(stream);
    cluster.assert_all_returned();
    cluster.stop();
}

#[test]
fn what_no_cluster_can_hold_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let files = model(dir.path(), json!({}));
    let cluster = Setup::new(FabricChoice::Shm, KvDtype::Bf16, &[256, 512]).start(&files);
    // A second long request beside the first has to wait, not to fail.
    let first = cluster.submit(prompt(1, 600), 8, false);
    let second = cluster.submit(prompt(2, 600), 8, false);
    assert_eq!((tokens(first).len(), tokens(second).len()), (8, 8));
    // Growing over the cluster's edge while decoding ends with an error.
    let message = outcome(cluster.submit(prompt(3, 700), 4000, false)).unwrap_err();
    assert!(message.contains("KV memory"), "{message}");
    cluster.assert_all_returned();
    cluster.stop();
}
