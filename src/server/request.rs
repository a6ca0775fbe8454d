//! What completions and chat completions have in common: how to choose, when to
//! stop, how to answer.

use serde_json::Value;

use super::error::ApiError;
use super::fields::{Fields, token_ids, wrong};
use super::generation::Spec;
use super::state::Model;
use crate::engine::Request;
use crate::model::sampler::{SamplingParams, TokenLogprobs};

/// Most choices of one request, prompts times n.
const MAX_CHOICES: usize = 256;
/// Most stop strings; each is searched for at each token.
const MAX_STOPS: usize = 32;

/// The common fields of a request.
pub(super) struct Options {
    /// logprobs is left to the caller: the two endpoints spell it differently.
    pub sampling: SamplingParams,
    pub max_tokens: Option<usize>,
    /// Name of the field that gave `max_tokens`.
    pub max_tokens_field: &'static str,
    pub n: usize,
    pub stop: Vec<String>,
    pub stop_tokens: Vec<u32>,
    pub stream: bool,
    pub include_usage: bool,
}

/// Fields of OpenAI's and vLLM's that change the answer and are not done here:
/// ignoring them would be answering another question.
const NOT_DONE: [(&str, &str); 14] = [
    ("allowed_token_ids", "tokens cannot be excluded; use logit_bias"),
    ("audio", "the model writes text only"),
    ("bad_words", "words cannot be excluded; use logit_bias"),
    ("function_call", "it was replaced by tools"),
    ("functions", "it was replaced by tools"),
    ("guided_choice", CONSTRAINED),
    ("guided_grammar", CONSTRAINED),
    ("guided_json", CONSTRAINED),
    ("guided_regex", CONSTRAINED),
    ("min_tokens", "an answer cannot be kept from ending; use ignore_eos"),
    ("prompt_logprobs", "a prompt is scored by /v1/completions with echo and logprobs"),
    ("structured_outputs", CONSTRAINED),
    ("truncate_prompt_tokens", "prompts are never shortened silently"),
    ("use_beam_search", "tokens are chosen one at a time"),
];
const CONSTRAINED: &str = "answers cannot be constrained yet; ask for the format in the prompt";

fn refuse_unsupported(fields: &Fields) -> Result<(), ApiError> {
    for (field, because) in NOT_DONE {
        let asks = match fields.get(field) {
            None | Some(Value::Bool(false)) => false,
            Some(Value::Number(number)) => number.as_f64() != Some(0.0),
            Some(Value::Array(values)) => !values.is_empty(),
            Some(_) => true,
        };
        if asks {
            return Err(ApiError::unsupported(field, because));
        }
    }
    let Some(format) = fields.object("response_format")? else { return Ok(()) };
    match format.get("type") {
        Some(Value::String(kind)) if kind == "text" => Ok(()),
        Some(Value::String(_)) => Err(ApiError::unsupported("response_format", CONSTRAINED)),
        other => Err(wrong("response_format.type", "a string", other.unwrap_or(&Value::Null))),
    }
}

impl Options {
    pub(super) fn read(fields: &Fields, model: &Model) -> Result<Self, ApiError> {
        refuse_unsupported(fields)?;
        let stream = fields.bool("stream")?.unwrap_or(false);
        let include_usage = match fields.object("stream_options")? {
            None => false,
            Some(_) if !stream => {
                return Err(ApiError::field("stream_options", "`stream_options` needs `stream` to be true"));
            }
            Some(options) => match options.get("include_usage") {
                None | Some(Value::Null) => false,
                Some(Value::Bool(include)) => *include,
                Some(value) => return Err(wrong("stream_options.include_usage", "true or false", value)),
            },
        };
        let n = fields.count("n")?.unwrap_or(1);
        if !(1..=MAX_CHOICES).contains(&n) {
            return Err(ApiError::field("n", format!("`n` must be from 1 to {MAX_CHOICES}, not {n}")));
        }
        let mut max_tokens_field = "max_tokens";
        let mut max_tokens = fields.count("max_tokens")?;
        if let Some(newer) = fields.count("max_completion_tokens")? {
            max_tokens_field = "max_completion_tokens";
            max_tokens = Some(newer);
        }
        let mut stop_tokens = match fields.array("stop_token_ids")? {
            Some(ids) => token_ids("stop_token_ids", ids, model.vocab)?,
            None => Vec::new(),
        };
        if !fields.bool("ignore_eos")?.unwrap_or(false) {
            stop_tokens.extend(&model.eos);
        }
        Ok(Self {
            sampling: sampling(fields, model)?,
            max_tokens,
            max_tokens_field,
            n,
            stop: stop(fields)?,
            stop_tokens,
            stream,
            include_usage,
        })
    }

    /// Tokens to generate after a prompt of `prompt` tokens from `field`:
    /// what was asked for, else `default`, else all that fits.
    pub(super) fn room(
        &self,
        prompt: usize,
        field: &str,
        default: Option<usize>,
        model: &Model,
    ) -> Result<usize, ApiError> {
        let limit = model.max_len;
        if prompt == 0 {
            return Err(ApiError::field(field, format!("`{field}` is empty: give at least one token")));
        }
        if prompt >= limit {
            return Err(ApiError::too_long(
                format!(
                    "this model's maximum context length is {limit} tokens, but `{field}` has {prompt} tokens and at \
                     least one must be generated; shorten it"
                ),
                field,
            ));
        }
        let left = limit - prompt;
        match self.max_tokens {
            Some(asked) if asked > left => Err(ApiError::too_long(
                format!(
                    "this model's maximum context length is {limit} tokens, but {} were requested ({prompt} in \
                     `{field}`, {asked} as `{}`); ask for at most {left}",
                    prompt.saturating_add(asked),
                    self.max_tokens_field
                ),
                self.max_tokens_field,
            )),
            Some(asked) => Ok(asked),
            None => Ok(default.unwrap_or(left).min(left)),
        }
    }

    /// The `n` choices of one prompt.
    pub(super) fn specs(&self, prompt: &[u32], max_tokens: usize, prompt_logprobs: bool) -> Vec<Spec> {
        (0..self.n)
            .map(|index| Spec {
                request: Request {
                    prompt: prompt.to_vec(),
                    sampling: SamplingParams {
                        seed: self.sampling.seed.map(|seed| derive(seed, index as u64)),
                        ..self.sampling.clone()
                    },
                    max_tokens: max_tokens.max(1),
                    stop_tokens: self.stop_tokens.clone(),
                    prompt_logprobs,
                    resume: Vec::new(),
                },
                stop: self.stop.clone(),
                prompt_only: max_tokens == 0,
            })
            .collect()
    }
}

/// Refuses more choices than one request may have.
pub(super) fn check_choices(prompts: usize, n: usize) -> Result<(), ApiError> {
    if prompts.saturating_mul(n) > MAX_CHOICES {
        return Err(ApiError::field(
            "prompt",
            format!("{prompts} prompts times n = {n} is more than {MAX_CHOICES} choices; send several requests"),
        ));
    }
    Ok(())
}

/// Seed of choice `index`; that of the first is `seed` itself. (SplitMix64's
/// finaliser: choices share no part of their random streams.)
fn derive(seed: u64, index: u64) -> u64 {
    if index == 0 {
        return seed;
    }
    let mut x = seed.wrapping_add(index.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

fn sampling(fields: &Fields, model: &Model) -> Result<SamplingParams, ApiError> {
    let mut sampling = model.defaults.clone();
    let set = |field: &mut f32, name: &str| -> Result<(), ApiError> {
        if let Some(value) = fields.f32(name)? {
            *field = value;
        }
        Ok(())
    };
    set(&mut sampling.temperature, "temperature")?;
    set(&mut sampling.top_p, "top_p")?;
    set(&mut sampling.min_p, "min_p")?;
    set(&mut sampling.repetition_penalty, "repetition_penalty")?;
    set(&mut sampling.presence_penalty, "presence_penalty")?;
    set(&mut sampling.frequency_penalty, "frequency_penalty")?;
    if let Some(top_k) = fields.i64("top_k")? {
        // vLLM's clients write -1 for "all".
        sampling.top_k = match top_k {
            -1 => 0,
            k => u32::try_from(k).map_err(|_| {
                ApiError::field("top_k", format!("`top_k` must be -1 or 0 (all) or a count of tokens, not {k}"))
            })?,
        };
    }
    if let Some(seed) = fields.seed("seed")? {
        sampling.seed = Some(seed);
    }
    if let Some(bias) = fields.object("logit_bias")? {
        sampling.logit_bias = bias
            .iter()
            .map(|(token, value)| {
                let id = token.parse::<u32>().ok().filter(|id| (*id as usize) < model.vocab).ok_or_else(|| {
                    ApiError::field(
                        "logit_bias",
                        format!("`logit_bias`: {token:?} is no token id below the vocabulary of {}", model.vocab),
                    )
                })?;
                let value = value.as_f64().ok_or_else(|| wrong("logit_bias", "made of numbers", value))?;
                Ok((id, value as f32))
            })
            .collect::<Result<_, ApiError>>()?;
    }
    sampling.logprobs = None;
    check(&sampling)?;
    Ok(sampling)
}

/// Refuses parameters out of their range; the message begins with the field.
pub(super) fn check(sampling: &SamplingParams) -> Result<(), ApiError> {
    sampling.validate().map_err(|message| {
        let field = message.split(' ').next().unwrap_or_default().to_owned();
        ApiError::field(&field, message)
    })
}

fn stop(fields: &Fields) -> Result<Vec<String>, ApiError> {
    let stops = match fields.get("stop") {
        None => return Ok(Vec::new()),
        Some(Value::String(stop)) => vec![stop.clone()],
        Some(Value::Array(stops)) => stops
            .iter()
            .map(|stop| match stop {
                Value::String(stop) => Ok(stop.clone()),
                other => Err(wrong("stop", "a string or an array of strings", other)),
            })
            .collect::<Result<_, _>>()?,
        Some(other) => return Err(wrong("stop", "a string or an array of strings", other)),
    };
    if stops.iter().any(String::is_empty) {
        return Err(ApiError::field("stop", "`stop` must not hold an empty string"));
    }
    if stops.len() > MAX_STOPS {
        return Err(ApiError::field(
            "stop",
            format!("`stop` may hold at most {MAX_STOPS} strings, not {}", stops.len()),
        ));
    }
    Ok(stops)
}

/// A logprob as JSON, which has no infinity.
pub(super) fn finite(logprob: f32) -> Value {
    let logprob = if logprob.is_finite() { logprob } else { -9999.0 };
    serde_json::Number::from_f64(f64::from(logprob)).map_or(Value::Null, Value::Number)
}

/// The likeliest tokens as asked for: as many, and the chosen one besides where
/// it is not among them and `with_chosen`.
pub(super) fn alternatives(id: u32, logprobs: &TokenLogprobs, with_chosen: bool) -> Vec<(u32, f32)> {
    let mut top = logprobs.top.clone();
    if with_chosen && !top.iter().any(|(token, _)| *token == id) {
        top.push((id, logprobs.chosen));
    }
    top
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_have_seeds_of_their_own() {
        let mut seeds: Vec<u64> = (0..2).flat_map(|seed| (0..100).map(move |index| derive(seed, index))).collect();
        assert_eq!(seeds[0], 0);
        seeds.sort_unstable();
        seeds.dedup();
        assert_eq!(seeds.len(), 200);
    }
}
