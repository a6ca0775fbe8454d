// What a warp does together, on a GPU of fibers: votes, matrices of 8 x 8 and their
// products, as cuda/matrix.cuh and cuda/e4m3.cuh have them.
#pragma once
#include "gpu.h"

#define __ldcg(from) (*(from))
static uint32_t __ffs(uint32_t x) { return __builtin_ffs(x); }
static uint32_t __clz(uint32_t x) { return x == 0 ? 32 : __builtin_clz(x); }
static uint32_t __popc(uint32_t x) { return __builtin_popcount(x); }
static float2 make_float2(float x, float y) { return {x, y}; }
static uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
static uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
static void __trap() { gpu::fail("a trap"); }
static uint32_t atomicAdd(uint32_t *to, uint32_t v) {
    const uint32_t before = *to;
    *to += v;
    return before;
}
static uint32_t atomicMax(uint32_t *to, uint32_t v) {
    const uint32_t before = *to;
    *to = max(before, v);
    return before;
}

namespace gpu {

// Calls `f` with what every lane of the warp has.
template <class F> static auto together(uint64_t mine, F f) {
    my_block().lanes[threadIdx.x] = mine;
    meet(my_warp(), 32);
    const auto result = f(my_block().lanes.data() + threadIdx.x / 32 * 32);
    meet(my_warp(), 32);
    return result;
}

static uint32_t half_of(uint32_t word, uint32_t upper) { return upper ? word >> 16 : word & 0xffff; }

} // namespace gpu

static uint32_t __ballot_sync(uint32_t, bool so) {
    return gpu::together(so, [](const uint64_t *lanes) {
        uint32_t bits = 0;
        for (uint32_t lane = 0; lane < 32; lane++)
            bits |= uint32_t(lanes[lane]) << lane;
        return bits;
    });
}
static bool __any_sync(uint32_t, bool so) { return __ballot_sync(~0u, so) != 0; }
static uint32_t __reduce_add_sync(uint32_t, uint32_t x) {
    return gpu::together(x, [](const uint64_t *lanes) {
        uint32_t sum = 0;
        for (uint32_t lane = 0; lane < 32; lane++)
            sum += uint32_t(lanes[lane]);
        return sum;
    });
}
static uint32_t __reduce_max_sync(uint32_t, uint32_t x) {
    return gpu::together(x, [](const uint64_t *lanes) { return uint32_t(*std::max_element(lanes, lanes + 32)); });
}
static uint32_t __shfl_xor_sync(uint32_t, uint32_t x, uint32_t mask) {
    return gpu::exchange(x, threadIdx.x % 32 ^ mask);
}
static uint32_t __shfl_up_sync(uint32_t, uint32_t x, uint32_t step) {
    const uint32_t lane = threadIdx.x % 32;
    return gpu::exchange(x, lane < step ? lane : lane - step);
}

namespace distkv {

// ---- matrix.cuh ----

static float fast_exp2(float x) { return exp2f(x); }

template <class T> static uint32_t pack(float low, float high) {
    const T two[2] = {from_float<T>(low), from_float<T>(high)};
    uint32_t word;
    memcpy(&word, two, 4);
    return word;
}
template <class T> static float unpack(uint32_t word, uint32_t upper) {
    T two[2];
    memcpy(two, &word, 4);
    return to_float(two[upper]);
}

static uint32_t word_at(uint32_t at) {
    uint32_t word;
    memcpy(&word, gpu::memory(gpu::me().block, at, 4), 4);
    return word;
}

static void copy_16_if(bool use, uint32_t to, const void *from) {
    const uint32_t fiber = gpu::here, block = gpu::me().block;
    gpu::me().copies++;
    gpu::crumbs.push_back([=] {
        uint8_t *there = gpu::memory(block, to, 16);
        use ? memcpy(there, from, 16) : memset(there, 0, 16);
        if (--gpu::fibers[fiber].copies == 0)
            gpu::wake(gpu::fibers[fiber].landing);
    });
}
static void copy_16(uint32_t to, const void *from) { copy_16_if(true, to, from); }
static void arrive_when_landed(uint32_t fiber, gpu::Barrier &barrier) {
    gpu::crumbs.push_back([fiber, &barrier] {
        gpu::fibers[fiber].copies == 0 ? gpu::arrive(barrier) : arrive_when_landed(fiber, barrier);
    });
}
static void barrier_arrive_copies(uint32_t at) { arrive_when_landed(gpu::here, barrier_at(at)); }
static void copies_commit() {}
static void copies_landed() {
    while (gpu::me().copies != 0)
        gpu::wait(gpu::me().landing);
}

static void load_matrices(uint32_t *to, uint32_t at) {
    const uint32_t lane = threadIdx.x % 32;
    if (at % 16 != 0)
        gpu::fail("a row of a matrix that is not aligned");
    gpu::together(at, [=](const uint64_t *rows) {
        for (uint32_t m = 0; m < 4; m++)
            to[m] = word_at(uint32_t(rows[m * 8 + lane / 4]) + lane % 4 * 4);
        return 0;
    });
}

static void load_matrices_transposed(uint32_t *to, uint32_t at) {
    const uint32_t lane = threadIdx.x % 32, column = lane / 4;
    if (at % 16 != 0)
        gpu::fail("a row of a matrix that is not aligned");
    gpu::together(at, [=](const uint64_t *rows) {
        for (uint32_t m = 0; m < 4; m++) {
            to[m] = 0;
            for (uint32_t i = 0; i < 2; i++)
                to[m] |= gpu::half_of(word_at(uint32_t(rows[m * 8 + lane % 4 * 2 + i]) + column / 2 * 4), column % 2) << 16 * i;
        }
        return 0;
    });
}

static uint32_t transpose(uint32_t matrix) {
    const uint32_t lane = threadIdx.x % 32;
    return gpu::together(matrix, [=](const uint64_t *lanes) {
        uint32_t word = 0;
        for (uint32_t i = 0; i < 2; i++)
            word |= gpu::half_of(uint32_t(lanes[(lane % 4 * 2 + i) * 4 + lane / 8]), lane / 4 % 2) << 16 * i;
        return word;
    });
}

template <class T> static void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    struct Operands {
        const uint32_t *a;
        uint32_t b[2];
    };
    const Operands mine = {a, {b0, b1}};
    const uint32_t lane = threadIdx.x % 32;
    float *to = c;
    gpu::together(reinterpret_cast<uint64_t>(&mine), [=](const uint64_t *lanes) {
        for (uint32_t i = 0; i < 4; i++) {
            const uint32_t row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
            for (uint32_t k = 0; k < 16; k++) {
                const auto &left = *reinterpret_cast<const Operands *>(lanes[row % 8 * 4 + k % 8 / 2]);
                const auto &right = *reinterpret_cast<const Operands *>(lanes[column * 4 + k % 8 / 2]);
                to[i] += unpack<T>(left.a[row / 8 + k / 8 * 2], k % 2) * unpack<T>(right.b[k / 8], k % 2);
            }
        }
        return 0;
    });
}

// ---- e4m3.cuh ----

struct E4m3 {
    uint8_t bits;
};
static float to_float(E4m3 x) {
    const int exponent = x.bits >> 3 & 15, fraction = x.bits & 7;
    const float size = exponent == 0 ? ldexpf(fraction, -9) : ldexpf(8 + fraction, exponent - 10);
    return x.bits & 0x80 ? -size : size;
}
// The nearest of all there are, to even.
static E4m3 to_e4m3(float x) {
    uint8_t best = 0;
    for (uint8_t bits = 0; bits < 0x7f; bits++) {
        const float apart = fabsf(fabsf(x) - to_float(E4m3{bits})), least = fabsf(fabsf(x) - to_float(E4m3{best}));
        if (apart < least || (apart == least && bits % 2 == 0))
            best = bits;
    }
    return {uint8_t(best | (std::signbit(x) ? 0x80 : 0))};
}
template <class T, uint32_t A, uint32_t B> static uint32_t widen_two(uint32_t four) {
    return pack<T>(to_float(E4m3{uint8_t(four >> 8 * A)}), to_float(E4m3{uint8_t(four >> 8 * B)}));
}

} // namespace distkv
