//! Products of many rows on the processor's matrix unit (AMX), in [`Math::Fast`]
//! only: activations and weights rounded to bf16, sums in f32. bf16 weights are
//! used where they lie; others are widened and rounded a panel at a time.
//!
//! [`Math::Fast`]: super::Math::Fast
#![allow(unsafe_code)]

use std::ops::Range;

use super::format::Format;
use super::matrix::{Segment, with_format};
use super::row_kernels::to_bf16;
use super::simd::{Kernel, PANEL, Simd};
use crate::device::tensor::DType;

/// Rows of a tile.
pub(super) const TILE: usize = 16;
/// Input features of a tile.
pub(super) const DEPTH: usize = 32;
/// Input features that are widened at a time; a multiple of every group.
const WIDE: usize = 256;

/// u16 elements of `rows` × `cols` packed activations.
pub(super) fn packed_len(rows: usize, cols: usize) -> usize {
    rows.next_multiple_of(TILE) * cols.next_multiple_of(DEPTH)
}

/// Bytes of a thread's scratch for `cols` input features.
pub(super) fn scratch(cols: usize) -> usize {
    WIDE * PANEL * 4 + cols.next_multiple_of(WIDE) * PANEL * 2 + 2 * TILE * PANEL * 4
}

/// Asks the system once for the use of the tiles; whether they may be used.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub(super) fn available() -> bool {
    use std::sync::OnceLock;
    static GRANTED: OnceLock<bool> = OnceLock::new();
    const REQUEST_PERMISSION: libc::c_long = 0x1023;
    const TILE_DATA: libc::c_long = 18;
    const LEAF: u32 = 7;
    const BITS: u32 = 1 << 22 | 1 << 24;
    *GRANTED.get_or_init(|| {
        let highest = std::arch::x86_64::__cpuid(0).eax;
        highest >= LEAF
            && std::arch::x86_64::__cpuid_count(LEAF, 0).edx & BITS == BITS
            // SAFETY: it changes nothing but what this process may use.
            && unsafe { libc::syscall(libc::SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) } == 0
    })
}

/// There is none elsewhere.
#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
pub(super) fn available() -> bool {
    false
}

/// Rounds one tile row of activations: `cols` from `x`, zeros to the end.
pub(super) struct PackTile {
    /// First row and column.
    pub x: *const f32,
    pub x_stride: usize,
    /// 1 ..= TILE.
    pub rows: usize,
    /// All of the row's columns.
    pub cols: usize,
    /// `[cols / DEPTH][TILE][DEPTH]`, rounded up.
    pub out: *mut u16,
}

impl Kernel for PackTile {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Simd, const V: usize>(self) {
        for k in (0..self.cols).step_by(DEPTH) {
            let cols = DEPTH.min(self.cols - k);
            for row in 0..TILE {
                // SAFETY: the tile has room, and the row and columns exist.
                unsafe {
                    let out = self.out.add((k / DEPTH * TILE + row) * DEPTH);
                    if row < self.rows && cols == DEPTH {
                        let x = self.x.add(row * self.x_stride + k);
                        for i in 0..DEPTH {
                            *out.add(i) = to_bf16(*x.add(i));
                        }
                    } else {
                        for i in 0..DEPTH {
                            let inside = row < self.rows && i < cols;
                            *out.add(i) = if inside { to_bf16(*self.x.add(row * self.x_stride + k + i)) } else { 0 };
                        }
                    }
                }
            }
        }
    }
}

/// `out (+)= x · Wᵀ (+ bias)` over some panels of a segment.
pub(super) struct AmxGemm<'a> {
    pub segment: &'a Segment,
    pub panels: Range<usize>,
    /// `[tiles][depths][TILE][DEPTH]` bf16.
    pub x: *const u16,
    pub rows: usize,
    pub cols: usize,
    /// `[rows, outs of the matrix]`, rows `out_stride` apart.
    pub out: *mut f32,
    pub out_stride: usize,
    /// Of all outs of the matrix.
    pub bias: Option<&'a [f32]>,
    /// Add to `out` what is there.
    pub add: bool,
    /// [`scratch`] bytes of this thread, on a cache line.
    pub scratch: *mut u8,
}

impl Kernel for AmxGemm<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Simd, const V: usize>(self) {
        let depths = self.cols.div_ceil(DEPTH);
        let wide = self.scratch.cast::<f32>();
        let rounded = self.scratch.wrapping_add(WIDE * PANEL * 4);
        let sums = rounded.wrapping_add(self.cols.next_multiple_of(WIDE) * PANEL * 2).cast::<f32>();
        // SAFETY: the fields are as they say; the tiles were granted.
        unsafe {
            tiles::configure();
            for panel in self.panels.clone() {
                let mut weights = self.segment.panel(panel).as_ptr();
                if self.segment.dtype != DType::Bf16 || !self.cols.is_multiple_of(DEPTH) {
                    with_format!(self.segment.dtype, F => self.round::<F, S, V>(weights, wide, rounded.cast()));
                    weights = rounded;
                }
                for row in (0..self.rows).step_by(2 * TILE) {
                    let first = self.x.add(row * depths * DEPTH);
                    let two = row + TILE < self.rows;
                    let second = if two { first.add(TILE * depths * DEPTH) } else { first };
                    tiles::product(first, second, weights, depths, sums);
                    self.store(panel, row, sums);
                }
            }
            tiles::release();
        }
    }
}

impl AmxGemm<'_> {
    /// A panel's weights as bf16 in pairs along k, zeros to a whole depth.
    #[inline(always)]
    unsafe fn round<F: Format, S: Simd, const V: usize>(&self, weights: *const u8, wide: *mut f32, out: *mut u32) {
        for k in (0..self.cols).step_by(WIDE) {
            let cols = WIDE.min(self.cols - k);
            // SAFETY: scratch has room for WIDE features, and for all rounded.
            unsafe {
                for g in 0..cols.div_ceil(F::K) {
                    let group = weights.add((k / F::K + g) * F::BYTES);
                    F::unpack::<S, V>(group, wide.add(g * F::K * PANEL));
                }
                for i in cols * PANEL..cols.next_multiple_of(DEPTH) * PANEL {
                    *wide.add(i) = 0.0;
                }
                for pair in 0..cols.next_multiple_of(DEPTH) / 2 {
                    let from = wide.add(2 * pair * PANEL);
                    let to = out.add((k / 2 + pair) * PANEL);
                    for i in 0..PANEL {
                        let (even, odd) = (to_bf16(*from.add(i)), to_bf16(*from.add(PANEL + i)));
                        *to.add(i) = u32::from(even) | u32::from(odd) << 16;
                    }
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn store(&self, panel: usize, row: usize, sums: *const f32) {
        let first = self.segment.first + panel * PANEL;
        let outs = self.segment.panel_outs(panel);
        for r in 0..(2 * TILE).min(self.rows - row) {
            // SAFETY: these rows and features exist and are this panel's.
            unsafe {
                let out = self.out.add((row + r) * self.out_stride + first);
                let sums = sums.add(r * PANEL);
                for i in 0..outs {
                    let mut sum = *sums.add(i);
                    if let Some(bias) = self.bias {
                        sum += *bias.get_unchecked(first + i);
                    }
                    *out.add(i) = if self.add { *out.add(i) + sum } else { sum };
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod tiles {
    use std::arch::asm;

    /// All eight tiles: 16 rows of 64 bytes.
    #[repr(align(64))]
    struct Config([u8; 64]);

    static CONFIG: Config = {
        let mut bytes = [0; 64];
        bytes[0] = 1;
        let mut tile = 0;
        while tile < 8 {
            bytes[16 + 2 * tile] = 64;
            bytes[48 + tile] = 16;
            tile += 1;
        }
        Config(bytes)
    };

    /// # Safety
    /// The tiles are granted.
    #[inline(always)]
    pub unsafe fn configure() {
        // SAFETY: as promised; the configuration is 64 valid bytes.
        unsafe { asm!("ldtilecfg [{}]", in(reg) CONFIG.0.as_ptr(), options(nostack, readonly)) };
    }

    /// # Safety
    /// The tiles are configured.
    #[inline(always)]
    pub unsafe fn release() {
        // SAFETY: as promised.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }

    /// `sums[32][32] = x · w`: two tiles of rows by one panel.
    ///
    /// # Safety
    /// The tiles are configured; `first` and `second` have `depths` tiles of
    /// 1024 bytes, `weights` `depths` runs of 2048.
    #[inline(always)]
    pub unsafe fn product(first: *const u16, second: *const u16, weights: *const u8, depths: usize, sums: *mut f32) {
        // SAFETY: as promised.
        unsafe {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "2:",
                "tileloadd tmm4, [{a} + {s64}*1]",
                "tileloadd tmm6, [{w} + {s128}*1]",
                "tileloadd tmm7, [{w} + {s128}*1 + 64]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm5, [{b} + {s64}*1]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {a}, 1024",
                "add {b}, 1024",
                "add {w}, 2048",
                "dec {n}",
                "jnz 2b",
                "tilestored [{c} + {s128}*1], tmm0",
                "tilestored [{c} + {s128}*1 + 64], tmm1",
                "tilestored [{c} + {s128}*1 + 2048], tmm2",
                "tilestored [{c} + {s128}*1 + 2112], tmm3",
                a = inout(reg) first => _,
                b = inout(reg) second => _,
                w = inout(reg) weights => _,
                n = inout(reg) depths => _,
                c = in(reg) sums,
                s64 = in(reg) 64usize,
                s128 = in(reg) 128usize,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod tiles {
    // Never called: `available` is false.
    pub unsafe fn configure() {}
    pub unsafe fn release() {}
    pub unsafe fn product(_: *const u16, _: *const u16, _: *const u8, _: usize, _: *mut f32) {}
}
