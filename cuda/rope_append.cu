// Rotary embedding of a step's queries and keys, and keys and values into the
// pool.
#include "barrier.cuh"
#include "e4m3.cuh"
#include "paged_kv.cuh"
#include "rows.cuh"

namespace distkv {

template <>
__device__ __forceinline__ E4m3 from_float<E4m3>(float x) {
    return to_e4m3(x);
}

// cos and sin of an angle of any size, to about an ulp: the multiple of pi/2 is
// taken off in f64, whose error is then far below that of the f32 remainder.
__device__ __forceinline__ void sincos_any(float angle, float *sin, float *cos) {
    constexpr double TWO_OVER_PI = 0.6366197723675814;
    constexpr double HALF_PI = 1.5707963267948966, HALF_PI_REST = 6.123233995736766e-17;
    const double quarter = rint(double(angle) * TWO_OVER_PI);
    const double rest = fma(-quarter, HALF_PI_REST, fma(-quarter, HALF_PI, double(angle)));
    const float small = float(rest);
    // Spares the code, and the stack, of a reduction that is done already.
    __builtin_assume(fabsf(small) < 1.0f);
    float s, c;
    sincosf(small, &s, &c);
    const uint32_t quadrant = uint32_t(int64_t(quarter)) & 3;
    const float x = quadrant & 1 ? c : s, y = quadrant & 1 ? s : c;
    *sin = quadrant & 2 ? -x : x;
    *cos = (quadrant + 1) & 2 ? -y : y;
}

__device__ __forceinline__ void rope_table(const RopeTable &p) {
    each_run<1>(begin_kernel(p.rows), p.pairs, [&](uint32_t row, uint32_t pair) {
        // The angle in f32, as the models were trained.
        const float angle = float(p.slots[row].position) * p.inv_freq[pair];
        float sin, cos;
        sincos_any(angle, &sin, &cos);
        p.table[(uint64_t(row) * p.pairs + pair) * 2] = cos * p.magnitude;
        p.table[(uint64_t(row) * p.pairs + pair) * 2 + 1] = sin * p.magnitude;
    });
}

// W neighbouring pairs of a head: where their elements lie (two runs of W), and
// how far to turn them.
template <uint32_t W>
struct Pairs {
    uint32_t a, b; // elements of the head
    float cos[W], sin[W];
    bool rotates;

    __device__ __forceinline__ void find(const RopeAppend &p, uint32_t row, uint32_t pair) {
        rotates = pair < p.pairs;
        const bool halves = rotates && p.interleaved == 0;
        a = halves ? pair : 2 * pair;
        b = halves ? pair + p.pairs : 2 * pair + W;
        if (rotates) {
            float angles[2 * W];
            load(p.table + (uint64_t(row) * p.pairs + pair) * 2, angles);
#pragma unroll
            for (uint32_t i = 0; i < W; i++) {
                cos[i] = angles[2 * i];
                sin[i] = angles[2 * i + 1];
            }
        }
    }

    __device__ __forceinline__ void rotate(bool interleaved, float (&x)[2 * W]) const {
        if (!rotates) {
            return;
        }
        if (interleaved) {
#pragma unroll
            for (uint32_t i = 0; i < W; i++) {
                turn(x[2 * i], x[2 * i + 1], i);
            }
        } else {
#pragma unroll
            for (uint32_t i = 0; i < W; i++) {
                turn(x[i], x[i + W], i);
            }
        }
    }

    __device__ __forceinline__ void turn(float &x, float &y, uint32_t i) const {
        const float u = x * cos[i] - y * sin[i];
        y = x * sin[i] + y * cos[i];
        x = u;
    }
};

// Both runs of W elements at `from`.
template <uint32_t W, class T>
__device__ __forceinline__ void load_pairs(const T *from, const Pairs<W> &at, float (&x)[2 * W]) {
    float a[W], b[W];
    load(from + at.a, a);
    load(from + at.b, b);
#pragma unroll
    for (uint32_t i = 0; i < W; i++) {
        x[i] = a[i];
        x[i + W] = b[i];
    }
}

// A head is worked on by `lanes` lanes, each with N times W pairs; they keep
// their pairs from head to head. Blocks along y share a row's heads.
template <uint32_t W, uint32_t N, class T>
__device__ __forceinline__ void rope_append_heads(const RopeAppend &p, uint32_t lanes) {
    // Attention, which comes next, may bring keys of earlier steps meanwhile; no kernel
    // writes a Step.
    launch_next();
    const uint32_t rows = *reinterpret_cast<const volatile uint32_t *>(p.rows), d = p.head_dim;
    const uint32_t keys = p.heads, values = keys + p.kv_heads;
    const uint32_t all = values + p.kv_heads, width = all * d;
    const uint32_t lane = threadIdx.x % lanes, groups = blockDim.x / lanes;
    wait_for_previous();
    for (uint32_t row = blockIdx.x; row < rows; row += gridDim.x) {
        const Slot slot = p.slots[row];
        T *qkv = static_cast<T *>(p.qkv) + uint64_t(row) * width;
        Pairs<W> at[N];
        bool live[N];
#pragma unroll
        for (uint32_t n = 0; n < N; n++) {
            const uint32_t pair = (lane + n * lanes) * W;
            live[n] = pair < d / 2;
            if (live[n]) {
                at[n].find(p, row, pair);
            }
        }
        // All lanes of a warp go round together: the sums below are a warp's.
        for (uint32_t first = blockIdx.y * groups; first < all; first += gridDim.y * groups) {
            const uint32_t head = first + threadIdx.x / lanes;
            float x[N][2 * W];
            float sum = 0.0f;
#pragma unroll
            for (uint32_t n = 0; n < N; n++) {
                if (live[n] && head < all) {
                    load_pairs(qkv + head * d, at[n], x[n]);
                    if (p.bias != nullptr) {
                        float bias[2 * W];
                        load_pairs(p.bias + head * d, at[n], bias);
#pragma unroll
                        for (uint32_t i = 0; i < 2 * W; i++) {
                            x[n][i] += bias[i];
                        }
                    }
#pragma unroll
                    for (uint32_t i = 0; i < 2 * W; i++) {
                        sum += x[n][i] * x[n][i];
                    }
                }
            }
            if (p.q_norm != nullptr) {
                const float factor = rsqrtf(lanes_sum(sum, lanes) / float(d) + p.eps);
                const float *weight = head < keys ? p.q_norm : p.k_norm;
#pragma unroll
                for (uint32_t n = 0; n < N; n++) {
                    if (live[n] && head < values) {
                        float w[2 * W];
                        load_pairs(weight, at[n], w);
#pragma unroll
                        for (uint32_t i = 0; i < 2 * W; i++) {
                            x[n][i] = x[n][i] * factor * w[i];
                        }
                    }
                }
            }
            if (head >= all) {
                continue;
            }
            T *to = qkv + head * d;
            uint64_t place = 0;
            if (head >= keys) {
                const bool value = head >= values;
                const uint32_t kv_head = head - (value ? values : keys);
                place = uint64_t(slot.offset) * d +
                        kv_offset(slot.block, value, kv_head, p.kv_heads, p.block_tokens, d);
                to = static_cast<T *>(p.pool) + place;
            }
#pragma unroll
            for (uint32_t n = 0; n < N; n++) {
                if (live[n]) {
                    if (head < values) {
                        at[n].rotate(p.interleaved != 0, x[n]);
                    }
                    float a[W], b[W];
#pragma unroll
                    for (uint32_t i = 0; i < W; i++) {
                        a[i] = x[n][i];
                        b[i] = x[n][i + W];
                    }
                    if (p.fp8 != 0 && head >= keys) {
                        store(static_cast<E4m3 *>(p.pool) + place + at[n].a, a);
                        store(static_cast<E4m3 *>(p.pool) + place + at[n].b, b);
                    } else {
                        store(to + at[n].a, a);
                        store(to + at[n].b, b);
                    }
                }
            }
        }
    }
}

template <class T>
__device__ __forceinline__ void rope_append(const RopeAppend &p) {
    const bool wide = p.head_dim % (2 * WIDE) == 0 && p.pairs % WIDE == 0 && is_aligned(p.qkv) && is_aligned(p.pool) &&
                      is_aligned(p.table) && is_aligned(p.bias) && is_aligned(p.q_norm) && is_aligned(p.k_norm);
    if (wide) {
        // 16 elements a lane: the power of two that covers the head.
        const uint32_t need = p.head_dim / (2 * WIDE);
        rope_append_heads<WIDE, 1, T>(p, need <= 1 ? 1 : 1u << (32 - __clz(need - 1)));
    } else {
        rope_append_heads<1, 4, T>(p, 32);
    }
}

} // namespace distkv

// Any grid.
extern "C" __global__ void __launch_bounds__(256) rope_table(const __grid_constant__ distkv::RopeTable p) {
    distkv::rope_table(p);
}
// Rows along x, a row's heads along y.
DISTKV_KERNELS(rope_append, RopeAppend, 256)
