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
        let (heads, head_dim) = (shape.heads, shape.head_dim);
        let count = rows.iter().map(ExactSizeIterator::len).sum::<usize>();
        assert!(remote_o.len() == count * shape.q_width() && remote_lse.len() == count * heads, "partials");
        if !head_dim.is_multiple_of(4) {
            return Err(DeviceError::Unsupported(format!(
                "CUDA: merging heads of {head_dim} elements; a multiple of 4"
            )));
        }
        // Where each begins.
        let lse_at = size_of_val(remote_o).next_multiple_of(16);
        let rows_at = lse_at + size_of_val(remote_lse).next_multiple_of(16);
        let end = rows_at + count * size_of::<u32>();
        self.staged = None;
        self.reserve(stream, end)?;
        self.uploaded.synchronize()?;
        let (device, host) = self.memory.as_mut().expect("reserved");
        let bytes = host.bytes_mut();
        bytes[..size_of_val(remote_o)].copy_from_slice(bytemuck::cast_slice(remote_o));
        bytes[lse_at..][..size_of_val(remote_lse)].copy_from_slice(bytemuck::cast_slice(remote_lse));
        let index: &mut [u32] = bytemuck::cast_slice_mut(&mut bytes[rows_at..end]);
        index.iter_mut().zip(rows.iter().cloned().flatten()).for_each(|(to, row)| *to = row);
        device.upload(stream, 0, host, 0..end)?;
        self.uploaded.record(stream)?;
        let arguments = api::Merge {
            remote_o: device.address(),
            remote_lse: device.address() + lse_at as u64,
            rows: device.address() + rows_at as u64,
            o: 0,
            lse: 0,
            count: count as u32,
            heads: heads as u32,
            head_dim: head_dim as u32,
            reserved: 0,
        };
        let rows = rows.iter().map(|r| r.end as usize).max().unwrap_or(0);
        self.staged = Some(Staged { arguments, rows });
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
