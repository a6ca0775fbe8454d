// Plans a step's prefill attention (see prefill_plan.cuh): one block, once a
// step and sliding window.
#include "prefill_plan.cuh"

namespace distkv {
namespace {

constexpr uint32_t THREADS = 1024;
constexpr uint32_t BUCKETS = 1024;
// Keys and values of the heads taken together should stay in L2 while the
// tiles of one sequence pass over them; the caches of the GPUs we know hold 40
// to 60 MB, of which the rest serves queries and results.
constexpr uint64_t SECTION_BYTES = 32u << 20;

// First page of the sequence for which `behind` holds; pages are in order, so
// it holds for all those after it as well. `guess` is where it would be if all
// pages were full and none missing, which is most often so: one look then
// replaces a dozen dependent ones.
template <class F>
__device__ uint32_t first_page(const Page *pages, uint32_t count, uint32_t guess, F behind) {
    uint32_t low = 0;
    uint32_t high = count;
    if (count > 0) {
        guess = min(guess, count - 1);
        const bool here = behind(pages[guess]);
        const bool before = guess > 0 && behind(pages[guess - 1]);
        low = here ? 0 : guess + 1;
        high = before ? guess - 1 : here ? guess : count;
        low = here && !before ? guess : low;
    }
    while (low < high) {
        const uint32_t middle = (low + high) / 2;
        if (behind(pages[middle])) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    return low;
}

// The tiles of keys that packed rows [tile * tile_rows, + tile_rows) see.
__device__ PrefillTile plan_tile(const PrefillPlan &p, uint32_t index, uint32_t tile) {
    const Seq seq = p.seqs[index];
    const Page *pages = p.pages + seq.page;
    const uint32_t first_row = tile * p.tile_rows / p.group;
    const uint32_t last_row = min((tile + 1) * p.tile_rows - 1, seq.rows * p.group - 1) / p.group;
    const uint32_t first = seq.position + first_row;
    const uint32_t last = seq.position + last_row;

    // Pages up to the one that would hold a position, were all full.
    const uint32_t start = seq.pages > 0 ? pages[0].position : 0;
    const auto full_pages = [&](uint32_t position) {
        return position < start ? 0 : (position - start) / p.block_tokens;
    };
    const uint32_t end_page = first_page(pages, seq.pages, full_pages(last) + 1,
                                         [&](const Page &page) { return page.position > last; });
    uint32_t end_slot = 0;
    if (end_page > 0) {
        const Page page = pages[end_page - 1];
        end_slot = (end_page - 1) * p.block_tokens + min(page.tokens, last - page.position + 1);
    }
    uint32_t begin_slot = 0;
    if (p.window > 0 && first >= p.window) {
        const uint32_t oldest = first - p.window + 1;
        const uint32_t page = first_page(pages, end_page, full_pages(oldest), [&](const Page &page) {
            return page.position + page.tokens > oldest;
        });
        begin_slot = page * p.block_tokens;
        if (page < end_page && pages[page].position < oldest) {
            begin_slot += oldest - pages[page].position;
        }
    }
    PrefillTile out = {index, tile, 0, 0};
    if (begin_slot < end_slot) {
        out.begin = begin_slot / p.tile_keys;
        out.end = (end_slot + p.tile_keys - 1) / p.tile_keys;
    }
    return out;
}

// Exclusive prefix sum over the block; `total` gets the sum.
__device__ uint32_t block_prefix(uint32_t value, uint32_t &total) {
    __shared__ uint32_t warps[THREADS / 32];
    const uint32_t lane = threadIdx.x % 32;
    const uint32_t warp = threadIdx.x / 32;
    uint32_t sum = value;
    for (uint32_t step = 1; step < 32; step *= 2) {
        const uint32_t other = __shfl_up_sync(0xffffffff, sum, step);
        if (lane >= step) {
            sum += other;
        }
    }
    if (lane == 31) {
        warps[warp] = sum;
    }
    __syncthreads();
    uint32_t before = 0;
    total = 0;
    for (uint32_t i = 0; i < THREADS / 32; ++i) {
        before += i < warp ? warps[i] : 0;
        total += warps[i];
    }
    __syncthreads();
    return before + sum - value;
}

} // namespace

extern "C" __global__ void __launch_bounds__(THREADS) prefill_plan(const __grid_constant__ PrefillPlan p) {
    __shared__ uint32_t histogram[BUCKETS];
    __shared__ uint32_t longest;
    __shared__ uint32_t furthest;
    PrefillHeader *header = plan_header(p.plan);
    PrefillTile *sorted = plan_tiles(p.plan);
    PrefillTile *scratch = sorted + p.capacity;
    const uint32_t seqs = p.step->seqs;

    histogram[threadIdx.x] = 0;
    if (threadIdx.x == 0) {
        longest = 1;
        furthest = 1;
    }
    __syncthreads();

    // A wave of sequences at a time: each thread's sequence gets its place, then
    // the wave's tiles are dealt to all threads.
    __shared__ uint32_t starts[THREADS];
    uint32_t tiles = 0;
    uint32_t long_one = 1;
    uint32_t far_one = 1;
    for (uint32_t wave = 0; wave < seqs; wave += THREADS) {
        const uint32_t mine = wave + threadIdx.x;
        uint32_t count = 0;
        if (mine < seqs && !is_decode(p.seqs[mine], p.group)) {
            count = (p.seqs[mine].rows * p.group + p.tile_rows - 1) / p.tile_rows;
        }
        uint32_t total;
        starts[threadIdx.x] = block_prefix(count, total);
        __syncthreads();
        if (total > p.capacity - tiles) {
            __trap(); // the workspace was sized for fewer rows or sequences
        }
        for (uint32_t i = threadIdx.x; i < total; i += THREADS) {
            // The last sequence that starts at or before i; those without tiles
            // start where the next one does, so they are never the last.
            uint32_t low = 0;
            uint32_t high = THREADS;
            while (high - low > 1) {
                const uint32_t middle = (low + high) / 2;
                if (starts[middle] <= i) {
                    low = middle;
                } else {
                    high = middle;
                }
            }
            const PrefillTile tile = plan_tile(p, wave + low, i - starts[low]);
            scratch[tiles + i] = tile;
            long_one = max(long_one, tile.end - tile.begin);
            far_one = max(far_one, tile.end);
        }
        tiles += total;
        __syncthreads();
    }
    long_one = __reduce_max_sync(0xffffffff, long_one);
    far_one = __reduce_max_sync(0xffffffff, far_one);
    if (threadIdx.x % 32 == 0) {
        atomicMax(&longest, long_one);
        atomicMax(&furthest, far_one);
    }
    __syncthreads();

    // Counting sort by length, long ones first.
    const auto bucket = [&](const PrefillTile &tile) {
        return (BUCKETS - 1) - uint32_t(uint64_t(tile.end - tile.begin) * (BUCKETS - 1) / longest);
    };
    for (uint32_t i = threadIdx.x; i < tiles; i += THREADS) {
        atomicAdd(&histogram[bucket(scratch[i])], 1);
    }
    __syncthreads();
    uint32_t total;
    const uint32_t start = block_prefix(histogram[threadIdx.x], total);
    histogram[threadIdx.x] = start;
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < tiles; i += THREADS) {
        const PrefillTile tile = scratch[i];
        sorted[atomicAdd(&histogram[bucket(tile)], 1)] = tile;
    }
    if (threadIdx.x == 0) {
        const uint64_t head_bytes = uint64_t(furthest) * p.tile_keys * p.head_dim * 4;
        const uint64_t heads = SECTION_BYTES / head_bytes;
        header->next = 0;
        header->done = 0;
        header->tiles = tiles;
        header->section_heads = uint32_t(heads < 1 ? 1 : heads > p.kv_heads ? p.kv_heads : heads);
    }
}

} // namespace distkv
