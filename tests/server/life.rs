//! Clients that go, clients that are slow, and the node's own end.

use std::io::BufReader;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use distkv::cli::status;
use distkv::engine::FinishReason;
use distkv::server::ServerState;
use serde_json::json;

use crate::http::{PATIENCE, Reply, Server, chunk, head};
use crate::toy::{self, Submitted, says};

/// A server whose requests the test answers.
fn manual() -> (Server, Receiver<Submitted>) {
    let (sender, submitted) = channel();
    let sender = Mutex::new(sender);
    let server = Server::start(toy::model(move |request| {
        sender.lock().unwrap().send(request).unwrap();
        Ok(())
    }));
    (server, submitted)
}

fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < PATIENCE, "{what} did not come about");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_client_that_goes_cancels_its_request() {
    let (server, submitted) = manual();
    for stream in [true, false] {
        let body = json!({"prompt": "a", "stream": stream, "n": 2}).to_string();
        let socket = server.open("POST", "/v1/completions", &[], body.as_bytes());
        let requests: Vec<Submitted> = (0..2).map(|_| submitted.recv_timeout(PATIENCE).unwrap()).collect();
        requests[0].started(0);
        requests[0].say("hi");
        if stream {
            let mut reader = BufReader::new(socket);
            assert_eq!(head(&mut reader).0, 200);
            chunk(&mut reader).unwrap();
        } else {
            drop(socket);
        }
        for request in &requests {
            wait_until("the cancellation", || request.is_cancelled());
        }
    }
    let metrics = server.get("/metrics").body;
    assert!(metrics.contains("request_success_total{finished_reason=\"abort\"} 4"), "{metrics}");
    assert_eq!(server.get("/health").status, 200);
}

#[test]
fn tokens_leave_as_they_come() {
    let (server, submitted) = manual();
    let body = json!({"prompt": "a", "stream": true}).to_string();
    let mut reader = BufReader::new(server.open("POST", "/v1/completions", &[], body.as_bytes()));
    let request = submitted.recv_timeout(PATIENCE).unwrap();
    request.started(0);
    assert_eq!(head(&mut reader).0, 200);
    for text in ["a", "b", "c"] {
        // The next token is not generated before this one has arrived.
        request.say(text);
        let event = String::from_utf8(chunk(&mut reader).unwrap()).unwrap();
        assert!(event.contains(&format!("\"text\":\"{text}\"")), "{event}");
    }
    request.finish(FinishReason::Stop);
    while chunk(&mut reader).is_some() {}
}

#[test]
fn a_client_that_does_not_read_blocks_nobody() {
    let (server, submitted) = manual();
    let body = json!({"prompt": "slow", "stream": true}).to_string();
    let slow = server.open("POST", "/v1/completions", &[], body.as_bytes());
    let request = submitted.recv_timeout(PATIENCE).unwrap();
    request.started(0);
    // Far more than the socket's buffers hold: each token is an event of about
    // 200 bytes.
    let text = "x".repeat(100_000);
    request.say(&text);
    request.finish(FinishReason::Length);
    for _ in 0..3 {
        let body = json!({"prompt": "fast"}).to_string();
        let fast = server.open("POST", "/v1/completions", &[], body.as_bytes());
        let request = submitted.recv_timeout(PATIENCE).unwrap();
        request.started(0);
        request.say("ok");
        request.finish(FinishReason::Stop);
        assert_eq!(Reply::read(fast).json()["choices"][0]["text"], "ok");
    }
    // The slow one loses nothing.
    let (events, done) = Reply::read(slow).events();
    assert!(done);
    let got: usize = events.iter().filter_map(|e| e["choices"][0]["text"].as_str()).map(str::len).sum();
    assert_eq!(got, text.len());
}

#[test]
fn draining_finishes_what_runs_and_refuses_the_rest() {
    let (mut server, submitted) = manual();
    let body = json!({"prompt": "a", "stream": true}).to_string();
    let running = server.open("POST", "/v1/completions", &[], body.as_bytes());
    let request = submitted.recv_timeout(PATIENCE).unwrap();
    request.started(0);
    assert_eq!(server.get("/ready").status, 200);
    server.shut_down();
    wait_until("draining", || server.state.is_draining());
    let refused = server.post("/v1/completions", &json!({"prompt": "b"}));
    assert_eq!((refused.status, refused.header("retry-after")), (503, Some("5")));
    assert!(refused.json()["error"]["message"].as_str().unwrap().contains("draining"));
    assert_eq!(server.get("/ready").status, 503);
    assert_eq!(server.get("/health").status, 200);
    request.say("last words");
    request.finish(FinishReason::Stop);
    let (events, done) = Reply::read(running).events();
    assert!(done);
    let text: String = events.iter().filter_map(|e| e["choices"][0]["text"].as_str()).collect();
    assert_eq!(text, "last words");
    server.join();
}

#[test]
fn a_client_that_never_reads_cannot_keep_a_node_from_ending() {
    let (sender, submitted) = channel();
    let state = toy::state(Some(toy::model(move |request| {
        sender.send(request).unwrap();
        Ok(())
    })));
    let mut server = Server::with(state.with_drain_limit(Duration::from_millis(20)));
    let body = json!({"prompt": "a", "stream": true}).to_string();
    let stuck = server.open("POST", "/v1/completions", &[], body.as_bytes());
    let request = submitted.recv_timeout(PATIENCE).unwrap();
    server.shut_down();
    server.join();
    assert!(request.is_cancelled());
    drop(stuck);
}

#[test]
fn a_node_is_not_ready_before_its_owner_says_so() {
    let ready = Arc::new(AtomicBool::new(false));
    let model = says("x");
    let state = ServerState::new(Some(model), Arc::new(Default::default), Arc::new(|| json!({})), ready.clone());
    let server = Server::with(state);
    assert_eq!(server.get("/ready").status, 503);
    assert_eq!(server.get("/health").status, 200);
    assert_eq!(server.post("/v1/completions", &json!({"prompt": "a"})).status, 503);
    ready.store(true, Ordering::Release);
    assert_eq!(server.get("/ready").status, 200);
    assert_eq!(server.post("/v1/completions", &json!({"prompt": "a"})).status, 200);
}

#[test]
fn status_reads_any_node() {
    let server = Server::with(toy::state(Some(says("x"))).with_api_key(Some("secret")));
    let mut args = status::Args { url: server.url(), json: false, watch: false, api_key: Some("secret".into()) };
    status::run(args.clone()).unwrap();
    args.api_key = None;
    let error = format!("{:#}", status::run(args).unwrap_err());
    assert!(error.contains("401") && error.contains("needs an API key"), "{error}");
}

#[test]
fn figures_count_what_was_served() {
    let server = Server::start(says("abc"));
    for _ in 0..2 {
        assert_eq!(server.post("/v1/completions", &json!({"prompt": "a"})).status, 200);
    }
    let reply = server.get("/metrics");
    assert!(reply.header("content-type").unwrap().starts_with("application/openmetrics-text"));
    for line in [
        "time_to_first_token_seconds_count 2",
        "inter_token_latency_seconds_count 4",
        "time_per_output_token_seconds_count 2",
        "e2e_request_latency_seconds_count 2",
        "request_queue_time_seconds_count 2",
        "request_success_total{finished_reason=\"stop\"} 2",
        "num_requests_running 2",
        "rblocks{state=\"free\"} 4",
    ] {
        assert!(reply.body.contains(line), "{line} is not in\n{}", reply.body);
    }
    let cluster = server.get("/cluster").json();
    assert_eq!(cluster["latency"]["time_to_first_token"]["count"], 2);
    assert_eq!(cluster["instances"], json!([]));
    let models = server.get("/v1/models").json();
    assert_eq!(models["data"][0]["id"], "toy");
    assert_eq!(models["data"][0]["max_model_len"], 128);
    assert_eq!(models["data"][1]["id"], "org/toy");
    assert_eq!(server.get("/version").json()["version"], env!("CARGO_PKG_VERSION"));
}
