// Merges a peer's partials into ours, in place.
//
// Launch: any grid of blocks of 256 threads; a warp takes one (row, head) at a
// time. An empty part leaves the other bit for bit.
//
// With a decode step's few rows this is all waiting: so a warp asks for both parts
// as soon as it knows where they lie, before it looks at whether it needs them.
#include "rows.cuh"
#include "state.cuh"

namespace distkv {
namespace {

constexpr uint32_t MERGE_WARPS = 8;
// Elements of a lane at a time.
constexpr uint32_t MERGE_WIDE = 4;

template <class T>
__device__ __forceinline__ void merge(const Merge &p) {
    begin_kernel();
    const uint32_t lane = threadIdx.x % 32, warps = gridDim.x * MERGE_WARPS;
    for (uint32_t i = blockIdx.x * MERGE_WARPS + threadIdx.x / 32; i < p.count * p.heads; i += warps) {
        const uint64_t at = uint64_t(p.rows[i / p.heads]) * p.heads + i % p.heads;
        T *const o = static_cast<T *>(p.o) + at * p.head_dim;
        const float theirs = p.remote_lse[i], ours = p.lse[at];
        const float *const remote = p.remote_o + uint64_t(i) * p.head_dim;
        float add[MERGE_WIDE], own[MERGE_WIDE];
        const auto ask = [&](uint32_t element) {
            if (element < p.head_dim) {
                load(remote + element, add);
                load(o + element, own);
            }
        };
        ask(lane * MERGE_WIDE);
        // Every lane has read the lse before it changes.
        __syncwarp();
        if (theirs == -INFINITY) {
            continue;
        }
        float weight = 1, own_weight = 0, lse = theirs;
        if (ours != -INFINITY) {
            const float most = fmaxf(ours, theirs);
            weight = exp2f((theirs - most) * LOG2_E), own_weight = exp2f((ours - most) * LOG2_E);
            const float sum = weight + own_weight;
            weight /= sum, own_weight /= sum;
            lse = most + log2f(sum) * LN_2;
        }
        for (uint32_t element = lane * MERGE_WIDE; element < p.head_dim; ask(element)) {
#pragma unroll
            for (uint32_t e = 0; e < MERGE_WIDE; e++) {
                // Where there was no key, what lies in o may be anything.
                add[e] = add[e] * weight + (own_weight == 0 ? 0 : own[e] * own_weight);
            }
            store(o + element, add);
            element += 32 * MERGE_WIDE;
        }
        if (lane == 0) {
            p.lse[at] = lse;
        }
    }
}

} // namespace
} // namespace distkv

// As many blocks at once as there may be threads: so 256 rows of 32 heads are one wave.
DISTKV_KERNELS(merge, Merge, 32 * distkv::MERGE_WARPS, 8)
