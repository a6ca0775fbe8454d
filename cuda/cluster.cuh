// Blocks that work on one row together: a cluster, which reads one another's
// shared memory. On devices without clusters a cluster is one block.
//
// A block must not read another's memory before a cluster_sync, nor end while
// another may still read its own.
#pragma once
#include "shared.cuh"

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

// The same where the compiler may read them again instead of keeping them.
__device__ __forceinline__ uint32_t cluster_rank_again() {
    uint32_t rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

__device__ __forceinline__ uint32_t cluster_blocks_again() {
    uint32_t blocks;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
    return blocks;
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

// The two halves of a barrier that publishes nothing: this block has come so far, and
// all have.
__device__ __forceinline__ void cluster_arrive() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#endif
}

// The place in the shared memory of block `rank` that is `at` in this block's.
__device__ __forceinline__ uint32_t peer_address(uint32_t at, uint32_t rank) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    uint32_t peer;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(peer) : "r"(at), "r"(rank));
    return peer;
#else
    return at;
#endif
}

// As `store_shared_if`, to a peer's memory; who waits at its barrier for the bytes
// sees it.
__device__ __forceinline__ void store_peer_if(bool so, uint32_t peer, float a, float b, uint32_t second, uint32_t peer_barrier) {
    asm volatile("{\n\t.reg .pred so, second;\n\t.reg .f32 value;\n\tsetp.ne.b32 so, %4, 0;\n\tsetp.ne.b32 second, %5, 0;\n\t"
                 "selp.f32 value, %2, %1, second;\n\t"
                 "@so st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], value, [%3];\n\t}" ::"r"(peer),
                 "f"(a), "f"(b), "r"(peer_barrier), "r"(uint32_t(so)), "r"(second)
                 : "memory");
}

// Writes to block `rank`'s memory what would lie at `to` in this one's.
__device__ __forceinline__ void store_peer(float4 *to, uint32_t rank, float4 v) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(peer_address(shared_address(to), rank)), "f"(v.x),
                 "f"(v.y), "f"(v.z), "f"(v.w)
                 : "memory");
#else
    *to = v;
#endif
}

__device__ __forceinline__ void store_peer(float2 *to, uint32_t rank, float2 v) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(peer_address(shared_address(to), rank)), "f"(v.x), "f"(v.y)
                 : "memory");
#else
    *to = v;
#endif
}

// `at`, an address in this block's shared memory, read in block `rank`'s.
__device__ __forceinline__ uint64_t read_peer(const uint64_t *at, uint32_t rank) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    uint64_t value;
    const uint32_t peer = peer_address(shared_address(at), rank);
    asm volatile("ld.shared::cluster.u64 %0, [%1];" : "=l"(value) : "r"(peer) : "memory");
    return value;
#else
    return *at;
#endif
}

__device__ __forceinline__ uint32_t read_peer(const uint32_t *at, uint32_t rank) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    uint32_t value;
    const uint32_t peer = peer_address(shared_address(at), rank);
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(value) : "r"(peer) : "memory");
    return value;
#else
    return *at;
#endif
}

} // namespace distkv
