//! What a transport counts of strangers and of peers that misbehave.

use std::collections::HashSet;

use crate::secure::Refused;

/// Counts since a transport was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Connections that others opened, whatever became of them.
    pub accepted: u64,
    /// Connections closed because the peer broke the protocol, in the
    /// handshake or later: those below down to `tampered`, and all others.
    pub protocol_errors: u64,
    /// Of these: they spoke something else.
    pub foreign: u64,
    /// Of another version, for another transport, or sealed where we are
    /// insecure and the other way round.
    pub mismatched: u64,
    /// With another cluster key.
    pub wrong_key: u64,
    /// Records that did not open: changed on the way, or played again.
    pub tampered: u64,
    /// Handshakes that took too long.
    pub timeouts: u64,
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
        self.log(transport, cause);
    }

    /// A peer was refused. Logged as above.
    pub fn refused(&mut self, transport: &str, refused: Refused) {
        let stats = &mut self.stats;
        let class = match refused {
            Refused::Foreign => &mut stats.foreign,
            Refused::Version | Refused::Insecure | Refused::Sealed | Refused::Purpose => &mut stats.mismatched,
            Refused::Key => &mut stats.wrong_key,
            Refused::Tampered => &mut stats.tampered,
            Refused::Protocol(cause) => return self.protocol(transport, cause),
            // Our own side.
            Refused::Exhausted | Refused::Random | Refused::Over => return self.log(transport, &refused.to_string()),
        };
        *class += 1;
        self.protocol(transport, &refused.to_string());
    }

    fn log(&mut self, transport: &str, cause: &str) {
        if self.logged.len() < CAUSES && self.logged.insert(cause.to_owned()) {
            tracing::warn!(transport, cause, "closed a connection; more for this cause are only counted");
        }
    }
}
