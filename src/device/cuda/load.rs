//! Weights on their way to the GPU: raw bytes through page-locked memory, and a
//! kernel that turns them into the working precision there.

#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cudarc::driver::result;

use super::api;
use super::driver::{Context, Event, Stream, failed};
use super::kernels::{Grid, Kernel, Kernels};
use super::memory::{GpuMemory, Pinned};
use crate::device::disk::{How, Reader, Room};
use crate::device::tensor::{DType, RawTensor};
use crate::device::{DeviceError, Result};

/// Page-locked memory that is read into, and as much of the GPU's.
const ROOM: usize = 128 << 20;
/// Bytes that go at once, at most. A few are on the bus or being converted while
/// the rest of the room is being read.
const PIECE: usize = 16 << 20;
/// Elements that a block of the kernel converts at a time.
const TILE: usize = 2048;

/// Page-locked memory as a reader takes it.
struct Staging {
    _memory: Pinned,
    pointer: *mut u8,
    size: usize,
}

// SAFETY: it owns its memory.
unsafe impl Send for Staging {}

// SAFETY: page-locked memory stays where it is, begins on a page, and is nobody
// else's.
unsafe impl Room for Staging {
    fn pointer(&self) -> *mut u8 {
        self.pointer
    }

    fn size(&self) -> usize {
        self.size
    }
}

/// What becomes of a piece on the GPU.
struct Conversion {
    kernel: Kernel,
    /// Held until the kernel has been launched, whatever becomes of the weights.
    out: Arc<GpuMemory>,
    /// Elements of `out` before the piece's, each of so many bytes.
    at: usize,
    size: usize,
    elements: usize,
    /// The piece is FP8, to be packed.
    packed: Option<Packed>,
}

/// What packing FP8 needs.
#[derive(Clone, Copy)]
struct Packed {
    /// Elements of a row.
    ins: usize,
    /// Where a code that is no number is told.
    flag: u64,
}

/// Brings weights to the GPU, in order: what it was given to [`load`](Self::load)
/// is read, copied and converted in the background, and there after
/// [`finish`](Self::finish).
pub struct Loader {
    reader: Reader<Staging>,
    device: GpuMemory,
    /// Of the pieces that are being read, oldest first.
    waiting: VecDeque<Conversion>,
    /// Set when the GPU has done with a piece: of those that were read.
    busy: VecDeque<Event>,
    spare: Vec<Event>,
    began: Instant,
    /// Time spent waiting for reads, and for the GPU.
    waited: (Duration, Duration),
    /// Types between which something is lost, from and to.
    rounded: Option<(DType, &'static str)>,
}

impl Loader {
    /// Allocates its buffers.
    pub fn new(context: &Arc<Context>) -> Result<Self> {
        let mut memory = Pinned::new(context, ROOM)?;
        let pointer = memory.bytes_mut().as_mut_ptr();
        let staging = Staging { _memory: memory, pointer, size: ROOM };
        let reader = Reader::new(staging, How::default())
            .map_err(|e| DeviceError::System(format!("starting threads that read weights: {e}")))?;
        Ok(Self {
            reader,
            device: GpuMemory::new(context, ROOM, "loading weights")?,
            waiting: VecDeque::new(),
            busy: VecDeque::new(),
            spare: Vec::new(),
            began: Instant::now(),
            waited: Default::default(),
            rounded: None,
        })
    }

    /// Begins to write the elements of `tensor` to `out` at element `at`, as `to`
    /// (`f32`, `f16` or `bf16`, of `size` bytes), behind what the stream was given.
    /// An error may be of a tensor before.
    pub fn load(
        &mut self,
        stream: &Stream,
        kernels: &Kernels,
        tensor: &RawTensor<'_>,
        to: &str,
        size: usize,
        out: &Arc<GpuMemory>,
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
        self.rounded = self.rounded.or(loses(dtype, to));
        let kernel = kernels.plain(&format!("convert_{}_{to}", name(dtype)), 0)?;
        self.send(stream, tensor, |first, elements| Conversion {
            kernel,
            out: out.clone(),
            at: at + first,
            size,
            elements,
            packed: None,
        })
    }

    /// Begins to pack the codes of an FP8 tensor into `out`, behind the `at` elements
    /// of the parts before it, with the kernel `pack_fp8`; a code that is no number
    /// sets the u32 at `flag`. Otherwise as [`load`](Self::load).
    pub fn load_fp8(
        &mut self,
        stream: &Stream,
        kernel: Kernel,
        tensor: &RawTensor<'_>,
        out: &Arc<GpuMemory>,
        at: usize,
        flag: u64,
    ) -> Result<()> {
        let elements = tensor.rows * tensor.cols;
        if elements != tensor.bytes.len() || tensor.dtype != DType::F8E4m3 {
            let problem = format!("FP8 codes [{}, {}] in {} bytes", tensor.rows, tensor.cols, tensor.bytes.len());
            return Err(DeviceError::Unsupported(problem));
        }
        assert!(at + elements <= out.len(), "a tensor beyond its matrix");
        let packed = Some(Packed { ins: tensor.cols, flag });
        self.send(stream, tensor, |first, elements| Conversion {
            kernel,
            out: out.clone(),
            at: at + first,
            size: 1,
            elements,
            packed,
        })
    }

    /// Begins to read a tensor, in pieces; what becomes of one is told by its first
    /// element and how many it has.
    fn send(
        &mut self,
        stream: &Stream,
        tensor: &RawTensor<'_>,
        conversion: impl Fn(usize, usize) -> Conversion,
    ) -> Result<()> {
        let (elements, dtype) = (tensor.rows * tensor.cols, tensor.dtype);
        // Whole tiles, so that a piece's elements begin as well aligned as the first.
        let step = PIECE / dtype.block_bytes() * dtype.block_len() / TILE * TILE;
        for first in (0..elements).step_by(step) {
            let count = step.min(elements - first);
            let bytes = |elements: usize| elements / dtype.block_len() * dtype.block_bytes();
            let range = bytes(first)..bytes(first + count);
            while !self.begin(tensor, range.clone())? {
                self.make_room(stream)?;
            }
            self.waiting.push_back(conversion(first, count));
            while self.launch(stream, false)? {}
        }
        Ok(())
    }

    /// Something is on its way that was not given to the stream yet.
    pub fn is_busy(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Gives the stream all that is on its way.
    pub fn settle(&mut self, stream: &Stream) -> Result<()> {
        while self.launch(stream, true)? {}
        Ok(())
    }

    /// Waits until all weights are on the GPU, and says how they came.
    pub fn finish(mut self, stream: &Stream) -> Result<()> {
        self.settle(stream)?;
        stream.synchronize()?;
        let seconds = self.began.elapsed().as_secs_f64();
        let (sums, gb) = (self.reader.sums(), |bytes: u64| format!("{:.3} GB", bytes as f64 / 1e9));
        tracing::info!(
            "weights: {} in {seconds:.3} s, {:.2} GB/s: {} directly from the disk, {} out of the page cache, {} through \
             it; waited {:.3} s for reads, {:.3} s for the GPU",
            gb(sums.total()),
            sums.total() as f64 / 1e9 / seconds,
            gb(sums.direct),
            gb(sums.cached),
            gb(sums.through),
            self.waited.0.as_secs_f64(),
            self.waited.1.as_secs_f64()
        );
        if let Some((from, to)) = self.rounded {
            tracing::info!("weights of {from} were converted to {to}, as the KV is: --kv-dtype {from} keeps them");
        }
        Ok(())
    }

    fn begin(&mut self, tensor: &RawTensor<'_>, range: std::ops::Range<usize>) -> Result<bool> {
        match tensor.stored {
            Some(mut stored) => {
                stored.offset += range.start as u64;
                self.reader.begin(stored, range.len()).map_err(DeviceError::System)
            }
            None => Ok(self.reader.copy(&tensor.bytes[range])),
        }
    }

    /// Gives the stream the next piece, once it has been read; false where there is
    /// none, or, without `wait`, where it is not here yet.
    fn launch(&mut self, stream: &Stream, wait: bool) -> Result<bool> {
        let waiting = Instant::now();
        let piece = self.reader.next(wait).map_err(DeviceError::System)?;
        if wait {
            self.waited.0 += waiting.elapsed();
        }
        let Some(piece) = piece else { return Ok(false) };
        let Some(conversion) = self.waiting.pop_front() else { unreachable!("one for each piece") };
        // On the GPU it begins where the kernel reads whole words, in the piece's own
        // part of the memory.
        let (at, bytes) = (piece.start / 256 * 256, self.reader.bytes(&piece));
        let from = self.device.address() + at as u64;
        // SAFETY: both ranges are inside their memory, of which the part is this
        // piece's until its event has come by (`make_room`, `drop`).
        unsafe { result::memcpy_htod_async(from, bytes, stream.raw()) }.map_err(|e| failed("a copy to the GPU", e))?;
        let Conversion { kernel, out, at, size, elements, packed } = conversion;
        let grid = Grid::new(elements.div_ceil(TILE).min(1 << 20), 256);
        match packed {
            None => {
                let out = out.address() + (at * size) as u64;
                let arguments = api::Convert { bytes: from, out, offset: 0, elements: elements as u64 };
                // SAFETY: the copy holds the bytes of so many elements, and `out` has
                // room for them, as checked in `load`.
                unsafe { kernel.launch(stream, grid, &arguments)? };
            }
            Some(Packed { ins, flag }) => {
                let arguments = api::PackFp8 {
                    codes: from,
                    weights: out.address(),
                    flag,
                    first: at as u64,
                    elements: elements as u64,
                    in_features: ins as u32,
                    reserved: 0,
                };
                // SAFETY: the copy holds so many codes, and `out` has room for those of
                // all parts, as checked in `load_fp8`.
                unsafe { kernel.launch(stream, grid, &arguments)? };
            }
        }
        let event = match self.spare.pop() {
            Some(event) => event,
            None => Event::new(stream.context(), false)?,
        };
        event.record(stream)?;
        self.busy.push_back(event);
        Ok(true)
    }

    /// Gives the oldest piece's place back, when the GPU has done with it; before
    /// that, if none is there, reads one to its end.
    fn make_room(&mut self, stream: &Stream) -> Result<()> {
        if self.busy.is_empty() {
            return self.launch(stream, true).map(drop);
        }
        let waiting = Instant::now();
        if let Some(event) = self.busy.pop_front() {
            event.synchronize()?;
            self.reader.give_back();
            self.spare.push(event);
        }
        self.waited.1 += waiting.elapsed();
        Ok(())
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        // The GPU reads from the memory until then. An error was or will be somebody's
        // who waits for the stream.
        self.busy.iter().for_each(|event| drop(event.synchronize()));
    }
}

/// A conversion between the types of 16 bits: from f16 to bf16 bits are lost, the
/// other way what is over 65504 or very small.
fn loses(from: DType, to: &str) -> Option<(DType, &'static str)> {
    match (from, to) {
        (DType::F16, "bf16") => Some((from, "bf16")),
        (DType::Bf16, "f16") => Some((from, "f16")),
        _ => None,
    }
}

fn name(dtype: DType) -> &'static str {
    match dtype {
        DType::F32 => "f32",
        DType::F16 => "f16",
        DType::Bf16 => "bf16",
        DType::F8E4m3 => "f8_e4m3",
        DType::Q8_0 => "q8_0",
        DType::Q4_0 => "q4_0",
        DType::Q4_1 => "q4_1",
        DType::Q4K => "q4_k",
        DType::Q6K => "q6_k",
    }
}
