//! Integer products: every instruction set against plain arrays, those against
//! f32 products of what the activations were rounded to.
#![allow(unsafe_code)]

use proptest::prelude::*;

use super::dot::DotIsa;
use super::format_dots::{BLOCK, Block};
use super::gemv_dots::Quantize;
use super::product_tests::{noise, raw};
use super::simd::dispatch;
use super::simd::tests::isas;
use super::*;
use crate::device::tensor::DType;

const QUANTIZED: [DType; 5] = [DType::Q8_0, DType::Q4_0, DType::Q4_1, DType::Q4K, DType::Q6K];

/// What this machine has; says once what is left out.
fn all() -> Vec<DotIsa> {
    static SAID: std::sync::Once = std::sync::Once::new();
    let all = [DotIsa::Avx512Vnni, DotIsa::AvxVnni, DotIsa::Avx2, DotIsa::Plain];
    SAID.call_once(|| {
        for dots in all.iter().filter(|d| !d.available()) {
            eprintln!("skipped: this processor has no {dots:?}");
        }
    });
    all.into_iter().filter(|d| d.available()).collect()
}

fn isa_of(dots: DotIsa) -> Isa {
    match dots {
        DotIsa::Avx512Vnni => Isa::Avx512,
        DotIsa::AvxVnni | DotIsa::Avx2 => Isa::Avx2,
        DotIsa::Plain => Isa::Portable,
    }
}

struct Case {
    parts: Vec<(DType, usize, Vec<u8>)>,
    cols: usize,
    x: Vec<f32>,
    bias: bool,
    add: bool,
    threads: usize,
}

impl Case {
    fn tensors(&self) -> Vec<RawTensor<'_>> {
        let Self { parts, cols, .. } = self;
        parts
            .iter()
            .map(|(dtype, rows, bytes)| RawTensor {
                dtype: *dtype,
                rows: *rows,
                cols: *cols,
                bytes,
                stored: None,
                scales: None,
            })
            .collect()
    }

    fn outs(&self) -> usize {
        self.parts.iter().map(|p| p.1).sum()
    }

    fn bias(&self) -> Option<Vec<f32>> {
        self.bias.then(|| noise(7, self.outs()))
    }

    /// The product, of some of the rows.
    fn run(&self, dots: DotIsa, rows: Range<usize>) -> Vec<f32> {
        let Self { cols, threads, .. } = *self;
        let isa = Some(isa_of(dots));
        let mut device =
            CpuDevice::new(CpuOptions { threads, pin: false, math: Math::Fast, max_rows: 64, isa }).unwrap();
        device.products.dots = Some(dots);
        device.products.amx = false;
        let matrix = device.load_matrix(&self.tensors()).unwrap();
        let mut x = device.buffer(rows.len(), cols).unwrap();
        x.as_mut_slice().copy_from_slice(&self.x[rows.start * cols..rows.end * cols]);
        let mut out = device.buffer(rows.len(), matrix.outs()).unwrap();
        let bias = self.bias().map(Vector::new);
        if self.add {
            out.as_mut_slice().fill(0.5);
            device.linear_add(&x, rows.len(), &matrix, bias.as_ref(), &mut out);
        } else {
            out.as_mut_slice().fill(f32::NAN);
            device.linear(&x, rows.len(), &matrix, bias.as_ref(), &mut out);
        }
        out.as_slice().to_vec()
    }

    fn rows(&self) -> usize {
        self.x.len() / self.cols
    }

    /// In f64 of the rounded activations, beside the sum of magnitudes.
    fn want(&self) -> Vec<(f64, f64)> {
        let w: Vec<f32> = self.tensors().iter().flat_map(reference::dequantize).collect();
        let x: Vec<f64> = quantize(Isa::Portable, &self.x)
            .iter()
            .flat_map(|b| b.codes.map(|code| f64::from(code) * f64::from(b.scale)))
            .collect();
        let bias = self.bias();
        let mut want = Vec::new();
        for x in x.chunks_exact(self.cols) {
            for (o, w) in w.chunks_exact(self.cols).enumerate() {
                let products = x.iter().zip(w).map(|(x, w)| x * f64::from(*w));
                let extra = bias.as_ref().map_or(0.0, |b| f64::from(b[o])) + if self.add { 0.5 } else { 0.0 };
                let sum: f64 = products.clone().sum::<f64>() + extra;
                want.push((sum, products.map(f64::abs).sum::<f64>() + extra.abs()));
            }
        }
        want
    }

    /// Every instruction set's distance to f64.
    fn check(&self) {
        let want = self.want();
        for dots in all() {
            let got = self.run(dots, 0..self.rows());
            for (i, (got, (want, scale))) in got.iter().zip(&want).enumerate() {
                let apart = (f64::from(*got) - want).abs();
                // Offsets (of codes, or minima) cancel: their terms are as large
                // as a few times the sum.
                assert!(apart <= 1e-5 * scale + 1e-35, "{dots:?} element {i}: {got} where {want} was due, of {scale}");
            }
        }
    }
}

fn quantize(isa: Isa, x: &[f32]) -> Vec<Block> {
    let mut out = vec![bytemuck::Zeroable::zeroed(); x.len() / BLOCK];
    // SAFETY: available.
    unsafe { dispatch(isa, Quantize { x, out: &mut out }) };
    out
}

fn parts(kinds: &[(usize, usize)], blocks: usize, seed: u64) -> (Vec<(DType, usize, Vec<u8>)>, usize) {
    let longest = kinds.iter().map(|k| QUANTIZED[k.0].block_len()).max().unwrap();
    let cols = blocks * longest;
    let of = |(i, &(kind, outs)): (usize, &(usize, usize))| {
        (QUANTIZED[kind], outs, raw(QUANTIZED[kind], outs, cols, seed + i as u64))
    };
    (kinds.iter().enumerate().map(of).collect(), cols)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(60) })]

    #[test]
    fn integer_products_are_those_of_the_rounded_activations(
        kinds in prop::collection::vec((0usize..5, 1usize..70), 1..4),
        blocks in 1usize..5,
        rows in 1usize..20,
        threads in 1usize..4,
        bias: bool,
        add: bool,
        seed in 0u64..1 << 40,
    ) {
        let (parts, cols) = parts(&kinds, blocks, seed);
        Case { parts, cols, x: noise(seed + 9, rows * cols), bias, add, threads }.check();
    }

    #[test]
    fn a_row_is_the_same_whatever_is_beside_it(
        kinds in prop::collection::vec((0usize..5, 1usize..70), 1..3),
        rows in 1usize..14,
        seed in 0u64..1 << 40,
    ) {
        let (parts, cols) = parts(&kinds, 2, seed);
        let case = Case { parts, cols, x: noise(seed + 9, rows * cols), bias: true, add: false, threads: 2 };
        for dots in all() {
            let together = case.run(dots, 0..rows);
            for row in 0..rows {
                let alone = case.run(dots, row..row + 1);
                prop_assert_eq!(&together[row * case.outs()..][..case.outs()], &alone[..], "{:?} row {}", dots, row);
            }
        }
    }

    #[test]
    fn extreme_scales_and_codes_neither_saturate_nor_overflow(
        kind in 0usize..5,
        weight_scale in prop::sample::select(vec![6e-8f32, 1.0, 65504.0]),
        exponents in prop::collection::vec(-140i32..81, 1..9),
        extreme: bool,
        seed in 0u64..1 << 40,
    ) {
        let (mut parts, cols) = parts(&[(kind, 40)], 8, seed);
        let (dtype, _, bytes) = &mut parts[0];
        let halves: &[usize] = match dtype {
            DType::Q4_1 | DType::Q4K => &[0, 2],
            DType::Q6K => &[208],
            _ => &[0],
        };
        for block in bytes.chunks_exact_mut(dtype.block_bytes()) {
            if extreme {
                // Every code, and every scale of a sub-block, at one end.
                block.fill(if seed % 2 == 0 { 0xff } else { 0x80 });
            }
            for at in halves {
                block[*at..*at + 2].copy_from_slice(&half::f16::from_f32(weight_scale).to_le_bytes());
            }
        }
        let mut x = noise(seed + 9, 3 * cols);
        for (i, block) in x.chunks_exact_mut(BLOCK).enumerate() {
            let scale = 2f32.powi(exponents[i % exponents.len()]);
            block.iter_mut().for_each(|x| *x = if extreme { x.signum() * scale } else { *x * scale });
        }
        Case { parts, cols, x, bias: false, add: false, threads: 1 }.check();
    }

    #[test]
    fn codes_are_the_nearest_and_alike_everywhere(seed in 0u64..1 << 40, exponent in -140i32..127) {
        let x: Vec<f32> = noise(seed, 4 * BLOCK).iter().map(|x| x * 2f32.powi(exponent)).collect();
        let want = quantize(Isa::Portable, &x);
        for isa in isas() {
            for ((block, want), x) in quantize(isa, &x).iter().zip(&want).zip(x.as_chunks::<BLOCK>().0) {
                prop_assert_eq!(bytemuck::bytes_of(block), bytemuck::bytes_of(want), "{:?}", isa);
                let sum = |codes: &[i8]| codes.iter().map(|&c| i32::from(c)).sum::<i32>();
                prop_assert_eq!(block.sums, [sum(&block.codes[..16]), sum(&block.codes[16..])]);
                for (code, x) in block.codes.iter().zip(x) {
                    prop_assert!(*code >= -127);
                    let apart = (f64::from(*code) * f64::from(block.scale) - f64::from(*x)).abs();
                    prop_assert!(apart <= f64::from(block.scale) * 0.50001 + 1e-30, "{:?}: {} as {}", isa, x, code);
                }
            }
        }
    }
}

#[test]
fn zeros_stay_zeros_and_what_is_not_finite_does_not_pass_for_a_number() {
    for isa in isas() {
        let zeros = quantize(isa, &[0.0; BLOCK]);
        assert_eq!((zeros[0].codes, zeros[0].scale, zeros[0].total), ([0; BLOCK], 0.0, 0.0), "{isa:?}");
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = [1.0; BLOCK];
            x[17] = bad;
            let block = quantize(isa, &x)[0];
            assert!(block.scale.is_nan() && block.total.is_nan(), "{isa:?} of {bad}");
        }
    }
}
