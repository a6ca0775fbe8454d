// What the linear kernels are told, and how a launch is put together.
//
// Grid: blocks = clusters * cluster, all of which must be resident at once (one
// block fills a multiprocessor). Cluster (cluster, 1, 1), 1 ..= 8.
// LINEAR_THREADS threads. Programmatic stream serialisation is understood. No
// two launches may run at the same time on one device.
//
// Dynamic shared memory, bytes, at most 232448:
//   stage = 32768 + stage_depth * rows * 128
//   sums  = max over products of min(depth, 2) * rows * (tile_units * 32 + 4) * 4
//   1024 + stages * stage + sums
//
// Tensor maps, all of 16-bit elements, 128-byte swizzle, zeros outside:
//   weights [out, in]: boxes of 64 x 32 (end 1: 64 x 16), L2 promotion 256 bytes
//   x [rows of the kernel, in], its own pitch: boxes of 64 x rows
#pragma once
#include <cuda.h>
#include <stddef.h>

#include "api.h"

namespace distkv {

constexpr uint32_t MAX_PRODUCTS = 4;

struct LinearArgs {
    CUtensorMap weights[MAX_PRODUCTS + 1]; // the last used may be the next launch's: see `ahead`
    CUtensorMap x[MAX_PRODUCTS];
    Linear product[MAX_PRODUCTS + 1];
    LinearChain chain;
};
// The host writes the same bytes.
static_assert(offsetof(LinearArgs, x) == 640 && offsetof(LinearArgs, product) == 1152, "as in Rust");
static_assert(offsetof(LinearArgs, chain) == 1592 && sizeof(LinearArgs) == 1664 && alignof(LinearArgs) == 128, "as in Rust");

} // namespace distkv
