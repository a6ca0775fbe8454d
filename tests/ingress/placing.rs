//! Where requests run, seen from outside: answers are the same wherever.

use std::thread;

use serde_json::{Value, json};

use crate::cluster::{Node, model, name};

fn prompt(i: usize, len: usize) -> Value {
    json!((0..len).map(|k| (k * 31 + i * 97) % 2048).collect::<Vec<_>>())
}

/// The same, but for the last digits of what is computed in other batches.
fn same(a: &Value, b: &Value) {
    match (a, b) {
        (Value::Array(a), Value::Array(b)) => {
            assert_eq!(a.len(), b.len());
            a.iter().zip(b).for_each(|(a, b)| same(a, b));
        }
        (Value::Object(a), Value::Object(b)) => {
            assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>());
            a.values().zip(b.values()).for_each(|(a, b)| same(a, b));
        }
        _ => match (a.as_f64(), b.as_f64()) {
            (Some(a), Some(b)) => assert!((a - b).abs() < 1e-3, "{a} {b}"),
            _ => assert_eq!(a, b),
        },
    }
}

#[test]
fn an_answer_is_the_same_wherever_it_comes_from() {
    let dir = tempfile::tempdir().unwrap();
    model(dir.path());
    let cluster = name();
    let small = Node::start(dir.path(), &cluster, 192, None, &["--lend", "0"]);
    let large = Node::start(dir.path(), &cluster, 4096, Some(&small), &["--lend", "0"]);
    small.knows(2);
    let bodies = [
        json!({"temperature": 0, "max_tokens": 40, "echo": true, "logprobs": 3}),
        json!({"temperature": 0.8, "seed": 3, "top_k": 4, "n": 3, "max_tokens": 30, "logprobs": 2}),
        json!({"temperature": 0.9, "seed": 4, "top_k": 4, "max_tokens": 200, "stop": ["w7", "w11"], "ignore_eos": true}),
        json!({"temperature": 0, "max_tokens": 0, "echo": true, "logprobs": 1}),
        json!({"temperature": 0, "max_tokens": 8, "logit_bias": {"300": 100}}),
    ];
    for (i, mut body) in bodies.into_iter().enumerate() {
        body["prompt"] = prompt(i, 220);
        let here = large.post(&body);
        let there = small.post(&body);
        assert_eq!((here.0, there.0), (200, 200), "{} {}", here.1, there.1);
        same(&there.1["choices"], &here.1["choices"]);
        for tokens in ["prompt_tokens", "completion_tokens"] {
            assert_eq!(there.1["usage"][tokens], here.1["usage"][tokens]);
        }
        if i == 4 {
            // The second of two same prompts is known where it ran.
            assert_eq!(there.1["usage"]["prompt_tokens_details"]["cached_tokens"], 208);
        }
    }
    assert_eq!((small.requests("placed_elsewhere"), large.requests("taken_in")), (7, 7));
    assert_eq!(small.requests("declined") + small.requests("continued"), 0);
    // What fits stays.
    let (status, _) = small.post(&json!({"prompt": prompt(9, 20), "max_tokens": 5}));
    assert_eq!((status, small.requests("placed_elsewhere")), (200, 7));
}

#[test]
fn what_would_be_too_many_requests_goes_elsewhere() {
    let dir = tempfile::tempdir().unwrap();
    model(dir.path());
    let few = ["--max-sequences", "1", "--max-waiting", "1"];
    let codes = |node: &Node| {
        let ask = |i| {
            let (node, body) = (node, json!({"prompt": prompt(i, 40), "max_tokens": 300, "ignore_eos": true}));
            move || node.post(&body).0
        };
        thread::scope(|scope| {
            let threads: Vec<_> = (0..6).map(|i| scope.spawn(ask(i))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
        })
    };
    // By itself it refuses some.
    let cluster = name();
    let local = Node::start(dir.path(), &cluster, 1024, None, &[&few[..], &["--place", "local"]].concat());
    let other = Node::start(dir.path(), &cluster, 4096, Some(&local), &[]);
    assert!(codes(&local).contains(&429));
    assert_eq!((local.requests("placed_elsewhere"), other.requests("taken_in")), (0, 0));

    let cluster = name();
    let node = Node::start(dir.path(), &cluster, 1024, None, &few);
    let other = Node::start(dir.path(), &cluster, 4096, Some(&node), &[]);
    node.knows(2);
    assert_eq!(codes(&node), [200; 6]);
    assert!(node.requests("placed_elsewhere") >= 1 && other.requests("taken_in") >= 1);
}

#[test]
fn the_api_key_holds_between_nodes_too() {
    let dir = tempfile::tempdir().unwrap();
    model(dir.path());
    let cluster = name();
    let node = Node::start(dir.path(), &cluster, 192, None, &[]);
    let other = Node::start(dir.path(), &cluster, 4096, Some(&node), &["--api-key", "of clients"]);
    node.knows(2);
    let (status, answer) = node.post(&json!({"prompt": prompt(0, 220), "max_tokens": 5, "temperature": 0}));
    assert_eq!((status, node.requests("placed_elsewhere")), (200, 0), "{answer}");
    assert_eq!(node.requests("declined"), 1);
    assert!(other.get("/metrics").contains("peer_requests_refused_total 1"));
}

#[test]
fn nodes_of_another_model_are_not_asked() {
    let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    model(dir.path());
    model(other.path());
    let config = std::fs::read_to_string(other.path().join("config.json")).unwrap();
    std::fs::write(other.path().join("config.json"), config.replace("100000.0", "10000.0")).unwrap();
    let cluster = name();
    let node = Node::start(dir.path(), &cluster, 192, None, &[]);
    // Has room for what the node must borrow for.
    let stranger = Node::start(other.path(), &cluster, 4096, Some(&node), &[]);
    node.knows(2);
    let (status, answer) = node.post(&json!({"prompt": prompt(0, 220), "max_tokens": 5, "temperature": 0}));
    assert_eq!((status, node.requests("placed_elsewhere"), stranger.requests("taken_in")), (200, 0, 0), "{answer}");
}
