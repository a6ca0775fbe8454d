// A partial of attention, as it stands inside a kernel and as it leaves it.
//
// Inside, scores are kept in base 2: a score is q.k * scale * log2(e), so that
// a weight is one exp2. Outside, a partial is (o, lse): o the attention over
// the part alone, lse the *natural* logarithm of the sum of exp(score), -inf
// where the part has no key, and o is then 0. Two partials merge into
//   lse = ln(e^lse1 + e^lse2),  o = e^(lse1 - lse) o1 + e^(lse2 - lse) o2
// (Infinite-LLM, section "DistAttention").
#pragma once
#include <cuda_runtime.h>

namespace distkv {

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;
// The maximum of no scores. Finite, so that a difference of two is never NaN.
constexpr float NO_SCORE = -1.0e30f;

// The lse of a part whose base-2 scores have this maximum and whose sum of
// exp2(score - max) is this; -inf for a part without a key.
__device__ __forceinline__ float natural_lse(float max2, float sum) {
    return sum > 0.0f ? (max2 + log2f(sum)) * LN_2 : -INFINITY;
}

} // namespace distkv
