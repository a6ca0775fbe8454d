// How a block of a Hopper kernel is fed: tiles of a matrix that the copy engine
// brings to shared memory, and the barriers of a cluster beside those of
// barrier.cuh. Addresses `uint32_t` are in the shared window.
// Everything here needs sm_90.
#pragma once
#include "barrier.cuh"

#include <cuda.h>
#include <cuda_fp16.h>

namespace distkv {

// ---- Barriers ----

// Arrives at the barrier at this place in block `rank` of the cluster: what this
// thread read may be written over. It publishes nothing to that block.
__device__ __forceinline__ void barrier_arrive_at(uint32_t barrier, uint32_t rank) {
    asm volatile("{\n\t.reg .b32 peer;\n\t"
                 "mapa.shared::cluster.u32 peer, %0, %1;\n\t"
                 "mbarrier.arrive.shared::cluster.b64 _, [peer];\n\t}" ::"r"(barrier),
                 "r"(rank)
                 : "memory");
}

// As `barrier_wait`, where other blocks of the cluster arrive, whose writes are
// then seen.
__device__ __forceinline__ void barrier_wait_cluster(uint32_t barrier, uint32_t parity) {
    asm volatile("{\n\t.reg .pred done;\n\t"
                 "again:\n\t"
                 "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n\t"
                 "@!done bra again;\n\t}" ::"r"(barrier),
                 "r"(parity)
                 : "memory");
}

// Barrier 2, for what one warp makes and others wait for, threads of both counted.
__device__ __forceinline__ void made_arrive(uint32_t threads) {
    asm volatile("bar.arrive 2, %0;" ::"r"(threads) : "memory");
}
__device__ __forceinline__ void made_wait(uint32_t threads) { asm volatile("bar.sync 2, %0;" ::"r"(threads) : "memory"); }

// Barrier 3, for scales.
__device__ __forceinline__ void scales_wait(uint32_t threads) { asm volatile("bar.sync 3, %0;" ::"r"(threads) : "memory"); }

// ---- Copies ----

// What is read once is the first to leave the L2 cache.
constexpr uint64_t EVICT_FIRST = 0x12f0000000000000; // what createpolicy.fractional.L2::evict_first gives

// The box at (0, b, c) of a tensor, into shared memory; its bytes count at
// `barrier`, also those that lie outside of the tensor, which are zeros.
__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap *map, uint32_t b, uint32_t c, uint32_t barrier) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1, {0, %2, %3}], [%4], %5;" ::"r"(to),
                 "l"(map), "r"(b), "r"(c), "r"(barrier), "l"(EVICT_FIRST)
                 : "memory");
}

// The same where it stays: it is read again soon.
__device__ __forceinline__ void copy_box_kept(uint32_t to, const CUtensorMap *map, uint32_t b, uint32_t c,
                                              uint32_t barrier) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {0, %2, %3}], [%4];" ::"r"(to),
                 "l"(map), "r"(b), "r"(c), "r"(barrier)
                 : "memory");
}

// The box at (0, 0, 0, d, e).
__device__ __forceinline__ void copy_box_5(uint32_t to, const CUtensorMap *map, uint32_t d, uint32_t e, uint32_t barrier) {
    asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1, {0, 0, 0, %2, %3}], [%4], %5;" ::"r"(to),
                 "l"(map), "r"(d), "r"(e), "r"(barrier), "l"(EVICT_FIRST)
                 : "memory");
}

// The boxes of `copy_box` and `copy_box_5`, into the L2 cache.
__device__ __forceinline__ void fetch_box(const CUtensorMap *map, uint32_t b, uint32_t c) {
    asm volatile("cp.async.bulk.prefetch.tensor.3d.L2.global.tile [%0, {0, %1, %2}];" ::"l"(map), "r"(b), "r"(c) : "memory");
}

__device__ __forceinline__ void fetch_box_5(const CUtensorMap *map, uint32_t d, uint32_t e) {
    asm volatile("cp.async.bulk.prefetch.tensor.5d.L2.global.tile [%0, {0, 0, 0, %1, %2}];" ::"l"(map), "r"(d), "r"(e)
                 : "memory");
}

// A map that will be used soon.
__device__ __forceinline__ void prefetch_map(const CUtensorMap *map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

__device__ __forceinline__ uint4 shared_load_4(uint32_t from) {
    uint4 v;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(from)
                 : "memory");
    return v;
}

// ---- Matrix instructions ----

// What the matrix unit is told of a matrix in shared memory: rows of 64 16-bit
// elements as the copy engine leaves them with 128-byte swizzle, at an address
// that is a multiple of 1024. 16 elements further along the rows is 32 bytes on.
__device__ __forceinline__ uint64_t matrix_at(uint32_t address) {
    constexpr uint64_t EIGHT_ROWS = 1024 >> 4, SWIZZLE_128 = 1;
    return (address >> 4 & 0x3fff) | 1ull << 16 | EIGHT_ROWS << 32 | SWIZZLE_128 << 62;
}

// Before the first multiply, and where registers of sums were touched between.
__device__ __forceinline__ void multiply_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void multiply_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most N committed groups are under way.
template <uint32_t N>
__device__ __forceinline__ void multiply_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// Four warps: d += a . b^T, a [64, 16], b [N, 16]. Lane l of warp w has, at 4 j +
// v, row 16 w + l / 4 + 8 (v / 2), column 8 j + 2 (l % 4) + v % 2.
template <class T>
__device__ __forceinline__ void multiply(float (&d)[4], uint64_t a, uint64_t b) {
#define DISTKV_WGMMA(type)                                                                                            \
    asm volatile("{\n\t.reg .pred add;\n\tsetp.ne.b32 add, 1, 0;\n\t"                                                 \
                 "wgmma.mma_async.sync.aligned.m64n8k16.f32." type "." type " "                                       \
                 "{%0, %1, %2, %3}, "                                                                                 \
                 "%4, %5, add, 1, 1, 0, 0;\n\t}"                                                                      \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                     \
                 : "l"(a), "l"(b) : "memory")
    if constexpr (__is_same(T, __half)) {
        DISTKV_WGMMA("f16");
    } else {
        DISTKV_WGMMA("bf16");
    }
#undef DISTKV_WGMMA
}

template <class T>
__device__ __forceinline__ void multiply(float (&d)[8], uint64_t a, uint64_t b) {
#define DISTKV_WGMMA(type)                                                                                            \
    asm volatile("{\n\t.reg .pred add;\n\tsetp.ne.b32 add, 1, 0;\n\t"                                                 \
                 "wgmma.mma_async.sync.aligned.m64n16k16.f32." type "." type " "                                      \
                 "{%0, %1, %2, %3, %4, %5, %6, %7}, "                                                                 \
                 "%8, %9, add, 1, 1, 0, 0;\n\t}"                                                                      \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])     \
                 : "l"(a), "l"(b) : "memory")
    if constexpr (__is_same(T, __half)) {
        DISTKV_WGMMA("f16");
    } else {
        DISTKV_WGMMA("bf16");
    }
#undef DISTKV_WGMMA
}

template <class T>
__device__ __forceinline__ void multiply(float (&d)[16], uint64_t a, uint64_t b) {
#define DISTKV_WGMMA(type)                                                                                            \
    asm volatile("{\n\t.reg .pred add;\n\tsetp.ne.b32 add, 1, 0;\n\t"                                                 \
                 "wgmma.mma_async.sync.aligned.m64n32k16.f32." type "." type " "                                      \
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "                           \
                 "%16, %17, add, 1, 1, 0, 0;\n\t}"                                                                    \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),    \
                   "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])\
                 : "l"(a), "l"(b) : "memory")
    if constexpr (__is_same(T, __half)) {
        DISTKV_WGMMA("f16");
    } else {
        DISTKV_WGMMA("bf16");
    }
#undef DISTKV_WGMMA
}

template <class T>
__device__ __forceinline__ void multiply(float (&d)[32], uint64_t a, uint64_t b) {
#define DISTKV_WGMMA(type)                                                                                            \
    asm volatile("{\n\t.reg .pred add;\n\tsetp.ne.b32 add, 1, 0;\n\t"                                                 \
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " "                                      \
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15,"                             \
                 " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "                 \
                 "%32, %33, add, 1, 1, 0, 0;\n\t}"                                                                    \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),    \
                   "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),\
                   "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),\
                   "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])\
                 : "l"(a), "l"(b) : "memory")
    if constexpr (__is_same(T, __half)) {
        DISTKV_WGMMA("f16");
    } else {
        DISTKV_WGMMA("bf16");
    }
#undef DISTKV_WGMMA
}

__device__ __forceinline__ uint32_t nanoseconds() {
    uint32_t now;
    asm volatile("mov.u32 %0, %%globaltimer_lo;" : "=r"(now));
    return now;
}

// ---- Clusters ----

__device__ __forceinline__ uint32_t block_of_cluster() {
    uint32_t rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

__device__ __forceinline__ uint32_t blocks_of_cluster() {
    uint32_t blocks;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
    return blocks;
}

// The place in the shared memory of block `rank` that is `at` in this block's.
__device__ __forceinline__ uint32_t peer_address(uint32_t at, uint32_t rank) {
    uint32_t peer;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(peer) : "r"(at), "r"(rank));
    return peer;
}

// Writes, if `so`, one of two values (`second` 0 or 1) to a peer's memory; who waits
// at its barrier for the bytes sees it. Choice and condition are in here, as sums
// of the matrix unit that the compiler moves about hold multiplications up.
__device__ __forceinline__ void store_peer_if(bool so, uint32_t peer, float a, float b, uint32_t second, uint32_t peer_barrier) {
    asm volatile("{\n\t.reg .pred so, second;\n\t.reg .f32 value;\n\tsetp.ne.b32 so, %4, 0;\n\tsetp.ne.b32 second, %5, 0;\n\t"
                 "selp.f32 value, %2, %1, second;\n\t"
                 "@so st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], value, [%3];\n\t}" ::"r"(peer),
                 "f"(a), "f"(b), "r"(peer_barrier), "r"(uint32_t(so)), "r"(second)
                 : "memory");
}

// The same into this block's memory.
__device__ __forceinline__ void store_shared_if(bool so, uint32_t to, float a, float b, uint32_t second) {
    asm volatile("{\n\t.reg .pred so, second;\n\t.reg .f32 value;\n\tsetp.ne.b32 so, %3, 0;\n\tsetp.ne.b32 second, %4, 0;\n\t"
                 "selp.f32 value, %2, %1, second;\n\t"
                 "@so st.shared.b32 [%0], value;\n\t}" ::"r"(to),
                 "f"(a), "f"(b), "r"(uint32_t(so)), "r"(second)
                 : "memory");
}

__device__ __forceinline__ void cluster_arrive() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

// Says only that this block no longer reads the others' shared memory.
__device__ __forceinline__ void cluster_leave() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

__device__ __forceinline__ void cluster_wait() {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

} // namespace distkv
