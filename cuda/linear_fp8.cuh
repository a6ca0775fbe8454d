// What the linear layers with FP8 weights share: copies, the matrix instruction,
// and what becomes of sums.
#pragma once
#include "barrier.cuh"
#include "cluster.cuh"
#include "fp8.cuh"
#include "matrix.cuh"

namespace distkv {
namespace fp8 {

enum End : uint32_t { PLAIN, SWIGLU, ADD, LOGITS };

__device__ __forceinline__ void copy_16(uint32_t to, const uint8_t *from) {
    asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

__device__ __forceinline__ uint4 read_16(uint32_t at) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at));
    return v;
}

__device__ __forceinline__ void write_16(uint32_t at, uint4 v) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}

// Four sums of block `rank`.
__device__ __forceinline__ float4 read_sums(uint32_t at, uint32_t rank) {
    float4 v;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("{\n\t.reg .b32 peer;\n\t"
                 "mapa.shared::cluster.u32 peer, %4, %5;\n\t"
                 "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [peer];\n\t}"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(at), "r"(rank)
                 : "memory");
#else
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(at)
                 : "memory");
#endif
    return v;
}

// d += a . b^T: a [16, 16], b [8, 16].
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __nv_bfloat16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __half) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// x is lifted by a power of two where products with codes as they come would
// leave what f32 holds exactly; LIFT is undone with UNIT.
template <class T>
struct Lift;
template <>
struct Lift<__nv_bfloat16> {
    static constexpr float UNDO = Codes<__nv_bfloat16>::UNIT / 18446744073709551616.0f; // 2^120 / 2^64
    static __device__ __forceinline__ uint32_t up(uint32_t pair) {
        const uint32_t factor = 0x5f805f80; // 2^64, twice
        uint32_t out;
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(pair), "r"(factor), "r"(0x80008000));
        return out;
    }
};
template <>
struct Lift<__half> {
    static constexpr float UNDO = Codes<__half>::UNIT;
    static __device__ __forceinline__ uint32_t up(uint32_t pair) { return pair; }
};

__device__ __forceinline__ uint32_t word(const uint4 &v, uint32_t i) {
    return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

__device__ __forceinline__ float silu_times(float gate, float up) { return gate / (1.0f + __expf(-gate)) * up; }

// Four sums of a row from `feature` on, as they were added up: scaled, unless they
// were with their blocks, and with the bias.
template <class T, bool BLOCKS>
__device__ __forceinline__ void finish_sums(const LinearFp8 &p, float (&y)[4], uint32_t feature) {
#pragma unroll
    for (uint32_t i = 0; i < 4; i++) {
        const uint32_t f = min(feature + i, p.out_features - 1);
        y[i] *= Lift<T>::UNDO;
        if (!BLOCKS) {
            y[i] *= p.scales[f >> p.scale_shift];
        }
        if (p.bias != nullptr) {
            y[i] += p.bias[f];
        }
    }
}

// Those of four that are below `width`.
template <class O>
__device__ __forceinline__ void put(O *out, const float (&y)[4], uint32_t row, uint32_t feature, uint32_t width) {
    O *to = out + uint64_t(row) * width + feature;
    if (width % 4 == 0) {
        store(to, y);
    } else {
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            if (feature + i < width) {
                to[i] = from_float<O>(y[i]);
            }
        }
    }
}

// All ends but SwiGLU.
template <class T>
__device__ __forceinline__ void store_sums(const LinearFp8 &p, float (&y)[4], uint32_t row, uint32_t feature) {
    if (p.end == PLAIN) {
        put(static_cast<T *>(p.out), y, row, feature, p.out_features);
        return;
    }
    if (p.end == ADD) {
        const float *old = static_cast<const float *>(p.out) + uint64_t(row) * p.out_features + feature;
#pragma unroll
        for (uint32_t j = 0; j < 4; j++) {
            y[j] += feature + j < p.out_features ? old[j] : 0.0f;
        }
    }
    put(static_cast<float *>(p.out), y, row, feature, p.out_features);
}

} // namespace fp8
} // namespace distkv
