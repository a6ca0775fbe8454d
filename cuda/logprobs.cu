// Log-probabilities of the distribution before temperature and truncation: of
// the chosen token and of the likeliest ones.
#include "cluster.cuh"
#include "rows.cuh"
#include "token_key.cuh"
#include "weights.cuh"

namespace distkv {

// Most alternatives a row may ask for.
constexpr uint32_t MAX_TOP = 20;
constexpr uint32_t NOT_ASKED = ~0u;
constexpr uint32_t MAX_BLOCKS = 16; // a cluster

// A thread's share of a row's logits, the same whenever it is walked.
struct Share {
    const float *logits;
    uint32_t begin, whole, end; // runs of four up to `whole`

    __device__ __forceinline__ Share(const float *logits, uint32_t vocab, uint32_t rank, uint32_t blocks)
        : logits(logits) {
        const uint32_t share = ((vocab + blocks - 1) / blocks + 3) / 4 * 4;
        begin = min(rank * share, vocab);
        end = min(begin + share, vocab);
        whole = is_aligned(logits) ? begin + (end - begin) / 4 * 4 : begin;
    }

    template <class F>
    __device__ __forceinline__ void each(F f) const {
#pragma unroll 4
        for (uint32_t i = begin + threadIdx.x * 4; i < whole; i += blockDim.x * 4) {
            float x[4];
            load(logits + i, x);
#pragma unroll
            for (uint32_t j = 0; j < 4; j++) {
                f(x[j], i + j);
            }
        }
        for (uint32_t i = whole + threadIdx.x; i < end; i += blockDim.x) {
            f(logits[i], i);
        }
    }
};

// Block 0 of the cluster: the `count` largest of what the blocks have found, in
// order, each thread one key. All its threads call.
__device__ __forceinline__ void merge_top(const Logprobs &p, uint64_t row, uint32_t count, double normaliser,
                                          const uint64_t *own, uint32_t blocks) {
    __shared__ uint64_t all[MAX_BLOCKS * MAX_TOP];
    for (uint32_t i = threadIdx.x; i < blocks * count; i += blockDim.x) {
        all[i] = read_peer(own + i % count, i / count);
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < blocks * count; i += blockDim.x) {
        const uint64_t key = all[i];
        uint32_t before = 0;
        for (uint32_t j = 0; j < blocks * count; j++) {
            before += all[j] > key ? 1 : 0;
        }
        // A block with fewer tokens ends its list with zeros.
        if (key != 0 && before < count) {
            p.top_tokens[row * MAX_TOP + before] = key_token(key);
            p.top[row * MAX_TOP + before] = float(double(key_logit(key)) - normaliser);
        }
    }
}

__device__ __forceinline__ void logprobs_row(const Logprobs &p, uint32_t row, uint32_t rank, uint32_t blocks) {
    __shared__ uint64_t largest, mass, block_mass[32], top[MAX_TOP];
    const uint32_t count = min(min(p.counts[row], MAX_TOP), p.vocab), lane = threadIdx.x % 32;
    const Share share(p.logits + uint64_t(row) * p.stride, p.vocab, rank, blocks);
    Best best;
    share.each([&](float x, uint32_t token) { best.take(x, token); });
    uint64_t candidate = best.key();
    uint64_t key = block_max(candidate);
    if (threadIdx.x == 0) {
        largest = key;
    }
    cluster_sync();
    key = warp_max(lane < blocks ? read_peer(&largest, lane) : 0);
    if (key == NOT_FINITE) {
        if (rank == 0 && threadIdx.x == 0) {
            p.chosen[row] = NAN;
        }
        if (rank == 0 && threadIdx.x < count) {
            p.top_tokens[uint64_t(row) * MAX_TOP + threadIdx.x] = 0;
            p.top[uint64_t(row) * MAX_TOP + threadIdx.x] = NAN;
        }
        return;
    }
    const float max = key_logit(key);
    uint64_t sum = 0;
    share.each([&](float x, uint32_t) { sum += mass_of(weight_exp(__fsub_rn(x, max))); });
    sum = warp_sum(sum);
    if (lane == 0) {
        block_mass[threadIdx.x / 32] = sum;
    }
    __syncthreads();
    sum = warp_sum(lane < blockDim.x / 32 ? block_mass[lane] : 0);
    if (threadIdx.x == 0) {
        mass = sum;
    }
    // The block's own largest, one after another: only the thread that held the
    // last one looks for its next.
    for (uint32_t i = 0; i < count; i++) {
        const uint64_t next = block_max(candidate);
        if (threadIdx.x == 0) {
            top[i] = next;
        }
        if (candidate == next && next != 0) {
            candidate = 0;
            share.each([&](float x, uint32_t token) {
                const uint64_t other = token_key(x, token);
                candidate = other < next && other > candidate ? other : candidate;
            });
        }
    }
    cluster_sync();
    if (rank != 0) {
        return;
    }
    sum = warp_sum(lane < blocks ? read_peer(&mass, lane) : 0);
    const double normaliser = double(max) + log(double(sum) / double(MASS_OF_ONE));
    if (threadIdx.x == 0) {
        const uint32_t token = p.tokens[row];
        p.chosen[row] = token < p.vocab ? float(double(share.logits[token]) - normaliser) : NAN;
    }
    if (count > 0) {
        merge_top(p, row, count, normaliser, top, blocks);
    }
}

} // namespace distkv

// A cluster of up to MAX_BLOCKS along x a row; rows along y, perhaps several one
// after another.
extern "C" __global__ void __launch_bounds__(1024) logprobs(const __grid_constant__ distkv::Logprobs p) {
    using namespace distkv;
    const uint32_t rows = begin_kernel(p.rows), rank = cluster_rank(), blocks = cluster_blocks();
    for (uint32_t row = blockIdx.y; row < rows; row += gridDim.y) {
        if (p.counts[row] != NOT_ASKED) {
            logprobs_row(p, row, rank, blocks);
            // No block goes on, or ends, while another reads what it found.
            cluster_sync();
        }
    }
}
