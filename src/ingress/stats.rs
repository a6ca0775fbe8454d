//! What became of requests between nodes, in figures.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;
use serde_json::{Value, json};

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reason {
    reason: &'static str,
}

/// Counts since the start.
#[derive(Clone, Debug, Default)]
pub struct IngressStats {
    /// Requests of this node's clients that another instance took.
    pub placed: Counter,
    /// Requests that run, or ran, here for other nodes.
    pub taken_in: Counter,
    /// Times that another instance did not take one: it was asked in vain.
    pub declined: Counter,
    /// Requests that failed after they were lost, as nobody could go on with
    /// them.
    pub failed: Counter,
    /// Orders refused: of another key, of another cluster's, recorded, bent.
    pub strangers: Counter,
    continued: Family<Reason, Counter>,
    lost: Counter,
}

impl IngressStats {
    /// A request was lost with whom it ran on, and goes on.
    pub fn continued(&self, reason: &'static str) {
        self.continued.get_or_create(&Reason { reason }).inc();
        self.lost.inc();
    }

    /// Shows them at `/metrics`.
    pub fn register(&self, registry: &mut Registry) {
        let mut counter = |name: &str, help: &str, counter: &Counter| registry.register(name, help, counter.clone());
        counter("requests_placed_elsewhere", "Requests that another instance took", &self.placed);
        counter("requests_taken_in", "Requests run for clients of other nodes", &self.taken_in);
        counter("requests_declined", "Times that another instance did not take a request", &self.declined);
        counter("requests_lost", "Requests that nobody could go on with after a loss", &self.failed);
        counter(
            "peer_requests_refused",
            "Requests of peers that were not sealed with this cluster's key",
            &self.strangers,
        );
        let help = "Times that a request went on after whoever ran it was lost, by how that showed";
        registry.register("requests_continued", help, self.continued.clone());
    }

    /// For `/cluster`.
    pub fn json(&self) -> Value {
        json!({
            "placed_elsewhere": self.placed.get(),
            "taken_in": self.taken_in.get(),
            "declined": self.declined.get(),
            "continued": self.lost.get(),
            "lost": self.failed.get(),
            "refused": self.strangers.get(),
        })
    }
}
