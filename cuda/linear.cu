// Linear layers of few rows: the weights, which are read once, set the time, so
// everything serves to keep them coming.
//
// The unit of the weights is a brick, 32 features x 64 elements of `in`, 4 KiB
// in shared memory as the copy engine leaves it. (With SwiGLU, 16 gate features
// and the 16 up features that belong to them.) A block takes a tile of
// `tile_units` bricks abreast and walks along `in`; a stage of its ring holds the
// tile's bricks at `depth` consecutive places of `in`, and the same places of the
// rows of x, each one copy. One thread asks for bricks, one for x, and two groups
// of four warps multiply, 64 features at a time: where depth is 1 each group takes
// every other 64 features, else each takes every other place, with sums of its own.
//
// The blocks of a cluster share a tile and split `in`: each sends the other what
// it has of the rows that are the other's to finish. Sums are always added in the
// same order: results do not depend on timing.
//
// A launch runs several products, each made from the one before, whose rows are
// handed on as linear_relay.cuh has it. Weights depend on nothing: the ring takes in
// the next product's while this one is finished and x is handed on, so that memory
// idles little; likewise before the first product, while the kernel before is still
// running.
#include "linear_tile.cuh"

namespace distkv {

constexpr uint32_t LINEAR_REGISTERS_FOR = 512; // threads: see below

} // namespace distkv

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDA_ARCH__)
#include "barrier.cuh"
#include "cluster.cuh"
#include "copies.cuh"
#include "linear.cuh"
#include "linear_finish.cuh"
#include "linear_relay.cuh"
#include "wgmma.cuh"

namespace distkv {

// Barriers by number: 1 is `sync_threads`.
constexpr uint32_t MADE = 2, SCALES = 3;
constexpr uint32_t LINEAR_THREADS = 32 * (CONSUMERS + 3); // and warps for weights, x, scales

// Rows of a product that are in use, and have been made.
template <uint32_t M>
__device__ __forceinline__ uint32_t rows_of(const LinearArgs &a, uint32_t n) {
    const uint32_t rows = min(*a.product[n].rows, M);
    return n == 0 ? rows : min(rows, *a.product[n - 1].rows);
}

// ---- The thread that brings weights ----

// A stage is one box: what lies outside of the matrix is zeros, and counts. If all
// were asked for as there is room, blocks in crowded parts of the chip would be
// served less than others, and everybody waits for the last; and whatever else
// goes to memory would queue behind the weights. So each block asks at the pace of
// its fair share.
//
// While the ring is full, as sums or x are waited for, one stage more goes as far as
// the L2 cache, by which a step takes a hundredth less. (With several it does not: the
// memory is idle while they are taken from there. Nor with small ones.)
constexpr uint32_t LATE = 320;  // nanoseconds that room is waited for beyond a stage's turn
constexpr uint32_t SMALL = 400; // nanoseconds from one stage to the next

__device__ __forceinline__ void bring_weights(const LinearArgs &a, const Place &at) {
    const uint32_t stages = a.chain.stages;
    Cursor c{0, 1};
    uint32_t due = nanoseconds();
    for (uint32_t i = 0; i < a.chain.count; i++) {
        const Linear &p = a.product[i];
        const uint32_t bytes = p.tile_units * p.depth * BRICK, pause = bytes / 1024 * p.pace / 1000;
        const bool gated = p.end == SWIGLU;
        const CUtensorMap *map = &a.weights[i];
        each_stage(p, Share(p, at), [&](uint32_t place, uint32_t unit) {
            const uint32_t room = at.empty + c.slot * 8;
            bool asked = false;
            while (pause > SMALL && !asked && !barrier_try(room, c.parity, LATE / 4)) {
                const uint32_t now = nanoseconds();
                if (int32_t(now - due) > int32_t(LATE)) {
                    if (gated) {
                        fetch_box_5(map, unit, place);
                    } else {
                        fetch_box_3(map, unit * UNIT, place);
                    }
                    due = now + pause;
                    asked = true;
                }
            }
            barrier_wait(room, c.parity);
            if (!asked) {
                uint32_t now = nanoseconds();
                while (int32_t(due - now) > 0) {
                    now = nanoseconds();
                }
                due = now + pause;
            }
            const uint32_t barrier = at.full + c.slot * 8, to = at.ring + c.slot * at.stage;
            barrier_arrive_expect(barrier, bytes);
            if (gated) {
                copy_box_5(to, map, unit, place, barrier);
            } else {
                copy_box_3(to, map, unit * UNIT, place, barrier);
            }
            c.advance(stages);
        });
    }
    launch_next();
}

// ---- The warp that brings x ----

__device__ __forceinline__ uint32_t rows_at(const Linear &p, const Place &at, uint32_t slot) {
    return at.ring + slot * at.stage + p.tile_units * p.depth * BRICK;
}

// A stage's rows, by one thread; their bytes count at `barrier`.
template <uint32_t M>
__device__ __forceinline__ void ask_rows(const Linear &p, const Place &at, const CUtensorMap *map, uint32_t slot,
                                         uint32_t place, uint32_t barrier) {
    barrier_arrive_expect(barrier, p.depth * M * DEPTH * 2);
    copy_box_3_kept(rows_at(p, at, slot), map, 0, place, barrier);
}

template <uint32_t M>
__device__ __forceinline__ void bring_rows(const LinearArgs &a, const Place &at, uint32_t lane) {
    const uint32_t turn = relay_turn(a.chain), stages = a.chain.stages;
    const RelayStart start(a.chain);
    __syncwarp();
    named_arrive(MADE, (CONSUMERS + 2) * 32); // the counts were read: this block may count
    Cursor c{0, 1};
    for (uint32_t n = 0; n < a.chain.count; n++) {
        const Linear &p = a.product[n];
        const CUtensorMap *map = n == 0 ? &a.x : &a.handed[turn][n - 1];
        const Share share(p, at);
        uint32_t until = 0; // places that the turns before the last make; 0: of all it is known that they are there
        if (n > 0 && share.first < share.tiles) {
            const Share before(a.product[n - 1], at);
            until = before.early(a.product[n - 1]) / DEPTH;
            relay_wait(a.chain, start, 2 * n - (until > 0 ? 2 : 1));
        }
        if (lane == 0) {
            each_stage(p, share, [&](uint32_t place, uint32_t) {
                if (until > 0 && place + p.depth > until) {
                    relay_wait(a.chain, start, 2 * n - 1);
                    until = 0;
                }
                barrier_wait(at.empty + c.slot * 8, c.parity);
                ask_rows<M>(p, at, map, c.slot, place, at.fed + c.slot * 8);
                c.advance(stages);
            });
        }
    }
}

// ---- The warp that finds scales ----

// 1 / rms of the rows that x is made from, from sums of squares of 32 elements
// each, for the warps that multiply: beside them, and in time for their first tile.
template <uint32_t M>
__device__ __forceinline__ void find_scales(const LinearArgs &a, const Place &at, uint32_t lane) {
    constexpr uint32_t AT_ONCE = 8;
    const uint32_t turn = relay_turn(a.chain);
    const RelayStart start(a.chain);
    __syncwarp();
    named_arrive(MADE, (CONSUMERS + 2) * 32);
    const uint8_t *half = relay_half(a.chain, turn);
    for (uint32_t n = 0; n < a.chain.count; n++) {
        const Linear &p = a.product[n];
        const bool handed = n > 0 && !a.chain.fenced;
        const float *squares = p.x_squares;
        if (n == 1 && handed) {
            relay_clear<M>(a, turn, lane);
        }
        if (handed) {
            squares = reinterpret_cast<const float *>(half + M * p.in_features * 2);
            half += relay_bytes<M>(p);
        }
        const Share share(p, at);
        if (p.x_squares == nullptr || share.first >= share.tiles) {
            continue;
        }
        if (n > 0 && a.chain.fenced) {
            relay_wait(a.chain, start, 2 * n - 1);
        }
        const uint32_t rows = rows_of<M>(a, n), parts = p.in_features / UNIT;
        const float part = __fdividef(1.0f, float(p.in_features));
        for (uint32_t row = 0; row < rows; row += AT_ONCE) {
            float sum[AT_ONCE] = {};
            for (uint32_t base = lane * 2; base < parts; base += 64) { // parts are even
                float2 two[AT_ONCE] = {};
#pragma unroll
                for (uint32_t r = 0; r < AT_ONCE; r++) {
                    if (row + r < rows) {
                        two[r] = load_words(squares + (row + r) * parts + base);
                    }
                }
#pragma unroll
                for (uint32_t r = 0; r < AT_ONCE; r++) {
                    while (handed && is_absent(two[r])) {
                        two[r] = load_words(squares + (row + r) * parts + base);
                    }
                    sum[r] += two[r].x + two[r].y;
                }
            }
#pragma unroll
            for (uint32_t r = 0; r < AT_ONCE; r++) {
                sum[r] = lanes_sum(sum[r]);
                if (lane == 0 && row + r < rows) {
                    shared_floats(at.scales)[row + r] = rsqrtf(sum[r] * part + p.eps);
                }
            }
        }
        named_wait(SCALES, (CONSUMERS + 1) * 32); // and not on to the next before they are taken
    }
}

// ---- The warps that multiply ----

// Rows of 64 elements as the copy engine leaves them; 16 elements on is 32 bytes on.
// (Masked behind the shift: the machine code that was measured.)
__device__ __forceinline__ uint64_t brick_at(uint32_t address) {
    return (address >> 4 & 0x3fff) | operand(0, 16, 1024);
}

// What a group of warps multiplies of each stage, as descriptors: up to two pairs of
// bricks (64 features each) at up to four places.
struct Lot {
    uint64_t weights, rows;             // of the ring's first slot
    uint32_t pair, weights_on, rows_on; // from one pair to the next, from one place to the next

    __device__ __forceinline__ Lot(const Linear &p, const Place &at, uint32_t m, uint32_t group) {
        const uint32_t x = at.ring + p.tile_units * p.depth * BRICK;
        if (p.depth == 1) { // pairs of its own
            // A pair that the tile lacks is another one: it comes to nothing, but must lie in memory.
            weights = brick_at(at.ring + (group * 2 < p.tile_units ? group * 2 * BRICK : 0));
            rows = brick_at(x);
            pair = group * 2 + 4 < p.tile_units ? 4 * BRICK >> 4 : 0;
            weights_on = rows_on = 0;
        } else { // every other place of `in`
            weights = brick_at(at.ring + group * p.tile_units * BRICK);
            rows = brick_at(x + group * m * DEPTH * 2);
            pair = 2 * BRICK >> 4;
            weights_on = 2 * p.tile_units * BRICK >> 4;
            rows_on = 2 * m * DEPTH * 2 >> 4;
        }
    }
};

// Which stages' rows are to be looked at: all of a block's first tile, and behind it
// those that were asked for before that was multiplied.
struct Looked {
    const CUtensorMap *map; // of the rows
    uint32_t rows;          // in use
    uint32_t left;          // stages that are still to be looked at
    uint32_t again;         // times that a stage's rows were asked for again
};

// Until a stage's rows in use are all there: by all that multiply, each a part, as
// one warp would take longer than the stage does to come.
template <uint32_t M>
__device__ __forceinline__ void look_at_rows(const Linear &p, const Place &at, Looked &looked, uint32_t slot, uint32_t place,
                                             uint32_t thread) {
    const uint32_t from = rows_at(p, at, slot);
    while (true) {
        uint32_t most = 0; // ABSENT is the most that there is
        for (uint32_t i = thread; i < p.depth * M * 8; i += CONSUMERS * 32) {
            if (i / 8 % M < looked.rows) {
                const uint4 v = shared_load_4(from + i * 16);
                most = max(max(most, max(v.x, v.y)), max(v.z, v.w));
            }
        }
        if (!any_of_threads(CONSUMERS * 32, most == ABSENT)) {
            return;
        }
        if (thread == 0) {
            ask_rows<M>(p, at, looked.map, slot, place, at.again);
        }
        barrier_wait(at.again, looked.again++ & 1);
    }
}

// A tile: adds its stages' bricks times rows. A stage is given back as soon as it was
// multiplied, for the ring to be on its way to memory: multiplying is by far the
// faster. What is multiplied is known to the compiler: where it does not know it,
// each multiplication waits for the one before.
template <class T, uint32_t M, uint32_t PAIRS, uint32_t PLACES>
__device__ __forceinline__ void multiply_tile(float (&sums)[2][M / 2], const Linear &p, const Share &share, const Lot &lot,
                                              const Place &at, Cursor &c, uint32_t stages, Looked &looked, uint32_t thread) {
#pragma unroll 1
    for (uint32_t place = share.begin; place < share.end; place += p.depth) {
        barrier_wait(at.fed + c.slot * 8, c.parity);
        if (looked.left > 0) {
            looked.left--;
            look_at_rows<M>(p, at, looked, c.slot, place, thread);
        }
        barrier_wait(at.full + c.slot * 8, c.parity);
        const uint64_t w = lot.weights + (c.slot * at.stage >> 4), x = lot.rows + (c.slot * at.stage >> 4);
        wgmma_fence();
#pragma unroll
        for (uint32_t k = 0; k < PLACES; k++) {
#pragma unroll
            for (uint32_t j = 0; j < PAIRS; j++) {
#pragma unroll
                for (uint32_t piece = 0; piece < DEPTH / 16; piece++) {
                    Wgmma<T, M>::ss(sums[j], w + j * lot.pair + k * lot.weights_on + piece * 2,
                                    x + k * lot.rows_on + piece * 2, 1);
                }
            }
        }
        wgmma_commit();
        wgmma_wait<0>();
        if (thread % 32 == 0) {
            barrier_arrive(at.empty + c.slot * 8);
        }
        c.advance(stages);
    }
}

// A group's sums of a tile, to who finishes them: with splits, of even rows the
// first block of the cluster, of odd rows the second.
template <uint32_t M>
__device__ __forceinline__ void store_sums(const float (&sums)[2][M / 2], const Linear &p, const Place &at, uint32_t rows,
                                           uint32_t group, uint32_t warp, uint32_t lane) {
    const bool deep = p.depth > 1, shared = p.splits > 1;
    const uint32_t pitch = (p.tile_units * UNIT + 4) * 4, feature = warp % 4 * 16 + lane / 4, rank = shared ? at.rank : 0;
    const uint32_t source = deep ? rank * 2 + group : rank, first = deep ? 0 : group * 64;
    const uint32_t here = at.sums + source * (M / p.splits) * pitch + (shared ? 1 : 2) * (lane % 4) * pitch + (first + feature) * 4;
    const uint32_t there = peer_address(here, at.rank ^ 1), barrier = peer_address(at.summed, at.rank ^ 1);
    const uint32_t to_next = deep ? 256 : 512; // bytes from one of its pairs to the next
    // Rows of a lane's values: two that follow each other, then 8 on.
    const uint32_t even = lane % 4 * 2;
#pragma unroll
    for (uint32_t j = 0; j < 2; j++) {
        const bool inside = first + j * (to_next / 4) + warp % 4 * 16 < p.tile_units * UNIT;
#pragma unroll
        for (uint32_t v = 0; v < M / 2; v += 2) {
            const uint32_t row = v / 4 * 8 + even, offset = j * to_next + v / 2 % 2 * 32;
            if (shared) {
                const uint32_t to = v / 4 * 4 * pitch + offset;
                store_shared_if(inside && row + rank < rows, here + to, sums[j][v], sums[j][v + 1], rank);
                store_peer_if(inside && row + 1 - rank < rows, there + to, sums[j][v + 1], sums[j][v], rank, barrier);
            } else {
                const uint32_t to = v / 4 * 8 * pitch + offset;
                store_shared_if(inside && row < rows, here + to, sums[j][v], sums[j][v], 0);
                store_shared_if(inside && row + 1 < rows, here + to + pitch, sums[j][v + 1], sums[j][v + 1], 0);
            }
        }
    }
}

// The other block of the cluster may send sums: this one has read those before. Its
// barriers take turns, as it may be behind by one.
__device__ __forceinline__ void give(const Place &at, uint32_t thread, uint32_t &gives) {
    if (thread == 0) {
        barrier_arrive_at(at.taken + gives % 2 * 8, at.rank ^ 1);
    }
    gives++;
}

template <class T, uint32_t M>
__device__ __forceinline__ void consume(const LinearArgs &a, const Place &at, uint32_t thread) {
    const uint32_t lane = thread % 32, warp = __shfl_sync(0xffffffff, thread / 32, 0), group = warp / 4;
    const uint32_t turn = relay_turn(a.chain), stages = a.chain.stages;
    uint8_t *half = relay_half(a.chain, turn);
    Looked looked{nullptr, 0, 0, 0};
    uint32_t meetings = 0, gives = 0, takes = 0; // of the cluster
    Cursor c{0, 0};
    named_wait(MADE, (CONSUMERS + 2) * 32); // this block's other warps have read the counts: it may count
    for (uint32_t n = 0; n < a.chain.count; n++) {
        const Linear &p = a.product[n];
        const Share share(p, at);
        const uint32_t rows = rows_of<M>(a, n);
        const Quad mine(p, at, warp, lane);
        const bool scaled = p.x_squares != nullptr, shared = p.splits > 1;
        Handed handed{nullptr, nullptr};
        if (n + 1 < a.chain.count && !a.chain.fenced) {
            const Linear &next = a.product[n + 1];
            handed = {half, reinterpret_cast<float *>(half + M * next.in_features * 2)};
            half += relay_bytes<M>(next);
        }
        if (shared && n > 0 && share.first < share.tiles) { // all have read the sums of the product before
            give(at, thread, gives);
        }
        if (n > 0 && !a.chain.fenced) {
            looked.map = &a.handed[turn][n - 1], looked.rows = rows;
            looked.left = (share.end - share.begin + p.depth - 1) / p.depth + stages;
        }
        const Lot lot(p, at, M, group);
        const uint32_t pairs = p.tile_units > (p.depth == 1 ? 4 : 2) ? 2 : 1; // depth is 1, 2, 4 or 8
        for (uint32_t tile = share.first; tile < share.tiles; tile += share.step) {
            const uint32_t unit = tile * p.tile_units;
            const uint32_t feature = feature_of(p, unit, mine.quad);
            const Added asked(p, mine.row, feature, mine.row < rows && is_output(p, share, mine.quad, feature));
            // What the other block will send. With one row that is nothing, and who waits for it
            // must have done so before it is said of the next tile.
            const auto expect_sums = [&] {
                if (shared && thread == 0) {
                    barrier_arrive_expect(at.summed, (rows + 1 - at.rank) / 2 * p.tile_units * UNIT * 4 * (p.depth > 1 ? 2 : 1));
                }
            };
            if (tile == share.first) {
                expect_sums();
            }
            float sums[2][M / 2] = {};
            if (p.depth == 8) {
                multiply_tile<T, M, 1, 4>(sums, p, share, lot, at, c, stages, looked, thread);
            } else if (pairs == 2) {
                multiply_tile<T, M, 2, 1>(sums, p, share, lot, at, c, stages, looked, thread);
            } else if (p.depth == 4) {
                multiply_tile<T, M, 1, 2>(sums, p, share, lot, at, c, stages, looked, thread);
            } else {
                multiply_tile<T, M, 1, 1>(sums, p, share, lot, at, c, stages, looked, thread);
            }
            if (tile != share.first) {
                sync_threads(CONSUMERS * 32); // nobody reads the sums of the tile before any more
                expect_sums();
                if (shared) {
                    give(at, thread, gives);
                }
            }
            if (shared && (n > 0 || tile != share.first)) {
                barrier_wait(at.taken + takes % 2 * 8, takes / 2 % 2);
                takes++;
            }
            store_sums<M>(sums, p, at, rows, group, warp, lane);
            if (scaled && tile == share.first) {
                named_wait(SCALES, (CONSUMERS + 1) * 32);
            } else {
                sync_threads(CONSUMERS * 32);
            }
            if (shared) {
                barrier_wait_cluster(at.summed, meetings++ & 1);
            }
            if (p.end == ADD) {
                finish<T, M, ADD>(p, share, at, unit, rows, mine, asked, handed);
            } else if (p.end == SWIGLU) {
                finish<T, M, SWIGLU>(p, share, at, unit, rows, mine, asked, handed);
            } else if (p.end == PLAIN) {
                finish<T, M, PLAIN>(p, share, at, unit, rows, mine, asked, handed);
            } else {
                finish<T, M, LOGITS>(p, share, at, unit, rows, mine, asked, handed);
            }
            if (tile + 2 * share.step == share.first + share.turns * share.step && n + 1 < a.chain.count) {
                sync_threads(CONSUMERS * 32);
                if (thread == 0) {
                    relay_stored(a.chain, 2 * n);
                }
            }
        }
        if (n + 1 < a.chain.count) {
            sync_threads(CONSUMERS * 32);
            if (thread == 0) {
                relay_stored(a.chain, 2 * n + 1);
            }
        }
    }
}

template <class T, uint32_t M>
__device__ __forceinline__ void linear(const LinearArgs &a) {
    extern __shared__ __align__(1024) uint8_t shared[];
    const uint32_t base = shared_address(shared), warp = threadIdx.x / 32;
    Place at;
    at.full = base;
    at.empty = base + MAX_STAGES * 8;
    at.fed = base + MAX_STAGES * 16;
    at.again = base + MAX_STAGES * 24;
    at.summed = at.again + 8;
    at.taken = at.summed + 8;
    at.scales = at.taken + 16;
    at.ring = base + HEAD;
    at.stage = a.chain.stage;
    at.sums = at.ring + a.chain.stages * at.stage;
    at.rank = cluster_rank_again();
    at.blocks = cluster_blocks_again();

    if (warp == CONSUMERS + 1 && threadIdx.x % 32 < a.chain.count) {
        prefetch_map(&a.weights[threadIdx.x % 32]);
        if (threadIdx.x % 32 == 0) {
            prefetch_map(&a.x);
        } else {
            prefetch_map(&a.handed[0][threadIdx.x % 32 - 1]);
            prefetch_map(&a.handed[1][threadIdx.x % 32 - 1]);
        }
    }
    if (warp == CONSUMERS) {
        if (threadIdx.x % 32 == 0) {
            for (uint32_t s = 0; s < a.chain.stages; s++) {
                barrier_init(at.full + s * 8, 1);
                barrier_init(at.fed + s * 8, 1);
                barrier_init(at.empty + s * 8, CONSUMERS);
            }
            barrier_init(at.again, 1);
            barrier_init(at.summed, 1);
            barrier_init(at.taken, 1);
            barrier_init(at.taken + 8, 1);
            barrier_init_done();
        }
        __syncwarp();
        named_arrive(MADE, LINEAR_THREADS);
    } else {
        named_wait(MADE, LINEAR_THREADS);
    }
    if (at.blocks > 1) {
        cluster_arrive(); // peers must not arrive at barriers that are not there yet
    }
    if (warp == CONSUMERS) {
        if (threadIdx.x % 32 == 0) {
            bring_weights(a, at);
        }
        __syncwarp();
        if (at.blocks > 1) {
            cluster_wait();
        }
    } else {
        if (at.blocks > 1) {
            cluster_wait();
        }
        wait_for_previous();
        if (warp < CONSUMERS) {
            consume<T, M>(a, at, threadIdx.x);
        } else if (warp == CONSUMERS + 2) {
            find_scales<M>(a, at, threadIdx.x % 32);
        } else {
            bring_rows<M>(a, at, threadIdx.x % 32);
        }
        __syncwarp();
    }
    if (at.blocks > 1) {
        cluster_arrive(); // peers may still send to this block
        cluster_wait();
    } else {
        __syncthreads();
    }
    if (a.chain.count > 1 && !a.chain.fenced && threadIdx.x == 0) {
        relay_come(a.chain, RELAY_LAUNCHES);
    }
}

} // namespace distkv

// The compiler is told of more threads than there are: a block of the kernel before
// or behind this one has registers beside it.
#define DISTKV_LINEAR(M, T, name)                                                                                      \
    extern "C" __global__ void __launch_bounds__(distkv::LINEAR_REGISTERS_FOR, 1)                                     \
        linear_m##M##_##name(const __grid_constant__ distkv::LinearArgs a) {                                           \
        distkv::linear<T, M>(a);                                                                                       \
    }
#else
#define DISTKV_LINEAR(M, T, name)                                                                                      \
    extern "C" __global__ void __launch_bounds__(distkv::LINEAR_REGISTERS_FOR, 1) linear_m##M##_##name() { __trap(); }
#endif

#define DISTKV_LINEAR_ROWS(T, name)                                                                                    \
    DISTKV_LINEAR(8, T, name)                                                                                          \
    DISTKV_LINEAR(16, T, name)                                                                                         \
    DISTKV_LINEAR(32, T, name)
DISTKV_LINEAR_ROWS(__nv_bfloat16, bf16)
DISTKV_LINEAR_ROWS(__half, f16)
