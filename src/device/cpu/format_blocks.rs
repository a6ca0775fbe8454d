//! Packed formats of quantised weights. Codes are unsigned, and lie as 8-bit dot
//! products want them: a 32-bit lane holds four neighbours along k of one
//! feature, so a line of 128 bytes holds four k of all 32 features. With 4-bit
//! codes line `l` holds k = 4l .. 4l + 4 in its low nibbles and 16 further on in
//! its high ones.
#![allow(unsafe_code)]
// Closures are compiled without the kernel's instruction set: plain loops.
#![allow(clippy::needless_range_loop)]

use super::format::{Format, SUM};
use super::quant::{half_at, q4_k_scale_min, q6_k_code};
use super::simd::{PANEL, Simd, lanes};

/// Bytes of four k of a panel.
pub(super) const LINE: usize = 4 * PANEL;
/// Bytes of an f16 a feature.
pub(super) const HALVES: usize = 2 * PANEL;
/// Bytes of 32 4-bit codes a feature.
pub(super) const NIBBLES: usize = 4 * LINE;

/// Puts 32 4-bit codes of `lane`.
fn put_nibbles(codes: impl Fn(usize) -> u8, lane: usize, lines: &mut [u8]) {
    for k in 0..16 {
        lines[k / 4 * LINE + lane * 4 + k % 4] = codes(k) | codes(k + 16) << 4;
    }
}

fn nibble_at(lines: &[u8], lane: usize, k: usize) -> u8 {
    let byte = lines[k % 16 / 4 * LINE + lane * 4 + k % 4];
    if k < 16 { byte & 15 } else { byte >> 4 }
}

/// `acc[r] += codes · x[r]` of 32 4-bit codes.
#[inline(always)]
unsafe fn nibble_product<S: Simd, const V: usize, const R: usize>(
    lines: *const u8,
    x: &[*const f32; R],
    at: usize,
    acc: &mut [[S::F; V]; R],
) {
    // SAFETY: `lines` has NIBBLES bytes and each `x` 32 elements from `at`.
    unsafe {
        for line in 0..4 {
            let mut w = [S::splat_i(0); V];
            for v in 0..V {
                w[v] = S::load_i(lines.add(line * LINE).cast::<u32>().add(v * S::LANES));
            }
            for j in 0..4 {
                let (low, high) = (4 * line + j, 16 + 4 * line + j);
                for v in 0..V {
                    let a = S::nibble(S::shr(w[v], 8 * j as u32));
                    let b = S::nibble(S::shr(w[v], 8 * j as u32 + 4));
                    for r in 0..R {
                        acc[r][v] = S::fma(a, S::splat(*x[r].add(at + low)), acc[r][v]);
                        acc[r][v] = S::fma(b, S::splat(*x[r].add(at + high)), acc[r][v]);
                    }
                }
            }
        }
    }
}

/// 32 4-bit codes as `code · scale + min`, `[32][32]`.
#[inline(always)]
unsafe fn nibble_unpack<S: Simd, const V: usize>(lines: *const u8, scale: [S::F; V], min: [S::F; V], out: *mut f32) {
    // SAFETY: `lines` has NIBBLES bytes, `out` room for 32 × PANEL.
    unsafe {
        for line in 0..4 {
            for v in 0..V {
                let w = S::load_i(lines.add(line * LINE).cast::<u32>().add(v * S::LANES));
                for j in 0..4 {
                    let a = S::nibble(S::shr(w, 8 * j as u32));
                    let b = S::nibble(S::shr(w, 8 * j as u32 + 4));
                    let out = out.add((4 * line + j) * PANEL + v * S::LANES);
                    S::store(out, S::fma(a, scale[v], min[v]));
                    S::store(out.add(16 * PANEL), S::fma(b, scale[v], min[v]));
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn halves<S: Simd, const V: usize>(p: *const u8) -> [S::F; V] {
    // SAFETY: HALVES bytes at `p`.
    unsafe { lanes!(S, V, v => S::load_f16(p.cast::<u16>().add(v * S::LANES))) }
}

#[inline(always)]
unsafe fn zeros<S: Simd, const V: usize, const R: usize>() -> [[S::F; V]; R] {
    // SAFETY: the caller's instruction set.
    unsafe { [[S::splat(0.0); V]; R] }
}

/// `acc += part · scale`.
#[inline(always)]
unsafe fn add_scaled<S: Simd, const V: usize, const R: usize>(
    acc: &mut [[S::F; V]; R],
    part: &[[S::F; V]; R],
    scale: &[S::F; V],
) {
    for r in 0..R {
        for v in 0..V {
            // SAFETY: the caller's instruction set.
            acc[r][v] = unsafe { S::fma(part[r][v], scale[v], acc[r][v]) };
        }
    }
}

#[inline(always)]
unsafe fn sum32(sums: *const f32) -> f32 {
    // SAFETY: two sums of 16 at `sums`.
    unsafe { *sums + *sums.add(1) }
}

/// Scales f16 `[32]`, then 8 lines of codes, offset by 128.
pub(super) struct Q8;

impl Format for Q8 {
    const K: usize = 32;
    const BYTES: usize = HALVES + 8 * LINE;
    const RAW: usize = 34;

    fn pack(raw: &[u8], lane: usize, group: &mut [u8]) {
        group[lane * 2..][..2].copy_from_slice(&raw[..2]);
        for (k, &code) in raw[2..].iter().enumerate() {
            group[HALVES + k / 4 * LINE + lane * 4 + k % 4] = code ^ 0x80;
        }
    }

    fn unpack_lane(group: &[u8], lane: usize, out: &mut [f32]) {
        let d = half_at(group, lane * 2);
        for (k, out) in out.iter_mut().enumerate() {
            *out = d * (f32::from(group[HALVES + k / 4 * LINE + lane * 4 + k % 4]) - 128.0);
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
            let mut part = zeros::<S, V, R>();
            for line in 0..8 {
                let mut w = [S::splat_i(0); V];
                for v in 0..V {
                    let codes = S::load_i(group.add(HALVES + line * LINE).cast::<u32>().add(v * S::LANES));
                    w[v] = S::xor(codes, S::splat_i(0x8080_8080));
                }
                for j in 0..4 {
                    for v in 0..V {
                        let code = S::to_f(S::sra(S::shl(w[v], 24 - 8 * j as u32), 24));
                        for r in 0..R {
                            part[r][v] = S::fma(code, S::splat(*x[r].add(4 * line + j)), part[r][v]);
                        }
                    }
                }
            }
            add_scaled::<S, V, R>(acc, &part, &halves::<S, V>(group));
        }
    }

    #[inline(always)]
    unsafe fn unpack<S: Simd, const V: usize>(group: *const u8, out: *mut f32) {
        // SAFETY: the trait's contract.
        unsafe {
            let scale = halves::<S, V>(group);
            for line in 0..8 {
                for v in 0..V {
                    let codes = S::load_i(group.add(HALVES + line * LINE).cast::<u32>().add(v * S::LANES));
                    let w = S::xor(codes, S::splat_i(0x8080_8080));
                    for j in 0..4 {
                        let code = S::to_f(S::sra(S::shl(w, 24 - 8 * j as u32), 24));
                        S::store(out.add((4 * line + j) * PANEL + v * S::LANES), S::mul(code, scale[v]));
                    }
                }
            }
        }
    }
}

/// Scales f16 `[32]`, then 4 lines of nibbles, offset by 8.
pub(super) struct Q4;

impl Format for Q4 {
    const K: usize = 32;
    const BYTES: usize = HALVES + NIBBLES;
    const RAW: usize = 18;

    fn pack(raw: &[u8], lane: usize, group: &mut [u8]) {
        group[lane * 2..][..2].copy_from_slice(&raw[..2]);
        // The file's order of nibbles within 32 is the packed one.
        put_nibbles(|k| if k < 16 { raw[2 + k] & 15 } else { raw[2 + k - 16] >> 4 }, lane, &mut group[HALVES..]);
    }

    fn unpack_lane(group: &[u8], lane: usize, out: &mut [f32]) {
        let d = half_at(group, lane * 2);
        for (k, out) in out.iter_mut().enumerate() {
            *out = d * (f32::from(nibble_at(&group[HALVES..], lane, k)) - 8.0);
        }
    }

    #[inline(always)]
    unsafe fn product<S: Simd, const V: usize, const R: usize>(
        group: *const u8,
        x: &[*const f32; R],
        sums: &[*const f32; R],
        acc: &mut [[S::F; V]; R],
    ) {
        // SAFETY: the trait's contract.
        unsafe {
            let mut part = zeros::<S, V, R>();
            for r in 0..R {
                part[r] = [S::splat(-8.0 * sum32(sums[r])); V];
            }
            nibble_product::<S, V, R>(group.add(HALVES), x, 0, &mut part);
            add_scaled::<S, V, R>(acc, &part, &halves::<S, V>(group));
        }
    }

    #[inline(always)]
    unsafe fn unpack<S: Simd, const V: usize>(group: *const u8, out: *mut f32) {
        // SAFETY: the trait's contract.
        unsafe {
            let scale = halves::<S, V>(group);
            let min = lanes!(S, V, v => S::mul(scale[v], S::splat(-8.0)));
            nibble_unpack::<S, V>(group.add(HALVES), scale, min, out);
        }
    }
}

/// Scales f16 `[32]`, minima f16 `[32]`, then 4 lines of nibbles.
pub(super) struct Q4M;

impl Format for Q4M {
    const K: usize = 32;
    const BYTES: usize = 2 * HALVES + NIBBLES;
    const RAW: usize = 20;

    fn pack(raw: &[u8], lane: usize, group: &mut [u8]) {
        group[lane * 2..][..2].copy_from_slice(&raw[..2]);
        group[HALVES + lane * 2..][..2].copy_from_slice(&raw[2..4]);
        put_nibbles(|k| if k < 16 { raw[4 + k] & 15 } else { raw[4 + k - 16] >> 4 }, lane, &mut group[2 * HALVES..]);
    }

    fn unpack_lane(group: &[u8], lane: usize, out: &mut [f32]) {
        let (d, m) = (half_at(group, lane * 2), half_at(group, HALVES + lane * 2));
        for (k, out) in out.iter_mut().enumerate() {
            *out = d * f32::from(nibble_at(&group[2 * HALVES..], lane, k)) + m;
        }
    }

    #[inline(always)]
    unsafe fn product<S: Simd, const V: usize, const R: usize>(
        group: *const u8,
        x: &[*const f32; R],
        sums: &[*const f32; R],
        acc: &mut [[S::F; V]; R],
    ) {
        // SAFETY: the trait's contract.
        unsafe {
            let mut part = zeros::<S, V, R>();
            nibble_product::<S, V, R>(group.add(2 * HALVES), x, 0, &mut part);
            add_scaled::<S, V, R>(acc, &part, &halves::<S, V>(group));
            let sum: [[S::F; V]; R] = lanes!([[S::splat(0.0); V]; R], r => [S::splat(sum32(sums[r])); V]);
            add_scaled::<S, V, R>(acc, &sum, &halves::<S, V>(group.add(HALVES)));
        }
    }

    #[inline(always)]
    unsafe fn unpack<S: Simd, const V: usize>(group: *const u8, out: *mut f32) {
        // SAFETY: the trait's contract.
        unsafe {
            let (scale, min) = (halves::<S, V>(group), halves::<S, V>(group.add(HALVES)));
            nibble_unpack::<S, V>(group.add(2 * HALVES), scale, min, out);
        }
    }
}

/// d f16 `[32]`, dmin f16 `[32]`, then 8 sub-blocks: scales u8 `[32]`, minima u8
/// `[32]`, 4 lines of nibbles. (Widening 6 bits to 8 costs 3% of the size.)
pub(super) struct Q4K;

impl Q4K {
    pub(super) const SUB: usize = 2 * PANEL + NIBBLES;

    /// The sub-block's `d · scale` and `dmin · min`.
    #[inline(always)]
    unsafe fn scales<S: Simd, const V: usize>(group: *const u8, sub: *const u8) -> ([S::F; V], [S::F; V]) {
        // SAFETY: a group of this format and one of its sub-blocks.
        unsafe {
            let (d, m) = (halves::<S, V>(group), halves::<S, V>(group.add(HALVES)));
            let scale = lanes!(S, V, v => S::mul(d[v], S::load_u8(sub.add(v * S::LANES))));
            let min = lanes!(S, V, v => S::mul(m[v], S::load_u8(sub.add(PANEL + v * S::LANES))));
            (scale, min)
        }
    }
}

impl Format for Q4K {
    const K: usize = 256;
    const BYTES: usize = 2 * HALVES + 8 * Self::SUB;
    const RAW: usize = 144;

    fn pack(raw: &[u8], lane: usize, group: &mut [u8]) {
        group[lane * 2..][..2].copy_from_slice(&raw[..2]);
        group[HALVES + lane * 2..][..2].copy_from_slice(&raw[2..4]);
        for j in 0..8 {
            let sub = &mut group[2 * HALVES + j * Self::SUB..][..Self::SUB];
            let (scale, min) = q4_k_scale_min(&raw[4..16], j);
            sub[lane] = scale;
            sub[PANEL + lane] = min;
            let codes = &raw[16 + j / 2 * 32..][..32];
            let code = |k: usize| if j % 2 == 0 { codes[k] & 15 } else { codes[k] >> 4 };
            put_nibbles(code, lane, &mut sub[2 * PANEL..]);
        }
    }

    fn unpack_lane(group: &[u8], lane: usize, out: &mut [f32]) {
        let (d, m) = (half_at(group, lane * 2), half_at(group, HALVES + lane * 2));
        for (k, out) in out.iter_mut().enumerate() {
            let sub = &group[2 * HALVES + k / 32 * Self::SUB..][..Self::SUB];
            let (scale, min) = (d * f32::from(sub[lane]), m * f32::from(sub[PANEL + lane]));
            *out = scale * f32::from(nibble_at(&sub[2 * PANEL..], lane, k % 32)) - min;
        }
    }

    #[inline(always)]
    unsafe fn product<S: Simd, const V: usize, const R: usize>(
        group: *const u8,
        x: &[*const f32; R],
        sums: &[*const f32; R],
        acc: &mut [[S::F; V]; R],
    ) {
        // SAFETY: the trait's contract.
        unsafe {
            for j in 0..8 {
                let sub = group.add(2 * HALVES + j * Self::SUB);
                let (scale, min) = Self::scales::<S, V>(group, sub);
                let mut part = zeros::<S, V, R>();
                nibble_product::<S, V, R>(sub.add(2 * PANEL), x, j * 32, &mut part);
                add_scaled::<S, V, R>(acc, &part, &scale);
                let sum: [[S::F; V]; R] =
                    lanes!([[S::splat(0.0); V]; R], r => [S::splat(-sum32(sums[r].add(j * 32 / SUM))); V]);
                add_scaled::<S, V, R>(acc, &sum, &min);
            }
        }
    }

    #[inline(always)]
    unsafe fn unpack<S: Simd, const V: usize>(group: *const u8, out: *mut f32) {
        // SAFETY: the trait's contract.
        unsafe {
            for j in 0..8 {
                let sub = group.add(2 * HALVES + j * Self::SUB);
                let (scale, min) = Self::scales::<S, V>(group, sub);
                let min = lanes!(S, V, v => S::mul(min[v], S::splat(-1.0)));
                nibble_unpack::<S, V>(sub.add(2 * PANEL), scale, min, out.add(j * 32 * PANEL));
            }
        }
    }
}

/// d f16 `[32]`, then 8 sub-blocks of 32: scales i8 `[2][32]` of 16 k each, 4
/// lines of low nibbles, 2 lines of high bits (bits 2l of the first belong to
/// the low nibbles of line l, of the second to the high ones). Offset 32.
pub(super) struct Q6K;

impl Q6K {
    pub(super) const SUB: usize = 2 * PANEL + NIBBLES + 2 * LINE;
    const HIGH: usize = 2 * PANEL + NIBBLES;

    fn code(sub: &[u8], lane: usize, k: usize) -> u8 {
        let high = sub[Self::HIGH + k / 16 * LINE + lane * 4 + k % 4] >> (2 * (k % 16 / 4)) & 3;
        nibble_at(&sub[2 * PANEL..], lane, k) | high << 4
    }

    /// Four codes a lane: k = `16 · half + 4 · line ..` of a sub-block.
    #[inline(always)]
    pub(super) unsafe fn codes<S: Simd>(sub: *const u8, half: usize, line: usize, v: usize) -> S::I {
        // SAFETY: a sub-block of this format.
        unsafe {
            let low = S::load_i(sub.add(2 * PANEL + line * LINE).cast::<u32>().add(v * S::LANES));
            let high = S::load_i(sub.add(Self::HIGH + half * LINE).cast::<u32>().add(v * S::LANES));
            let low = S::and(S::shr(low, 4 * half as u32), S::splat_i(0x0f0f_0f0f));
            let high = S::and(S::shr(high, 2 * line as u32), S::splat_i(0x0303_0303));
            S::or(low, S::shl(high, 4))
        }
    }

    #[inline(always)]
    unsafe fn scale<S: Simd, const V: usize>(group: *const u8, sub: *const u8, half: usize) -> [S::F; V] {
        // SAFETY: a group of this format and one of its sub-blocks.
        unsafe {
            let d = halves::<S, V>(group);
            lanes!(S, V, v => S::mul(d[v], S::load_i8(sub.add(half * PANEL + v * S::LANES).cast())))
        }
    }
}

impl Format for Q6K {
    const K: usize = 256;
    const BYTES: usize = HALVES + 8 * Self::SUB;
    const RAW: usize = 210;

    fn pack(raw: &[u8], lane: usize, group: &mut [u8]) {
        group[lane * 2..][..2].copy_from_slice(&raw[208..210]);
        for j in 0..8 {
            let sub = &mut group[HALVES + j * Self::SUB..][..Self::SUB];
            sub[lane] = raw[192 + 2 * j];
            sub[PANEL + lane] = raw[192 + 2 * j + 1];
            put_nibbles(|k| q6_k_code(raw, 32 * j + k) & 15, lane, &mut sub[2 * PANEL..]);
            for k in 0..32 {
                let high = q6_k_code(raw, 32 * j + k) >> 4;
                sub[Self::HIGH + k / 16 * LINE + lane * 4 + k % 4] |= high << (2 * (k % 16 / 4));
            }
        }
    }

    fn unpack_lane(group: &[u8], lane: usize, out: &mut [f32]) {
        let d = half_at(group, lane * 2);
        for (k, out) in out.iter_mut().enumerate() {
            let sub = &group[HALVES + k / 32 * Self::SUB..][..Self::SUB];
            let scale = d * f32::from(sub[k % 32 / 16 * PANEL + lane] as i8);
            *out = scale * (f32::from(Self::code(sub, lane, k % 32)) - 32.0);
        }
    }

    #[inline(always)]
    unsafe fn product<S: Simd, const V: usize, const R: usize>(
        group: *const u8,
        x: &[*const f32; R],
        sums: &[*const f32; R],
        acc: &mut [[S::F; V]; R],
    ) {
        // SAFETY: the trait's contract.
        unsafe {
            for run in 0..16 {
                let (j, half) = (run / 2, run % 2);
                let sub = group.add(HALVES + j * Self::SUB);
                let mut part = zeros::<S, V, R>();
                for r in 0..R {
                    part[r] = [S::splat(-32.0 * *sums[r].add(run * 16 / SUM)); V];
                }
                for line in 0..4 {
                    for v in 0..V {
                        let codes = Self::codes::<S>(sub, half, line, v);
                        for i in 0..4 {
                            let code = S::to_f(S::and(S::shr(codes, 8 * i as u32), S::splat_i(0xff)));
                            for r in 0..R {
                                let x = S::splat(*x[r].add(run * 16 + line * 4 + i));
                                part[r][v] = S::fma(code, x, part[r][v]);
                            }
                        }
                    }
                }
                add_scaled::<S, V, R>(acc, &part, &Self::scale::<S, V>(group, sub, half));
            }
        }
    }

    #[inline(always)]
    unsafe fn unpack<S: Simd, const V: usize>(group: *const u8, out: *mut f32) {
        // SAFETY: the trait's contract.
        unsafe {
            for run in 0..16 {
                let (j, half) = (run / 2, run % 2);
                let sub = group.add(HALVES + j * Self::SUB);
                let scale = Self::scale::<S, V>(group, sub, half);
                for line in 0..4 {
                    for v in 0..V {
                        let codes = Self::codes::<S>(sub, half, line, v);
                        for i in 0..4 {
                            let code = S::to_f(S::and(S::shr(codes, 8 * i as u32), S::splat_i(0xff)));
                            let w = S::mul(S::sub(code, S::splat(32.0)), scale[v]);
                            S::store(out.add((run * 16 + line * 4 + i) * PANEL + v * S::LANES), w);
                        }
                    }
                }
            }
        }
    }
}
