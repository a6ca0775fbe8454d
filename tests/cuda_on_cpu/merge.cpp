// Merging of partials (cuda/merge.cu) on a GPU of fibers (gpu.h) beside the formula:
// random rows, empty parts, lse far apart, what nobody may read poisoned.
//
//     merge CASES [SEED]
#include "gpu.h"

#include "api.h"
#include "merge.cu"

#include "cases.h"

using namespace distkv;

static Merge arguments; // outlives the fibers

template <class T> static bool check(uint32_t seed, double &worst) {
    const uint32_t heads = pick(1, 10), d = 4 * (one_in(2) ? pick(1, 65) : 16u << pick(0, 3)), count = one_in(9) ? 0 : pick(1, 8);
    const uint32_t rows = count + pick(1, 4);
    printf("seed %u: %u of %u rows, %u heads of %u\n", seed, count, rows, heads, d);
    fflush(stdout);
    std::vector<uint32_t> index(rows);
    for (uint32_t i = 0; i < rows; i++)
        index[i] = i;
    std::shuffle(index.begin(), index.end(), choices);
    index.resize(count);
    const auto lse_of_part = [](float &lse) {
        const float loud[] = {1, 20, 1000};
        lse = one_in(4) ? -INFINITY : noise() * loud[pick(0, 3)];
        return lse == -INFINITY;
    };
    std::vector<T> own(rows * heads * d), o(own.size());
    std::vector<float> remote(count * heads * d), remote_lse(count * heads), own_lse(rows * heads), lse(own_lse.size(), NAN);
    memset(o.data(), 0xff, o.size() * sizeof(T));
    for (uint32_t i = 0; i < rows * heads; i++) {
        const bool none = lse_of_part(own_lse[i]);
        for (uint32_t e = 0; e < d; e++)
            own[i * d + e] = from_float<T>(none ? NAN : noise());
    }
    for (uint32_t i = 0; i < count * heads; i++) {
        const bool none = lse_of_part(remote_lse[i]);
        for (uint32_t e = 0; e < d; e++)
            remote[i * d + e] = none ? NAN : noise();
    }
    arguments = {remote.data(), remote_lse.data(), index.data(), o.data(), lse.data(), count, heads, d, 0};
    gpu::previous = [&] { o = own, lse = own_lse; };
    gpu::launch(seed, pick(1, 5), 32 * MERGE_WARPS, [] { merge<T>(arguments); });

    std::vector<T> left = own;
    std::vector<float> left_lse = own_lse;
    for (uint32_t i = 0; i < count * heads; i++) {
        const uint32_t at = index[i / heads] * heads + i % heads;
        const double a = own_lse[at], b = remote_lse[i];
        if (b == -INFINITY)
            continue;
        const double most = max(a, b), sum = exp(a - most) + exp(b - most), want_lse = most + log(sum);
        if (!(fabs(lse[at] - want_lse) < 1e-5 * (1 + fabs(want_lse))))
            return fail("lse", lse[at], want_lse);
        left_lse[at] = lse[at];
        for (uint32_t e = 0; e < d; e++) {
            const double ours = a == -INFINITY ? 0 : to_float(own[at * d + e]) * exp(a - most);
            const double want = (ours + remote[i * d + e] * exp(b - most)) / sum, got = to_float(o[at * d + e]);
            worst = max(worst, fabs(got - want) / (0.01 + fabs(want)));
            if (!(fabs(got - want) < 5e-3 * (0.01 + fabs(want))))
                return fail("an element", got, want);
            left[at * d + e] = o[at * d + e];
        }
    }
    if (memcmp(left.data(), o.data(), o.size() * sizeof(T)) != 0 || memcmp(left_lse.data(), lse.data(), lse.size() * 4) != 0) {
        printf("what had nothing to be merged with changed\n");
        return false;
    }
    return true;
}

int main(int count, char **words) {
    return run_cases(count, words, [](uint32_t seed, double &worst) {
        return one_in(2) ? check<__nv_bfloat16>(seed, worst) : check<__half>(seed, worst);
    });
}
