// Merges a remote partial into the local one, in place.
//
// Launch: any grid of blocks of 256 threads; a warp takes one (row, head) at a
// time. An empty part leaves the other bit for bit.
#include "api.h"
#include "state.cuh"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace distkv {
namespace {

template <class T> struct Two;
template <> struct Two<__nv_bfloat16> {
    using Type = __nv_bfloat162;
    static __device__ __forceinline__ float2 wide(Type v) { return __bfloat1622float2(v); }
    static __device__ __forceinline__ Type narrow(float2 v) { return __float22bfloat162_rn(v); }
};
template <> struct Two<__half> {
    using Type = __half2;
    static __device__ __forceinline__ float2 wide(Type v) { return __half22float2(v); }
    static __device__ __forceinline__ Type narrow(float2 v) { return __float22half2_rn(v); }
};

template <class T> __device__ __forceinline__ void merge(const Merge &p) {
    const uint32_t lane = threadIdx.x % 32, warps = gridDim.x * (blockDim.x / 32);
    const uint32_t count = *p.count * p.heads;
    for (uint32_t i = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; i < count; i += warps) {
        const uint64_t at = uint64_t(p.rows[i / p.heads]) * p.heads + i % p.heads;
        const float a = p.lse[at], b = p.remote_lse[i];
        // Every lane has read it before it changes.
        __syncwarp();
        if (b == -INFINITY)
            continue;
        float wa = 0, wb = 1, lse = b;
        if (a != -INFINITY) {
            const float max = fmaxf(a, b);
            wa = exp2f((a - max) * LOG2_E), wb = exp2f((b - max) * LOG2_E);
            const float sum = wa + wb;
            wa /= sum, wb /= sum;
            lse = max + log2f(sum) * LN_2;
        }
        auto *o = reinterpret_cast<typename Two<T>::Type *>(static_cast<T *>(p.o) + at * p.head_dim);
        const float4 *remote = reinterpret_cast<const float4 *>(p.remote_o + uint64_t(i) * p.head_dim);
        for (uint32_t c = lane; c < p.head_dim / 4; c += 32) {
            const float4 add = remote[c];
            // Where there was no key, what lies in o is not read: it may be anything.
            float2 x = {0, 0}, y = {0, 0};
            if (wa != 0) {
                const uint2 two = reinterpret_cast<const uint2 *>(o)[c];
                x = Two<T>::wide(reinterpret_cast<const typename Two<T>::Type &>(two.x));
                y = Two<T>::wide(reinterpret_cast<const typename Two<T>::Type &>(two.y));
            }
            const auto low = Two<T>::narrow({x.x * wa + add.x * wb, x.y * wa + add.y * wb});
            const auto high = Two<T>::narrow({y.x * wa + add.z * wb, y.y * wa + add.w * wb});
            reinterpret_cast<uint2 *>(o)[c] =
                make_uint2(reinterpret_cast<const uint32_t &>(low), reinterpret_cast<const uint32_t &>(high));
        }
        if (lane == 0)
            p.lse[at] = lse;
    }
}

} // namespace
} // namespace distkv

extern "C" __global__ void __launch_bounds__(256) merge_bf16(const __grid_constant__ distkv::Merge p) {
    distkv::merge<__nv_bfloat16>(p);
}
extern "C" __global__ void __launch_bounds__(256) merge_f16(const __grid_constant__ distkv::Merge p) {
    distkv::merge<__half>(p);
}
