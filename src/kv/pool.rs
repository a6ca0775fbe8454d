//! The pool: an instance's KV memory, cut into physical rBlocks.

use std::sync::Arc;

use distkv_fabric::GpuRange;
use distkv_fabric::Memory;

use super::rblock::{BlockIndex, KvShape};
use super::table::RBlockTable;

/// KV memory of an accelerator, which the host reaches by copies only. A copy
/// comes after everything that the device was given before it, and is done when
/// it returns; an error says why the device refused.
pub trait DeviceMemory: Send + Sync {
    /// Where it begins, in the device's address space.
    fn address(&self) -> u64;
    /// Bytes.
    fn len(&self) -> usize;
    /// No bytes at all.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// As what a NIC may be given, which then reaches it without the host; `None`
    /// where no NIC could.
    fn for_nic(self: Arc<Self>) -> Option<Arc<dyn GpuRange>> {
        None
    }
    /// Copies from `offset` to the host.
    fn read(&self, offset: usize, to: &mut [u8]) -> Result<(), String>;
    /// Copies to `offset` from the host.
    fn write(&self, offset: usize, from: &[u8]) -> Result<(), String>;
}

enum Store {
    Host(Arc<Memory>),
    Device(Arc<dyn DeviceMemory>),
}

/// KV memory of one instance (one tier): the bytes, their shape and the table
/// that says who holds which block.
pub struct KvPool {
    shape: KvShape,
    blocks: u32,
    store: Store,
    table: RBlockTable,
}

impl KvPool {
    /// Allocates `blocks` rBlocks of `shape`, all free.
    pub fn new(shape: KvShape, blocks: u32) -> distkv_fabric::Result<Self> {
        Ok(Self::within(shape, blocks, Memory::new(shape.block_bytes() * blocks as usize)?))
    }

    /// `blocks` rBlocks of `shape` in memory that is there already, all free.
    ///
    /// # Panics
    ///
    /// Where they have no room in it.
    pub fn within(shape: KvShape, blocks: u32, memory: Arc<Memory>) -> Self {
        assert!(shape.block_bytes() * blocks as usize <= memory.len(), "a pool larger than its memory");
        Self { shape, blocks, store: Store::Host(memory), table: RBlockTable::new(blocks) }
    }

    /// As many rBlocks of `shape` as `memory` holds, all free.
    pub fn on_device(shape: KvShape, memory: Arc<dyn DeviceMemory>) -> Self {
        let blocks = u32::try_from(memory.len() / shape.block_bytes()).unwrap_or(u32::MAX);
        Self { shape, blocks, store: Store::Device(memory), table: RBlockTable::new(blocks) }
    }

    /// The model's KV shape.
    pub fn shape(&self) -> &KvShape {
        &self.shape
    }

    /// Physical blocks.
    pub fn blocks(&self) -> u32 {
        self.blocks
    }

    /// Who holds which block.
    pub fn table(&self) -> &RBlockTable {
        &self.table
    }

    /// The memory of a pool in host memory, to register with a transport and to
    /// compute on: `[layers, blocks, 2, kv_heads, block_tokens, head_dim]`.
    ///
    /// # Panics
    ///
    /// Where the pool lies on a device: see [`on_host`](Self::on_host).
    pub fn memory(&self) -> &Arc<Memory> {
        self.on_host().expect("only the host's kernels and lanes of a pool on the host ask for its bytes")
    }

    /// The memory, where it is the host's.
    pub fn on_host(&self) -> Option<&Arc<Memory>> {
        match &self.store {
            Store::Host(memory) => Some(memory),
            Store::Device(_) => None,
        }
    }

    /// Where the pool begins in its device's memory, of the same layout, where it
    /// lies on one.
    pub fn device_address(&self) -> Option<u64> {
        self.on_accelerator().map(|memory| memory.address())
    }

    /// The memory, where it is a device's.
    pub fn on_accelerator(&self) -> Option<&Arc<dyn DeviceMemory>> {
        match &self.store {
            Store::Host(_) => None,
            Store::Device(memory) => Some(memory),
        }
    }

    /// Writes `bytes` at `offset` of the pool, wherever it lies.
    pub fn write(&self, offset: usize, bytes: &[u8]) -> distkv_fabric::Result<()> {
        match &self.store {
            Store::Host(memory) => memory.write(offset, bytes),
            Store::Device(memory) => memory.write(offset, bytes).map_err(distkv_fabric::Error::Device),
        }
    }

    /// Copies one layer of a block to `at` of `to`.
    pub fn copy_layer_to(&self, layer: usize, block: BlockIndex, to: &Memory, at: usize) -> distkv_fabric::Result<()> {
        let (offset, len) = (self.offset(layer, block), self.shape.layer_bytes());
        match &self.store {
            Store::Host(memory) => memory.copy_to(offset, to, at, len),
            Store::Device(memory) => {
                let mut bytes = vec![0; len];
                memory.read(offset, &mut bytes).map_err(distkv_fabric::Error::Device)?;
                to.write(at, &bytes)
            }
        }
    }

    /// Copies one layer of a block from `at` of `from`.
    pub fn copy_layer_from(
        &self,
        layer: usize,
        block: BlockIndex,
        from: &Memory,
        at: usize,
    ) -> distkv_fabric::Result<()> {
        let (offset, len) = (self.offset(layer, block), self.shape.layer_bytes());
        match &self.store {
            Store::Host(memory) => from.copy_to(at, memory, offset, len),
            Store::Device(memory) => {
                let mut bytes = vec![0; len];
                from.read(at, &mut bytes)?;
                memory.write(offset, &bytes).map_err(distkv_fabric::Error::Device)
            }
        }
    }

    /// Bytes from one layer's pool to the next.
    pub fn layer_stride(&self) -> usize {
        self.shape.layer_bytes() * self.blocks as usize
    }

    /// Byte offset of one layer of a block; its K heads come first, then its V
    /// heads.
    pub fn offset(&self, layer: usize, block: BlockIndex) -> usize {
        debug_assert!(block < self.blocks && layer < self.shape.layers as usize);
        layer * self.layer_stride() + block as usize * self.shape.layer_bytes()
    }
}
