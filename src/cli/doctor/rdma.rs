//! The doctor's look at RDMA: library, devices, ports, the rails that would be
//! used, and how they reach a GPU's memory.

use std::fmt::Write as _;
use std::path::Path;

use distkv_fabric::verbs::device::{Device, GpuDirect, Place, Port, Rails, Transport, VerbsConfig, gid, rails, survey};
use distkv_fabric::verbs::sys::Lib;
use serde::Serialize;

/// The transport's name.
pub const NAME: &str = "verbs";

/// What was found.
#[derive(Serialize)]
pub struct Verbs {
    /// Why there is nothing below.
    error: Option<String>,
    devices: Vec<DeviceLine>,
    /// In the order in which they would be used.
    rails: Vec<RailLine>,
    passed_over: Vec<PassedOver>,
    /// The devices that could be looked into, to try GPUs' memory with.
    #[serde(skip)]
    pub found: Vec<Device>,
}

#[derive(Serialize)]
struct DeviceLine {
    name: String,
    /// Why it could not be looked into; then the rest is empty.
    error: Option<String>,
    pci: Option<String>,
    numa_node: Option<u32>,
    gpu_direct: &'static str,
    /// Why `gpu_direct` is no better than it is.
    gpu_direct_because: Option<String>,
    ports: Vec<PortLine>,
}

#[derive(Serialize)]
struct PortLine {
    number: u8,
    state: String,
    link: String,
    mtu: u32,
    gigabits: Option<u32>,
    lid: u16,
    gids: usize,
    /// The one that would be used.
    gid: Option<GidLine>,
    /// Why none would.
    gid_error: Option<String>,
}

#[derive(Serialize)]
struct GidLine {
    index: u8,
    address: String,
    kind: String,
}

#[derive(Serialize)]
struct RailLine {
    device: String,
    port: u8,
    gid_index: u8,
    gid: String,
    mtu: u32,
    gigabits: Option<u32>,
    distance: String,
}

#[derive(Serialize)]
struct PassedOver {
    port: String,
    because: String,
}

/// Looks at the library and every device.
pub fn look(sysfs: &Path, near: &Place, config: &VerbsConfig) -> Verbs {
    let lib = match Lib::get() {
        Ok(lib) => lib,
        Err(error) => {
            let advice = "for RDMA install the packages libibverbs1 and ibverbs-providers";
            return Verbs::failed(format!("{error} ({advice})"));
        }
    };
    let found = match survey(lib, sysfs) {
        Ok(found) => found,
        Err(distkv_fabric::Error::Unavailable { because, .. }) => return Verbs::failed(because),
        Err(error) => return Verbs::failed(error.to_string()),
    };
    if found.devices.is_empty() && found.failed.is_empty() {
        let folder = sysfs.join("class/infiniband");
        return Verbs::failed(format!("there is no RDMA device (none in {})", folder.display()));
    }
    let mut devices: Vec<DeviceLine> = found.devices.iter().map(|device| DeviceLine::of(device, config)).collect();
    devices.extend(found.failed.into_iter().map(|(name, error)| DeviceLine::unknown(name, error)));
    let Rails { chosen, passed_over } = rails(&found.devices, near, config);
    let rails = chosen.into_iter().map(|rail| RailLine {
        gid_index: rail.gid.index,
        gid: rail.gid.to_string(),
        distance: rail.distance.to_string(),
        device: rail.device,
        port: rail.port,
        mtu: rail.mtu,
        gigabits: rail.gigabits,
    });
    let passed_over = passed_over.into_iter().map(|(port, because)| PassedOver { port, because });
    let (rails, passed_over) = (rails.collect(), passed_over.collect());
    Verbs { error: None, devices, rails, passed_over, found: found.devices }
}

impl Verbs {
    /// Nothing can be used.
    pub fn failed(because: String) -> Self {
        let (devices, rails, passed_over, found) = Default::default();
        Self { error: Some(because), devices, rails, passed_over, found }
    }

    /// The ports that would be used, in words; or why there is none.
    pub fn ports(&self) -> Result<String, String> {
        if let Some(error) = &self.error {
            return Err(error.clone());
        }
        if self.rails.is_empty() {
            let mut why: Vec<String> =
                self.passed_over.iter().map(|port| format!("{}: {}", port.port, port.because)).collect();
            let failed = self.devices.iter().filter_map(|device| Some((&device.name, device.error.as_ref()?)));
            why.extend(failed.map(|(name, error)| format!("{name}: {error}")));
            return Err(format!("no port can be used: {}", why.join("; ")));
        }
        let names: Vec<String> = self.rails.iter().map(|rail| format!("{}:{}", rail.device, rail.port)).collect();
        Ok(names.join(", "))
    }

    /// Is there a device that pins memory?
    pub fn needs_locked_memory(&self) -> bool {
        !self.devices.is_empty()
    }

    /// Lines for people.
    pub fn render(&self, out: &mut String) {
        if let Some(error) = &self.error {
            let _ = writeln!(out, "  {error}");
        }
        for device in &self.devices {
            device.render(out);
        }
        for (place, rail) in (1..).zip(&self.rails) {
            let speed = rail.gigabits.map_or(String::new(), |speed| format!("{speed} Gbit/s, "));
            let _ = writeln!(
                out,
                "  rail {place}: {}:{}, GID {} ({}), MTU {}, {speed}{}",
                rail.device, rail.port, rail.gid_index, rail.gid, rail.mtu, rail.distance
            );
        }
        for port in &self.passed_over {
            let _ = writeln!(out, "  not used: {}: {}", port.port, port.because);
        }
    }
}

impl DeviceLine {
    fn of(device: &Device, config: &VerbsConfig) -> Self {
        let (gpu_direct, gpu_direct_because) = match device.gpu_direct() {
            GpuDirect::Dmabuf => ("dmabuf", None),
            GpuDirect::PeerMem => ("peermem", None),
            GpuDirect::Bounce { because } => ("bounce", Some(because)),
        };
        let ports = device.ports.iter().map(|port| PortLine::of(device, port, config)).collect();
        Self {
            name: device.name.clone(),
            error: None,
            pci: device.place.address().map(str::to_string),
            numa_node: device.place.node,
            gpu_direct,
            gpu_direct_because,
            ports,
        }
    }

    fn unknown(name: String, error: String) -> Self {
        Self {
            name,
            error: Some(error),
            pci: None,
            numa_node: None,
            gpu_direct: "unknown",
            gpu_direct_because: None,
            ports: Vec::new(),
        }
    }

    fn render(&self, out: &mut String) {
        if let Some(error) = &self.error {
            let _ = writeln!(out, "  {}: {error}", self.name);
            return;
        }
        let place = self.pci.as_deref().unwrap_or("in software");
        let node = self.numa_node.map_or(String::new(), |node| format!(", NUMA node {node}"));
        let gpu = match &self.gpu_direct_because {
            Some(because) => format!("a copy through host memory: {because}"),
            None => self.gpu_direct.to_string(),
        };
        let _ = writeln!(out, "  {} ({place}{node}); GPU memory by {gpu}", self.name);
        for port in &self.ports {
            let speed = port.gigabits.map_or(String::new(), |speed| format!(", {speed} Gbit/s"));
            let gid = match &port.gid {
                Some(gid) => format!("GID {} ({}, {}) of {}", gid.index, gid.address, gid.kind, port.gids),
                None => port.gid_error.clone().unwrap_or_default(),
            };
            let _ = writeln!(
                out,
                "    port {}: {}, {}, MTU {}{speed}, {gid}",
                port.number, port.link, port.state, port.mtu
            );
        }
    }
}

impl PortLine {
    fn of(device: &Device, port: &Port, config: &VerbsConfig) -> Self {
        let gid = match device.transport {
            Transport::InfiniBand => gid::choose(port.link, &port.gids, config.gid_index),
            Transport::Iwarp | Transport::Other(_) => Err("neither InfiniBand nor RoCE".to_string()),
        };
        let (gid, gid_error) = match gid {
            Ok(gid) => (Some(GidLine { index: gid.index, address: gid.to_string(), kind: gid.describe() }), None),
            Err(because) => (None, Some(because)),
        };
        Self {
            number: port.number,
            state: port.state.to_string(),
            link: port.link.to_string(),
            mtu: port.mtu,
            gigabits: port.gigabits,
            lid: port.lid,
            gids: port.gids.len(),
            gid,
            gid_error,
        }
    }
}
