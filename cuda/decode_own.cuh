// A row's heads in the registers of a warp that decodes: norms, rotary embedding, and
// its own key and value, which go to the pool and into the first state of the softmax.
#pragma once
#include "e4m3.cuh"
#include "matrix.cuh"
#include "paged_kv.cuh"
#include "rows.cuh"

namespace distkv {

// Of 16 elements of a head, lane l of four has two in each half: 2 l, 2 l + 1 and those 8
// behind, or, to match keys in E4M3, 4 l and the three behind. This is the first one.
template <bool FP8> __device__ __forceinline__ uint32_t element_of(uint32_t step, uint32_t half) {
    const uint32_t pair = threadIdx.x % 4 * 2;
    return step * 16 + (FP8 ? 2 * pair + 2 * half : pair + 8 * half);
}

template <class T> __device__ __forceinline__ float2 unpack(uint32_t two) {
    const Run<T, 2> &run = reinterpret_cast<const Run<T, 2> &>(two);
    return {to_float(run.item[0]), to_float(run.item[1])};
}

// A head of each of the warp's columns: `norm` if there is one, then the rotation of
// element i with i + D / 2, by `table` (cos and sin of a row's D / 2 angles).
// put(step, half, elements) for each two. The whole warp calls.
template <class T, uint32_t D, bool FP8, class F>
__device__ __forceinline__ void turn_head(const uint32_t (&x)[D / 16][2], const float *norm, float eps, const float *table, F put) {
    constexpr uint32_t STEPS = D / 16;
    float factor = 1.0f;
    if (norm != nullptr) {
        float sum = 0.0f;
#pragma unroll
        for (uint32_t i = 0; i < STEPS * 2; i++) {
            const float2 two = unpack<T>(x[i / 2][i % 2]);
            sum += two.x * two.x + two.y * two.y;
        }
        factor = rsqrtf(lanes_sum(sum, 4) / float(D) + eps);
    }
#pragma unroll
    for (uint32_t i = 0; i < STEPS; i++) {
        const uint32_t step = i / 2, half = i % 2, element = element_of<FP8>(step, half);
        float2 a = unpack<T>(x[step][half]), b = unpack<T>(x[step + STEPS / 2][half]);
        if (norm != nullptr) {
            const float2 u = *reinterpret_cast<const float2 *>(norm + element);
            const float2 v = *reinterpret_cast<const float2 *>(norm + element + D / 2);
            a = {a.x * factor * u.x, a.y * factor * u.y}, b = {b.x * factor * v.x, b.y * factor * v.y};
        }
        const float4 angles = *reinterpret_cast<const float4 *>(table + 2 * element);
        put(step, half, float2{a.x * angles.x - b.x * angles.y, a.y * angles.z - b.y * angles.w});
        put(step + STEPS / 2, half, float2{a.x * angles.y + b.x * angles.x, a.y * angles.w + b.y * angles.z});
    }
}

// A row's own key and value of one kv head, by one warp, which has the row's turned
// queries `q`, column lane / 4. They go to the pool, rounded as it has them, and the
// states of columns 2 (lane % 4) + i become those of this one token: `max` and `sum`,
// o of rows lane / 4 and 8 behind (2 (lane / 4) and the next, where K is E4M3).
template <class T, class K, uint32_t D>
__device__ __forceinline__ void attend_own(const Decode &p, uint32_t row, uint32_t kv_head, const uint32_t (&q)[D / 16][1][2],
                                           float scale, float (&o)[D / 16][1][4], float (&max)[1][2], float (&sum)[1][2]) {
    constexpr uint32_t STEPS = D / 16;
    constexpr bool FP8 = sizeof(K) == 1;
    const uint32_t quad = threadIdx.x % 32 / 4, pair = threadIdx.x % 4 * 2;
    const Slot slot = p.row_slots[row];
    const T *key = static_cast<const T *>(p.qkv) + (uint64_t(row) * (p.heads + 2 * p.kv_heads) + p.heads + kv_head) * D;
    const T *value = key + p.kv_heads * D;
    K *to[2];
#pragma unroll
    for (uint32_t i = 0; i < 2; i++)
        to[i] = static_cast<K *>(p.kv) + kv_offset(slot.block, i != 0, kv_head, p.kv_heads, p.block_tokens, D) +
                uint64_t(slot.offset) * D;
    const auto row_of = [&](uint32_t step, uint32_t half) { return step * 16 + (FP8 ? 2 * quad + half : quad + 8 * half); };
    uint32_t x[STEPS][2];
    Run<K, 2> v[STEPS]; // on their way meanwhile; there are no registers for them where E4M3 is widened
    const auto load_value = [&](uint32_t step, uint32_t half) {
        v[step].item[half] = from_float<K>(to_float(value[row_of(step, half)]));
    };
#pragma unroll
    for (uint32_t i = 0; i < STEPS * 2; i++) {
        const uint32_t step = i / 2, half = i % 2;
        x[step][half] = *reinterpret_cast<const uint32_t *>(key + element_of<FP8>(step, half));
        if (!FP8)
            load_value(step, half);
    }
    float score = 0.0f;
    turn_head<T, D, FP8>(x, p.k_norm, p.eps, p.table + uint64_t(row) * D, [&](uint32_t step, uint32_t half, float2 k) {
        const Run<K, 2> rounded = {from_float<K>(k.x), from_float<K>(k.y)};
        const float2 query = unpack<T>(q[step][0][half]);
        score += to_float(rounded.item[0]) * query.x + to_float(rounded.item[1]) * query.y;
        if (quad == step % 8)
            *reinterpret_cast<Run<K, 2> *>(to[0] + element_of<FP8>(step, half)) = rounded;
    });
    score = lanes_sum(score, 4) * scale;
#pragma unroll
    for (uint32_t i = 0; i < 2; i++) {
        max[0][i] = __shfl_sync(~0u, score, (pair + i) * 4);
        sum[0][i] = quad == 0 ? 1.0f : 0.0f; // lanes' sums are added at the end
    }
#pragma unroll
    for (uint32_t i = 0; i < STEPS * 2; i++) {
        const uint32_t step = i / 2, half = i % 2;
        if (FP8)
            load_value(step, half);
        o[step][0][2 * half] = o[step][0][2 * half + 1] = to_float(v[step].item[half]);
        if (pair / 2 == step % 4)
            to[1][row_of(step, half)] = v[step].item[half];
    }
}

} // namespace distkv
