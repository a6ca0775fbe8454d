//! The memory through which rBlocks come home.
//!
//! A creditor never writes into a debtor's pool: each lane has [`LANDING_SLOTS`]
//! slots at the debtor that it may write, and as many at the creditor that it
//! writes from, so that what leaves was checked as a whole and stays as it was
//! checked. The debtor names the slot when it asks, looks at the header when it
//! is told that the slot is filled, and copies the bytes to where it wants them.

use std::sync::Arc;

use distkv_fabric::Memory;

use crate::codec::DecodeError;
use crate::kv::pool::KvPool;
use crate::kv::rblock::{BlockIndex, KvShape};

/// rBlocks of a lane that may be on their way home at once.
pub const LANDING_SLOTS: usize = 4;
/// Bytes before an rBlock's in its slot.
const HEADER: usize = 64;
const MAGIC: u64 = 0x646e_614c_7644_6b01;

/// One side's slots. In each a header, then the rBlock, layer after layer.
pub struct Landing {
    memory: Arc<Memory>,
    layers: usize,
    layer_bytes: usize,
}

impl Landing {
    /// Slots for rBlocks of `shape`.
    pub fn new(shape: &KvShape) -> distkv_fabric::Result<Self> {
        let (layers, layer_bytes) = (shape.layers as usize, shape.layer_bytes());
        let memory = Memory::new(LANDING_SLOTS * (HEADER + layers * layer_bytes).next_multiple_of(4096))?;
        Ok(Self { memory, layers, layer_bytes })
    }

    /// The memory, to register.
    pub fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// Bytes that travel for an rBlock.
    pub fn bytes(&self) -> usize {
        HEADER + self.layers * self.layer_bytes
    }

    /// Offset of a slot.
    pub fn offset(&self, slot: u8) -> usize {
        slot as usize * self.bytes().next_multiple_of(4096)
    }

    /// Fills a slot with `block` of `pool`, under `ticket`.
    pub fn fill(&mut self, slot: u8, ticket: u64, pool: &KvPool, block: BlockIndex) -> distkv_fabric::Result<()> {
        let at = self.offset(slot);
        let mut header = [0; HEADER];
        header[..8].copy_from_slice(&MAGIC.to_le_bytes());
        header[8..16].copy_from_slice(&ticket.to_le_bytes());
        self.memory.write(at, &header)?;
        for layer in 0..self.layers {
            let to = at + HEADER + layer * self.layer_bytes;
            pool.copy_layer_to(layer, block, &self.memory, to)?;
        }
        Ok(())
    }

    /// The ticket under which a slot was filled.
    pub fn ticket(&self, slot: u8) -> crate::codec::Result<u64> {
        let mut header = [0; 16];
        let nowhere = DecodeError::Invalid("a landing slot that does not exist");
        self.memory.read(self.offset(slot), &mut header).map_err(|_| nowhere)?;
        let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| header[at + i]));
        match word(0) == MAGIC {
            true => Ok(word(8)),
            false => Err(DecodeError::Invalid("not a landing header")),
        }
    }

    /// Copies what lies in a slot to `block` of `pool`.
    pub fn copy_to(&self, slot: u8, pool: &KvPool, block: BlockIndex) -> distkv_fabric::Result<()> {
        let at = self.offset(slot) + HEADER;
        for layer in 0..self.layers {
            let from = at + layer * self.layer_bytes;
            pool.copy_layer_from(layer, block, &self.memory, from)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::rblock::KvDtype;

    #[test]
    fn a_block_travels_through_a_slot_whole_and_under_its_ticket() {
        let shape = KvShape { layers: 3, kv_heads: 2, head_dim: 8, block_tokens: 16, dtype: KvDtype::Bf16 };
        let (from, to) = (KvPool::new(shape, 5).unwrap(), KvPool::new(shape, 7).unwrap());
        let bytes = |pool: &KvPool, block: u32| -> Vec<u8> {
            let mut all = vec![0; 3 * shape.layer_bytes()];
            for (layer, part) in all.chunks_exact_mut(shape.layer_bytes()).enumerate() {
                pool.memory().read(pool.offset(layer, block), part).unwrap();
            }
            all
        };
        for layer in 0..3 {
            let values: Vec<u8> = (0..shape.layer_bytes()).map(|i| (i * 7 + layer) as u8).collect();
            from.memory().write(from.offset(layer, 4), &values).unwrap();
        }
        let mut landing = Landing::new(&shape).unwrap();
        assert!(landing.ticket(1).is_err(), "nothing was put there");
        landing.fill(3, 99, &from, 4).unwrap();
        assert_eq!(landing.ticket(3), Ok(99));
        landing.copy_to(3, &to, 6).unwrap();
        assert_eq!(bytes(&to, 6), bytes(&from, 4));
        assert_eq!(bytes(&to, 5), vec![0; 3 * shape.layer_bytes()]);
        assert!(landing.ticket(4).is_err());
    }
}
