// Decode attention (cuda/decode_plan.cu, attention_decode.cu, decode_join.cu) on a GPU
// of fibers (gpu.h) beside plain attention: random sequences, windows, pools and rings.
//
//     decode CASES [SEED]
#include "matrix.h"

#include "attention_decode.cu"
#include "decode_join.cu"
#include "decode_plan.cu"

#include "attention.h"

using namespace distkv;

struct Case : Sequences {
    uint32_t grid, slots_of_ring, box_rows, together;
    bool narrow;

    Case() {
        const uint32_t sizes[] = {16, 32, 48, 64, 256};
        d = one_in(2) ? 64 : 128, kv_heads = pick(1, 5), tokens = sizes[pick(0, 5)], fp8 = one_in(3);
        narrow = one_in(2), group = pick(1, narrow ? 9 : 17), window = one_in(3) ? pick(1, 200) : 0;
        own = false, normed = false, interleaved = false, pairs = d / 2;
        grid = pick(1, 6), slots_of_ring = pick(2, 6);
        const bool shared = one_in(4); // many parts of one sequence, which are joined otherwise than few
        if (shared) {
            grid = pick(8, 70), kv_heads = 1, group = pick(1, 5), window = 0;
            add(pick(500, 4000), 1);
        }
        for (uint32_t left = shared ? pick(0, 2) : pick(1, 4); left > 0; left--) {
            const uint32_t count = one_in(2) ? 1 : pick(1, (narrow ? 8 : DECODE_TILE) / group + 1);
            add(one_in(8) ? 0 : pick(0, one_in(3) ? 600 : 150), count);
        }
        fill();
        // As src/device/cuda/tiles.rs has it.
        together = 1, box_rows = tokens % 64 == 0 ? 64 : tokens % 32 == 0 ? 32 : 16;
        if (64 % tokens == 0) {
            for (together = 8; kv_heads % together != 0 || together > 64 / tokens;)
                together /= 2;
            box_rows = together * tokens;
        }
    }
};

static CUtensorMap map_of(const Case &c, const std::vector<uint8_t> &pool) {
    const uint32_t d = c.fp8 ? c.d / 2 : c.d, width = d % 64 == 0 ? 64 : d % 32 == 0 ? 32 : d;
    const uint32_t rows = pool.size() / (d * 2);
    CUtensorMap map = matrix(pool.data(), {width, 8, d / width, rows / 8}, {d, width, 8 * d}, {width, 8, d / width, c.box_rows / 8});
    map.swizzle = width == 64 ? 0 : width == 32 ? 1 : 2;
    return map;
}

// What kernels are given; outlives their fibers.
static DecodePlan plan;
static Decode decode_arguments;
static DecodeJoin join_arguments;

template <class K, uint32_t D> uint32_t full_at() {
    using Block = Shared<K, D>;
    return offsetof(Block, full);
}
template <class K, uint32_t D> void run(const Case &c, uint64_t seed) {
    gpu::barriers_at = gpu::SHARED_BASE + c.slots_of_ring * Shape<K, D>::SLOT + full_at<K, D>();
    gpu::launch(seed, c.grid, Shape<K, D>::THREADS, [&c] {
        c.narrow ? decode<Element, K, D, 1>(decode_arguments) : decode<Element, K, D, 2>(decode_arguments);
    });
}

static bool check(uint32_t seed, double &worst) {
    const Case c;
    printf("seed %u: %u heads, %u of kv, of %u, %s, blocks of %u, window %u, %u blocks, %u slots:", seed, c.heads(), c.kv_heads, c.d,
           c.fp8 ? "fp8" : "bf16", c.tokens, c.window, c.grid, c.slots_of_ring);
    for (const Seq &seq : c.seqs)
        printf(" %u at %u", seq.rows, seq.position);
    printf("\n");
    fflush(stdout);
    std::vector<uint8_t> pool = c.pool;
    c.clear_own(pool);
    std::vector<Element> o(c.rows() * c.heads() * c.d, Element{0xffff}), qkv(c.qkv.size(), Element{0xffff});
    std::vector<float> lse(c.rows() * c.heads(), NAN), parts(c.grid * 2 * c.together * DECODE_TILE * (c.d + 2), NAN);
    std::vector<DecodeItem> items(c.grid + c.seqs.size() * c.kv_heads / c.together);
    std::vector<DecodeSpan> spans(c.seqs.size() + 1);
    std::vector<DecodeCut> cuts(c.grid + 1);
    memset(items.data(), 0xff, items.size() * sizeof(DecodeItem));
    const Step step{c.rows(), uint32_t(c.seqs.size()), c.rows(), 0};
    const float scale = 1 / sqrtf(c.d);
    plan = {&step, c.seqs.data(), c.pages.data(), items.data(), spans.data(), cuts.data(), c.heads(), c.kv_heads, c.d, c.tokens,
            c.window, c.box_rows, c.together, c.grid, 1, 0};
    gpu::previous = nullptr;
    gpu::launch(seed * 3, 1, 1024, [] { decode_plan(plan); });

    const CUtensorMap map = map_of(c, pool);
    decode_arguments = {qkv.data(), pool.data(), &map, o.data(), lse.data(), c.pages.data(), items.data(), parts.data(), 0, c.heads(),
                        c.kv_heads, c.tokens, c.window, c.box_rows, c.together, c.slots_of_ring, scale, 0};
    gpu::previous = [&] { qkv = c.qkv, pool = c.pool; };
    if (c.fp8)
        c.d == 64 ? run<E4m3, 64>(c, seed * 3 + 1) : run<E4m3, 128>(c, seed * 3 + 1);
    else
        c.d == 64 ? run<Element, 64>(c, seed * 3 + 1) : run<Element, 128>(c, seed * 3 + 1);

    join_arguments = {cuts.data(), parts.data(), o.data(), lse.data(), c.heads(), c.kv_heads, c.d, c.together};
    const std::vector<float> made = parts;
    gpu::previous = [&] { parts = made; };
    // Blocks after each other: what they share among their threads stands in one place.
    const uint32_t blocks = pick(1, one_in(3) ? 60 : 7);
    for (uint32_t block = 0; block < blocks; block++) {
        std::fill(parts.begin(), parts.end(), NAN);
        gpu::launch(seed * 3 + 2, 1, JOIN_WARPS * 32, [] { join_cuts<Element>(join_arguments); }, block, blocks);
    }
    return c.is_filled(pool) && c.attends(o, lse, scale, worst);
}

int main(int count, char **words) {
    gpu::lateness = 6;
    return run_cases(count, words, check);
}
