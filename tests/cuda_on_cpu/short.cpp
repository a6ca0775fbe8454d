// Attention to short contexts (cuda/decode_short.cu) with the GPU's threads run as
// threads of the CPU, beside plain attention: so that addresses, alignments and sums
// are checked where there is no GPU. What a GPU's memory model allows is not.
//
// `kernel.inc` is the kernel without its headers, `structs.inc` the structs of
// cuda/api.h; tests/cuda_on_cpu.rs makes both.
//
//     short CASES [SEED]
#include <pthread.h>

#include <cstdlib>
#include <thread>

#include "language.h"

// ---- What the language has ----

struct Index {
    uint32_t x, y;
};

constexpr uint32_t THREADS = 256, MOST_BLOCKS = 8;
struct Warp {
    pthread_barrier_t all;
    float lanes[32];
};
struct Block {
    pthread_barrier_t all;
    Warp warps[THREADS / 32];
    char *shared;
    void *dynamic;
};
static Block blocks[MOST_BLOCKS]; // of a cluster
static uint32_t cluster;
static pthread_mutex_t arriving = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t arrived = PTHREAD_COND_INITIALIZER;
static uint64_t arrivals; // of the cluster's threads
static thread_local uint64_t arrivals_here;
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
static void cluster_arrive() {
    arrivals_here++;
    pthread_mutex_lock(&arriving);
    if (++arrivals % (THREADS * cluster) == 0)
        pthread_cond_broadcast(&arrived);
    pthread_mutex_unlock(&arriving);
}
static void cluster_wait() {
    pthread_mutex_lock(&arriving);
    while (arrivals < arrivals_here * THREADS * cluster)
        pthread_cond_wait(&arrived, &arriving);
    pthread_mutex_unlock(&arriving);
}
static void cluster_sync() {
    cluster_arrive();
    cluster_wait();
}
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
static void *dynamic_memory() { return blocks[rank_here].dynamic; }

} // namespace distkv

#include "kernel.inc"

// ---- The test ----

namespace distkv {

// The kernel knows no such pool.
struct E4m3 {
    uint8_t bits;
};
static E4m3 to_e4m3(float) { abort(); }
static float to_float(E4m3) { abort(); }

} // namespace distkv

#include "attention.h"

using namespace distkv;
template <uint32_t D, uint32_t G> void launch(const DecodeShort &p, uint32_t rows) {
    for (uint32_t i = 0; i < rows * p.kv_heads; i++) {
        std::vector<std::thread> threads;
        arrivals = 0;
        for (uint32_t b = 0; b < cluster; b++) {
            pthread_barrier_init(&blocks[b].all, nullptr, THREADS);
            for (Warp &warp : blocks[b].warps)
                pthread_barrier_init(&warp.all, nullptr, 32);
            blocks[b].shared = static_cast<char *>(aligned_alloc(64, (sizeof(Shared<D, G>) + 63) / 64 * 64));
            memset(blocks[b].shared, 0xff, sizeof(Shared<D, G>));
            const size_t dynamic = ((p.tokens + 1) * G + p.tokens) * 4;
            blocks[b].dynamic = memset(malloc(dynamic), 0xff, dynamic);
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
        for (uint32_t b = 0; b < cluster; b++) {
            free(blocks[b].shared);
            free(blocks[b].dynamic);
        }
    }
}

struct Case : Sequences {
    uint32_t room; // positions a block

    Case() {
        const uint32_t sizes[] = {16, 32, 48, 64, 256};
        d = one_in(2) ? 64 : 128, kv_heads = pick(1, 3), group = pick(1, 9), tokens = sizes[pick(0, 5)];
        cluster = 1u << pick(0, 4), window = one_in(3) ? pick(1, 200) : 0;
        interleaved = one_in(2), normed = one_in(3), pairs = one_in(4) ? d / 4 : d / 2;
        room = one_in(2) ? 64 : pick(8, 257);
        for (uint32_t left = pick(1, 3); left > 0; left--) {
            // None before it, as many as there is room for, or some.
            const uint32_t most = cluster * room;
            add(one_in(8) ? 0 : one_in(8) ? most - 1 : pick(0, one_in(2) ? most : most / 3));
        }
        fill();
    }
};

static bool check(uint32_t, double &worst) {
    Case c;
    std::vector<uint8_t> pool = c.pool;
    std::vector<Element> o(c.rows() * c.heads() * c.d, Element{0xffff});
    std::vector<float> lse(c.rows() * c.heads(), NAN);
    const float scale = 1 / sqrtf(c.d);
    const Step step{c.rows(), c.rows(), c.rows(), 0};
    const DecodeShort p{c.qkv.data(),   pool.data(),   c.table.data(), c.norm_of_q(), c.norm_of_k(), c.slots.data(), c.seqs.data(),
                        c.pages.data(), &step,         o.data(),       lse.data(),    c.heads(),     c.kv_heads,     c.tokens,
                        c.pairs,        c.interleaved, c.window,       1e-6f,         scale,         c.room,        0};
    uint32_t g = 1;
    while (g < c.group)
        g *= 2;
#define LAUNCH(D, G)                                                                                                   \
    if (c.d == D && g == G)                                                                                            \
        launch<D, G>(p, c.rows());
    LAUNCH(64, 1) LAUNCH(64, 2) LAUNCH(64, 4) LAUNCH(64, 8) LAUNCH(128, 1) LAUNCH(128, 2) LAUNCH(128, 4) LAUNCH(128, 8)
    return c.is_filled(pool) && c.attends(o, lse, scale, worst);
}

int main(int count, char **words) { return run_cases(count, words, check); }
