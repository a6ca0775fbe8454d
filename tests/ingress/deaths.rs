//! The instance that runs requests is killed, stopped or drained while another
//! node is their ingress: every client gets the text of an undisturbed run.

use std::time::Duration;

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::cluster::{Client, Node, model, name, until};

const TOKENS: usize = 400;

/// An ingress too small for any of the requests, and two instances with room.
struct Scene {
    ingress: Node,
    runners: Vec<Node>,
    _dir: tempfile::TempDir,
}

impl Scene {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        model(dir.path());
        let cluster = name();
        let ingress = Node::start(dir.path(), &cluster, 192, None, &[]);
        let runner = || Node::start(dir.path(), &cluster, 4096, Some(&ingress), &[]);
        let runners = vec![runner(), runner()];
        ingress.knows(3);
        Self { ingress, runners, _dir: dir }
    }

    /// Greedy, and sampled with what depends on the tokens so far. From few
    /// tokens each: what is computed again is what it was up to rounding, and a
    /// draw may fall to the other side of any boundary between two tokens, of
    /// which random weights give thousands.
    fn bodies() -> Vec<Value> {
        let body = |i: usize, sampling: Value| {
            let mut body = sampling;
            body["prompt"] = json!((0..220).map(|k| (k * 31 + i * 97) % 2048).collect::<Vec<_>>());
            body["max_tokens"] = TOKENS.into();
            body["ignore_eos"] = true.into();
            body["logprobs"] = 0.into();
            body
        };
        vec![
            body(0, json!({"temperature": 0})),
            body(1, json!({"temperature": 0.9, "seed": 5, "top_k": 4})),
            body(2, json!({"temperature": 1.1, "seed": 6, "top_k": 4, "top_p": 0.9, "frequency_penalty": 0.4})),
            body(3, json!({"temperature": 0, "repetition_penalty": 1.2, "presence_penalty": 0.5})),
        ]
    }

    fn streams(&self) -> Vec<Client> {
        Self::bodies().into_iter().map(|body| self.ingress.stream(body)).collect()
    }

    /// The runner of most of so many requests.
    fn busiest(&self, requests: u64) -> usize {
        // What a node says of itself is a moment old.
        until("all requests to run", || self.runners.iter().map(Node::busy).sum::<u64>() == requests);
        (0..self.runners.len()).max_by_key(|&i| self.runners[i].busy()).unwrap()
    }
}

fn disturbed(what: &str, disturb: impl FnOnce(&mut Node)) {
    let mut scene = Scene::start();
    let expected: Vec<_> = scene.streams().iter().map(Client::whole).collect();
    assert_eq!(scene.ingress.requests("placed_elsewhere"), 4);
    let streams = scene.streams();
    streams.iter().for_each(|stream| stream.after(30));
    let victim = scene.busiest(4);
    let ran = scene.runners[victim].busy();
    assert!(ran >= 1);
    disturb(&mut scene.runners[victim]);
    let mut longest = Duration::ZERO;
    for (stream, expected) in streams.iter().zip(&expected) {
        let seen = stream.whole();
        assert_eq!(seen.text, expected.text, "{what}");
        assert_eq!(seen.logprobs, expected.logprobs, "{what}");
        longest = longest.max(seen.longest_wait);
    }
    let (continued, lost) = (scene.ingress.requests("continued"), scene.ingress.requests("lost"));
    println!("{what}: {ran} of 4 requests ran there, {continued} continued, longest pause {longest:?}");
    assert_eq!((continued, lost), (ran, 0));
    let metrics = scene.ingress.get("/metrics");
    assert!(metrics.lines().any(|line| line.starts_with("requests_continued_total{reason=")), "{metrics}");
}

#[test]
fn requests_outlive_the_sigkill_of_who_runs_them() {
    disturbed("SIGKILL", |victim| {
        victim.signal(Signal::KILL);
        victim.ended();
    });
}

#[test]
fn requests_outlive_the_sigstop_of_who_runs_them() {
    disturbed("SIGSTOP", |victim| victim.signal(Signal::STOP));
}

#[test]
fn a_node_that_drains_hands_over_what_it_runs_and_ends() {
    disturbed("SIGTERM", |victim| {
        victim.signal(Signal::TERM);
        assert!(victim.ended().success(), "{}", victim.log());
    });
}

#[test]
fn a_node_that_was_stopped_drops_what_went_on_elsewhere() {
    let scene = Scene::start();
    let stream = scene.ingress.stream(Scene::bodies().remove(0));
    stream.after(10);
    let victim = &scene.runners[scene.busiest(1)];
    victim.signal(Signal::STOP);
    stream.whole();
    victim.signal(Signal::CONT);
    until("the stopped node to drop it", || victim.busy() == 0);
    scene.ingress.knows(3);
}

#[test]
fn a_client_that_goes_is_heard_of_where_its_request_runs() {
    let scene = Scene::start();
    let stream = scene.ingress.stream(Scene::bodies().remove(0));
    stream.after(10);
    let runner = &scene.runners[scene.busiest(1)];
    stream.go();
    until("the runner to cancel", || runner.busy() == 0);
    assert_eq!(scene.ingress.requests("continued"), 0);
    // Well before its end.
    let metrics = runner.get("/metrics");
    let generated = metrics.lines().find_map(|line| line.strip_prefix("generation_tokens_total ")).unwrap();
    assert!(generated.parse::<f64>().unwrap() < TOKENS as f64, "{generated}");
}
