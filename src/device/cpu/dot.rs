//! Sums of products of 8-bit integers, four neighbours along k to a 32-bit
//! lane: AVX-512 VNNI, AVX-VNNI, AVX2, and plain arrays as their oracle. The
//! sums are of integers, so all of them are the same ones.
#![allow(unsafe_code)]
// Every method states its contract once, at the trait.
#![allow(clippy::missing_safety_doc, clippy::undocumented_unsafe_blocks)]

use super::simd::{Isa, Plain, Simd};

/// Instructions that there are integer kernels for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DotIsa {
    /// AVX-512 with its VNNI.
    Avx512Vnni,
    /// AVX2 with the VNNI of 256 bits.
    AvxVnni,
    /// AVX2: pairs in 16 bits first.
    Avx2,
    /// The oracle. Never chosen: plain loops gain nothing over f32.
    #[cfg_attr(not(test), allow(dead_code))]
    Plain,
}

impl DotIsa {
    /// The best one that goes with `isa`, if any does.
    pub fn of(isa: Isa) -> Option<Self> {
        let candidates: &[Self] = match isa {
            Isa::Avx512 => &[Self::Avx512Vnni, Self::AvxVnni, Self::Avx2],
            Isa::Avx2 => &[Self::AvxVnni, Self::Avx2],
            Isa::Portable => &[],
        };
        candidates.iter().copied().find(|d| d.available())
    }

    /// Whether this processor has it.
    pub fn available(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni => Isa::Avx512.available() && std::is_x86_feature_detected!("avx512vnni"),
            #[cfg(target_arch = "x86_64")]
            Self::AvxVnni => Isa::Avx2.available() && std::is_x86_feature_detected!("avxvnni"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => Isa::Avx2.available(),
            #[cfg(not(target_arch = "x86_64"))]
            Self::Avx512Vnni | Self::AvxVnni | Self::Avx2 => false,
            Self::Plain => true,
        }
    }
}

/// A vector of 32-bit lanes.
pub(super) type I<D> = <<D as Dot>::S as Simd>::I;

/// Products of a vector of four unsigned codes a lane and one of four signed
/// activations in −127 ..= 127 a lane.
///
/// # Safety
/// All methods: the instructions are available (a [`DotKernel`] runs under
/// [`dispatch_dot`], which sees to it).
pub(super) trait Dot: Copy + Send + Sync + 'static {
    /// The vectors.
    type S: Simd;

    unsafe fn add(a: I<Self>, b: I<Self>) -> I<Self>;
    /// Adds products of codes to `acc`, which starts as zeros and means nothing
    /// before [`whole`](Self::whole). Up to 8 calls with codes of 4 bits, 2 with
    /// codes of 6 bits: beyond that 16 bits may overflow.
    unsafe fn small(acc: I<Self>, codes: I<Self>, x: I<Self>) -> I<Self>;
    /// The sums of [`small`](Self::small) as 32-bit integers.
    unsafe fn whole(acc: I<Self>) -> I<Self>;
    /// What sums of [`bytes`](Self::bytes) start as, `sum` being that of all
    /// their activations.
    unsafe fn bytes_start(sum: i32) -> I<Self>;
    /// Adds products of codes less 128.
    unsafe fn bytes(acc: I<Self>, codes: I<Self>, x: I<Self>) -> I<Self>;
}

/// A loop to be compiled for each of [`DotIsa`].
pub(super) trait DotKernel {
    /// `V` vectors make a panel.
    ///
    /// # Safety
    /// As [`Dot`]; and what the kernel's own fields promise. Must be
    /// `#[inline(always)]`, or it is compiled without the instruction set.
    unsafe fn run<D: Dot, const V: usize>(self);
}

/// Runs `kernel` with `isa`.
///
/// # Safety
/// `isa` is available, and the kernel's own contract holds.
#[inline]
pub(super) unsafe fn dispatch_dot<K: DotKernel>(isa: DotIsa, kernel: K) {
    match isa {
        #[cfg(target_arch = "x86_64")]
        DotIsa::Avx512Vnni => unsafe { x86::run_avx512_vnni(kernel) },
        #[cfg(target_arch = "x86_64")]
        DotIsa::AvxVnni => unsafe { x86::run_avx_vnni(kernel) },
        #[cfg(target_arch = "x86_64")]
        DotIsa::Avx2 => unsafe { x86::run_avx2(kernel) },
        _ => unsafe { kernel.run::<PlainDot, 4>() },
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::super::simd::x86::{Avx2, Avx512};
    use super::{Dot, DotKernel};

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,bmi2")]
    pub unsafe fn run_avx512_vnni<K: DotKernel>(kernel: K) {
        unsafe { kernel.run::<Avx512Vnni, 2>() }
    }

    #[target_feature(enable = "avx2,avxvnni,fma,f16c")]
    pub unsafe fn run_avx_vnni<K: DotKernel>(kernel: K) {
        unsafe { kernel.run::<AvxVnni, 4>() }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    pub unsafe fn run_avx2<K: DotKernel>(kernel: K) {
        unsafe { kernel.run::<Avx2Dot, 4>() }
    }

    /// Four products and the sum in one instruction, without saturation.
    macro_rules! vnni {
        ($name:ident, $simd:ident, $i:ident, $add:ident, $splat:ident, $dot:ident) => {
            #[derive(Clone, Copy)]
            pub struct $name;

            impl Dot for $name {
                type S = $simd;

                #[inline(always)]
                unsafe fn add(a: $i, b: $i) -> $i {
                    unsafe { $add(a, b) }
                }
                #[inline(always)]
                unsafe fn small(acc: $i, codes: $i, x: $i) -> $i {
                    unsafe { $dot(acc, codes, x) }
                }
                #[inline(always)]
                unsafe fn whole(acc: $i) -> $i {
                    acc
                }
                #[inline(always)]
                unsafe fn bytes_start(sum: i32) -> $i {
                    unsafe { $splat(-128 * sum) }
                }
                #[inline(always)]
                unsafe fn bytes(acc: $i, codes: $i, x: $i) -> $i {
                    unsafe { $dot(acc, codes, x) }
                }
            }
        };
    }

    vnni!(Avx512Vnni, Avx512, __m512i, _mm512_add_epi32, _mm512_set1_epi32, _mm512_dpbusd_epi32);
    vnni!(AvxVnni, Avx2, __m256i, _mm256_add_epi32, _mm256_set1_epi32, _mm256_dpbusd_avx_epi32);

    #[derive(Clone, Copy)]
    pub struct Avx2Dot;

    impl Dot for Avx2Dot {
        type S = Avx2;

        #[inline(always)]
        unsafe fn add(a: __m256i, b: __m256i) -> __m256i {
            unsafe { _mm256_add_epi32(a, b) }
        }
        #[inline(always)]
        unsafe fn small(acc: __m256i, codes: __m256i, x: __m256i) -> __m256i {
            // 8 · 2 · 15 · 127 and 2 · 2 · 63 · 127 are below 2^15.
            unsafe { _mm256_add_epi16(acc, _mm256_maddubs_epi16(codes, x)) }
        }
        #[inline(always)]
        unsafe fn whole(acc: __m256i) -> __m256i {
            unsafe { _mm256_madd_epi16(acc, _mm256_set1_epi16(1)) }
        }
        #[inline(always)]
        unsafe fn bytes_start(_: i32) -> __m256i {
            unsafe { _mm256_setzero_si256() }
        }
        #[inline(always)]
        unsafe fn bytes(acc: __m256i, codes: __m256i, x: __m256i) -> __m256i {
            unsafe {
                // |w| · (x with w's sign): 2 · 128 · 127 is below 2^15, where
                // 2 · 255 · 127 is not.
                let w = _mm256_xor_si256(codes, _mm256_set1_epi8(-128));
                let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
                _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
            }
        }
    }
}

/// Arrays of eight.
#[derive(Clone, Copy)]
pub(super) struct PlainDot;

/// Adds each lane's four products of `codes − offset` and `x`.
fn plain(acc: [u32; 8], codes: [u32; 8], x: [u32; 8], offset: i32) -> [u32; 8] {
    std::array::from_fn(|i| {
        let products = codes[i].to_le_bytes().into_iter().zip(x[i].to_le_bytes());
        let sum: i32 = products.map(|(code, x)| (i32::from(code) - offset) * i32::from(x as i8)).sum();
        acc[i].wrapping_add(sum as u32)
    })
}

impl Dot for PlainDot {
    type S = Plain;

    #[inline(always)]
    unsafe fn add(a: [u32; 8], b: [u32; 8]) -> [u32; 8] {
        std::array::from_fn(|i| a[i].wrapping_add(b[i]))
    }
    #[inline(always)]
    unsafe fn small(acc: [u32; 8], codes: [u32; 8], x: [u32; 8]) -> [u32; 8] {
        plain(acc, codes, x, 0)
    }
    #[inline(always)]
    unsafe fn whole(acc: [u32; 8]) -> [u32; 8] {
        acc
    }
    #[inline(always)]
    unsafe fn bytes_start(_: i32) -> [u32; 8] {
        [0; 8]
    }
    #[inline(always)]
    unsafe fn bytes(acc: [u32; 8], codes: [u32; 8], x: [u32; 8]) -> [u32; 8] {
        plain(acc, codes, x, 128)
    }
}
