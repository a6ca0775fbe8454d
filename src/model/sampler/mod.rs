//! From logits to a token, in vLLM's order: logit bias, penalties, temperature,
//! min_p, top_k, top_p, then a seeded choice. Logprobs are of the distribution
//! before all of that.

mod choose;
mod penalties;

use std::cell::RefCell;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use crate::device::{Choice, Chosen};
use penalties::Penalties;

/// Most alternatives a request may ask logprobs of.
pub const MAX_LOGPROBS: u32 = 20;

/// Below this a temperature is greedy: dividing by it would overflow.
const GREEDY_BELOW: f32 = 1e-5;

/// 32-bit words of the random stream that one draw takes.
const WORDS_A_DRAW: u128 = 2;

/// How to choose tokens; the defaults are OpenAI's.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy.
    pub temperature: f32,
    /// Nucleus: smallest set of tokens with at least this mass.
    pub top_p: f32,
    /// Keep the k likeliest; 0 keeps all.
    pub top_k: u32,
    /// Keep tokens at least this fraction as likely as the likeliest.
    pub min_p: f32,
    /// Same seed, same prompt, same model: same tokens.
    pub seed: Option<u64>,
    /// Divides (multiplies) positive (negative) logits of tokens seen in
    /// prompt or output; 1 is none.
    pub repetition_penalty: f32,
    /// Subtracted once from logits of tokens already generated.
    pub presence_penalty: f32,
    /// Subtracted per occurrence from logits of tokens already generated.
    pub frequency_penalty: f32,
    /// Added to the logits of given tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// Report the chosen token's logprob and this many alternatives.
    pub logprobs: Option<u32>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            seed: None,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            logprobs: None,
        }
    }
}

/// Log-probabilities of one position, natural log, of the distribution before
/// temperature and truncation (as OpenAI reports them).
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprobs {
    /// Of the chosen token.
    pub chosen: f32,
    /// The likeliest tokens, likeliest first.
    pub top: Vec<(u32, f32)>,
}

impl SamplingParams {
    /// Whether every field is in its range; the error names the field and the
    /// range.
    pub fn validate(&self) -> Result<(), String> {
        check("temperature", self.temperature, "at least 0", |v| v >= 0.0)?;
        check("top_p", self.top_p, "more than 0 and at most 1", |v| v > 0.0 && v <= 1.0)?;
        check("min_p", self.min_p, "from 0 to 1", |v| (0.0..=1.0).contains(&v))?;
        check("repetition_penalty", self.repetition_penalty, "from 0.01 to 100", |v| (0.01..=100.0).contains(&v))?;
        check("presence_penalty", self.presence_penalty, "from -2 to 2", |v| (-2.0..=2.0).contains(&v))?;
        check("frequency_penalty", self.frequency_penalty, "from -2 to 2", |v| (-2.0..=2.0).contains(&v))?;
        for &(token, bias) in &self.logit_bias {
            if !(-100.0..=100.0).contains(&bias) {
                return Err(format!("logit_bias of token {token} must be from -100 to 100, not {bias}"));
            }
        }
        match self.logprobs {
            Some(count) if count > MAX_LOGPROBS => {
                Err(format!("logprobs (top_logprobs) must be from 0 to {MAX_LOGPROBS}, not {count}"))
            }
            _ => Ok(()),
        }
    }

    /// Whether the likeliest token is always chosen.
    pub fn is_greedy(&self) -> bool {
        self.temperature < GREEDY_BELOW
    }
}

fn check(name: &str, value: f32, range: &str, holds: impl Fn(f32) -> bool) -> Result<(), String> {
    if value.is_finite() && holds(value) { Ok(()) } else { Err(format!("{name} must be {range}, not {value}")) }
}

/// Why no token could be chosen. The sampler is as before the call.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SampleError {
    /// The model computed something that is no distribution.
    #[error("the model's logits hold a value that is infinite or not a number; the weights or a kernel are at fault")]
    NotFinite,
    /// There is nothing to choose from.
    #[error("the model returned no logits")]
    Empty,
    /// A token id beyond the logits.
    #[error("token {token} is outside the vocabulary of {vocab}")]
    OutsideVocabulary {
        /// The id.
        token: u32,
        /// Logits there are.
        vocab: usize,
    },
}

/// One request's choice of tokens.
pub struct Sampler {
    params: SamplingParams,
    penalties: Option<Penalties>,
    rng: ChaCha8Rng,
}

impl Sampler {
    /// A sampler for a request. `request_seed` is used where `params.seed` is
    /// not given.
    pub fn new(params: &SamplingParams, prompt: &[u32], request_seed: u64) -> Self {
        Self::resumed(params, prompt, &[], request_seed)
    }

    /// A sampler for a request that has generated `generated` already,
    /// elsewhere: it goes on as the one that chose those tokens would.
    pub fn resumed(params: &SamplingParams, prompt: &[u32], generated: &[u32], request_seed: u64) -> Self {
        // The key is the seed itself: this does not depend on how a version of
        // a library stretches seeds.
        let mut key = [0; 32];
        key[..8].copy_from_slice(&params.seed.unwrap_or(request_seed).to_le_bytes());
        let mut rng = ChaCha8Rng::from_seed(key);
        if !params.is_greedy() {
            rng.set_word_pos(generated.len() as u128 * WORDS_A_DRAW);
        }
        Self { params: params.clone(), penalties: Penalties::new(params, prompt, generated), rng }
    }

    /// Chooses the next token from `logits` `[vocab]`, which is overwritten,
    /// and counts it for the penalties. Logprobs where the parameters ask for
    /// them.
    pub fn sample(&mut self, logits: &mut [f32]) -> Result<(u32, Option<TokenLogprobs>), SampleError> {
        let max = checked_max(logits)?;
        self.check(logits.len())?;
        if self.params.logprobs.is_none() {
            return Ok((self.choose(logits, max)?, None));
        }
        // Choosing overwrites the logits and the logprobs are of the originals.
        thread_local! {
            static ORIGINAL: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
        }
        ORIGINAL.with_borrow_mut(|original| {
            original.clear();
            original.extend_from_slice(logits);
            let token = self.choose(logits, max)?;
            Ok((token, Some(self.describe(original, max, token))))
        })
    }

    /// Logprobs of a prompt's token `next`, given the logits `[vocab]` of the
    /// position before it.
    pub fn prompt_logprobs(&self, logits: &[f32], next: u32) -> Result<TokenLogprobs, SampleError> {
        let max = checked_max(logits)?;
        if next as usize >= logits.len() {
            return Err(SampleError::OutsideVocabulary { token: next, vocab: logits.len() });
        }
        Ok(self.describe(logits, max, next))
    }

    /// Whether the parameters speak of tokens of a vocabulary of this size only.
    pub fn check(&self, vocab: usize) -> Result<(), SampleError> {
        match self.params.logit_bias.iter().find(|(t, _)| *t as usize >= vocab) {
            Some(&(token, _)) => Err(SampleError::OutsideVocabulary { token, vocab }),
            None => Ok(()),
        }
    }

    /// The next token's choice, to be made from row `row` of logits by a device.
    /// The sampler stays as it is until [`accept`](Self::accept) takes the token
    /// in. The same as [`sample`](Self::sample) but for the rounding of sums.
    pub fn choice(&mut self, row: u32, vocab: usize) -> Choice<'_> {
        let greedy = self.params.is_greedy();
        let unit = if greedy { 0.0 } else { unit(&mut self.rng.clone()) };
        let params = &self.params;
        Choice {
            row,
            temperature: if greedy { 0.0 } else { params.temperature },
            top_p: params.top_p,
            top_k: params.top_k,
            min_p: params.min_p,
            unit,
            bias: &params.logit_bias,
            seen: self.penalties.as_mut().map_or(&[], |penalties| penalties.pairs(vocab)),
            repetition: params.repetition_penalty,
            presence: params.presence_penalty,
            frequency: params.frequency_penalty,
            logprobs: params.logprobs,
        }
    }

    /// Takes in what a device chose, and counts it for the penalties.
    pub fn accept(&mut self, chosen: Chosen) -> Result<(u32, Option<TokenLogprobs>), SampleError> {
        let token = chosen.token.ok_or(SampleError::NotFinite)?;
        if !self.params.is_greedy() {
            unit(&mut self.rng);
        }
        if let Some(penalties) = &mut self.penalties {
            penalties.record(token);
        }
        Ok((token, chosen.logprobs.map(|l| TokenLogprobs { chosen: l.chosen, top: l.top })))
    }

    fn choose(&mut self, logits: &mut [f32], mut max: f32) -> Result<u32, SampleError> {
        let params = &self.params;
        for &(token, bias) in &params.logit_bias {
            logits[token as usize] += bias;
        }
        if let Some(penalties) = &mut self.penalties {
            penalties.apply(logits);
        }
        if self.penalties.is_some() || !params.logit_bias.is_empty() {
            max = checked_max(logits)?;
        }
        let token = if params.is_greedy() {
            choose::position(logits, max)
        } else {
            choose::weights(logits, max, params.temperature);
            // The likeliest token weighs 1, so min_p is a floor as it stands.
            if params.min_p > 0.0 {
                choose::drop_below(logits, params.min_p);
            }
            let unit = unit(&mut self.rng);
            if params.top_k == 0 && params.top_p >= 1.0 {
                choose::draw(logits, unit)
            } else {
                choose::draw_truncated(logits, params.top_k as usize, params.top_p, unit)
            }
        };
        let token = token.ok_or(SampleError::NotFinite)?;
        if let Some(penalties) = &mut self.penalties {
            penalties.record(token);
        }
        Ok(token)
    }

    /// `token` is inside `logits`.
    fn describe(&self, logits: &[f32], max: f32, token: u32) -> TokenLogprobs {
        let normaliser = choose::log_sum_exp(logits, max);
        let logprob = |logit: f32| (f64::from(logit) - normaliser) as f32;
        let count = self.params.logprobs.unwrap_or(0) as usize;
        let mut top = Vec::with_capacity(count);
        choose::top(logits, count, &mut top);
        top.iter_mut().for_each(|(_, value)| *value = logprob(*value));
        TokenLogprobs { chosen: logprob(logits[token as usize]), top }
    }
}

/// A number from 0 up to 1. 53 bits: every value is exact in f64. One a token.
fn unit(rng: &mut ChaCha8Rng) -> f64 {
    (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

/// The likeliest token of `logits` `[vocab]`; of equals the first.
pub fn greedy(logits: &[f32]) -> Result<u32, SampleError> {
    let max = checked_max(logits)?;
    choose::position(logits, max).ok_or(SampleError::NotFinite)
}

fn checked_max(logits: &[f32]) -> Result<f32, SampleError> {
    if logits.is_empty() {
        return Err(SampleError::Empty);
    }
    choose::finite_max(logits).ok_or(SampleError::NotFinite)
}

#[cfg(test)]
mod tests;
