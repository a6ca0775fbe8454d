//! Prometheus metrics, under the names that dashboards for LLM servers know.

use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hdrhistogram::Histogram as Hdr;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};
use serde_json::{Value, json};

use super::state::Stats;
use crate::engine::EngineStats;

/// A latency as dashboards read it (buckets) and as people do (percentiles).
pub struct Latency {
    buckets: Histogram,
    /// Microseconds, 3 digits.
    exact: Mutex<Hdr<u64>>,
}

impl Latency {
    fn new(bounds: &[f64]) -> Self {
        // 1 µs to 1 hour at 3 digits is within what the histogram can hold, so
        // only the allocation could fail.
        let exact = Hdr::new_with_bounds(1, 3_600_000_000, 3).unwrap_or_else(|_| Hdr::new(3).expect("3 digits"));
        Self { buckets: Histogram::new(bounds.iter().copied()), exact: Mutex::new(exact) }
    }

    /// Adds one measurement.
    pub fn observe(&self, latency: Duration) {
        self.buckets.observe(latency.as_secs_f64());
        let micros = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX).max(1);
        lock(&self.exact).saturating_record(micros);
    }

    /// Count, mean and percentiles in milliseconds.
    pub fn percentiles(&self) -> Value {
        let exact = lock(&self.exact);
        let ms = |q: f64| exact.value_at_quantile(q) as f64 / 1e3;
        json!({
            "count": exact.len(),
            "mean_ms": exact.mean() / 1e3,
            "p50_ms": ms(0.5),
            "p90_ms": ms(0.9),
            "p99_ms": ms(0.99),
            "max_ms": exact.max() as f64 / 1e3,
        })
    }
}

/// Figures stay usable after a panic elsewhere: at worst one is missing.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FinishLabels {
    finished_reason: &'static str,
}

/// Everything `/metrics` shows.
pub struct Metrics {
    registry: Mutex<Registry>,
    /// Arrival to first token.
    pub time_to_first_token: Latency,
    /// One token to the next.
    pub inter_token: Latency,
    /// A request's mean time for each token after the first.
    pub time_per_output_token: Latency,
    /// Arrival to last token.
    pub e2e: Latency,
    /// Submission to the start of the prompt's computation.
    pub queue: Latency,
    success: Family<FinishLabels, Counter>,
    failure: Counter,
}

/// Seconds; from a token of a small model to a long answer of a large one.
const TOKEN_BOUNDS: [f64; 16] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0, 10.0];
const REQUEST_BOUNDS: [f64; 18] =
    [0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0];

impl Metrics {
    /// The server's metrics and those of `stats`, which is read at each scrape.
    pub fn new(stats: Stats) -> Self {
        let mut metrics = Self {
            registry: Mutex::default(),
            time_to_first_token: Latency::new(&REQUEST_BOUNDS),
            inter_token: Latency::new(&TOKEN_BOUNDS),
            time_per_output_token: Latency::new(&TOKEN_BOUNDS),
            e2e: Latency::new(&REQUEST_BOUNDS),
            queue: Latency::new(&REQUEST_BOUNDS),
            success: Family::default(),
            failure: Counter::default(),
        };
        let mut registry = Registry::default();
        for (name, help, latency) in [
            ("time_to_first_token", "Arrival of a request to its first token", &metrics.time_to_first_token),
            ("inter_token_latency", "One token to the next", &metrics.inter_token),
            (
                "time_per_output_token",
                "A request's mean time for each token after the first",
                &metrics.time_per_output_token,
            ),
            ("e2e_request_latency", "Arrival of a request to its last token", &metrics.e2e),
            ("request_queue_time", "Submission of a request to the start of its prompt", &metrics.queue),
        ] {
            registry.register_with_unit(name, help, Unit::Seconds, latency.buckets.clone());
        }
        registry.register("request_success", "Requests that ended well, by how", metrics.success.clone());
        registry.register("request_failure", "Requests that ended with an error", metrics.failure.clone());
        registry.register_collector(Box::new(EngineCollector(stats)));
        metrics.registry = Mutex::new(registry);
        metrics
    }

    /// Adds metrics of other parts (such as the stages of a remote exchange)
    /// to what `/metrics` shows.
    ///
    /// ```
    /// # use prometheus_client::metrics::counter::Counter;
    /// # let metrics = distkv::server::Metrics::new(std::sync::Arc::new(Default::default));
    /// let exchanges = Counter::<u64>::default();
    /// metrics.register(|registry| registry.register("remote_exchanges", "Queries sent", exchanges.clone()));
    /// ```
    pub fn register(&self, add: impl FnOnce(&mut Registry)) {
        add(&mut lock(&self.registry));
    }

    /// OpenMetrics text.
    pub fn encode(&self) -> Result<String, fmt::Error> {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &lock(&self.registry))?;
        Ok(text)
    }

    /// Percentiles of every latency, in milliseconds.
    pub fn latencies(&self) -> Value {
        json!({
            "time_to_first_token": self.time_to_first_token.percentiles(),
            "inter_token": self.inter_token.percentiles(),
            "time_per_output_token": self.time_per_output_token.percentiles(),
            "e2e": self.e2e.percentiles(),
            "queue": self.queue.percentiles(),
        })
    }

    pub(super) fn succeeded(&self, finished_reason: &'static str) {
        self.success.get_or_create(&FinishLabels { finished_reason }).inc();
    }

    pub(super) fn failed(&self) {
        self.failure.inc();
    }
}

/// The engine's figures, read when they are scraped.
struct EngineCollector(Stats);

impl fmt::Debug for EngineCollector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("EngineCollector")
    }
}

impl Collector for EngineCollector {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let s: EngineStats = (self.0)();
        let used = s.blocks_total.saturating_sub(s.blocks_free + s.blocks_cached);
        let live = used.saturating_sub(s.blocks_lent);
        let usage = if s.blocks_total == 0 { 0.0 } else { used as f64 / s.blocks_total as f64 };
        let mut gauge = |name: &str, help: &str, value: f64| {
            let metric = ConstGauge::new(value);
            metric.encode(encoder.encode_descriptor(name, help, None, metric.metric_type())?)
        };
        gauge("num_requests_running", "Requests in the batch", s.running as f64)?;
        gauge("num_requests_waiting", "Requests in the queue", s.waiting as f64)?;
        gauge("kv_cache_usage_perc", "Share of local rBlocks that hold KV in use; 1 is all", usage)?;
        let mut counter = |name: &str, help: &str, value: u64| {
            let metric = ConstCounter::new(value);
            metric.encode(encoder.encode_descriptor(name, help, None, metric.metric_type())?)
        };
        let prompt = s.prompt_tokens + s.cached_tokens;
        counter("prompt_tokens", "Prompt tokens computed or found in the prefix cache", prompt)?;
        counter("generation_tokens", "Tokens generated", s.generated_tokens)?;
        counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache", prompt)?;
        counter("prefix_cache_hits", "Prompt tokens found in the prefix cache", s.cached_tokens)?;
        counter("num_preemptions", "Requests preempted", s.preemptions)?;
        counter("kv_recoveries", "Requests that lost KV with a creditor and went on", s.recoveries)?;
        counter("kv_recomputed_tokens", "Tokens computed again because their KV was lost", s.recomputed_tokens)?;
        counter("kv_moved_out_blocks", "rBlocks that planned moves took to creditors", s.blocks_sent)?;
        counter("kv_moved_home_blocks", "rBlocks that planned moves brought home", s.blocks_fetched)?;
        counter("partials_rejected", "Partial results dropped: late, foreign or malformed", s.partials_rejected)?;
        let kind = ConstGauge::new(0u64).metric_type();
        let mut family = encoder.encode_descriptor("rblocks", "rBlocks, by what they are used for", None, kind)?;
        for (state, blocks) in [
            ("live", live),
            ("free", s.blocks_free),
            ("cached", s.blocks_cached),
            ("lent", s.blocks_lent),
            ("borrowed", s.blocks_borrowed),
            ("unreplicated", s.unreplicated_blocks),
        ] {
            ConstGauge::new(blocks as u64).encode(family.encode_family(&[("state", state)])?)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn the_names_that_dashboards_know_are_there() {
        let stats = EngineStats {
            running: 3,
            blocks_total: 10,
            blocks_free: 4,
            blocks_cached: 1,
            blocks_lent: 2,
            prompt_tokens: 90,
            cached_tokens: 10,
            recoveries: 2,
            recomputed_tokens: 48,
            blocks_sent: 7,
            blocks_fetched: 5,
            ..Default::default()
        };
        let metrics = Metrics::new(Arc::new(move || stats.clone()));
        metrics.time_to_first_token.observe(Duration::from_millis(20));
        metrics.succeeded("stop");
        metrics.register(|registry| registry.register("extra", "More", Counter::<u64>::default()));
        let text = metrics.encode().unwrap();
        for line in [
            "time_to_first_token_seconds_count 1",
            "time_to_first_token_seconds_bucket{le=\"0.025\"} 1",
            "inter_token_latency_seconds_count 0",
            "time_per_output_token_seconds_count 0",
            "e2e_request_latency_seconds_count 0",
            "request_queue_time_seconds_count 0",
            "num_requests_running 3",
            "num_requests_waiting 0",
            "kv_cache_usage_perc 0.5",
            "prompt_tokens_total 100",
            "generation_tokens_total 0",
            "prefix_cache_hits_total 10",
            "prefix_cache_queries_total 100",
            "request_success_total{finished_reason=\"stop\"} 1",
            "request_failure_total 0",
            "num_preemptions_total 0",
            "partials_rejected_total 0",
            "kv_recoveries_total 2",
            "kv_recomputed_tokens_total 48",
            "kv_moved_out_blocks_total 7",
            "kv_moved_home_blocks_total 5",
            "rblocks{state=\"live\"} 3",
            "rblocks{state=\"lent\"} 2",
            "extra_total 0",
        ] {
            assert!(text.lines().any(|l| l == line || l.starts_with(&format!("{line}.0"))), "{line} is not in\n{text}");
        }
        assert_eq!(metrics.latencies()["time_to_first_token"]["count"], 1);
    }
}
