//! `/v1/chat/completions`.

use std::sync::{Arc, Mutex};

use distkv::engine::{FinishReason, Request};
use distkv::model::sampler::SamplingParams;
use serde_json::{Value, json};

use crate::http::Server;
use crate::toy::{self, says};

/// A server that answers "fine" and keeps the requests it was sent.
fn recording() -> (Server, Arc<Mutex<Vec<Request>>>) {
    let requests = Arc::new(Mutex::new(Vec::new()));
    let kept = requests.clone();
    let mut model = toy::model(move |submitted| {
        kept.lock().unwrap().push(submitted.request.clone());
        submitted.started(5);
        submitted.say("fine");
        submitted.finish(FinishReason::Stop);
        Ok(())
    });
    model.max_len = 512;
    model.defaults = SamplingParams { temperature: 0.6, top_k: 50, ..SamplingParams::default() };
    (Server::start(model), requests)
}

fn prompt(request: &Request) -> String {
    String::from_utf8(request.prompt.iter().map(|&id| id as u8).collect()).unwrap()
}

#[test]
fn an_answer_is_openais_object() {
    let (server, requests) = recording();
    let body = json!({"model": "org/toy", "messages": [{"role": "user", "content": "hi"}]});
    let mut answer = server.post("/v1/chat/completions", &body).json();
    assert!(answer["id"].as_str().unwrap().starts_with("chatcmpl-"));
    answer["id"].take();
    answer["created"].take();
    assert_eq!(
        answer,
        json!({
            "id": null, "object": "chat.completion", "created": null, "model": "toy",
            "choices": [{
                "index": 0, "message": {"role": "assistant", "content": "fine", "refusal": null},
                "logprobs": null, "finish_reason": "stop",
            }],
            "usage": {"prompt_tokens": 19, "completion_tokens": 4, "total_tokens": 23,
                      "prompt_tokens_details": {"cached_tokens": 5}},
        })
    );
    let requests = requests.lock().unwrap();
    assert_eq!(prompt(&requests[0]), "<user>hi<assistant>");
    // All that fits, and the model's own defaults.
    assert_eq!(requests[0].max_tokens, 512 - 19);
    assert_eq!((requests[0].sampling.temperature, requests[0].sampling.top_k), (0.6, 50));
}

#[test]
fn a_stream_begins_with_the_role_and_ends_with_the_reason() {
    let (server, _) = recording();
    let body = json!({"messages": [{"role": "user", "content": "hi"}], "stream": true,
                      "stream_options": {"include_usage": true}, "max_completion_tokens": 9, "max_tokens": 3});
    let (events, done) = server.post("/v1/chat/completions", &body).events();
    assert!(done);
    assert_eq!(events[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    let (usage, chunks) = events.split_last().unwrap();
    let text: String = chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(text, "fine");
    assert!(chunks.iter().all(|chunk| chunk["object"] == "chat.completion.chunk"));
    let last = chunks.last().unwrap();
    assert_eq!(last["choices"][0], json!({"index": 0, "delta": {}, "logprobs": null, "finish_reason": "stop"}));
    assert_eq!(usage["usage"]["prompt_tokens_details"]["cached_tokens"], 5);
}

#[test]
fn messages_reach_the_template_as_it_knows_them() {
    let (server, requests) = recording();
    let body = json!({
        "messages": [
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": null,
             "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\"x\": 1}"}}]},
            {"role": "tool", "tool_call_id": "1", "content": "7"},
        ],
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "max_completion_tokens": 2,
    });
    assert_eq!(server.post("/v1/chat/completions", &body).status, 200);
    let requests = requests.lock().unwrap();
    let calls = json!([{"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]);
    let expected = format!("[1 tools]<system>be brief<user>a\nb<assistant>{calls}<tool>7<assistant>");
    // 0 of the special tokens: the template writes them.
    assert_eq!(prompt(&requests[0])[..20], expected[..20]);
    assert_eq!(prompt(&requests[0]), expected);
    assert_eq!(requests[0].max_tokens, 2);
}

#[test]
fn tools_that_may_not_be_used_are_not_shown() {
    let (server, requests) = recording();
    let body = json!({"messages": [{"role": "user", "content": "a"}], "tools": [{}], "tool_choice": "none"});
    assert_eq!(server.post("/v1/chat/completions", &body).status, 200);
    assert_eq!(prompt(&requests.lock().unwrap()[0]), "<user>a<assistant>");
}

#[test]
fn logprobs_have_tokens_bytes_and_alternatives() {
    let server = Server::start(says("hé"));
    let body = json!({"messages": [{"role": "user", "content": "a"}], "logprobs": true, "top_logprobs": 2});
    let whole = server.post("/v1/chat/completions", &body).json();
    let content = whole["choices"][0]["logprobs"]["content"].as_array().unwrap().clone();
    assert_eq!(content.len(), 3);
    assert_eq!(
        content[0],
        json!({
            "token": "h", "logprob": -0.25, "bytes": [104],
            "top_logprobs": [
                {"token": "h", "logprob": -0.25, "bytes": [104]},
                {"token": "i", "logprob": -1.25, "bytes": [105]},
            ],
        })
    );
    assert_eq!(content[1]["bytes"], json!([195]));

    let mut body = body;
    body["stream"] = true.into();
    let (events, _) = server.post("/v1/chat/completions", &body).events();
    let streamed: Vec<Value> = events
        .iter()
        .filter_map(|event| event["choices"][0]["logprobs"]["content"].as_array())
        .flatten()
        .cloned()
        .collect();
    assert_eq!(streamed, content);
}

#[test]
fn choices_of_a_stream_are_interleaved_under_their_numbers() {
    let server = Server::start(toy::model(|submitted| {
        submitted.started(0);
        submitted.say(["zero", "one", "two"][submitted.index]);
        submitted.finish(FinishReason::Stop);
        Ok(())
    }));
    let body = json!({"messages": [{"role": "user", "content": "a"}], "n": 3, "stream": true});
    let (events, done) = server.post("/v1/chat/completions", &body).events();
    assert!(done);
    let mut texts = [String::new(), String::new(), String::new()];
    let mut finished = 0;
    for event in &events {
        let choice = &event["choices"][0];
        let index = choice["index"].as_u64().unwrap() as usize;
        texts[index] += choice["delta"]["content"].as_str().unwrap_or_default();
        finished += usize::from(choice["finish_reason"] == "stop");
    }
    assert_eq!(texts, ["zero", "one", "two"]);
    assert_eq!(finished, 3);
}
