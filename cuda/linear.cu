// Linear layers of few rows: the weights, which are read once, set the time, so
// everything serves to keep them coming.
//
// The unit of the weights is a brick, 32 features x 64 elements of `in`, 4 KiB
// in shared memory as the copy engine leaves it. (With SwiGLU, 16 gate features
// and the 16 up features that belong to them.) A block takes a tile of
// `tile_units` bricks abreast and walks along `in`; a stage of its ring holds the
// tile's bricks at `depth` consecutive places of `in`, and the same places of the
// rows of x. One thread asks for bricks, one for x, and two groups of four warps
// multiply, 64 features at a time: where depth is 1 each group takes every other
// 64 features, else each takes every other place, with sums of its own.
//
// The blocks of a cluster share a tile and split `in`. Sums meet in shared
// memory, every block finishes a part of the tile, and always adds in the same
// order: results do not depend on timing.
//
// A launch runs several products, each made from the one before. Weights depend
// on nothing: the ring takes in the next product's while this one is finished,
// the grid meets and x is fetched, so that memory idles little; likewise before
// the first product, while the kernel before is still running. After the last,
// the next launch's first weights can be brought to the L2 cache.
#include "rows.cuh"

namespace distkv {

constexpr uint32_t CONSUMERS = 8;                         // warps that multiply
constexpr uint32_t LINEAR_THREADS = 32 * (CONSUMERS + 2); // and one warp for weights, one for x

} // namespace distkv

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDA_ARCH__)
#include "linear.cuh"
#include "pipeline.cuh"

namespace distkv {

constexpr uint32_t UNIT = 32;                // features a brick
constexpr uint32_t DEPTH = 64;               // elements of `in` a brick
constexpr uint32_t BRICK = UNIT * DEPTH * 2; // bytes
constexpr uint32_t STAGE_BRICKS = 8;
constexpr uint32_t MAX_STAGES = 16;
constexpr uint32_t HEAD = 1024; // bytes of shared memory before the ring: barriers and scales

enum End : uint32_t { PLAIN, SWIGLU, ADD, LOGITS };

// The block's shared memory, and its place in the grid.
struct Place {
    uint32_t full;    // barriers: a stage was filled
    uint32_t empty;   // barriers: a stage was read
    uint32_t summed; // barrier: the sums of all blocks of the cluster are there
    uint32_t taken;   // barrier: and were read
    uint32_t scales; // [M] f32
    uint32_t ring;    // the first stage
    uint32_t stage;   // bytes a stage
    uint32_t sums;    // [groups][M][pitch] f32
    uint32_t rank;    // in the cluster
    uint32_t blocks; // of the cluster
};

// A block's share of a product.
struct Share {
    uint32_t units;      // of the matrix
    uint32_t tiles;      // of the matrix
    uint32_t first;      // tile,
    uint32_t step;       // and from one to the next
    uint32_t begin, end; // places of `in`
    __device__ __forceinline__ Share(const Linear &p, const Place &at) {
        const bool whole = p.splits == 1;
        const uint32_t rank = whole ? 0 : at.rank, together = whole ? 1 : at.blocks;
        const uint32_t places = (p.in_features + DEPTH - 1) / DEPTH;
        units = p.end == SWIGLU ? p.out_features / UNIT : (p.out_features + UNIT - 1) / UNIT;
        tiles = (units + p.tile_units - 1) / p.tile_units;
        first = blockIdx.x / together;
        step = gridDim.x / together;
        begin = places * rank / together;
        end = places * (rank + 1) / together;
    }
};

// A stage and the parity of its phase.
struct Cursor {
    uint32_t slot, parity;
    __device__ __forceinline__ void advance(uint32_t stages) {
        if (++slot == stages) {
            slot = 0;
            parity ^= 1;
        }
    }
};

// ---- The thread that brings weights ----

__device__ __forceinline__ void copy_unit(const Linear &p, const Share &share, uint32_t to, const CUtensorMap *map,
                                          uint32_t place, uint32_t unit, uint32_t barrier) {
    if (p.end == SWIGLU) {
        copy_box(to, map, place * DEPTH, unit * 16, barrier);
        copy_box(to + BRICK / 2, map, place * DEPTH, (share.units + unit) * 16, barrier);
    } else {
        copy_box(to, map, place * DEPTH, unit * UNIT, barrier);
    }
}

__device__ __forceinline__ void prefetch_unit(const Linear &p, const Share &share, const CUtensorMap *map,
                                              uint32_t place, uint32_t unit) {
    if (p.end == SWIGLU) {
        prefetch_box(map, place * DEPTH, unit * 16);
        prefetch_box(map, place * DEPTH, (share.units + unit) * 16);
    } else {
        prefetch_box(map, place * DEPTH, unit * UNIT);
    }
}

// The stages of a product in order: what(place, places, unit, units) until false.
template <class F>
__device__ __forceinline__ void each_stage(const Linear &p, const Share &share, F what) {
    for (uint32_t tile = share.first; tile < share.tiles; tile += share.step) {
        const uint32_t unit = tile * p.tile_units, units = min(p.tile_units, share.units - unit);
        for (uint32_t place = share.begin; place < share.end; place += p.depth) {
            if (!what(place, min(p.depth, share.end - place), unit, units)) {
                return;
            }
        }
    }
}

__device__ __forceinline__ void bring_weights(const LinearArgs &a, const Place &at) {
    Cursor c{0, 1};
    for (uint32_t i = 0; i < a.chain.count; i++) {
        const Linear &p = a.product[i];
        const Share share(p, at);
        each_stage(p, share, [&](uint32_t place, uint32_t places, uint32_t unit, uint32_t units) {
            barrier_wait(at.empty + c.slot * 8, c.parity);
            const uint32_t barrier = at.full + c.slot * 8, to = at.ring + c.slot * at.stage;
            barrier_arrive_expect(barrier, places * units * BRICK);
            for (uint32_t k = 0; k < places; k++) {
                for (uint32_t u = 0; u < units; u++) {
                    copy_unit(p, share, to + (k * p.tile_units + u) * BRICK, &a.weights[i], place + k, unit + u, barrier);
                }
            }
            c.advance(a.chain.stages);
            return true;
        });
    }
    launch_next();
    uint32_t left = a.chain.ahead;
    if (left > 0) {
        const Linear &p = a.product[a.chain.count];
        const Share share(p, at);
        each_stage(p, share, [&](uint32_t place, uint32_t places, uint32_t unit, uint32_t units) {
            for (uint32_t k = 0; k < places; k++) {
                for (uint32_t u = 0; u < units; u++) {
                    prefetch_unit(p, share, &a.weights[a.chain.count], place + k, unit + u);
                }
            }
            return --left > 0;
        });
    }
}

// ---- The thread that brings x ----

template <uint32_t M>
__device__ __forceinline__ void bring_rows(const LinearArgs &a, const Place &at) {
    const uint32_t start = grid_read(a.chain.barrier);
    Cursor c{0, 1};
    for (uint32_t i = 0; i < a.chain.count; i++) {
        const Linear &p = a.product[i];
        if (i > 0) {
            grid_wait(a.chain.barrier, start, i);
        }
        each_stage(p, Share(p, at), [&](uint32_t place, uint32_t places, uint32_t, uint32_t) {
            barrier_wait(at.empty + c.slot * 8, c.parity);
            const uint32_t barrier = at.full + c.slot * 8, to = at.ring + c.slot * at.stage + STAGE_BRICKS * BRICK;
            barrier_arrive_expect(barrier, places * M * DEPTH * 2);
            for (uint32_t k = 0; k < places; k++) {
                copy_box(to + k * M * DEPTH * 2, &a.x[i], (place + k) * DEPTH, 0, barrier);
            }
            c.advance(a.chain.stages);
            return true;
        });
    }
}

// ---- The warps that multiply ----

__device__ __forceinline__ float4 operator+(float4 a, float4 b) {
    return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
}

// Four features of a row: the sums of all groups of all blocks, always in the
// same order.
template <uint32_t M>
__device__ __forceinline__ float4 total(const Linear &p, const Place &at, uint32_t row, uint32_t feature) {
    const uint32_t pitch = p.tile_units * UNIT + 4, group = M * pitch * 4, from = at.sums + (row * pitch + feature) * 4;
    float4 y{0.0f, 0.0f, 0.0f, 0.0f};
    for (uint32_t s = 0; s < p.splits; s++) {
        const uint32_t rank = p.splits == 1 ? at.rank : s;
        y = y + read_peer_4(from, rank);
        if (p.depth > 1) {
            y = y + read_peer_4(from + group, rank);
        }
    }
    return y;
}

template <class T>
__device__ __forceinline__ void store_4(void *to, uint64_t at, float4 y) {
    const float v[4] = {y.x, y.y, y.z, y.w};
    store(static_cast<T *>(to) + at, v);
}

__device__ __forceinline__ float4 scaled(float4 y, float scale, const float *bias, uint32_t feature) {
    y = {y.x * scale, y.y * scale, y.z * scale, y.w * scale};
    return bias == nullptr ? y : y + *reinterpret_cast<const float4 *>(bias + feature);
}

__device__ __forceinline__ float silu_times(float gate, float up) { return gate / (1.0f + __expf(-gate)) * up; }

// This block's share of a tile's outputs.
template <class T, uint32_t M>
__device__ __forceinline__ void finish(const Linear &p, const Share &share, const Place &at, uint32_t unit,
                                       uint32_t rows, uint32_t thread) {
    // A quad is four outputs of a row; those of a row are abreast in threads.
    const float *scales = reinterpret_cast<const float *>(__cvta_shared_to_generic(at.scales));
    const uint32_t unit_quads = p.end == SWIGLU ? UNIT / 8 : UNIT / 4;
    const uint32_t quads = p.tile_units * unit_quads, all = rows * quads;
    const uint32_t rank = p.splits == 1 ? 0 : at.rank;
    const bool feeds = p.end == ADD && p.next != nullptr;
    for (uint32_t i = rank * CONSUMERS * 32; i < all; i += p.splits * CONSUMERS * 32) {
        const uint32_t index = i + thread, row = index / quads, quad = index - row * quads;
        const uint32_t u = quad / unit_quads, in_unit = (quad - u * unit_quads) * 4, local = u * UNIT + in_unit;
        bool used = index < all && unit + u < share.units;
        float squares = 0.0f;
        if (p.end == SWIGLU) {
            if (used) {
                const uint32_t n = p.out_features / 2, feature = (unit + u) * 16 + in_unit;
                const float4 g = scaled(total<M>(p, at, row, local), scales[row], p.bias, feature);
                const float4 v = scaled(total<M>(p, at, row, local + 16), scales[row], p.bias, n + feature);
                const float4 y{silu_times(g.x, v.x), silu_times(g.y, v.y), silu_times(g.z, v.z), silu_times(g.w, v.w)};
                store_4<T>(p.out, uint64_t(row) * n + feature, y);
            }
            continue;
        }
        const uint32_t feature = (unit + u) * UNIT + in_unit;
        used = used && feature < p.out_features;
        if (used) {
            const uint64_t to = uint64_t(row) * p.out_features + feature;
            float4 y = scaled(total<M>(p, at, row, local), scales[row], p.bias, feature);
            if (p.end == PLAIN) {
                store_4<T>(p.out, to, y);
            } else {
                if (p.end == ADD) {
                    y = y + *reinterpret_cast<const float4 *>(static_cast<const float *>(p.out) + to);
                }
                store_4<float>(p.out, to, y);
                if (feeds) {
                    squares = y.x * y.x + y.y * y.y + y.z * y.z + y.w * y.w;
                    const float4 w = *reinterpret_cast<const float4 *>(p.next_norm + feature);
                    store_4<T>(p.next, to, {y.x * w.x, y.y * w.y, y.z * w.z, y.w * w.w});
                }
            }
        }
        if (feeds) {
            squares = lanes_sum(squares, UNIT / 4);
            if (used && in_unit == 0) {
                p.squares[row * share.units + unit + u] = squares;
            }
        }
    }
}

// 1 / rms of each row that x is made from.
template <uint32_t M>
__device__ __forceinline__ void find_scales(const Linear &p, const Place &at, uint32_t rows, uint32_t warp,
                                            uint32_t lane) {
    float *scales = reinterpret_cast<float *>(__cvta_shared_to_generic(at.scales));
    const uint32_t parts = (p.in_features + UNIT - 1) / UNIT;
    for (uint32_t row = warp; row < rows; row += CONSUMERS) {
        float sum = 0.0f;
        if (p.x_squares != nullptr) {
            for (uint32_t i = lane; i < parts; i += 32) {
                sum += p.x_squares[row * parts + i];
            }
        }
        sum = lanes_sum(sum);
        if (lane == 0) {
            scales[row] = p.x_squares == nullptr ? 1.0f : rsqrtf(sum / float(p.in_features) + p.eps);
        }
    }
}

// A stage's share of a group of warps: adds bricks times rows.
template <class T, uint32_t M>
__device__ __forceinline__ void multiply_stage(float (&sums)[2][M / 2], const Linear &p, uint32_t stage,
                                               uint32_t places, uint32_t units, uint32_t group) {
    const bool deep = p.depth > 1;
#pragma unroll
    for (uint32_t j = 0; j < 2; j++) {
        const uint32_t pair = deep ? j : 2 * j + group;
        if (pair * 2 < units) {
            for (uint32_t k = deep ? group : 0; k < places; k += 2) {
                const uint64_t w = matrix_at(stage + (k * p.tile_units + pair * 2) * BRICK);
                const uint64_t x = matrix_at(stage + STAGE_BRICKS * BRICK + k * M * DEPTH * 2);
                multiply_fence();
#pragma unroll
                for (uint32_t piece = 0; piece < DEPTH / 16; piece++) {
                    multiply<T>(sums[j], w + piece * 2, x + piece * 2);
                }
                multiply_commit();
            }
        }
    }
    multiply_wait<0>();
}

// A group's sums of a tile, to shared memory.
template <uint32_t M>
__device__ __forceinline__ void store_sums(const float (&sums)[2][M / 2], const Linear &p, const Place &at,
                                           uint32_t group, uint32_t warp, uint32_t lane) {
    const bool deep = p.depth > 1;
    const uint32_t pitch = p.tile_units * UNIT + 4;
    float *to = reinterpret_cast<float *>(__cvta_shared_to_generic(at.sums)) + (deep ? group * M * pitch : 0);
#pragma unroll
    for (uint32_t j = 0; j < 2; j++) {
        const uint32_t feature = (deep ? j : 2 * j + group) * 64 + warp % 4 * 16 + lane / 4;
        if (feature < p.tile_units * UNIT) {
#pragma unroll
            for (uint32_t v = 0; v < M / 2; v++) {
                to[(v / 4 * 8 + lane % 4 * 2 + v % 2) * pitch + feature + v / 2 % 2 * 8] = sums[j][v];
            }
        }
    }
}

template <class T, uint32_t M>
__device__ __forceinline__ void consume(const LinearArgs &a, const Place &at, uint32_t thread) {
    const uint32_t lane = thread % 32, warp = __shfl_sync(0xffffffff, thread / 32, 0), group = warp / 4;
    const uint32_t start = grid_read(a.chain.barrier);
    uint32_t meetings = 0; // of the cluster
    Cursor c{0, 0};
    for (uint32_t n = 0; n < a.chain.count; n++) {
        const Linear &p = a.product[n];
        const Share share(p, at);
        if (n > 0) {
            if (thread == 0) {
                grid_wait(a.chain.barrier, start, n);
            }
            sync_threads(CONSUMERS * 32);
        }
        const uint32_t rows = min(*p.rows, M);
        find_scales<M>(p, at, rows, warp, lane);
        for (uint32_t tile = share.first; tile < share.tiles; tile += share.step) {
            const uint32_t unit = tile * p.tile_units, units = min(p.tile_units, share.units - unit);
            float sums[2][M / 2] = {};
            for (uint32_t place = share.begin; place < share.end; place += p.depth, c.advance(a.chain.stages)) {
                barrier_wait(at.full + c.slot * 8, c.parity);
                multiply_stage<T, M>(sums, p, at.ring + c.slot * at.stage, min(p.depth, share.end - place), units, group);
                if (lane == 0) {
                    barrier_arrive(at.empty + c.slot * 8);
                }
            }
            const bool shared = p.splits > 1;
            if (shared && meetings > 0) {
                barrier_wait_cluster(at.taken, (meetings - 1) & 1);
            }
            sync_threads(CONSUMERS * 32); // nobody reads the sums of the tile before any more
            store_sums<M>(sums, p, at, group, warp, lane);
            sync_threads(CONSUMERS * 32);
            if (shared) {
                if (thread < at.blocks) {
                    barrier_arrive_at(at.summed, thread);
                }
                barrier_wait_cluster(at.summed, meetings & 1);
            }
            finish<T, M>(p, share, at, unit, rows, thread);
            if (shared) {
                meetings++;
                sync_threads(CONSUMERS * 32);
                if (thread < at.blocks) {
                    barrier_arrive_at(at.taken, thread);
                }
            }
        }
        if (n + 1 < a.chain.count) {
            sync_threads(CONSUMERS * 32);
            if (thread == 0) {
                grid_arrive(a.chain.barrier);
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
    at.summed = base + MAX_STAGES * 16;
    at.taken = at.summed + 8;
    at.scales = at.taken + 8;
    at.ring = base + HEAD;
    at.stage = STAGE_BRICKS * BRICK + a.chain.stage_depth * M * DEPTH * 2;
    at.sums = at.ring + a.chain.stages * at.stage;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(at.rank));
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(at.blocks));

    if (threadIdx.x == CONSUMERS * 32) {
        for (uint32_t s = 0; s < a.chain.stages; s++) {
            barrier_init(at.full + s * 8, 2);
            barrier_init(at.empty + s * 8, CONSUMERS);
        }
        barrier_init(at.summed, at.blocks);
        barrier_init(at.taken, at.blocks);
        barrier_init_done();
    }
    __syncthreads();
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
        } else if (threadIdx.x % 32 == 0) {
            bring_rows<M>(a, at);
        }
        __syncwarp();
    }
    if (at.blocks > 1) {
        cluster_leave(); // peers may still read the sums of this block
        cluster_wait();
    }
}

} // namespace distkv

#define DISTKV_LINEAR(M, T, name)                                                                                      \
    extern "C" __global__ void __launch_bounds__(distkv::LINEAR_THREADS, 1)                                           \
        linear_m##M##_##name(const __grid_constant__ distkv::LinearArgs a) {                                           \
        distkv::linear<T, M>(a);                                                                                       \
    }
#else
#define DISTKV_LINEAR(M, T, name)                                                                                      \
    extern "C" __global__ void __launch_bounds__(distkv::LINEAR_THREADS, 1) linear_m##M##_##name() { __trap(); }
#endif

#define DISTKV_LINEAR_ROWS(T, name)                                                                                    \
    DISTKV_LINEAR(8, T, name)                                                                                          \
    DISTKV_LINEAR(16, T, name)                                                                                         \
    DISTKV_LINEAR(32, T, name)
DISTKV_LINEAR_ROWS(__nv_bfloat16, bf16)
DISTKV_LINEAR_ROWS(__half, f16)
