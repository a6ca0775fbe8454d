//! `/v1/completions`.

use std::sync::{Arc, Mutex};

use distkv::engine::{FinishReason, Output, Request};
use serde_json::{Value, json};

use crate::http::Server;
use crate::toy::{self, BOS, EOS, says};

/// A server that answers `text` and keeps the requests it was sent.
fn recording(text: &'static str) -> (Server, Arc<Mutex<Vec<Request>>>) {
    let requests = Arc::new(Mutex::new(Vec::new()));
    let kept = requests.clone();
    let server = Server::start(toy::model(move |submitted| {
        kept.lock().unwrap().push(submitted.request.clone());
        submitted.started(submitted.index);
        submitted.say(text);
        submitted.finish(FinishReason::Length);
        Ok(())
    }));
    (server, requests)
}

#[test]
fn a_completion_is_openais_object() {
    let (server, requests) = recording("hello");
    let mut answer = server.post("/v1/completions", &json!({"model": "toy", "prompt": "ab"})).json();
    assert!(answer["id"].as_str().unwrap().starts_with("cmpl-"));
    assert!(answer["created"].as_u64().unwrap() > 1_700_000_000);
    answer["id"].take();
    answer["created"].take();
    assert_eq!(
        answer,
        json!({
            "id": null, "object": "text_completion", "created": null, "model": "toy",
            "choices": [{"index": 0, "text": "hello", "logprobs": null, "finish_reason": "length"}],
            "usage": {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8,
                      "prompt_tokens_details": {"cached_tokens": 0}},
        })
    );
    let request = requests.lock().unwrap().remove(0);
    assert_eq!(request.prompt, [BOS, 97, 98]);
    assert_eq!(request.max_tokens, 16);
    assert_eq!(request.stop_tokens, [EOS]);
    assert!(!request.prompt_logprobs);
}

#[test]
fn every_sampling_field_reaches_the_engine() {
    let (server, requests) = recording("x");
    let body = json!({
        "prompt": [104, 105], "max_tokens": 7, "temperature": 0.5, "top_p": 0.25, "top_k": 4, "min_p": 0.125,
        "seed": -1, "repetition_penalty": 1.5, "presence_penalty": 0.75, "frequency_penalty": -0.5,
        "logit_bias": {"65": 2, "66": -1.5}, "ignore_eos": true, "stop_token_ids": [10], "nonsense": {"is": "ignored"},
        "user": null,
    });
    assert_eq!(server.post("/v1/completions", &body).status, 200);
    let request = requests.lock().unwrap().remove(0);
    assert_eq!(request.prompt, [104, 105]);
    assert_eq!(request.max_tokens, 7);
    assert_eq!(request.stop_tokens, [10]);
    let s = request.sampling;
    assert_eq!((s.temperature, s.top_p, s.top_k, s.min_p), (0.5, 0.25, 4, 0.125));
    assert_eq!((s.repetition_penalty, s.presence_penalty, s.frequency_penalty), (1.5, 0.75, -0.5));
    assert_eq!(s.seed, Some(u64::MAX));
    assert_eq!(s.logit_bias, [(65, 2.0), (66, -1.5)]);
    assert_eq!(s.logprobs, None);
}

#[test]
fn several_prompts_times_n_are_numbered_and_prompts_count_once() {
    let (server, requests) = recording("ok");
    let body = json!({"prompt": ["a", "bcd"], "n": 2, "best_of": 2, "seed": 9, "add_special_tokens": false});
    let answer = server.post("/v1/completions", &body).json();
    let indices: Vec<&Value> = answer["choices"].as_array().unwrap().iter().map(|choice| &choice["index"]).collect();
    assert_eq!(indices, [0, 1, 2, 3]);
    assert_eq!(answer["usage"]["prompt_tokens"], 4);
    assert_eq!(answer["usage"]["completion_tokens"], 8);
    // The script says as many as there were requests before: 0 and 2 for the
    // first choices of the two prompts.
    assert_eq!(answer["usage"]["prompt_tokens_details"]["cached_tokens"], 2);
    let requests = requests.lock().unwrap();
    let seeds: Vec<u64> = requests.iter().map(|request| request.sampling.seed.unwrap()).collect();
    assert_eq!(seeds[0], 9);
    assert_ne!(seeds[1], 9);
    assert_eq!(seeds[..2], seeds[2..]);
    assert_eq!(requests[2].prompt, [98, 99, 100]);
}

#[test]
fn arrays_of_token_arrays_are_prompts() {
    let (server, requests) = recording("ok");
    assert_eq!(server.post("/v1/completions", &json!({"prompt": [[1, 2], [3]]})).status, 200);
    let prompts: Vec<Vec<u32>> = requests.lock().unwrap().iter().map(|request| request.prompt.clone()).collect();
    assert_eq!(prompts, [vec![1, 2], vec![3]]);
}

#[test]
fn a_stream_carries_the_same_text_and_its_usage() {
    let server = Server::start(says("héllo"));
    let body = json!({"prompt": "ab", "stream": true, "stream_options": {"include_usage": true}});
    let (events, done) = server.post("/v1/completions", &body).events();
    assert!(done);
    let (usage, chunks) = events.split_last().unwrap();
    let text: String = chunks.iter().map(|chunk| chunk["choices"][0]["text"].as_str().unwrap()).collect();
    assert_eq!(text, "héllo");
    for chunk in chunks {
        assert_eq!(chunk["object"], "text_completion");
        assert_eq!(chunk["id"], usage["id"]);
        assert_eq!(chunk.get("usage"), Some(&Value::Null));
    }
    let finishes: Vec<&Value> = chunks.iter().map(|chunk| &chunk["choices"][0]["finish_reason"]).collect();
    let (last, before) = finishes.split_last().unwrap();
    assert_eq!(**last, "stop");
    assert!(before.iter().all(|finish| finish.is_null()));
    assert_eq!(usage["choices"], json!([]));
    assert_eq!(usage["usage"]["completion_tokens"], 6);

    let (events, done) = server.post("/v1/completions", &json!({"prompt": "ab", "stream": true})).events();
    assert!(done);
    assert!(events.iter().all(|event| event.get("usage").is_none()));
}

#[test]
fn a_stop_string_across_tokens_ends_the_text_before_it_and_cancels() {
    for stream in [false, true] {
        let cancelled = Arc::new(Mutex::new(None));
        let kept = cancelled.clone();
        // The engine never finishes by itself.
        let server = Server::start(toy::model(move |submitted| {
            submitted.started(0);
            submitted.say("one ENough. END and more");
            *kept.lock().unwrap() = Some(submitted);
            Ok(())
        }));
        let body = json!({"prompt": "ab", "stop": ["END", "never"], "logprobs": 0, "stream": stream});
        let reply = server.post("/v1/completions", &body);
        let mut text = String::new();
        let mut tokens = String::new();
        let mut finish = Value::Null;
        let chunks = if stream { reply.events().0 } else { vec![reply.json()] };
        for chunk in &chunks {
            let choice = &chunk["choices"][0];
            text += choice["text"].as_str().unwrap();
            if let Some(list) = choice["logprobs"]["tokens"].as_array() {
                tokens.extend(list.iter().map(|token| token.as_str().unwrap()));
            }
            finish = choice["finish_reason"].clone();
        }
        assert_eq!(text, "one ENough. ");
        assert_eq!(tokens, text, "the tokens are those of the text");
        assert_eq!(finish, "stop");
        assert!(cancelled.lock().unwrap().take().unwrap().is_cancelled());
    }
}

#[test]
fn text_that_only_looked_like_a_stop_is_not_lost() {
    let server = Server::start(says("an EN"));
    for stream in [false, true] {
        let reply = server.post("/v1/completions", &json!({"prompt": "a", "stop": "END", "stream": stream}));
        let chunks = if stream { reply.events().0 } else { vec![reply.json()] };
        let text: String = chunks.iter().map(|chunk| chunk["choices"][0]["text"].as_str().unwrap()).collect();
        assert_eq!(text, "an EN");
    }
}

#[test]
fn logprobs_are_four_parallel_arrays() {
    let server = Server::start(says("aé"));
    let answer = server.post("/v1/completions", &json!({"prompt": "x", "logprobs": 2})).json();
    let logprobs = &answer["choices"][0]["logprobs"];
    assert_eq!(logprobs["tokens"].as_array().unwrap().len(), 3);
    assert_eq!(logprobs["tokens"][0], "a");
    assert_eq!(logprobs["token_logprobs"], json!([-0.25, -0.25, -0.25]));
    assert_eq!(logprobs["top_logprobs"][0], json!({"a": -0.25, "b": -1.25}));
    assert_eq!(logprobs["text_offset"], json!([0, 1, 1]));
}

#[test]
fn echo_repeats_the_prompt_with_its_logprobs() {
    let server = Server::start(toy::model(|submitted| {
        submitted.started(0);
        if submitted.request.prompt_logprobs {
            let rest = &submitted.request.prompt[1..];
            submitted.send(Output::PromptLogprobs(rest.iter().map(|&id| toy::logprobs(id, 1)).collect()));
        }
        submitted.say("!");
        submitted.finish(FinishReason::Length);
        Ok(())
    }));
    let answer = server.post("/v1/completions", &json!({"prompt": [97, 98], "echo": true})).json();
    assert_eq!(answer["choices"][0]["text"], "ab!");

    let body = json!({"prompt": [97, 98], "echo": true, "logprobs": 1, "stream": false});
    let whole = server.post("/v1/completions", &body).json();
    let logprobs = &whole["choices"][0]["logprobs"];
    assert_eq!(logprobs["tokens"], json!(["a", "b", "!"]));
    assert_eq!(logprobs["token_logprobs"], json!([null, -0.25, -0.25]));
    assert_eq!(logprobs["text_offset"], json!([0, 1, 2]));

    // What lm-eval sends: only the prompt is of interest.
    let body = json!({"prompt": [97, 98], "echo": true, "logprobs": 1, "max_tokens": 0});
    let scored = server.post("/v1/completions", &body).json();
    assert_eq!(scored["choices"][0]["text"], "ab");
    assert_eq!(scored["choices"][0]["logprobs"]["tokens"], json!(["a", "b"]));
    assert_eq!(scored["usage"]["completion_tokens"], 0);

    let body = json!({"prompt": [97, 98], "echo": true, "logprobs": 1, "stream": true});
    let (events, _) = server.post("/v1/completions", &body).events();
    assert_eq!(events[0]["choices"][0]["text"], "ab");
    assert_eq!(events[0]["choices"][0]["logprobs"]["tokens"], json!(["a", "b"]));
    assert_eq!(events[1]["choices"][0]["text"], "!");
    assert_eq!(events[1]["choices"][0]["logprobs"]["text_offset"], json!([2]));
}

#[test]
fn tokens_go_both_ways() {
    let server = Server::start(says(""));
    let answer = server.post("/tokenize", &json!({"prompt": "hé", "return_token_strs": true})).json();
    assert_eq!(answer["tokens"], json!([BOS, 104, 195, 169]));
    assert_eq!((answer["count"].as_u64(), answer["max_model_len"].as_u64()), (Some(4), Some(128)));
    assert_eq!(answer["token_strs"][1], "h");
    let chat = server.post("/tokenize", &json!({"messages": [{"role": "user", "content": "x"}]})).json();
    let text = server.post("/detokenize", &json!({"tokens": chat["tokens"]})).json();
    assert_eq!(text["prompt"], "<user>x<assistant>");
}
