//! What a transport counts of strangers and of peers that misbehave.

use std::collections::HashSet;

/// Counts since a transport was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Connections that others opened, whatever became of them.
    pub accepted: u64,
    /// Connections closed because the peer broke the protocol, in the
    /// handshake or later.
    pub protocol_errors: u64,
    /// Accepted connections that ended in their handshake: closed by the
    /// stranger, too slow, or pushed out by others.
    pub half_open_dropped: u64,
}

/// Causes that are remembered as logged.
const CAUSES: usize = 64;

/// The counts, and what was logged.
#[derive(Default)]
pub(crate) struct Incidents {
    pub stats: Stats,
    logged: HashSet<String>,
}

impl Incidents {
    /// A peer broke the protocol. Logged once a cause: a stranger must not fill
    /// the log.
    pub fn protocol(&mut self, transport: &str, cause: &str) {
        self.stats.protocol_errors += 1;
        if self.logged.len() < CAUSES && self.logged.insert(cause.to_owned()) {
            tracing::warn!(transport, cause, "closed a connection; more for this cause are only counted");
        }
    }
}
