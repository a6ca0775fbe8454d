//! The machine's RDMA devices: what there is, which ports can be used and under
//! which name, and in which order they are taken as rails.

pub mod gid;
mod gpu_direct;
mod open;
mod reach;
pub mod topology;

use std::fmt;
use std::path::Path;

pub use gid::{Gid, GidKind};
pub use gpu_direct::{DmabufSupport, GpuDirect, peermem_loaded};
pub use open::{Context, Mr, MrAccess, Pd, check, names};
pub use reach::{Reached, Registrar, reach};
pub use topology::{Distance, Near, Place};

use crate::verbs::sys::{self, Lib};
use crate::{Error, Result};

/// Where the kernel shows its devices.
pub const SYSFS: &str = "/sys";

/// Which devices are used and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VerbsConfig {
    /// Only these: `mlx5_0`, or one port of it, `mlx5_0:1`. Empty: any.
    pub devices: Vec<String>,
    /// The GID to use on every port, where the choice of [`gid::choose`] is not
    /// right.
    pub gid_index: Option<u8>,
    /// RoCE and routed InfiniBand: the IP traffic class of all packets; on RoCE
    /// its upper six bits are the DSCP that switches look at.
    pub traffic_class: u8,
    /// InfiniBand's service level, 0 to 15.
    pub service_level: u8,
    /// Largest path MTU, bytes: 256, 512, 1024, 2048 or 4096.
    pub mtu_cap: u32,
    /// How often a packet is sent again before the connection fails, 0 to 7.
    pub retry_count: u8,
    /// Wait for an acknowledgement, 1 to 31: 4.096 µs × 2^timeout.
    pub timeout: u8,
    /// Most ports to use at once, 1 at least.
    pub max_rails: usize,
    /// What the rails should be close to.
    pub near: Near,
    /// Which of rails that are as close and as fast comes first, counted round:
    /// engines of one host say their rank on it, and begin with different ones.
    pub local_rank: u32,
    /// Only devices that reach a GPU's memory themselves, by dmabuf or
    /// nvidia-peermem.
    pub require_gpu_direct: bool,
}

impl Default for VerbsConfig {
    /// Any device, its best GID, one rail; a packet that stays unanswered fails
    /// the connection after half a second (6 times 67 ms) to two, since the
    /// hardware may wait up to four times the timeout.
    fn default() -> Self {
        Self {
            devices: Vec::new(),
            gid_index: None,
            traffic_class: 0,
            service_level: 0,
            mtu_cap: 4096,
            retry_count: 6,
            timeout: 14,
            max_rails: 1,
            near: Near::Anywhere,
            local_rank: 0,
            require_gpu_direct: false,
        }
    }
}

impl VerbsConfig {
    /// Refuses values that the hardware has no field for.
    pub fn check(&self) -> Result<()> {
        let fault = if self.service_level > 15 {
            format!("service level {} is over 15", self.service_level)
        } else if mtu_number(self.mtu_cap).is_none() {
            format!("an MTU of {} bytes: it must be 256, 512, 1024, 2048 or 4096", self.mtu_cap)
        } else if self.retry_count > 7 {
            format!("{} retries: 7 at most", self.retry_count)
        } else if !(1..=31).contains(&self.timeout) {
            format!("timeout {}: it must be between 1 and 31", self.timeout)
        } else if self.max_rails == 0 {
            "no rail may be used: allow 1 at least".to_string()
        } else {
            return Ok(());
        };
        Err(Error::Unavailable { transport: "verbs", because: fault })
    }

    /// Does the filter let this port through?
    fn lets(&self, device: &str, port: u8) -> bool {
        let names = |name: &String| match name.rsplit_once(':') {
            Some((of, number)) => of == device && number.parse() == Ok(port),
            None => name == device,
        };
        self.devices.is_empty() || self.devices.iter().any(names)
    }
}

/// How a device talks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// InfiniBand or RoCE: what this program speaks.
    InfiniBand,
    /// RDMA over TCP; its connections are made in another way.
    Iwarp,
    /// Another.
    Other(i32),
}

impl Transport {
    fn of_number(number: i32) -> Self {
        match number {
            sys::IBV_TRANSPORT_IB => Self::InfiniBand,
            sys::IBV_TRANSPORT_IWARP => Self::Iwarp,
            other => Self::Other(other),
        }
    }
}

/// What is under the packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    /// InfiniBand.
    InfiniBand,
    /// Ethernet, so RoCE.
    Ethernet,
    /// A number that is not known here.
    Unknown(u8),
}

impl Link {
    fn of_number(number: u8) -> Self {
        match number {
            // Of old, when there was nothing else.
            sys::IBV_LINK_LAYER_UNSPECIFIED | sys::IBV_LINK_LAYER_INFINIBAND => Self::InfiniBand,
            sys::IBV_LINK_LAYER_ETHERNET => Self::Ethernet,
            other => Self::Unknown(other),
        }
    }
}

impl fmt::Display for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InfiniBand => f.write_str("InfiniBand"),
            Self::Ethernet => f.write_str("Ethernet"),
            Self::Unknown(number) => write!(f, "link layer {number}"),
        }
    }
}

/// A port's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortState {
    /// Carries traffic.
    Active,
    /// No link.
    Down,
    /// Linked; the subnet manager has not configured it.
    Init,
    /// Configured, not yet active.
    Armed,
    /// Another.
    Other(u32),
}

impl PortState {
    fn of_number(number: u32) -> Self {
        match number {
            sys::IBV_PORT_ACTIVE => Self::Active,
            sys::IBV_PORT_DOWN => Self::Down,
            sys::IBV_PORT_INIT => Self::Init,
            sys::IBV_PORT_ARMED => Self::Armed,
            other => Self::Other(other),
        }
    }
}

impl fmt::Display for PortState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Active => f.write_str("active"),
            Self::Down => f.write_str("down"),
            Self::Init => f.write_str("initialising: is a subnet manager running?"),
            Self::Armed => f.write_str("armed"),
            Self::Other(number) => write!(f, "state {number}"),
        }
    }
}

/// A port of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    /// Its number, from 1.
    pub number: u8,
    /// Its state.
    pub state: PortState,
    /// What it is plugged into.
    pub link: Link,
    /// MTU in use, bytes; 0 where the device tells none.
    pub mtu: u32,
    /// Its address within an InfiniBand subnet; 0 on Ethernet.
    pub lid: u16,
    /// Must every packet carry a GID, though the link is InfiniBand?
    pub grh_required: bool,
    /// Speed, Gbit/s, rounded down, where the kernel tells it.
    pub gigabits: Option<u32>,
    /// The GIDs in use.
    pub gids: Vec<Gid>,
}

/// A device that could be opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// `mlx5_0`.
    pub name: String,
    /// How it talks.
    pub transport: Transport,
    /// Where it sits.
    pub place: Place,
    /// Its ports.
    pub ports: Vec<Port>,
    /// Does it register dmabufs?
    pub dmabuf: DmabufSupport,
    /// Is a module loaded that lets GPU addresses be registered?
    pub peermem: bool,
}

impl Device {
    /// How it reaches a GPU's memory.
    pub fn gpu_direct(&self) -> GpuDirect {
        GpuDirect::choose(&self.dmabuf, self.peermem)
    }
}

/// All of the machine's devices.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Survey {
    /// Those that could be looked into.
    pub devices: Vec<Device>,
    /// The others by name, with the reason.
    pub failed: Vec<(String, String)>,
}

/// Looks at every device. An error where there is no way to list them; that
/// there are none is not one.
pub fn survey(lib: &'static Lib, sysfs: &Path) -> Result<Survey> {
    let mut survey = Survey::default();
    for (name, transport) in names(lib)? {
        match look(lib, sysfs, &name, transport) {
            Ok(device) => survey.devices.push(device),
            Err(error) => survey.failed.push((name, error.to_string())),
        }
    }
    Ok(survey)
}

fn look(lib: &'static Lib, sysfs: &Path, name: &str, transport: Transport) -> Result<Device> {
    let context = Context::open(lib, name)?;
    let count = context.attributes()?.phys_port_cnt;
    let ports = (1..=count).map(|number| context.port(number, sysfs)).collect::<Result<_>>()?;
    let dmabuf = Pd::new(&context)?.dmabuf();
    let (place, peermem) = (Place::of_nic(sysfs, name), peermem_loaded(sysfs));
    Ok(Device { name: name.to_string(), transport, place, ports, dmabuf, peermem })
}

/// A port to be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rail {
    /// The device's name.
    pub device: String,
    /// The port's number.
    pub port: u8,
    /// What it is plugged into.
    pub link: Link,
    /// Its name on the network.
    pub gid: Gid,
    /// Path MTU to offer, bytes.
    pub mtu: u32,
    /// Its address within an InfiniBand subnet.
    pub lid: u16,
    /// Must packets carry a GID? Always so on Ethernet.
    pub global: bool,
    /// Speed, Gbit/s, where known.
    pub gigabits: Option<u32>,
    /// How far it is from what it should be close to.
    pub distance: Distance,
}

impl Rail {
    /// Rails of one class can stand for each other. Those of another link layer
    /// reach other peers.
    fn class(&self) -> (Distance, std::cmp::Reverse<Option<u32>>, bool) {
        (self.distance, std::cmp::Reverse(self.gigabits), self.link != Link::InfiniBand)
    }
}

/// Which ports are used, and why the others are not.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rails {
    /// Closest first, then fastest, InfiniBand before Ethernet, first ports before
    /// second ones, then by name; of those alike in the first three the one of
    /// our [local rank](VerbsConfig::local_rank) first and those before it last.
    /// At most as many as the configuration allows.
    pub chosen: Vec<Rail>,
    /// `mlx5_0:1` or the name of a device that the filter asks for, and why not.
    pub passed_over: Vec<(String, String)>,
}

/// Chooses the rails among `devices`; `near` is the configuration's, as a place.
pub fn rails(devices: &[Device], near: &Place, config: &VerbsConfig) -> Rails {
    let mut rails = Rails::default();
    for device in devices {
        let distance = device.place.distance(near);
        for port in &device.ports {
            match rail(device, port, distance, config) {
                Ok(rail) => rails.chosen.push(rail),
                Err(because) => rails.passed_over.push((format!("{}:{}", device.name, port.number), because)),
            }
        }
    }
    // The second port of an adapter shares the bus with the first.
    rails.chosen.sort_by_key(|rail| (rail.class(), rail.port, natural(&rail.device), rail.device.clone()));
    for alike in rails.chosen.chunk_by_mut(|a, b| a.class() == b.class()) {
        alike.rotate_left(config.local_rank as usize % alike.len());
    }
    for spare in rails.chosen.split_off(rails.chosen.len().min(config.max_rails)) {
        let because = format!("usable; not needed for {} rail(s)", config.max_rails);
        rails.passed_over.push((format!("{}:{}", spare.device, spare.port), because));
    }
    for name in &config.devices {
        let alone = VerbsConfig { devices: vec![name.clone()], ..VerbsConfig::default() };
        if !devices.iter().any(|device| device.ports.iter().any(|port| alone.lets(&device.name, port.number))) {
            rails.passed_over.push((name.clone(), "there is no such device or port".into()));
        }
    }
    rails
}

fn rail(device: &Device, port: &Port, distance: Distance, config: &VerbsConfig) -> std::result::Result<Rail, String> {
    if !config.lets(&device.name, port.number) {
        return Err("not among the devices asked for".into());
    }
    match device.transport {
        Transport::InfiniBand => {}
        Transport::Iwarp => return Err("iWARP: only InfiniBand and RoCE are spoken here".into()),
        Transport::Other(number) => return Err(format!("transport {number}: it lacks InfiniBand's queue pairs")),
    }
    if config.require_gpu_direct
        && let GpuDirect::Bounce { because } = device.gpu_direct()
    {
        return Err(format!("it reaches a GPU's memory by a copy through host memory only ({because})"));
    }
    if port.state != PortState::Active {
        return Err(format!("the port is {}", port.state));
    }
    let gid = gid::choose(port.link, &port.gids, config.gid_index)?;
    if port.link == Link::InfiniBand && port.lid == 0 && !port.grh_required {
        return Err("the port has no LID: is a subnet manager running?".into());
    }
    let mtu = port.mtu.min(config.mtu_cap);
    if mtu_number(mtu).is_none() {
        return Err(format!("an MTU of {mtu} bytes"));
    }
    Ok(Rail {
        device: device.name.clone(),
        port: port.number,
        link: port.link,
        gid,
        mtu,
        lid: port.lid,
        global: port.link != Link::InfiniBand || port.grh_required,
        gigabits: port.gigabits,
        distance,
    })
}

/// So that `mlx5_10` comes after `mlx5_9`: the text up to a last number, and it.
fn natural(name: &str) -> (String, u64) {
    let text = name.trim_end_matches(|c: char| c.is_ascii_digit());
    (text.to_string(), name[text.len()..].parse().unwrap_or(0))
}

/// Bytes of an MTU as the library numbers them; 0 for a number unknown here.
pub fn mtu_bytes(number: u32) -> u32 {
    match number {
        sys::IBV_MTU_256..=sys::IBV_MTU_4096 => 128 << number,
        _ => 0,
    }
}

/// The library's number of an MTU in bytes.
pub fn mtu_number(bytes: u32) -> Option<u32> {
    (sys::IBV_MTU_256..=sys::IBV_MTU_4096).find(|number| mtu_bytes(*number) == bytes)
}

/// Gbit/s of sysfs's `400 Gb/sec (4X NDR)`, rounded down.
fn parse_rate(text: &str) -> Option<u32> {
    let (number, rest) = text.trim().split_once(' ')?;
    let whole = number.split('.').next()?;
    rest.starts_with("Gb/sec").then(|| whole.parse().ok()).flatten()
}

#[cfg(test)]
mod tests;
