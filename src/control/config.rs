//! What a controller is told at its start.

use std::time::Duration;

use super::message::{Hello, MAX_ADDRESS, MAX_ADDRESSES, Tier};

/// What a controller is told at its start.
#[derive(Clone, Debug)]
pub struct Config {
    /// Who this instance is.
    pub hello: Hello,
    /// Control addresses to join at.
    pub join: Vec<String>,
    /// Tier of the instance's pool.
    pub tier: Tier,
    /// Time between heartbeats.
    pub heartbeat: Duration,
    /// A member silent for this long is lost.
    pub lost_after: Duration,
    /// A connection without a Hello after this long is closed.
    pub hello_timeout: Duration,
    /// A creditor that does not answer for this long has refused.
    pub ask_timeout: Duration,
    /// First and longest wait before an address is dialed again.
    pub redial: (Duration, Duration),
    /// Time between introductions of everybody to everybody.
    pub introduce: Duration,
}

impl Config {
    /// The usual times.
    pub fn new(hello: Hello, join: Vec<String>) -> Self {
        let ms = Duration::from_millis;
        Self {
            hello,
            join,
            tier: Tier::Host,
            heartbeat: ms(200),
            lost_after: ms(2000),
            hello_timeout: ms(2000),
            ask_timeout: ms(1000),
            redial: (ms(50), ms(2000)),
            introduce: ms(2000),
        }
    }

    pub(super) fn check(&self) -> Result<(), ConfigError> {
        let hello = &self.hello;
        for list in [&hello.control, &hello.creditor] {
            if list.len() > MAX_ADDRESSES {
                return Err(ConfigError::Addresses(list.len()));
            }
        }
        let addresses = hello.control.iter().chain(&hello.creditor).chain(&self.join).chain([&hello.http]);
        match addresses.into_iter().find(|address| address.len() > MAX_ADDRESS) {
            Some(address) => Err(ConfigError::Address(address.clone())),
            None if self.heartbeat.is_zero() || self.lost_after <= self.heartbeat => Err(ConfigError::Times),
            None => Ok(()),
        }
    }
}

/// A configuration that no controller can run with.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Too many addresses.
    #[error("{0} addresses of one endpoint: give at most {MAX_ADDRESSES}")]
    Addresses(usize),
    /// An address is too long.
    #[error("the address {0:?} is longer than {MAX_ADDRESS} bytes")]
    Address(String),
    /// Times that contradict each other.
    #[error("a member must be allowed to be silent for longer than one heartbeat")]
    Times,
}
