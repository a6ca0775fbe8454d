//! What is measured: a transport as it is used, and which of its two verbs.

use std::net::{Ipv4Addr, SocketAddr};

use anyhow::Result;
use clap::ValueEnum;
use distkv_fabric::secure::{Secret, Security};
use distkv_fabric::select::{Kind, Options};
use distkv_fabric::{MAX_SEND, Transport};

use crate::cli::options::RdmaOptions;

/// A transport as it is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subject {
    pub(super) kind: Kind,
    insecure: bool,
}

impl Subject {
    /// A transport of the first or of a second side.
    pub(super) fn bind(self, rdma: &RdmaOptions, first: bool) -> Result<Box<dyn Transport>> {
        // It guards noughts and ones for the time of a measurement.
        let secret = Secret::new(*b"the same at both sides of a test");
        let security = if self.insecure { Security::Insecure } else { Security::Sealed(secret) };
        let mut rdma = rdma.config()?;
        if let [one, other] = &rdma.devices[..] {
            rdma.devices = vec![if first { one.clone() } else { other.clone() }];
        }
        Ok(self.kind.bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), &Options { security, rdma })?)
    }
}

impl std::str::FromStr for Subject {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "tcp-insecure" => Ok(Self { kind: Kind::Tcp, insecure: true }),
            name => Ok(Self { kind: name.parse()?, insecure: false }),
        }
    }
}

impl std::fmt::Display for Subject {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}{}", self.kind, if self.insecure { "-insecure" } else { "" })
    }
}

/// One of the fabric's two verbs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Verb {
    /// Bytes placed in the peer's memory, with a notification.
    Write,
    /// A message, handed to the peer.
    Send,
}

impl Verb {
    /// As orders name it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Write => "write",
            Self::Send => "send",
        }
    }

    /// The most bytes that one of it carries, if there is such a limit.
    pub(super) fn limit(self) -> Option<usize> {
        match self {
            Self::Write => None,
            Self::Send => Some(MAX_SEND),
        }
    }
}

impl std::str::FromStr for Verb {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        ValueEnum::from_str(name, false)
    }
}
