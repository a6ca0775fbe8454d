// How a block of a Hopper kernel is fed: tiles of a matrix that the copy engine
// brings to shared memory, and the barriers of a cluster and of the grid beside
// those of barrier.cuh. Addresses `uint32_t` are in the shared window.
// Everything here needs sm_90.
#pragma once
#include "barrier.cuh"

#include <cuda.h>

namespace distkv {

// ---- Barriers ----

// Arrives at the barrier at this place in block `rank` of the cluster.
__device__ __forceinline__ void barrier_arrive_at(uint32_t barrier, uint32_t rank) {
    asm volatile("{\n\t.reg .b32 peer;\n\t"
                 "mapa.shared::cluster.u32 peer, %0, %1;\n\t"
                 "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [peer];\n\t}" ::"r"(barrier),
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

// ---- Copies ----

// The box at (column, row) of a matrix, into shared memory; its bytes count at
// `barrier`. The matrix is read once: it is the first to leave the L2 cache.
__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap *map, uint32_t column, uint32_t row,
                                         uint32_t barrier) {
    constexpr uint64_t EVICT_FIRST = 0x12f0000000000000; // what createpolicy.fractional.L2::evict_first gives
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
                 "l"(map), "r"(column), "r"(row), "r"(barrier), "l"(EVICT_FIRST)
                 : "memory");
}

// The same box into the L2 cache only.
__device__ __forceinline__ void prefetch_box(const CUtensorMap *map, uint32_t column, uint32_t row) {
    asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global.tile [%0, {%1, %2}];" ::"l"(map), "r"(column), "r"(row)
                 : "memory");
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

// ---- Barrier of the grid ----

// Its blocks are all resident. The barrier's top bit turns when all have
// arrived, and the rest is then as it was: nothing has to be reset.
__device__ __forceinline__ uint32_t grid_read(const uint32_t *barrier) {
    uint32_t now;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(barrier) : "memory");
    return now;
}

// By one thread, after a barrier of its block. What the copy engine of another
// block is to read counts as another kind of access, hence the proxy fences.
__device__ __forceinline__ void grid_arrive(uint32_t *barrier) {
    const uint32_t step = blockIdx.x == 0 ? 0x80000000u - (gridDim.x - 1) : 1;
    asm volatile("fence.proxy.async.global;\n\t"
                 "red.release.gpu.global.add.u32 [%0], %1;" ::"l"(barrier), "r"(step) : "memory");
}

// Until all have arrived `times` times since the barrier read `start`.
__device__ __forceinline__ void grid_wait(const uint32_t *barrier, uint32_t start, uint32_t times) {
    while (((grid_read(barrier) ^ start) >> 31) != (times & 1)) {
    }
    asm volatile("fence.proxy.async.global;" ::: "memory");
}

// ---- Clusters ----

// 16 bytes at `at` in the shared memory of block `rank`.
__device__ __forceinline__ float4 read_peer_4(uint32_t at, uint32_t rank) {
    float4 v;
    asm volatile("{\n\t.reg .b32 peer;\n\t"
                 "mapa.shared::cluster.u32 peer, %4, %5;\n\t"
                 "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [peer];\n\t}"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(at), "r"(rank)
                 : "memory");
    return v;
}

__device__ __forceinline__ void cluster_arrive() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

// Says only that this block no longer reads the others' shared memory.
__device__ __forceinline__ void cluster_leave() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

__device__ __forceinline__ void cluster_wait() {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

} // namespace distkv
