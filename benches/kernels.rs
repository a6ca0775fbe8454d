//! The CPU's kernels one by one, each beside the floor measured in the same
//! run: read bandwidth for what reads weights, the f32 peak for what computes.
//!
//! `cargo bench --bench kernels -- [filter] [--fast]`
#![allow(missing_docs)]

use std::time::Instant;

use distkv::device::Device;
use distkv::device::cpu::bandwidth::{ReadSweep, measure_peak};
use distkv::device::cpu::{CpuDevice, CpuOptions, Math};
use distkv::device::tensor::{DType, RawTensor};

const THREADS: usize = 2;

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// Weights of a sane size: tiny ones would measure the processor's handling of
/// subnormal numbers instead.
fn weights(dtype: DType, elements: usize) -> Vec<u8> {
    let mut state = 1u64;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as u32
    };
    let small = half::f16::from_f32(0.01).to_le_bytes();
    let mut bytes = vec![0u8; dtype.bytes(elements).unwrap()];
    for block in bytes.chunks_exact_mut(dtype.block_bytes()) {
        let value = next() as f32 / (1 << 23) as f32 - 1.0;
        match dtype {
            DType::F32 => block.copy_from_slice(&value.to_le_bytes()),
            DType::F16 => block.copy_from_slice(&half::f16::from_f32(value).to_le_bytes()),
            DType::Bf16 => block.copy_from_slice(&half::bf16::from_f32(value).to_le_bytes()),
            _ => {
                block.fill_with(|| (next() >> 8) as u8);
                let scales: &[usize] = match dtype {
                    DType::Q4_1 | DType::Q4K => &[0, 2],
                    DType::Q6K => &[208],
                    _ => &[0],
                };
                for at in scales {
                    block[*at..*at + 2].copy_from_slice(&small);
                }
            }
        }
    }
    bytes
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let math = if args.iter().any(|a| a == "--fast") { Math::Fast } else { Math::Exact };
    let filter = args.iter().find(|a| !a.starts_with("--")).cloned().unwrap_or_default();
    let mut device = CpuDevice::new(CpuOptions { threads: THREADS, math, ..CpuOptions::default() }).unwrap();
    println!("{}", device.describe());
    if filter == "attention" {
        return attention();
    }
    let mut sweep = ReadSweep::new(THREADS).unwrap();
    let (outs, cols) = (14336usize, 4096usize);
    println!("product of rows × {cols} by {outs} × {cols}");
    for dtype in [DType::F32, DType::F16, DType::Bf16, DType::Q8_0, DType::Q4_0, DType::Q4_1, DType::Q4K, DType::Q6K] {
        if !dtype.to_string().contains(&filter) {
            continue;
        }
        let raw = weights(dtype, outs * cols);
        let part = RawTensor { dtype, rows: outs, cols, bytes: &raw, stored: None, scales: None };
        // Copies, so that the rotation is larger than a cache.
        let copies = (1 << 29) / raw.len();
        let few: Vec<_> = (0..copies.max(2)).map(|_| device.load_matrix(&[part]).unwrap()).collect();
        let bytes = few[0].bytes() as f64;
        for rows in [1usize, 2, 4, 8, 16, 128, 512] {
            let mut x = device.buffer(rows, cols).unwrap();
            x.as_mut_slice().iter_mut().enumerate().for_each(|(i, x)| *x = (i % 17) as f32 * 0.1 - 0.8);
            let mut out = device.buffer(rows, outs).unwrap();
            let mut rates = Vec::new();
            let mut times = Vec::new();
            for round in 0..if rows > 16 { 3 } else { 5 } {
                let weights = &few[round % few.len()..][..1];
                let all = if rows > 16 { weights } else { &few[..] };
                if rows <= 16 {
                    rates.push(sweep.sweep());
                } else {
                    rates.push(measure_peak(THREADS).unwrap());
                }
                let start = Instant::now();
                for w in all {
                    device.linear(&x, rows, w, None, &mut out);
                }
                times.push(start.elapsed().as_secs_f64() / all.len() as f64);
            }
            let time = median(times);
            let floor = median(rates);
            if rows <= 16 {
                let rate = bytes / time;
                println!(
                    "{dtype} rows {rows:3}: {:8.3} ms  {:6.2} GB/s of {:6.2} read: {:.2}",
                    time * 1e3,
                    rate / 1e9,
                    floor / 1e9,
                    rate / floor
                );
            } else {
                let rate = 2.0 * (rows * outs * cols) as f64 / time;
                println!(
                    "{dtype} rows {rows:3}: {:8.3} ms  {:6.1} GF/s of {:6.1} f32 peak: {:.2}",
                    time * 1e3,
                    rate / 1e9,
                    floor / 1e9,
                    rate / floor
                );
            }
        }
    }
}

fn attention() {
    use distkv::cli::bench::attention::{Args, run};
    use distkv::kv::rblock::KvDtype;
    let all = [
        (9, 3, 64, 8192, 1, 1),
        (32, 8, 128, 8192, 1, 1),
        (32, 8, 128, 32768, 1, 1),
        (32, 8, 128, 1024, 8, 1),
        (32, 4, 128, 8192, 1, 1),
        (12, 12, 64, 8192, 1, 1),
        (9, 3, 64, 8192, 1, 512),
        (32, 8, 128, 8192, 1, 512),
    ];
    // Without the memory: what the arithmetic alone costs.
    let cached = std::env::args().any(|a| a == "--cached");
    let one: Option<usize> = std::env::args().filter_map(|a| a.parse().ok()).next();
    for (index, (heads, kv_heads, head_dim, depth, batch, rows)) in all.into_iter().enumerate() {
        if one.is_some_and(|one| one != index) {
            continue;
        }
        println!(
            "\n{heads} heads, {kv_heads} kv heads, head_dim {head_dim}, depth {depth}, batch {batch}, rows {rows}"
        );
        let args = Args {
            device: Default::default(),
            heads,
            kv_heads,
            head_dim,
            depth: if cached { 128 } else { depth },
            batch,
            rows,
            kv_dtype: KvDtype::Bf16,
            block_tokens: 16,
            threads: Some(THREADS),
            rotation: if cached { 1 } else { 1024 },
            seconds: 1.5,
            output: Default::default(),
        };
        run(args).unwrap();
    }
}
