//! The requests of an engine: what their clients asked for and have been sent.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::mpsc;

use super::handle::{FinishReason, Output, Request};
use crate::device::{Choice, Chosen};
use crate::model::sampler::{Sampler, TokenLogprobs};
use crate::schedule::batch::BatchItem;
use crate::schedule::sequence::{SeqId, Sequence};

/// Sees every row of logits that a step computes: sequence, position, logits.
/// For comparisons of one run with another.
pub type LogitTap = Box<dyn FnMut(SeqId, usize, &[f32]) + Send>;

pub(super) struct Client {
    outputs: mpsc::UnboundedSender<Output>,
    cancelled: Arc<AtomicBool>,
    sampler: Sampler,
    stop_tokens: Vec<u32>,
    max_tokens: usize,
    generated: usize,
    started: bool,
    /// Those of the prompt's tokens, until they are reported.
    prompt_logprobs: Option<Vec<TokenLogprobs>>,
}

/// What a step computed of a sequence.
pub(super) enum Computed<'a> {
    /// Its rows of logits, `[item.logits, vocab]`.
    Logits(&'a mut [f32]),
    /// The token that the device chose, where the rows reach the sequence's end.
    Chosen(Option<Chosen>),
}

/// What became of a sequence with its step.
pub(super) enum Verdict {
    /// It goes on; with this token, if one was chosen.
    Continues(Option<u32>),
    /// It is finished or failed, and its client has been told.
    Over,
}

#[derive(Default)]
pub(super) struct Clients {
    by_seq: BTreeMap<SeqId, Client>,
}

impl Clients {
    pub(super) fn add(
        &mut self,
        seq: SeqId,
        request: &Request,
        outputs: mpsc::UnboundedSender<Output>,
        cancelled: Arc<AtomicBool>,
    ) {
        let client = Client {
            outputs,
            cancelled,
            sampler: Sampler::resumed(&request.sampling, &request.prompt, &request.resume, rand::random()),
            stop_tokens: request.stop_tokens.clone(),
            max_tokens: request.max_tokens,
            generated: request.resume.len(),
            started: false,
            prompt_logprobs: request.prompt_logprobs.then(Vec::new),
        };
        self.by_seq.insert(seq, client);
    }

    /// Sequences whose clients have gone; they are forgotten here.
    pub(super) fn take_cancelled(&mut self) -> Vec<SeqId> {
        let gone = |c: &Client| c.cancelled.load(Ordering::Acquire) || c.outputs.is_closed();
        let cancelled: Vec<_> = self.by_seq.iter().filter(|(_, c)| gone(c)).map(|(&seq, _)| seq).collect();
        cancelled.iter().for_each(|seq| drop(self.by_seq.remove(seq)));
        cancelled
    }

    /// Ends a request with an error.
    pub(super) fn fail(&mut self, seq: SeqId, message: String) {
        if let Some(client) = self.by_seq.remove(&seq) {
            // A client that is gone needs no message.
            let _ = client.outputs.send(Output::Failed { message });
        }
    }

    pub(super) fn fail_all(&mut self, message: &str) {
        for seq in self.all() {
            self.fail(seq, message.to_string());
        }
    }

    /// All requests that are not over.
    pub(super) fn all(&self) -> Vec<SeqId> {
        self.by_seq.keys().copied().collect()
    }

    pub(super) fn len(&self) -> usize {
        self.by_seq.len()
    }

    /// Whether a sequence's rows of logits are to be seen by the host: where it
    /// collects the logprobs of its prompt.
    pub(super) fn wants_logits(&self, item: &BatchItem) -> bool {
        self.by_seq.get(&item.seq).is_some_and(|client| client.prompt_logprobs.is_some())
    }

    /// The choice of the next token of each of `items` whose rows reach the end of
    /// its sequence (`at_end`), with the item's index. A request that asks for
    /// what cannot be chosen fails here.
    pub(super) fn choices(
        &mut self,
        items: &[BatchItem],
        at_end: impl Fn(&BatchItem) -> bool,
        vocab: usize,
    ) -> (Vec<usize>, Vec<Choice<'_>>) {
        let mut index = BTreeMap::new();
        for (i, item) in items.iter().enumerate().filter(|(_, item)| !item.logits.is_empty() && at_end(item)) {
            match self.by_seq.get(&item.seq).map(|client| client.sampler.check(vocab)) {
                Some(Ok(())) => drop(index.insert(item.seq, i)),
                Some(Err(error)) => self.fail(item.seq, error.to_string()),
                None => {}
            }
        }
        let clients = self.by_seq.iter_mut().filter_map(|(seq, client)| Some((*index.get(seq)?, client)));
        clients.map(|(i, client)| (i, client.sampler.choice(items[i].logits.end - 1, vocab))).unzip()
    }

    /// Takes a sequence's rows of logits (`[item.logits, vocab]`), or the token
    /// chosen from them: reports the prompt's logprobs, chooses a token where the
    /// rows reach the sequence's end, and tells the client.
    pub(super) fn advance(
        &mut self,
        item: &BatchItem,
        sequence: &Sequence,
        computed: Computed<'_>,
        vocab: usize,
    ) -> Verdict {
        let Some(client) = self.by_seq.get_mut(&item.seq) else { return Verdict::Over };
        if !client.started {
            client.started = true;
            client.send(Output::Started { cached_tokens: sequence.cached_tokens });
        }
        if item.logits.is_empty() {
            return Verdict::Continues(None);
        }
        let end = item.position as usize + item.rows.len();
        if let (Some(collected), Computed::Logits(logits)) = (&mut client.prompt_logprobs, &computed) {
            let first = end - item.logits.len();
            if first == 0 {
                // From the start, perhaps for a second time.
                collected.clear();
            }
            for (row, position) in logits.chunks_exact(vocab).zip(first..sequence.prompt_len - 1) {
                match client.sampler.prompt_logprobs(row, sequence.tokens[position + 1]) {
                    Ok(logprobs) => collected.push(logprobs),
                    Err(error) => {
                        self.fail(item.seq, error.to_string());
                        return Verdict::Over;
                    }
                }
            }
            if end >= sequence.prompt_len
                && let Some(collected) = client.prompt_logprobs.take()
            {
                client.send(Output::PromptLogprobs(collected));
            }
        }
        if end < sequence.tokens.len() {
            return Verdict::Continues(None);
        }
        let chosen = match computed {
            Computed::Logits(logits) => {
                let last = logits.len() - vocab;
                client.sampler.sample(&mut logits[last..])
            }
            Computed::Chosen(Some(chosen)) => client.sampler.accept(chosen),
            Computed::Chosen(None) => return Verdict::Continues(None),
        };
        let (id, logprobs) = match chosen {
            Ok(chosen) => chosen,
            Err(error) => {
                self.fail(item.seq, error.to_string());
                return Verdict::Over;
            }
        };
        if client.stop_tokens.contains(&id) {
            return self.finish(item.seq, FinishReason::Stop);
        }
        client.send(Output::Token { id, logprobs });
        client.generated += 1;
        if client.generated >= client.max_tokens || sequence.tokens.len() + 1 >= sequence.limit {
            return self.finish(item.seq, FinishReason::Length);
        }
        Verdict::Continues(Some(id))
    }

    fn finish(&mut self, seq: SeqId, reason: FinishReason) -> Verdict {
        if let Some(client) = self.by_seq.remove(&seq) {
            client.send(Output::Finished { reason });
        }
        Verdict::Over
    }
}

impl Client {
    fn send(&self, output: Output) {
        // The step loop notices a client that is gone by its flag.
        let _ = self.outputs.send(output);
    }
}
