// The weight of a token in a draw, as an f32 and in fixed point.
//
// The f32 arithmetic is that of src/model/sampler/choose.rs, operation by
// operation, so both devices see the same weights, floors and ties. Sums are of
// integers, so they do not depend on the order that threads come in.
#pragma once
#include <cuda_runtime.h>
#include <stdint.h>

namespace distkv {

// e^x for x <= 0, within 2 units in the last place; 0 below e^-87.
__device__ __forceinline__ float weight_exp(float x) {
    // Adding 1.5 * 2^23 rounds to an integer, which then sits in the low bits.
    constexpr float SHIFT = 12582912.0f, LOG2_E = 1.44269504088896340736f;
    const float clamped = x > -87.0f ? x : -87.0f;
    const float shifted = __fadd_rn(__fmul_rn(clamped, LOG2_E), SHIFT);
    const float n = __fsub_rn(shifted, SHIFT);
    const float r = __fsub_rn(__fsub_rn(clamped, __fmul_rn(n, 0.6933594f)), __fmul_rn(n, -2.1219444e-4f));
    float poly = 1.9875692e-4f;
    poly = __fadd_rn(__fmul_rn(poly, r), 1.3981999e-3f);
    poly = __fadd_rn(__fmul_rn(poly, r), 8.333452e-3f);
    poly = __fadd_rn(__fmul_rn(poly, r), 4.1665796e-2f);
    poly = __fadd_rn(__fmul_rn(poly, r), 1.6666665e-1f);
    poly = __fadd_rn(__fmul_rn(poly, r), 0.5f);
    const float e = __fadd_rn(__fadd_rn(__fmul_rn(__fmul_rn(poly, r), r), r), 1.0f);
    const float scale = __uint_as_float((__float_as_uint(shifted) << 23) + (127u << 23));
    return x > -87.0f ? __fmul_rn(e, scale) : 0.0f;
}

// Weights are at most 1, a row has at most 2^18 of them: a row's sum stays below
// 2^62, and what 2^-44 cuts off is below 1e-8 of it.
constexpr float MASS_OF_ONE = 17592186044416.0f;
__device__ __forceinline__ uint64_t mass_of(float weight) { return __float2ull_rz(weight * MASS_OF_ONE); }

// Weights that have a mass, numbered in their order.
constexpr uint32_t LEAST_BITS = (127 - 44) << 23;
__device__ __forceinline__ bool has_mass(float weight) { return __float_as_uint(weight) >= LEAST_BITS; }
__device__ __forceinline__ uint32_t weight_key(float weight) { return __float_as_uint(weight) - LEAST_BITS; }

// Whole part of total * unit / 2^53.
__device__ __forceinline__ uint64_t part_of(uint64_t total, uint64_t unit) {
    return __umul64hi(total, unit) << 11 | (total * unit) >> 53;
}

__device__ __forceinline__ uint64_t warp_sum(uint64_t x) {
#pragma unroll
    for (uint32_t step = 16; step > 0; step /= 2) {
        x += __shfl_xor_sync(0xffffffff, x, step);
    }
    return x;
}

// Sum of this lane's and all lower lanes' values.
template <class I>
__device__ __forceinline__ I warp_prefix(I x) {
#pragma unroll
    for (uint32_t step = 1; step < 32; step *= 2) {
        const I below = __shfl_up_sync(0xffffffff, x, step);
        x += threadIdx.x % 32 >= step ? below : 0;
    }
    return x;
}

} // namespace distkv
