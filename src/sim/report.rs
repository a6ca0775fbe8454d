//! What a simulation saw. All figures are of virtual time.

use hdrhistogram::Histogram;
use serde::Serialize;

/// A distribution of times, milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Times {
    /// Mean.
    pub mean: f64,
    /// Median.
    pub p50: f64,
    /// Of 10, one is slower.
    pub p90: f64,
    /// Of 100, one is slower.
    pub p99: f64,
    /// Slowest.
    pub max: f64,
}

impl Times {
    /// Of a histogram of microseconds.
    pub fn of(histogram: &Histogram<u64>) -> Self {
        let ms = |us: u64| us as f64 / 1e3;
        let at = |q| ms(histogram.value_at_quantile(q));
        Self { mean: histogram.mean() / 1e3, p50: at(0.5), p90: at(0.9), p99: at(0.99), max: ms(histogram.max()) }
    }
}

/// A broken invariant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Violation {
    /// The world's seed: with it the same happens again.
    pub seed: u64,
    /// Number of the event.
    pub event: u64,
    /// Virtual time, nanoseconds.
    pub at_ns: u64,
    /// The event.
    pub what: String,
    /// What does not hold.
    pub broken: String,
}

/// Figures of one world.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Report {
    /// Its seed.
    pub seed: u64,
    /// Instances.
    pub instances: usize,
    /// `pooled`, `isolated` or `static`.
    pub mode: String,
    /// Requests answered, each with exactly the right tokens.
    pub finished: usize,
    /// Requests that no memory here can hold.
    pub too_long: usize,
    /// From the first arrival to the last answer, seconds.
    pub seconds: f64,
    /// Prompt and answer tokens of what was answered, a second.
    pub tokens_s: f64,
    /// Answer tokens a second.
    pub generated_s: f64,
    /// Longest context answered, tokens.
    pub longest: usize,
    /// From arrival to the first token.
    pub first_token_ms: Times,
    /// From arrival to the last token.
    pub whole_ms: Times,
    /// Between two tokens, a request's mean.
    pub between_ms: Times,
    /// Steps computed.
    pub steps: u64,
    /// Loans given.
    pub loans: u64,
    /// Asks refused.
    pub refused: u64,
    /// Loans that ended without being repaid.
    pub lapsed: u64,
    /// Loans that debtors lost.
    pub lost: u64,
    /// rBlocks moved to creditors.
    pub moves: u64,
    /// Queries answered by creditors.
    pub exchanges: u64,
    /// Plans and writes that creditors refused, answers that debtors rejected.
    pub failed_closed: u64,
    /// Sequences preempted for want of memory.
    pub preemptions: u64,
    /// Sequences computed again after a loss.
    pub recoveries: u64,
    /// Tokens that this recomputed.
    pub recomputed: u64,
    /// Requests tried again after an error or a crash.
    pub retries: u64,
    /// Prompt tokens found in the prefix cache.
    pub cached_tokens: u64,
    /// Bytes over lanes: KV, plans, partials' headers.
    pub lane_bytes: u64,
    /// Messages of the control plane.
    pub control_messages: u64,
    /// Their bytes.
    pub control_bytes: u64,
    /// Faults that happened.
    pub faults: usize,
    /// Events.
    pub events: u64,
    /// Hash of the log: equal if and only if everything was.
    pub log_hash: String,
    /// What did not hold, if anything.
    pub violation: Option<Violation>,
}
