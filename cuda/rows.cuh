// What the kernels that work row by row share: element types, wide loads and
// stores, sums over a block, and how a kernel begins.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "api.h"
#include "barrier.cuh"

namespace distkv {

// Elements that go through a thread at once: 16 bytes of T.
constexpr uint32_t WIDE = 8;

// Waits for the kernels before this one and lets the next be brought up
// meanwhile (it waits here in turn). Every kernel calls this before it touches
// memory that a kernel writes; without programmatic launch it does nothing.
__device__ __forceinline__ void begin_kernel() {
    wait_for_previous();
    launch_next();
}

// The same, and the count of rows in use. No kernel writes a Step, so the count
// may be on its way while this one still waits.
__device__ __forceinline__ uint32_t begin_kernel(const uint32_t *rows) {
    const uint32_t count = *reinterpret_cast<const volatile uint32_t *>(rows);
    begin_kernel();
    return count;
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

// Rounded to nearest even.
template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
    return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
    return __float2half_rn(x);
}

// Whether wide accesses may be used from here on. Null is aligned: it is not read.
__device__ __forceinline__ bool is_aligned(const void *p) { return (reinterpret_cast<uint64_t>(p) & 15) == 0; }

// N consecutive elements, moved 16 bytes at a time where they fill that much;
// the address is then a multiple of 16.
template <class T, uint32_t N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Run {
    T item[N];
};

template <uint32_t N, class T>
__device__ __forceinline__ void load(const T *from, float (&to)[N]) {
    const Run<T, N> run = *reinterpret_cast<const Run<T, N> *>(from);
#pragma unroll
    for (uint32_t i = 0; i < N; i++) {
        to[i] = to_float(run.item[i]);
    }
}

template <uint32_t N, class T>
__device__ __forceinline__ void store(T *to, const float (&from)[N]) {
    Run<T, N> run;
#pragma unroll
    for (uint32_t i = 0; i < N; i++) {
        run.item[i] = from_float<T>(from[i]);
    }
    *reinterpret_cast<Run<T, N> *>(to) = run;
}

// Sum over groups of `lanes` consecutive lanes (a power of two); all 32 call.
__device__ __forceinline__ float lanes_sum(float x, uint32_t lanes = 32) {
    for (uint32_t step = lanes / 2; step > 0; step /= 2) {
        x += __shfl_xor_sync(0xffffffff, x, step);
    }
    return x;
}

// Sum over the block, which has whole warps; all threads call and all get it.
__device__ __forceinline__ float block_sum(float x) {
    __shared__ float parts[32];
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    x = lanes_sum(x);
    // The parts of the call before may still be being read.
    __syncthreads();
    if (lane == 0) {
        parts[warp] = x;
    }
    __syncthreads();
    return lanes_sum(lane < blockDim.x / 32 ? parts[lane] : 0.0f);
}

// The places of a [rows, cols] matrix in runs of W elements, dealt out to all
// threads of the grid in turn. W divides cols; rows * cols / W is below 2^32.
template <uint32_t W, class F>
__device__ __forceinline__ void each_run(uint32_t rows, uint32_t cols, F f) {
    const uint32_t runs = cols / W, total = rows * runs;
    for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < total; i += gridDim.x * blockDim.x) {
        const uint32_t row = i / runs;
        f(row, (i - row * runs) * W);
    }
}

} // namespace distkv

// The two entry points of a kernel of T, from a template over T that takes the
// same struct, and its launch bounds.
#define DISTKV_KERNELS(name, Struct, ...)                                                                             \
    extern "C" __global__ void __launch_bounds__(__VA_ARGS__) name##_bf16(const __grid_constant__ distkv::Struct p) { \
        distkv::name<__nv_bfloat16>(p);                                                                               \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(__VA_ARGS__) name##_f16(const __grid_constant__ distkv::Struct p) {  \
        distkv::name<__half>(p);                                                                                      \
    }
