// Attention to short contexts (cuda/decode_short.cu) with the GPU's threads run as
// threads of the CPU, beside plain attention: so that addresses, alignments and sums
// are checked where there is no GPU. What a GPU's memory model allows is not.
//
// `kernel.inc` is the kernel without its headers, `structs.inc` the structs of
// cuda/api.h; tests/cuda_on_cpu.rs makes both. The argument says how many cases.
#include <pthread.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "language.h"

// ---- What the language has ----

struct Index {
    uint32_t x, y;
};

constexpr uint32_t THREADS = 128, MOST_BLOCKS = 8;
struct Warp {
    pthread_barrier_t all;
    float lanes[32];
};
struct Block {
    pthread_barrier_t all;
    Warp warps[THREADS / 32];
    char *shared;
};
static Block blocks[MOST_BLOCKS]; // of a cluster
static uint32_t cluster;
static pthread_barrier_t cluster_all;
static thread_local Index threadIdx, blockIdx;
static thread_local uint32_t rank_here;

static void __syncthreads() { pthread_barrier_wait(&blocks[rank_here].all); }

static float __shfl_xor_sync(uint32_t, float x, uint32_t mask) {
    Warp &warp = blocks[rank_here].warps[threadIdx.x / 32];
    const uint32_t lane = threadIdx.x % 32;
    warp.lanes[lane] = x;
    pthread_barrier_wait(&warp.all);
    const float other = warp.lanes[lane ^ mask];
    pthread_barrier_wait(&warp.all);
    return other;
}

// ---- What the kernel's headers have ----

#include "structs.inc"

namespace distkv {

constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f, NO_SCORE = -1.0e30f;

static uint32_t cluster_blocks() { return cluster; }
static uint32_t cluster_rank() { return rank_here; }
static void cluster_sync() { pthread_barrier_wait(&cluster_all); }
static void cluster_arrive() {}
static void cluster_wait() { cluster_sync(); }
static void launch_next() {}
static void wait_for_previous() {}
static float fast_exp2(float x) { return exp2f(x); }
static float natural_lse(float max2, float sum) { return sum > 0.0f ? (max2 + log2f(sum)) * LN_2 : -INFINITY; }

static uint64_t kv_offset(uint32_t block, bool value, uint32_t head, uint32_t kv_heads, uint32_t tokens, uint32_t d) {
    return ((uint64_t(block) * 2 + (value ? 1 : 0)) * kv_heads + head) * tokens * d;
}

static float lanes_sum(float x) {
    for (uint32_t step = 16; step > 0; step /= 2)
        x += __shfl_xor_sync(~0u, x, step);
    return x;
}

// A place in another block's shared memory.
template <class V> void store_peer(V *to, uint32_t rank, V value) {
    char *there = blocks[rank].shared + (reinterpret_cast<char *>(to) - blocks[rank_here].shared);
    *reinterpret_cast<V *>(there) = value;
}

static void *shared_memory() { return blocks[rank_here].shared; }

} // namespace distkv

#include "kernel.inc"

// ---- The test ----

using namespace distkv;
using Element = __nv_bfloat16;

template <uint32_t D, uint32_t G> void launch(const DecodeShort &p, uint32_t rows) {
    for (uint32_t i = 0; i < rows * p.kv_heads; i++) {
        std::vector<std::thread> threads;
        pthread_barrier_init(&cluster_all, nullptr, THREADS * cluster);
        for (uint32_t b = 0; b < cluster; b++) {
            pthread_barrier_init(&blocks[b].all, nullptr, THREADS);
            for (Warp &warp : blocks[b].warps)
                pthread_barrier_init(&warp.all, nullptr, 32);
            blocks[b].shared = static_cast<char *>(aligned_alloc(64, (sizeof(Shared<D, G>) + 63) / 64 * 64));
            memset(blocks[b].shared, 0xff, sizeof(Shared<D, G>));
        }
        for (uint32_t t = 0; t < THREADS * cluster; t++)
            threads.emplace_back([=, &p] {
                rank_here = t / THREADS;
                threadIdx = {t % THREADS, 0};
                blockIdx = {i % p.kv_heads * cluster + rank_here, i / p.kv_heads};
                decode_short<Element, D, G>(p);
            });
        for (std::thread &thread : threads)
            thread.join();
        for (uint32_t b = 0; b < cluster; b++)
            free(blocks[b].shared);
    }
}

static std::mt19937 source(7);
static uint32_t pick(uint32_t from, uint32_t below) { return from + source() % (below - from); }
static bool one_in(uint32_t n) { return pick(0, n) == 0; }
static float noise() { return float(pick(0, 20001)) / 10000.0f - 1.0f; }

struct Case {
    uint32_t d, kv_heads, group, tokens, window, rows, pairs, blocks = 0;
    bool interleaved, normed;
    std::vector<Slot> slots;
    std::vector<Seq> seqs;
    std::vector<Page> pages;
    std::vector<Element> qkv, pool;
    std::vector<float> table, q_norm, k_norm;

    Case() {
        const uint32_t sizes[] = {16, 32, 48, 64, 256};
        d = one_in(2) ? 64 : 128, kv_heads = pick(1, 3), group = pick(1, 9), tokens = sizes[pick(0, 5)];
        cluster = 1u << pick(0, 4), window = one_in(3) ? pick(1, 200) : 0, rows = pick(1, 3);
        interleaved = one_in(2), normed = one_in(3), pairs = one_in(4) ? d / 4 : d / 2;
        for (uint32_t row = 0; row < rows; row++) {
            // None before it, as many as there is room for, or some.
            const uint32_t most = cluster * SHORT_TOKENS;
            add(row, one_in(8) ? 0 : one_in(8) ? most - 1 : pick(0, one_in(2) ? most : most / 3));
        }
        pool.assign(size_t(blocks) * 2 * kv_heads * tokens * d, Element{0xffff}); // NaN
        for (const Page &page : pages)
            for (uint32_t i = 0; i < 2 * kv_heads; i++)
                for (uint32_t e = 0; e < page.tokens * d; e++)
                    pool[place(page.block, i / kv_heads, i % kv_heads) + e] = from_float<Element>(noise());
        fill(qkv, rows * (group + 2) * kv_heads * d), fill(table, rows * pairs * 2), fill(q_norm, d), fill(k_norm, d);
    }

    void add(uint32_t row, uint32_t own) {
        const uint32_t first = pages.size();
        const bool sparse = one_in(3);
        for (uint32_t position = 0; position <= own; position += tokens, blocks++) {
            const bool last = position + tokens > own;
            uint32_t filled = min(own + 1 - position, tokens);
            filled = sparse && !last ? pick(1, filled + 1) : filled;
            if (last || !sparse || !one_in(3))
                pages.push_back({blocks, position, filled});
            if (last)
                slots.push_back({own, blocks, own - position});
        }
        seqs.push_back({row, 1, own, first, uint32_t(pages.size()) - first});
    }

    static void fill(std::vector<float> &to, size_t count) {
        to.resize(count);
        for (float &x : to)
            x = noise();
    }
    static void fill(std::vector<Element> &to, size_t count) {
        to.resize(count);
        for (Element &x : to)
            x = from_float<Element>(noise());
    }

    size_t place(uint32_t block, bool value, uint32_t head) const {
        return kv_offset(block, value, head, kv_heads, tokens, d);
    }

    // A head of a row, rounded as the pool has it.
    std::vector<double> head(uint32_t row, uint32_t index, const float *norm, bool turned) const {
        std::vector<double> x(d);
        double squares = 0;
        for (uint32_t i = 0; i < d; i++) {
            x[i] = to_float(qkv[(row * (group + 2) * kv_heads + index) * d + i]);
            squares += x[i] * x[i];
        }
        for (uint32_t i = 0; norm && i < d; i++)
            x[i] *= norm[i] / sqrt(squares / d + 1e-6);
        for (uint32_t j = 0; turned && j < pairs; j++) {
            const uint32_t a = interleaved ? 2 * j : j, b = interleaved ? 2 * j + 1 : j + pairs;
            const double cos = table[(row * pairs + j) * 2], sin = table[(row * pairs + j) * 2 + 1], u = x[a] * cos - x[b] * sin;
            x[b] = x[a] * sin + x[b] * cos;
            x[a] = u;
        }
        for (double &v : x)
            v = to_float(from_float<Element>(float(v)));
        return x;
    }
};

static bool fail(int turn, const char *what, double got, double want) {
    printf("case %d: %s is %g, not %g\n", turn, what, got, want);
    return false;
}

static bool check(int turn, double &worst) {
    Case c;
    const uint32_t heads = c.group * c.kv_heads;
    const float *q_norm = c.normed ? c.q_norm.data() : nullptr, *k_norm = c.normed ? c.k_norm.data() : nullptr;
    std::vector<Element> want_pool = c.pool, o(c.rows * heads * c.d, Element{0xffff});
    std::vector<float> lse(c.rows * heads, NAN);
    const float scale = 1 / sqrtf(c.d);
    const Step step{c.rows, c.rows, c.rows, 0};
    const DecodeShort p{c.qkv.data(),  c.pool.data(),  c.table.data(), q_norm,     k_norm,     c.slots.data(), c.seqs.data(),
                        c.pages.data(), &step,          o.data(),       lse.data(), heads,      c.kv_heads,     c.tokens,
                        c.pairs,        c.interleaved, c.window,       1e-6f,      scale};
    uint32_t g = 1;
    while (g < c.group)
        g *= 2;
#define LAUNCH(D, G)                                                                                                   \
    if (c.d == D && g == G)                                                                                            \
        launch<D, G>(p, c.rows);
    LAUNCH(64, 1) LAUNCH(64, 2) LAUNCH(64, 4) LAUNCH(64, 8) LAUNCH(128, 1) LAUNCH(128, 2) LAUNCH(128, 4) LAUNCH(128, 8)

    for (uint32_t i = 0; i < c.rows * 2 * c.kv_heads; i++) {
        const uint32_t row = i / (2 * c.kv_heads), h = i % c.kv_heads;
        const bool value = i / c.kv_heads % 2;
        const std::vector<double> x = c.head(row, heads + (value ? c.kv_heads : 0) + h, value ? nullptr : k_norm, !value);
        for (uint32_t e = 0; e < c.d; e++)
            want_pool[c.place(c.slots[row].block, value, h) + c.slots[row].offset * c.d + e] = from_float<Element>(float(x[e]));
    }
    for (size_t i = 0; i < c.pool.size(); i++) {
        const float got = to_float(c.pool[i]), want = to_float(want_pool[i]);
        if (!(fabsf(got - want) <= 0.01f * fabsf(want) + 1e-5f || (got != got && want != want)))
            return fail(turn, "an element of the pool", got, want);
    }
    double apart = 0, length = 0;
    for (uint32_t i = 0; i < c.rows * heads; i++) {
        const uint32_t row = i / heads, h = i % heads / c.group, own = c.slots[row].position;
        const std::vector<double> q = c.head(row, i % heads, q_norm, true);
        double sum = 0;
        std::vector<double> sums(c.d);
        for (uint32_t n = 0; n < c.seqs[row].pages; n++) {
            const Page &page = c.pages[c.seqs[row].page + n];
            for (uint32_t t = 0; t < page.tokens && page.position + t <= own; t++) {
                if (c.window != 0 && own - page.position - t >= c.window)
                    continue;
                double score = 0;
                for (uint32_t e = 0; e < c.d; e++)
                    score += q[e] * to_float(want_pool[c.place(page.block, false, h) + t * c.d + e]);
                const double weight = exp(score * scale);
                sum += weight;
                for (uint32_t e = 0; e < c.d; e++)
                    sums[e] += weight * to_float(want_pool[c.place(page.block, true, h) + t * c.d + e]);
            }
        }
        if (!(fabs(lse[i] - log(sum)) < 1e-3 * (1 + fabs(log(sum)))))
            return fail(turn, "lse", lse[i], log(sum));
        for (uint32_t e = 0; e < c.d; e++) {
            const double want = sums[e] / sum, got = to_float(o[i * c.d + e]);
            apart += (got - want) * (got - want), length += want * want;
        }
    }
    const double error = sqrt(apart / length);
    worst = max(worst, error);
    return error < 1e-2 || fail(turn, "the distance of o", error, 0);
}

int main(int, char **arguments) {
    const int cases = atoi(arguments[1]);
    double worst = 0;
    for (int turn = 0; turn < cases; turn++)
        if (!check(turn, worst))
            return 1;
    printf("%d cases, o within %.1e\n", cases, worst);
}
