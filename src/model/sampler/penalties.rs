//! What a request has already said, and how that lowers (or raises) logits.

use super::SamplingParams;

/// Set in a count: the token is in the prompt.
const IN_PROMPT: u32 = 1 << 31;

/// Tokens a request has seen, with how often it generated each.
///
/// Dense counts make a lookup one load; the list of distinct tokens makes
/// applying the penalties cost the tokens seen, not the vocabulary.
pub(super) struct Penalties {
    repetition: f32,
    presence: f32,
    frequency: f32,
    /// Prompt tokens, until the vocabulary's size is known from the first
    /// logits.
    prompt: Vec<u32>,
    /// Tokens generated before this sampler was made, until then.
    generated: Vec<u32>,
    /// `[vocab]` occurrences in the output, and [`IN_PROMPT`].
    counts: Vec<u32>,
    /// Distinct tokens with a count.
    seen: Vec<u32>,
    /// As [`pairs`](Self::pairs) last gave them.
    pairs: Vec<(u32, u32)>,
}

impl Penalties {
    /// `None` where `params` asks for no penalty: then nothing is tracked.
    pub(super) fn new(params: &SamplingParams, prompt: &[u32], generated: &[u32]) -> Option<Self> {
        let SamplingParams { repetition_penalty, presence_penalty, frequency_penalty, .. } = *params;
        if repetition_penalty == 1.0 && presence_penalty == 0.0 && frequency_penalty == 0.0 {
            return None;
        }
        Some(Self {
            repetition: repetition_penalty,
            presence: presence_penalty,
            frequency: frequency_penalty,
            // Only the repetition penalty looks at the prompt.
            prompt: if repetition_penalty == 1.0 { Vec::new() } else { prompt.to_vec() },
            generated: generated.to_vec(),
            counts: Vec::new(),
            seen: Vec::new(),
            pairs: Vec::new(),
        })
    }

    /// Changes the logits of the tokens seen: repetition first, then frequency
    /// and presence.
    pub(super) fn apply(&mut self, logits: &mut [f32]) {
        self.size(logits.len());
        for &token in &self.seen {
            let (Some(logit), Some(&count)) = (logits.get_mut(token as usize), self.counts.get(token as usize)) else {
                continue;
            };
            if *logit > 0.0 {
                *logit /= self.repetition;
            } else {
                *logit *= self.repetition;
            }
            let generated = count & !IN_PROMPT;
            if generated > 0 {
                *logit -= self.frequency * generated as f32 + self.presence;
            }
        }
    }

    /// Tokens seen, with how often each was generated.
    pub(super) fn pairs(&mut self, vocab: usize) -> &[(u32, u32)] {
        self.size(vocab);
        self.pairs.clear();
        let count = |&token: &u32| self.counts.get(token as usize).map(|count| (token, count & !IN_PROMPT));
        self.pairs.extend(self.seen.iter().filter_map(count));
        &self.pairs
    }

    /// Counts one generated token.
    pub(super) fn record(&mut self, token: u32) {
        let Some(count) = self.counts.get_mut(token as usize) else { return };
        if *count == 0 {
            self.seen.push(token);
        }
        *count += 1;
    }

    fn size(&mut self, vocab: usize) {
        if !self.counts.is_empty() {
            return;
        }
        self.counts.resize(vocab, 0);
        let prompt = std::mem::take(&mut self.prompt);
        // Room for a long answer, so that a step does not allocate.
        self.seen.reserve((prompt.len() + 4096).min(vocab));
        for token in prompt {
            if let Some(count) = self.counts.get_mut(token as usize)
                && *count == 0
            {
                *count = IN_PROMPT;
                self.seen.push(token);
            }
        }
        for token in std::mem::take(&mut self.generated) {
            self.record(token);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_penalty_changes_only_the_tokens_it_names() {
        let params = SamplingParams {
            repetition_penalty: 2.0,
            presence_penalty: 0.5,
            frequency_penalty: 0.25,
            ..Default::default()
        };
        let mut penalties = Penalties::new(&params, &[0, 1, 99], &[]).unwrap();
        let mut logits = [4.0, -4.0, 4.0, 4.0];
        penalties.apply(&mut logits);
        assert_eq!(logits, [2.0, -8.0, 4.0, 4.0]);
        penalties.record(2);
        penalties.record(2);
        penalties.record(0);
        let mut logits = [4.0, -4.0, 4.0, 4.0];
        penalties.apply(&mut logits);
        assert_eq!(logits, [2.0 - 0.75, -8.0, 2.0 - 1.0, 4.0]);
    }

    #[test]
    fn presence_and_frequency_do_not_look_at_the_prompt() {
        let params = SamplingParams { presence_penalty: 1.0, ..Default::default() };
        let mut penalties = Penalties::new(&params, &[0], &[]).unwrap();
        let mut logits = [1.0, 1.0];
        penalties.apply(&mut logits);
        assert_eq!(logits, [1.0, 1.0]);
    }
}
