// The copy engine of Hopper: boxes of a matrix, brought to shared memory or to the L2
// cache. Their bytes count at `barrier`, also those that lie outside of the tensor,
// which are zeros. Addresses `uint32_t` are in the shared window. Everything here needs
// sm_90.
#pragma once
#include <cuda.h>
#include <stdint.h>

namespace distkv {

// What is read once is the first to leave the L2 cache.
constexpr uint64_t EVICT_FIRST = 0x12f0000000000000; // what createpolicy.fractional.L2::evict_first gives

// The box at (0, b, c).
__device__ __forceinline__ void copy_box_3(uint32_t to, const CUtensorMap *map, uint32_t b, uint32_t c, uint32_t barrier) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1, {0, %2, %3}], [%4], %5;" ::"r"(to),
                 "l"(map), "r"(b), "r"(c), "r"(barrier), "l"(EVICT_FIRST)
                 : "memory");
}

// The same where it stays: it is read again soon.
__device__ __forceinline__ void copy_box_3_kept(uint32_t to, const CUtensorMap *map, uint32_t b, uint32_t c, uint32_t barrier) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {0, %2, %3}], [%4];" ::"r"(to),
                 "l"(map), "r"(b), "r"(c), "r"(barrier)
                 : "memory");
}

// The box at (0, 0, 0, d).
__device__ __forceinline__ void copy_box_4(uint32_t to, const void *map, uint32_t d, uint32_t barrier) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1, {%2, %2, %2, %3}], [%4], %5;" ::"r"(to),
                 "l"(map), "r"(0), "r"(d), "r"(barrier), "l"(EVICT_FIRST)
                 : "memory");
}

// The box at (a, 0, 0, d), where it stays.
__device__ __forceinline__ void copy_box_4_kept(uint32_t to, const void *map, uint32_t a, uint32_t d, uint32_t barrier) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
                 "[%1, {%3, %5, %5, %4}], [%2];" ::"r"(to),
                 "l"(map), "r"(barrier), "r"(a), "r"(d), "r"(0)
                 : "memory");
}

// The box at (0, 0, 0, d, e).
__device__ __forceinline__ void copy_box_5(uint32_t to, const CUtensorMap *map, uint32_t d, uint32_t e, uint32_t barrier) {
    asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1, {0, 0, 0, %2, %3}], [%4], %5;" ::"r"(to),
                 "l"(map), "r"(d), "r"(e), "r"(barrier), "l"(EVICT_FIRST)
                 : "memory");
}

// The boxes of `copy_box_3` and `copy_box_5`, into the L2 cache.
__device__ __forceinline__ void fetch_box_3(const CUtensorMap *map, uint32_t b, uint32_t c) {
    asm volatile("cp.async.bulk.prefetch.tensor.3d.L2.global.tile [%0, {0, %1, %2}];" ::"l"(map), "r"(b), "r"(c) : "memory");
}

__device__ __forceinline__ void fetch_box_5(const CUtensorMap *map, uint32_t d, uint32_t e) {
    asm volatile("cp.async.bulk.prefetch.tensor.5d.L2.global.tile [%0, {0, 0, 0, %1, %2}];" ::"l"(map), "r"(d), "r"(e)
                 : "memory");
}

// A map that will be used soon.
__device__ __forceinline__ void prefetch_map(const void *map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Orders this thread's plain writes of shared memory before what the tensor
// cores and the copy engine do after the next barrier.
__device__ __forceinline__ void fence_async_proxy() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

} // namespace distkv
