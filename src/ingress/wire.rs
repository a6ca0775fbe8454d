//! What the node that took a request in and the one that runs it say to each
//! other: one [`Order`], then [`Frame`]s until one of them is the last.
//!
//! Sealed, an order is the body of an HTTP request, and the answer's body is a
//! run of frames, each with its length before it. Everything is bounded.

use crate::codec::{DecodeError, Reader, Result, WriteExt};
use crate::engine::{FinishReason, Output, Rejected, Request};
use crate::kv::rblock::InstanceId;
use crate::model::sampler::{MAX_LOGPROBS, SamplingParams, TokenLogprobs};

/// Version of the format; an order of another is refused.
pub const VERSION: u8 = 1;
/// Longest order, bytes, sealed.
pub const MAX_ORDER: usize = 24 << 20;
/// Longest frame, bytes, sealed.
pub const MAX_FRAME: usize = 512 << 10;
/// Positions of prompt logprobs in one frame; more go in further frames.
pub const MAX_POSITIONS: usize = 2048;

/// Most tokens of a prompt or an answer.
const MAX_TOKENS: usize = 2 << 20;
const MAX_STOP_TOKENS: usize = 4096;
const MAX_BIAS: usize = 1 << 20;
const MAX_MESSAGE: usize = 4096;

/// A request to be run for another node.
#[derive(Clone, Debug, PartialEq)]
pub struct Order {
    /// Names it among all orders ever.
    pub id: [u8; 16],
    /// Who took the request in.
    pub from: InstanceId,
    /// Who is to run it.
    pub to: InstanceId,
    /// Fingerprint of the model.
    pub model: [u8; 32],
    /// The request. It has a seed.
    pub request: Request,
}

/// What is said of an order.
#[derive(Clone, Debug, PartialEq)]
pub enum Said {
    /// Nothing new, but the node lives.
    Alive,
    /// It is in the engine's queue.
    Taken,
    /// It is not. The last.
    Refused(Rejected),
    /// See [`Output::Started`].
    Started {
        /// Prompt tokens found in the prefix cache.
        cached_tokens: usize,
    },
    /// Some of [`Output::PromptLogprobs`], in order.
    PromptLogprobs {
        /// Nothing of them follows.
        last: bool,
        /// At most [`MAX_POSITIONS`].
        logprobs: Vec<TokenLogprobs>,
    },
    /// See [`Output::Token`].
    Token {
        /// Tokens generated before it, the resumed ones included.
        index: u32,
        /// Its id.
        id: u32,
        /// If asked for.
        logprobs: Option<TokenLogprobs>,
    },
    /// See [`Output::Finished`]. The last.
    Finished(FinishReason),
    /// See [`Output::Failed`]. The last.
    Failed(String),
    /// The node is about to leave: the request is to go on elsewhere. The last.
    Leaving,
}

/// One frame of an answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Frame {
    /// Frames before it.
    pub number: u32,
    /// What it says.
    pub said: Said,
}

impl Order {
    /// Appends its bytes.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let Request { prompt, sampling, max_tokens, stop_tokens, prompt_logprobs, resume } = &self.request;
        out.put_u8(VERSION);
        out.put(&self.id);
        out.put_u64(self.from.0);
        out.put_u64(self.to.0);
        out.put(&self.model);
        out.put_u32(u32::try_from(*max_tokens).unwrap_or(u32::MAX));
        out.put_u8((*prompt_logprobs).into());
        for value in [
            sampling.temperature,
            sampling.top_p,
            sampling.min_p,
            sampling.repetition_penalty,
            sampling.presence_penalty,
            sampling.frequency_penalty,
        ] {
            out.put_f32(value);
        }
        out.put_u32(sampling.top_k);
        out.put_u64(sampling.seed.unwrap_or_default());
        // One more than asked for; 0 is none.
        out.put_u32(sampling.logprobs.map_or(0, |count| count.saturating_add(1)));
        out.put_count(sampling.logit_bias.len());
        for (token, bias) in &sampling.logit_bias {
            out.put_u32(*token);
            out.put_f32(*bias);
        }
        for list in [stop_tokens, prompt, resume] {
            out.put_count(list.len());
            list.iter().for_each(|token| out.put_u32(*token));
        }
    }

    /// An order out of bytes. That its parameters make sense is checked here
    /// too; what its tokens mean, by the engine.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let mut r = Reader::new(bytes);
        if r.u8()? != VERSION {
            return Err(DecodeError::Invalid("another version: run the same release everywhere"));
        }
        let id = array(&mut r)?;
        let (from, to) = (InstanceId(r.u64()?), InstanceId(r.u64()?));
        let model = array(&mut r)?;
        let max_tokens = r.u32()? as usize;
        let prompt_logprobs = flag(&mut r)?;
        let [temperature, top_p, min_p] = [r.f32()?, r.f32()?, r.f32()?];
        let [repetition_penalty, presence_penalty, frequency_penalty] = [r.f32()?, r.f32()?, r.f32()?];
        let sampling = SamplingParams {
            temperature,
            top_p,
            top_k: r.u32()?,
            min_p,
            seed: Some(r.u64()?),
            repetition_penalty,
            presence_penalty,
            frequency_penalty,
            logprobs: r.u32()?.checked_sub(1),
            logit_bias: r.list("logit bias", MAX_BIAS, 8, |r| Ok((r.u32()?, r.f32()?)))?,
        };
        sampling.validate().map_err(|_| DecodeError::Invalid("sampling parameters out of their range"))?;
        let stop_tokens = r.list("stop tokens", MAX_STOP_TOKENS, 4, Reader::u32)?;
        let prompt = r.list("prompt", MAX_TOKENS, 4, Reader::u32)?;
        let resume = r.list("tokens generated", MAX_TOKENS, 4, Reader::u32)?;
        if prompt.is_empty() || resume.len() >= max_tokens {
            return Err(DecodeError::Invalid("nothing to begin with, or nothing left to generate"));
        }
        r.finish()?;
        let request = Request { prompt, sampling, max_tokens, stop_tokens, prompt_logprobs, resume };
        Ok(Self { id, from, to, model, request })
    }
}

/// Whether a request keeps to the format's limits; one that does not runs where
/// it was taken in.
pub fn is_sendable(request: &Request) -> bool {
    let Request { prompt, sampling, stop_tokens, resume, .. } = request;
    prompt.len().max(resume.len()) <= MAX_TOKENS
        && stop_tokens.len() <= MAX_STOP_TOKENS
        && sampling.logit_bias.len() <= MAX_BIAS
        && 4 * (prompt.len() + resume.len()) + 8 * sampling.logit_bias.len() < MAX_ORDER - (64 << 10)
}

const ALIVE: u8 = 0;
const TAKEN: u8 = 1;
const REFUSED: u8 = 2;
const STARTED: u8 = 3;
const PROMPT_LOGPROBS: u8 = 4;
const TOKEN: u8 = 5;
const FINISHED: u8 = 6;
const FAILED: u8 = 7;
const LEAVING: u8 = 8;

const TOO_LONG: u8 = 0;
const OVERLOADED: u8 = 1;
const DRAINING: u8 = 2;

impl Frame {
    /// Appends its bytes.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.put_u32(self.number);
        match &self.said {
            Said::Alive => out.put_u8(ALIVE),
            Said::Taken => out.put_u8(TAKEN),
            Said::Refused(rejected) => {
                out.put_u8(REFUSED);
                match rejected {
                    Rejected::TooLong { tokens, limit } => {
                        out.put_u8(TOO_LONG);
                        out.put_u64(*tokens as u64);
                        out.put_u64(*limit as u64);
                    }
                    Rejected::Overloaded { waiting } => {
                        out.put_u8(OVERLOADED);
                        out.put_u64(*waiting as u64);
                    }
                    Rejected::Draining => out.put_u8(DRAINING),
                }
            }
            Said::Started { cached_tokens } => {
                out.put_u8(STARTED);
                out.put_u64(*cached_tokens as u64);
            }
            Said::PromptLogprobs { last, logprobs } => {
                out.put_u8(PROMPT_LOGPROBS);
                out.put_u8((*last).into());
                out.put_count(logprobs.len());
                logprobs.iter().for_each(|position| put_logprobs(out, position));
            }
            Said::Token { index, id, logprobs } => {
                out.put_u8(TOKEN);
                out.put_u32(*index);
                out.put_u32(*id);
                out.put_u8(logprobs.is_some().into());
                logprobs.iter().for_each(|logprobs| put_logprobs(out, logprobs));
            }
            Said::Finished(reason) => {
                out.put_u8(FINISHED);
                out.put_u8(match reason {
                    FinishReason::Stop => 0,
                    FinishReason::Length => 1,
                });
            }
            Said::Failed(message) => {
                out.put_u8(FAILED);
                let most = message.len().min(MAX_MESSAGE);
                let end = (0..=most).rev().find(|&end| message.is_char_boundary(end)).unwrap_or(0);
                out.put_bytes(&message.as_bytes()[..end]);
            }
            Said::Leaving => out.put_u8(LEAVING),
        }
    }

    /// A frame out of bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let mut r = Reader::new(bytes);
        let number = r.u32()?;
        let said = match r.u8()? {
            ALIVE => Said::Alive,
            TAKEN => Said::Taken,
            REFUSED => Said::Refused(match r.u8()? {
                TOO_LONG => Rejected::TooLong { tokens: size(&mut r)?, limit: size(&mut r)? },
                OVERLOADED => Rejected::Overloaded { waiting: size(&mut r)? },
                DRAINING => Rejected::Draining,
                _ => return Err(DecodeError::Invalid("unknown refusal")),
            }),
            STARTED => Said::Started { cached_tokens: size(&mut r)? },
            PROMPT_LOGPROBS => Said::PromptLogprobs {
                last: flag(&mut r)?,
                logprobs: r.list("prompt logprobs", MAX_POSITIONS, 8, logprobs)?,
            },
            TOKEN => Said::Token {
                index: r.u32()?,
                id: r.u32()?,
                logprobs: if flag(&mut r)? { Some(logprobs(&mut r)?) } else { None },
            },
            FINISHED => Said::Finished(match r.u8()? {
                0 => FinishReason::Stop,
                1 => FinishReason::Length,
                _ => return Err(DecodeError::Invalid("unknown reason to finish")),
            }),
            FAILED => Said::Failed(r.text("message", MAX_MESSAGE)?),
            LEAVING => Said::Leaving,
            _ => return Err(DecodeError::Invalid("unknown kind of frame")),
        };
        r.finish()?;
        Ok(Self { number, said })
    }
}

impl Said {
    /// Nothing may follow it.
    pub fn is_last(&self) -> bool {
        matches!(self, Self::Refused(_) | Self::Finished(_) | Self::Failed(_) | Self::Leaving)
    }

    /// What the engine put out, as it is said; `index` tokens came before.
    pub fn of(output: Output, index: u32) -> Vec<Self> {
        match output {
            Output::Started { cached_tokens } => vec![Self::Started { cached_tokens }],
            Output::PromptLogprobs(all) => {
                let parts = all.len().div_ceil(MAX_POSITIONS).max(1);
                let part = |i: usize| all.chunks(MAX_POSITIONS).nth(i).unwrap_or_default().to_vec();
                (0..parts).map(|i| Self::PromptLogprobs { last: i + 1 == parts, logprobs: part(i) }).collect()
            }
            Output::Token { id, logprobs } => vec![Self::Token { index, id, logprobs }],
            Output::Finished { reason } => vec![Self::Finished(reason)],
            Output::Failed { message } => vec![Self::Failed(message)],
        }
    }
}

fn array<const N: usize>(r: &mut Reader<'_>) -> Result<[u8; N]> {
    r.take(N)?.try_into().map_err(|_| DecodeError::Truncated)
}

fn flag(r: &mut Reader<'_>) -> Result<bool> {
    match r.u8()? {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(DecodeError::Invalid("neither yes nor no")),
    }
}

fn size(r: &mut Reader<'_>) -> Result<usize> {
    usize::try_from(r.u64()?).map_err(|_| DecodeError::Invalid("a count beyond this machine"))
}

fn logprobs(r: &mut Reader<'_>) -> Result<TokenLogprobs> {
    let chosen = r.f32()?;
    Ok(TokenLogprobs { chosen, top: r.list("logprobs", MAX_LOGPROBS as usize, 8, |r| Ok((r.u32()?, r.f32()?)))? })
}

fn put_logprobs(out: &mut Vec<u8>, logprobs: &TokenLogprobs) {
    out.put_f32(logprobs.chosen);
    out.put_count(logprobs.top.len());
    for (token, logprob) in &logprobs.top {
        out.put_u32(*token);
        out.put_f32(*logprob);
    }
}

#[cfg(test)]
#[path = "wire_tests.rs"]
mod tests;
