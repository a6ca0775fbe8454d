// Random cases.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <random>

#include "language.h"

using Element = __nv_bfloat16;

static std::mt19937 choices;
static uint32_t pick(uint32_t from, uint32_t below) { return from + choices() % (below - from); }
static bool one_in(uint32_t n) { return pick(0, n) == 0; }
static float noise() { return float(pick(0, 20001)) / 10000.0f - 1.0f; }

static bool fail(const char *what, double got, double want) {
    printf("%s is %g, not %g\n", what, got, want);
    return false;
}

// CASES [SEED] on the command line: so many cases from that seed on.
static int run_cases(int count, char **words, bool (*check)(uint32_t seed, double &worst)) {
    const uint32_t cases = atoi(words[1]), first = count > 2 ? atoi(words[2]) : 1;
    double worst = 0;
    for (uint32_t seed = first; seed < first + cases; seed++) {
        choices.seed(seed);
        if (!check(seed, worst)) {
            printf("seed %u\n", seed);
            return 1;
        }
    }
    printf("%u cases, o within %.1e\n", cases, worst);
    return 0;
}
