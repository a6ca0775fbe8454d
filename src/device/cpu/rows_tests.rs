//! Row kernels against the plain ones, through the device.

use proptest::prelude::*;

use super::product_tests::noise;
use super::simd::tests::isas;
use super::*;
use crate::device::RowSlot;
use crate::kv::rblock::{KvDtype, KvShape};

fn device(isa: Isa, threads: usize) -> CpuDevice {
    CpuDevice::new(CpuOptions { threads, pin: false, math: Math::Exact, max_rows: 64, isa: Some(isa) }).unwrap()
}

fn filled(device: &mut CpuDevice, rows: usize, cols: usize, seed: u64) -> Buffer {
    let mut buffer = device.buffer(rows, cols).unwrap();
    buffer.as_mut_slice().copy_from_slice(&noise(seed, rows * cols));
    buffer
}

fn poisoned(device: &mut CpuDevice, rows: usize, cols: usize) -> Buffer {
    let mut buffer = device.buffer(rows, cols).unwrap();
    buffer.as_mut_slice().fill(f32::NAN);
    buffer
}

fn close(got: &[f32], want: &[f32], room: f32) {
    assert_eq!(got.len(), want.len());
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!((g - w).abs() <= room * (1.0 + w.abs()), "element {i} is {g}, not {w}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(40) })]

    #[test]
    fn norm_and_swiglu(rows in 1usize..41, cols in 1usize..700, threads in 1usize..4, seed in 0u64..1 << 40) {
        for isa in isas() {
            let mut device = device(isa, threads);
            let x = filled(&mut device, rows, cols, seed);
            let weight = Vector::new(noise(seed + 1, cols));
            let mut out = poisoned(&mut device, rows, cols);
            device.rms_norm(&x, rows, Norm { weight: &weight, eps: 1e-5 }, &mut out);
            let mut gate_up = filled(&mut device, rows, 2 * cols, seed + 2);
            gate_up.as_mut_slice().iter_mut().for_each(|x| *x *= 90.0);
            let mut product = poisoned(&mut device, rows, cols);
            device.swiglu(&gate_up, rows, &mut product);
            for r in 0..rows {
                let mut want = vec![0.0; cols];
                reference::rms_norm(x.row(r), weight.as_slice(), 1e-5, &mut want);
                close(out.row(r), &want, 2e-6);
                reference::swiglu(gate_up.row(r), &mut want);
                close(product.row(r), &want, 2e-6);
            }
        }
    }

    #[test]
    fn rope_and_append(
        rows in 1usize..41,
        kv_heads in 1usize..4,
        group in 1usize..5,
        half in prop::sample::select(vec![1usize, 4, 5, 24, 32, 64]),
        dtype in prop::sample::select(vec![KvDtype::Bf16, KvDtype::F16, KvDtype::F32, KvDtype::Fp8]),
        interleaved: bool,
        normed: bool,
        seed in 0u64..1 << 40,
    ) {
        let d = 2 * half;
        let shape = AttentionShape { heads: kv_heads * group, kv_heads, head_dim: d, scale: 1.0 };
        let kv = KvShape { layers: 2, kv_heads: kv_heads as u32, head_dim: d as u32, block_tokens: 16, dtype };
        let rope = Rope { inv_freq: noise(seed + 3, half), magnitude: 1.25, interleaved };
        let slots: Vec<RowSlot> = (0..rows as u32)
            .map(|r| RowSlot { position: 100 + r, block: (r / 16 + 1) % 3, offset: r % 16 })
            .collect();
        let seqs = [AttnSeq { row: 0, rows: rows as u32, position: 100, run: 0, runs: 0 }];
        let step = StepInput { tokens: &vec![0; rows], slots: &slots, seqs: &seqs, runs: &[], logit_rows: &[] };
        let (q_norm, k_norm) = (noise(seed + 1, d), noise(seed + 2, d));
        for isa in isas() {
            let pool = KvPool::new(kv, 3).unwrap();
            let mut device = device(isa, 2);
            device.begin_step(&rope, &step, &pool, true).unwrap();
            let mut qkv = filled(&mut device, rows, shape.qkv_width(), seed);
            let before = qkv.as_slice().to_vec();
            let (q, k) = (Vector::new(q_norm.clone()), Vector::new(k_norm.clone()));
            device.rope_append(&shape, normed.then_some((&q, &k, 1e-6)), 1, &pool, &mut qkv);
            for (r, slot) in slots.iter().enumerate() {
                let angles: Vec<f32> = rope.inv_freq.iter().map(|f| slot.position as f32 * f).collect();
                let cos: Vec<f32> = angles.iter().map(|a| a.cos() * rope.magnitude).collect();
                let sin: Vec<f32> = angles.iter().map(|a| a.sin() * rope.magnitude).collect();
                for (h, got) in qkv.row(r).chunks_exact(d).enumerate() {
                    let mut want = before[r * shape.qkv_width() + h * d..][..d].to_vec();
                    if h < shape.heads + shape.kv_heads {
                        if normed {
                            let from = want.clone();
                            let weight = if h < shape.heads { &q_norm } else { &k_norm };
                            reference::rms_norm(&from, weight, 1e-6, &mut want);
                        }
                        reference::rotate(&mut want, &cos, &sin, interleaved);
                    }
                    close(got, &want, 4e-6);
                    if h >= shape.heads {
                        let (v, head) = (h - shape.heads >= kv_heads, (h - shape.heads) % kv_heads);
                        for (i, x) in got.iter().enumerate() {
                            let stored = reference::kv_at(&pool, 1, slot.block, v, head, slot.offset as usize, i);
                            let rounded = match dtype {
                                KvDtype::Bf16 => half::bf16::from_f32(*x).to_f32(),
                                KvDtype::F16 => half::f16::from_f32(*x).to_f32(),
                                KvDtype::F32 => *x,
                                KvDtype::Fp8 => crate::e4m3::to_f32(crate::e4m3::from_f32(*x)),
                            };
                            prop_assert_eq!(stored, rounded);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn merge_export_and_gather(
        ranges in prop::collection::vec((0u32..3, 1u32..6), 1..4),
        heads in 1usize..5,
        d in prop::sample::select(vec![2usize, 8, 48, 64, 80]),
        seed in 0u64..1 << 40,
    ) {
        let shape = AttentionShape { heads, kv_heads: 1, head_dim: d, scale: 1.0 };
        let mut row = 0;
        let ranges: Vec<Range<u32>> = ranges
            .iter()
            .map(|&(gap, len)| {
                let start = row + gap;
                row = start + len;
                start..row
            })
            .collect();
        let rows = row as usize + 1;
        let total: usize = ranges.iter().map(|r| r.len()).sum();
        for isa in isas() {
            let mut device = device(isa, 2);
            let qkv = filled(&mut device, rows, shape.qkv_width(), seed);
            let mut queries = vec![f32::NAN; total * shape.q_width()];
            device.export_queries(&shape, &qkv, &ranges, &mut queries);
            let flat: Vec<u32> = ranges.iter().flat_map(|r| r.clone()).collect();
            let mut gathered = poisoned(&mut device, total, qkv.cols());
            device.gather(&qkv, &flat, &mut gathered);
            for (i, &r) in flat.iter().enumerate() {
                prop_assert_eq!(&queries[i * shape.q_width()..][..shape.q_width()], &qkv.row(r as usize)[..shape.q_width()]);
                prop_assert_eq!(gathered.row(i), qkv.row(r as usize));
            }
            let mut o = filled(&mut device, rows, shape.q_width(), seed + 1);
            let mut lse = filled(&mut device, rows, heads, seed + 2);
            let remote_o = noise(seed + 3, total * shape.q_width());
            let mut remote_lse = noise(seed + 4, total * heads);
            for (i, x) in remote_lse.iter_mut().enumerate() {
                *x = if i % 5 == 1 { f32::NEG_INFINITY } else { *x * 50.0 };
            }
            for (i, x) in lse.as_mut_slice().iter_mut().enumerate() {
                *x = if i % 3 == 1 { f32::NEG_INFINITY } else { *x * 50.0 };
            }
            let (mut want_o, mut want_lse) = (o.as_slice().to_vec(), lse.as_slice().to_vec());
            let start = want_o.clone();
            device.merge(&shape, &ranges, &remote_o, &remote_lse, &mut o, &mut lse);
            for (i, &r) in flat.iter().enumerate() {
                for h in 0..heads {
                    let (at, from) = (r as usize * heads + h, i * heads + h);
                    let (a, b) = (want_lse[at], remote_lse[from]);
                    reference::merge(&mut want_o[at * d..][..d], &mut want_lse[at], &remote_o[from * d..][..d], b);
                    if b == f32::NEG_INFINITY {
                        prop_assert_eq!(&o.as_slice()[at * d..][..d], &start[at * d..][..d]);
                    } else if a == f32::NEG_INFINITY {
                        prop_assert_eq!(&o.as_slice()[at * d..][..d], &remote_o[from * d..][..d]);
                    }
                }
            }
            close(o.as_slice(), &want_o, 1e-6);
            for (g, w) in lse.as_slice().iter().zip(&want_lse) {
                prop_assert!(g == w || (g - w).abs() <= 1e-6 * (1.0 + w.abs()));
            }
        }
    }
}

#[test]
fn a_step_that_contradicts_itself_is_refused() {
    let mut device = device(Isa::Portable, 1);
    let kv = KvShape { layers: 1, kv_heads: 1, head_dim: 2, block_tokens: 16, dtype: KvDtype::F32 };
    let pool = KvPool::new(kv, 1).unwrap();
    let rope = Rope { inv_freq: vec![1.0], magnitude: 1.0, interleaved: false };
    let slots = [RowSlot { position: 0, block: 0, offset: 0 }; 2];
    let seq = AttnSeq { row: 0, rows: 2, position: 0, run: 0, runs: 0 };
    let mut begin = |tokens: &[u32], slots: &[RowSlot], seqs: &[AttnSeq]| {
        device.begin_step(&rope, &StepInput { tokens, slots, seqs, runs: &[], logit_rows: &[] }, &pool, true).is_ok()
    };
    assert!(begin(&[1, 2], &slots, &[seq]));
    assert!(!begin(&[1], &slots, &[seq]));
    assert!(!begin(&[1, 2], &slots, &[AttnSeq { rows: 1, ..seq }]));
    assert!(!begin(&[1, 2], &slots, &[AttnSeq { row: 1, ..seq }]));
    assert!(!begin(&[1, 2], &slots, &[AttnSeq { runs: 1, ..seq }]));
    assert!(!begin(&[0; 65], &[slots[0]; 65], &[AttnSeq { rows: 65, ..seq }]));
}
