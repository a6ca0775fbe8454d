//! What a controller is told at its start.

use std::time::Duration;

use core::net::SocketAddr;

use super::row::{MAX_ADDRESS, MAX_ADDRESSES, Profile, Tier};
use super::seal::KEY_BYTES;
use crate::kv::rblock::{InstanceId, KvShape};

/// What a controller is told at its start.
#[derive(Clone, Debug)]
pub struct Config {
    /// This instance: one process life.
    pub instance: InstanceId,
    /// When that life began, milliseconds since 1970.
    pub started: u64,
    /// Which cluster it means to join.
    pub cluster: [u8; 16],
    /// The key under which its datagrams are sealed.
    pub key: [u8; KEY_BYTES],
    /// What others are told of it.
    pub profile: Profile,
    /// Shape of its model's KV, if it runs one.
    pub shape: Option<KvShape>,
    /// Where its datagrams arrive, as others see it.
    pub gossip: SocketAddr,
    /// Where to ask to be let in.
    pub join: Vec<SocketAddr>,
    /// Tier of the instance's pool.
    pub tier: Tier,
    /// Time between heartbeats to creditors.
    pub heartbeat: Duration,
    /// A connection that heartbeats go over and nothing comes back for this
    /// long is closed.
    pub lost_after: Duration,
    /// A connection without a Hello after this long is closed.
    pub hello_timeout: Duration,
    /// A creditor that does not answer for this long has refused.
    pub ask_timeout: Duration,
    /// Time between two announcements to those in `join`: soon while alone,
    /// then rarely, to find parts of the cluster that were cut off.
    pub announce: (Duration, Duration),
}

impl Config {
    /// The usual times; no key but what the cluster's name gives.
    pub fn new(instance: InstanceId, cluster: [u8; 16], profile: Profile, gossip: SocketAddr) -> Self {
        let ms = Duration::from_millis;
        Self {
            instance,
            started: 0,
            cluster,
            key: [0; KEY_BYTES],
            profile,
            shape: None,
            gossip,
            join: Vec::new(),
            tier: Tier::Host,
            heartbeat: ms(200),
            lost_after: ms(2000),
            hello_timeout: ms(2000),
            ask_timeout: ms(1000),
            announce: (ms(200), ms(5000)),
        }
    }

    pub(super) fn check(&self) -> Result<(), ConfigError> {
        let profile = &self.profile;
        for list in [&profile.control, &profile.creditor] {
            if list.len() > MAX_ADDRESSES {
                return Err(ConfigError::Addresses(list.len()));
            }
        }
        let addresses = profile.control.iter().chain(&profile.creditor).chain([&profile.http]).chain(&profile.peers);
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
