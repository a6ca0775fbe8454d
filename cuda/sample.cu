// A token a row: bias, penalties, temperature, min_p, top_k, top_p, a draw. What
// is chosen, and in which order ties and sums are taken, is what
// src/model/sampler does; this file says how it is found without a sort.
//
// Every truncation keeps a prefix of the tokens in one order: heavier first, of
// equals the smaller token. So each is the same question, "where in that order
// do count or mass reach this much", answered digit by digit over the bits of
// the weights, by histograms. A small set is drawn from in that order too (once
// more the same question); a large one in the order of the vocabulary.
#include "cluster.cuh"
#include "rows.cuh"
#include "token_key.cuh"
#include "weights.cuh"

namespace distkv {

// Below this a temperature is greedy.
constexpr float GREEDY_BELOW = 1e-5f;
// A nucleus of at most this many tokens is drawn from in the order of weights.
constexpr uint64_t SORTED_NUCLEUS = 512;
// Digits of a key, highest first: its exponent and two bits more, then sevens.
constexpr uint32_t BINS = 256, FIRST_SHIFT = 21, DIGIT_BITS = 7, DIGITS = 1 << DIGIT_BITS;
constexpr uint32_t NO_TOKEN = ~0u;

struct Histogram {
    uint64_t mass[BINS];
    uint32_t count[BINS];

    // All threads.
    __device__ __forceinline__ void clear() {
        for (uint32_t i = threadIdx.x; i < BINS; i += blockDim.x) {
            mass[i] = 0;
            count[i] = 0;
        }
    }

    // A 64-bit sum in two words: 32 bits is what shared memory adds by itself.
    __device__ __forceinline__ void add(uint32_t bin, uint64_t more) {
        uint32_t *words = reinterpret_cast<uint32_t *>(&mass[bin]);
        const uint32_t low = uint32_t(more), before = atomicAdd(words, low);
        const uint32_t high = uint32_t(more >> 32) + (before + low < before ? 1 : 0);
        if (high != 0) {
            atomicAdd(words + 1, high);
        }
        atomicAdd(&count[bin], 1);
    }
};

// A place in the order of weights: the `ties` tokens with key >> shift == prefix,
// all of one weight. Before them come `count` tokens of `mass`.
struct Place {
    uint64_t mass, tie_mass;
    uint32_t count, prefix, shift, ties;

    // Ties until the mass from the top reaches `need`, which it does among them.
    __device__ __forceinline__ uint64_t ties_to(uint64_t need) const {
        return (need - mass + tie_mass - 1) / tie_mass;
    }
    __device__ __forceinline__ uint64_t mass_with(uint64_t taken) const { return mass + taken * tie_mass; }
};

struct Shared {
    // What the cluster's blocks read of each other is there twice: between the
    // reading of one and its next use lies the exchange of the other.
    Histogram digit[2];
    uint64_t key[2], sum[2];
    uint32_t token[2];
    // The whole row by first digit, in each block.
    Histogram first;
    uint64_t mass;
    uint32_t count;
    // The block's own.
    uint64_t warp_mass[32];
    uint32_t warp_count[32];
    Place place;
};

// A block's slice of one row, and what all the cluster's blocks do with theirs
// together: every member is called by all threads of the cluster.
struct Slice {
    float *item;    // logits, then weights
    uint32_t begin; // its first token
    uint32_t count;
    uint32_t rank, blocks;
    uint32_t turn;
    Shared &shared;

    // Makes what was written for this turn readable to all; returns the turn.
    __device__ __forceinline__ uint32_t exchange() {
        const uint32_t now = turn;
        cluster_sync();
        turn ^= 1;
        return now;
    }

    __device__ __forceinline__ uint64_t largest(uint64_t key) {
        key = block_max(key);
        if (threadIdx.x == 0) {
            shared.key[turn] = key;
        }
        const uint32_t now = exchange(), lane = threadIdx.x % 32;
        return warp_max(lane < blocks ? read_peer(&shared.key[now], lane) : 0);
    }

    template <uint32_t W>
    __device__ __forceinline__ void copy(const float *logits, uint32_t from, uint32_t to, Best &best) {
#pragma unroll 4
        for (uint32_t i = from + threadIdx.x * W; i < to; i += blockDim.x * W) {
            float x[W];
            load(logits + i, x);
            store(item + i, x);
#pragma unroll
            for (uint32_t j = 0; j < W; j++) {
                best.take(x[j], begin + i + j);
            }
        }
    }

    // Copies the slice of `logits`, a row's; applies the row's entries to the
    // copy. The key of the slice's largest.
    __device__ __forceinline__ uint64_t take(const float *logits, const SampleRow &row, const SampleEntry *entries) {
        const uint32_t whole = is_aligned(logits) ? count / 4 * 4 : 0;
        Best best;
        copy<4>(logits + begin, 0, whole, best);
        copy<1>(logits + begin, whole, count, best);
        if (row.entries == 0) {
            return best.key();
        }
        __syncthreads();
        for (uint32_t i = threadIdx.x; i < row.entries; i += blockDim.x) {
            const SampleEntry entry = entries[row.entry + i];
            const uint32_t at = entry.token - begin;
            if (at < count) {
                float x = __fadd_rn(item[at], entry.bias);
                if (entry.seen != 0) {
                    x = x > 0.0f ? __fdiv_rn(x, row.repetition) : __fmul_rn(x, row.repetition);
                }
                if (entry.generated > 0) {
                    x = __fsub_rn(x, __fadd_rn(__fmul_rn(row.frequency, float(entry.generated)), row.presence));
                }
                item[at] = x;
            }
        }
        __syncthreads();
        // A row that was not finite stays so, whatever was added to it.
        Best changed;
        changed.poison = best.poison;
        for (uint32_t i = threadIdx.x; i < count; i += blockDim.x) {
            changed.take(item[i], begin + i);
        }
        return changed.key();
    }

    // Logits to weights; with `counted` also the row's histogram by first digit.
    __device__ __forceinline__ void weigh(float max, const SampleRow &row, bool counted) {
        const float scale = __fdiv_rn(1.0f, row.temperature);
        shared.digit[turn].clear();
        __syncthreads();
        for (uint32_t i = threadIdx.x * 4; i < count; i += blockDim.x * 4) {
            float x[4];
            load(item + i, x);
#pragma unroll
            for (uint32_t j = 0; j < 4; j++) {
                x[j] = weight_exp(__fmul_rn(__fsub_rn(x[j], max), scale));
                // The slice ends with zeros up to a whole run.
                x[j] = x[j] < row.min_p || i + j >= count ? 0.0f : x[j];
                if (counted && has_mass(x[j])) {
                    shared.digit[turn].add(weight_key(x[j]) >> FIRST_SHIFT, mass_of(x[j]));
                }
            }
            store(item + i, x);
        }
        if (!counted) {
            __syncthreads();
            return;
        }
        uint64_t mass;
        uint32_t tokens;
        gather(BINS, exchange(), mass, tokens);
        // A thread reads back only what it has written, but for the sums.
        if (threadIdx.x < BINS) {
            shared.first.mass[threadIdx.x] = mass;
            shared.first.count[threadIdx.x] = tokens;
        }
        before(BINS, mass, tokens);
        if (threadIdx.x == BINS - 1) {
            shared.mass = mass + shared.first.mass[BINS - 1];
            shared.count = tokens + shared.first.count[BINS - 1];
        }
        __syncthreads();
    }

    // The cluster's sum of this thread's bin, which is the threadIdx.x-th from
    // the highest.
    __device__ __forceinline__ void gather(uint32_t bins, uint32_t now, uint64_t &mass, uint32_t &tokens) const {
        mass = 0;
        tokens = 0;
        if (threadIdx.x < bins) {
            const uint32_t bin = bins - 1 - threadIdx.x;
            for (uint32_t peer = 0; peer < blocks; peer++) {
                mass += read_peer(&shared.digit[now].mass[bin], peer);
                tokens += read_peer(&shared.digit[now].count[bin], peer);
            }
        }
    }

    // From bins, one a thread, to the sum of those of the threads before.
    __device__ __forceinline__ void before(uint32_t bins, uint64_t &mass, uint32_t &tokens) {
        const uint32_t warp = threadIdx.x / 32;
        if (threadIdx.x < bins) {
            const uint64_t mass_to = warp_prefix(mass);
            const uint32_t tokens_to = warp_prefix(tokens);
            if (threadIdx.x % 32 == 31) {
                shared.warp_mass[warp] = mass_to;
                shared.warp_count[warp] = tokens_to;
            }
            mass = mass_to - mass;
            tokens = tokens_to - tokens;
        }
        __syncthreads();
        if (threadIdx.x < bins) {
            for (uint32_t i = 0; i < warp; i++) {
                mass += shared.warp_mass[i];
                tokens += shared.warp_count[i];
            }
        }
    }

    // Narrows `place` to the bin in which count or mass reach `need`, given the
    // bins inside it, one a thread, the highest first.
    __device__ __forceinline__ void narrow(uint32_t bins, uint64_t mass, uint32_t tokens, bool by_count, uint64_t need,
                                           uint32_t digit_bits, Place &place) {
        const uint64_t bin_mass = mass;
        const uint32_t bin_tokens = tokens;
        before(bins, mass, tokens);
        mass += place.mass;
        tokens += place.count;
        const uint64_t from = by_count ? tokens : mass, size = by_count ? bin_tokens : bin_mass;
        if (threadIdx.x < bins && from < need && need <= from + size) {
            const uint32_t digit = bins - 1 - threadIdx.x;
            const uint32_t prefix = place.prefix << digit_bits | digit;
            shared.place = {mass, bin_mass, tokens, prefix, place.shift - digit_bits, bin_tokens};
        }
        __syncthreads();
        place = shared.place;
    }

    // Where count or mass, from the heaviest token on, reach `need`, which is
    // from 1 to what the row has.
    __device__ __forceinline__ Place seek(bool by_count, uint64_t need) {
        uint64_t mass = 0;
        uint32_t tokens = 0;
        if (threadIdx.x < BINS) {
            mass = shared.first.mass[threadIdx.x];
            tokens = shared.first.count[threadIdx.x];
        }
        Place place{0, 0, 0, 0, FIRST_SHIFT + 8, 0};
        narrow(BINS, mass, tokens, by_count, need, 8, place);
        while (place.shift > 0 && place.ties > 1) {
            const uint32_t shift = place.shift - DIGIT_BITS;
            shared.digit[turn].clear();
            __syncthreads();
            for (uint32_t i = threadIdx.x * 4; i < count; i += blockDim.x * 4) {
                float x[4];
                load(item + i, x);
#pragma unroll
                for (uint32_t j = 0; j < 4; j++) {
                    if (has_mass(x[j]) && weight_key(x[j]) >> place.shift == place.prefix) {
                        shared.digit[turn].add(weight_key(x[j]) >> shift & (DIGITS - 1), mass_of(x[j]));
                    }
                }
            }
            gather(DIGITS, exchange(), mass, tokens);
            narrow(DIGITS, mass, tokens, by_count, need, DIGIT_BITS, place);
        }
        place.tie_mass /= place.ties;
        return place;
    }

    // The first token, in the order of the vocabulary, at which the sum of
    // `measure(weight, token)` reaches `need(sum over all)`: `found(token)` is
    // called by one thread of the cluster.
    template <class M, class N, class F>
    __device__ __forceinline__ void find(M measure, N need_of, F found) {
        const uint32_t warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        const uint32_t segment = ((count + warps - 1) / warps + 31) / 32 * 32;
        const uint32_t from = min(warp * segment, count), to = min(from + segment, count);
        uint64_t mine = 0;
        for (uint32_t i = from + lane; i < to; i += 32) {
            mine += measure(item[i], begin + i);
        }
        mine = warp_sum(mine);
        if (lane == 0) {
            shared.warp_mass[warp] = mine;
        }
        __syncthreads();
        const uint64_t other = lane < warps ? shared.warp_mass[lane] : 0;
        uint64_t sum = warp_sum(other), left = warp_sum(lane < warp ? other : 0);
        if (threadIdx.x == 0) {
            shared.sum[turn] = sum;
        }
        const uint32_t now = exchange();
        const uint64_t peer = lane < blocks ? read_peer(&shared.sum[now], lane) : 0;
        sum = warp_sum(peer);
        left += warp_sum(lane < rank ? peer : 0);
        const uint64_t need = need_of(sum);
        if (left >= need || need > left + mine) {
            return;
        }
        // One warp of the cluster walks through its segment.
        for (uint32_t i = from; i < to; i += 32) {
            const uint64_t here = i + lane < to ? measure(item[i + lane], begin + i + lane) : 0;
            const uint64_t reached = left + warp_prefix(here);
            const uint32_t past = __ballot_sync(0xffffffff, reached >= need);
            if (past != 0) {
                if (lane == __ffs(past) - 1) {
                    found(begin + i + lane);
                }
                return;
            }
            left = __shfl_sync(0xffffffff, reached, 31);
        }
    }

    // The tie-th token of those at `place`, from 1 on.
    template <class F>
    __device__ __forceinline__ void find_tie(const Place &place, uint64_t tie, F found) {
        const auto ties = [&](float x, uint32_t) -> uint64_t {
            return has_mass(x) && weight_key(x) >> place.shift == place.prefix ? 1 : 0;
        };
        find(ties, [=](uint64_t) { return tie; }, found);
    }

    // Draws in the order of the vocabulary among the tokens before `place` and
    // the first `taken` at it.
    template <class F>
    __device__ __forceinline__ void draw_before(const Place &place, uint64_t taken, uint64_t need, F found) {
        uint32_t last = NO_TOKEN;
        if (taken < place.ties) {
            const uint32_t now = turn ^ 1;
            if (threadIdx.x == 0) {
                shared.token[now] = NO_TOKEN;
            }
            find_tie(place, taken, [&](uint32_t token) { shared.token[now] = token; });
            exchange();
            for (uint32_t peer = 0; peer < blocks; peer++) {
                last = min(last, read_peer(&shared.token[now], peer));
            }
        }
        const auto kept = [&](float x, uint32_t token) -> uint64_t {
            if (!has_mass(x)) {
                return 0;
            }
            const uint32_t prefix = weight_key(x) >> place.shift;
            return prefix > place.prefix || (prefix == place.prefix && token <= last) ? mass_of(x) : 0;
        };
        find(kept, [=](uint64_t) { return need; }, found);
    }

    // Draws among the kept tokens; after `weigh` with its histogram.
    template <class F>
    __device__ __forceinline__ void draw_truncated(const SampleRow &row, F found) {
        uint64_t kept = shared.mass;
        bool by_weight = row.top_k > 0;
        // Tokens without mass are never drawn: k of them or fewer is all.
        if (by_weight && row.top_k < shared.count) {
            const Place place = seek(true, row.top_k);
            kept = place.mass_with(row.top_k - place.count);
        }
        Place end;
        uint64_t taken = 0;
        if (row.top_p < 1.0f) {
            const uint64_t need = uint64_t(ceil(double(kept) * double(row.top_p)));
            end = seek(false, min(max(need, uint64_t(1)), kept));
            taken = end.ties_to(min(max(need, uint64_t(1)), kept));
            kept = end.mass_with(taken);
            by_weight = by_weight || end.count + taken <= SORTED_NUCLEUS;
        }
        const uint64_t need = part_of(kept, row.unit) + 1;
        if (by_weight) {
            const Place place = seek(false, need);
            find_tie(place, place.ties_to(need), found);
        } else {
            draw_before(end, taken, need, found);
        }
    }
};

// `room` is in shared memory, or the row's in p.weights is used.
template <bool SHARED>
__device__ __forceinline__ void sample(const Sample &p, float *room) {
    __shared__ Shared shared;
    const uint32_t rows = begin_kernel(p.rows), rank = cluster_rank(), blocks = cluster_blocks();
    const uint32_t share = ((p.vocab + blocks - 1) / blocks + 3) / 4 * 4;
    const uint32_t begin = min(rank * share, p.vocab), count = min(share, p.vocab - begin);
    Slice slice{nullptr, begin, count, rank, blocks, 0, shared};
    for (uint32_t r = blockIdx.y; r < rows; r += gridDim.y) {
        const SampleRow row = p.params[r];
        slice.item = SHARED ? room : p.weights + uint64_t(r) * ((p.vocab + 3) / 4 * 4);
        // The row before may still be being read.
        __syncthreads();
        const uint64_t key = slice.largest(slice.take(p.logits + uint64_t(r) * p.stride, row, p.entries));
        if (rank == 0 && threadIdx.x == 0) {
            p.flags[r] = key == NOT_FINITE ? FLAG_NOT_FINITE : 0;
        }
        if (key == NOT_FINITE || row.temperature < GREEDY_BELOW) {
            if (rank == 0 && threadIdx.x == 0) {
                p.tokens[r] = key_token(key);
            }
            continue;
        }
        const auto found = [&](uint32_t token) { p.tokens[r] = token; };
        const bool truncated = row.top_k > 0 || row.top_p < 1.0f;
        slice.weigh(key_logit(key), row, truncated);
        if (truncated) {
            slice.draw_truncated(row, found);
        } else {
            const auto mass = [](float x, uint32_t) { return mass_of(x); };
            slice.find(mass, [&](uint64_t sum) { return part_of(sum, row.unit) + 1; }, found);
        }
    }
    cluster_sync();
}

} // namespace distkv

// A cluster along x a row; rows along y, perhaps several one after another.
// Shared memory for a block's share of a row: ((vocab / blocks, rounded up) + 3)
// / 4 * 16 bytes.
extern "C" __global__ void __launch_bounds__(1024) sample(const __grid_constant__ distkv::Sample p) {
    extern __shared__ float4 room[];
    distkv::sample<true>(p, reinterpret_cast<float *>(room));
}

// The same with the weights in global memory: one block a row, any device.
extern "C" __global__ void __launch_bounds__(1024) sample_global(const __grid_constant__ distkv::Sample p) {
    distkv::sample<false>(p, nullptr);
}
