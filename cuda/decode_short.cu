// A layer's attention to short contexts, in one kernel: rotary embedding (and norms)
// of a row's heads, its key and value into the pool, and attention to what lies there.
// Where little is to be read, time goes into launches and into waiting; this is one
// launch instead of three, and leaves room on a multiprocessor for a block of the
// linear layers behind it, which brings its weights meanwhile.
//
// Every sequence has one row. Grid: (kv_heads * cluster, rows), clusters of 1, 2, 4 or
// 8 along x, 256 threads. The blocks of a cluster share the positions that a row and
// kv head attends to, each at most `tokens` of them, and each finishes an equal share
// of the result. Dynamic shared memory: ((tokens + 1) * g + tokens) * 4 bytes.
//
// KV of earlier steps is asked for before the kernel before this one is done: of what
// is read, that one writes nothing.
#include "barrier.cuh"
#include "cluster.cuh"
#include "matrix.cuh"
#include "paged_kv.cuh"
#include "rows.cuh"
#include "state.cuh"

namespace distkv {
namespace {

constexpr uint32_t SHORT_WARPS = 8, MOST_SHARERS = 8;
constexpr uint32_t NOWHERE = ~0u;

// G: query heads of a kv head, rounded up to a power of two.
template <uint32_t D, uint32_t G> struct Shared {
    // Queries, scaled, so that a weight is exp2 of a score; once all of the cluster have
    // their scores, sums: [sharers][this block's share].
    alignas(16) float q[G * D];
    alignas(16) float own_key[D];
    alignas(16) float own_value[D];
    alignas(8) float2 state[MOST_SHARERS][G]; // maximum and sum, of each sharer
    float2 own_state[G];
};

// A head of the row: norm, rotation, rounding; to(element, value) for each.
template <class T, uint32_t D, class F>
__device__ __forceinline__ void turn_head(const DecodeShort &p, const T *from, const float *norm, bool rotates,
                                          const float *table, uint32_t lane, F to) {
    constexpr uint32_t N = D / 64; // pairs of a lane
    float x[N][2];
    uint32_t at[N][2];
    float sum = 0.0f;
#pragma unroll
    for (uint32_t n = 0; n < N; n++) {
        const uint32_t pair = lane + 32 * n;
        const bool halves = pair < p.pairs && p.interleaved == 0;
        at[n][0] = halves ? pair : 2 * pair;
        at[n][1] = halves ? pair + p.pairs : 2 * pair + 1;
        x[n][0] = to_float(from[at[n][0]]);
        x[n][1] = to_float(from[at[n][1]]);
        sum += x[n][0] * x[n][0] + x[n][1] * x[n][1];
    }
    if (norm != nullptr) {
        const float factor = rsqrtf(lanes_sum(sum) / float(D) + p.eps);
#pragma unroll
        for (uint32_t n = 0; n < N; n++) {
            x[n][0] = x[n][0] * factor * norm[at[n][0]];
            x[n][1] = x[n][1] * factor * norm[at[n][1]];
        }
    }
#pragma unroll
    for (uint32_t n = 0; n < N; n++) {
        const uint32_t pair = lane + 32 * n;
        if (rotates && pair < p.pairs) {
            const float2 angle = *reinterpret_cast<const float2 *>(table + 2 * pair);
            const float a = x[n][0] * angle.x - x[n][1] * angle.y;
            x[n][1] = x[n][0] * angle.y + x[n][1] * angle.x;
            x[n][0] = a;
        }
        to(at[n][0], from_float<T>(x[n][0]));
        to(at[n][1], from_float<T>(x[n][1]));
    }
}

// Brings a row of the pool to the L2 cache.
template <uint32_t D> __device__ __forceinline__ void fetch_row(const void *row) {
#pragma unroll
    for (uint32_t byte = 0; byte < D * 2; byte += 128) {
        asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const uint8_t *>(row) + byte) : "memory");
    }
}

template <class T> __device__ __forceinline__ float4 widen_4(uint2 four) {
    Run<T, 4> run;
    *reinterpret_cast<uint2 *>(&run) = four;
    return {to_float(run.item[0]), to_float(run.item[1]), to_float(run.item[2]), to_float(run.item[3])};
}

// Sums of V values over groups of LANES consecutive lanes. Which value a lane ends up
// with: the one numbered `lane % LANES / (LANES / V)`.
template <uint32_t V, uint32_t LANES> __device__ __forceinline__ float sum_values(float (&s)[V], uint32_t lane) {
    uint32_t held = V;
#pragma unroll
    for (uint32_t step = LANES / 2; step > 0; step /= 2) {
        if (held > 1) {
            held /= 2;
            const bool upper = lane & step;
#pragma unroll
            for (uint32_t i = 0; i < V / 2; i++) {
                if (i < held) {
                    const float send = upper ? s[i] : s[i + held], keep = upper ? s[i + held] : s[i];
                    s[i] = keep + __shfl_xor_sync(~0u, send, step);
                }
            }
        } else {
            s[0] += __shfl_xor_sync(~0u, s[0], step);
        }
    }
    return s[0];
}

template <class T, uint32_t D, uint32_t G> __device__ __forceinline__ void decode_short(const DecodeShort &p) {
    // Keys: LANES lanes have 4 elements each of a token, BATCH tokens at once.
    constexpr uint32_t LANES = D / 4, BATCH = 16 / G < 8 ? 16 / G : 8, KEY_GROUPS = SHORT_WARPS * 32 / LANES;
    // Values: a warp has an eighth of the elements, 4 a lane, of several tokens at once.
    constexpr uint32_t WIDTH = D / SHORT_WARPS / 4, AT_ONCE = 32 / WIDTH, AHEAD = 4;
    __shared__ __align__(16) Shared<D, G> shared;
    extern __shared__ __align__(16) float dynamic[];
    // Of the tokens, and behind them of the row's own: scores, then weights.
    float (*const score)[G] = reinterpret_cast<float (*)[G]>(dynamic);
    uint32_t *const place = reinterpret_cast<uint32_t *>(score + p.tokens + 1); // the pool's row of a token's key
    launch_next();
    const uint32_t sharers = cluster_blocks(), rank = cluster_rank(), kv_head = blockIdx.x / sharers, row = blockIdx.y;
    // No kernel writes a step's metadata: it may be read before the wait.
    if (row >= *reinterpret_cast<const volatile uint32_t *>(&p.step->rows)) {
        wait_for_previous();
        return;
    }
    const uint32_t thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    const uint32_t group = p.heads / p.kv_heads;
    const Seq seq = p.seqs[row];
    const Slot slot = p.slots[row];
    const uint32_t own = slot.position, lowest = p.window != 0 && own >= p.window ? own - p.window + 1 : 0;
    const uint32_t share = (own - lowest + sharers - 1) / sharers, begin = lowest + rank * share;
    const uint32_t end = min(begin + share, own), count = end > begin ? min(end - begin, p.tokens) : 0;
    for (uint32_t t = thread; t < count; t += SHORT_WARPS * 32) {
        place[t] = NOWHERE;
    }
    __syncthreads();
    for (uint32_t i = thread; i < seq.pages; i += SHORT_WARPS * 32) {
        const Page page = p.pages[seq.page + i];
        const uint32_t first = (page.block * 2 * p.kv_heads + kv_head) * p.block_tokens;
        const uint32_t last = min(page.position + page.tokens, begin + count);
        for (uint32_t position = max(page.position, begin); position < last; position++) {
            place[position - begin] = first + position - page.position;
        }
    }
    __syncthreads();
    const T *pool = static_cast<const T *>(p.pool);
    const uint32_t to_value = p.kv_heads * p.block_tokens; // rows from a key to its value
    for (uint32_t t = thread; t < count; t += SHORT_WARPS * 32) {
        const uint32_t at = place[t];
        if (at != NOWHERE) {
            fetch_row<D>(pool + uint64_t(at) * D);
            fetch_row<D>(pool + uint64_t(at + to_value) * D);
        }
    }
    const auto fetch = [&](uint32_t t, uint32_t beyond, uint32_t column) -> uint2 {
        const uint32_t at = t < count ? place[t] : NOWHERE;
        if (at == NOWHERE) {
            return {0, 0};
        }
        return *reinterpret_cast<const uint2 *>(pool + uint64_t(at + beyond) * D + column);
    };
    const uint32_t key_group = warp * (32 / LANES) + lane / LANES, sub = lane % LANES;
    uint2 key[BATCH];
    const auto load_keys = [&](uint32_t base, uint2 (&key)[BATCH]) {
#pragma unroll
        for (uint32_t i = 0; i < BATCH; i++) {
            key[i] = fetch(base + key_group * BATCH + i, 0, sub * 4);
        }
    };
    load_keys(0, key);
    const uint32_t value_sub = lane % WIDTH, value_token = lane / WIDTH, element = warp * (D / SHORT_WARPS) + value_sub * 4;
    uint2 value[AHEAD];
    const auto load_values = [&](uint32_t base, uint2 (&value)[AHEAD]) {
#pragma unroll
        for (uint32_t i = 0; i < AHEAD; i++) {
            value[i] = fetch(base + i * AT_ONCE + value_token, to_value, element);
        }
    };
    load_values(0, value);
    wait_for_previous();

    // The row's heads.
    const T *qkv = static_cast<const T *>(p.qkv) + uint64_t(row) * (p.heads + 2 * p.kv_heads) * D;
    const float *table = p.table + uint64_t(row) * p.pairs * 2;
    for (uint32_t j = warp; j < G + (rank == 0 ? 2 : 0); j += SHORT_WARPS) {
        if (j < G) {
            const T *from = qkv + (kv_head * group + min(j, group - 1)) * D;
            turn_head<T, D>(p, from, p.q_norm, true, table, lane, [&](uint32_t e, T x) {
                shared.q[j * D + e] = j < group ? to_float(x) * (p.scale * LOG2_E) : 0.0f;
            });
            continue;
        }
        const bool is_value = j > G;
        float *here = is_value ? shared.own_value : shared.own_key;
        T *there = static_cast<T *>(p.pool) + kv_offset(slot.block, is_value, kv_head, p.kv_heads, p.block_tokens, D) +
                   uint64_t(slot.offset) * D;
        turn_head<T, D>(p, qkv + (p.heads + (is_value ? p.kv_heads : 0) + kv_head) * D, is_value ? nullptr : p.k_norm,
                        !is_value, table, lane, [&](uint32_t e, T x) {
                            here[e] = to_float(x);
                            there[e] = x;
                        });
    }
    __syncthreads();

    // Scores.
    {
        float4 q[G];
#pragma unroll
        for (uint32_t g = 0; g < G; g++) {
            q[g] = *reinterpret_cast<const float4 *>(&shared.q[g * D + sub * 4]);
        }
        for (uint32_t base = 0; base < count; base += KEY_GROUPS * BATCH) {
            uint2 next[BATCH];
            load_keys(base + KEY_GROUPS * BATCH, next);
            float s[BATCH * G];
#pragma unroll
            for (uint32_t i = 0; i < BATCH; i++) {
                const float4 k = widen_4<T>(key[i]);
#pragma unroll
                for (uint32_t g = 0; g < G; g++) {
                    s[i * G + g] = k.x * q[g].x + k.y * q[g].y + k.z * q[g].z + k.w * q[g].w;
                }
            }
            constexpr uint32_t V = BATCH * G;
            const float sum = sum_values<V, LANES>(s, lane);
            const uint32_t v = sub / (LANES / V), t = base + key_group * BATCH + v / G;
            if (sub % (LANES / V) == 0 && t < count) {
                score[t][v % G] = place[t] == NOWHERE ? -INFINITY : sum;
            }
#pragma unroll
            for (uint32_t i = 0; i < BATCH; i++) {
                key[i] = next[i];
            }
        }
    }
    const uint32_t all = count + (rank == 0 ? 1 : 0);
    if (rank == 0) {
        for (uint32_t g = warp; g < G; g += SHORT_WARPS) {
            float sum = 0.0f;
            for (uint32_t e = lane; e < D; e += 32) {
                sum += shared.own_key[e] * shared.q[g * D + e];
            }
            sum = lanes_sum(sum);
            if (lane == 0) {
                score[count][g] = sum;
            }
        }
    }
    __syncthreads();
    cluster_arrive(); // this block has its scores
    for (uint32_t g = warp; g < G; g += SHORT_WARPS) {
        float most = NO_SCORE, sum = 0.0f;
        for (uint32_t t = lane; t < all; t += 32) {
            most = fmaxf(most, score[t][g]);
        }
#pragma unroll
        for (uint32_t step = 16; step > 0; step /= 2) {
            most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
        }
        for (uint32_t t = lane; t < all; t += 32) {
            const float weight = fast_exp2(score[t][g] - most);
            score[t][g] = weight;
            sum += weight;
        }
        sum = lanes_sum(sum);
        if (lane == 0) {
            shared.own_state[g] = {most, sum};
        }
    }
    __syncthreads();

    // Values.
    float4 o[G] = {};
    const auto add = [&](uint32_t t, float4 v) {
#pragma unroll
        for (uint32_t g = 0; g < G; g++) {
            const float weight = score[t][g];
            o[g].x += weight * v.x, o[g].y += weight * v.y, o[g].z += weight * v.z, o[g].w += weight * v.w;
        }
    };
    for (uint32_t base = 0; base < count; base += AHEAD * AT_ONCE) {
        uint2 next[AHEAD];
        load_values(base + AHEAD * AT_ONCE, next);
#pragma unroll
        for (uint32_t i = 0; i < AHEAD; i++) {
            const uint32_t t = base + i * AT_ONCE + value_token;
            if (t < count) {
                add(t, widen_4<T>(value[i]));
            }
            value[i] = next[i];
        }
    }
    if (rank == 0 && value_token == 0) {
        add(count, *reinterpret_cast<const float4 *>(&shared.own_value[element]));
    }
#pragma unroll
    for (uint32_t g = 0; g < G; g++) {
#pragma unroll
        for (uint32_t step = WIDTH; step < 32; step *= 2) {
            o[g].x += __shfl_xor_sync(~0u, o[g].x, step), o[g].y += __shfl_xor_sync(~0u, o[g].y, step);
            o[g].z += __shfl_xor_sync(~0u, o[g].z, step), o[g].w += __shfl_xor_sync(~0u, o[g].w, step);
        }
    }

    // To who finishes them.
    cluster_wait();
    float *const sums = shared.q; // as nobody reads queries any more
    const uint32_t slice = G * D / sharers;
#pragma unroll
    for (uint32_t g = 0; g < G; g++) {
        const uint32_t at = g * D + element;
        if (g % AT_ONCE == value_token) {
            store_peer(reinterpret_cast<float4 *>(&sums[rank * slice + at % slice]), at / slice, o[g]);
        }
    }
    if (thread < sharers * G) {
        store_peer(&shared.state[rank][thread % G], thread / G, shared.own_state[thread % G]);
    }
    cluster_sync();
    for (uint32_t i = thread; i < slice; i += SHORT_WARPS * 32) {
        const uint32_t g = (rank * slice + i) / D, e = (rank * slice + i) % D;
        if (g >= group) {
            break;
        }
        float most = NO_SCORE, total = 0.0f, sum = 0.0f;
        for (uint32_t s = 0; s < sharers; s++) {
            most = fmaxf(most, shared.state[s][g].x);
        }
        for (uint32_t s = 0; s < sharers; s++) {
            const float factor = fast_exp2(shared.state[s][g].x - most);
            total += shared.state[s][g].y * factor;
            sum += sums[s * slice + i] * factor;
        }
        const uint64_t head = uint64_t(row) * p.heads + kv_head * group + g;
        static_cast<T *>(p.o)[head * D + e] = from_float<T>(sum / total); // the row's own token has a weight
        if (e == 0) {
            p.lse[head] = natural_lse(most, total);
        }
    }
}

} // namespace
} // namespace distkv

// At most 80 registers a thread, which is what a block of the linear layers leaves of a
// multiprocessor's.
#define SHORT(D, G)                                                                                                    \
    extern "C" __global__ void __launch_bounds__(256, 3)                                                               \
        decode_short_d##D##_g##G##_bf16(const __grid_constant__ distkv::DecodeShort p) {                               \
        distkv::decode_short<__nv_bfloat16, D, G>(p);                                                                  \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256, 3)                                                               \
        decode_short_d##D##_g##G##_f16(const __grid_constant__ distkv::DecodeShort p) {                                \
        distkv::decode_short<__half, D, G>(p);                                                                         \
    }
#define SHORT_ALL(D) SHORT(D, 1) SHORT(D, 2) SHORT(D, 4) SHORT(D, 8)
SHORT_ALL(64)
SHORT_ALL(128)
