//! How a verbs transport is set up: its devices, its address, its sockets.

use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};

use super::device;
use super::rail::Rail;
use super::sys::Lib;
use crate::key::Token;
use crate::{Address, Error, Result};

/// What a verbs transport's address begins with.
pub const SCHEME: &str = "verbs://";

/// How a verbs transport uses devices and treats strangers.
#[derive(Clone, Debug)]
pub struct Config {
    /// Which devices and ports, and how.
    pub ports: device::VerbsConfig,
    /// How long a connection may take to be made.
    pub handshake_timeout: Duration,
    /// How many accepted connections may be in their handshake; one more pushes
    /// the oldest out.
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
    let incarnation = Token::random()?.0.iter().fold(0, |n: u64, byte| n << 4 ^ u64::from(*byte));
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

/// Where a control channel goes to.
pub fn resolve(address: &Address) -> Result<SocketAddr> {
    let Some(name) = address.0.strip_prefix(SCHEME) else {
        return Err(Error::BadAddress(address.clone(), "not verbs://host:port"));
    };
    let found = name.to_socket_addrs().map_err(|e| match e.kind() {
        std::io::ErrorKind::InvalidInput => Error::BadAddress(address.clone(), "not verbs://host:port"),
        _ => Error::Unreachable(address.clone(), e.to_string()),
    });
    found?.next().ok_or_else(|| Error::Unreachable(address.clone(), "the name has no address".into()))
}

/// A socket that is connecting to `to`.
pub fn dial(address: &Address, to: SocketAddr) -> Result<OwnedFd> {
    let family = if to.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)
        .map_err(|e| Error::os("making a socket", e))?;
    sockopt::set_tcp_nodelay(&socket, true).map_err(|e| Error::os("making a socket", e))?;
    match rustix::net::connect(&socket, &to) {
        Ok(()) | Err(rustix::io::Errno::INPROGRESS) => {}
        Err(e) => return Err(Error::Unreachable(address.clone(), e.to_string())),
    }
    Ok(socket)
}
