//! Every product kernel against the plain one.

use proptest::prelude::*;

use super::simd::tests::isas;
use super::*;
use crate::device::tensor::{DType, Scales};
use crate::kv::rblock::{KvDtype, KvShape};

pub(super) const DTYPES: [DType; 8] =
    [DType::F32, DType::F16, DType::Bf16, DType::Q8_0, DType::Q4_0, DType::Q4_1, DType::Q4K, DType::Q6K];

/// Deterministic noise in −1 ..= 1.
pub(super) fn noise(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((state >> 40) as f32 / (1u64 << 23) as f32) - 1.0
        })
        .collect()
}

/// Random weights as a file would hold them.
pub(super) fn raw(dtype: DType, rows: usize, cols: usize, seed: u64) -> Vec<u8> {
    let len = dtype.bytes(rows * cols).unwrap();
    let mut bytes: Vec<u8> = noise(seed, len).iter().map(|x| (x * 127.0) as i8 as u8).collect();
    let mut put = |every: usize, at: &[usize]| {
        for (block, x) in bytes.chunks_exact_mut(every).zip(noise(seed + 1, len)) {
            for at in at {
                let half = half::f16::from_f32(x / 64.0).to_le_bytes();
                block[*at..*at + 2].copy_from_slice(&half);
            }
        }
    };
    match dtype {
        DType::F32 => return noise(seed, rows * cols).iter().flat_map(|x| x.to_le_bytes()).collect(),
        DType::F16 => put(2, &[0]),
        DType::Bf16 => {
            return noise(seed, rows * cols).iter().flat_map(|x| half::bf16::from_f32(*x).to_le_bytes()).collect();
        }
        DType::F8E4m3 => unreachable!("it has scales, and a test of its own"),
        DType::Q8_0 => put(34, &[0]),
        DType::Q4_0 => put(18, &[0]),
        DType::Q4_1 => put(20, &[0, 2]),
        DType::Q4K => put(144, &[0, 2]),
        DType::Q6K => put(210, &[208]),
    }
    bytes
}

fn options(isa: Isa, threads: usize, math: Math) -> CpuOptions {
    CpuOptions { threads, pin: false, math, max_rows: 64, isa: Some(isa) }
}

/// Largest difference, relative to what the sum of magnitudes allows.
fn worst(got: &[f32], want: &[f32], scale: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    let mut worst = 0.0f32;
    for ((g, w), s) in got.iter().zip(want).zip(scale) {
        assert!(g.is_finite(), "{g} where {w} was due");
        worst = worst.max((g - w).abs() / (s + 1e-6));
    }
    worst
}

struct Case {
    parts: Vec<(DType, usize)>,
    cols: usize,
    rows: usize,
    bias: bool,
    add: bool,
    seed: u64,
}

impl Case {
    /// Worst relative error of a device over the case.
    fn check(&self, device: &mut CpuDevice) -> f32 {
        let Self { cols, rows, seed, .. } = *self;
        let bytes: Vec<Vec<u8>> =
            self.parts.iter().zip(seed..).map(|(&(dtype, outs), seed)| raw(dtype, outs, cols, seed)).collect();
        let parts: Vec<RawTensor<'_>> = self
            .parts
            .iter()
            .zip(&bytes)
            .map(|(&(dtype, rows), bytes)| RawTensor { dtype, rows, cols, bytes, stored: None, scales: None })
            .collect();
        let matrix = device.load_matrix(&parts).unwrap();
        let w: Vec<f32> = parts.iter().flat_map(reference::dequantize).collect();
        let outs = matrix.outs();
        let mut row = vec![f32::NAN; cols];
        for (i, w) in w.chunks_exact(cols).enumerate() {
            matrix.read_row(i, &mut row);
            assert_eq!(row, w, "row {i} read back");
        }
        let bias = noise(seed + 7, outs);
        let bias = self.bias.then_some(&bias[..]);
        let mut x = device.buffer(rows + 1, cols).unwrap();
        x.as_mut_slice().fill(f32::NAN);
        x.as_mut_slice()[..rows * cols].copy_from_slice(&noise(seed + 9, rows * cols));
        let mut out = device.buffer(rows + 1, outs).unwrap();
        let before = noise(seed + 11, (rows + 1) * outs);
        let start = if self.add { before.clone() } else { vec![f32::NAN; before.len()] };
        out.as_mut_slice().copy_from_slice(&start);
        let vector = bias.map(|b| Vector::new(b.to_vec()));
        if self.add {
            device.linear_add(&x, rows, &matrix, vector.as_ref(), &mut out);
        } else {
            device.linear(&x, rows, &matrix, vector.as_ref(), &mut out);
        }
        let mut want = reference::linear(&x.as_slice()[..rows * cols], &w, cols, bias);
        if self.add {
            want.iter_mut().zip(&before).for_each(|(w, b)| *w += b);
        }
        let abs = |x: &[f32]| x.iter().map(|x| x.abs()).collect::<Vec<_>>();
        let mut scale = reference::linear(&abs(&x.as_slice()[..rows * cols]), &abs(&w), cols, None);
        // What is added rounds as well, by less than a unit in its last place.
        if self.add || self.bias {
            scale.iter_mut().for_each(|s| *s += 0.1);
        }
        let tail = &out.as_slice()[rows * outs..];
        let tail_before = &start[rows * outs..];
        assert!(tail.iter().zip(tail_before).all(|(a, b)| a.to_bits() == b.to_bits()), "wrote beyond the rows");
        worst(&out.as_slice()[..rows * outs], &want, &scale)
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(60) })]

    #[test]
    fn exact_products_are_the_reference(
        kinds in prop::collection::vec((0usize..8, 1usize..70), 1..4),
        blocks in 1usize..4,
        odd in 1usize..300,
        rows in 1usize..41,
        threads in 1usize..4,
        bias: bool,
        add: bool,
        seed in 0u64..1 << 40,
    ) {
        let parts: Vec<_> = kinds.iter().map(|&(kind, outs)| (DTYPES[kind], outs)).collect();
        let block = parts.iter().map(|p| p.0.block_len()).max().unwrap();
        let cols = if block == 1 { odd } else { blocks * block };
        let case = Case { parts, cols, rows, bias, add, seed };
        for isa in isas() {
            let mut device = CpuDevice::new(options(isa, threads, Math::Exact)).unwrap();
            let worst = case.check(&mut device);
            prop_assert!(worst < 3e-6, "{isa:?}: {worst}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(40) })]

    #[test]
    fn fast_products_are_near_the_reference(
        kinds in prop::collection::vec((0usize..8, 1usize..70), 1..4),
        blocks in 1usize..4,
        odd in 1usize..300,
        rows in 1usize..80,
        threads in 1usize..4,
        bias: bool,
        add: bool,
        seed in 0u64..1 << 40,
    ) {
        let parts: Vec<_> = kinds.iter().map(|&(kind, outs)| (DTYPES[kind], outs)).collect();
        let block = parts.iter().map(|p| p.0.block_len()).max().unwrap();
        let cols = if block == 1 { odd } else { blocks * block };
        let case = Case { parts, cols, rows, bias, add, seed };
        for isa in isas() {
            let options = CpuOptions { max_rows: 80, ..options(isa, threads, Math::Fast) };
            let worst = case.check(&mut CpuDevice::new(options).unwrap());
            // Both operands rounded to eight bits.
            prop_assert!(worst < 1.0 / 128.0, "{isa:?}: {worst}");
        }
    }
}

#[test]
fn embedding_rows_are_the_tables() {
    for dtype in DTYPES {
        let mut device = CpuDevice::new(options(Isa::Portable, 2, Math::Exact)).unwrap();
        let bytes = raw(dtype, 50, 256, 3);
        let table = RawTensor { dtype, rows: 50, cols: 256, bytes: &bytes, stored: None, scales: None };
        let all = reference::dequantize(&table);
        let table = device.load_matrix(&[table]).unwrap();
        let tokens = [49, 0, 31, 32, 0];
        let slots = [crate::device::RowSlot { position: 0, block: 0, offset: 0 }; 5];
        let seqs = [AttnSeq { row: 0, rows: 5, position: 0, run: 0, runs: 0 }];
        let rope = Rope { inv_freq: vec![1.0], magnitude: 1.0, interleaved: false };
        let kv = KvShape { layers: 1, kv_heads: 1, head_dim: 2, block_tokens: 16, dtype: KvDtype::F32 };
        let pool = KvPool::new(kv, 1).unwrap();
        let step = StepInput { tokens: &tokens, slots: &slots, seqs: &seqs, runs: &[], logit_rows: &[] };
        device.begin_step(&rope, &step, &pool, true).unwrap();
        let mut out = device.buffer(5, 256).unwrap();
        device.embed(&table, &mut out);
        for (i, token) in tokens.into_iter().enumerate() {
            assert_eq!(out.row(i), &all[token as usize * 256..][..256], "{dtype}");
        }
    }
}

#[test]
fn weights_that_contradict_themselves_are_refused() {
    let mut device = CpuDevice::new(options(Isa::Portable, 1, Math::Exact)).unwrap();
    let bytes = [0u8; 64];
    let tensor = |rows, cols| RawTensor { dtype: DType::Bf16, rows, cols, bytes: &bytes, stored: None, scales: None };
    assert!(device.load_matrix(&[tensor(4, 8)]).is_ok());
    assert!(device.load_matrix(&[tensor(4, 7)]).is_err());
    assert!(device.load_matrix(&[tensor(4, 8), tensor(8, 4)]).is_err());
    assert!(device.load_matrix(&[]).is_err());
}

#[test]
fn fp8_weights_are_code_times_scale_rounded_to_bf16() {
    let mut device = CpuDevice::new(options(Isa::Portable, 2, Math::Exact)).unwrap();
    let (rows, cols, outs) = (3, 144, 150);
    let codes: Vec<u8> =
        (0..outs * cols).map(|i| (i * 37 + i / 7) as u8).map(|c| if c & 0x7f == 0x7f { 0 } else { c }).collect();
    let x = noise(4, rows * cols);
    for (block, count) in [((outs, cols), 1), ((1, cols), outs), ((128, 128), 4)] {
        let values: Vec<f32> = noise(5, count).iter().map(|s| (s + 1.5) * 0.01).collect();
        let scales = Some(Scales { block, values: &values });
        let part = RawTensor { dtype: DType::F8E4m3, rows: outs, cols, bytes: &codes, stored: None, scales };
        let value = |out: usize, col: usize| {
            let scale = values[out / block.0 * cols.div_ceil(block.1) + col / block.1];
            crate::e4m3::to_f32(codes[out * cols + col]) * scale
        };
        let plain: Vec<f32> = (0..outs * cols).map(|i| value(i / cols, i % cols)).collect();
        assert_eq!(reference::dequantize(&part), plain);
        let rounded: Vec<f32> = plain.iter().map(|v| half::bf16::from_f32(*v).to_f32()).collect();
        let matrix = device.load_matrix(&[part]).unwrap();
        let mut row = vec![0.0; cols];
        for (i, want) in rounded.chunks_exact(cols).enumerate() {
            matrix.read_row(i, &mut row);
            assert_eq!(row, want, "row {i}, {block:?}");
        }
        let mut buffer = device.buffer(rows, cols).unwrap();
        buffer.as_mut_slice().copy_from_slice(&x);
        let mut out = device.buffer(rows, outs).unwrap();
        device.linear(&buffer, rows, &matrix, None, &mut out);
        let want = reference::linear(&x, &rounded, cols, None);
        let largest = want.iter().fold(0f32, |a, b| a.max(b.abs()));
        for (got, want) in out.as_slice().iter().zip(&want) {
            assert!((got - want).abs() <= 1e-5 * largest, "{got}, not {want}");
        }
        // Beside other types in one matrix.
        let other = raw(DType::F16, 8, cols, 9);
        let other = RawTensor { dtype: DType::F16, rows: 8, cols, bytes: &other, stored: None, scales: None };
        let matrix = device.load_matrix(&[other, part]).unwrap();
        matrix.read_row(8 + 131, &mut row);
        assert_eq!(row, &rounded[131 * cols..132 * cols]);
        assert!(device.load_matrix(&[RawTensor { scales: None, ..part }]).is_err());
    }
}
