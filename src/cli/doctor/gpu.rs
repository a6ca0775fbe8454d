//! The doctor's look at GPUs: driver, kernels, the matrix library, and what a NIC
//! could reach.

use std::fmt::Write as _;

use serde::Serialize;

use crate::device::cuda::driver::{self, Properties};
use crate::device::cuda::{images, matrix_library};

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
    /// Its memory can be exported as a dma-buf, for a NIC.
    dma_buf: bool,
    /// How its kernels run here: machine code, or PTX compiled at start.
    code: &'static str,
}

/// Looks.
pub fn look() -> Gpus {
    let found = driver::count().and_then(|count| {
        (0..count).map(|ordinal| Ok(gpu(ordinal, driver::Context::open(ordinal)?.properties()))).collect()
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

fn gpu(ordinal: usize, p: &Properties) -> Gpu {
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
}
