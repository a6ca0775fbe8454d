//! What the GPU's memory gives in the same run, for benches.

#![allow(unsafe_code)]

use super::api;
use super::driver::{Event, Stream};
use super::kernels::{Grid, Kernels};
use super::memory::GpuMemory;
use crate::device::Result;

/// Bytes that are read: many times what caches hold.
const BYTES: usize = 4 << 30;
const RUNS: usize = 5;

/// Bytes a second that a kernel reads, the best of a few runs, of as much memory
/// as is free, up to 4 GiB.
pub fn read(stream: &Stream, kernels: &Kernels) -> Result<f64> {
    let context = stream.context();
    let bytes = (context.free_memory()? / 2).min(BYTES) / 16 * 16;
    let memory = GpuMemory::new(context, bytes, "measuring bandwidth")?;
    let sink = GpuMemory::new(context, 4, "measuring bandwidth")?;
    memory.fill(stream, 0x5a)?;
    let kernel = kernels.plain("read_sweep", 0)?;
    let arguments = api::ReadSweep {
        from: memory.address(),
        sink: sink.address(),
        pieces: (bytes / 16) as u64,
        impossible: 0x0bad_5eed,
        reserved: 0,
    };
    let blocks = 4 * context.properties().multiprocessors as usize;
    let marks = [Event::new(context, true)?, Event::new(context, true)?];
    let mut best = f32::INFINITY;
    for _ in 0..RUNS {
        marks[0].record(stream)?;
        // SAFETY: the memory holds the pieces; the sink a number.
        unsafe { kernel.launch(stream, Grid::new(blocks, 512), &arguments)? };
        marks[1].record(stream)?;
        marks[1].synchronize()?;
        best = best.min(marks[1].since(&marks[0])?);
    }
    Ok(bytes as f64 / (f64::from(best) / 1e3))
}
