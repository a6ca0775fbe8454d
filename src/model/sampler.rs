//! From logits to a token: penalties, temperature, truncation, seeded choice.

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
