// What the kernels of decode attention share: the shape of their work, how
// parts of a sequence lie in memory, and the instructions that they are made of.
//
// A *unit* is the rows of head_dim that a block takes at once, of K and of V. It
// comes in *boxes* of consecutive rows of the pool, the larger the better. A box
// spans `together` kv heads of a page where their runs are short, or it is a
// part of one head's run: with R = decode_rows(head_dim), and b = block_tokens,
//   R % b == 0:  together = the largest of 1, 2, 4, 8 that divides kv_heads and
//                is at most R / b;  box_rows = together * b
//   otherwise:   together = 1;  box_rows = the largest power of two that
//                divides b and is at most R
// What a box holds of one head is a *cell*: box_rows / together tokens.
#pragma once
#include "api.h"
#include "paged_kv.cuh"
#include "state.cuh"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace distkv {

// Rows of head_dim in a unit of K (or of V): 16 a warp.
__host__ __device__ constexpr uint32_t decode_rows(uint32_t head_dim) { return head_dim <= 128 ? 128 : 64; }

// ---- Elements ----

template <class T> __device__ __forceinline__ uint32_t pack(float low, float high);
template <> __device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float low, float high) {
    const __nv_bfloat162 two = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t &>(two);
}
template <> __device__ __forceinline__ uint32_t pack<__half>(float low, float high) {
    const __half2 two = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t &>(two);
}

__device__ __forceinline__ float fast_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// ---- Parts and results ----

// Four elements of o, and lse with the first of them, of one column.
template <class T>
__device__ __forceinline__ void finish(void *o_out, float *lse, uint64_t head, uint32_t d, uint32_t element, float4 o, float max,
                                       float sum) {
    const float factor = sum > 0.0f ? 1.0f / sum : 0.0f;
    const uint2 packed = make_uint2(pack<T>(o.x * factor, o.y * factor), pack<T>(o.z * factor, o.w * factor));
    *reinterpret_cast<uint2 *>(static_cast<T *>(o_out) + head * d + element) = packed;
    if (element == 0)
        lse[head] = natural_lse(max, sum);
}

// Adds a part (o, maximum and sum) to another.
__device__ __forceinline__ void add_part(float4 &o, float &max, float &sum, float4 other, float2 state) {
    const float most = fmaxf(max, state.x), a = fast_exp2(max - most), b = fast_exp2(state.x - most);
    max = most, sum = sum * a + state.y * b;
    o.x = o.x * a + other.x * b, o.y = o.y * a + other.y * b;
    o.z = o.z * a + other.z * b, o.w = o.w * a + other.w * b;
}

// Where a column's (o, lse) is, in heads of head_dim.
__device__ __forceinline__ uint64_t head_of(uint32_t row, uint32_t kv_head, uint32_t column, uint32_t heads, uint32_t kv_heads) {
    const uint32_t group = heads / kv_heads;
    return uint64_t(row + column / group) * heads + kv_head * group + column % group;
}

// A block's two places in `parts`, here for one of its kv heads: for the item
// that begins a sequence which goes on in the next block, and for one that
// continues. In a part, the columns' states (maximum, sum) lie behind all o.
__device__ __forceinline__ float *part_of(float *parts, uint32_t block, bool begins, uint32_t together, uint32_t kv_head,
                                          uint32_t d) {
    return parts + ((uint64_t(block) * 2 + begins) * together + kv_head) * (DECODE_TILE * (d + 2));
}
__device__ __forceinline__ float2 *state_of(float *part, uint32_t column, uint32_t d) {
    return reinterpret_cast<float2 *>(part + DECODE_TILE * d) + column;
}

// ---- Instructions ----

__device__ __forceinline__ uint32_t shared_address(const void *p) { return uint32_t(__cvta_generic_to_shared(p)); }

// Until the kernels before this one are done and their writes are visible.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel's blocks may be brought up once every block has said this.
__device__ __forceinline__ void launch_next() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers known to the copy engine.
__device__ __forceinline__ void barrier_init_done() {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.mbarrier_init.release.cluster;\n\tfence.proxy.async.shared::cta;" ::: "memory");
#endif
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
    asm volatile("{\n\t.reg .b64 state;\n\tmbarrier.arrive.shared::cta.b64 state, [%0];\n\t}" ::"r"(barrier) : "memory");
}

#if __CUDA_ARCH__ >= 900
// Arrives, and holds the phase open until so many more bytes were copied in.
__device__ __forceinline__ void barrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
#endif

// Arrives once this thread's `copy_16` so far have landed.
__device__ __forceinline__ void barrier_arrive_copies(uint32_t barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// Until the phase of this parity is over.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
    asm volatile("{\n\t.reg .pred done;\n\t"
                 "again:\n\t"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t"
                 "@!done bra again;\n\t}" ::"r"(barrier),
                 "r"(parity)
                 : "memory");
#else
    asm volatile("{\n\t.reg .pred done;\n\t"
                 "again:\n\t"
                 "mbarrier.test_wait.parity.shared::cta.b64 done, [%0], %1;\n\t"
                 "@!done bra again;\n\t}" ::"r"(barrier),
                 "r"(parity)
                 : "memory");
#endif
}

// A barrier of the first `threads` threads of a block, apart from barrier 0.
__device__ __forceinline__ void sync_threads(uint32_t threads) {
    asm volatile("bar.sync 1, %0;" ::"r"(threads) : "memory");
}

__device__ __forceinline__ void copy_16(uint32_t to, const void *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8
// of matrix l / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], uint32_t at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(at)
                 : "memory");
}

template <class T>
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void multiply<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void multiply<__half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void load_matrices_transposed(uint32_t (&to)[4], uint32_t at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(at)
                 : "memory");
}

__device__ __forceinline__ uint32_t transpose(uint32_t matrix) {
    uint32_t to;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(to) : "r"(matrix));
    return to;
}

} // namespace distkv
