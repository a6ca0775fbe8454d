//! FP8 keys and values on their way into Hopper's prefill kernel, which multiplies
//! what lies in shared memory as it is: a layer's pages are widened first, into
//! memory that all layers use in turn.

#![allow(unsafe_code)]

use std::sync::Arc;

use super::api;
use super::driver::{Context, Properties, Stream};
use super::kernels::{Grid, Kernel, Kernels, TensorMap};
use super::memory::GpuMemory;
use super::step::{Addresses, Taken};
use crate::device::{AttentionShape, Result};
use crate::kv::rblock::{KvDtype, KvShape};

/// Bytes that pages are widened into; of more context the keys are widened by the
/// products themselves, which takes longer.
pub const ROOM: usize = 256 << 20;
/// Pages of one sequence that are widened at once.
const AT_ONCE: usize = 1024;

/// Room for widened pages, and the kernels that fill and read it.
pub struct Widened {
    widen: Kernel,
    /// The prefill kernel of the device's own element.
    pub prefill: Kernel,
    /// The room, as the copy engine sees it.
    pub map: TensorMap,
    memory: GpuMemory,
    pages: usize,
}

impl Widened {
    /// Whether pools of this element are widened for prefill on such a GPU.
    pub fn is_needed(gpu: &Properties, kv: KvDtype) -> bool {
        gpu.capability == (9, 0) && kv == KvDtype::Fp8
    }

    /// For pools of this shape; `map` makes the tensor map of so many blocks at an
    /// address. Elements widened have two bytes.
    pub fn new(
        context: &Arc<Context>,
        kernels: &Kernels,
        prefill: Kernel,
        kv: &KvShape,
        map: impl FnOnce(u64, u64) -> Result<TensorMap>,
    ) -> Result<Self> {
        let block = 2 * kv.layer_bytes();
        let pages = ROOM / block;
        let memory = GpuMemory::new(context, pages * block, "widened keys and values")?;
        let map = map(memory.address(), pages as u64)?;
        Ok(Self { widen: kernels.typed("widen_pages", 0)?, prefill, map, memory, pages })
    }

    /// Whether there is room for all pages of the step's longer sequences.
    pub fn holds(&self, taken: &Taken) -> bool {
        taken.long_pages.1 - taken.long_pages.0 <= self.pages
    }

    /// Where widened pages begin.
    pub fn address(&self) -> u64 {
        self.memory.address()
    }

    /// Widens a layer's pages, of the pool at `kv`.
    pub fn run(
        &self,
        stream: &Stream,
        at: &Addresses,
        taken: &Taken,
        shape: &AttentionShape,
        kv_shape: &KvShape,
        kv: u64,
    ) -> Result<()> {
        let (first, end) = taken.long_pages;
        let arguments = api::WidenPages {
            kv,
            out: self.memory.address(),
            seqs: at.seqs,
            pages: at.pages,
            first: first as u32,
            group: (shape.heads / shape.kv_heads) as u32,
            block_elements: kv_shape.layer_bytes() as u32,
            reserved: 0,
        };
        let grid =
            Grid { blocks: ((end - first).clamp(1, AT_ONCE) as u32, taken.seqs as u32, 1), threads: 256, cluster: 1 };
        // SAFETY: the step's pages lie in the pool, which was checked when it was
        // taken in, and `holds` said that there is room.
        unsafe { self.widen.launch(stream, grid, &arguments) }
    }
}
