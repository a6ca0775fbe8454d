//! Verbs transports: over the software HCA, and over devices of the kernel's.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use distkv_fabric::Transport;
use distkv_fabric::secure::Secret;
use distkv_fabric::verbs::device::VerbsConfig;
use distkv_fabric::verbs::{Config, VerbsTransport, sys::Lib};

use crate::place;

/// RDMA devices that the transports of a test take in turn, `rxe0,rxe1`; all
/// take all there are where it is not set.
const DEVICES: &str = "DISTKV_TEST_VERBS_DEVICES";

/// A verbs transport's configuration: the devices in turn. On a slow machine a pause
/// of the machine's own must not be taken for a peer that is gone, neither by a
/// handshake nor by a device that waits for an acknowledgement.
fn verbs(devices: &str) -> (std::net::SocketAddr, Secret, Config) {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let turn = NEXT.fetch_add(1, Ordering::Relaxed);
    let devices: Vec<&str> = devices.split(',').filter(|name| !name.is_empty()).collect();
    let device = devices.get(turn % devices.len().max(1)).map(|name| name.to_string());
    let mut config = Config::default();
    config.ports = VerbsConfig { devices: device.into_iter().collect(), ..config.ports };
    let slow = crate::node::slowness();
    config.handshake_timeout *= slow;
    // It is the exponent of the wait: half as many times longer, or less.
    config.ports.timeout += slow.ilog2().saturating_sub(1) as u8;
    (([127, 0, 0, 1], 0).into(), Secret::new([7; 32]), config)
}

/// Makes a verbs transport over the devices of the software HCA.
pub fn make_verbs() -> Box<dyn Transport> {
    static LIB: OnceLock<Lib> = OnceLock::new();
    let lib = LIB.get_or_init(|| Lib::open(&place::path()).unwrap());
    let (address, secret, config) = verbs("soft0,soft1");
    Box::new(VerbsTransport::over(lib, address, secret, config).unwrap())
}

/// Makes a verbs transport over devices that the kernel knows.
pub fn make_rdma() -> Box<dyn Transport> {
    let (address, secret, config) = verbs(&std::env::var(DEVICES).unwrap_or_default());
    Box::new(VerbsTransport::bind(address, secret, config).unwrap())
}
