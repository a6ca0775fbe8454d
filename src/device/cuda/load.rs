//! Weights on their way to the GPU: raw bytes through page-locked memory, and a
//! kernel that turns them into the working precision there.

#![allow(unsafe_code)]

use std::sync::Arc;

use super::api;
use super::driver::{Context, Event, Stream};
use super::kernels::{Grid, Kernels};
use super::memory::{GpuMemory, Pinned};
use crate::device::tensor::{DType, RawTensor};
use crate::device::{DeviceError, Result};

/// Bytes that go at once; a multiple of what every format stores together.
const PIECE: usize = 32 << 20;
/// Pieces under way at once.
const PIECES: usize = 3;
/// Threads that copy from a file's pages.
const COPIERS: usize = 8;
/// Elements that a block of the kernel converts at a time.
const TILE: usize = 2048;

struct Piece {
    host: Pinned,
    device: GpuMemory,
    /// The device has done with both.
    free: Event,
}

/// What loading needs; dropped when the weights are there.
pub struct Loader {
    pieces: Vec<Piece>,
    next: usize,
}

impl Loader {
    /// Allocates its buffers.
    pub fn new(context: &Arc<Context>) -> Result<Self> {
        let piece = || {
            Ok(Piece {
                host: Pinned::new(context, PIECE)?,
                device: GpuMemory::new(context, PIECE, "loading weights")?,
                free: Event::new(context, false)?,
            })
        };
        Ok(Self { pieces: (0..PIECES).map(|_| piece()).collect::<Result<_>>()?, next: 0 })
    }

    /// Writes the elements of `tensor` to `out` at element `at`, as `to` (`f32`,
    /// `f16` or `bf16`, of `size` bytes), behind what the stream was given.
    pub fn load(
        &mut self,
        stream: &Stream,
        kernels: &Kernels,
        tensor: &RawTensor<'_>,
        to: &str,
        size: usize,
        out: &GpuMemory,
        at: usize,
    ) -> Result<()> {
        let elements = tensor.rows * tensor.cols;
        let dtype = tensor.dtype;
        if dtype.bytes(tensor.cols).map(|row| row * tensor.rows) != Some(tensor.bytes.len()) {
            return Err(DeviceError::Unsupported(format!(
                "a tensor [{}, {}] of {dtype} in {} bytes",
                tensor.rows,
                tensor.cols,
                tensor.bytes.len()
            )));
        }
        assert!((at + elements) * size <= out.len(), "a tensor beyond its matrix");
        let kernel = kernels.plain(&format!("convert_{}_{to}", name(dtype)), 0)?;
        let step = PIECE / dtype.block_bytes() * dtype.block_len();
        for first in (0..elements).step_by(step) {
            let count = step.min(elements - first);
            let bytes = |elements: usize| elements / dtype.block_len() * dtype.block_bytes();
            let from = &tensor.bytes[bytes(first)..bytes(first + count)];
            let piece = &mut self.pieces[self.next];
            self.next = (self.next + 1) % PIECES;
            piece.free.synchronize()?;
            copy(from, piece.host.bytes_mut());
            piece.device.upload(stream, 0, &piece.host, 0..from.len())?;
            let arguments = api::Convert {
                bytes: piece.device.address(),
                out: out.address() + ((at + first) * size) as u64,
                offset: 0,
                elements: count as u64,
            };
            let grid = Grid::new(count.div_ceil(TILE).min(1 << 20), 256);
            // SAFETY: the piece holds the bytes of `count` elements, and `out` has
            // room for them, as checked above.
            unsafe { kernel.launch(stream, grid, &arguments)? };
            piece.free.record(stream)?;
        }
        Ok(())
    }
}

fn name(dtype: DType) -> &'static str {
    match dtype {
        DType::F32 => "f32",
        DType::F16 => "f16",
        DType::Bf16 => "bf16",
        DType::Q8_0 => "q8_0",
        DType::Q4_0 => "q4_0",
        DType::Q4_1 => "q4_1",
        DType::Q4K => "q4_k",
        DType::Q6K => "q6_k",
    }
}

/// Copies with several threads: one alone does not keep up with the bus, nor do
/// its page faults with the disk.
fn copy(from: &[u8], to: &mut [u8]) {
    let part = from.len().div_ceil(COPIERS).max(1 << 20);
    std::thread::scope(|scope| {
        for (from, to) in from.chunks(part).zip(to.chunks_mut(part)) {
            scope.spawn(|| to[..from.len()].copy_from_slice(from));
        }
    });
}
