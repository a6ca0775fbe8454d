// What kernels take from the language that a CPU's compiler does not know, and numbers
// as a GPU rounds them.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#define __device__
#define __host__
#define __forceinline__ inline
using std::max;
using std::min;
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) uint2 {
    uint32_t x, y;
};
struct __nv_bfloat16 {
    uint16_t bits;
};

static uint32_t __float_as_uint(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}
static float rsqrtf(float x) { return 1.0f / sqrtf(x); }

namespace distkv {

static float to_float(__nv_bfloat16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float wide;
    memcpy(&wide, &bits, 4);
    return wide;
}

template <class T> T from_float(float x);
template <> __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
    uint32_t bits = __float_as_uint(x);
    bits += 0x7fff + (bits >> 16 & 1);
    return {uint16_t(x != x ? 0x7fff : bits >> 16)};
}

template <class T, uint32_t N> struct alignas(sizeof(T) * N) Run {
    T item[N];
};

} // namespace distkv
