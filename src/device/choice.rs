//! How a token is to be chosen from a row of logits, for devices that choose
//! where the logits lie. The meaning of each field is that of
//! `SamplingParams` in `model/sampler`, as is the order: bias, penalties,
//! temperature, min_p, top_k, top_p, draw.

/// A choice to be made.
#[derive(Clone, Copy, Debug)]
pub struct Choice<'a> {
    /// Row of the step's logits.
    pub row: u32,
    /// 0 takes the likeliest token; the rest is then not looked at but for bias
    /// and penalties.
    pub temperature: f32,
    /// Smallest set of tokens with at least this mass.
    pub top_p: f32,
    /// Keep the k likeliest; 0 keeps all.
    pub top_k: u32,
    /// Keep tokens at least this fraction as likely as the likeliest.
    pub min_p: f32,
    /// Where in the distribution the token is drawn, 0 up to 1.
    pub unit: f64,
    /// Added to logits, by token.
    pub bias: &'a [(u32, f32)],
    /// Tokens seen, with how often each was generated.
    pub seen: &'a [(u32, u32)],
    /// Divides positive logits of tokens seen, multiplies negative ones.
    pub repetition: f32,
    /// Subtracted from logits of tokens generated.
    pub presence: f32,
    /// Subtracted from logits of tokens generated, for each time.
    pub frequency: f32,
    /// Log-probabilities of the chosen token and of this many likeliest ones.
    pub logprobs: Option<u32>,
}

/// A choice made.
#[derive(Clone, Debug, PartialEq)]
pub struct Chosen {
    /// The token; `None` where a logit was infinite or not a number.
    pub token: Option<u32>,
    /// Where they were asked for.
    pub logprobs: Option<Logprobs>,
}

/// Natural log-probabilities, of the distribution before bias, penalties and
/// temperature.
#[derive(Clone, Debug, PartialEq)]
pub struct Logprobs {
    /// Of the chosen token.
    pub chosen: f32,
    /// The likeliest tokens, likeliest first, of equals the first.
    pub top: Vec<(u32, f32)>,
}
