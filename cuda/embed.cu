// Rows by their number: of the embedding table by token, of the residual stream
// by what needs logits.
#include "rows.cuh"

namespace distkv {

template <uint32_t W, class T>
__device__ __forceinline__ void embed_runs(const Embed &p) {
    each_run<W>(begin_kernel(p.rows), p.cols, [&](uint32_t row, uint32_t c) {
        const uint32_t token = p.tokens[row];
        float x[W];
        if (token < p.vocab) {
            load(static_cast<const T *>(p.table) + uint64_t(token) * p.cols + c, x);
        } else {
            // No row of the table. NaN goes through the step to the sampler,
            // which refuses it; a read outside the table would end the process.
#pragma unroll
            for (uint32_t i = 0; i < W; i++) {
                x[i] = NAN;
            }
        }
        store(p.out + uint64_t(row) * p.cols + c, x);
    });
}

template <class T>
__device__ __forceinline__ void embed(const Embed &p) {
    if (p.cols % WIDE == 0 && is_aligned(p.table) && is_aligned(p.out)) {
        embed_runs<WIDE, T>(p);
    } else {
        embed_runs<1, T>(p);
    }
}

template <uint32_t W>
__device__ __forceinline__ void gather_runs(const Gather &p) {
    each_run<W>(begin_kernel(p.rows), p.cols, [&](uint32_t row, uint32_t c) {
        float x[W];
        load(p.x + uint64_t(p.index[row]) * p.cols + c, x);
        store(p.out + uint64_t(row) * p.cols + c, x);
    });
}

} // namespace distkv

// Any grid.
DISTKV_KERNELS(embed, Embed, 256)

extern "C" __global__ void __launch_bounds__(256) gather(const __grid_constant__ distkv::Gather p) {
    if (p.cols % 4 == 0 && distkv::is_aligned(p.x) && distkv::is_aligned(p.out)) {
        distkv::gather_runs<4>(p);
    } else {
        distkv::gather_runs<1>(p);
    }
}
