// MicroAttention for heads of any even width up to 256: a warp a row and query
// head, one key after the other. For shapes that the tiled kernels do not know
// (small test models among them), and as their oracle.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "api.h"
#include "e4m3.cuh"
#include "paged_kv.cuh"
#include "state.cuh"

namespace distkv {

constexpr uint32_t PLAIN_WARPS = 4;
constexpr uint32_t PLAIN_LANE_ELEMENTS = 256 / 32;

__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(E4m3 x) { return to_float(x); }
__device__ __forceinline__ void narrow(float x, __nv_bfloat16 *to) { *to = __float2bfloat16_rn(x); }
__device__ __forceinline__ void narrow(float x, __half *to) { *to = __float2half_rn(x); }

// K: element of the keys and values.
template <typename T, typename K> __device__ void attention_plain(const AttentionPlain &p) {
    const uint32_t row = blockIdx.x, lane = threadIdx.x % 32;
    const uint32_t head = blockIdx.y * PLAIN_WARPS + threadIdx.x / 32;
    if (row >= p.step->rows || head >= p.heads) {
        return;
    }
    uint32_t index = 0;
    while (row >= p.seqs[index].row + p.seqs[index].rows) {
        index++;
    }
    const Seq seq = p.seqs[index];
    const uint32_t own = seq.position + (row - seq.row), kv_head = head / (p.heads / p.kv_heads);
    const T *q = static_cast<const T *>(p.qkv) + uint64_t(row) * p.q_stride + head * p.head_dim;
    const K *kv = static_cast<const K *>(p.kv);
    float query[PLAIN_LANE_ELEMENTS], sum[PLAIN_LANE_ELEMENTS] = {};
#pragma unroll
    for (uint32_t i = 0; i < PLAIN_LANE_ELEMENTS; i++) {
        const uint32_t at = i * 32 + lane;
        query[i] = at < p.head_dim ? widen(q[at]) * p.scale * LOG2_E : 0.0f;
    }
    float max = NO_SCORE, total = 0.0f;
    for (uint32_t n = 0; n < seq.pages; n++) {
        const Page page = p.pages[seq.page + n];
        const K *keys = kv + kv_offset(page.block, false, kv_head, p.kv_heads, p.block_tokens, p.head_dim);
        const K *values = kv + kv_offset(page.block, true, kv_head, p.kv_heads, p.block_tokens, p.head_dim);
        for (uint32_t token = 0; token < page.tokens; token++) {
            const uint32_t position = page.position + token;
            if (position > own || (p.window != 0 && own - position >= p.window)) {
                continue;
            }
            float score = 0.0f;
#pragma unroll
            for (uint32_t i = 0; i < PLAIN_LANE_ELEMENTS; i++) {
                const uint32_t at = i * 32 + lane;
                score += at < p.head_dim ? query[i] * widen(keys[token * p.head_dim + at]) : 0.0f;
            }
#pragma unroll
            for (uint32_t step = 16; step > 0; step /= 2) {
                score += __shfl_xor_sync(~0u, score, step);
            }
            const float next = fmaxf(max, score), keep = exp2f(max - next), weight = exp2f(score - next);
            max = next;
            total = total * keep + weight;
#pragma unroll
            for (uint32_t i = 0; i < PLAIN_LANE_ELEMENTS; i++) {
                const uint32_t at = i * 32 + lane;
                sum[i] = sum[i] * keep + (at < p.head_dim ? weight * widen(values[token * p.head_dim + at]) : 0.0f);
            }
        }
    }
    T *o = static_cast<T *>(p.o) + (uint64_t(row) * p.heads + head) * p.head_dim;
    const float scale = total > 0.0f ? 1.0f / total : 0.0f;
#pragma unroll
    for (uint32_t i = 0; i < PLAIN_LANE_ELEMENTS; i++) {
        const uint32_t at = i * 32 + lane;
        if (at < p.head_dim) {
            narrow(sum[i] * scale, o + at);
        }
    }
    if (lane == 0) {
        p.lse[uint64_t(row) * p.heads + head] = natural_lse(max, total);
    }
}

} // namespace distkv

#define PLAIN(NAME, T, K)                                                                                              \
    extern "C" __global__ void __launch_bounds__(128)                                                                  \
        attention_plain_##NAME(const __grid_constant__ distkv::AttentionPlain p) {                                     \
        distkv::attention_plain<T, K>(p);                                                                              \
    }
PLAIN(bf16, __nv_bfloat16, __nv_bfloat16)
PLAIN(f16, __half, __half)
PLAIN(fp8_bf16, __nv_bfloat16, distkv::E4m3)
