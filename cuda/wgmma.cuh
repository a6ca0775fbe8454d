// wgmma, the matrix instruction of four warps, with operands in shared memory, and how
// those are described. sm_90a only.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace distkv {

template <uint32_t N> __device__ __forceinline__ void registers_less() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

template <uint32_t N> __device__ __forceinline__ void registers_more() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

// Before the first product, and where registers of sums were touched between.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most `LEFT` committed groups are unfinished.
template <uint32_t LEFT> __device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

// Accumulators belong to the tensor cores between a product and its wait. The
// compiler does not know that: this keeps its reads and writes on our side.
template <uint32_t N> __device__ __forceinline__ void pin(float (&r)[N]) {
#pragma unroll
    for (uint32_t i = 0; i < N; ++i) {
        asm volatile("" : "+f"(r[i])::"memory");
    }
}

template <uint32_t N> __device__ __forceinline__ void pin(uint32_t (&r)[N]) {
#pragma unroll
    for (uint32_t i = 0; i < N; ++i) {
        asm volatile("" : "+r"(r[i])::"memory");
    }
}

// Descriptor of an operand in shared memory with the 128-byte swizzle: columns
// of 64 elements, of which 8 rows (1024 bytes, aligned so) are a repeating
// pattern. `column`: bytes from one column to the next, where N runs along the
// rows of memory (values), without meaning where K does (queries, keys);
// `eight`: bytes from 8 rows to the next 8.
__device__ __forceinline__ uint64_t operand(uint32_t address, uint32_t column, uint32_t eight) {
    return uint64_t((address & 0x3ffff) >> 4) | uint64_t(column >> 4) << 16 | uint64_t(eight >> 4) << 32 |
           uint64_t(1) << 62;
}

// D[64, N] (+)= A[64, 16] B[16, N] of one warpgroup. `ss`: A and B in shared
// memory, both with K along the rows of memory. `rs`: A in registers, B with N
// along the rows of memory if TURNED, else K.
template <class T, uint32_t N> struct Wgmma;

#define F4(c, i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define F8(c, i)                                                                                                       \
    "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]),        \
        "+f"(c[i + 7])
#define F32(c, i) F8(c, i), F8(c, i + 8), F8(c, i + 16), F8(c, i + 24)
#define R4 "%0,%1,%2,%3"
#define R8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define R16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define R32                                                                                                            \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,"               \
    "%27,%28,%29,%30,%31"
#define R40                                                                                                            \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,"               \
    "%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39"
#define R48                                                                                                            \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,"               \
    "%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define R64                                                                                                            \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,"               \
    "%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,"             \
    "%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define R128                                                                                                           \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,"               \
    "%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,"             \
    "%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,"             \
    "%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,"                \
    "%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,"             \
    "%121,%122,%123,%124,%125,%126,%127"
#define WGMMA(T, TYPE, N, REGS, I0, I1, I2, I3, I4, I5, I6, ...)                                                       \
    template <> struct Wgmma<T, N> {                                                                                   \
        static __device__ __forceinline__ void ss(float (&c)[N / 2], uint64_t a, uint64_t b, uint32_t add) {           \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #I2 ", 0;\n"                                             \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" REGS "}, "               \
                         "%" #I0 ", %" #I1 ", p, 1, 1, 0, 0;\n}"                                                       \
                         : __VA_ARGS__                                                                                 \
                         : "l"(a), "l"(b), "r"(add));                                                                  \
        }                                                                                                              \
        template <bool TURNED>                                                                                         \
        static __device__ __forceinline__ void rs(float (&c)[N / 2], const uint32_t *a, uint64_t b, uint32_t add) {    \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #I5 ", 0;\n"                                             \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" REGS "}, "               \
                         "{%" #I0 ", %" #I1 ", %" #I2 ", %" #I3 "}, %" #I4 ", p, 1, 1, %" #I6 ";\n}"                   \
                         : __VA_ARGS__                                                                                 \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(TURNED ? 1 : 0));         \
        }                                                                                                              \
    };
#define WGMMA_BOTH(N, REGS, I0, I1, I2, I3, I4, I5, I6, ...)                                                           \
    WGMMA(__nv_bfloat16, "bf16", N, REGS, I0, I1, I2, I3, I4, I5, I6, __VA_ARGS__)                                     \
    WGMMA(__half, "f16", N, REGS, I0, I1, I2, I3, I4, I5, I6, __VA_ARGS__)

WGMMA_BOTH(8, R4, 4, 5, 6, 7, 8, 9, 10, F4(c, 0))
WGMMA_BOTH(16, R8, 8, 9, 10, 11, 12, 13, 14, F8(c, 0))
WGMMA_BOTH(32, R16, 16, 17, 18, 19, 20, 21, 22, F8(c, 0), F8(c, 8))
WGMMA_BOTH(64, R32, 32, 33, 34, 35, 36, 37, 38, F32(c, 0))
WGMMA_BOTH(80, R40, 40, 41, 42, 43, 44, 45, 46, F32(c, 0), F8(c, 32))
WGMMA_BOTH(96, R48, 48, 49, 50, 51, 52, 53, 54, F32(c, 0), F8(c, 32), F8(c, 40))
WGMMA_BOTH(128, R64, 64, 65, 66, 67, 68, 69, 70, F32(c, 0), F32(c, 32))
WGMMA_BOTH(256, R128, 128, 129, 130, 131, 132, 133, 134, F32(c, 0), F32(c, 32), F32(c, 64), F32(c, 96))

#undef WGMMA_BOTH
#undef WGMMA
#undef R128
#undef R64
#undef R48
#undef R40
#undef R32
#undef R16
#undef R8
#undef R4
#undef F32
#undef F8
#undef F4

} // namespace distkv
