// Shared memory by its address in the shared window.
#pragma once
#include <cuda_runtime.h>
#include <stdint.h>

namespace distkv {

__device__ __forceinline__ uint32_t shared_address(const void *p) { return uint32_t(__cvta_generic_to_shared(p)); }

__device__ __forceinline__ uint4 shared_load_4(uint32_t from) {
    uint4 v;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(from)
                 : "memory");
    return v;
}

__device__ __forceinline__ void shared_zero_4(uint32_t at) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(at), "r"(0) : "memory");
}

// Writes, if `so`, one of two values (`second` 0 or 1). Choice and condition are in
// here, as sums of the matrix unit that the compiler moves about hold products up.
__device__ __forceinline__ void store_shared_if(bool so, uint32_t to, float a, float b, uint32_t second) {
    asm volatile("{\n\t.reg .pred so, second;\n\t.reg .f32 value;\n\tsetp.ne.b32 so, %3, 0;\n\tsetp.ne.b32 second, %4, 0;\n\t"
                 "selp.f32 value, %2, %1, second;\n\t"
                 "@so st.shared.b32 [%0], value;\n\t}" ::"r"(to),
                 "f"(a), "f"(b), "r"(uint32_t(so)), "r"(second)
                 : "memory");
}

} // namespace distkv
