// Linear layers of few rows (cuda/linear.cu) on a GPU of fibers (gpu.h): random chains
// of products beside plain ones, each run by several seeds, with fences and without,
// which must come to the same bits.
//
//     linear CASES [SEED]
#include "linear.cu"

#include "cases.h"

using namespace distkv;

static float rounded(float x) { return to_float(from_float<Element>(x)); }

static std::vector<Element> elements(size_t count, float scale) {
    std::vector<Element> all(count);
    for (Element &x : all)
        x = from_float<Element>(noise() * scale);
    return all;
}

struct Layer {
    uint32_t end, ins, outs, tile_units, depth, splits;
    std::vector<Element> weights;
    std::vector<float> bias;

    Layer(uint32_t end, uint32_t ins, uint32_t outs) : end(end), ins(ins), outs(outs) {
        cut();
        weights = elements(size_t(ins) * outs, 1.7f / sqrtf(float(ins)));
        bias.resize(one_in(2) ? outs : 0);
        for (float &x : bias)
            x = noise();
    }
    void cut() {
        do
            tile_units = pick(1, 5), depth = 1u << pick(0, 4), splits = pick(1, 3);
        while (tile_units * depth > 8 || splits > (ins / 64 + depth - 1) / depth);
    }
    uint32_t outputs() const { return end == SWIGLU ? outs / 2 : outs; }
    uint32_t turns(uint32_t blocks) const {
        const uint32_t tiles = ((outs + 31) / 32 + tile_units - 1) / tile_units, at_once = blocks / splits;
        return (tiles + at_once - 1) / at_once;
    }
};

// Attention's output through up to four products.
struct Case {
    uint32_t rows_of_kernel, rows, blocks, hidden, ffn, width;
    std::vector<Layer> layers;
    std::vector<float> norms[2]; // of what the first and the third add up to
    bool scaled;                 // whether the first product is given squares
    uint32_t stages, stage, half;
    uint32_t pace; // from one stage to the next 0, or some ticks of the clock

    Case() {
        rows_of_kernel = 8u << pick(0, one_in(4) ? 3 : 1), rows = pick(1, rows_of_kernel + 1), blocks = 2 * pick(1, 5);
        hidden = 64 * pick(1, 7), ffn = 64 * pick(1, one_in(3) ? 17 : 9), width = 64 * pick(1, 5);
        scaled = one_in(3);
        layers.emplace_back(uint32_t(ADD), width, hidden);
        layers.emplace_back(uint32_t(SWIGLU), hidden, 2 * ffn);
        layers.emplace_back(uint32_t(ADD), ffn, hidden);
        layers.emplace_back(uint32_t(one_in(2) ? PLAIN : LOGITS), hidden, 4 * pick(8, 80));
        // Who adds to a feature twice has the same tiles.
        Layer &o = layers[0], &down = layers[2];
        do
            down.cut(), o.cut();
        while (o.tile_units != down.tile_units || o.splits != down.splits);
        layers.erase(layers.begin() + pick(one_in(4) ? 1 : 4, 5), layers.end());
        for (std::vector<float> &norm : norms) {
            norm.resize(hidden);
            for (float &x : norm)
                x = noise();
        }
        const uint32_t m = rows_of_kernel;
        uint32_t sums = 4096;
        stage = half = 0;
        for (const Layer &layer : layers) {
            stage = max(stage, layer.depth * (layer.tile_units * BRICK + m * 128));
            sums = max(sums, min(layer.depth, 2u) * m * (layer.tile_units * 32 + 4) * 4);
            half += &layer == &layers[0] ? 0 : m * (layer.ins * 2 + layer.ins / 8);
        }
        stages = min(MAX_STAGES, min((gpu::SHARED_BYTES - HEAD - sums) / stage, pick(2, 8)));
        pace = stages % 2 == 0 ? 0 : 100000 * stages;
    }
};

// What a launch reads and writes.
struct Data {
    std::vector<Element> x, normed, activated, out;
    std::vector<float> squares_in, squares, stream, logits;

    explicit Data(const Case &c) {
        const uint32_t m = c.rows_of_kernel;
        x = elements(m * c.width, 1.0f);
        normed.assign(m * c.hidden, {0xffff}), activated.assign(m * c.ffn, {0xffff});
        out.assign(m * 320, {0xffff}), logits.assign(m * 320, NAN);
        squares_in.resize(m * c.width / 32), squares.assign(m * c.hidden / 32, NAN), stream.resize(m * c.hidden);
        for (float &s : squares_in)
            s = 1.0f + noise() * 0.5f;
        for (float &s : stream)
            s = noise();
        if (one_in(4))
            x[pick(0, c.rows * c.width)] = {0x7fff}; // which nobody may take for what is not there yet
        for (uint32_t i = c.rows * c.width; i < m * c.width; i++)
            x[i] = {0xffff};
    }
    std::vector<uint8_t> bytes(const Case &c) const {
        std::vector<uint8_t> all;
        const auto add = [&](const void *from, size_t count) {
            all.insert(all.end(), static_cast<const uint8_t *>(from), static_cast<const uint8_t *>(from) + count);
        };
        add(stream.data(), stream.size() * 4), add(out.data(), out.size() * 2), add(logits.data(), logits.size() * 4);
        add(activated.data(), activated.size() * 2), add(normed.data(), normed.size() * 2);
        return all;
    }
};

static LinearArgs arguments;

static CUtensorMap rows_at_address(const void *base, uint32_t rows, uint32_t ins, uint32_t depth) {
    return matrix(base, {64, rows, ins / 64}, {ins, 64}, {64, rows, depth});
}

static void launch(const Case &c, Data &data, std::vector<uint32_t> &relay, bool fenced, uint64_t seed) {
    const uint32_t m = c.rows_of_kernel;
    LinearArgs &a = arguments;
    memset(static_cast<void *>(&a), 0, sizeof a);
    uint8_t *at[2] = {reinterpret_cast<uint8_t *>(relay.data()) + RELAY_HEAD,
                      reinterpret_cast<uint8_t *>(relay.data()) + RELAY_HEAD + c.half};
    static uint32_t rows;
    rows = c.rows;
    for (uint32_t n = 0; n < c.layers.size(); n++) {
        const Layer &l = c.layers[n];
        const bool feeds = l.end == ADD;
        const void *x = n == 0 ? data.x.data() : n == 2 ? data.activated.data() : data.normed.data();
        if (n == 0)
            a.x = rows_at_address(x, m, l.ins, l.depth);
        for (uint32_t i = 0; n > 0 && i < 2; i++) {
            a.handed[i][n - 1] = rows_at_address(fenced ? x : at[i], m, l.ins, l.depth);
            at[i] += m * (l.ins * 2 + l.ins / 8);
        }
        a.weights[n] = l.end == SWIGLU ? matrix(l.weights.data(), {64, 16, 2, l.outs / 32, l.ins / 64},
                                                {l.ins, l.ins * l.outs / 2, 16 * l.ins, 64}, {64, 16, 2, l.tile_units, l.depth})
                                       : matrix(l.weights.data(), {64, l.outs, l.ins / 64}, {l.ins, 64},
                                                {64, 32 * l.tile_units, l.depth});
        Linear &p = a.product[n];
        p.x_squares = n == 0 ? (c.scaled ? data.squares_in.data() : nullptr) : n == 2 ? nullptr : data.squares.data();
        p.bias = l.bias.empty() ? nullptr : l.bias.data();
        p.out = l.end == ADD ? static_cast<void *>(data.stream.data()) : l.end == SWIGLU ? static_cast<void *>(data.activated.data())
                : l.end == LOGITS ? static_cast<void *>(data.logits.data()) : static_cast<void *>(data.out.data());
        p.next = feeds ? data.normed.data() : nullptr, p.next_norm = feeds ? c.norms[n / 2].data() : nullptr;
        p.squares = feeds ? data.squares.data() : nullptr;
        p.rows = &rows, p.in_features = l.ins, p.out_features = l.outs, p.end = l.end;
        p.tile_units = l.tile_units, p.depth = l.depth, p.splits = l.splits, p.eps = 1e-5f;
        p.pace = c.pace;
    }
    a.chain = {relay.data(), uint32_t(c.layers.size()), c.stages, c.stage, c.half, fenced, 0};
    gpu::launch(seed, c.blocks, LINEAR_THREADS, [&c] {
        c.rows_of_kernel == 8    ? linear<Element, 8>(arguments)
        : c.rows_of_kernel == 16 ? linear<Element, 16>(arguments)
                                 : linear<Element, 32>(arguments);
    });
}

static float distance(const std::vector<float> &got, const std::vector<float> &want) {
    double apart = 0, length = 0;
    for (size_t i = 0; i < want.size(); i++) {
        if (std::isnan(got[i]) != std::isnan(want[i]))
            return INFINITY;
        if (!std::isnan(want[i]))
            apart += (got[i] - want[i]) * (got[i] - want[i]), length += want[i] * want[i];
    }
    return length == 0 ? 0 : sqrt(apart / length);
}

// How far the last product's outputs and the residual stream are from what they should be.
static float apart(const Case &c, const Data &before, const Data &after) {
    float worst = 0;
    for (uint32_t row = 0; row < c.rows; row++) {
        std::vector<float> x, stream(before.stream.begin() + row * c.hidden, before.stream.begin() + (row + 1) * c.hidden), y;
        float scale = 1;
        for (uint32_t i = 0; i < c.width; i++)
            x.push_back(to_float(before.x[row * c.width + i]));
        if (c.scaled) {
            float sum = 0;
            for (uint32_t i = 0; i < c.width / 32; i++)
                sum += before.squares_in[row * c.width / 32 + i];
            scale = 1 / sqrtf(sum / c.width + 1e-5f);
        }
        for (uint32_t n = 0; n < c.layers.size(); n++) {
            const Layer &l = c.layers[n];
            y.assign(l.outs, 0);
            for (uint32_t o = 0; o < l.outs; o++) {
                for (uint32_t i = 0; i < l.ins; i++)
                    y[o] += x[i] * to_float(l.weights[size_t(o) * l.ins + i]);
                y[o] = y[o] * scale + (l.bias.empty() ? 0 : l.bias[o]);
            }
            x.clear(), scale = 1;
            float squares = 0;
            for (uint32_t i = 0; i < l.outputs(); i++)
                if (l.end == SWIGLU) {
                    x.push_back(rounded(y[i] / (1 + expf(-y[i])) * y[i + l.outs / 2]));
                } else if (l.end == ADD) {
                    stream[i] += y[i], squares += stream[i] * stream[i];
                    x.push_back(rounded(stream[i] * c.norms[n / 2][i]));
                }
            if (l.end == ADD)
                scale = 1 / sqrtf(squares / c.hidden + 1e-5f);
        }
        const Layer &last = c.layers.back();
        std::vector<float> got;
        if (last.end == PLAIN || last.end == LOGITS) {
            for (uint32_t o = 0; o < last.outs; o++)
                got.push_back(last.end == PLAIN ? to_float(after.out[row * last.outs + o]) : after.logits[row * last.outs + o]);
            worst = max(worst, distance(got, y));
        } else if (last.end == SWIGLU) {
            for (uint32_t i = 0; i < c.ffn; i++)
                got.push_back(to_float(after.activated[row * c.ffn + i]));
            worst = max(worst, distance(got, x));
        }
        got.assign(after.stream.begin() + row * c.hidden, after.stream.begin() + (row + 1) * c.hidden);
        worst = max(worst, distance(got, stream));
    }
    return worst;
}

int main(int count, char **words) {
    const int cases = atoi(words[1]);
    const uint32_t first = count > 2 ? atoi(words[2]) : 1;
    float worst = 0;
    for (uint32_t seed = first; seed < first + cases; seed++) {
        choices.seed(seed);
        const Case c;
        std::vector<uint32_t> relay((RELAY_HEAD + 2 * c.half) / 4, 0xffffffff);
        std::fill_n(relay.begin(), RELAY_HEAD / 4, 0);
        printf("seed %u: %u rows, %u blocks, %u stages", seed, c.rows, c.blocks, c.stages);
        for (const Layer &l : c.layers)
            printf(", %u x %u (%u, %u, %u; %u turns)", l.outs, l.ins, l.tile_units, l.depth, l.splits, l.turns(c.blocks));
        printf(": ");
        fflush(stdout);
        // Launches that follow each other through one relay, each data twice.
        for (uint32_t turn = 0; turn < 3; turn++) {
            const Data before(c);
            const bool fenced = one_in(2);
            std::vector<uint8_t> bits;
            for (uint32_t again = 0; again < 2; again++) {
                Data data = before;
                launch(c, data, relay, fenced ^ again, seed * 1000 + turn * 2 + again);
                const float off = apart(c, before, data);
                worst = max(worst, off);
                if (!(off < 1e-2f)) {
                    printf("turn %u, %s: %g off\n", turn, fenced ^ again ? "fenced" : "looked at", off);
                    return 1;
                }
                if (again && data.bytes(c) != bits) {
                    printf("turn %u: not the same bits\n", turn);
                    return 1;
                }
                bits = data.bytes(c);
            }
        }
        printf("well\n");
    }
    printf("%d chains, within %.1e\n", cases, worst);
}
