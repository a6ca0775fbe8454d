//! How weights lie in memory once packed: panels of 32 output features, each
//! panel a run of groups along the input features. Here the formats of plain
//! floats; those of quantised blocks are in `format_blocks`.
//!
//! A group keeps what the file stored, bit for bit, only in another order: 32
//! features side by side, so that one vector of weights meets one broadcast
//! activation and no sum across lanes is needed.
#![allow(unsafe_code)]
#![allow(clippy::missing_safety_doc)]
// Closures are compiled without the kernel's instruction set: plain loops.
#![allow(clippy::needless_range_loop)]

use super::simd::{PANEL, Simd};

/// Sums of activations are kept for runs of this many.
pub(super) const SUM: usize = 16;

/// A packed format. `acc` and `x` are of `R` rows.
///
/// # Safety
/// Methods: `group` points to [`BYTES`](Self::BYTES) bytes, each `x` to
/// [`K`](Self::K) activations, each `sums` to their `K / SUM` sums.
pub(super) trait Format {
    /// Input features of a group.
    const K: usize;
    /// Bytes of a group of a panel.
    const BYTES: usize;
    /// Bytes of one feature's group in the file.
    const RAW: usize;

    /// Packs one feature's group into `lane` of a panel's group.
    fn pack(raw: &[u8], lane: usize, group: &mut [u8]);

    /// The inverse, to f32.
    fn unpack_lane(group: &[u8], lane: usize, out: &mut [f32]);

    /// `acc[r] += group · x[r]`.
    unsafe fn product<S: Simd, const V: usize, const R: usize>(
        group: *const u8,
        x: &[*const f32; R],
        sums: &[*const f32; R],
        acc: &mut [[S::F; V]; R],
    );

    /// The group as f32, `[K][32]`.
    unsafe fn unpack<S: Simd, const V: usize>(group: *const u8, out: *mut f32);
}

/// `[k][32]` f32.
pub(super) struct F32;

impl Format for F32 {
    const K: usize = 1;
    const BYTES: usize = 4 * PANEL;
    const RAW: usize = 4;

    fn pack(raw: &[u8], lane: usize, group: &mut [u8]) {
        group[lane * 4..][..4].copy_from_slice(raw);
    }

    fn unpack_lane(group: &[u8], lane: usize, out: &mut [f32]) {
        let b = &group[lane * 4..][..4];
        out[0] = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
    }

    #[inline(always)]
    unsafe fn product<S: Simd, const V: usize, const R: usize>(
        group: *const u8,
        x: &[*const f32; R],
        _: &[*const f32; R],
        acc: &mut [[S::F; V]; R],
    ) {
        // SAFETY: the trait's contract.
        unsafe {
            for v in 0..V {
                let w = S::load(group.cast::<f32>().add(v * S::LANES));
                for r in 0..R {
                    acc[r][v] = S::fma(w, S::splat(*x[r]), acc[r][v]);
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn unpack<S: Simd, const V: usize>(group: *const u8, out: *mut f32) {
        // SAFETY: the trait's contract.
        unsafe {
            for v in 0..V {
                S::store(out.add(v * S::LANES), S::load(group.cast::<f32>().add(v * S::LANES)));
            }
        }
    }
}

/// `[k][32]` f16.
pub(super) struct F16;

impl Format for F16 {
    const K: usize = 1;
    const BYTES: usize = 2 * PANEL;
    const RAW: usize = 2;

    fn pack(raw: &[u8], lane: usize, group: &mut [u8]) {
        group[lane * 2..][..2].copy_from_slice(raw);
    }

    fn unpack_lane(group: &[u8], lane: usize, out: &mut [f32]) {
        out[0] = half::f16::from_le_bytes([group[lane * 2], group[lane * 2 + 1]]).to_f32();
    }

    #[inline(always)]
    unsafe fn product<S: Simd, const V: usize, const R: usize>(
        group: *const u8,
        x: &[*const f32; R],
        _: &[*const f32; R],
        acc: &mut [[S::F; V]; R],
    ) {
        // SAFETY: the trait's contract.
        unsafe {
            for v in 0..V {
                let w = S::load_f16(group.cast::<u16>().add(v * S::LANES));
                for r in 0..R {
                    acc[r][v] = S::fma(w, S::splat(*x[r]), acc[r][v]);
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn unpack<S: Simd, const V: usize>(group: *const u8, out: *mut f32) {
        // SAFETY: the trait's contract.
        unsafe {
            for v in 0..V {
                S::store(out.add(v * S::LANES), S::load_f16(group.cast::<u16>().add(v * S::LANES)));
            }
        }
    }
}

/// `[k / 2][32][2]` bf16: a 32-bit lane holds two neighbours along k, which
/// widen with one shift and one mask, and which a matrix unit wants so.
pub(super) struct Bf16;

impl Format for Bf16 {
    const K: usize = 2;
    const BYTES: usize = 4 * PANEL;
    const RAW: usize = 4;

    fn pack(raw: &[u8], lane: usize, group: &mut [u8]) {
        group[lane * 4..][..4].copy_from_slice(raw);
    }

    fn unpack_lane(group: &[u8], lane: usize, out: &mut [f32]) {
        for (i, out) in out.iter_mut().enumerate().take(2) {
            let at = lane * 4 + 2 * i;
            *out = half::bf16::from_le_bytes([group[at], group[at + 1]]).to_f32();
        }
    }

    #[inline(always)]
    unsafe fn product<S: Simd, const V: usize, const R: usize>(
        group: *const u8,
        x: &[*const f32; R],
        _: &[*const f32; R],
        acc: &mut [[S::F; V]; R],
    ) {
        // SAFETY: the trait's contract.
        unsafe {
            for v in 0..V {
                let pair = S::load_i(group.cast::<u32>().add(v * S::LANES));
                let (even, odd) = halves::<S>(pair);
                for r in 0..R {
                    acc[r][v] = S::fma(even, S::splat(*x[r]), acc[r][v]);
                    acc[r][v] = S::fma(odd, S::splat(*x[r].add(1)), acc[r][v]);
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn unpack<S: Simd, const V: usize>(group: *const u8, out: *mut f32) {
        // SAFETY: the trait's contract.
        unsafe {
            for v in 0..V {
                let pair = S::load_i(group.cast::<u32>().add(v * S::LANES));
                let (even, odd) = halves::<S>(pair);
                S::store(out.add(v * S::LANES), even);
                S::store(out.add(PANEL + v * S::LANES), odd);
            }
        }
    }
}

/// Two bf16 of each lane as f32.
#[inline(always)]
unsafe fn halves<S: Simd>(pair: S::I) -> (S::F, S::F) {
    // SAFETY: the caller's instruction set.
    unsafe { (S::as_f(S::shl(pair, 16)), S::as_f(S::and(pair, S::splat_i(0xffff_0000)))) }
}
