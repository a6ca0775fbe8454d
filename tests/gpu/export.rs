//! The GPU's memory as a dmabuf: what a NIC would be given.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use distkv::device::cuda::driver::{Context, Stream};
use distkv::device::cuda::{CudaDevice, CudaOptions, Element, FENCED_BELOW, KvMemory};
use distkv::kv::rblock::{KvDtype, KvShape};
use distkv::node::device::DeviceName;
use rustix::fs::SeekFrom;

use crate::Settings;

/// Bytes of memory that are allocated, exported and freed again and again.
const PIECE: usize = 256 << 20;

/// A pool's memory is exported, whole; a range that is no whole pages is refused;
/// nothing of it stays allocated. Where the driver says that it exports nothing,
/// that is the error.
pub fn memory_for_a_nic(settings: &Settings) -> Result<String, String> {
    let DeviceName::Cuda(ordinal) = settings.device else { return Err("this check is for a GPU".into()) };
    let options = CudaOptions {
        ordinal,
        element: Element::Bf16,
        max_rows: 16,
        max_seqs: 16,
        graphs: false,
        fenced_below: FENCED_BELOW,
    };
    let device = CudaDevice::new(options).map_err(|e| e.to_string())?;
    // No whole pages of the host by itself.
    let shape = KvShape { layers: 3, kv_heads: 1, head_dim: 80, block_tokens: 16, dtype: KvDtype::Bf16 };
    let pool = device.pool(shape, 33).map_err(|e| e.to_string())?;
    let memory = pool.on_accelerator().ok_or("a pool on a GPU lies on no accelerator")?;
    let range = memory.clone().for_nic().ok_or("a GPU's memory is for no NIC")?;
    if range.device_address() != memory.address() || range.bytes() != memory.len() {
        return Err("a NIC would be given another range than the pool's".into());
    }
    range.prepare().map_err(|e| format!("before a NIC gets it: {e}"))?;
    let exported = range.export();
    if !device.properties().dma_buf {
        return match exported {
            Ok(_) => Err("a dmabuf, though the driver says that it has none".into()),
            Err(why) if why.contains("CU_DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED is 0") => {
                Ok(format!("this driver exports no dmabufs, and the error says so: {why}"))
            }
            Err(why) => Err(format!("an error that does not say what is missing: {why}")),
        };
    }
    let dmabuf = exported?;
    let page = rustix::param::page_size();
    let size = rustix::fs::seek(&dmabuf.file, SeekFrom::End(0)).map_err(|e| format!("lseek: {e}"))?;
    let stat = rustix::fs::fstat(&dmabuf.file).map_err(|e| format!("fstat: {e}"))?;
    let link = format!("/proc/self/fd/{}", dmabuf.file.as_raw_fd());
    let name = std::fs::read_link(link).map_err(|e| format!("readlink: {e}"))?;
    let whole = dmabuf.len >= memory.len() && dmabuf.len.is_multiple_of(page) && dmabuf.offset == 0;
    if !whole || size as usize != dmabuf.len {
        return Err(format!(
            "{} bytes of pool: a file of {size}, of which {} from {}",
            memory.len(),
            dmabuf.len,
            dmabuf.offset
        ));
    }
    drop(dmabuf);
    // The pool is as it was.
    pool.write(100, b"still here").map_err(|e| e.to_string())?;
    let mut read = [0; 10];
    memory.read(100, &mut read)?;
    if &read != b"still here" {
        return Err(format!("the pool holds {read:?} after its export"));
    }

    let context = Context::open(ordinal).map_err(|e| e.to_string())?;
    let stream = Arc::new(Stream::new(&context, false).map_err(|e| e.to_string())?);
    let new = || KvMemory::new(&stream, PIECE).map_err(|e| e.to_string());
    let memory = new()?;
    for (at, len) in [(512, page), (0, page + 512), (page / 2, page / 2), (PIECE - page, 2 * page), (0, 0)] {
        match memory.export_part(at, len) {
            Ok(_) => return Err(format!("{len} bytes from {at} on were exported")),
            Err(why) if why.to_string().contains("no dmabuf of the GPU's memory: ") => {}
            Err(why) => return Err(format!("{len} bytes from {at} on: an error that is not ours: {why}")),
        }
    }
    let part = memory.export_part(2 << 20, 4 << 20).map_err(|e| format!("a part: {e}"))?;
    let part = rustix::fs::seek(&part, SeekFrom::End(0)).map_err(|e| format!("lseek: {e}"))?;
    if part != 4 << 20 {
        return Err(format!("a part of 4 MiB is a file of {part} bytes"));
    }
    drop(memory);
    // A file keeps its memory; closed before or after, all of it comes back.
    let before = context.free_memory().map_err(|e| e.to_string())?;
    for first in [true, false].repeat(4) {
        let memory = new()?;
        let file = memory.export_part(0, PIECE).map_err(|e| e.to_string())?;
        if first { drop((file, memory)) } else { drop((memory, file)) }
    }
    let after = context.free_memory().map_err(|e| e.to_string())?;
    if after + PIECE / 2 < before {
        return Err(format!("{before} bytes were free, now {after}"));
    }
    let name = name.display();
    Ok(format!(
        "{} bytes of pool are {name} of {size} bytes (fstat: {}); parts and refusals as they should be",
        pool.blocks() as usize * shape.block_bytes(),
        stat.st_size
    ))
}
