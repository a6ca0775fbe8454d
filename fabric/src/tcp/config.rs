//! How a tcp transport treats its peers and strangers.

use std::time::Duration;

use crate::secure::Security;

/// How a tcp transport treats its peers and strangers.
#[derive(Clone, Debug)]
pub struct TcpConfig {
    /// What protects the connections; the same at both ends.
    pub security: Security,
    /// How long a handshake may take.
    pub handshake_timeout: Duration,
    /// How many accepted connections may be in their handshake; others wait,
    /// and push the oldest out when it has had a fiftieth of its time.
    pub max_half_open: usize,
    /// Use io_uring where the kernel allows it.
    pub io_uring: bool,
    /// `host:port` told to others instead of the bound address, where that is
    /// not how they reach us.
    pub advertise: Option<String>,
}

impl TcpConfig {
    /// Five seconds a handshake, 64 at once, io_uring where there is one.
    pub fn new(security: Security) -> Self {
        let handshake_timeout = Duration::from_secs(5);
        Self { security, handshake_timeout, max_half_open: 64, io_uring: true, advertise: None }
    }
}
