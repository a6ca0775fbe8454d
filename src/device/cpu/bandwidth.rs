//! The machine's read bandwidth: the floor that everything memory-bound is
//! measured against, in the same run.
#![allow(unsafe_code)]

use std::time::Instant;

use super::buffer::Aligned;
use super::simd::{Isa, Kernel, Simd, dispatch};
use super::threads::ThreadPool;
use crate::device::Result;

/// Bytes swept: more than a last-level cache is likely to keep for us.
const BYTES: usize = 1 << 30;
const SWEEPS: usize = 7;

struct Sweep<'a>(&'a [f32]);

impl Kernel for Sweep<'_> {
    type Out = f32;

    #[inline(always)]
    unsafe fn run<S: Simd, const V: usize>(self) -> f32 {
        // SAFETY: loads stay inside the slice.
        unsafe {
            let mut acc = [S::splat(0.0); 8];
            for line in self.0.chunks_exact(8 * S::LANES) {
                S::prefetch(line.as_ptr().wrapping_add(1024).cast());
                S::prefetch(line.as_ptr().wrapping_add(1024 + 16).cast());
                S::prefetch(line.as_ptr().wrapping_add(1024 + 32).cast());
                S::prefetch(line.as_ptr().wrapping_add(1024 + 48).cast());
                if S::LANES == 16 {
                    S::prefetch(line.as_ptr().wrapping_add(1024 + 64).cast());
                    S::prefetch(line.as_ptr().wrapping_add(1024 + 80).cast());
                    S::prefetch(line.as_ptr().wrapping_add(1024 + 96).cast());
                    S::prefetch(line.as_ptr().wrapping_add(1024 + 112).cast());
                }
                for (i, acc) in acc.iter_mut().enumerate() {
                    *acc = S::add(*acc, S::load(line.as_ptr().add(i * S::LANES)));
                }
            }
            let mut sum = 0.0;
            for acc in acc {
                sum += S::sum(acc);
            }
            sum
        }
    }
}

/// A buffer to sweep, kept so that a bench can measure the floor again and again.
pub struct ReadSweep {
    threads: ThreadPool,
    data: Aligned,
    isa: Isa,
}

impl ReadSweep {
    /// Allocates and fills 1 GiB and starts `threads` pinned threads.
    pub fn new(threads: usize) -> Result<Self> {
        let mut data = Aligned::zeroed(BYTES)?;
        for (i, x) in data.f32s_mut().iter_mut().enumerate() {
            *x = i as f32;
        }
        Ok(Self { threads: ThreadPool::new(threads, true)?, data, isa: Isa::detect()? })
    }

    /// One sweep; bytes per second.
    pub fn sweep(&mut self) -> f64 {
        let (isa, data) = (self.isa, self.data.f32s());
        let start = Instant::now();
        self.threads.run(data.len(), 1 << 18, &|_, range| {
            // SAFETY: detected.
            std::hint::black_box(unsafe { dispatch(isa, Sweep(&data[range])) });
        });
        BYTES as f64 / start.elapsed().as_secs_f64()
    }
}

/// Reads 1 GiB over and over with `threads` threads; the median in bytes per
/// second.
pub fn measure_read(threads: usize) -> Result<f64> {
    let mut sweep = ReadSweep::new(threads)?;
    let mut rates: Vec<f64> = (0..SWEEPS).map(|_| sweep.sweep()).collect();
    rates.sort_by(f64::total_cmp);
    Ok(rates[SWEEPS / 2])
}

struct Peak(usize);

impl Kernel for Peak {
    type Out = f32;

    #[inline(always)]
    unsafe fn run<S: Simd, const V: usize>(self) -> f32 {
        // SAFETY: only arithmetic.
        unsafe {
            let mut acc = [S::splat(1.0); 12];
            let (a, b) = (S::splat(std::hint::black_box(0.999)), S::splat(std::hint::black_box(1e-3)));
            for _ in 0..self.0 {
                for acc in &mut acc {
                    *acc = S::fma(*acc, a, b);
                }
            }
            let mut sum = 0.0;
            for acc in acc {
                sum += S::sum(acc);
            }
            sum
        }
    }
}

/// The f32 peak of `threads` threads in operations (two a multiply-add) per
/// second, with the widest kernels: a loop of independent multiply-adds.
pub fn measure_peak(threads: usize) -> Result<f64> {
    const ROUNDS: usize = 200_000;
    let isa = Isa::detect()?;
    let lanes = if isa == Isa::Avx512 { 16 } else { 8 };
    let mut pool = ThreadPool::new(threads, true)?;
    let mut rates = Vec::new();
    for _ in 0..5 {
        let start = Instant::now();
        pool.run(threads * 4, 1, &|_, range| {
            for _ in range {
                // SAFETY: detected.
                std::hint::black_box(unsafe { dispatch(isa, Peak(ROUNDS)) });
            }
        });
        rates.push((threads * 4 * ROUNDS * 12 * lanes * 2) as f64 / start.elapsed().as_secs_f64());
    }
    rates.sort_by(f64::total_cmp);
    Ok(rates[2])
}
