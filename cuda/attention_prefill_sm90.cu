// Paged prefill attention on Hopper: wgmma, the bulk tensor copy, and a block
// that stays on its multiprocessor and draws (tile, kv head) pairs until none
// is left (see prefill_plan.cuh).
//
// One warpgroup feeds (prefill_feed.cuh), two or three compute, 64 packed rows
// each.
// Pairs follow each other without a gap, the next one's data coming in under the
// last one's work.
//
// A computing warpgroup starts the scores of a tile, then the product of the
// last tile's weights with its values, and works on the softmax of the former
// while the tensor cores finish the latter; the warpgroups take turns to
// start, so that one's softmax falls under another's products
// (FlashAttention-3, sections 3.1 and 3.2).
#include "matrix.cuh"
#include "prefill_feed.cuh"
#include "state.cuh"
#include "wgmma.cuh"

#include <cuda.h>

namespace distkv {
namespace {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// A row's maximum is taken over only when it grew by more than this (in base
// 2): the weights stay below 2^8, which both types hold, and the accumulators
// are rarely scaled.
constexpr float LAZY = 8.0f;

template <bool VALUE> struct Masked {
    static constexpr bool value = VALUE;
};

// A computing warpgroup.
template <class T, uint32_t D>
__device__ __forceinline__ void
compute(const Prefill &p, Control<D> &control, uint32_t queries_at, uint32_t keys_at, uint32_t values_at) {
    using S = Shape<D>;
    constexpr uint32_t KEYS = S::KEYS, COMPUTING = S::COMPUTING;
    const uint32_t me = threadIdx.x / 128 - 1;
    const uint32_t lane = threadIdx.x % 32;
    const uint32_t quad = lane % 4;
    const uint32_t group = p.heads / p.kv_heads;
    const float scale = p.scale * LOG2_E;
    T *o = static_cast<T *>(p.o);

    Turn<2> pair_turn;
    Turn<S::QUERIES> query_turn;
    Turn<S::STAGES> key_turn, value_turn;
    const auto release = [&](uint64_t *empty) {
        __syncwarp();
        if (lane == 0) {
            barrier_arrive(shared_address(empty));
        }
    };
    // Who is to start products next is told on named barrier 1 + me.
    const auto wait_turn = [&] { named_wait(1 + me, 256); };
    const auto pass_turn = [&] { named_arrive(1 + (me + 1) % COMPUTING, 256); };
    if (me == COMPUTING - 1) {
        pass_turn();
    }

    Pair pair;
    while (take_pair<D>(control, pair_turn, pair)) {
        const uint32_t tiles = pair.end - pair.begin;
        // This thread's rows are lane / 4 of its warp's 16 and 8 further.
        const uint32_t m0 = pair.packed + (threadIdx.x / 32 - 4) * 16 + lane / 4;
        const uint32_t position0 = pair.seq.position + m0 / group;
        const uint32_t position1 = pair.seq.position + (m0 + 8) / group;

        float acc[D / 2];
        float s[KEYS / 2];
        uint32_t weights[KEYS / 4];
        float max0 = NO_SCORE, max1 = NO_SCORE, sum0 = 0.0f, sum1 = 0.0f;
        float factor0 = 1.0f, factor1 = 1.0f;

        const uint32_t q_at = queries_at + query_turn.slot * S::QUERY_BYTES + me * 64 * 128;
        uint32_t query[S::HELD ? D / 4 : 1];
        const auto hold_queries = [&] {
            const uint32_t row = threadIdx.x / 32 % 4 * 16 + lane % 16;
#pragma unroll
            for (uint32_t d = 0; d < D / 16; ++d) {
                const uint32_t unit = d % 4 * 2 + lane / 16;
                load_matrices(&query[4 * d], q_at + d / 4 * S::ROWS * 128 + row * 128 + (unit ^ row % 8) * 16);
            }
        };
        const auto start_scores = [&] {
            const uint32_t k_at = keys_at + key_turn.slot * S::KEY_BYTES;
            pin(s);
            wgmma_fence();
#pragma unroll
            for (uint32_t d = 0; d < D / 16; ++d) {
                const uint64_t k = operand(k_at + d / 4 * S::COLUMN + d % 4 * 32, 16, S::EIGHT);
                if constexpr (S::HELD) {
                    Wgmma<T, KEYS>::template rs<false>(s, &query[4 * d], k, d > 0);
                } else {
                    Wgmma<T, KEYS>::ss(s, operand(q_at + d / 4 * S::ROWS * 128 + d % 4 * 32, 16, 1024), k, d > 0);
                }
            }
            wgmma_commit();
        };
        const auto start_values = [&](bool add) {
            const uint32_t v_at = values_at + value_turn.slot * S::KEY_BYTES;
            pin(acc);
            pin(weights);
            wgmma_fence();
#pragma unroll
            for (uint32_t k = 0; k < KEYS / 16; ++k) {
                Wgmma<T, D>::template rs<true>(acc, &weights[4 * k],
                                               operand(v_at + k * 2 * S::EIGHT, S::COLUMN, S::EIGHT), add || k > 0);
            }
            wgmma_commit();
        };
        const auto hide = [&] {
            const Mask mask = control.mask[key_turn.slot];
            if (mask.kind == Mask::RUN) {
                const auto bounds = [&](uint32_t position, int32_t &low, int32_t &high) {
                    const int32_t own = int32_t(position - mask.position);
                    high = min(own + 1, int32_t(mask.keys)) - int32_t(quad * 2);
                    low = (p.window > 0 ? own - int32_t(p.window) + 1 : 0) - int32_t(quad * 2);
                };
                int32_t low0, high0, low1, high1;
                bounds(position0, low0, high0);
                bounds(position1, low1, high1);
#pragma unroll
                for (uint32_t i = 0; i < KEYS / 2; ++i) {
                    const int32_t key = i / 4 * 8 + i % 2;
                    const bool sees = i % 4 < 2 ? key < high0 && key >= low0 : key < high1 && key >= low1;
                    s[i] = sees ? s[i] : -INFINITY;
                }
            } else if (mask.kind == Mask::LIST) {
#pragma unroll
                for (uint32_t i = 0; i < KEYS / 2; ++i) {
                    const uint32_t key = control.positions[key_turn.slot][i / 4 * 8 + quad * 2 + i % 2];
                    const uint32_t own = i % 4 < 2 ? position0 : position1;
                    const bool sees = key <= own && (p.window == 0 || own - key < p.window);
                    s[i] = sees ? s[i] : -INFINITY;
                }
            }
        };
        // Scores to weights, with a new maximum only where it grew much.
        const auto soften = [&] {
            float top0 = s[0], top1 = s[2];
#pragma unroll
            for (uint32_t i = 0; i < KEYS / 2; i += 4) {
                top0 = fmaxf(top0, fmaxf(s[i], s[i + 1]));
                top1 = fmaxf(top1, fmaxf(s[i + 2], s[i + 3]));
            }
            top0 = fmaxf(top0, __shfl_xor_sync(0xffffffff, top0, 1));
            top1 = fmaxf(top1, __shfl_xor_sync(0xffffffff, top1, 1));
            top0 = fmaxf(top0, __shfl_xor_sync(0xffffffff, top0, 2));
            top1 = fmaxf(top1, __shfl_xor_sync(0xffffffff, top1, 2));
            factor0 = 1.0f;
            factor1 = 1.0f;
            if ((top0 - max0) * scale > LAZY) {
                factor0 = fast_exp2((max0 - top0) * scale);
                max0 = top0;
            }
            if ((top1 - max1) * scale > LAZY) {
                factor1 = fast_exp2((max1 - top1) * scale);
                max1 = top1;
            }
            sum0 *= factor0;
            sum1 *= factor1;
            const float base0 = max0 * scale;
            const float base1 = max1 * scale;
#pragma unroll
            for (uint32_t i = 0; i < KEYS / 2; i += 4) {
                s[i] = fast_exp2(s[i] * scale - base0);
                s[i + 1] = fast_exp2(s[i + 1] * scale - base0);
                s[i + 2] = fast_exp2(s[i + 2] * scale - base1);
                s[i + 3] = fast_exp2(s[i + 3] * scale - base1);
                sum0 += s[i] + s[i + 1];
                sum1 += s[i + 2] + s[i + 3];
            }
        };
        const auto pack_weights = [&] {
#pragma unroll
            for (uint32_t i = 0; i < KEYS / 4; ++i) {
                weights[i] = pack<T>(s[2 * i], s[2 * i + 1]);
            }
        };
        const auto scale_acc = [&] {
            if (__any_sync(0xffffffff, factor0 != 1.0f || factor1 != 1.0f)) {
#pragma unroll
                for (uint32_t i = 0; i < D / 2; i += 4) {
                    acc[i] *= factor0;
                    acc[i + 1] *= factor0;
                    acc[i + 2] *= factor1;
                    acc[i + 3] *= factor1;
                }
            }
        };

        // What the products after those of tile t - 1 take: the keys of tile t,
        // or behind the last tile its values.
        const auto await = [&](uint32_t t, const Turn<S::STAGES> &values) {
            const bool more = t < tiles && !(sum0 + sum1 < 0.0f);
            barrier_wait(shared_address(more ? &control.key_full[key_turn.slot] : &control.value_full[values.slot]),
                         more ? key_turn.parity : values.parity);
        };
        // The scores of a tile and the values of the one before. Two versions,
        // for a branch while products are under way makes the compiler wait for
        // them there.
        const auto step = [&](auto masked, uint32_t t) {
            wait_turn();
            start_scores();
            barrier_wait(shared_address(&control.value_full[value_turn.slot]), value_turn.parity);
            start_values(t > 1);
            pass_turn();
            wgmma_wait<1>();
            pin(s);
            if constexpr (masked.value) {
                hide();
            }
            release(&control.key_empty[key_turn.slot]);
            key_turn.next();
            soften();
            // The assembler moves the wait for the products up in its basic
            // block, above the softmax that is to run under them. The loop of
            // this other wait ends the block, and that it asks for the sums,
            // which are never negative, keeps the softmax in front of it.
            pin(s);
            Turn<S::STAGES> next_values = value_turn;
            next_values.next();
            await(t + 1, next_values);
            wgmma_wait<0>();
            pin(acc);
            pin(weights);
            release(&control.value_empty[value_turn.slot]);
            value_turn.next();
            pack_weights();
            scale_acc();
        };

        barrier_wait(shared_address(&control.query_full[query_turn.slot]), query_turn.parity);
        if constexpr (S::HELD) {
            hold_queries();
            pin(query);
            release(&control.query_empty[query_turn.slot]);
        }
        if (tiles == 0) {
#pragma unroll
            for (uint32_t i = 0; i < D / 2; ++i) {
                acc[i] = 0.0f;
            }
            if constexpr (!S::HELD) {
                release(&control.query_empty[query_turn.slot]);
            }
        } else {
            barrier_wait(shared_address(&control.key_full[key_turn.slot]), key_turn.parity);
            start_scores();
            wgmma_wait<0>();
            pin(s);
            hide();
            release(&control.key_empty[key_turn.slot]);
            key_turn.next();
            soften();
            pack_weights();
            await(1, value_turn);
            for (uint32_t t = 1; t < tiles; ++t) {
                if (control.mask[key_turn.slot].kind == Mask::NONE) {
                    step(Masked<false>(), t);
                } else {
                    step(Masked<true>(), t);
                }
            }
            if constexpr (!S::HELD) {
                release(&control.query_empty[query_turn.slot]);
            }
            start_values(tiles > 1);
            wgmma_wait<0>();
            pin(acc);
            pin(weights);
            release(&control.value_empty[value_turn.slot]);
            value_turn.next();
        }
        query_turn.next();

        sum0 += __shfl_xor_sync(0xffffffff, sum0, 1);
        sum1 += __shfl_xor_sync(0xffffffff, sum1, 1);
        sum0 += __shfl_xor_sync(0xffffffff, sum0, 2);
        sum1 += __shfl_xor_sync(0xffffffff, sum1, 2);
        const auto store = [&](uint32_t m, float sum, float max, uint32_t second) {
            const bool use = m < pair.seq.rows * group;
            const uint64_t head = uint64_t(pair.seq.row + m / group) * p.heads + pair.head * group + m % group;
            const float factor = sum > 0.0f ? 1.0f / sum : 0.0f;
            const auto packed = [&](uint32_t n) {
                return pack<T>(acc[4 * n + second] * factor, acc[4 * n + second + 1] * factor);
            };
            T *to = o + head * D;
            // A quad turns its 4x4 words round, so that each thread stores 16
            // consecutive bytes.
#pragma unroll
            for (uint32_t n = 0; n + 4 <= D / 8; n += 4) {
                uint32_t w[4] = {packed(n), packed(n + 1), packed(n + 2), packed(n + 3)};
#pragma unroll
                for (uint32_t i = 0; i < 4; i += 2) {
                    const uint32_t got = __shfl_xor_sync(0xffffffff, quad & 1 ? w[i] : w[i + 1], 1);
                    w[i] = quad & 1 ? got : w[i];
                    w[i + 1] = quad & 1 ? w[i + 1] : got;
                }
#pragma unroll
                for (uint32_t i = 0; i < 2; ++i) {
                    const uint32_t got = __shfl_xor_sync(0xffffffff, quad & 2 ? w[i] : w[i + 2], 2);
                    w[i] = quad & 2 ? got : w[i];
                    w[i + 2] = quad & 2 ? w[i + 2] : got;
                }
                if (use) {
                    *reinterpret_cast<uint4 *>(to + (n + quad) * 8) = make_uint4(w[0], w[1], w[2], w[3]);
                }
            }
#pragma unroll
            for (uint32_t n = D / 8 / 4 * 4; n < D / 8; ++n) {
                if (use) {
                    *reinterpret_cast<uint32_t *>(to + n * 8 + quad * 2) = packed(n);
                }
            }
            if (use && quad == 0) {
                p.lse[head] = natural_lse(max * scale, sum);
            }
        };
        store(m0, sum0, max0, 0);
        store(m0 + 8, sum1, max1, 2);
    }
}

template <class T, uint32_t D> __device__ __forceinline__ void prefill(const Prefill &p, const void *map) {
    using S = Shape<D>;
    extern __shared__ uint8_t memory[];
    __shared__ Control<D> control;
    // The swizzle counts from multiples of 1024 bytes.
    const uint32_t queries_at = (shared_address(memory) + 1023) & ~1023u;
    const uint32_t keys_at = queries_at + S::QUERIES * S::QUERY_BYTES;
    const uint32_t values_at = keys_at + S::STAGES * S::KEY_BYTES;

    if (threadIdx.x == 0) {
        const auto init = [](uint64_t *barrier, uint32_t arrivals) {
            barrier_init(shared_address(barrier), arrivals);
        };
        for (uint32_t i = 0; i < S::STAGES; ++i) {
            init(&control.key_full[i], 1);
            init(&control.value_full[i], 1);
            init(&control.key_empty[i], S::COMPUTING * 4);
            init(&control.value_empty[i], S::COMPUTING * 4);
        }
        for (uint32_t i = 0; i < S::QUERIES; ++i) {
            init(&control.query_full[i], 64);
            init(&control.query_empty[i], S::COMPUTING * 4);
        }
        for (uint32_t i = 0; i < 2; ++i) {
            init(&control.pair_full[i], 1);
            init(&control.pair_empty[i], S::COMPUTING * 4 + 3);
        }
        init(&control.patch, 1);
        barrier_init_done();
        prefetch_map(map);
    }
    __syncthreads();

    if (threadIdx.x < 128) {
        registers_less<56>();
        if (threadIdx.x < 32) {
            feed_keys<D>(p, map, control, keys_at);
        } else if (threadIdx.x < 64) {
            feed_values<D>(p, map, control, values_at);
        } else {
            feed_queries<T, D>(p, control, queries_at);
        }
    } else {
        registers_more<S::REGISTERS>();
        compute<T, D>(p, control, queries_at, keys_at, values_at);
    }
}

#endif // __CUDA_ARCH_FEAT_SM90_ALL

} // namespace

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define BODY(T, D) prefill<T, D>(p, &map)
#else
#define BODY(T, D) __trap() // built for sm_90a alone
#endif
#define PREFILL(T, NAME, D)                                                                                            \
    extern "C" __global__ void __launch_bounds__(Shape<D>::THREADS, 1)                                                   \
        attention_prefill_sm90_d##D##_##NAME(const __grid_constant__ Prefill p,                                        \
                                             const __grid_constant__ CUtensorMap map) {                                \
        BODY(T, D);                                                                                                    \
    }
#define PREFILL_BOTH(D) PREFILL(__nv_bfloat16, bf16, D) PREFILL(__half, f16, D)

PREFILL_BOTH(64)
PREFILL_BOTH(80)
PREFILL_BOTH(96)
PREFILL_BOTH(128)
PREFILL_BOTH(256)

} // namespace distkv
