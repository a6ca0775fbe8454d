// Paged MicroAttention of sequences with few query rows: one pass over the keys
// and values at the speed of the memory.
//
// A persistent block walks the items that decode_plan.cu gave it, unit by unit.
// One warp brings a unit's K and V into a ring of slots in shared memory, in
// boxes of up to all its rows: memory is fastest where what is asked for
// together lies together, so a box spans the kv heads of a page that fit. Each
// other warp takes 16 rows of every unit, always of the same kv head, with a
// softmax of its own; warps of one kv head join at the end of an item. Parts of
// a sequence that several blocks share go to `parts`, for decode_join.cu.
//
// The products are transposed so that 8 columns of queries suffice for the
// usual group: S^T = K Q^T with 16 keys as the M of m16n8k16, then
// O^T += V^T P^T with 16 of head_dim as M. A column is (query row, head of the
// group).
//
// Keys and values are T, as queries are, or E4M3, which is widened in registers.
// Of 16 elements of head_dim, lane l of four then holds numbers 4 l .. 4 l + 3 of a
// key (queries are read to match), and rows 8 apart of O^T are neighbours.
#include "copies.cuh"
#include "decode.cuh"
#include "e4m3.cuh"

namespace distkv {
namespace {

constexpr uint32_t COLUMNS = 8; // of one matrix instruction
// Scores may exceed the maximum that weights are taken against by this much (in
// base 2) before it is moved: weights stay below 2^8, far from f16's range.
constexpr float SLACK = 8.0f;

// What a head_dim and the element of keys and values make of a block.
template <class K, uint32_t D> struct Shape {
    static constexpr bool FP8 = sizeof(K) == 1;
    static constexpr uint32_t WARPS = decode_rows(D) / 16; // that compute
    static constexpr uint32_t THREADS = WARPS * 32 + 32;
    static constexpr uint32_t ROW = D * sizeof(K);
    static constexpr uint32_t SLOT = decode_rows(D) * ROW; // bytes of a unit's K or V
    // Rows lie in shared memory in groups of 8, in each slices of WIDTH bytes, in
    // each the rows' WIDTH bytes one after another, their 16-byte chunks
    // swizzled as the tensor map does it, so that ldmatrix meets no bank twice
    // (twice where a row is an odd multiple of 32 bytes, unswizzled). Slices are
    // that short a stretch so that memory is read in order, nearly.
    static constexpr uint32_t WIDTH = ROW % 128 == 0 ? 128 : ROW % 64 == 0 ? 64 : ROW;
    static constexpr uint32_t CHUNKS = WIDTH / 16; // of a row in a slice
    // Floats of a column of O in `Shared`: padded, so that the warp's stores of
    // a tile of O^T meet no bank twice.
    static constexpr uint32_t PITCH = D + 4;

    // Bytes from a slot's start to a 16-byte chunk of a row.
    static __device__ __forceinline__ uint32_t at(uint32_t row, uint32_t chunk) {
        const uint32_t swizzle = WIDTH == 128 ? row % 8 : WIDTH == 64 ? row / 2 % 4 : 0;
        return row / 8 * (8 * ROW) + chunk / CHUNKS * (8 * WIDTH) + row % 8 * WIDTH + ((chunk % CHUNKS) ^ swizzle) * 16;
    }
};

// What else a block keeps in shared memory, behind the ring.
template <class K, uint32_t D> struct Shared {
    float o[Shape<K, D>::WARPS][COLUMNS][Shape<K, D>::PITCH];
    float2 state[Shape<K, D>::WARPS][COLUMNS]; // maximum, sum
    uint64_t full[DECODE_SLOTS];
    uint64_t empty[DECODE_SLOTS];
    uint2 cell[DECODE_SLOTS][Shape<K, D>::WARPS]; // of the unit's boxes: position of the first token, tokens to see
};

// A slot of the ring, and the turn that it is in.
struct Place {
    uint32_t slot, parity;

    __device__ __forceinline__ void advance(uint32_t slots) {
        if (++slot == slots)
            slot = 0, parity ^= 1;
    }
};

__device__ __forceinline__ DecodeItem load_item(const DecodeItem *from) {
    DecodeItem item;
    static_assert(sizeof(DecodeItem) == 48, "three loads");
    const uint4 *words = reinterpret_cast<const uint4 *>(from);
    uint4 *to = reinterpret_cast<uint4 *>(&item);
    to[0] = words[0], to[1] = words[1], to[2] = words[2];
    return item;
}

// ---- The warp that brings units ----

// A cell, as its lane found it.
struct Found {
    uint32_t row;      // of its K in the pool, in rows of head_dim
    uint32_t position; // of its first token
    uint32_t tokens;   // that some query may see; 0: it is not brought
};

__device__ __forceinline__ Found find(const Decode &p, const DecodeItem &item, uint32_t cell) {
    Found found = {0, 0, 0};
    if (cell >= item.end)
        return found;
    const uint32_t size = p.box_rows / p.together, cells = p.block_tokens / size;
    const Page *page = p.pages + item.page + cell / cells;
    const uint32_t offset = cell % cells * size;
    found.row = (page->block * 2 * p.kv_heads + item.head) * p.block_tokens + offset;
    found.position = page->position + offset;
    const uint32_t filled = page->tokens, last_own = item.position + item.columns / (p.heads / p.kv_heads) - 1;
    uint32_t tokens = filled > offset ? min(filled - offset, size) : 0;
    if (found.position > last_own)
        tokens = 0;
    if (p.window && tokens && uint64_t(found.position) + tokens - 1 + p.window <= item.position)
        tokens = 0;
    found.tokens = tokens;
    return found;
}

// One box of the pool, from this row.
template <class K, uint32_t D>
__device__ __forceinline__ void bring_box(const Decode &p, uint32_t to, uint32_t row, uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
    copy_box_4(to, p.kv_map, (p.map_row + row) / 8, barrier);
#else
    constexpr uint32_t CHUNKS = Shape<K, D>::ROW / 16;
    const uint8_t *from = static_cast<const uint8_t *>(p.kv) + uint64_t(row) * Shape<K, D>::ROW;
    for (uint32_t i = threadIdx.x % 32; i < p.box_rows * CHUNKS; i += 32)
        copy_16(to + Shape<K, D>::at(i / CHUNKS, i % CHUNKS), from + i * 16);
#endif
}

template <class K, uint32_t D>
__device__ __forceinline__ void bring(const Decode &p, const DecodeItem &first, Shared<K, D> &shared, uint32_t ring) {
    const uint32_t lane = threadIdx.x % 32, cells = decode_rows(D) / p.box_rows, box_bytes = p.box_rows * Shape<K, D>::ROW;
    const uint32_t full = shared_address(shared.full), empty = shared_address(shared.empty);
    Place at = {0, 0};
    // What comes next is asked for while there is still something to bring.
    DecodeItem item = first, after = first;
    Found next = find(p, item, item.begin + lane);
    bool waited = false;
    for (;;) {
        if (item.next != DECODE_NONE)
            after = load_item(p.items + item.next);
        uint32_t base = item.begin;
        do {
            const Found found = next;
            next = base + 32 < item.end ? find(p, item, base + 32 + lane) : find(p, after, after.begin + lane);
            const uint32_t count = base < item.end ? min(item.end - base, 32u) : 0;
            for (uint32_t i = 0; i < count; i += cells) {
                const bool in_unit = lane - i < cells, brought = in_unit && found.tokens;
                const uint32_t boxes = __ballot_sync(~0u, brought);
                if (!waited && __any_sync(~0u, brought && found.position + found.tokens > item.position)) {
                    wait_for_previous();
                    waited = true;
                }
                for (uint32_t value = 0; value < 2; value++) {
                    barrier_wait(empty + at.slot * 8, at.parity ^ 1);
                    const uint32_t slot = ring + at.slot * Shape<K, D>::SLOT, barrier = full + at.slot * 8;
                    const uint32_t row = found.row + value * p.kv_heads * p.block_tokens;
                    if (in_unit)
                        shared.cell[at.slot][lane - i] = make_uint2(found.position, found.tokens);
#if __CUDA_ARCH__ >= 900
                    __syncwarp();
                    if (lane == 0)
                        barrier_arrive_expect(barrier, __popc(boxes) * box_bytes);
                    if (brought)
                        bring_box<K, D>(p, slot + (lane - i) * box_bytes, row, barrier);
#else
                    for (uint32_t left = boxes; left; left &= left - 1) {
                        const uint32_t holder = __ffs(left) - 1;
                        bring_box<K, D>(p, slot + (holder - i) * box_bytes, __shfl_sync(~0u, row, holder), barrier);
                    }
                    barrier_arrive_copies(barrier);
                    __syncwarp();
                    if (lane == 0)
                        barrier_arrive(barrier);
#endif
                    at.advance(p.slots);
                }
            }
            base += 32;
        } while (base < item.end);
        if (item.next == DECODE_NONE)
            break;
        item = after;
    }
}

// ---- The warps that compute ----

// The rows of a unit that a warp takes.
template <uint32_t D> struct Share {
    uint32_t cell;    // of the unit
    uint32_t kv_head; // from the item's first
    uint32_t token;   // of the first row in the cell

    __device__ __forceinline__ Share(const Decode &p, uint32_t warp) {
        const uint32_t size = p.box_rows / p.together;
        cell = warp * 16 / p.box_rows;
        kv_head = warp * 16 % p.box_rows / size;
        token = warp * 16 % p.box_rows % size;
    }
};

// Joins the states in `shared` of the warps that share this kv head, of columns
// `first ..`: one column at a time, the `step`th from `begin` on.
template <class T, class K, uint32_t D>
__device__ __forceinline__ void join(const Decode &p, const DecodeItem &item, const Shared<K, D> &shared, uint32_t first,
                                     uint32_t kv_head, uint32_t begin, uint32_t step) {
    // In each cell, `size` consecutive warps have this head: powers of two all.
    const uint32_t columns = min(item.columns - first, COLUMNS), cell = p.box_rows / 16, shift = __ffs(p.together) - 1;
    const uint32_t size = cell >> shift, sharers = Shape<K, D>::WARPS >> shift;
    float *part = part_of(p.parts, blockIdx.x, blockIdx.x == item.first, p.together, kv_head, D);
#pragma unroll 2
    for (uint32_t column = begin; column < columns; column += step) {
#pragma unroll
        for (uint32_t base = 0; base < D; base += 128) {
            const uint32_t element = base + threadIdx.x % 32 * 4;
            if (D % 128 && element >= D)
                break;
            uint32_t w = kv_head * size;
            float4 o = *reinterpret_cast<const float4 *>(&shared.o[w][column][element]);
            float2 state = shared.state[w][column];
            for (uint32_t i = 1; i < sharers; i++) {
                w = (kv_head + (i >> (__ffs(size) - 1) << shift)) * size + (i & (size - 1));
                add_part(o, state.x, state.y, *reinterpret_cast<const float4 *>(&shared.o[w][column][element]),
                         shared.state[w][column]);
            }
            if (item.parts == 1) {
                finish<T>(p.o, p.lse, head_of(item.row, item.head + kv_head, first + column, p.heads, p.kv_heads), D, element,
                          o, state.x, state.y);
            } else {
                *reinterpret_cast<float4 *>(part + (first + column) * D + element) = o;
                if (element == 0)
                    *state_of(part, first + column, D) = state;
            }
        }
    }
}

// One warp's share of an item: NT times 8 columns over its units, then its
// states into `shared`, joined with those of its kv head.
template <class T, class K, uint32_t D, uint32_t NT>
__device__ __forceinline__ void attend(const Decode &p, const DecodeItem &item, Shared<K, D> &shared, uint32_t ring, Place &at) {
    constexpr uint32_t STEPS = D / 16, WARPS = Shape<K, D>::WARPS;
    constexpr bool FP8 = Shape<K, D>::FP8;
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32_t quad = lane / 4, pair = lane % 4 * 2;
    const uint32_t group = p.heads / p.kv_heads, cells = decode_rows(D) / p.box_rows;
    const uint32_t full = shared_address(shared.full), empty = shared_address(shared.empty);
    const Share<D> share(p, warp);

    uint32_t q[STEPS][NT][2];
    uint32_t own[NT][2]; // position of the query in column pair, pair + 1
#pragma unroll
    for (uint32_t n = 0; n < NT; n++) {
        const uint32_t column = n * COLUMNS + quad;
        const T *from = static_cast<const T *>(p.qkv) +
                        uint64_t(item.row + column / group) * (p.heads + 2 * p.kv_heads) * D +
                        ((item.head + share.kv_head) * group + column % group) * D + (FP8 ? 2 * pair : pair);
#pragma unroll
        for (uint32_t step = 0; step < STEPS; step++)
#pragma unroll
            for (uint32_t half = 0; half < 2; half++)
                q[step][n][half] =
                    column < item.columns ? *reinterpret_cast<const uint32_t *>(from + step * 16 + half * (FP8 ? 2 : 8)) : 0;
#pragma unroll
        for (uint32_t i = 0; i < 2; i++)
            own[n][i] = item.position + min(n * COLUMNS + pair + i, item.columns - 1) / group;
    }
    const uint32_t last_own = item.position + item.columns / group - 1;
    const float scale = p.scale * LOG2_E;

    float o[STEPS][NT][4] = {};
    float max[NT][2], sum[NT][2];
#pragma unroll
    for (uint32_t n = 0; n < NT; n++)
        max[n][0] = max[n][1] = NO_SCORE, sum[n][0] = sum[n][1] = 0;

    // Lanes' places for ldmatrix: for K, matrices (tokens 0-7, 8-15) x (low,
    // high chunk); for V, (low, high chunk) x (tokens 0-7, 8-15).
    const uint32_t key_row = warp * 16 + lane % 16, key_chunk = lane / 16;
    const uint32_t value_row = warp * 16 + lane % 8 + lane / 16 * 8, value_chunk = lane / 8 % 2;

    for (uint32_t unit = item.begin; unit < item.end; unit += cells) {
        barrier_wait(full + at.slot * 8, at.parity);
        const uint2 what = shared.cell[at.slot][share.cell];
        const uint32_t first = what.x + share.token;
        const uint32_t tokens = what.y > share.token ? min(what.y - share.token, 16u) : 0;
        uint32_t weights[NT][2];
        if (tokens) {
            const uint32_t keys = ring + at.slot * Shape<K, D>::SLOT;
            // Two sums, so that half as many products wait for each other; the widest
            // heads have no registers for them.
            float s[NT][2][4] = {};
            uint32_t two[4]; // steps of E4M3
#pragma unroll
            for (uint32_t step = 0; step < STEPS; step++) {
                uint32_t k[4];
                if constexpr (FP8) {
                    if (step % 2 == 0)
                        load_matrices(two, keys + Shape<K, D>::at(key_row, min(step + key_chunk, STEPS - 1)));
                    const uint32_t low = two[step % 2 * 2], high = two[step % 2 * 2 + 1]; // tokens
                    k[0] = widen_two<T, 0, 1>(low), k[1] = widen_two<T, 0, 1>(high);
                    k[2] = widen_two<T, 2, 3>(low), k[3] = widen_two<T, 2, 3>(high);
                } else {
                    load_matrices(k, keys + Shape<K, D>::at(key_row, step * 2 + key_chunk));
                }
#pragma unroll
                for (uint32_t n = 0; n < NT; n++)
                    multiply<T>(s[n][D <= 128 ? step % 2 : 0], k, q[step][n][0], q[step][n][1]);
            }
            const bool masked =
                tokens < 16 || first + 15 > item.position || (p.window && uint64_t(first) + p.window <= last_own);
            float over = -INFINITY;
#pragma unroll
            for (uint32_t n = 0; n < NT; n++)
#pragma unroll
                for (uint32_t i = 0; i < 4; i++) {
                    float score = (s[n][0][i] + s[n][1][i]) * scale;
                    if (masked) {
                        const uint32_t token = quad + i / 2 * 8, position = first + token;
                        if constexpr (D <= 128) {
                            const bool seen = token < tokens && position <= own[n][i % 2] &&
                                              (p.window == 0 || own[n][i % 2] - position < p.window);
                            score = seen ? score : -INFINITY;
                        } else {
                            // The widest heads have no registers for `own`, which is seldom asked for.
                            const uint32_t query =
                                item.position + min(n * COLUMNS + pair + i % 2, item.columns - 1) / group;
                            const bool seen =
                                token < tokens && position <= query && (p.window == 0 || query - position < p.window);
                            score = seen ? score : -INFINITY;
                        }
                    }
                    s[n][0][i] = score;
                    over = fmaxf(over, score - max[n][i % 2]);
                }
            if (__any_sync(~0u, over > SLACK)) {
#pragma unroll
                for (uint32_t n = 0; n < NT; n++)
#pragma unroll
                    for (uint32_t i = 0; i < 2; i++) {
                        float most = fmaxf(max[n][i], fmaxf(s[n][0][i], s[n][0][i + 2]));
#pragma unroll
                        for (uint32_t mask = 4; mask < 32; mask *= 2)
                            most = fmaxf(most, __shfl_xor_sync(~0u, most, mask));
                        const float factor = fast_exp2(max[n][i] - most);
                        max[n][i] = most;
                        sum[n][i] *= factor;
#pragma unroll
                        for (uint32_t step = 0; step < STEPS; step++)
                            o[step][n][i] *= factor, o[step][n][i + 2] *= factor;
                    }
            }
#pragma unroll
            for (uint32_t n = 0; n < NT; n++) {
                float w[4];
#pragma unroll
                for (uint32_t i = 0; i < 4; i++) {
                    w[i] = fast_exp2(s[n][0][i] - max[n][i % 2]);
                    sum[n][i % 2] += w[i];
                }
                weights[n][0] = transpose(pack<T>(w[0], w[1]));
                weights[n][1] = transpose(pack<T>(w[2], w[3]));
            }
        }
        __syncwarp();
        if (lane == 0)
            barrier_arrive(empty + at.slot * 8);
        at.advance(p.slots);

        barrier_wait(full + at.slot * 8, at.parity);
        if (tokens) {
            const uint32_t values = ring + at.slot * Shape<K, D>::SLOT;
            // A slot behind the last token may hold NaN, which a weight of 0
            // would not silence.
            uint32_t keep[2] = {~0u, ~0u};
            if (tokens < 16)
#pragma unroll
                for (uint32_t half = 0; half < 2; half++) {
                    const uint32_t token = half * 8 + pair;
                    keep[half] = (token < tokens ? 0xffffu : 0) | (token + 1 < tokens ? 0xffff0000u : 0);
                }
            uint32_t two[4]; // steps of E4M3
#pragma unroll
            for (uint32_t step = 0; step < STEPS; step++) {
                uint32_t v[4];
                if constexpr (FP8) {
                    if (step % 2 == 0)
                        load_matrices_transposed(two, values + Shape<K, D>::at(value_row, min(step + value_chunk, STEPS - 1)));
                    const uint32_t low = two[step % 2], high = two[step % 2 + 2]; // tokens
                    v[0] = widen_two<T, 0, 2>(low), v[1] = widen_two<T, 1, 3>(low);
                    v[2] = widen_two<T, 0, 2>(high), v[3] = widen_two<T, 1, 3>(high);
                } else {
                    load_matrices_transposed(v, values + Shape<K, D>::at(value_row, step * 2 + value_chunk));
                }
                v[0] &= keep[0], v[1] &= keep[0], v[2] &= keep[1], v[3] &= keep[1];
#pragma unroll
                for (uint32_t n = 0; n < NT; n++)
                    multiply<T>(o[step][n], v, weights[n][0], weights[n][1]);
            }
        }
        __syncwarp();
        if (lane == 0)
            barrier_arrive(empty + at.slot * 8);
        at.advance(p.slots);
    }

    const bool alone = p.together == WARPS; // with its kv head
#pragma unroll
    for (uint32_t n = 0; n < NT; n++) {
#pragma unroll
        for (uint32_t i = 0; i < 2; i++) {
            for (uint32_t mask = 4; mask < 32; mask *= 2)
                sum[n][i] += __shfl_xor_sync(~0u, sum[n][i], mask);
            if (quad == 0)
                shared.state[warp][pair + i] = make_float2(max[n][i], sum[n][i]);
#pragma unroll
            for (uint32_t step = 0; step < STEPS; step++) {
                const uint32_t row = step * 16 + (FP8 ? 2 * quad : quad);
                shared.o[warp][pair + i][row] = o[step][n][i];
                shared.o[warp][pair + i][row + (FP8 ? 1 : 8)] = o[step][n][i + 2];
            }
        }
        if (alone) {
            __syncwarp();
            join<T, K, D>(p, item, shared, n * COLUMNS, share.kv_head, 0, 1);
            __syncwarp();
        } else {
            sync_threads(WARPS * 32);
            const uint32_t shift = __ffs(p.together) - 1;
            join<T, K, D>(p, item, shared, n * COLUMNS, warp & (p.together - 1), warp >> shift, WARPS >> shift);
            sync_threads(WARPS * 32);
        }
    }
}

// NT: eights of columns that an item may have.
template <class T, class K, uint32_t D, uint32_t NT> __device__ __forceinline__ void decode(const Decode &p) {
    // The swizzle counts from addresses that are multiples of 1024.
    extern __shared__ __align__(1024) uint8_t dynamic[];
    Shared<K, D> &shared = *reinterpret_cast<Shared<K, D> *>(dynamic + p.slots * Shape<K, D>::SLOT);
    const uint32_t ring = shared_address(dynamic), warp = threadIdx.x / 32;
    // The plan is older than the kernel before this one: no need to wait.
    const DecodeItem first = load_item(p.items + blockIdx.x);
#if __CUDA_ARCH__ >= 900
    if (threadIdx.x == Shape<K, D>::WARPS * 32)
        prefetch_map(p.kv_map);
#endif
    if (threadIdx.x < p.slots) {
        // A lane's 16-byte copies arrive by themselves.
#if __CUDA_ARCH__ >= 900
        barrier_init(shared_address(shared.full + threadIdx.x), 1);
#else
        barrier_init(shared_address(shared.full + threadIdx.x), 33);
#endif
        barrier_init(shared_address(shared.empty + threadIdx.x), Shape<K, D>::WARPS);
        barrier_init_done();
    }
    __syncthreads();
    launch_next();
    if (first.columns == 0) {
        wait_for_previous();
        return;
    }
    if (warp == Shape<K, D>::WARPS) {
        bring<K, D>(p, first, shared, ring);
        return;
    }
    wait_for_previous();
    Place at = {0, 0};
    for (DecodeItem item = first;; item = load_item(p.items + item.next)) {
        if (NT == 1 || item.columns <= COLUMNS)
            attend<T, K, D, 1>(p, item, shared, ring, at);
        else
            attend<T, K, D, NT>(p, item, shared, ring, at);
        if (item.next == DECODE_NONE)
            break;
    }
}

} // namespace
} // namespace distkv

// The narrow ones leave so many registers that a block of decode_join.cu stands
// by on the same multiprocessor, and takes none of the time in which a block of
// the next kernel could begin to bring its units: the compiler is told of more
// threads than there are.
#define DECODE(NAME, T, K, D)                                                                                          \
    extern "C" __global__ void __launch_bounds__(distkv::Shape<K, D>::THREADS, 1)                                      \
        attention_decode_d##D##_##NAME(const __grid_constant__ distkv::Decode p) {                                     \
        distkv::decode<T, K, D, 2>(p);                                                                                 \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(D <= 128 ? 512 : 384, 1)                                              \
        attention_decode_narrow_d##D##_##NAME(const __grid_constant__ distkv::Decode p) {                              \
        distkv::decode<T, K, D, 1>(p);                                                                                 \
    }
#define DECODE_ALL(D)                                                                                                  \
    DECODE(bf16, __nv_bfloat16, __nv_bfloat16, D)                                                                      \
    DECODE(f16, __half, __half, D)                                                                                     \
    DECODE(fp8_bf16, __nv_bfloat16, distkv::E4m3, D)
DECODE_ALL(64)
DECODE_ALL(80)
DECODE_ALL(96)
DECODE_ALL(128)
DECODE_ALL(256)
