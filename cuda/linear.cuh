// What the linear kernels are told, and how a launch is put together.
//
// Grid: blocks = clusters * cluster, all of which must be resident at once (one
// block fills a multiprocessor). Cluster (cluster, 1, 1), 1 or 2. LINEAR_THREADS
// threads. Programmatic stream serialisation is understood. No two launches may
// run at the same time on one device. Products of a launch with the same `out` have
// the same tile_units and splits: who adds to a feature reads only what he wrote
// himself.
//
// Dynamic shared memory, bytes, at most 232448:
//   stage = max over products of tile_units * depth * 4096 + depth * rows * 128
//   sums  = max over products of min(depth, 2) * rows * (tile_units * 32 + 4) * 4, and 4096
//   1024 + stages * stage + sums
//
// Tensor maps, all of 16-bit elements, 128-byte swizzle, zeros outside, each with
// the box that is one stage; strides in elements:
//   weights [out, in]: (64, out, in / 64) by (1, in, 64), boxes (64, 32 tile_units, depth)
//   with end 1: (64, 16, 2, out / 32, in / 64) by (1, in, in * out / 2, 16 in, 64),
//     boxes (64, 16, 2, tile_units, depth)
//   x [rows of the kernel, in] of its own pitch: (64, rows, in / 64) by (1, pitch, 64),
//     boxes (64, rows, depth)
#pragma once
#include <cuda.h>
#include <stddef.h>

#include "api.h"

namespace distkv {

constexpr uint32_t MAX_PRODUCTS = 4;

struct LinearArgs {
    CUtensorMap weights[MAX_PRODUCTS];
    CUtensorMap x; // of the first product
    CUtensorMap handed[2][MAX_PRODUCTS - 1]; // of the others: in either half of the relay; twice the same where fenced
    Linear product[MAX_PRODUCTS];
    LinearChain chain;
};
// The host writes the same bytes.
static_assert(offsetof(LinearArgs, x) == 512 && offsetof(LinearArgs, handed) == 640, "as in Rust");
static_assert(offsetof(LinearArgs, product) == 1408 && offsetof(LinearArgs, chain) == 1760, "as in Rust");
static_assert(sizeof(LinearArgs) == 1792 && alignof(LinearArgs) == 128, "as in Rust");

} // namespace distkv
