//! The few vector operations that the kernels are written in, for AVX-512,
//! AVX2 with FMA, and plain arrays: one source for each kernel, compiled three
//! times and chosen at run time.
#![allow(unsafe_code)]
// Every method states its contract once, at the trait; a comment at each of
// the intrinsics would only repeat it.
#![allow(clippy::missing_safety_doc, clippy::undocumented_unsafe_blocks)]

use crate::device::{DeviceError, Result};
use crate::e4m3;

/// Instruction sets that there are kernels for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// AVX2, FMA and F16C.
    Avx2,
    /// Whatever the compiler makes of plain loops.
    Portable,
}

impl Isa {
    /// Whether this processor has it.
    pub fn available(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                Self::Avx2.available()
                    && std::is_x86_feature_detected!("avx512f")
                    && std::is_x86_feature_detected!("avx512bw")
                    && std::is_x86_feature_detected!("avx512dq")
                    && std::is_x86_feature_detected!("avx512vl")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => {
                std::is_x86_feature_detected!("avx2")
                    && std::is_x86_feature_detected!("fma")
                    && std::is_x86_feature_detected!("f16c")
            }
            #[cfg(not(target_arch = "x86_64"))]
            Self::Avx512 | Self::Avx2 => false,
            Self::Portable => true,
        }
    }

    /// The best one here, or the one that `DISTKV_CPU_ISA` names.
    pub fn detect() -> Result<Self> {
        let Some(name) = std::env::var_os("DISTKV_CPU_ISA") else {
            return Ok([Self::Avx512, Self::Avx2].into_iter().find(|i| i.available()).unwrap_or(Self::Portable));
        };
        match name.to_str() {
            Some("avx512") => Self::Avx512.checked(),
            Some("avx2") => Self::Avx2.checked(),
            Some("portable") => Ok(Self::Portable),
            _ => Err(DeviceError::Unsupported(format!(
                "DISTKV_CPU_ISA is {}; it may be avx512, avx2 or portable",
                name.display()
            ))),
        }
    }

    /// Itself, or why not.
    pub fn checked(self) -> Result<Self> {
        if self.available() {
            return Ok(self);
        }
        Err(DeviceError::Unsupported(format!("{self:?} kernels were asked for, but this processor has no {self:?}")))
    }
}

/// Output features that weights are packed together for, and query lanes of
/// prefill attention.
pub(super) const PANEL: usize = 32;

/// Vectors of [`LANES`](Self::LANES) f32 (`F`) or 32-bit integers (`I`).
///
/// # Safety
/// All methods: the instruction set is available (a [`Kernel`] runs under
/// [`dispatch`], which sees to it), and pointers are valid for the elements
/// named, with no alignment needed.
pub(super) trait Simd: Copy + Send + Sync + 'static {
    const LANES: usize;
    /// Whether it is arrays only.
    const PLAIN: bool = false;
    type F: Copy;
    type I: Copy;

    unsafe fn splat(x: f32) -> Self::F;
    unsafe fn load(p: *const f32) -> Self::F;
    unsafe fn store(p: *mut f32, x: Self::F);
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F;
    /// `a · b + c`.
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn min(a: Self::F, b: Self::F) -> Self::F;
    /// To the nearest whole number.
    unsafe fn round(a: Self::F) -> Self::F;
    /// `2^n` of whole `n` in −127 ..= 127; 0 for −127.
    unsafe fn pow2(n: Self::F) -> Self::F;
    /// `LANES` f16.
    unsafe fn load_f16(p: *const u16) -> Self::F;
    /// Rounds to nearest even.
    unsafe fn store_f16(p: *mut u16, x: Self::F);
    /// `LANES` bf16.
    unsafe fn load_bf16(p: *const u16) -> Self::F;
    /// `LANES` numbers of [`e4m3`](crate::e4m3); the bytes that are none become 480.
    unsafe fn load_e4m3(p: *const u8) -> Self::F;
    /// `LANES` bytes, 0 ..= 255.
    unsafe fn load_u8(p: *const u8) -> Self::F;
    /// `LANES` bytes, −128 ..= 127.
    unsafe fn load_i8(p: *const i8) -> Self::F;
    /// Sum of vector `i` in lane `i`, of the first `LANES` vectors.
    unsafe fn sums(v: &[Self::F; 16]) -> Self::F;

    unsafe fn load_i(p: *const u32) -> Self::I;
    unsafe fn splat_i(x: u32) -> Self::I;
    unsafe fn shr(a: Self::I, bits: u32) -> Self::I;
    unsafe fn shl(a: Self::I, bits: u32) -> Self::I;
    /// Keeps the sign.
    unsafe fn sra(a: Self::I, bits: u32) -> Self::I;
    unsafe fn xor(a: Self::I, b: Self::I) -> Self::I;
    unsafe fn and(a: Self::I, b: Self::I) -> Self::I;
    unsafe fn or(a: Self::I, b: Self::I) -> Self::I;
    /// Signed integers to f32.
    unsafe fn to_f(a: Self::I) -> Self::F;
    /// The low four bits to f32.
    unsafe fn nibble(a: Self::I) -> Self::F;
    /// The bits as they are.
    unsafe fn as_f(a: Self::I) -> Self::F;
    /// `x` where unsigned `a ≤ b` and `b − a < span`, otherwise `y`; `a` and
    /// `b` below 2^31.
    unsafe fn select_within(a: Self::I, b: Self::I, span: Self::I, x: Self::F, y: Self::F) -> Self::F;
    /// Asks for the cache line at `p`, which need not be valid.
    unsafe fn prefetch(p: *const u8);

    /// Sum of the lanes.
    #[inline(always)]
    unsafe fn sum(a: Self::F) -> f32 {
        let mut lanes = [0.0f32; 16];
        unsafe { Self::store(lanes.as_mut_ptr(), a) };
        let mut half = Self::LANES / 2;
        while half > 0 {
            for i in 0..half {
                lanes[i] += lanes[i + half];
            }
            half /= 2;
        }
        lanes[0]
    }

    /// Largest lane.
    #[inline(always)]
    unsafe fn largest(a: Self::F) -> f32 {
        let mut lanes = [f32::NEG_INFINITY; 16];
        unsafe { Self::store(lanes.as_mut_ptr(), a) };
        lanes.iter().copied().fold(f32::NEG_INFINITY, f32::max)
    }

    /// `2^x` within 2 ulp for x ≤ 126; 0 below −126.5.
    #[inline(always)]
    unsafe fn exp2(x: Self::F) -> Self::F {
        unsafe {
            let x = Self::min(Self::max(x, Self::splat(-127.0)), Self::splat(126.0));
            let n = Self::round(x);
            let f = Self::sub(x, n);
            let mut p = Self::splat(1.540_353_1e-4);
            for c in [1.333_355_8e-3, 9.618_129e-3, 5.550_411e-2, 2.402_265e-1, 6.931_472e-1, 1.0] {
                p = Self::fma(p, f, Self::splat(c));
            }
            Self::mul(p, Self::pow2(n))
        }
    }
}

/// An array of vectors, one expression each. What `array::from_fn` does, without
/// the closure: a closure does not inherit its function's instruction set.
macro_rules! lanes {
    ($S:ident, $n:expr, $i:ident => $body:expr) => {
        lanes!([$S::splat(0.0); $n], $i => $body)
    };
    ($start:expr, $i:ident => $body:expr) => {{
        let mut all = $start;
        for $i in 0..all.len() {
            all[$i] = $body;
        }
        all
    }};
}
pub(super) use lanes;

/// A loop to be compiled for each instruction set.
pub(super) trait Kernel {
    type Out;
    /// `V` vectors make a panel.
    ///
    /// # Safety
    /// As [`Simd`]; and what the kernel's own fields promise. Must be
    /// `#[inline(always)]`, or it is compiled without the instruction set.
    unsafe fn run<S: Simd, const V: usize>(self) -> Self::Out;
}

/// Runs `kernel` with `isa`.
///
/// # Safety
/// `isa` is available, and the kernel's own contract holds.
#[inline]
pub(super) unsafe fn dispatch<K: Kernel>(isa: Isa, kernel: K) -> K::Out {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { x86::run_avx512(kernel) },
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { x86::run_avx2(kernel) },
        _ => unsafe { kernel.run::<Plain, 4>() },
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) mod x86 {
    use std::arch::x86_64::*;

    use super::{Kernel, Simd};
    use crate::e4m3;

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2")]
    pub unsafe fn run_avx512<K: Kernel>(kernel: K) -> K::Out {
        unsafe { kernel.run::<Avx512, 2>() }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    pub unsafe fn run_avx2<K: Kernel>(kernel: K) -> K::Out {
        unsafe { kernel.run::<Avx2, 4>() }
    }

    #[derive(Clone, Copy)]
    pub struct Avx512;

    macro_rules! ops {
        ($($name:ident($($arg:ident: $ty:ty),*) -> $out:ty = $body:expr;)*) => {
            $(#[inline(always)]
            unsafe fn $name($($arg: $ty),*) -> $out {
                unsafe { $body }
            })*
        };
    }

    impl Simd for Avx512 {
        const LANES: usize = 16;
        type F = __m512;
        type I = __m512i;

        ops! {
            splat(x: f32) -> __m512 = _mm512_set1_ps(x);
            load(p: *const f32) -> __m512 = _mm512_loadu_ps(p);
            store(p: *mut f32, x: __m512) -> () = _mm512_storeu_ps(p, x);
            add(a: __m512, b: __m512) -> __m512 = _mm512_add_ps(a, b);
            sub(a: __m512, b: __m512) -> __m512 = _mm512_sub_ps(a, b);
            mul(a: __m512, b: __m512) -> __m512 = _mm512_mul_ps(a, b);
            div(a: __m512, b: __m512) -> __m512 = _mm512_div_ps(a, b);
            fma(a: __m512, b: __m512, c: __m512) -> __m512 = _mm512_fmadd_ps(a, b, c);
            max(a: __m512, b: __m512) -> __m512 = _mm512_max_ps(a, b);
            min(a: __m512, b: __m512) -> __m512 = _mm512_min_ps(a, b);
            round(a: __m512) -> __m512 = _mm512_roundscale_ps::<0x08>(a);
            pow2(n: __m512) -> __m512 = {
                let n = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
                _mm512_castsi512_ps(_mm512_slli_epi32::<23>(n))
            };
            load_f16(p: *const u16) -> __m512 = _mm512_cvtph_ps(p.cast::<__m256i>().read_unaligned());
            store_f16(p: *mut u16, x: __m512) -> () = {
                p.cast::<__m256i>().write_unaligned(_mm512_cvtps_ph::<0x00>(x))
            };
            load_bf16(p: *const u16) -> __m512 = {
                let x = _mm512_cvtepu16_epi32(p.cast::<__m256i>().read_unaligned());
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(x))
            };
            load_e4m3(p: *const u8) -> __m512 = {
                let x = _mm512_cvtepi8_epi32(p.cast::<__m128i>().read_unaligned());
                // The sign is all the high bits; the shift brings the others into place.
                let x = _mm512_and_si512(_mm512_slli_epi32::<20>(x), _mm512_set1_epi32(0x87f0_0000u32 as i32));
                _mm512_mul_ps(_mm512_castsi512_ps(x), _mm512_set1_ps(e4m3::SCALE))
            };
            load_u8(p: *const u8) -> __m512 = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(p.cast::<__m128i>().read_unaligned()));
            load_i8(p: *const i8) -> __m512 = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(p.cast::<__m128i>().read_unaligned()));
            load_i(p: *const u32) -> __m512i = p.cast::<__m512i>().read_unaligned();
            splat_i(x: u32) -> __m512i = _mm512_set1_epi32(x as i32);
            and(a: __m512i, b: __m512i) -> __m512i = _mm512_and_si512(a, b);
            or(a: __m512i, b: __m512i) -> __m512i = _mm512_or_si512(a, b);
            xor(a: __m512i, b: __m512i) -> __m512i = _mm512_xor_si512(a, b);
            // A constant count folds into the instruction.
            shr(a: __m512i, bits: u32) -> __m512i = _mm512_srl_epi32(a, _mm_cvtsi32_si128(bits as i32));
            shl(a: __m512i, bits: u32) -> __m512i = _mm512_sll_epi32(a, _mm_cvtsi32_si128(bits as i32));
            sra(a: __m512i, bits: u32) -> __m512i = _mm512_sra_epi32(a, _mm_cvtsi32_si128(bits as i32));
            to_f(a: __m512i) -> __m512 = _mm512_cvtepi32_ps(a);
            // The permute looks at four bits of each index, so it is mask and
            // conversion in one.
            nibble(a: __m512i) -> __m512 = {
                let table = _mm512_setr_ps(0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.);
                _mm512_permutexvar_ps(a, table)
            };
            as_f(a: __m512i) -> __m512 = _mm512_castsi512_ps(a);
            select_within(a: __m512i, b: __m512i, span: __m512i, x: __m512, y: __m512) -> __m512 = {
                // a > b wraps to a distance that no span exceeds.
                let inside = _mm512_cmplt_epu32_mask(_mm512_sub_epi32(b, a), span);
                _mm512_mask_blend_ps(inside, y, x)
            };
            prefetch(p: *const u8) -> () = _mm_prefetch::<_MM_HINT_T0>(p.cast());
            sum(a: __m512) -> f32 = _mm512_reduce_add_ps(a);
            largest(a: __m512) -> f32 = _mm512_reduce_max_ps(a);
        }

        #[inline(always)]
        unsafe fn sums(v: &[__m512; 16]) -> __m512 {
            // A tree of halves: add the upper to the lower half of each pair's
            // elements, four times, each time with half as many vectors.
            unsafe { across512(across512(quad512(v, 0), quad512(v, 4)), across512(quad512(v, 8), quad512(v, 12))) }
        }
    }

    /// Sums of the 128-bit lanes of four vectors, interleaved.
    #[inline(always)]
    unsafe fn quad512(v: &[__m512; 16], i: usize) -> __m512 {
        unsafe {
            let a = _mm512_add_ps(_mm512_unpacklo_ps(v[i], v[i + 1]), _mm512_unpackhi_ps(v[i], v[i + 1]));
            let b = _mm512_add_ps(_mm512_unpacklo_ps(v[i + 2], v[i + 3]), _mm512_unpackhi_ps(v[i + 2], v[i + 3]));
            let (a, b) = (_mm512_castps_pd(a), _mm512_castps_pd(b));
            let (low, high) = (_mm512_unpacklo_pd(a, b), _mm512_unpackhi_pd(a, b));
            _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high))
        }
    }

    #[inline(always)]
    unsafe fn across512(a: __m512, b: __m512) -> __m512 {
        unsafe {
            let even = _mm512_shuffle_f32x4::<0b10_00_10_00>(a, b);
            let odd = _mm512_shuffle_f32x4::<0b11_01_11_01>(a, b);
            _mm512_add_ps(even, odd)
        }
    }

    #[inline(always)]
    unsafe fn quad256(v: &[__m256; 16], i: usize) -> __m256 {
        unsafe {
            let a = _mm256_add_ps(_mm256_unpacklo_ps(v[i], v[i + 1]), _mm256_unpackhi_ps(v[i], v[i + 1]));
            let b = _mm256_add_ps(_mm256_unpacklo_ps(v[i + 2], v[i + 3]), _mm256_unpackhi_ps(v[i + 2], v[i + 3]));
            let (a, b) = (_mm256_castps_pd(a), _mm256_castps_pd(b));
            let (low, high) = (_mm256_unpacklo_pd(a, b), _mm256_unpackhi_pd(a, b));
            _mm256_add_ps(_mm256_castpd_ps(low), _mm256_castpd_ps(high))
        }
    }

    #[derive(Clone, Copy)]
    pub struct Avx2;

    impl Simd for Avx2 {
        const LANES: usize = 8;
        type F = __m256;
        type I = __m256i;

        ops! {
            splat(x: f32) -> __m256 = _mm256_set1_ps(x);
            load(p: *const f32) -> __m256 = _mm256_loadu_ps(p);
            store(p: *mut f32, x: __m256) -> () = _mm256_storeu_ps(p, x);
            add(a: __m256, b: __m256) -> __m256 = _mm256_add_ps(a, b);
            sub(a: __m256, b: __m256) -> __m256 = _mm256_sub_ps(a, b);
            mul(a: __m256, b: __m256) -> __m256 = _mm256_mul_ps(a, b);
            div(a: __m256, b: __m256) -> __m256 = _mm256_div_ps(a, b);
            fma(a: __m256, b: __m256, c: __m256) -> __m256 = _mm256_fmadd_ps(a, b, c);
            max(a: __m256, b: __m256) -> __m256 = _mm256_max_ps(a, b);
            min(a: __m256, b: __m256) -> __m256 = _mm256_min_ps(a, b);
            round(a: __m256) -> __m256 = _mm256_round_ps::<0x08>(a);
            pow2(n: __m256) -> __m256 = {
                let n = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
                _mm256_castsi256_ps(_mm256_slli_epi32::<23>(n))
            };
            load_f16(p: *const u16) -> __m256 = _mm256_cvtph_ps(p.cast::<__m128i>().read_unaligned());
            store_f16(p: *mut u16, x: __m256) -> () = _mm_storeu_si128(p.cast(), _mm256_cvtps_ph::<0x00>(x));
            load_bf16(p: *const u16) -> __m256 = {
                let x = _mm256_cvtepu16_epi32(p.cast::<__m128i>().read_unaligned());
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(x))
            };
            load_e4m3(p: *const u8) -> __m256 = {
                let x = _mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast()));
                let x = _mm256_and_si256(_mm256_slli_epi32::<20>(x), _mm256_set1_epi32(0x87f0_0000u32 as i32));
                _mm256_mul_ps(_mm256_castsi256_ps(x), _mm256_set1_ps(e4m3::SCALE))
            };
            load_u8(p: *const u8) -> __m256 = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(p.cast())));
            load_i8(p: *const i8) -> __m256 = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast())));
            load_i(p: *const u32) -> __m256i = p.cast::<__m256i>().read_unaligned();
            splat_i(x: u32) -> __m256i = _mm256_set1_epi32(x as i32);
            and(a: __m256i, b: __m256i) -> __m256i = _mm256_and_si256(a, b);
            or(a: __m256i, b: __m256i) -> __m256i = _mm256_or_si256(a, b);
            xor(a: __m256i, b: __m256i) -> __m256i = _mm256_xor_si256(a, b);
            // A constant count folds into the instruction.
            shr(a: __m256i, bits: u32) -> __m256i = _mm256_srl_epi32(a, _mm_cvtsi32_si128(bits as i32));
            shl(a: __m256i, bits: u32) -> __m256i = _mm256_sll_epi32(a, _mm_cvtsi32_si128(bits as i32));
            sra(a: __m256i, bits: u32) -> __m256i = _mm256_sra_epi32(a, _mm_cvtsi32_si128(bits as i32));
            to_f(a: __m256i) -> __m256 = _mm256_cvtepi32_ps(a);
            nibble(a: __m256i) -> __m256 = _mm256_cvtepi32_ps(_mm256_and_si256(a, _mm256_set1_epi32(15)));
            as_f(a: __m256i) -> __m256 = _mm256_castsi256_ps(a);
            select_within(a: __m256i, b: __m256i, span: __m256i, x: __m256, y: __m256) -> __m256 = {
                // Unsigned `distance ≥ span` by a maximum; there is no compare.
                let distance = _mm256_sub_epi32(b, a);
                let outside = _mm256_cmpeq_epi32(_mm256_max_epu32(distance, span), distance);
                _mm256_blendv_ps(x, y, _mm256_castsi256_ps(outside))
            };
            prefetch(p: *const u8) -> () = _mm_prefetch::<_MM_HINT_T0>(p.cast());
        }

        #[inline(always)]
        unsafe fn sums(v: &[__m256; 16]) -> __m256 {
            unsafe {
                let (a, b) = (quad256(v, 0), quad256(v, 4));
                _mm256_add_ps(_mm256_permute2f128_ps::<0x20>(a, b), _mm256_permute2f128_ps::<0x31>(a, b))
            }
        }
    }
}

/// Arrays of eight, for any processor.
#[derive(Clone, Copy)]
pub(super) struct Plain;

#[inline(always)]
fn map<A: Copy, B: Copy, C>(a: [A; 8], b: [B; 8], f: impl Fn(A, B) -> C) -> [C; 8] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

impl Simd for Plain {
    const LANES: usize = 8;
    const PLAIN: bool = true;
    type F = [f32; 8];
    type I = [u32; 8];

    #[inline(always)]
    unsafe fn splat(x: f32) -> [f32; 8] {
        [x; 8]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> [f32; 8] {
        unsafe { p.cast::<[f32; 8]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, x: [f32; 8]) {
        unsafe { p.cast::<[f32; 8]>().write_unaligned(x) }
    }
    #[inline(always)]
    unsafe fn add(a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        map(a, b, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn sub(a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        map(a, b, |a, b| a - b)
    }
    #[inline(always)]
    unsafe fn mul(a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        map(a, b, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn div(a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        map(a, b, |a, b| a / b)
    }
    #[inline(always)]
    unsafe fn fma(a: [f32; 8], b: [f32; 8], c: [f32; 8]) -> [f32; 8] {
        // Two roundings: a fused one without the instruction is a library call.
        map(map(a, b, |a, b| a * b), c, |a, c| a + c)
    }
    #[inline(always)]
    unsafe fn max(a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        map(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    unsafe fn min(a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        map(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    unsafe fn round(a: [f32; 8]) -> [f32; 8] {
        // Adding and taking away 1.5 · 2^23 leaves no room for a fraction.
        const BIG: f32 = 12_582_912.0;
        a.map(|a| (a + BIG) - BIG)
    }
    #[inline(always)]
    unsafe fn pow2(n: [f32; 8]) -> [f32; 8] {
        n.map(|n| f32::from_bits(((n as i32 + 127) as u32) << 23))
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> [f32; 8] {
        unsafe { p.cast::<[u16; 8]>().read_unaligned() }.map(|b| half::f16::from_bits(b).to_f32())
    }
    #[inline(always)]
    unsafe fn store_f16(p: *mut u16, x: [f32; 8]) {
        unsafe { p.cast::<[u16; 8]>().write_unaligned(x.map(|x| half::f16::from_f32(x).to_bits())) }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> [f32; 8] {
        unsafe { p.cast::<[u16; 8]>().read_unaligned() }.map(|b| f32::from_bits(u32::from(b) << 16))
    }
    #[inline(always)]
    unsafe fn load_e4m3(p: *const u8) -> [f32; 8] {
        let place = |b: u8| f32::from_bits(u32::from(b & 0x80) << 24 | u32::from(b & 0x7f) << 20);
        unsafe { p.cast::<[u8; 8]>().read_unaligned() }.map(|b| place(b) * e4m3::SCALE)
    }
    #[inline(always)]
    unsafe fn load_u8(p: *const u8) -> [f32; 8] {
        unsafe { p.cast::<[u8; 8]>().read_unaligned() }.map(f32::from)
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> [f32; 8] {
        unsafe { p.cast::<[i8; 8]>().read_unaligned() }.map(f32::from)
    }
    #[inline(always)]
    unsafe fn sums(v: &[[f32; 8]; 16]) -> [f32; 8] {
        std::array::from_fn(|i| v[i].iter().sum())
    }
    #[inline(always)]
    unsafe fn load_i(p: *const u32) -> [u32; 8] {
        unsafe { p.cast::<[u32; 8]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn splat_i(x: u32) -> [u32; 8] {
        [x; 8]
    }
    #[inline(always)]
    unsafe fn shr(a: [u32; 8], bits: u32) -> [u32; 8] {
        a.map(|a| a >> bits)
    }
    #[inline(always)]
    unsafe fn shl(a: [u32; 8], bits: u32) -> [u32; 8] {
        a.map(|a| a << bits)
    }
    #[inline(always)]
    unsafe fn sra(a: [u32; 8], bits: u32) -> [u32; 8] {
        a.map(|a| (a as i32 >> bits) as u32)
    }
    #[inline(always)]
    unsafe fn xor(a: [u32; 8], b: [u32; 8]) -> [u32; 8] {
        map(a, b, |a, b| a ^ b)
    }
    #[inline(always)]
    unsafe fn and(a: [u32; 8], b: [u32; 8]) -> [u32; 8] {
        map(a, b, |a, b| a & b)
    }
    #[inline(always)]
    unsafe fn or(a: [u32; 8], b: [u32; 8]) -> [u32; 8] {
        map(a, b, |a, b| a | b)
    }
    #[inline(always)]
    unsafe fn to_f(a: [u32; 8]) -> [f32; 8] {
        a.map(|a| a as i32 as f32)
    }
    #[inline(always)]
    unsafe fn nibble(a: [u32; 8]) -> [f32; 8] {
        a.map(|a| (a & 15) as i32 as f32)
    }
    #[inline(always)]
    unsafe fn as_f(a: [u32; 8]) -> [f32; 8] {
        a.map(f32::from_bits)
    }
    #[inline(always)]
    unsafe fn select_within(a: [u32; 8], b: [u32; 8], span: [u32; 8], x: [f32; 8], y: [f32; 8]) -> [f32; 8] {
        std::array::from_fn(|i| if b[i].wrapping_sub(a[i]) < span[i] { x[i] } else { y[i] })
    }
    #[inline(always)]
    unsafe fn prefetch(_: *const u8) {}
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Every instruction set that this machine has.
    pub(in crate::device::cpu) fn isas() -> Vec<Isa> {
        [Isa::Avx512, Isa::Avx2, Isa::Portable].into_iter().filter(|i| i.available()).collect()
    }

    struct Exp2<'a>(&'a mut [f32]);

    impl Kernel for Exp2<'_> {
        type Out = ();
        #[inline(always)]
        unsafe fn run<S: Simd, const V: usize>(self) {
            for x in self.0.chunks_exact_mut(S::LANES) {
                unsafe { S::store(x.as_mut_ptr(), S::exp2(S::load(x.as_ptr()))) };
            }
        }
    }

    #[test]
    fn exp2_is_close_everywhere_and_zero_far_below() {
        for isa in isas() {
            let from: Vec<f32> = (0..16_000).map(|i| i as f32 / 64.0 - 125.0).collect();
            let mut x = from.clone();
            // SAFETY: available.
            unsafe { dispatch(isa, Exp2(&mut x)) };
            for (x, from) in x.iter().zip(from).filter(|(_, f)| *f <= 125.0) {
                let exact = f64::from(from).exp2();
                assert!((f64::from(*x) / exact - 1.0).abs() < 3e-7, "{isa:?} 2^{from} = {x}");
            }
            let mut low = [f32::NEG_INFINITY, -1e30, -300.0, -127.0, 0.0, -0.0, 0.0, 0.0].repeat(2);
            // SAFETY: available.
            unsafe { dispatch(isa, Exp2(&mut low)) };
            assert_eq!(low[..8], [0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0], "{isa:?}");
        }
    }

    struct Sums<'a>(&'a [f32], &'a mut [f32]);

    impl Kernel for Sums<'_> {
        type Out = usize;
        #[inline(always)]
        unsafe fn run<S: Simd, const V: usize>(self) -> usize {
            unsafe {
                let mut v = [S::splat(0.0); 16];
                for (i, v) in v.iter_mut().enumerate().take(S::LANES) {
                    *v = S::load(self.0.as_ptr().add(i * S::LANES));
                }
                S::store(self.1.as_mut_ptr(), S::sums(&v));
            }
            S::LANES
        }
    }

    #[test]
    fn sums_keeps_the_order() {
        for isa in isas() {
            let from: Vec<f32> = (0..256).map(|i| (i * i % 97) as f32).collect();
            let mut out = [0.0; 16];
            // SAFETY: available.
            let lanes = unsafe { dispatch(isa, Sums(&from, &mut out)) };
            for i in 0..lanes {
                assert_eq!(out[i], from[i * lanes..][..lanes].iter().sum::<f32>(), "{isa:?} {i}");
            }
        }
    }
}
