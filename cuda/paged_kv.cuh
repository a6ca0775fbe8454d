// Where keys and values lie: a layer's pool is [blocks, 2 (k, v), kv_heads,
// block_tokens, head_dim] of T, so one head's keys of one block are one
// contiguous run of block_tokens * head_dim elements.
#pragma once
#include "api.h"

namespace distkv {

// Query heads and rows that one tile of the decode kernel takes: the M of its
// matrix instruction. A sequence whose rows * group fit is decoded, any other
// is prefilled; both kernels ask here.
constexpr uint32_t DECODE_TILE = 16;

__host__ __device__ __forceinline__ bool is_decode(const Seq &seq, uint32_t group) {
    return seq.rows * group <= DECODE_TILE;
}

// Elements from a layer's base to the keys (values) of a head in a block.
__host__ __device__ __forceinline__ uint64_t
kv_offset(uint32_t block, bool value, uint32_t head, uint32_t kv_heads, uint32_t block_tokens, uint32_t head_dim) {
    return ((uint64_t(block) * 2 + (value ? 1 : 0)) * kv_heads + head) * block_tokens * head_dim;
}

} // namespace distkv
