//! `/v1/completions`.

use std::sync::Arc;
use std::time::Instant;

use axum::body::Bytes;
use axum::response::Response;
use serde_json::{Map, Value, json};

use super::error::ApiError;
use super::fields::{Fields, token_ids, wrong};
use super::generation::Piece;
use super::reply::{Collected, Job, Shape, blocking, response_id};
use super::request::{Options, alternatives, check, check_choices, finite};
use super::state::{Model, ServerState, TextModel, unix_time};
use crate::model::sampler::TokenLogprobs;

/// OpenAI's default.
const DEFAULT_MAX_TOKENS: usize = 16;

/// A prompt as tokens, and as text where the answer echoes it.
struct Prompt {
    tokens: Vec<u32>,
    text: String,
}

pub(super) async fn completions(state: Arc<ServerState>, body: Bytes) -> Result<Response, ApiError> {
    let arrived = Instant::now();
    let fields = Fields::of(body).await?;
    let model = state.model(fields.string("model")?)?;
    let admitted = state.admit()?;
    let mut options = Options::read(&fields, model)?;
    if fields.string("suffix")?.is_some_and(|suffix| !suffix.is_empty()) {
        return Err(ApiError::unsupported("suffix", "the models served here complete text at its end only"));
    }
    if let Some(best_of) = fields.count("best_of")?
        && best_of != options.n
    {
        return Err(ApiError::unsupported("best_of", "every choice is returned; leave it out or set it to n"));
    }
    let echo = fields.bool("echo")?.unwrap_or(false);
    options.sampling.logprobs = fields.count("logprobs")?.map(|count| u32::try_from(count).unwrap_or(u32::MAX));
    check(&options.sampling)?;
    if options.max_tokens == Some(0) && !echo {
        return Err(ApiError::field(
            options.max_tokens_field,
            format!("`{}` must be at least 1 unless `echo` is true", options.max_tokens_field),
        ));
    }
    let special = fields.bool("add_special_tokens")?.unwrap_or(true);
    let sources = sources(&fields, model)?;
    check_choices(sources.len(), options.n)?;
    let text = model.text.clone();
    let prompts = blocking(move || read_prompts(sources, &*text, special, echo)).await?;

    let logprobs = options.sampling.logprobs.is_some();
    let mut specs = Vec::new();
    for prompt in &prompts {
        let max_tokens = options.room(prompt.tokens.len(), "prompt", Some(DEFAULT_MAX_TOKENS), model)?;
        specs.extend(options.specs(&prompt.tokens, max_tokens, echo && logprobs));
    }
    let job = Job {
        specs,
        prompt_tokens: prompts.iter().map(|prompt| prompt.tokens.len()).sum(),
        n: options.n,
        stream: options.stream,
        include_usage: options.include_usage,
        arrived,
        shape: Box::new(Completion {
            id: response_id("cmpl"),
            created: unix_time(),
            model: model.name.clone(),
            text: model.text.clone(),
            prompts: if echo { prompts } else { Vec::new() },
            n: options.n,
            logprobs,
        }),
    };
    job.run(&state, model, admitted).await
}

enum Source {
    Text(String),
    Tokens(Vec<u32>),
}

/// A string, an array of strings, an array of token ids, or an array of those.
fn sources(fields: &Fields, model: &Model) -> Result<Vec<Source>, ApiError> {
    const WHAT: &str = "a string, an array of strings, an array of token ids or an array of such arrays";
    let prompt = fields.get("prompt").ok_or_else(|| ApiError::field("prompt", "`prompt` is required"))?;
    let values = match prompt {
        Value::String(text) => return Ok(vec![Source::Text(text.clone())]),
        Value::Array(values) if values.is_empty() => {
            return Err(ApiError::field("prompt", "`prompt` is an empty array"));
        }
        Value::Array(values) => values,
        other => return Err(wrong("prompt", WHAT, other)),
    };
    if values[0].is_number() {
        return Ok(vec![Source::Tokens(token_ids("prompt", values, model.vocab)?)]);
    }
    values
        .iter()
        .map(|value| match value {
            Value::String(text) => Ok(Source::Text(text.clone())),
            Value::Array(ids) => Ok(Source::Tokens(token_ids("prompt", ids, model.vocab)?)),
            other => Err(wrong("prompt", WHAT, other)),
        })
        .collect()
}

fn read_prompts(
    sources: Vec<Source>,
    text: &dyn TextModel,
    special: bool,
    echo: bool,
) -> Result<Vec<Prompt>, ApiError> {
    let bad = |error: anyhow::Error| ApiError::field("prompt", format!("`prompt` cannot be tokenised: {error:#}"));
    sources
        .into_iter()
        .map(|source| match source {
            Source::Text(string) => Ok(Prompt { tokens: text.encode(&string, special).map_err(bad)?, text: string }),
            Source::Tokens(tokens) => {
                let string = if echo { text.decode(&tokens, false).map_err(bad)? } else { String::new() };
                Ok(Prompt { tokens, text: string })
            }
        })
        .collect()
}

/// How this endpoint answers.
struct Completion {
    id: String,
    created: u64,
    model: String,
    text: Arc<dyn TextModel>,
    /// To echo; empty otherwise.
    prompts: Vec<Prompt>,
    n: usize,
    logprobs: bool,
}

impl Completion {
    fn body(&self, choices: Vec<Value>) -> Value {
        json!({
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
        })
    }

    fn choice(&self, index: usize, text: &str, logprobs: Value, finish_reason: Option<&str>) -> Value {
        json!({"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason})
    }

    fn prompt(&self, choice: usize) -> Option<&Prompt> {
        self.prompts.get(choice / self.n)
    }

    /// OpenAI's four parallel arrays.
    fn logprobs(&self, choice: usize, echoed: Option<&[TokenLogprobs]>, tokens: &[Piece]) -> Value {
        if !self.logprobs {
            return Value::Null;
        }
        let mut lists = Lists::default();
        if let (Some(echoed), Some(prompt)) = (echoed, self.prompt(choice)) {
            let mut offset = 0;
            // Nothing comes before the first token, so it has no logprobs.
            let logprobs = std::iter::once(None).chain(echoed.iter().map(Some));
            for (&id, logprobs) in prompt.tokens.iter().zip(logprobs) {
                offset += lists.push(&*self.text, id, logprobs, offset);
            }
        }
        let base = self.prompt(choice).map_or(0, |prompt| prompt.text.chars().count());
        for piece in tokens {
            lists.push(&*self.text, piece.id, Some(&piece.logprobs), base + piece.offset);
        }
        lists.json()
    }
}

/// The parts of a completion's `logprobs`.
#[derive(Default)]
struct Lists {
    tokens: Vec<Value>,
    chosen: Vec<Value>,
    top: Vec<Value>,
    offsets: Vec<usize>,
}

impl Lists {
    /// Characters of the token.
    fn push(&mut self, text: &dyn TextModel, id: u32, logprobs: Option<&TokenLogprobs>, offset: usize) -> usize {
        let token = text.token_text(id);
        let chars = token.chars().count();
        self.offsets.push(offset);
        self.tokens.push(token.into());
        self.chosen.push(logprobs.map_or(Value::Null, |logprobs| finite(logprobs.chosen)));
        self.top.push(logprobs.map_or(Value::Null, |logprobs| {
            let top = alternatives(id, logprobs, true);
            top.into_iter().map(|(id, logprob)| (text.token_text(id), finite(logprob))).collect::<Map<_, _>>().into()
        }));
        chars
    }

    fn json(self) -> Value {
        json!({
            "tokens": self.tokens,
            "token_logprobs": self.chosen,
            "top_logprobs": self.top,
            "text_offset": self.offsets,
        })
    }
}

impl Shape for Completion {
    fn opening(&self, choice: usize, prompt_logprobs: Option<&[TokenLogprobs]>) -> Option<Value> {
        let prompt = self.prompt(choice)?;
        let logprobs = self.logprobs(choice, prompt_logprobs, &[]);
        Some(self.body(vec![self.choice(choice, &prompt.text, logprobs, None)]))
    }

    fn chunk(&self, choice: usize, text: &str, tokens: &[Piece]) -> Value {
        self.body(vec![self.choice(choice, text, self.logprobs(choice, None, tokens), None)])
    }

    fn closing(&self, choice: usize, finish_reason: &str) -> Value {
        self.body(vec![self.choice(choice, "", Value::Null, Some(finish_reason))])
    }

    fn epilogue(&self) -> Value {
        self.body(Vec::new())
    }

    fn whole(&self, choices: &[Collected]) -> Value {
        let choices = choices.iter().enumerate().map(|(index, choice)| {
            let echo = self.prompt(index).map_or("", |prompt| prompt.text.as_str());
            let logprobs = self.logprobs(index, choice.prompt_logprobs.as_deref(), &choice.tokens);
            self.choice(index, &format!("{echo}{}", choice.text), logprobs, Some(choice.finish_reason))
        });
        self.body(choices.collect())
    }
}
