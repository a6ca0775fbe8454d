// The likeliest token of each row of logits, where nothing else is asked for.
#include "cluster.cuh"
#include "rows.cuh"
#include "token_key.cuh"

namespace distkv {

// `at` counts from the row's start.
template <uint32_t W>
__device__ __forceinline__ void scan(const float *logits, uint32_t begin, uint32_t end, Best &best) {
#pragma unroll 4
    for (uint32_t i = begin + threadIdx.x * W; i < end; i += blockDim.x * W) {
        float x[W];
        load(logits + i, x);
#pragma unroll
        for (uint32_t j = 0; j < W; j++) {
            best.take(x[j], i + j);
        }
    }
}

} // namespace distkv

// A cluster along x a row; rows along y, perhaps several one after another.
extern "C" __global__ void __launch_bounds__(1024) argmax(const __grid_constant__ distkv::Argmax p) {
    using namespace distkv;
    __shared__ uint64_t found[2];
    const uint32_t rows = begin_kernel(p.rows), rank = cluster_rank(), blocks = cluster_blocks();
    uint32_t turn = 0;
    for (uint32_t row = blockIdx.y; row < rows; row += gridDim.y, turn ^= 1) {
        const float *logits = p.logits + uint64_t(row) * p.stride;
        const bool wide = is_aligned(logits);
        // Whole runs of four for each block; what is left of the last run is
        // the last block's.
        const uint32_t share = ((p.vocab + blocks - 1) / blocks + 3) / 4 * 4;
        const uint32_t begin = min(rank * share, p.vocab), end = min(begin + share, p.vocab);
        Best best;
        if (wide) {
            const uint32_t whole = begin + (end - begin) / 4 * 4;
            scan<4>(logits, begin, whole, best);
            scan<1>(logits, whole, end, best);
        } else {
            scan<1>(logits, begin, end, best);
        }
        const uint64_t key = block_max(best.key());
        if (threadIdx.x == 0) {
            found[turn] = key;
        }
        cluster_sync();
        if (rank == 0 && threadIdx.x < 32) {
            uint64_t key = 0;
            for (uint32_t peer = threadIdx.x; peer < blocks; peer += 32) {
                const uint64_t other = read_peer(&found[turn], peer);
                key = other > key ? other : key;
            }
            key = warp_max(key);
            if (threadIdx.x == 0) {
                p.tokens[row] = key_token(key);
                p.flags[row] = key == NOT_FINITE ? FLAG_NOT_FINITE : 0;
            }
        }
    }
    cluster_sync();
}
