// Prefill attention on a GPU of fibers (gpu.h) beside plain attention: Hopper's
// (cuda/attention_prefill_sm90.cu) with HOPPER, else the one for any
// (cuda/attention_prefill.cu).
//
//     prefill CASES [SEED]
#include "matrix.h"

#ifdef HOPPER
#include "attention_prefill_sm90.cu"
#else
#include "attention_prefill.cu"
#endif
#include "prefill_plan.cu"

#include "attention.h"

using namespace distkv;

struct Case : Sequences {
    uint32_t grid;

    Case() {
        const uint32_t sizes[] = {16, 32, 48, 64, 256}, widths[] = {64, 80, 96, 128, 256};
        d = widths[pick(0, 5)], tokens = sizes[pick(0, 5)], kv_heads = pick(1, 3), group = pick(1, 6);
        window = one_in(3) ? pick(1, 200) : 0, grid = pick(1, 4);
#ifndef HOPPER
        fp8 = one_in(3);
#endif
        own = false, normed = false, interleaved = false, pairs = d / 2;
        for (uint32_t left = pick(1, 4); left > 0; left--)
            add(one_in(2) ? 0 : pick(0, 300), pick(one_in(3) ? 1 : DECODE_TILE / group + 1, (one_in(3) ? 300 : 100) / group + 3));
        fill();
    }
};

static PrefillPlan planned;
static Prefill arguments;

#ifdef HOPPER
static CUtensorMap map_of(const Case &c, const std::vector<uint8_t> &pool, uint32_t keys) {
    const uint32_t piece = min(c.tokens & -c.tokens, keys & -keys), d = c.d, rows = pool.size() / (d * 2);
    const bool whole = d % 64 == 0;
    const uint32_t columns = whole ? d / 64 : 1;
    return matrix(pool.data(), {whole ? 64 : d, 8, columns, rows / 8}, {d, 64, 8 * d}, {64, 8, columns, piece / 8});
}
static CUtensorMap map;
#endif

template <class K, uint32_t D> void run(const Case &c, const std::vector<uint8_t> &pool, uint64_t seed, bool plans) {
#ifdef HOPPER
    using S = Shape<D>;
    constexpr uint32_t ROWS = S::ROWS, KEYS = S::KEYS, THREADS = S::THREADS;
#else
    constexpr uint32_t KEYS = Shape<K, D>::KEYS;
#endif
    if (plans) {
        planned.tile_rows = ROWS, planned.tile_keys = KEYS;
        gpu::launch(seed, 1, 1024, [] { prefill_plan(planned); });
        return;
    }
#ifdef HOPPER
    map = map_of(c, pool, KEYS);
    gpu::barriers_at = gpu::SHARED_BASE + control_at<D>();
    gpu::launch(seed, c.grid, THREADS, [] { prefill<Element, D>(arguments, &map); });
#else
    gpu::launch(seed, c.grid, THREADS, [] { prefill<Element, K, D>(arguments); });
#endif
}

static bool check(uint32_t seed, double &worst) {
    const Case c;
    printf("seed %u: %u heads, %u of kv, of %u, %s, blocks of %u, window %u, %u blocks:", seed, c.heads(), c.kv_heads, c.d,
           c.fp8 ? "fp8" : "bf16", c.tokens, c.window, c.grid);
    for (const Seq &seq : c.seqs)
        printf(" %u at %u", seq.rows, seq.position);
    printf("\n");
    fflush(stdout);
    std::vector<uint8_t> pool = c.pool;
    std::vector<Element> o(c.rows() * c.heads() * c.d, Element{0xffff});
    std::vector<float> lse(c.rows() * c.heads(), NAN);
    const uint32_t capacity = c.rows() * c.group / 64 + c.seqs.size();
    std::vector<uint32_t> work(8 + 8 * capacity, ~0u);
    const Step step{c.rows(), uint32_t(c.seqs.size()), c.rows(), 0};
    const float scale = 1 / sqrtf(c.d);
    planned = {&step, c.seqs.data(), c.pages.data(), work.data(), capacity, c.group, c.kv_heads, c.d, c.tokens, c.window};
    arguments = {c.qkv.data(), pool.data(), o.data(), lse.data(), c.seqs.data(), c.pages.data(), work.data(),
                 (c.heads() + 2 * c.kv_heads) * c.d, c.heads(), c.kv_heads, c.tokens, c.window, scale, NOT_GATHERED, 0};
    // Twice by one plan, as layers are.
    for (uint32_t turn = 0; turn < 3; turn++) {
#define RUN(D)                                                                                                         \
    if (c.d == D)                                                                                                      \
        c.fp8 ? run<E4m3, D>(c, pool, seed * 3 + turn, turn == 0) : run<Element, D>(c, pool, seed * 3 + turn, turn == 0);
        RUN(64) RUN(80) RUN(96) RUN(128) RUN(256)
        if (turn > 0 && !c.attends(o, lse, scale, worst, DECODE_TILE + 1))
            return false;
        std::fill(o.begin(), o.end(), Element{0xffff}), std::fill(lse.begin(), lse.end(), NAN);
    }
    return c.is_filled(pool);
}

int main(int count, char **words) {
    gpu::lateness = 6;
    return run_cases(count, words, check);
}
