// A logit and its token in one integer, whose order is theirs: the larger logit
// first, of equals the smaller token.
#pragma once
#include <cuda_runtime.h>
#include <stdint.h>

namespace distkv {

// What the sampler says of a row, bit by bit.
constexpr uint32_t FLAG_NOT_FINITE = 1; // a logit is infinite or not a number

// Above every key: the row holds a value that is not finite.
constexpr uint64_t NOT_FINITE = ~uint64_t(0);

// Unsigned order of the result is the order of finite x; -0 and 0 are equal.
__device__ __forceinline__ uint32_t ordered(float x) {
    const uint32_t bits = __float_as_uint(x + 0.0f);
    return bits & 0x80000000 ? ~bits : bits | 0x80000000;
}

__device__ __forceinline__ float from_ordered(uint32_t key) {
    return __uint_as_float(key & 0x80000000 ? key & 0x7fffffff : ~key);
}

__device__ __forceinline__ uint64_t token_key(float logit, uint32_t token) {
    return uint64_t(ordered(logit)) << 32 | uint32_t(~token);
}

// 0, the token of a row of `NOT_FINITE`, is at least a token.
__device__ __forceinline__ uint32_t key_token(uint64_t key) { return ~uint32_t(key); }

__device__ __forceinline__ float key_logit(uint64_t key) { return from_ordered(uint32_t(key >> 32)); }

// The largest of the logits that a thread has seen, in the order of tokens.
struct Best {
    float logit = -INFINITY;
    uint32_t token = 0;
    float poison = 0.0f; // NaN as soon as a logit was not finite

    __device__ __forceinline__ void take(float x, uint32_t at) {
        poison += x * 0.0f;
        if (x > logit) {
            logit = x;
            token = at;
        }
    }

    // 0 where nothing was seen.
    __device__ __forceinline__ uint64_t key() const {
        if (poison != poison) {
            return NOT_FINITE;
        }
        return logit == -INFINITY ? 0 : token_key(logit, token);
    }
};

__device__ __forceinline__ uint64_t warp_max(uint64_t key) {
#pragma unroll
    for (uint32_t step = 16; step > 0; step /= 2) {
        const uint64_t other = __shfl_xor_sync(0xffffffff, key, step);
        key = other > key ? other : key;
    }
    return key;
}

// Largest of the block's keys; all threads call and all get it.
__device__ __forceinline__ uint64_t block_max(uint64_t key) {
    __shared__ uint64_t parts[32];
    key = warp_max(key);
    __syncthreads();
    if (threadIdx.x % 32 == 0) {
        parts[threadIdx.x / 32] = key;
    }
    __syncthreads();
    return warp_max(threadIdx.x % 32 < blockDim.x / 32 ? parts[threadIdx.x % 32] : 0);
}

} // namespace distkv
