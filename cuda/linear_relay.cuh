// How a product of a launch hands rows on to the next: through a relay in the device's
// memory, each of whose words says by itself whether it is there. A word that is not
// is ABSENT; who reads it reads it again. So a few rows need no fence, which takes a
// microsecond while weights stream: that the blocks say when they have stored only
// spares most of the reading again. With more rows there is too much to read again:
// then they are handed on where they lie, and the relay only counts.
//
// A relay has counters, what of each half is to be made ABSENT again, and two halves.
// A launch uses one half, and makes the other, which the launch before it used, ABSENT
// again. A half holds for each product but the first, one behind the other, x as T
// [rows of the kernel, in] and the sums of squares as f32 [rows of the kernel, in /
// 32]. Launches with one relay follow each other; all blocks of one are resident at
// once. Those that are fenced are not counted as launches.
//
// Nobody needs more than that: a block has all of x only when all that made x have
// read all that they were made from, so what a product reads may be written once it
// is done; and who adds to the residual stream twice adds to his own features.
#pragma once
#include "linear.cuh"
#include "linear_tile.cuh"
#include "words.cuh"

namespace distkv {

// Two NaNs that no conversion to bf16 or f16 gives; a NaN that no f32 operation gives.
constexpr uint32_t ABSENT = 0xffffffff;
// What stands for it, should it be written all the same: nobody may wait for ever.
constexpr uint32_t NAN_16 = 0x7fff7fff, NAN_32 = 0x7fffffff;
constexpr uint32_t RELAY_HEAD = 128; // bytes before the halves
// Words of the head: launches; what was used of each half; by product, times that all
// blocks have stored what they hand on to the next, of all turns but the last (word
// 2 n) and of all (2 n + 1): the next product begins with what the first turns made.
// Each has a count of its own: a block without tiles waits for nobody, and would be
// counted twice where another is not yet.
constexpr uint32_t RELAY_LAUNCHES = 0, RELAY_USED = 1, RELAY_STORED = 16;

// ---- Words ----

__device__ __forceinline__ bool is_absent(float2 v) {
    return __float_as_uint(v.x) == ABSENT || __float_as_uint(v.y) == ABSENT;
}

// Two words of two elements each.
__device__ __forceinline__ void relay_store(void *to, uint2 v) {
    v.x = v.x == ABSENT ? NAN_16 : v.x;
    v.y = v.y == ABSENT ? NAN_16 : v.y;
    store_words(to, v);
}

__device__ __forceinline__ void relay_store(float *to, float x) {
    store_word(to, __float_as_uint(x) == ABSENT ? NAN_32 : __float_as_uint(x));
}

// ---- Halves ----

// What a product's input takes of a half.
template <uint32_t M>
__device__ __forceinline__ uint32_t relay_bytes(const Linear &p) {
    return M * p.in_features * 2 + M * (p.in_features / UNIT) * 4;
}

// A count of all blocks: its upper half counts the times that all have come, the
// lower half those that have since. It is 0 again each time, and nothing has to be
// reset. A count, and no parity: who is held up while all others go on still finds
// that his turn is over.
__device__ __forceinline__ uint32_t relay_count(const LinearChain &c, uint32_t word) {
    return load_word(c.relay + word) >> 16;
}

// By one thread of a block.
__device__ __forceinline__ void relay_come(const LinearChain &c, uint32_t word) {
    add_to_word(c.relay + word, blockIdx.x == 0 ? 0x10000u - (gridDim.x - 1) : 1);
}

// By one thread, after a barrier of its block: it has stored what is counted there.
__device__ __forceinline__ void relay_stored(const LinearChain &c, uint32_t count) {
    if (c.fenced) {
        fence_stores();
    }
    relay_come(c, RELAY_STORED + count);
}

// The counts as a launch finds them.
struct RelayStart {
    uint32_t stored[2 * (MAX_PRODUCTS - 1)];

    __device__ __forceinline__ explicit RelayStart(const LinearChain &c) {
#pragma unroll
        for (uint32_t i = 0; i < 2 * (MAX_PRODUCTS - 1); i++) {
            stored[i] = relay_count(c, RELAY_STORED + i);
        }
    }

    __device__ __forceinline__ uint32_t of(uint32_t count) const {
        uint32_t found = 0;
#pragma unroll
        for (uint32_t i = 0; i < 2 * (MAX_PRODUCTS - 1); i++) {
            found = i == count ? stored[i] : found;
        }
        return found;
    }
};

// Until all have stored what is counted there; behind a fence, it is there for the copy
// engine.
__device__ __forceinline__ void relay_wait(const LinearChain &c, const RelayStart &start, uint32_t count) {
    while (acquire_word(c.relay + RELAY_STORED + count) >> 16 == start.of(count)) {
    }
    if (c.fenced) {
        fence_copies();
    }
}

// Which half is this launch's: a block counts only when none of it asks any more.
__device__ __forceinline__ uint32_t relay_turn(const LinearChain &c) { return relay_count(c, RELAY_LAUNCHES) & 1; }

__device__ __forceinline__ uint8_t *relay_half(const LinearChain &c, uint32_t turn) {
    return reinterpret_cast<uint8_t *>(c.relay) + RELAY_HEAD + uint64_t(turn) * c.half;
}

// By a warp: this block's share of the half that the launch before used; and says
// what will be left of this launch's.
template <uint32_t M>
__device__ __forceinline__ void relay_clear(const LinearArgs &a, uint32_t turn, uint32_t lane) {
    const uint32_t used = a.chain.relay[RELAY_USED + (turn ^ 1)];
    uint8_t *half = relay_half(a.chain, turn ^ 1);
    for (uint32_t i = (blockIdx.x * 32 + lane) * 16; i < used; i += gridDim.x * 32 * 16) {
        *reinterpret_cast<uint4 *>(half + i) = {ABSENT, ABSENT, ABSENT, ABSENT};
    }
    if (blockIdx.x == 0 && lane == 0) {
        uint32_t bytes = 0;
        for (uint32_t n = 1; n < a.chain.count; n++) {
            bytes += relay_bytes<M>(a.product[n]);
        }
        a.chain.relay[RELAY_USED + turn] = bytes;
    }
}

} // namespace distkv
