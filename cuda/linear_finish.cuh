// What becomes of a tile's sums in the linear kernels: scaled, with a bias, then
// stored, activated, or added to the residual stream.
#pragma once
#include "linear_relay.cuh"
#include "linear_tile.cuh"
#include "rows.cuh"

namespace distkv {

__device__ __forceinline__ float4 operator+(float4 a, float4 b) {
    return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
}

__device__ __forceinline__ float4 operator*(float4 a, float4 b) {
    return {a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w};
}

__device__ __forceinline__ float sum_of(float4 a) { return (a.x + a.y) + (a.z + a.w); }

__device__ __forceinline__ float4 load_4(const float *from) { return *reinterpret_cast<const float4 *>(from); }

template <class T>
__device__ __forceinline__ void store_4(void *to, uint64_t at, float4 y) {
    const float v[4] = {y.x, y.y, y.z, y.w};
    store(static_cast<T *>(to) + at, v);
}

// Where a product of the same launch looks for what it is made from, or null.
struct Handed {
    void *x;        // T [rows of the kernel, in]
    float *squares; // [rows of the kernel, in / 32]
};

template <class T>
__device__ __forceinline__ void hand_4(const Handed &to, uint64_t at, float4 y) {
    Run<T, 4> run;
    run.item[0] = from_float<T>(y.x), run.item[1] = from_float<T>(y.y);
    run.item[2] = from_float<T>(y.z), run.item[3] = from_float<T>(y.w);
    relay_store(static_cast<T *>(to.x) + at, *reinterpret_cast<const uint2 *>(&run));
}

__device__ __forceinline__ float *shared_floats(uint32_t at) {
    return reinterpret_cast<float *>(__cvta_shared_to_generic(at));
}

__device__ __forceinline__ float silu_times(float gate, float up) { return __fdividef(gate, 1.0f + __expf(-gate)) * up; }

// Quads of a row in a tile.
__device__ __forceinline__ uint32_t quads_of(const Linear &p) { return p.tile_units * (p.end == SWIGLU ? UNIT / 8 : UNIT / 4); }

// First feature of a quad of the tile that begins with this unit.
__device__ __forceinline__ uint32_t feature_of(const Linear &p, uint32_t unit, uint32_t quad) {
    return unit * (p.end == SWIGLU ? UNIT / 2 : UNIT) + quad * 4;
}

__device__ __forceinline__ bool is_output(const Linear &p, const Share &share, uint32_t quad, uint32_t feature) {
    return quad < quads_of(p) && feature < (p.end == SWIGLU ? share.units * (UNIT / 2) : p.out_features);
}

// Who finishes what of a tile: with splits, each block every other row; a warp
// some rows at once, four features of one a lane. All is known before the sums
// are, and asked for: what is on the way once they are there is waited for by the
// whole grid.
struct Quad {
    uint32_t row;     // of the first pass
    uint32_t step;    // rows from one pass to the next
    uint32_t quad;    // of the row in the tile
    uint32_t width;   // lanes a row; a row of more quads takes further turns
    uint32_t first;   // the warp's first row: it goes on while that is one

    __device__ __forceinline__ Quad(const Linear &p, const Place &at, uint32_t warp, uint32_t lane) {
        const uint32_t quads = quads_of(p);
        const uint32_t bits = quads <= 8 ? 3 : quads <= 16 ? 4 : 5;
        const uint32_t rank = p.splits == 1 ? 0 : at.rank;
        width = 1 << bits;
        quad = lane & (width - 1);
        first = (warp << (5 - bits)) * p.splits + rank;
        row = first + (lane >> bits) * p.splits;
        step = (CONSUMERS << (5 - bits)) * p.splits;
    }
};

// What is added to four outputs.
struct Added {
    float4 bias, bias_up; // or 0
    float4 stream;        // end 2: the output so far
    float4 norm;          // of what comes next

    __device__ __forceinline__ Added(const Linear &p, uint32_t row, uint32_t feature, bool used) {
        bias = bias_up = stream = norm = {0.0f, 0.0f, 0.0f, 0.0f};
        if (!used) {
            return;
        }
        if (p.bias != nullptr) {
            bias = load_4(p.bias + feature);
            if (p.end == SWIGLU) {
                bias_up = load_4(p.bias + p.out_features / 2 + feature);
            }
        }
        if (p.end == ADD) {
            stream = load_4(static_cast<const float *>(p.out) + uint64_t(row) * p.out_features + feature);
            if (p.next != nullptr) {
                norm = load_4(p.next_norm + feature);
            }
        }
    }
};

// Four features of a row: the sums of all groups of all blocks, always in the
// same order.
__device__ __forceinline__ float4 total(uint32_t from, uint32_t sources, uint32_t source) {
    float4 y = load_4(shared_floats(from));
#pragma unroll 1
    for (uint32_t s = 1; s < sources; s++) {
        y = y + load_4(shared_floats(from + s * source));
    }
    return y;
}

// This block's share of a tile's outputs: what is added to each lane's first quad
// was asked for.
template <class T, uint32_t M, uint32_t END>
__device__ __forceinline__ void finish(const Linear &p, const Share &share, const Place &at, uint32_t unit, uint32_t rows,
                                       const Quad &mine, const Added &asked, const Handed &handed) {
    const uint32_t pitch = (p.tile_units * UNIT + 4) * 4, source = M / p.splits * pitch;
    const uint32_t sources = p.depth > 1 ? 2 * p.splits : p.splits, quads = quads_of(p);
    const uint32_t outs = END == SWIGLU ? p.out_features / 2 : p.out_features;
    const bool feeds = END == ADD && p.next != nullptr, scaled = p.x_squares != nullptr;
    uint32_t row = mine.row;
#pragma unroll 1
    for (uint32_t first = mine.first; first < rows; first += mine.step, row += mine.step) {
#pragma unroll 1
        for (uint32_t base = 0; base < quads; base += mine.width) {
            const uint32_t quad = mine.quad + base, feature = feature_of(p, unit, quad);
            const bool used = row < rows && is_output(p, share, quad, feature);
            const Added add = first == mine.first && base == 0 ? asked : Added(p, row, feature, used);
            float squares = 0.0f;
            if (used) {
                const float s = scaled ? shared_floats(at.scales)[row] : 1.0f;
                const float4 scale{s, s, s, s};
                const uint32_t from = at.sums + (row / p.splits) * pitch;
                const uint64_t to = uint64_t(row) * outs + feature;
                if (END == SWIGLU) {
                    const uint32_t local = from + (quad / 4 * UNIT + quad % 4 * 4) * 4;
                    const float4 g = total(local, sources, source) * scale + add.bias;
                    const float4 u = total(local + 64, sources, source) * scale + add.bias_up;
                    const float4 y{silu_times(g.x, u.x), silu_times(g.y, u.y), silu_times(g.z, u.z), silu_times(g.w, u.w)};
                    if (handed.x != nullptr) {
                        hand_4<T>(handed, to, y);
                    }
                    store_4<T>(p.out, to, y);
                } else {
                    float4 y = total(from + quad * 16, sources, source) * scale + add.bias;
                    if (END == ADD) {
                        y = y + add.stream;
                    }
                    if (feeds) {
                        if (handed.x != nullptr) {
                            hand_4<T>(handed, to, y * add.norm);
                        }
                        store_4<T>(p.next, to, y * add.norm);
                        squares = sum_of(y * y);
                    }
                    if (END == PLAIN) {
                        store_4<T>(p.out, to, y);
                    } else {
                        store_4<float>(p.out, to, y);
                    }
                }
            }
            if (feeds) {
                squares = lanes_sum(squares, UNIT / 4);
                if (used && quad % (UNIT / 4) == 0) {
                    const uint32_t part = row * share.units + feature / UNIT;
                    if (handed.squares != nullptr) {
                        relay_store(handed.squares + part, squares);
                    }
                    p.squares[part] = squares;
                }
            }
        }
    }
}

} // namespace distkv
