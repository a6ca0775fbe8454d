// The plan of a step's prefill attention: which tiles of query rows there are,
// which tiles of keys each one sees, and in which order to take them. It holds
// for every layer of the step that has the same sliding window, so the planner
// runs once a step and its searches cost nothing in the layers.
//
// A tile of rows packs (row, head of the group) pairs: packed row m of a
// sequence is row m / group, head m % group, so short chunks fill the matrix
// instruction too. A tile of keys is `tile_keys` consecutive slots of the
// sequence's page list, each page counting block_tokens slots whether filled or
// not.
#pragma once
#include "paged_kv.cuh"

namespace distkv {

// One tile of packed rows; the grid takes (tile, kv head) pairs.
struct PrefillTile {
    uint32_t seq;   // index in Seq[]
    uint32_t tile;  // packed rows tile * tile_rows ..
    uint32_t begin; // first tile of keys that any of its rows sees
    uint32_t end;   // one behind the last; end <= begin: no key is seen
};

// Head of the plan in device memory; PrefillTile[capacity], in the order in
// which to take them, follows, and as many behind those as scratch.
struct PrefillHeader {
    uint32_t next;          // pair to take next; 0 between launches
    uint32_t done;          // blocks that found no pair; 0 between launches
    uint32_t tiles;         // tiles in use
    uint32_t section_heads; // kv heads taken together, so that their keys stay in L2
    uint32_t reserved[4];
};

__device__ __forceinline__ PrefillHeader *plan_header(uint32_t *plan) {
    return reinterpret_cast<PrefillHeader *>(plan);
}

__device__ __forceinline__ PrefillTile *plan_tiles(uint32_t *plan) {
    return reinterpret_cast<PrefillTile *>(plan + sizeof(PrefillHeader) / 4);
}

// Pair `index` of the plan: tiles from long to short inside a section of heads,
// section after section.
__device__ __forceinline__ void
plan_pair(const PrefillHeader &header, uint32_t index, uint32_t kv_heads, uint32_t &tile, uint32_t &head) {
    const uint32_t section = index / (header.section_heads * header.tiles);
    const uint32_t first = section * header.section_heads;
    const uint32_t heads = min(header.section_heads, kv_heads - first);
    const uint32_t rest = index - first * header.tiles;
    tile = rest / heads;
    head = first + rest % heads;
}

// Leaves the counters at 0 for the next launch. One thread of every block calls
// this once, after it drew an index behind the last pair: the last block to do
// so knows that nobody draws any more.
__device__ __forceinline__ void plan_leave(PrefillHeader *header) {
    if (atomicAdd(&header->done, 1) == gridDim.x - 1) {
        header->done = 0;
        header->next = 0;
    }
}

} // namespace distkv
