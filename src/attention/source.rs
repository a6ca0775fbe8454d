//! Where rBlocks that go to creditors are written from: the pool itself, where
//! transports reach it; else a ring of host memory that each layer of a block is
//! copied to first.

use std::sync::Arc;

use distkv_fabric::Memory;

use crate::kv::pool::KvPool;
use crate::kv::rblock::BlockIndex;

/// Bytes of a ring, about.
const RING: usize = 64 << 20;
/// Layers of blocks that it holds at least.
const LEAST: usize = 16;

/// What is written from. Whoever writes registers [`memory`](Self::memory).
pub(super) struct Source {
    pool: Arc<KvPool>,
    ring: Option<Ring>,
}

struct Ring {
    memory: Arc<Memory>,
    slots: usize,
    /// Slots filled since the last release.
    used: usize,
}

impl Source {
    /// For rBlocks of `pool`.
    pub fn new(pool: &Arc<KvPool>) -> distkv_fabric::Result<Self> {
        let layer_bytes = pool.shape().layer_bytes();
        let ring = match pool.on_host() {
            Some(_) => None,
            None => {
                let slots = (RING / layer_bytes).max(LEAST);
                Some(Ring { memory: Memory::new(slots * layer_bytes)?, slots, used: 0 })
            }
        };
        Ok(Self { pool: pool.clone(), ring })
    }

    /// The memory that is written from.
    pub fn memory(&self) -> &Arc<Memory> {
        match &self.ring {
            Some(ring) => &ring.memory,
            None => self.pool.memory(),
        }
    }

    /// Where one layer of a block is to be written from; `None` where there is no
    /// room until what was written has left and [`release`](Self::release) was
    /// called.
    pub fn stage(&mut self, layer: usize, block: BlockIndex) -> distkv_fabric::Result<Option<u64>> {
        let Some(ring) = &mut self.ring else { return Ok(Some(self.pool.offset(layer, block) as u64)) };
        if ring.used == ring.slots {
            return Ok(None);
        }
        let at = ring.used * self.pool.shape().layer_bytes();
        self.pool.copy_layer_to(layer, block, &ring.memory, at)?;
        ring.used += 1;
        Ok(Some(at as u64))
    }

    /// Everything that was written has left: its room is free.
    pub fn release(&mut self) {
        if let Some(ring) = &mut self.ring {
            ring.used = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::kv::pool::DeviceMemory;
    use crate::kv::rblock::{KvDtype, KvShape};

    struct Elsewhere(Mutex<Vec<u8>>);

    impl DeviceMemory for Elsewhere {
        fn address(&self) -> u64 {
            64
        }

        fn len(&self) -> usize {
            self.0.lock().unwrap().len()
        }

        fn read(&self, offset: usize, to: &mut [u8]) -> Result<(), String> {
            to.copy_from_slice(&self.0.lock().unwrap()[offset..offset + to.len()]);
            Ok(())
        }

        fn write(&self, offset: usize, from: &[u8]) -> Result<(), String> {
            self.0.lock().unwrap()[offset..offset + from.len()].copy_from_slice(from);
            Ok(())
        }
    }

    #[test]
    fn a_ring_holds_what_was_staged_until_it_is_released() {
        let shape = KvShape { layers: 2, kv_heads: 1, head_dim: 1 << 16, block_tokens: 16, dtype: KvDtype::F32 };
        let bytes = (0..3 * shape.block_bytes()).map(|i| (i / shape.layer_bytes()) as u8 + 1).collect();
        let pool = Arc::new(KvPool::on_device(shape, Arc::new(Elsewhere(Mutex::new(bytes)))));
        assert_eq!(pool.blocks(), 3);
        let mut source = Source::new(&pool).unwrap();
        let staged: Vec<u64> = (0..LEAST).map(|i| source.stage(i % 2, (i % 3) as u32).unwrap().unwrap()).collect();
        assert_eq!(source.stage(0, 0).unwrap(), None, "full");
        for (i, at) in staged.into_iter().enumerate() {
            let mut byte = [0];
            source.memory().read(at as usize, &mut byte).unwrap();
            assert_eq!(byte[0] as usize, (i % 2) * 3 + i % 3 + 1, "layer {} of block {}", i % 2, i % 3);
        }
        source.release();
        assert_eq!(source.stage(1, 2).unwrap(), Some(0));
    }
}
