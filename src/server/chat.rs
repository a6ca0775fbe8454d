//! `/v1/chat/completions`.

use std::sync::Arc;
use std::time::Instant;

use axum::body::Bytes;
use axum::response::Response;
use serde_json::{Map, Value, json};

use super::error::ApiError;
use super::fields::{Fields, wrong};
use super::generation::Piece;
use super::reply::{Collected, Job, Shape, blocking, response_id};
use super::request::{Options, alternatives, check, finite};
use super::state::{ServerState, TextModel, unix_time};
use crate::model::sampler::TokenLogprobs;

pub(super) async fn chat_completions(state: Arc<ServerState>, body: Bytes) -> Result<Response, ApiError> {
    let arrived = Instant::now();
    let fields = Fields::of(body).await?;
    let model = state.model(fields.string("model")?)?;
    let admitted = state.admit()?;
    let mut options = Options::read(&fields, model)?;
    if options.max_tokens == Some(0) {
        let field = options.max_tokens_field;
        return Err(ApiError::field(field, format!("`{field}` must be at least 1")));
    }
    refuse_unsupported(&fields)?;
    options.sampling.logprobs = logprobs(&fields)?;
    check(&options.sampling)?;
    let conversation = Conversation::read(&fields)?;
    // The template writes the tokens that begin a text.
    let special = fields.bool("add_special_tokens")?.unwrap_or(false);
    let text = model.text.clone();
    let prompt = blocking(move || conversation.encode(&*text, special)).await?;
    let max_tokens = options.room(prompt.len(), "messages", None, model)?;
    let job = Job {
        specs: options.specs(&prompt, max_tokens, false),
        prompt_tokens: prompt.len(),
        n: options.n,
        stream: options.stream,
        include_usage: options.include_usage,
        arrived,
        shape: Box::new(Chat {
            id: response_id("chatcmpl"),
            created: unix_time(),
            model: model.name.clone(),
            text: model.text.clone(),
            logprobs: options.sampling.logprobs.is_some(),
        }),
    };
    job.run(&state, model, admitted).await
}

/// Fields that would change the answer and are not understood are errors.
fn refuse_unsupported(fields: &Fields) -> Result<(), ApiError> {
    match fields.get("tool_choice") {
        None => {}
        Some(Value::String(choice)) if choice == "auto" || choice == "none" => {}
        Some(_) => {
            return Err(ApiError::unsupported(
                "tool_choice",
                "tool calls are not parsed out of the answer; use \"auto\" or \"none\" and read the text",
            ));
        }
    }
    if fields.object("chat_template_kwargs")?.is_some_and(|kwargs| !kwargs.is_empty()) {
        return Err(ApiError::unsupported("chat_template_kwargs", "the chat template takes no further arguments"));
    }
    if fields.bool("continue_final_message")?.unwrap_or(false) {
        return Err(ApiError::unsupported(
            "continue_final_message",
            "the chat template ends every message; use /v1/completions to continue a text",
        ));
    }
    Ok(())
}

fn logprobs(fields: &Fields) -> Result<Option<u32>, ApiError> {
    let wanted = fields.bool("logprobs")?.unwrap_or(false);
    match fields.count("top_logprobs")? {
        Some(count) if !wanted && count > 0 => {
            Err(ApiError::field("top_logprobs", "`top_logprobs` needs `logprobs` to be true"))
        }
        Some(count) if wanted => Ok(Some(u32::try_from(count).unwrap_or(u32::MAX))),
        _ => Ok(wanted.then_some(0)),
    }
}

/// Messages and tools as the chat template takes them.
pub(super) struct Conversation {
    messages: Vec<Value>,
    tools: Option<Vec<Value>>,
    generation_prompt: bool,
}

impl Conversation {
    pub(super) fn read(fields: &Fields) -> Result<Self, ApiError> {
        let messages =
            fields.array("messages")?.ok_or_else(|| ApiError::field("messages", "`messages` is required"))?;
        if messages.is_empty() {
            return Err(ApiError::field("messages", "`messages` is empty: give at least one message"));
        }
        let unused = matches!(fields.get("tool_choice"), Some(Value::String(choice)) if choice == "none");
        let tools = fields.array("tools")?.filter(|tools| !unused && !tools.is_empty()).cloned();
        Ok(Self {
            messages: messages.iter().enumerate().map(|(i, m)| message(i, m)).collect::<Result<_, _>>()?,
            tools,
            generation_prompt: fields.bool("add_generation_prompt")?.unwrap_or(true),
        })
    }

    pub(super) fn encode(&self, text: &dyn TextModel, special: bool) -> Result<Vec<u32>, ApiError> {
        let prompt = text
            .render(&self.messages, self.tools.as_deref(), self.generation_prompt)
            .map_err(|error| ApiError::field("messages", format!("the chat template refuses `messages`: {error:#}")))?;
        text.encode(&prompt, special)
            .map_err(|error| ApiError::field("messages", format!("`messages` cannot be tokenised: {error:#}")))
    }
}

/// One message with its content as one string.
fn message(index: usize, value: &Value) -> Result<Value, ApiError> {
    let field = |name: &str| format!("messages[{index}]{name}");
    let Value::Object(message) = value else { return Err(wrong(&field(""), "an object", value)) };
    let mut message = message.clone();
    match message.get("role") {
        // Templates know the older name.
        Some(Value::String(role)) if role == "developer" => {
            message.insert("role".into(), "system".into());
        }
        Some(Value::String(_)) => {}
        other => return Err(wrong(&field(".role"), "a string", other.unwrap_or(&Value::Null))),
    }
    let content = match message.get("content") {
        None | Some(Value::Null) => String::new(),
        Some(Value::String(text)) => text.clone(),
        Some(Value::Array(parts)) => text_parts(&field(".content"), parts)?,
        Some(other) => return Err(wrong(&field(".content"), "a string or an array of parts", other)),
    };
    message.insert("content".into(), content.into());
    if let Some(Value::Array(calls)) = message.get_mut("tool_calls") {
        calls.iter_mut().for_each(parse_arguments);
    }
    Ok(Value::Object(message))
}

/// The text parts, a line each.
fn text_parts(field: &str, parts: &[Value]) -> Result<String, ApiError> {
    let mut texts = Vec::with_capacity(parts.len());
    for part in parts {
        match (part.get("type").and_then(Value::as_str), part.get("text")) {
            (Some("text"), Some(Value::String(text))) => texts.push(text.as_str()),
            (Some("text"), text) => {
                return Err(wrong(&format!("{field}.text"), "a string", text.unwrap_or(&Value::Null)));
            }
            (Some(kind), _) => {
                return Err(ApiError::unsupported(
                    field,
                    &format!("a part of type {kind:?} is no text and the model reads text only"),
                ));
            }
            (None, _) => return Err(wrong(field, "made of parts with a `type`", part)),
        }
    }
    Ok(texts.join("\n"))
}

/// Clients send a call's arguments as a string of JSON; templates expect the
/// object. What is no JSON stays a string.
fn parse_arguments(call: &mut Value) {
    if let Some(arguments) = call.pointer_mut("/function/arguments")
        && let Value::String(text) = arguments
        && let Ok(parsed @ Value::Object(_)) = serde_json::from_str(text)
    {
        *arguments = parsed;
    }
}

/// How this endpoint answers.
struct Chat {
    id: String,
    created: u64,
    model: String,
    text: Arc<dyn TextModel>,
    logprobs: bool,
}

impl Chat {
    fn body(&self, object: &str, choices: Vec<Value>) -> Value {
        json!({"id": self.id, "object": object, "created": self.created, "model": self.model, "choices": choices})
    }

    fn delta(&self, choice: usize, delta: Value, logprobs: Value, finish_reason: Option<&str>) -> Value {
        let choice = json!({"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason});
        self.body("chat.completion.chunk", vec![choice])
    }

    fn logprobs(&self, tokens: &[Piece]) -> Value {
        if !self.logprobs {
            return Value::Null;
        }
        let content: Vec<Value> = tokens
            .iter()
            .map(|piece| {
                let mut entry = self.entry(piece.id, piece.logprobs.chosen);
                let top = alternatives(piece.id, &piece.logprobs, false);
                let top: Vec<Value> = top.into_iter().map(|(id, lp)| self.entry(id, lp).into()).collect();
                entry.insert("top_logprobs".into(), top.into());
                entry.into()
            })
            .collect();
        json!({"content": content, "refusal": null})
    }

    fn entry(&self, id: u32, logprob: f32) -> Map<String, Value> {
        Map::from_iter([
            ("token".to_owned(), self.text.token_text(id).into()),
            ("logprob".to_owned(), finite(logprob)),
            ("bytes".to_owned(), self.text.token_bytes(id).into()),
        ])
    }
}

impl Shape for Chat {
    fn opening(&self, choice: usize, _: Option<&[TokenLogprobs]>) -> Option<Value> {
        Some(self.delta(choice, json!({"role": "assistant", "content": ""}), Value::Null, None))
    }

    fn chunk(&self, choice: usize, text: &str, tokens: &[Piece]) -> Value {
        self.delta(choice, json!({"content": text}), self.logprobs(tokens), None)
    }

    fn closing(&self, choice: usize, finish_reason: &str) -> Value {
        self.delta(choice, json!({}), Value::Null, Some(finish_reason))
    }

    fn epilogue(&self) -> Value {
        self.body("chat.completion.chunk", Vec::new())
    }

    fn whole(&self, choices: &[Collected]) -> Value {
        let choices = choices.iter().enumerate().map(|(index, choice)| {
            json!({
                "index": index,
                "message": {"role": "assistant", "content": choice.text, "refusal": null},
                "logprobs": self.logprobs(&choice.tokens),
                "finish_reason": choice.finish_reason,
            })
        });
        self.body("chat.completion", choices.collect())
    }
}
