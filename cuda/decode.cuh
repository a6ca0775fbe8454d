// What the kernels of decode attention share: the shape of their work, and how
// parts of a sequence lie in memory.
//
// A *unit* is the rows of head_dim that a block takes at once, of K and of V. It
// comes in *boxes* of consecutive rows of the pool, the larger the better. A box
// spans `together` kv heads of a page where their runs are short, or it is a
// part of one head's run: with R = decode_rows(head_dim), and b = block_tokens,
//   R % b == 0:  together = the largest of 1, 2, 4, 8 that divides kv_heads and
//                is at most R / b;  box_rows = together * b
//   otherwise:   together = 1;  box_rows = the largest power of two that
//                divides b and is at most R
// What a box holds of one head is a *cell*: box_rows / together tokens.
#pragma once
#include "api.h"
#include "barrier.cuh"
#include "matrix.cuh"
#include "paged_kv.cuh"
#include "state.cuh"

namespace distkv {

// Rows of head_dim in a unit of K (or of V): 16 a warp.
__host__ __device__ constexpr uint32_t decode_rows(uint32_t head_dim) { return head_dim <= 128 ? 128 : 64; }

// ---- Parts and results ----

// Four elements of o, and lse with the first of them, of one column.
template <class T>
__device__ __forceinline__ void finish(void *o_out, float *lse, uint64_t head, uint32_t d, uint32_t element, float4 o, float max,
                                       float sum) {
    const float factor = sum > 0.0f ? 1.0f / sum : 0.0f;
    const uint2 packed = make_uint2(pack<T>(o.x * factor, o.y * factor), pack<T>(o.z * factor, o.w * factor));
    *reinterpret_cast<uint2 *>(static_cast<T *>(o_out) + head * d + element) = packed;
    if (element == 0)
        lse[head] = natural_lse(max, sum);
}

// Adds a part (o, maximum and sum) to another.
__device__ __forceinline__ void add_part(float4 &o, float &max, float &sum, float4 other, float2 state) {
    const float most = fmaxf(max, state.x), a = fast_exp2(max - most), b = fast_exp2(state.x - most);
    max = most, sum = sum * a + state.y * b;
    o.x = o.x * a + other.x * b, o.y = o.y * a + other.y * b;
    o.z = o.z * a + other.z * b, o.w = o.w * a + other.w * b;
}

// Where a column's (o, lse) is, in heads of head_dim.
__device__ __forceinline__ uint64_t head_of(uint32_t row, uint32_t kv_head, uint32_t column, uint32_t heads, uint32_t kv_heads) {
    const uint32_t group = heads / kv_heads;
    return uint64_t(row + column / group) * heads + kv_head * group + column % group;
}

// A block's two places in `parts`, here for one of its kv heads: for the item
// that begins a sequence which goes on in the next block, and for one that
// continues. In a part, the columns' states (maximum, sum) lie behind all o.
__device__ __forceinline__ float *part_of(float *parts, uint32_t block, bool begins, uint32_t together, uint32_t kv_head,
                                          uint32_t d) {
    return parts + ((uint64_t(block) * 2 + begins) * together + kv_head) * (DECODE_TILE * (d + 2));
}
__device__ __forceinline__ float2 *state_of(float *part, uint32_t column, uint32_t d) {
    return reinterpret_cast<float2 *>(part + DECODE_TILE * d) + column;
}

} // namespace distkv
