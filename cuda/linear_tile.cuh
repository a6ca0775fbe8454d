// Where a block of the linear kernels stands: its shared memory, and its share of a
// product. linear.cu says what a brick, a tile and a stage are.
#pragma once
#include "api.h"

namespace distkv {

constexpr uint32_t CONSUMERS = 8; // warps that multiply
constexpr uint32_t UNIT = 32;                // features a brick
constexpr uint32_t DEPTH = 64;               // elements of `in` a brick
constexpr uint32_t BRICK = UNIT * DEPTH * 2; // bytes
constexpr uint32_t MAX_STAGES = 16;
constexpr uint32_t HEAD = 1024; // bytes of shared memory before the ring: barriers and scales

enum End : uint32_t { PLAIN, SWIGLU, ADD, LOGITS };

// The block's shared memory, and its place in the grid.
struct Place {
    uint32_t full;    // barriers: a stage's weights are there
    uint32_t fed;     // barriers: its rows of x are
    uint32_t empty;   // barriers: a stage was read
    uint32_t again;   // barrier: rows of x that were not there have been brought again
    uint32_t summed;  // barrier: what the other block of the cluster had for this one is there
    uint32_t taken;   // two barriers in turn: the other block has read what this one sent
    uint32_t scales;  // [M] f32
    uint32_t ring;    // the first stage
    uint32_t stage;   // bytes a stage
    uint32_t sums;    // [source][rows that this block finishes][pitch] f32: see `store_sums`
    uint32_t rank;    // in the cluster
    uint32_t blocks;  // of the cluster
};

// A block's share of a product.
struct Share {
    uint32_t units;      // of the matrix
    uint32_t tiles;      // of the matrix
    uint32_t first;      // tile,
    uint32_t step;       // and from one to the next
    uint32_t turns;      // tiles of the block with most
    uint32_t begin, end; // places of `in`, whole stages but for the last of the matrix

    __device__ __forceinline__ Share(const Linear &p, const Place &at) {
        const bool whole = p.splits == 1;
        const uint32_t rank = whole ? 0 : at.rank, together = whole ? 1 : at.blocks;
        const uint32_t places = p.in_features / DEPTH, stages = (places + p.depth - 1) / p.depth;
        units = p.end == SWIGLU ? p.out_features / UNIT : (p.out_features + UNIT - 1) / UNIT;
        tiles = (units + p.tile_units - 1) / p.tile_units;
        first = blockIdx.x / together;
        step = gridDim.x / together;
        turns = (tiles + step - 1) / step;
        begin = stages * rank / together * p.depth;
        end = min(stages * (rank + 1) / together * p.depth, places);
    }

    // Outputs of all turns but the last.
    __device__ __forceinline__ uint32_t early(const Linear &p) const {
        return (turns - 1) * step * p.tile_units * (p.end == SWIGLU ? UNIT / 2 : UNIT);
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

// The stages of a product in order: what(place, unit).
template <class F>
__device__ __forceinline__ void each_stage(const Linear &p, const Share &share, F what) {
    for (uint32_t tile = share.first; tile < share.tiles; tile += share.step) {
        for (uint32_t place = share.begin; place < share.end; place += p.depth) {
            what(place, tile * p.tile_units);
        }
    }
}

} // namespace distkv
