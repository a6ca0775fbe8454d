// Paged prefill attention on mma.sync (sm_80 and later), every head_dim and
// page size. Four warps take a tile of 64 packed rows (see prefill_plan.cuh)
// over tiles of keys that cp.async gathers two deep, with the online softmax in
// registers. Blocks draw (tile, kv head) pairs until none is left.
#include "e4m3.cuh"
#include "matrix.cuh"
#include "prefill_plan.cuh"
#include "shared.cuh"
#include "state.cuh"

namespace distkv {
namespace {

constexpr uint32_t WARPS = 4;
constexpr uint32_t THREADS = WARPS * 32;
constexpr uint32_t ROWS = WARPS * 16;
constexpr uint32_t NOWHERE = 0xffffffff;

// A block needs ROWS * STRIDE * 2 + 4 KEYS * PITCH bytes of dynamic shared memory:
// the queries, and two tiles of keys and of values. K: their element.
template <class K, uint32_t D> struct Shape {
    static constexpr bool FP8 = sizeof(K) == 1;
    static constexpr uint32_t KEYS = D <= 128 ? 64 : 32;
    // One 16-byte unit more than a row holds, where that makes an odd number of
    // them: the 8 rows of a matrix that ldmatrix reads lie in different banks.
    static constexpr uint32_t STRIDE = D + 8;
    static constexpr uint32_t UNITS = D / 8;
    static constexpr uint32_t KV_UNITS = D * sizeof(K) / 16;
    static constexpr uint32_t PITCH = (KV_UNITS | 1) * 16; // bytes from a key to the next
    static_assert(D % 16 == 0 && (STRIDE / 8) % 2 == 1, "head_dim is a multiple of 16");
};

__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffff, x, 1);
    return x + __shfl_xor_sync(0xffffffff, x, 2);
}

// Where the keys of a tile lie. Three of them go round: one is being computed
// on, one loaded, one looked up.
template <uint32_t KEYS> struct Lookup {
    uint32_t row[3][KEYS];      // row of the pool that holds the key, NOWHERE behind the page's tokens
    uint32_t position[3][KEYS]; // of the key, NOWHERE where there is none
    uint32_t masked[3][2];      // by warp: whether some row does not see some key
};

// With e4m3 a word of four takes part as 16 of head_dim go by in another order:
// lane l of four has numbers 4 l .. 4 l + 3 where 16-bit elements have it 2 l, 2 l +
// 1, 2 l + 8, 2 l + 9. Queries lie in shared memory in that order, and outputs come
// in it: even ones from one product, odd ones from the next.
template <class T, class K, uint32_t D> __device__ __forceinline__ void prefill(const Prefill &p) {
    using S = Shape<K, D>;
    constexpr uint32_t KEYS = S::KEYS;
    extern __shared__ __align__(16) uint8_t memory[];
    __shared__ Lookup<KEYS> lookup;
    __shared__ uint32_t drawn;

    const uint32_t thread = threadIdx.x;
    const uint32_t warp = thread / 32;
    const uint32_t lane = thread % 32;
    const uint32_t queries = shared_address(memory);
    const uint32_t keys = queries + ROWS * S::STRIDE * 2;
    constexpr uint32_t TILE_BYTES = KEYS * S::PITCH;
    const T *q = static_cast<const T *>(p.q);
    const K *kv = static_cast<const K *>(p.kv);
    T *o = static_cast<T *>(p.o);

    const uint32_t group = p.heads / p.kv_heads;
    const float scale = p.scale * LOG2_E;
    PrefillHeader *header = plan_header(p.plan);
    const PrefillTile *tiles = plan_tiles(p.plan);
    const uint32_t pairs = header->tiles * p.kv_heads;

    while (true) {
        __syncthreads(); // all have read the last draw, and the last pair's shared memory
        if (thread == 0) {
            drawn = atomicAdd(&header->next, 1);
        }
        __syncthreads();
        const uint32_t pair = drawn;
        if (pair >= pairs) {
            break;
        }
        uint32_t index, kv_head;
        plan_pair(*header, pair, p.kv_heads, index, kv_head);
        const PrefillTile tile = tiles[index];
        const Seq seq = p.seqs[tile.seq];
        const Page *pages = p.pages + seq.page;
        const uint32_t packed = tile.tile * ROWS;
        const uint32_t packed_rows = seq.rows * group;
        const uint32_t first = seq.position + packed / group;
        const uint32_t last = seq.position + (min(packed + ROWS, packed_rows) - 1) / group;

        const auto sees = [&](uint32_t row, uint32_t key) {
            return key <= row && (p.window == 0 || row - key < p.window);
        };
        const auto look_up = [&](uint32_t t) {
            if (t >= tile.end || thread >= KEYS) {
                return;
            }
            const uint32_t slot = t * KEYS + thread;
            const uint32_t index = slot / p.block_tokens;
            const uint32_t offset = slot % p.block_tokens;
            uint32_t row = NOWHERE;
            uint32_t position = NOWHERE;
            if (index < seq.pages) {
                const Page page = pages[index];
                if (offset < page.tokens) {
                    row = (page.block * 2 * p.kv_heads + kv_head) * p.block_tokens + offset;
                    position = page.position + offset;
                }
            }
            lookup.row[t % 3][thread] = row;
            lookup.position[t % 3][thread] = position;
            const bool masked = row == NOWHERE || !sees(first, position) || !sees(last, position);
            const bool any = __any_sync(0xffffffff, masked);
            if (lane == 0) {
                lookup.masked[t % 3][warp] = any;
            }
        };
        const auto load = [&](uint32_t t) {
            if (t < tile.end) {
                const uint32_t to = keys + (t % 2) * 2 * TILE_BYTES;
#pragma unroll
                for (uint32_t i = 0; i < (KEYS * S::KV_UNITS + THREADS - 1) / THREADS; ++i) {
                    const uint32_t key = (i * THREADS + thread) / S::KV_UNITS;
                    const uint32_t unit = (i * THREADS + thread) % S::KV_UNITS;
                    if (KEYS * S::KV_UNITS % THREADS != 0 && key >= KEYS) {
                        break;
                    }
                    const uint32_t row = lookup.row[t % 3][key];
                    const bool use = row != NOWHERE;
                    const K *from = kv + (use ? uint64_t(row) * D + unit * (16 / sizeof(K)) : 0);
                    const uint32_t at = to + key * S::PITCH + unit * 16;
                    copy_16_if(use, at, from);
                    copy_16_if(use, at + TILE_BYTES, from + (use ? uint64_t(p.kv_heads) * p.block_tokens * D : 0));
                }
            }
            copies_commit();
        };

        for (uint32_t i = thread; i < ROWS * S::UNITS; i += THREADS) {
            const uint32_t row = i / S::UNITS;
            const uint32_t unit = i % S::UNITS;
            const uint32_t m = packed + row;
            const bool use = m < packed_rows;
            const uint64_t from =
                use ? uint64_t(seq.row + m / group) * p.q_stride + (kv_head * group + m % group) * D + unit * 8 : 0;
            const uint32_t to = queries + (row * S::STRIDE + unit * 8) * 2;
            if constexpr (S::FP8) {
                const uint4 eight = use ? *reinterpret_cast<const uint4 *>(q + from) : make_uint4(0, 0, 0, 0);
                uint32_t *words = reinterpret_cast<uint32_t *>(memory + (to - queries)) - unit % 2 * 2;
                words[0] = eight.x, words[4] = eight.y;
                words[1] = eight.z, words[5] = eight.w;
            } else {
                copy_16_if(use, to, q + from);
            }
        }
        look_up(tile.begin);
        __syncthreads();
        load(tile.begin);
        look_up(tile.begin + 1);

        // This thread's two rows are lane / 4 and that + 8 of the warp's 16.
        const uint32_t m0 = packed + warp * 16 + lane / 4;
        const uint32_t row0 = seq.position + m0 / group;
        const uint32_t row1 = seq.position + (m0 + 8) / group;
        float acc[D / 8][4] = {};
        float max0 = NO_SCORE, max1 = NO_SCORE, sum0 = 0.0f, sum1 = 0.0f;

        for (uint32_t t = tile.begin; t < tile.end; ++t) {
            copies_landed();
            __syncthreads();
            load(t + 1);
            look_up(t + 2);

            const uint32_t k = keys + (t % 2) * 2 * TILE_BYTES;
            const uint32_t v = k + TILE_BYTES;
            float s[KEYS / 8][4] = {};
            const uint32_t a_at = queries + ((warp * 16 + lane % 16) * S::STRIDE + lane / 16 * 8) * 2;
            const uint32_t k_at = k + (S::FP8 ? lane * S::PITCH : (lane % 8 + lane / 16 * 8) * S::PITCH + lane / 8 % 2 * 16);
#pragma unroll
            for (uint32_t d = 0; d < D / 16; ++d) {
                uint32_t a[4];
                load_matrices(a, a_at + d * 32);
                if constexpr (S::FP8) {
#pragma unroll
                    for (uint32_t n = 0; n < KEYS / 32; ++n) {
                        uint32_t b[4];
                        load_matrices(b, k_at + n * 32 * S::PITCH + d * 16);
#pragma unroll
                        for (uint32_t i = 0; i < 4; ++i) {
                            multiply<T>(s[4 * n + i], a, widen_two<T, 0, 1>(b[i]), widen_two<T, 2, 3>(b[i]));
                        }
                    }
                } else {
#pragma unroll
                    for (uint32_t n = 0; n < KEYS / 16; ++n) {
                        uint32_t b[4];
                        load_matrices(b, k_at + n * 16 * S::PITCH + d * 32);
                        multiply<T>(s[2 * n], a, b[0], b[1]);
                        multiply<T>(s[2 * n + 1], a, b[2], b[3]);
                    }
                }
            }

            if (lookup.masked[t % 3][0] || (KEYS > 32 && lookup.masked[t % 3][1])) {
#pragma unroll
                for (uint32_t n = 0; n < KEYS / 8; ++n) {
#pragma unroll
                    for (uint32_t i = 0; i < 4; ++i) {
                        const uint32_t key = lookup.position[t % 3][n * 8 + lane % 4 * 2 + i % 2];
                        if (!sees(i < 2 ? row0 : row1, key)) {
                            s[n][i] = -INFINITY;
                        }
                    }
                }
            }

            float new0 = max0, new1 = max1;
#pragma unroll
            for (uint32_t n = 0; n < KEYS / 8; ++n) {
                new0 = fmaxf(new0, fmaxf(s[n][0], s[n][1]));
                new1 = fmaxf(new1, fmaxf(s[n][2], s[n][3]));
            }
            new0 = quad_max(new0);
            new1 = quad_max(new1);
            const float factor0 = fast_exp2((max0 - new0) * scale);
            const float factor1 = fast_exp2((max1 - new1) * scale);
            max0 = new0;
            max1 = new1;
            sum0 *= factor0;
            sum1 *= factor1;
#pragma unroll
            for (uint32_t n = 0; n < KEYS / 8; ++n) {
                s[n][0] = fast_exp2(s[n][0] * scale - max0 * scale);
                s[n][1] = fast_exp2(s[n][1] * scale - max0 * scale);
                s[n][2] = fast_exp2(s[n][2] * scale - max1 * scale);
                s[n][3] = fast_exp2(s[n][3] * scale - max1 * scale);
                sum0 += s[n][0] + s[n][1];
                sum1 += s[n][2] + s[n][3];
            }
#pragma unroll
            for (uint32_t n = 0; n < D / 8; ++n) {
                acc[n][0] *= factor0;
                acc[n][1] *= factor0;
                acc[n][2] *= factor1;
                acc[n][3] *= factor1;
            }

            // Weights of keys 16 n .. 16 n + 15, as the matrix unit takes them.
            const auto weights = [&](uint32_t n, uint32_t (&a)[4]) {
                a[0] = pack<T>(s[2 * n][0], s[2 * n][1]);
                a[1] = pack<T>(s[2 * n][2], s[2 * n][3]);
                a[2] = pack<T>(s[2 * n + 1][0], s[2 * n + 1][1]);
                a[3] = pack<T>(s[2 * n + 1][2], s[2 * n + 1][3]);
            };
            if constexpr (S::FP8) {
                const uint32_t v_at = v + lane * S::PITCH;
#pragma unroll
                for (uint32_t n = 0; n < KEYS / 32; ++n) {
                    uint32_t a[2][4];
                    weights(2 * n, a[0]);
                    weights(2 * n + 1, a[1]);
#pragma unroll
                    for (uint32_t d = 0; d < D / 16; ++d) {
                        uint32_t b[4];
                        load_matrices_transposed(b, v_at + n * 32 * S::PITCH + d * 16);
#pragma unroll
                        for (uint32_t i = 0; i < 2; ++i) {
                            const uint32_t low = b[2 * i], high = b[2 * i + 1];
                            multiply<T>(acc[2 * d], a[i], widen_two<T, 0, 2>(low), widen_two<T, 0, 2>(high));
                            multiply<T>(acc[2 * d + 1], a[i], widen_two<T, 1, 3>(low), widen_two<T, 1, 3>(high));
                        }
                    }
                }
            } else {
                const uint32_t v_at = v + lane % 16 * S::PITCH + lane / 16 * 16;
#pragma unroll
                for (uint32_t n = 0; n < KEYS / 16; ++n) {
                    uint32_t a[4];
                    weights(n, a);
#pragma unroll
                    for (uint32_t d = 0; d < D / 16; ++d) {
                        uint32_t b[4];
                        load_matrices_transposed(b, v_at + n * 16 * S::PITCH + d * 32);
                        multiply<T>(acc[2 * d], a, b[0], b[1]);
                        multiply<T>(acc[2 * d + 1], a, b[2], b[3]);
                    }
                }
            }
        }
        copies_landed();

        sum0 = quad_sum(sum0);
        sum1 = quad_sum(sum1);
        const auto store = [&](uint32_t m, float sum, float max, uint32_t i) {
            if (m >= packed_rows) {
                return;
            }
            const uint64_t head = uint64_t(seq.row + m / group) * p.heads + kv_head * group + m % group;
            const float factor = sum > 0.0f ? 1.0f / sum : 0.0f;
            if constexpr (S::FP8) {
                uint2 *to = reinterpret_cast<uint2 *>(o + head * D) + lane % 4;
#pragma unroll
                for (uint32_t d = 0; d < D / 16; ++d) {
                    const float *even = &acc[2 * d][i], *odd = &acc[2 * d + 1][i];
                    to[d * 4] = make_uint2(pack<T>(even[0] * factor, odd[0] * factor),
                                           pack<T>(even[1] * factor, odd[1] * factor));
                }
            } else {
                uint32_t *to = reinterpret_cast<uint32_t *>(o + head * D) + lane % 4;
#pragma unroll
                for (uint32_t n = 0; n < D / 8; ++n) {
                    to[n * 4] = pack<T>(acc[n][i] * factor, acc[n][i + 1] * factor);
                }
            }
            if (lane % 4 == 0) {
                p.lse[head] = natural_lse(max * scale, sum);
            }
        };
        store(m0, sum0, max0, 0);
        store(m0 + 8, sum1, max1, 2);
    }
    if (thread == 0) {
        plan_leave(header);
    }
}

} // namespace

#define PREFILL(NAME, T, K, D)                                                                                         \
    extern "C" __global__ void __launch_bounds__(THREADS, 2)                                                           \
        attention_prefill_d##D##_##NAME(const __grid_constant__ Prefill p) {                                           \
        prefill<T, K, D>(p);                                                                                           \
    }
#define PREFILL_ALL(D)                                                                                                 \
    PREFILL(bf16, __nv_bfloat16, __nv_bfloat16, D)                                                                     \
    PREFILL(f16, __half, __half, D)                                                                                    \
    PREFILL(fp8_bf16, __nv_bfloat16, E4m3, D)

PREFILL_ALL(64)
PREFILL_ALL(80)
PREFILL_ALL(96)
PREFILL_ALL(128)
PREFILL_ALL(256)

} // namespace distkv
