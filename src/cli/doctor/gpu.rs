//! The doctor's look at GPUs: driver, kernels, the matrix library, and what a NIC
//! could reach.

use std::fmt::Write as _;
use std::sync::Arc;

use distkv_fabric::GpuRange;
use distkv_fabric::verbs::device::{Context, Device, GpuDirect, MrAccess, Pd, reach};
use distkv_fabric::verbs::sys::Lib;
use rustix::fs::SeekFrom;
use serde::Serialize;

use crate::device::cuda::driver::{self, NicWrites, Properties, Stream};
use crate::device::cuda::{KvMemory, images, matrix_library};

/// Bytes of the GPU's memory that are exported and registered, to see whether
/// that works.
const TRIED: usize = 2 << 20;

/// What was found.
#[derive(Serialize)]
pub struct Gpus {
    /// Why no GPU can be used; `None` where one can.
    because: Option<String>,
    /// Files of kernels in this program; 0: it was built without.
    kernels: usize,
    /// Why there are none.
    without_kernels: Option<&'static str>,
    /// Why the matrix library cannot be used.
    matrix_library: Option<String>,
    devices: Vec<Gpu>,
}

#[derive(Serialize)]
struct Gpu {
    ordinal: usize,
    name: String,
    capability: String,
    memory_gib: f64,
    multiprocessors: u32,
    /// Where it sits on the bus.
    pci: String,
    numa_node: Option<u32>,
    /// As 13.0.
    driver: String,
    /// Its driver says that memory can be exported as a dma-buf, for a NIC.
    dma_buf: bool,
    /// Who sees a NIC's writes in order without a flush.
    nic_writes: &'static str,
    /// What came of exporting some.
    export: Export,
    /// How each RDMA device reached that, tried.
    nics: Vec<Nic>,
    /// How its kernels run here: machine code, or PTX compiled at start.
    code: &'static str,
}

/// A small allocation's export.
#[derive(Default, Serialize)]
struct Export {
    /// Bytes of the file, where there is one.
    bytes: Option<u64>,
    /// Why there is none.
    because: Option<String>,
}

/// A NIC and the GPU's memory.
#[derive(Serialize)]
struct Nic {
    name: String,
    /// `dmabuf`, `peermem` or `bounce`; `none` where nothing worked.
    way: &'static str,
    /// Why none better.
    because: Option<String>,
}

/// Looks, and tries to make memory of each GPU known to each RDMA device.
pub fn look(nics: &[Device]) -> Gpus {
    let found = driver::count().and_then(|count| {
        let open = |ordinal| {
            let context = driver::Context::open(ordinal)?;
            let (export, nics) = tried(&context, nics);
            Ok(gpu(ordinal, context.properties(), export, nics))
        };
        (0..count).map(open).collect()
    });
    let (because, devices): (_, Vec<Gpu>) = match found {
        Ok(devices) => (None, devices),
        Err(error) => (Some(crate::device::DeviceError::to_string(&error)), Vec::new()),
    };
    let because = because.or_else(|| devices.is_empty().then(|| "CUDA: the driver knows no GPU".into()));
    Gpus {
        because,
        kernels: images::IMAGES.len(),
        without_kernels: images::IMAGES.is_empty().then_some(images::WITHOUT_KERNELS),
        matrix_library: matrix_library().err().map(|e| e.to_string()),
        devices,
    }
}

/// Exports some memory, and has each NIC take it.
fn tried(context: &Arc<driver::Context>, nics: &[Device]) -> (Export, Vec<Nic>) {
    let made = Stream::new(context, false).and_then(|stream| KvMemory::new(&Arc::new(stream), TRIED));
    let memory: Arc<dyn GpuRange> = match made {
        Ok(memory) => Arc::new(memory),
        Err(error) => return (Export { bytes: None, because: Some(error.to_string()) }, Vec::new()),
    };
    let size = memory.export().and_then(|dmabuf| {
        rustix::fs::seek(&dmabuf.file, SeekFrom::End(0)).map_err(|e| format!("asking for the dma-buf's size: {e}"))
    });
    let export = match size {
        Ok(bytes) => Export { bytes: Some(bytes), because: None },
        Err(because) => Export { bytes: None, because: Some(because) },
    };
    (export, nics.iter().map(|nic| Nic::tried(nic, &memory)).collect())
}

impl Nic {
    fn tried(nic: &Device, memory: &Arc<dyn GpuRange>) -> Self {
        let reached = Lib::get().map_err(str::to_string).and_then(|lib| {
            let pd = Context::open(lib, &nic.name).and_then(|context| Pd::new(&context));
            let pd = pd.map_err(|e| e.to_string())?;
            let access = MrAccess::RemoteWrite;
            reach(&pd, &nic.name, (&nic.dmabuf, nic.peermem), memory, access, TRIED).map_err(|e| e.to_string())
        });
        let (way, because) = match reached {
            Ok(reached) => match reached.way {
                GpuDirect::Dmabuf => ("dmabuf", None),
                GpuDirect::PeerMem => (
                    "peermem",
                    reached.failed.into_iter().next().map(|(what, because)| format!("not by {what}: {because}")),
                ),
                GpuDirect::Bounce { because } => ("bounce", Some(because)),
            },
            Err(because) => ("none", Some(because)),
        };
        Self { name: nic.name.clone(), way, because }
    }

    fn render(&self, out: &mut String) {
        let way = match self.way {
            "dmabuf" => "its memory registered as a dma-buf",
            "peermem" => "its memory registered by nvidia-peermem",
            "bounce" => "a copy through host memory",
            _ => "not reached",
        };
        let because = self.because.as_ref().map_or(String::new(), |because| format!(": {because}"));
        let _ = writeln!(out, "            {}: {way}{because}", self.name);
    }
}

fn gpu(ordinal: usize, p: &Properties, export: Export, nics: Vec<Nic>) -> Gpu {
    Gpu {
        ordinal,
        name: p.name.clone(),
        capability: format!("{}.{}", p.capability.0, p.capability.1),
        memory_gib: p.memory as f64 / (1u64 << 30) as f64,
        multiprocessors: p.multiprocessors,
        pci: p.pci.clone(),
        numa_node: p.numa,
        driver: format!("{}.{}", p.driver / 1000, p.driver % 1000 / 10),
        dma_buf: p.dma_buf,
        nic_writes: match p.nic_writes {
            NicWrites::All => "all",
            NicWrites::Owner => "owner",
            NicWrites::Flushed => "none",
        },
        export,
        nics,
        code: match p.capability {
            (9, 0) => "machine code for Hopper",
            (8, _) => "machine code for compute capability 8.0",
            (0..=7, _) => "none: the kernels need compute capability 8.0",
            _ => "PTX, compiled when the program starts",
        },
    }
}

impl Gpus {
    /// What people read.
    pub fn render(&self, out: &mut String) {
        if let Some(because) = &self.because {
            let _ = writeln!(out, "  none      {because}");
        }
        for gpu in &self.devices {
            let numa = gpu.numa_node.map_or(String::new(), |node| format!(", NUMA node {node}"));
            let dma_buf = if gpu.dma_buf { "dma-buf" } else { "no dma-buf" };
            let _ = writeln!(
                out,
                "  cuda:{}    {}, {:.0} GiB, {} multiprocessors, compute capability {}, driver for CUDA {}, {}{numa}, {dma_buf}; {}",
                gpu.ordinal,
                gpu.name,
                gpu.memory_gib,
                gpu.multiprocessors,
                gpu.capability,
                gpu.driver,
                gpu.pci,
                gpu.code
            );
            let _ = match (&gpu.export.bytes, &gpu.export.because) {
                (Some(bytes), _) => {
                    let order = match gpu.nic_writes {
                        "all" => "by every GPU",
                        "owner" => "by this GPU",
                        _ => "after a flush only",
                    };
                    writeln!(out, "            exported {bytes} bytes as a dma-buf; a NIC's writes are seen {order}")
                }
                (None, because) => {
                    writeln!(out, "            exported nothing: {}", because.as_deref().unwrap_or("no reason given"))
                }
            };
            gpu.nics.iter().for_each(|nic| nic.render(out));
        }
        let _ = match self.without_kernels {
            Some(because) => writeln!(out, "  kernels   none in this program: {because}"),
            None => writeln!(out, "  kernels   {} files in this program", self.kernels),
        };
        if let Some(because) = &self.matrix_library {
            let _ = writeln!(out, "  matrices  {because}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_a_gpu_is_told_why() {
        let gpus = Gpus {
            because: Some("no driver".into()),
            kernels: 0,
            without_kernels: Some("no nvcc"),
            matrix_library: None,
            devices: Vec::new(),
        };
        let mut text = String::new();
        gpus.render(&mut text);
        assert_eq!(text, "  none      no driver\n  kernels   none in this program: no nvcc\n");
    }

    #[test]
    fn what_came_of_exporting_and_registering_is_told() {
        let properties = Properties {
            name: "H200".into(),
            capability: (9, 0),
            multiprocessors: 132,
            memory: 141 << 30,
            shared_memory: 227 << 10,
            l2: 50 << 20,
            memory_bandwidth: 4_800_000_000_000,
            driver: 13000,
            pci: "0000:18:00.0".into(),
            numa: None,
            dma_buf: true,
            nic_writes: NicWrites::Owner,
        };
        let nic =
            |name: &str, way, because: Option<&str>| Nic { name: name.into(), way, because: because.map(Into::into) };
        let shown = |export, nics| {
            let devices = vec![gpu(0, &properties, export, nics)];
            let gpus = Gpus { because: None, kernels: 1, without_kernels: None, matrix_library: None, devices };
            let mut text = String::new();
            gpus.render(&mut text);
            text
        };
        let ways = vec![
            nic("mlx5_0", "dmabuf", None),
            nic("mlx5_1", "peermem", Some("not by dmabuf: too old")),
            nic("rxe0", "bounce", Some("too soft")),
            nic("bad0", "none", Some("no memory may be locked")),
        ];
        let text = shown(Export { bytes: Some(2 << 20), because: None }, ways);
        let told: Vec<&str> = text.lines().skip(1).map(str::trim).collect();
        let expected = [
            "exported 2097152 bytes as a dma-buf; a NIC's writes are seen by this GPU",
            "mlx5_0: its memory registered as a dma-buf",
            "mlx5_1: its memory registered by nvidia-peermem: not by dmabuf: too old",
            "rxe0: a copy through host memory: too soft",
            "bad0: not reached: no memory may be locked",
            "kernels   1 files in this program",
        ];
        assert_eq!(told, expected);
        let text = shown(Export { bytes: None, because: Some("the driver refused".into()) }, Vec::new());
        assert!(text.contains("exported nothing: the driver refused"), "{text}");
    }
}
