// Keys and values in E4M3: as they are stored, and four at a time into the
// elements that the matrix unit multiplies. See src/e4m3.rs.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <stdint.h>

namespace distkv {

struct E4m3 {
    uint8_t bits;
};

// The nearest, to even; what is too large becomes 448.
__device__ __forceinline__ E4m3 to_e4m3(float x) { return {__nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3)}; }

// Exact. The bytes that are no number become 480.
__device__ __forceinline__ float to_float(E4m3 x) {
    return __uint_as_float(uint32_t(x.bits & 0x80) << 24 | uint32_t(x.bits & 0x7f) << 20) * 0x1p120f;
}

// Two numbers, in the upper byte of each half, as a pair of T, exact: the bits go
// where T has its own, and the product makes up for the other bias.
template <class T>
__device__ __forceinline__ uint32_t widen_halves(uint32_t x);
template <>
__device__ __forceinline__ uint32_t widen_halves<__nv_bfloat16>(uint32_t x) {
    const uint32_t placed = (x & 0x80008000) | ((x >> 4) & 0x07f007f0);
    const __nv_bfloat162 two = __hmul2(reinterpret_cast<const __nv_bfloat162 &>(placed), __float2bfloat162_rn(0x1p120f));
    return reinterpret_cast<const uint32_t &>(two);
}
template <>
__device__ __forceinline__ uint32_t widen_halves<__half>(uint32_t x) {
    const uint32_t placed = (x & 0x80008000) | ((x >> 1) & 0x3f803f80);
    const __half2 two = __hmul2(reinterpret_cast<const __half2 &>(placed), __float2half2_rn(0x1p8f));
    return reinterpret_cast<const uint32_t &>(two);
}

// Numbers A and B of the four in a word, as a pair of T.
template <class T, uint32_t A, uint32_t B>
__device__ __forceinline__ uint32_t widen_two(uint32_t four) {
    return widen_halves<T>(__byte_perm(four, 0, B << 12 | 4 << 8 | A << 4 | 4));
}

} // namespace distkv
