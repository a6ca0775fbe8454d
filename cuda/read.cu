// What the memory gives: a kernel that reads, and does nothing else, for the
// floor beside which benches put their figures.
#include <stdint.h>

#include "api.h"

extern "C" __global__ void __launch_bounds__(512) read_sweep(const __grid_constant__ distkv::ReadSweep p) {
    constexpr uint32_t AT_ONCE = 8;
    const uint4 *from = static_cast<const uint4 *>(p.from);
    const uint64_t stride = uint64_t(gridDim.x) * blockDim.x;
    uint64_t at = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    uint32_t sum = 0;
    for (; at + (AT_ONCE - 1) * stride < p.pieces; at += AT_ONCE * stride) {
        uint4 x[AT_ONCE];
#pragma unroll
        for (uint32_t i = 0; i < AT_ONCE; i++) {
            x[i] = __ldcs(from + at + i * stride);
        }
#pragma unroll
        for (uint32_t i = 0; i < AT_ONCE; i++) {
            sum ^= x[i].x ^ x[i].y ^ x[i].z ^ x[i].w;
        }
    }
    for (; at < p.pieces; at += stride) {
        const uint4 x = __ldcs(from + at);
        sum ^= x.x ^ x.y ^ x.z ^ x.w;
    }
    // Never so for the compiler; what was read is needed for all it knows.
    if (sum == p.impossible) {
        *p.sink = sum;
    }
}
