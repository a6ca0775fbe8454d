// Sequences whose keys and values lie in a pool, and plain attention to them, for the
// tests of attention's kernels. cuda/api.h, to_float and from_float, E4m3 and kv_offset
// are there before.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "cases.h"

namespace distkv {

struct Sequences {
    uint32_t d, kv_heads, group, tokens, window, pairs, blocks = 0;
    bool interleaved, normed, fp8 = false;
    // The rows' own keys and values are not in the pool, and nothing of a row is turned.
    bool own = true;
    std::vector<Slot> slots;
    std::vector<Seq> seqs;
    std::vector<Page> pages;
    std::vector<Element> qkv;
    std::vector<uint8_t> pool;
    std::vector<float> table, q_norm, k_norm;

    uint32_t rows() const { return slots.size(); }
    uint32_t heads() const { return group * kv_heads; }
    const float *norm_of_q() const { return normed ? q_norm.data() : nullptr; }
    const float *norm_of_k() const { return normed ? k_norm.data() : nullptr; }

    // A sequence of so many rows, the first at `position`.
    void add(uint32_t position, uint32_t count = 1) {
        const uint32_t first = pages.size(), row = rows(), end = position + count;
        const bool sparse = one_in(3);
        for (uint32_t begin = 0; begin < end; begin += tokens, blocks++) {
            const bool earlier = begin + tokens <= position;
            uint32_t filled = min(end - begin, tokens);
            if (earlier && sparse)
                filled = pick(1, filled + 1);
            if (!earlier || !sparse || !one_in(3))
                pages.push_back({blocks, begin, filled});
            for (uint32_t p = max(begin, position); p < min(begin + tokens, end); p++)
                slots.push_back({p, blocks, p - begin});
        }
        seqs.push_back({row, count, position, first, uint32_t(pages.size()) - first});
    }

    // Numbers for all that there is; NaN where no token lies.
    void fill() {
        pool.assign(size_t(blocks) * 2 * kv_heads * tokens * d * (fp8 ? 1 : 2), 0xff);
        for (const Page &page : pages)
            for (uint32_t i = 0; i < 2 * kv_heads; i++)
                for (uint32_t e = 0; e < page.tokens * d; e++)
                    put(pool, place(page.block, i / kv_heads, i % kv_heads) + e, noise());
        if (own)
            clear_own(pool);
        qkv.resize(rows() * (group + 2) * kv_heads * d);
        const float loud = !own && one_in(3) ? 40 : 1; // few weights count, and the maximum moves by much
        for (Element &x : qkv)
            x = from_float<Element>(noise() * loud);
        for (std::vector<float> *some : {&table, &q_norm, &k_norm}) {
            some->resize(some == &table ? rows() * pairs * 2 : d);
            for (float &x : *some)
                x = noise();
        }
    }

    // As if the rows' own keys and values had not come yet.
    void clear_own(std::vector<uint8_t> &pool) const {
        for (const Slot &slot : slots)
            for (uint32_t i = 0; i < 2 * kv_heads; i++)
                for (uint32_t e = 0; e < d; e++)
                    put(pool, place(slot.block, i / kv_heads, i % kv_heads) + slot.offset * d + e, NAN);
    }

    size_t place(uint32_t block, bool value, uint32_t head) const {
        return kv_offset(block, value, head, kv_heads, tokens, d);
    }
    float get(const std::vector<uint8_t> &pool, size_t at) const {
        Element x;
        if (fp8)
            return (pool[at] & 0x7f) == 0x7f ? NAN : to_float(E4m3{pool[at]});
        memcpy(&x, &pool[at * 2], 2);
        return to_float(x);
    }
    void put(std::vector<uint8_t> &pool, size_t at, float x) const {
        const Element rounded = from_float<Element>(x);
        if (fp8)
            pool[at] = x != x ? 0x7f : to_e4m3(x).bits;
        else
            memcpy(&pool[at * 2], &rounded, 2);
    }

    // A head of a row, rounded.
    std::vector<double> head(uint32_t row, uint32_t index) const {
        const bool key = index >= heads() && index < heads() + kv_heads, value = index >= heads() + kv_heads;
        const float *norm = value ? nullptr : key ? norm_of_k() : norm_of_q();
        std::vector<double> x(d);
        double squares = 0;
        for (uint32_t i = 0; i < d; i++) {
            x[i] = to_float(qkv[(row * (group + 2) * kv_heads + index) * d + i]);
            squares += x[i] * x[i];
        }
        if (!own)
            return x;
        for (uint32_t i = 0; norm && i < d; i++)
            x[i] *= norm[i] / sqrt(squares / d + 1e-6);
        for (uint32_t j = 0; !value && j < pairs; j++) {
            const uint32_t a = interleaved ? 2 * j : j, b = interleaved ? 2 * j + 1 : j + pairs;
            const double cos = table[(row * pairs + j) * 2], sin = table[(row * pairs + j) * 2 + 1], u = x[a] * cos - x[b] * sin;
            x[b] = x[a] * sin + x[b] * cos;
            x[a] = u;
        }
        for (double &v : x)
            v = to_float(from_float<Element>(float(v)));
        return x;
    }

    // The pool with the rows' own keys and values.
    std::vector<uint8_t> filled() const {
        std::vector<uint8_t> all = pool;
        for (uint32_t i = 0; own && i < rows() * 2 * kv_heads; i++) {
            const uint32_t row = i / (2 * kv_heads), h = i % kv_heads, value = i / kv_heads % 2;
            const std::vector<double> x = head(row, heads() + value * kv_heads + h);
            for (uint32_t e = 0; e < d; e++)
                put(all, place(slots[row].block, value, h) + slots[row].offset * d + e, float(x[e]));
        }
        return all;
    }

    // Whether `got` is the pool as it should be afterwards; a number may be rounded the
    // other way.
    bool is_filled(const std::vector<uint8_t> &got) const {
        const std::vector<uint8_t> want = filled();
        for (size_t i = 0; i < pool.size() / (fp8 ? 1 : 2); i++) {
            const float a = get(got, i), b = get(want, i);
            if (!(fabsf(a - b) <= 0.01f * fabsf(b) + 1e-5f || (a != a && b != b)))
                return fail("an element of the pool", a, b);
        }
        return true;
    }

    // Whether this is attention; `worst` becomes the distance of o, if that is more. Of
    // sequences with `rows_at_least` rows times heads of a group, if not of all.
    bool attends(const std::vector<Element> &o, const std::vector<float> &lse, float scale, double &worst,
                 uint32_t rows_at_least = 0) const {
        const std::vector<uint8_t> all = filled();
        double apart = 0, length = 0;
        for (const Seq &seq : seqs)
            for (uint32_t i = seq.row * heads(); i < (seq.row + seq.rows) * heads(); i++) {
                const uint32_t row = i / heads(), h = i % heads() / group, position = seq.position + row - seq.row;
                if (seq.rows * group < rows_at_least)
                    continue;
                const std::vector<double> q = head(row, i % heads());
                double sum = 0;
                std::vector<double> sums(d);
                for (uint32_t n = 0; n < seq.pages; n++) {
                    const Page &page = pages[seq.page + n];
                    for (uint32_t t = 0; t < page.tokens && page.position + t <= position; t++) {
                        if (window != 0 && position - page.position - t >= window)
                            continue;
                        double score = 0;
                        for (uint32_t e = 0; e < d; e++)
                            score += q[e] * get(all, place(page.block, false, h) + t * d + e);
                        const double weight = exp(score * scale);
                        sum += weight;
                        for (uint32_t e = 0; e < d; e++)
                            sums[e] += weight * get(all, place(page.block, true, h) + t * d + e);
                    }
                }
                if (!(fabs(lse[i] - log(sum)) < 1e-3 * (1 + fabs(log(sum)))))
                    return fail("lse", lse[i], log(sum));
                for (uint32_t e = 0; e < d; e++) {
                    const double want = sums[e] / sum, got = to_float(o[i * d + e]);
                    apart += (got - want) * (got - want), length += want * want;
                }
            }
        const double error = length == 0 ? 0 : sqrt(apart / length);
        worst = max(worst, error);
        return error < 1e-2 || fail("the distance of o", error, 0);
    }
};

} // namespace distkv
