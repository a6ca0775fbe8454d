//! Partials of peers: on their way to the GPU, and merged into its own.

#![allow(unsafe_code)]

use std::ops::Range;
use std::sync::Arc;

use super::api;
use super::buffer::Buffer;
use super::driver::{Context, Event, Stream};
use super::kernels::{Grid, Kernel, Kernels};
use super::memory::{GpuMemory, Pinned};
use crate::device::{AttentionShape, DeviceError, Result};

/// Warps of a block, each with a head of a row.
const WARPS: usize = 8;

/// What was put there last.
struct Staged {
    arguments: api::Merge,
    /// Rows that o and lse have, at least.
    rows: usize,
}

/// The kernel, and the memory that partials come through.
pub struct Partials {
    context: Arc<Context>,
    kernel: Kernel,
    memory: Option<(GpuMemory, Pinned)>,
    /// The host's memory may be written again.
    uploaded: Event,
    staged: Option<Staged>,
}

impl Partials {
    /// With no memory yet.
    pub fn new(context: &Arc<Context>, kernels: &Kernels) -> Result<Self> {
        Ok(Self {
            context: context.clone(),
            kernel: kernels.typed("merge", 0)?,
            memory: None,
            uploaded: Event::new(context, false)?,
            staged: None,
        })
    }

    /// Puts partials of `rows`, `[Σ rows, heads · head_dim]` and `[Σ rows, heads]`, on
    /// their way behind what the stream was given. Waits for nothing but the upload of
    /// those before.
    pub fn stage(
        &mut self,
        stream: &Stream,
        shape: &AttentionShape,
        rows: &[Range<u32>],
        remote_o: &[f32],
        remote_lse: &[f32],
    ) -> Result<()> {
        let index: Vec<u32> = rows.iter().flat_map(|r| r.clone()).collect();
        let (heads, head_dim, count) = (shape.heads, shape.head_dim, index.len());
        assert!(remote_o.len() == count * shape.q_width() && remote_lse.len() == count * heads, "partials");
        if !head_dim.is_multiple_of(4) {
            return Err(DeviceError::Unsupported(format!(
                "CUDA: merging heads of {head_dim} elements; a multiple of 4"
            )));
        }
        let parts: [&[u8]; 3] =
            [bytemuck::cast_slice(remote_o), bytemuck::cast_slice(remote_lse), bytemuck::cast_slice(&index)];
        self.staged = None;
        self.reserve(stream, parts.iter().map(|p| p.len().next_multiple_of(16)).sum())?;
        self.uploaded.synchronize()?;
        let (device, host) = self.memory.as_mut().expect("reserved");
        let mut addresses = [0; 3];
        let mut end = 0;
        for (address, part) in addresses.iter_mut().zip(parts) {
            *address = device.address() + end as u64;
            host.bytes_mut()[end..end + part.len()].copy_from_slice(part);
            end += part.len().next_multiple_of(16);
        }
        device.upload(stream, 0, host, 0..end)?;
        self.uploaded.record(stream)?;
        let arguments = api::Merge {
            remote_o: addresses[0],
            remote_lse: addresses[1],
            rows: addresses[2],
            o: 0,
            lse: 0,
            count: count as u32,
            heads: heads as u32,
            head_dim: head_dim as u32,
            reserved: 0,
        };
        self.staged = Some(Staged { arguments, rows: index.iter().max().map_or(0, |&row| row as usize + 1) });
        Ok(())
    }

    /// Merges what was staged last into `o` and `lse`.
    pub fn merge(&self, stream: &Stream, o: &Buffer, lse: &Buffer) -> Result<()> {
        let Some(Staged { arguments, rows }) = &self.staged else {
            return Err(DeviceError::System("a merge before partials came".into()));
        };
        let (heads, width) = (arguments.heads as usize, (arguments.heads * arguments.head_dim) as usize);
        assert!(!o.is_single() && o.cols() == width && lse.is_single() && lse.cols() == heads, "o and lse");
        assert!(*rows <= o.rows().min(lse.rows()), "rows of partials");
        if arguments.count == 0 {
            return Ok(());
        }
        // As many as there may be at once.
        let most = 2048 / (32 * WARPS) * self.context.properties().multiprocessors as usize;
        let blocks = (arguments.count as usize * heads).div_ceil(WARPS).min(most);
        let arguments = api::Merge { o: o.address(), lse: lse.address(), ..*arguments };
        // (Behind a copy there is nothing to overlap with.)
        // SAFETY: the partials are on their way in this stream, and the rows lie in
        // the buffers.
        unsafe { self.kernel.launch(stream, Grid::new(blocks, 32 * WARPS as u32), &arguments) }
    }

    fn reserve(&mut self, stream: &Stream, bytes: usize) -> Result<()> {
        if self.memory.as_ref().is_none_or(|(device, _)| device.len() < bytes) {
            stream.synchronize()?; // for those that may still be merged
            self.memory = None;
            let bytes = bytes.next_power_of_two();
            let what = "partials of peers";
            self.memory = Some((GpuMemory::new(&self.context, bytes, what)?, Pinned::new(&self.context, bytes)?));
        }
        Ok(())
    }
}
