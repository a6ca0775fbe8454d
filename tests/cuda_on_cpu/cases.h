// Random cases.
#pragma once
#include <random>

#include "language.h"

using Element = __nv_bfloat16;

static std::mt19937 choices;
static uint32_t pick(uint32_t from, uint32_t below) { return from + choices() % (below - from); }
static bool one_in(uint32_t n) { return pick(0, n) == 0; }
static float noise() { return float(pick(0, 20001)) / 10000.0f - 1.0f; }
