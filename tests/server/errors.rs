//! Every refusal: its status, the field it names, and what it says.

use distkv::engine::{FinishReason, Output, Rejected};
use proptest::prelude::{Just, Strategy, any, prop, prop_assert, prop_assert_eq, prop_oneof};
use proptest::test_runner::TestRunner;
use serde_json::{Value, json};

use crate::http::Server;
use crate::toy::{self, says};

#[test]
fn bad_requests_name_the_field() {
    let server = Server::start(says("x"));
    let chat = |field: &str, value: Value| {
        let mut body = json!({"messages": [{"role": "user", "content": "a"}]});
        body[field] = value;
        ("/v1/chat/completions", body)
    };
    let text = |field: &str, value: Value| {
        let mut body = json!({"prompt": "a"});
        body[field] = value;
        ("/v1/completions", body)
    };
    let long = "x".repeat(200);
    let cases = [
        (text("prompt", Value::Null), "prompt", "`prompt` is required"),
        (text("prompt", json!([])), "prompt", "empty array"),
        (text("prompt", json!(7)), "prompt", "must be a string, an array of strings"),
        (text("prompt", json!([1, "a"])), "prompt", "must be made of token ids, not the string \"a\""),
        (text("prompt", json!([258])), "prompt", "token 258 is outside the vocabulary of 258"),
        (text("prompt", json!([-1])), "prompt", "must be made of token ids"),
        (text("prompt", json!([[]])), "prompt", "`prompt` is empty"),
        (text("prompt", json!(vec!["a"; 257])), "prompt", "more than 256 choices"),
        (text("temperature", json!("hot")), "temperature", "`temperature` must be a number, not the string \"hot\""),
        (text("temperature", json!(-1)), "temperature", "temperature must be at least 0, not -1"),
        (text("top_p", json!(1.5)), "top_p", "more than 0 and at most 1"),
        (text("top_k", json!(-2)), "top_k", "must be -1 or 0 (all)"),
        (text("top_k", json!(1.5)), "top_k", "must be an integer"),
        (text("min_p", json!(2)), "min_p", "from 0 to 1"),
        (text("seed", json!("x")), "seed", "must be an integer"),
        (text("logit_bias", json!({"a": 1})), "logit_bias", "\"a\" is no token id"),
        (text("logit_bias", json!({"999": 1})), "logit_bias", "vocabulary of 258"),
        (text("logit_bias", json!({"9": 101})), "logit_bias", "from -100 to 100"),
        (text("n", json!(0)), "n", "from 1 to 256"),
        (text("n", json!(-1)), "n", "an integer of at least 0"),
        (text("best_of", json!(2)), "best_of", "unsupported: best_of because"),
        (text("suffix", json!("end")), "suffix", "unsupported: suffix because"),
        (text("logprobs", json!(21)), "logprobs", "from 0 to 20"),
        (text("logprobs", json!(true)), "logprobs", "an integer of at least 0, not the boolean true"),
        (text("max_tokens", json!(0)), "max_tokens", "at least 1 unless `echo`"),
        (text("max_tokens", json!("9")), "max_tokens", "an integer"),
        (text("stop", json!("")), "stop", "empty string"),
        (text("stop", json!([1])), "stop", "a string or an array of strings"),
        (text("stop", json!(vec!["a"; 33])), "stop", "at most 32"),
        (text("stop_token_ids", json!([999])), "stop_token_ids", "outside the vocabulary"),
        (text("stream", json!(1)), "stream", "true or false, not the number 1"),
        (text("stream_options", json!({"include_usage": true})), "stream_options", "needs `stream`"),
        (text("echo", json!("yes")), "echo", "true or false"),
        (text("model", json!(3)), "model", "a string"),
        (chat("messages", Value::Null), "messages", "`messages` is required"),
        (chat("messages", json!([])), "messages", "is empty"),
        (chat("messages", json!(["a"])), "messages[0]", "must be an object"),
        (chat("messages", json!([{"content": "a"}])), "messages[0].role", "must be a string, not null"),
        (chat("messages", json!([{"role": "bad", "content": "a"}])), "messages", "role \"bad\" is not known"),
        (chat("messages", json!([{"role": "user", "content": 4}])), "messages[0].content", "a string or an array"),
        (
            chat("messages", json!([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}])),
            "messages[0].content",
            "a part of type \"image_url\" is no text",
        ),
        (
            chat("response_format", json!({"type": "json_schema"})),
            "response_format",
            "unsupported: response_format because answers cannot be constrained",
        ),
        (chat("response_format", json!({})), "response_format.type", "must be a string"),
        (chat("tool_choice", json!("required")), "tool_choice", "unsupported: tool_choice because"),
        (chat("tools", json!("f")), "tools", "an array"),
        (chat("top_logprobs", json!(2)), "top_logprobs", "needs `logprobs`"),
        (chat("logprobs", json!(2)), "logprobs", "true or false"),
        (chat("max_completion_tokens", json!(0)), "max_completion_tokens", "at least 1"),
        (chat("chat_template_kwargs", json!({"a": 1})), "chat_template_kwargs", "unsupported"),
        (chat("functions", json!([{}])), "functions", "unsupported: functions because"),
        (text("min_tokens", json!(3)), "min_tokens", "use ignore_eos"),
        (text("guided_json", json!({})), "guided_json", "unsupported"),
        (chat("continue_final_message", json!(true)), "continue_final_message", "unsupported"),
        (("/detokenize", json!({"tokens": [999]})), "tokens", "outside the vocabulary"),
        (("/tokenize", json!({})), "prompt", "required"),
        // The context is 128 tokens.
        (text("prompt", json!(long)), "prompt", "maximum context length is 128 tokens, but `prompt` has 201 tokens"),
        (text("max_tokens", json!(127)), "max_tokens", "but 129 were requested"),
        (text("max_tokens", json!(u64::MAX)), "max_tokens", "ask for at most 126"),
        (
            chat("messages", json!([{"role": "user", "content": long}])),
            "messages",
            "maximum context length is 128 tokens, but `messages` has 217 tokens",
        ),
    ];
    for ((path, body), param, message) in cases {
        let reply = server.post(path, &body);
        assert_eq!(reply.status, 400, "{body}: {}", reply.body);
        let error = reply.json()["error"].take();
        assert_eq!(error["param"], param, "{body}: {error}");
        assert!(error["message"].as_str().unwrap().contains(message), "{body}: {error}");
        assert_eq!(error["type"], "invalid_request_error");
        let too_long =
            message.contains("context length") || message.contains("requested") || message.contains("at most 126");
        assert_eq!(error["code"] == "context_length_exceeded", too_long, "{error}");
    }
}

#[test]
fn what_is_not_asked_for_is_not_refused() {
    let server = Server::start(says("x"));
    let body = json!({"prompt": "a", "min_tokens": 0, "use_beam_search": false, "bad_words": [], "prompt_logprobs": null,
                      "suffix": "", "response_format": {"type": "text"}});
    assert_eq!(server.post("/v1/completions", &body).status, 200);
}

/// Any JSON value, shallow.
fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (-3i64..300).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "[a-z\\PC]{0,6}".prop_map(Value::from),
        Just(json!("user")),
        Just(json!("text")),
    ];
    leaf.prop_recursive(3, 12, 4, |inner| {
        let names = prop::sample::select(vec!["role", "content", "type", "text", "include_usage", "7", "tool_calls"]);
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map(names.prop_map(str::to_owned), inner, 0..4)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

/// Whatever the fields hold, the answer is an answer or names what is wrong.
#[test]
fn no_value_of_any_field_is_a_server_error() {
    const FIELDS: [&str; 24] = [
        "prompt",
        "messages",
        "model",
        "n",
        "best_of",
        "stop",
        "stream",
        "stream_options",
        "max_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "seed",
        "logit_bias",
        "logprobs",
        "top_logprobs",
        "echo",
        "tools",
        "tool_choice",
        "response_format",
        "stop_token_ids",
        "presence_penalty",
        "repetition_penalty",
    ];
    let server = Server::start(toy::model(|submitted| {
        submitted.started(0);
        if submitted.request.prompt_logprobs {
            let rest = &submitted.request.prompt[1..];
            submitted.send(Output::PromptLogprobs(rest.iter().map(|&id| toy::logprobs(id, 1)).collect()));
        }
        submitted.say("x");
        submitted.finish(FinishReason::Stop);
        Ok(())
    }));
    let fields = prop::collection::vec((prop::sample::select(FIELDS.to_vec()), any_json()), 0..3);
    let mut runner = TestRunner::deterministic();
    runner
        .run(&(any::<bool>(), fields), |(chat, fields)| {
            let (path, mut body) = if chat {
                ("/v1/chat/completions", json!({"messages": [{"role": "user", "content": "a"}]}))
            } else {
                ("/v1/completions", json!({"prompt": "a"}))
            };
            for (field, value) in fields {
                body[field] = value;
            }
            let reply = server.post(path, &body);
            match reply.status {
                200 => {}
                404 => prop_assert_eq!(&reply.json()["error"]["param"], "model"),
                status => {
                    prop_assert_eq!(status, 400, "{}", body);
                    prop_assert!(reply.json()["error"]["param"].is_string(), "{}: {}", body, reply.body);
                }
            }
            Ok(())
        })
        .unwrap();
}

#[test]
fn what_is_no_json_is_refused_with_its_place() {
    let server = Server::start(says("x"));
    for (body, message) in [
        (&b"{\"prompt\": \"a\",\n  oops}"[..], "line 2 column 3"),
        (b"", "line 1 column 0"),
        (b"[1]", "must be a JSON object, not an array"),
        (b"\xff", "line 1 column"),
    ] {
        let reply = server.send("POST", "/v1/completions", &[], body);
        assert_eq!(reply.status, 400);
        let error = reply.json()["error"]["message"].as_str().unwrap().to_owned();
        assert!(error.contains(message), "{error}");
    }
}

#[test]
fn an_unknown_model_is_told_the_one_served() {
    let server = Server::start(says("x"));
    for (path, rest) in [("/v1/completions", json!({})), ("/v1/chat/completions", json!({})), ("/tokenize", json!({}))]
    {
        let mut body = rest;
        body["model"] = "gpt-9".into();
        let reply = server.post(path, &body);
        assert_eq!(reply.status, 404);
        let error = reply.json()["error"].take();
        assert_eq!(error["code"], "model_not_found");
        assert_eq!(error["message"], "the model `gpt-9` does not exist here; this node serves `toy`");
    }
    assert_eq!(server.get("/v1/models/gpt-9").status, 404);
    assert_eq!(server.get("/v1/models/org/toy").json()["id"], "org/toy");
}

#[test]
fn unknown_paths_and_methods_have_error_bodies() {
    let server = Server::start(says("x"));
    let reply = server.get("/v1/images");
    assert_eq!((reply.status, reply.json()["error"]["message"].as_str()), (404, Some("there is no /v1/images here")));
    let reply = server.get("/v1/completions");
    assert_eq!(reply.status, 405);
    assert_eq!(reply.json()["error"]["message"], "/v1/completions does not take GET");
}

#[test]
fn a_body_beyond_the_limit_is_413() {
    let server = Server::with(toy::state(Some(says("x"))).with_max_body_bytes(100));
    let reply = server.post("/v1/completions", &json!({"prompt": "x".repeat(200)}));
    assert_eq!(reply.status, 413);
    assert!(reply.json()["error"]["message"].as_str().unwrap().contains("limit of 100 bytes"));
    assert_eq!(server.post("/v1/completions", &json!({"prompt": "x"})).status, 200);
}

#[test]
fn an_api_key_is_asked_for_where_it_matters() {
    let server = Server::with(toy::state(Some(says("x"))).with_api_key(Some("secret")));
    for path in ["/v1/models", "/cluster"] {
        assert_eq!(server.get(path).status, 401);
        assert_eq!(server.send("GET", path, &[("Authorization", "Bearer wrong")], b"").status, 401);
        assert_eq!(server.send("GET", path, &[("Authorization", "Basic secret")], b"").status, 401);
        assert_eq!(server.send("GET", path, &[("Authorization", "Bearer secret")], b"").status, 200);
    }
    let reply = server.post("/v1/completions", &json!({"prompt": "a"}));
    assert_eq!((reply.status, reply.json()["error"]["code"].as_str()), (401, Some("invalid_api_key")));
    for path in ["/health", "/ready", "/metrics", "/version"] {
        assert_eq!(server.get(path).status, 200);
    }
}

#[test]
fn the_engines_refusals_become_statuses() {
    let server = Server::start(toy::model(|submitted| {
        Err(match submitted.request.prompt[0] {
            1 => Rejected::Overloaded { waiting: 12 },
            2 => Rejected::Draining,
            _ => Rejected::TooLong { tokens: 4, limit: 3 },
        })
    }));
    let overloaded = server.post("/v1/completions", &json!({"prompt": [1], "stream": true}));
    assert_eq!((overloaded.status, overloaded.header("retry-after")), (429, Some("1")));
    assert!(overloaded.json()["error"]["message"].as_str().unwrap().contains("12 requests are waiting"));
    assert_eq!(server.post("/v1/completions", &json!({"prompt": [2]})).status, 503);
    let long = server.post("/v1/completions", &json!({"prompt": [3]}));
    assert_eq!((long.status, long.json()["error"]["code"].as_str()), (400, Some("context_length_exceeded")));
    assert!(long.json()["error"]["message"].as_str().unwrap().contains("the limit is 3"));
}

#[test]
fn a_refused_choice_cancels_those_before_it() {
    let (sender, receiver) = std::sync::mpsc::channel();
    let server = Server::start(toy::model(move |submitted| {
        if submitted.index == 1 {
            return Err(Rejected::Overloaded { waiting: 1 });
        }
        sender.send(submitted).unwrap();
        Ok(())
    }));
    assert_eq!(server.post("/v1/completions", &json!({"prompt": "a", "n": 2})).status, 429);
    assert!(receiver.recv().unwrap().is_cancelled());
}

#[test]
fn an_engine_failure_is_told_and_ends_the_answer() {
    let server = Server::start(toy::model(|submitted| {
        submitted.started(0);
        submitted.say("par");
        if submitted.index < 2 {
            submitted.send(distkv::engine::Output::Failed { message: "creditor 3 is gone".into() });
        }
        // The third and fourth time the engine just goes away.
        Ok(())
    }));
    for message in ["creditor 3 is gone", "the engine ended this request without an answer"] {
        let reply = server.post("/v1/completions", &json!({"prompt": "a"}));
        assert_eq!(reply.status, 500);
        assert!(reply.json()["error"]["message"].as_str().unwrap().contains(message));
        let reply = server.post("/v1/completions", &json!({"prompt": "a", "stream": true}));
        assert_eq!(reply.status, 200);
        let (events, done) = reply.events();
        assert!(!done, "a broken answer has no [DONE]");
        let (error, text) = events.split_last().unwrap();
        assert!(error["error"]["message"].as_str().unwrap().contains(message));
        let text: String = text.iter().map(|chunk| chunk["choices"][0]["text"].as_str().unwrap()).collect();
        assert_eq!(text, "par");
    }
}

#[test]
fn a_lender_serves_its_condition_only() {
    let server = Server::with(toy::state(None));
    for path in ["/health", "/ready", "/metrics", "/cluster", "/version"] {
        assert_eq!(server.get(path).status, 200, "{path}");
    }
    assert_eq!(server.get("/v1/models").json()["data"], json!([]));
    let reply = server.post("/v1/chat/completions", &json!({}));
    assert_eq!(reply.status, 404);
    assert!(reply.json()["error"]["message"].as_str().unwrap().contains("lends memory and serves no model"));
}

#[test]
fn an_empty_answer_is_an_answer() {
    let server = Server::start(toy::model(|submitted| {
        submitted.started(0);
        submitted.finish(FinishReason::Stop);
        Ok(())
    }));
    let answer = server.post("/v1/completions", &json!({"prompt": "a"})).json();
    assert_eq!(answer["choices"][0]["text"], "");
    assert_eq!(answer["usage"]["completion_tokens"], 0);
}
