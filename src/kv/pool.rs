//! The pool: an instance's KV memory, cut into physical rBlocks.

use std::sync::Arc;

use distkv_fabric::Memory;

use super::rblock::{BlockIndex, KvShape};
use super::table::RBlockTable;

/// KV memory of one instance (one tier): the bytes, their shape and the table
/// that says who holds which block.
pub struct KvPool {
    shape: KvShape,
    blocks: u32,
    memory: Arc<Memory>,
    table: RBlockTable,
}

impl KvPool {
    /// Allocates `blocks` rBlocks of `shape`, all free.
    pub fn new(shape: KvShape, blocks: u32) -> distkv_fabric::Result<Self> {
        let memory = Memory::new(shape.block_bytes() * blocks as usize)?;
        Ok(Self { shape, blocks, memory, table: RBlockTable::new(blocks) })
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

    /// The memory, to register with a transport: `[layers, blocks, 2, kv_heads,
    /// block_tokens, head_dim]`.
    pub fn memory(&self) -> &Arc<Memory> {
        &self.memory
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
