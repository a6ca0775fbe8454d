// Words that the blocks of a running kernel hand each other in the device's memory,
// and what orders them. Everything here needs sm_70.
#pragma once
#include <cuda_runtime.h>
#include <stdint.h>

namespace distkv {

__device__ __forceinline__ uint32_t load_word(const uint32_t *from) {
    uint32_t v;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(from) : "memory");
    return v;
}

// What was stored behind a fence before the word is seen from here on.
__device__ __forceinline__ uint32_t acquire_word(const uint32_t *from) {
    uint32_t v;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(from) : "memory");
    return v;
}

// Each by itself, in any order.
__device__ __forceinline__ float2 load_words(const float *from) {
    float2 v;
    asm volatile("ld.relaxed.gpu.global.v2.b32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "l"(from) : "memory");
    return v;
}

__device__ __forceinline__ void store_word(void *to, uint32_t v) {
    asm volatile("st.relaxed.gpu.global.b32 [%0], %1;" ::"l"(to), "r"(v) : "memory");
}

__device__ __forceinline__ void store_words(void *to, uint2 v) {
    asm volatile("st.relaxed.gpu.global.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(v.x), "r"(v.y) : "memory");
}

__device__ __forceinline__ void add_to_word(uint32_t *to, uint32_t v) {
    asm volatile("red.relaxed.gpu.global.add.u32 [%0], %1;" ::"l"(to), "r"(v) : "memory");
}

// What this thread stored, or knows from a barrier to be stored, comes before what it
// stores from here on.
__device__ __forceinline__ void fence_stores() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// What this thread has seen, copies that it asks for from here on see.
__device__ __forceinline__ void fence_copies() {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async.global;" ::: "memory");
#endif
}

} // namespace distkv
