// Blocks that work on one row together: a cluster, which reads one another's
// shared memory. On devices without clusters a cluster is one block.
//
// A block must not read another's memory before a cluster_sync, nor end while
// another may still read its own.
#pragma once
#include <cuda_runtime.h>
#include <stdint.h>

namespace distkv {

__device__ __forceinline__ uint32_t cluster_rank() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
#else
    return 0;
#endif
}

__device__ __forceinline__ uint32_t cluster_blocks() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    uint32_t blocks;
    asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
    return blocks;
#else
    return 1;
#endif
}

// A barrier of all threads of the cluster, after which each sees what the
// others wrote to shared memory before it.
__device__ __forceinline__ void cluster_sync() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.aligned;\n\tbarrier.cluster.wait.aligned;" ::: "memory");
#else
    __syncthreads();
#endif
}

// `at`, an address in this block's shared memory, read in block `rank`'s.
__device__ __forceinline__ uint64_t read_peer(const uint64_t *at, uint32_t rank) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    uint32_t peer;
    uint64_t value;
    const uint32_t here = uint32_t(__cvta_generic_to_shared(at));
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(peer) : "r"(here), "r"(rank));
    asm volatile("ld.shared::cluster.u64 %0, [%1];" : "=l"(value) : "r"(peer) : "memory");
    return value;
#else
    return *at;
#endif
}

__device__ __forceinline__ uint32_t read_peer(const uint32_t *at, uint32_t rank) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    uint32_t peer, value;
    const uint32_t here = uint32_t(__cvta_generic_to_shared(at));
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(peer) : "r"(here), "r"(rank));
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(value) : "r"(peer) : "memory");
    return value;
#else
    return *at;
#endif
}

} // namespace distkv
