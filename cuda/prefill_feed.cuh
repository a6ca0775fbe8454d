// The feeding warpgroup of attention_prefill_sm90.cu, and what lies in shared
// memory between it and those that compute: rings of tiles, each slot with a
// `full` and an `empty` mbarrier. Warp 0 draws the pairs and copies keys, page
// by page, warp 1 copies values and the other two queries. sm_90a only.
#pragma once
#include "barrier.cuh"
#include "copies.cuh"
#include "matrix.cuh"
#include "prefill_plan.cuh"

namespace distkv {

// What a head_dim makes of a block.
template <uint32_t D> struct Shape {
    // Warpgroups, beside the one that feeds. With the narrowest heads a score
    // costs as much as its two products: a third one keeps both units busy, with
    // tiles that fit fewer registers (15% more at 8192 tokens).
    static constexpr uint32_t COMPUTING = D <= 64 ? 3 : 2;
    static constexpr uint32_t THREADS = (COMPUTING + 1) * 128;
    static constexpr uint32_t REGISTERS = COMPUTING == 3 ? 152 : 224; // of a thread that computes; 56 of one that feeds
    static constexpr uint32_t ROWS = COMPUTING * 64;                  // packed rows a tile
    static constexpr uint32_t KEYS = D <= 64 ? 96 : D <= 128 ? 128 : 64; // keys a tile
    static constexpr uint32_t STAGES = D <= 64 ? 4 : 2;                  // tiles of keys, and of values, in flight
    // Queries are held in registers where these were seen to have room and it
    // to pay (3% at 128): products then read a third less of shared memory, and
    // the queries' place in it is free at once.
    static constexpr bool HELD = D <= 128;
    static constexpr uint32_t QUERIES = D <= 64 ? 2 : 1; // tiles of queries in flight
    // Shared memory holds columns of 64 elements, with the 128-byte swizzle;
    // what of the last one is behind D is never read. Of keys and values one
    // copy brings all columns of a page, 8 rows of each in turn; where D is no
    // multiple of 64 that would read behind the pool, and each column has its
    // copy and its place.
    static constexpr uint32_t COLUMNS = (D + 63) / 64;
    static constexpr uint32_t COPIES = D % 64 == 0 ? 1 : COLUMNS;
    static constexpr uint32_t EIGHT = D % 64 == 0 ? COLUMNS * 1024 : 1024; // bytes from 8 rows to the next
    static constexpr uint32_t COLUMN = D % 64 == 0 ? 1024 : KEYS * 128;    // bytes from a column to the next
    static constexpr uint32_t QUERY_BYTES = COLUMNS * ROWS * 128;
    static constexpr uint32_t KEY_BYTES = COLUMNS * KEYS * 128;
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

constexpr uint32_t NOWHERE = 0xffffffff;

// A pair, as its copying warp tells the others.
struct Pair {
    Seq seq;         // rows = NOWHERE: no pair is left
    uint32_t packed; // first packed row of the tile
    uint32_t head;   // kv head
    uint32_t begin;  // tiles of keys
    uint32_t end;
};

// Which keys of a tile a row may see.
struct Mask {
    enum : uint32_t { NONE, RUN, LIST };
    uint32_t kind;     // NONE: every row sees all; RUN: keys in consecutive positions; LIST: see `positions`
    uint32_t position; // of a run's first key
    uint32_t keys;     // in the run; behind it is nothing
};

template <uint32_t D> struct Control {
    using S = Shape<D>;
    uint64_t key_full[S::STAGES], key_empty[S::STAGES];
    uint64_t value_full[S::STAGES], value_empty[S::STAGES];
    uint64_t query_full[S::QUERIES], query_empty[S::QUERIES];
    uint64_t pair_full[2], pair_empty[2];
    uint64_t patch; // values of a tile that holds a partial page
    Pair pair[2];
    Mask mask[S::STAGES];
    uint32_t positions[S::STAGES][S::KEYS]; // of each key of a LIST, NOWHERE where there is none
};

// Slot and parity of the n-th use of a ring.
template <uint32_t SLOTS> struct Turn {
    uint32_t slot = 0;
    uint32_t parity = 0;
    __device__ __forceinline__ void next() {
        if (++slot == SLOTS) {
            slot = 0;
            parity ^= 1;
        }
    }
};

// One box of keys as a lane of the copying warp sees it.
struct Box {
    uint32_t row;      // of the tensor map, its first key
    uint32_t position; // of that key
    uint32_t keys;     // filled; 0 behind the last page
};

// Boxes of a tile: the largest power of two of keys that divides both a page
// and a tile, each lane one.
template <uint32_t D> struct Boxes {
    uint32_t keys;  // a box
    uint32_t shift; // log2 of that
    uint32_t count; // a tile

    __device__ __forceinline__ explicit Boxes(uint32_t block_tokens) {
        keys = min(block_tokens & (0u - block_tokens), Shape<D>::KEYS & (0u - Shape<D>::KEYS));
        shift = 31 - __clz(keys);
        count = Shape<D>::KEYS >> shift;
    }

    __device__ __forceinline__ Box find(const Prefill &p, const Pair &pair, uint32_t t) const {
        const uint32_t lane = threadIdx.x % 32;
        Box box = {0, 0, 0};
        if (t < pair.end && lane < count) {
            const uint32_t slot = t * Shape<D>::KEYS + (lane << shift);
            const uint32_t page = slot / p.block_tokens;
            const uint32_t offset = slot - page * p.block_tokens;
            if (page < pair.seq.pages) {
                const Page at = p.pages[pair.seq.page + page];
                const uint32_t block = p.gathered == NOT_GATHERED ? at.block : pair.seq.page + page - p.gathered;
                box.row = (block * 2 * p.kv_heads + pair.head) * p.block_tokens + offset;
                box.position = at.position + offset;
                box.keys = at.tokens > offset ? min(at.tokens - offset, keys) : 0;
            }
        }
        return box;
    }

    // Bytes that the copies of all lanes' boxes bring.
    __device__ __forceinline__ uint32_t bytes(const Box &box) const {
        return (__popc(__ballot_sync(0xffffffff, box.keys > 0)) << shift) * Shape<D>::COLUMNS * 128;
    }

    __device__ __forceinline__ void
    copy(const Box &box, const void *map, uint32_t row, uint32_t to, uint32_t barrier) const {
        if (box.keys > 0) {
#pragma unroll
            for (uint32_t c = 0; c < Shape<D>::COPIES; ++c) {
                const uint32_t at = to + c * Shape<D>::COLUMN + (threadIdx.x % 32 << shift) / 8 * Shape<D>::EIGHT;
                copy_box_4_kept(at, map, c * 64, row / 8, barrier);
            }
        }
    }
};

// Warp 0 of the feeding warpgroup: draws the pairs and copies keys.
template <uint32_t D>
__device__ __forceinline__ void feed_keys(const Prefill &p, const void *map, Control<D> &control, uint32_t keys_at) {
    using S = Shape<D>;
    constexpr uint32_t KEYS = S::KEYS;
    const uint32_t lane = threadIdx.x % 32;
    PrefillHeader *header = plan_header(p.plan);
    const uint32_t group = p.heads / p.kv_heads;
    const uint32_t pairs = header->tiles * p.kv_heads;
    const Boxes<D> boxes(p.block_tokens);

    Turn<2> pair_turn;
    Turn<S::STAGES> key_turn;
    uint32_t drawn = 0;
    if (lane == 0) {
        drawn = atomicAdd(&header->next, 1);
    }
    drawn = __shfl_sync(0xffffffff, drawn, 0);

    while (drawn < pairs) {
        uint32_t index, head;
        plan_pair(*header, drawn, p.kv_heads, index, head);
        const PrefillTile tile = plan_tiles(p.plan)[index];
        const Pair pair = {p.seqs[tile.seq], tile.tile * S::ROWS, head, tile.begin, tile.end};
        const uint32_t first = pair.seq.position + pair.packed / group;
        const uint32_t last = pair.seq.position + (min(pair.packed + S::ROWS, pair.seq.rows * group) - 1) / group;
        if (lane == 0) {
            drawn = atomicAdd(&header->next, 1); // answered by the time it is asked for
        }

        barrier_wait(shared_address(&control.pair_empty[pair_turn.slot]), pair_turn.parity ^ 1);
        __syncwarp(); // before it is full and empty again: who had not looked yet would wait for ever
        if (lane == 0) {
            control.pair[pair_turn.slot] = pair;
            barrier_arrive(shared_address(&control.pair_full[pair_turn.slot]));
        }
        pair_turn.next();

        for (uint32_t t = pair.begin; t < pair.end; ++t) {
            const Box box = boxes.find(p, pair, t);
            const uint32_t stage = key_turn.slot;
            const uint32_t full = shared_address(&control.key_full[stage]);
            const bool real = lane < boxes.count;
            const uint32_t position = __shfl_sync(0xffffffff, box.position, 0);
            const uint32_t before = __shfl_up_sync(0xffffffff, box.keys, 1);
            const uint32_t keys = __reduce_add_sync(0xffffffff, box.keys);
            const uint32_t bytes = boxes.bytes(box);
            // Keys in consecutive positions, with nothing missing but at the end.
            const bool breaks = lane == 0 ? box.keys == 0
                                          : box.keys > 0 && (before != boxes.keys ||
                                                             box.position != position + (lane << boxes.shift));
            const bool hides = real && (box.keys < boxes.keys || box.position + boxes.keys - 1 > first ||
                                        (p.window > 0 && box.position < last && last - box.position >= p.window));
            const bool run = !__any_sync(0xffffffff, breaks);
            const bool masked = __any_sync(0xffffffff, hides);
            barrier_wait(shared_address(&control.key_empty[stage]), key_turn.parity ^ 1);
            if (masked && !run) {
                for (uint32_t i = lane; i < KEYS; i += 32) {
                    const uint32_t from = i >> boxes.shift;
                    const uint32_t offset = i & (boxes.keys - 1);
                    const uint32_t start = __shfl_sync(0xffffffff, box.position, from);
                    const uint32_t count = __shfl_sync(0xffffffff, box.keys, from);
                    control.positions[stage][i] = offset < count ? start + offset : NOWHERE;
                }
            }
            if (lane == 0) {
                control.mask[stage] = {masked ? (run ? Mask::RUN : Mask::LIST) : Mask::NONE, position, keys};
            }
            __syncwarp();
            if (lane == 0) {
                barrier_arrive_expect(full, bytes);
            }
            __syncwarp();
            boxes.copy(box, map, box.row, keys_at + stage * S::KEY_BYTES, full);
            key_turn.next();
        }
        drawn = __shfl_sync(0xffffffff, drawn, 0);
    }
    barrier_wait(shared_address(&control.pair_empty[pair_turn.slot]), pair_turn.parity ^ 1);
    __syncwarp();
    if (lane == 0) {
        control.pair[pair_turn.slot].seq.rows = NOWHERE;
        barrier_arrive(shared_address(&control.pair_full[pair_turn.slot]));
        plan_leave(header);
    }
}

// Takes the next pair from warp 0; false: none is left.
template <uint32_t D>
__device__ __forceinline__ bool take_pair(Control<D> &control, Turn<2> &turn, Pair &pair) {
    barrier_wait(shared_address(&control.pair_full[turn.slot]), turn.parity);
    pair = control.pair[turn.slot];
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
        barrier_arrive(shared_address(&control.pair_empty[turn.slot]));
    }
    turn.next();
    return pair.seq.rows != NOWHERE;
}

// Warp 1 of the feeding warpgroup: copies values.
template <uint32_t D>
__device__ __forceinline__ void
feed_values(const Prefill &p, const void *map, Control<D> &control, uint32_t values_at) {
    using S = Shape<D>;
    const uint32_t lane = threadIdx.x % 32;
    const uint32_t patch = shared_address(&control.patch);
    const Boxes<D> boxes(p.block_tokens);
    Turn<2> pair_turn;
    Turn<S::STAGES> value_turn;
    uint32_t patches = 0;
    Pair pair;
    while (take_pair<D>(control, pair_turn, pair)) {
        for (uint32_t t = pair.begin; t < pair.end; ++t) {
            const Box box = boxes.find(p, pair, t);
            const uint32_t full = shared_address(&control.value_full[value_turn.slot]);
            const uint32_t to = values_at + value_turn.slot * S::KEY_BYTES;
            const uint32_t bytes = boxes.bytes(box);
            const bool partial = __any_sync(0xffffffff, lane < boxes.count && box.keys < boxes.keys);
            barrier_wait(shared_address(&control.value_empty[value_turn.slot]), value_turn.parity ^ 1);
            if (lane == 0) {
                barrier_arrive_expect(partial ? patch : full, bytes);
            }
            __syncwarp();
            boxes.copy(box, map, box.row + p.kv_heads * p.block_tokens, to, partial ? patch : full);
            if (partial) {
                // What lies behind a page's tokens may be anything, NaN too, and
                // a weight of 0 does not hide that.
                barrier_wait(patch, patches++ & 1);
                for (uint32_t i = lane; i < S::KEYS; i += 32) {
                    const uint32_t count = __shfl_sync(0xffffffff, box.keys, i >> boxes.shift);
                    if ((i & (boxes.keys - 1)) >= count) {
                        const uint32_t row = to + i / 8 * S::EIGHT + i % 8 * 128;
                        for (uint32_t unit = 0; unit < S::COLUMNS * 8; ++unit) {
                            const uint32_t at = row + unit / 8 * S::COLUMN + unit % 8 * 16;
                            shared_zero_4(at);
                        }
                    }
                }
                fence_async_proxy();
                __syncwarp();
                if (lane == 0) {
                    barrier_arrive(full);
                }
            }
            value_turn.next();
        }
    }
}

// The other warps of the feeding warpgroup: copy queries.
template <class T, uint32_t D>
__device__ __forceinline__ void feed_queries(const Prefill &p, Control<D> &control, uint32_t queries_at) {
    using S = Shape<D>;
    constexpr uint32_t UNITS = D / 8;
    const T *q = static_cast<const T *>(p.q);
    const uint32_t group = p.heads / p.kv_heads;
    Turn<2> pair_turn;
    Turn<S::QUERIES> query_turn;
    Pair pair;
    while (take_pair<D>(control, pair_turn, pair)) {
        barrier_wait(shared_address(&control.query_empty[query_turn.slot]), query_turn.parity ^ 1);
        const uint32_t to = queries_at + query_turn.slot * S::QUERY_BYTES;
        for (uint32_t i = threadIdx.x - 64; i < S::ROWS * UNITS; i += 64) {
            const uint32_t row = i / UNITS;
            const uint32_t unit = i % UNITS;
            const uint32_t m = pair.packed + row;
            const bool use = m < pair.seq.rows * group;
            const uint64_t from = use ? uint64_t(pair.seq.row + m / group) * p.q_stride +
                                            (pair.head * group + m % group) * D + unit * 8
                                      : 0;
            const uint32_t at = to + unit / 8 * S::ROWS * 128 + row * 128 + ((unit % 8) ^ (row % 8)) * 16;
            copy_16_if(use, at, q + from);
        }
        copies_landed();
        fence_async_proxy();
        barrier_arrive(shared_address(&control.query_full[query_turn.slot]));
        query_turn.next();
    }
}

#endif // __CUDA_ARCH_FEAT_SM90_ALL

} // namespace distkv
