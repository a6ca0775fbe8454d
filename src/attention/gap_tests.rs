//! Rows in the middle of a sequence whose later tokens have KV already: what a
//! debtor that computes lost tokens again asks of itself and of its creditors.

use std::sync::Arc;

use crate::device::cpu::{CpuHolder, CpuOptions, reference};
use crate::device::{AttentionShape, AttnSeq, HolderKernel};
use crate::kv::pool::KvPool;
use crate::kv::rblock::{KvDtype, KvRun, KvShape};

fn noise(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

/// A plan names all blocks placed under a loan, in the order in which they were
/// placed. For rows in a gap some lie behind the row: kernels mask by position.
#[test]
fn blocks_behind_a_row_are_not_attended_to() {
    let shape = AttentionShape { heads: 4, kv_heads: 2, head_dim: 16, scale: 0.25 };
    let kv = KvShape { layers: 1, kv_heads: 2, head_dim: 16, block_tokens: 16, dtype: KvDtype::F32 };
    let pool = Arc::new(KvPool::new(kv, 8).unwrap());
    let mut values = noise(1 << 14, 3).into_iter().cycle();
    for block in 0..8 {
        for (v, head, token) in (0..64).map(|i| (i % 2 == 1, i / 2 % 2, i / 4)) {
            let row: Vec<f32> = values.by_ref().take(16).collect();
            reference::write_kv(&pool, 0, block, v, head, token, &row);
        }
    }
    // Placed: what lies behind the gap [16, 48) first, then the gap's first
    // block, whose row is being computed; last what lies before it.
    let run = |block, position| KvRun { block, position, tokens: 16 };
    let runs = [run(5, 48), run(2, 64), run(7, 96), run(0, 16), run(3, 0)];
    let mut holder = CpuHolder::new(CpuOptions { threads: 2, ..CpuOptions::default() }).unwrap();
    for (position, rows) in [(16, 1), (20, 5), (32, 16), (47, 1), (16, 40), (0, 3)] {
        for window in [None, Some(20)] {
            let q = noise(rows * shape.q_width(), u64::from(position) + 7);
            let (mut o, mut lse) = (vec![f32::NAN; q.len()], vec![f32::NAN; rows * shape.heads]);
            let seqs = [AttnSeq { row: 0, rows: rows as u32, position, run: 0, runs: runs.len() as u32 }];
            holder.micro_attention(&shape, window, 0, &pool, &q, &seqs, &runs, &mut o, &mut lse);
            for (i, (q, o)) in q.chunks(16).zip(o.chunks(16)).enumerate() {
                let (row, head) = (position + (i / shape.heads) as u32, i % shape.heads);
                let mut expected = [0.0; 16];
                let all =
                    reference::attention_head(q, shape.scale, row, window, 0, &pool, head / 2, &runs, &mut expected);
                let seen: Vec<KvRun> = runs.iter().filter(|r| r.position <= row).copied().collect();
                let mut of_seen = [0.0; 16];
                let same =
                    reference::attention_head(q, shape.scale, row, window, 0, &pool, head / 2, &seen, &mut of_seen);
                assert_eq!((all, expected), (same, of_seen));
                assert!((lse[i] - all).abs() < 1e-4 || lse[i] == all, "row {row}: {} for {all}", lse[i]);
                assert!(o.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-4), "row {row}");
            }
        }
    }
}
