// RMS norm, and what is added before it: a projection's output and its bias
// into the residual stream.
#include "rows.cuh"

namespace distkv {

// Runs of WIDE elements that a thread keeps in registers between the sum and
// the scaling: a row of up to 32 elements a thread is read once.
constexpr uint32_t HELD = 4;

// x, or x + delta (+ bias), at `c` of the row at `at`; the sum is written back
// unless the stream ends here.
template <uint32_t W, class T>
__device__ __forceinline__ void read_added(const RmsNorm &p, uint64_t at, uint32_t c, float (&x)[W]) {
    load(p.x + at + c, x);
    if (p.delta != nullptr) {
        float d[W], b[W] = {};
        load(static_cast<const T *>(p.delta) + at + c, d);
        if (p.bias != nullptr) {
            load(p.bias + c, b);
        }
#pragma unroll
        for (uint32_t i = 0; i < W; i++) {
            x[i] += d[i] + b[i];
        }
    }
}

template <uint32_t W>
__device__ __forceinline__ float squares(const float (&x)[W]) {
    float sum = 0.0f;
#pragma unroll
    for (uint32_t i = 0; i < W; i++) {
        sum += x[i] * x[i];
    }
    return sum;
}

template <uint32_t W, class T>
__device__ __forceinline__ void write_scaled(const RmsNorm &p, uint64_t row, uint32_t c, float factor,
                                             const float (&w)[W], float (&x)[W]) {
#pragma unroll
    for (uint32_t i = 0; i < W; i++) {
        x[i] = x[i] * factor * w[i];
    }
    store(static_cast<T *>(p.out) + row * p.cols + c, x);
}

// Rows whose elements fit N runs a thread. With one run the weights are under
// way before the kernel has to wait: at decode they come from far.
template <uint32_t N, class T>
__device__ __forceinline__ void rms_norm_held(const RmsNorm &p, bool keep) {
    const uint32_t cols = p.cols, first = threadIdx.x * WIDE, stride = blockDim.x * WIDE;
    float w[WIDE] = {};
    if (N == 1 && first < cols) {
        load(p.weight + first, w);
    }
    const uint32_t rows = begin_kernel(p.rows);
    for (uint32_t row = blockIdx.x; row < rows; row += gridDim.x) {
        const uint64_t at = uint64_t(p.index != nullptr ? p.index[row] : row) * cols;
        float x[N][WIDE];
        float sum = 0.0f;
#pragma unroll
        for (uint32_t j = 0; j < N; j++) {
            const uint32_t c = first + j * stride;
            if (c < cols) {
                read_added<WIDE, T>(p, at, c, x[j]);
                if (keep) {
                    store(p.x + at + c, x[j]);
                }
                sum += squares(x[j]);
            }
        }
        const float factor = rsqrtf(block_sum(sum) / float(cols) + p.eps);
#pragma unroll
        for (uint32_t j = 0; j < N; j++) {
            const uint32_t c = first + j * stride;
            if (c < cols) {
                if (N > 1) {
                    load(p.weight + c, w);
                }
                write_scaled<WIDE, T>(p, row, c, factor, w, x[j]);
            }
        }
    }
}

// Rows of any size and alignment, read twice.
template <class T>
__device__ __forceinline__ void rms_norm_any(const RmsNorm &p, bool keep) {
    const uint32_t rows = begin_kernel(p.rows), cols = p.cols;
    float x[1], w[1];
    for (uint32_t row = blockIdx.x; row < rows; row += gridDim.x) {
        const uint64_t at = uint64_t(p.index != nullptr ? p.index[row] : row) * cols;
        float sum = 0.0f;
        for (uint32_t c = threadIdx.x; c < cols; c += blockDim.x) {
            read_added<1, T>(p, at, c, x);
            sum += squares(x);
        }
        const float factor = rsqrtf(block_sum(sum) / float(cols) + p.eps);
        for (uint32_t c = threadIdx.x; c < cols; c += blockDim.x) {
            read_added<1, T>(p, at, c, x);
            if (keep) {
                store(p.x + at + c, x);
            }
            load(p.weight + c, w);
            write_scaled<1, T>(p, row, c, factor, w, x);
        }
    }
}

template <class T>
__device__ __forceinline__ void rms_norm(const RmsNorm &p) {
    const uint32_t cols = p.cols, stride = blockDim.x * WIDE;
    const bool wide = cols % WIDE == 0 && is_aligned(p.x) && is_aligned(p.delta) && is_aligned(p.bias) &&
                      is_aligned(p.weight) && is_aligned(p.out);
    // Rows that are picked by an index end the stream: it has no reader left.
    const bool keep = p.delta != nullptr && p.index == nullptr;
    if (wide && cols <= stride) {
        rms_norm_held<1, T>(p, keep);
    } else if (wide && cols <= HELD * stride) {
        rms_norm_held<HELD, T>(p, keep);
    } else {
        rms_norm_any<T>(p, keep);
    }
}

template <uint32_t W, class T>
__device__ __forceinline__ void add_runs(const Add &p) {
    each_run<W>(begin_kernel(p.rows), p.cols, [&](uint32_t row, uint32_t c) {
        const uint64_t at = uint64_t(row) * p.cols + c;
        float x[W], d[W], b[W] = {};
        load(p.x + at, x);
        load(static_cast<const T *>(p.delta) + at, d);
        if (p.bias != nullptr) {
            load(p.bias + c, b);
        }
#pragma unroll
        for (uint32_t i = 0; i < W; i++) {
            x[i] += d[i] + b[i];
        }
        store(p.x + at, x);
    });
}

template <class T>
__device__ __forceinline__ void add(const Add &p) {
    if (p.cols % WIDE == 0 && is_aligned(p.x) && is_aligned(p.delta) && is_aligned(p.bias)) {
        add_runs<WIDE, T>(p);
    } else {
        add_runs<1, T>(p);
    }
}

template <uint32_t W, class T>
__device__ __forceinline__ void add_bias_runs(const AddBias &p) {
    each_run<W>(begin_kernel(p.rows), p.cols, [&](uint32_t row, uint32_t c) {
        T *at = static_cast<T *>(p.x) + uint64_t(row) * p.cols + c;
        float x[W], b[W];
        load(at, x);
        load(p.bias + c, b);
#pragma unroll
        for (uint32_t i = 0; i < W; i++) {
            x[i] += b[i];
        }
        store(at, x);
    });
}

template <class T>
__device__ __forceinline__ void add_bias(const AddBias &p) {
    if (p.cols % WIDE == 0 && is_aligned(p.x) && is_aligned(p.bias)) {
        add_bias_runs<WIDE, T>(p);
    } else {
        add_bias_runs<1, T>(p);
    }
}

} // namespace distkv

// A block a row (or several rows, one after another).
DISTKV_KERNELS(rms_norm, RmsNorm, 1024)
// Any grid.
DISTKV_KERNELS(add, Add, 256)
DISTKV_KERNELS(add_bias, AddBias, 256)
