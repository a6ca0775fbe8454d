//! How a verbs transport is set up, and which of its devices can be used.

use std::path::Path;
use std::time::Duration;

use super::device;
use super::rail::Rail;
use super::sys::Lib;
use crate::key::Token;
use crate::{Error, Result};

/// How a verbs transport uses devices and treats strangers.
#[derive(Clone, Debug)]
pub struct Config {
    /// Which devices and ports, and how.
    pub ports: device::VerbsConfig,
    /// How long a connection may take to be made.
    pub handshake_timeout: Duration,
    /// How many accepted connections may be in their handshake; others wait,
    /// and push the oldest out when it has had a fiftieth of its time.
    pub max_half_open: usize,
    /// Connections at once over one port. Each has 320 KiB of receives here.
    pub peers: usize,
    /// `host:port` told to others instead of the bound address, where that is
    /// not how they reach us.
    pub advertise: Option<String>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            ports: device::VerbsConfig::default(),
            handshake_timeout: Duration::from_secs(5),
            max_half_open: 64,
            peers: 256,
            advertise: None,
        }
    }
}

/// The transport cannot be used, because …
pub fn unavailable(because: String) -> Error {
    Error::Unavailable { transport: "verbs", because }
}

/// Opens the ports that the configuration lets through, best first; an error
/// where there is none.
pub fn open_rails(lib: &'static Lib, config: &Config) -> Result<Vec<Rail>> {
    config.ports.check()?;
    let sysfs = Path::new(device::SYSFS);
    let near = config.ports.near.place(sysfs).map_err(unavailable)?;
    let survey = device::survey(lib, sysfs)?;
    let chosen = device::rails(&survey.devices, &near, &config.ports);
    let incarnation = Token::random()?.low();
    let mut rails = Vec::new();
    for port in chosen.chosen {
        rails.push(Rail::open(lib, port, config, incarnation)?);
    }
    if rails.is_empty() {
        let passed = chosen.passed_over.iter().chain(&survey.failed);
        let because: Vec<_> = passed.map(|(name, because)| format!("{name}: {because}")).collect();
        let none = "there is no RDMA device".to_string();
        return Err(unavailable(if because.is_empty() { none } else { because.join("; ") }));
    }
    Ok(rails)
}
