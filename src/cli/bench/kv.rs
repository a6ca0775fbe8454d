//! KV to measure with.

use crate::kv::pool::KvPool;
use crate::kv::rblock::KvDtype;

/// Most bytes of random values; a longer pool repeats them.
const CHUNK: usize = 64 << 20;

/// Fills a pool with values in −1 up to 1: zeros would be shared pages, and
/// flatter arithmetic.
pub fn fill(pool: &KvPool) -> anyhow::Result<()> {
    let dtype = pool.shape().dtype;
    let len = pool.shape().block_bytes() * pool.blocks() as usize;
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut chunk = Vec::with_capacity(len.min(CHUNK));
    while chunk.len() < len.min(CHUNK) {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let x = (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0;
        match dtype {
            KvDtype::Bf16 => chunk.extend(half::bf16::from_f32(x).to_le_bytes()),
            KvDtype::F16 => chunk.extend(half::f16::from_f32(x).to_le_bytes()),
            KvDtype::F32 => chunk.extend(x.to_le_bytes()),
            KvDtype::Fp8 => chunk.push(crate::e4m3::from_f32(x)),
        }
    }
    for offset in (0..len).step_by(chunk.len().max(1)) {
        pool.write(offset, &chunk[..chunk.len().min(len - offset)])?;
    }
    Ok(())
}
