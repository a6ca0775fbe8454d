// The gated activation between the two halves of a feed-forward layer.
#include "rows.cuh"

namespace distkv {

template <uint32_t W, class T>
__device__ __forceinline__ void swiglu_runs(const Swiglu &p) {
    each_run<W>(begin_kernel(p.rows), p.cols, [&](uint32_t row, uint32_t c) {
        const T *gate = static_cast<const T *>(p.gate_up) + uint64_t(row) * 2 * p.cols + c;
        float g[W], u[W];
        load(gate, g);
        load(gate + p.cols, u);
        if (p.bias != nullptr) {
            float gate_bias[W], up_bias[W];
            load(p.bias + c, gate_bias);
            load(p.bias + p.cols + c, up_bias);
#pragma unroll
            for (uint32_t i = 0; i < W; i++) {
                g[i] += gate_bias[i];
                u[i] += up_bias[i];
            }
        }
#pragma unroll
        for (uint32_t i = 0; i < W; i++) {
            // Far below zero the exponential is infinite and the quotient -0.
            g[i] = g[i] / (1.0f + __expf(-g[i])) * u[i];
        }
        store(static_cast<T *>(p.out) + uint64_t(row) * p.cols + c, g);
    });
}

template <class T>
__device__ __forceinline__ void swiglu(const Swiglu &p) {
    if (p.cols % WIDE == 0 && is_aligned(p.gate_up) && is_aligned(p.bias) && is_aligned(p.out)) {
        swiglu_runs<WIDE, T>(p);
    } else {
        swiglu_runs<1, T>(p);
    }
}

} // namespace distkv

// Any grid.
DISTKV_KERNELS(swiglu, Swiglu, 256)
