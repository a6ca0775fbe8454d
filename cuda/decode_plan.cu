// What the blocks of attention_decode.cu do in a step: the units of all decoded
// sequences and lots of kv heads, laid end to end, cut into as many equal
// ranges as there are blocks. A block's range is a chain of items, one a
// (sequence, lot) that it touches; where a cut falls inside one, its parts are
// joined later.
//
// Launch: one block of 1024 threads.
#include "decode.cuh"

namespace distkv {
namespace {

constexpr uint32_t THREADS = 1024;

// The first of `count` pages for which `is` holds, `count` where none: `is`
// holds for all pages behind one for which it does. By a whole warp.
template <class F> __device__ __forceinline__ uint32_t first_page(uint32_t count, F is) {
    const uint32_t lane = threadIdx.x % 32;
    uint32_t low = 0, high = count; // it is in low ..= high
    while (low < high) {
        const uint32_t step = (high - low + 31) / 32;
        const uint32_t at = low + lane * step + step - 1; // the last page of the lane's stretch
        const uint32_t found = __ballot_sync(~0u, at >= high || is(at));
        // The stretches before the first hit hold none; that hit bounds it.
        const uint32_t hit = found ? __ffs(found) - 1 : 32;
        const uint32_t base = low;
        low = min(base + hit * step, high);
        high = min(base + hit * step + step - 1, high);
    }
    return low;
}

// The cells that some query of the sequence sees, one warp.
__device__ __forceinline__ DecodeSpan visible(const DecodePlan &p, const Seq &seq) {
    const Page *pages = p.pages + seq.page;
    const uint32_t last_own = seq.position + seq.rows - 1;
    const auto behind = [&](uint32_t i) { return pages[i].position > last_own; };
    const auto inside = [&](uint32_t i) {
        return uint64_t(pages[i].position) + pages[i].tokens - 1 + p.window > seq.position;
    };
    // Most often nothing lies behind the queries, and nothing is outside.
    uint32_t end = seq.pages;
    if (end && behind(end - 1))
        end = first_page(end, behind);
    uint32_t begin = 0;
    if (p.window && end && !inside(0))
        begin = first_page(end, inside);
    DecodeSpan span = {0, seq.page + begin, 0, 0};
    if (begin < end) {
        const uint32_t seen = min(pages[end - 1].tokens, last_own - pages[end - 1].position + 1);
        const uint32_t size = p.box_rows / p.together; // tokens of a cell
        span.end = (end - begin - 1) * (p.block_tokens / size) + (seen + size - 1) / size;
        // The window's first key in the first page.
        const uint64_t outside = p.window ? uint64_t(seq.position) + 1 : 0;
        const uint64_t from = uint64_t(pages[begin].position) + p.window;
        if (outside > from)
            span.begin = min(uint32_t((outside - from) / size), span.end);
    }
    return span;
}

// Units of a span. A sequence without keys still has its (0, -inf) to be written.
__device__ __forceinline__ uint32_t cost(const DecodeSpan &span, uint32_t cells) {
    return max((span.end - span.begin + cells - 1) / cells, 1u);
}

struct Cut {
    const DecodePlan &p;
    const DecodeSpan *spans;
    uint32_t seqs;
    uint64_t total;  // units of all sequences and kv heads
    uint64_t blocks; // that have some
    uint32_t lots;   // of kv heads, that blocks take together
    uint32_t cells;  // of a unit
    uint32_t *cuts;  // found so far

    __device__ __forceinline__ uint32_t begin_of(uint64_t block) const { return uint32_t(block * total / blocks); }
    __device__ __forceinline__ uint32_t block_of(uint64_t unit) const { return uint32_t(((unit + 1) * blocks - 1) / total); }

    // The sequence that a unit lies in: the last one that does not begin behind it.
    __device__ __forceinline__ uint32_t seq_of(uint32_t unit) const {
        uint32_t low = 0, high = seqs;
        while (high - low > 1) {
            const uint32_t middle = (low + high) / 2;
            if (uint64_t(spans[middle].before) * lots <= unit)
                low = middle;
            else
                high = middle;
        }
        return low;
    }

    // Writes the item that begins at this unit, of a block's range.
    __device__ __forceinline__ void write(uint32_t at, uint32_t unit, uint32_t block) const {
        const uint32_t s = seq_of(unit);
        const Seq seq = p.seqs[s];
        const DecodeSpan span = spans[s];
        const uint32_t length = cost(span, cells);
        const uint32_t head = (unit - span.before * lots) / length;
        const uint32_t start = span.before * lots + head * length, stop = min(start + length, begin_of(block + 1));
        DecodeItem item = {};
        item.row = seq.row;
        item.columns = seq.rows * (p.heads / p.kv_heads);
        item.position = seq.position;
        item.head = head * p.together;
        item.page = span.page;
        item.begin = span.begin + (unit - start) * cells;
        item.end = min(span.begin + (stop - start) * cells, span.end);
        item.first = block_of(start);
        item.parts = block_of(start + length - 1) - item.first + 1;
        item.next = DECODE_NONE;
        if (stop < begin_of(block + 1))
            item.next = p.grid + (head + 1 < lots ? s * lots + head + 1 : seq_of(stop) * lots);
        const uint4 *from = reinterpret_cast<const uint4 *>(&item);
        uint4 *to = reinterpret_cast<uint4 *>(static_cast<DecodeItem *>(p.items) + at);
        to[0] = from[0], to[1] = from[1], to[2] = from[2];
        if (unit == start && item.parts > 1)
            static_cast<DecodeCut *>(p.cuts)[1 + atomicAdd(cuts, 1)] = {item.row, item.columns, item.head, item.first,
                                                                        item.parts};
    }
};

// The sum of `value` over the threads before this one; `sum` is that of all.
__device__ __forceinline__ uint32_t sum_before(uint32_t value, uint32_t *warps, uint32_t &sum) {
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    uint32_t through = value;
#pragma unroll
    for (uint32_t step = 1; step < 32; step *= 2) {
        const uint32_t other = __shfl_up_sync(~0u, through, step);
        through += lane >= step ? other : 0;
    }
    if (lane == 31)
        warps[warp] = through;
    __syncthreads();
    uint32_t before = 0;
    sum = 0;
    for (uint32_t w = 0; w < THREADS / 32; w++) {
        before += w < warp ? warps[w] : 0;
        sum += warps[w];
    }
    __syncthreads();
    return before + through - value;
}

} // namespace
} // namespace distkv

extern "C" __global__ void __launch_bounds__(1024, 1) decode_plan(const __grid_constant__ distkv::DecodePlan p) {
    using namespace distkv;
    __shared__ uint32_t warps[THREADS / 32];
    __shared__ uint32_t cuts;
    const uint32_t cells = decode_rows(p.head_dim) / p.box_rows;
    if (threadIdx.x == 0)
        cuts = 0;
    DecodeSpan *spans = static_cast<DecodeSpan *>(p.spans);
    DecodeItem *items = static_cast<DecodeItem *>(p.items);
    const uint32_t seqs = p.step->seqs, group = p.heads / p.kv_heads, lots = p.kv_heads / p.together;

    for (uint32_t s = threadIdx.x / 32; s < seqs; s += THREADS / 32) {
        const Seq seq = p.seqs[s];
        DecodeSpan span = {0, 0, 0, 0};
        if (is_decode(seq, group) && seq.rows)
            span = visible(p, seq);
        if (threadIdx.x % 32 == 0)
            spans[s] = span;
    }
    __syncthreads();

    uint32_t before = 0;
    for (uint32_t base = 0; base < seqs; base += THREADS) {
        const uint32_t s = base + threadIdx.x;
        uint32_t length = 0, sum;
        if (s < seqs) {
            const Seq seq = p.seqs[s];
            length = is_decode(seq, group) && seq.rows ? cost(spans[s], cells) : 0;
        }
        const uint32_t at = before + sum_before(length, warps, sum);
        if (s < seqs)
            spans[s].before = at;
        before += sum;
    }
    if (threadIdx.x == 0)
        spans[seqs].before = before;
    __syncthreads();

    Cut cut = {p, spans, seqs, uint64_t(before) * lots, 0, lots, cells, &cuts};
    cut.blocks = min(uint64_t(p.grid), (cut.total + p.least - 1) / p.least);
    for (uint32_t block = threadIdx.x; block < p.grid; block += THREADS) {
        if (block < cut.blocks)
            cut.write(block, cut.begin_of(block), block);
        else
            items[block] = {}; // no columns
    }
    // The others begin where a (sequence, kv head) does, inside a block's range.
    for (uint32_t i = threadIdx.x; i < seqs * lots; i += THREADS) {
        const uint32_t s = i / lots, length = spans[s + 1].before - spans[s].before;
        const uint32_t unit = spans[s].before * lots + i % lots * length;
        if (length) {
            const uint32_t block = cut.block_of(unit);
            if (cut.begin_of(block) != unit)
                cut.write(p.grid + i, unit, block);
        }
    }
    __syncthreads();
    if (threadIdx.x == 0)
        static_cast<DecodeCut *>(p.cuts)[0].row = cuts;
}
