// FP8 weights on their way into the GPU's memory, and a matrix of them widened
// for the matrix library.
#include "fp8.cuh"

namespace distkv {

// Runs of 16 codes of a row, as they lie in a file, into bricks.
template <class T>
__device__ __forceinline__ void pack_fp8(const PackFp8 &p) {
    begin_kernel();
    const uint64_t stride = uint64_t(gridDim.x) * blockDim.x;
    for (uint64_t i = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < p.elements / 16; i += stride) {
        const uint64_t at = p.first + i * 16, feature = at / p.in_features;
        const uint4 v = static_cast<const uint4 *>(p.codes)[i];
        uint32_t words[4] = {v.x, v.y, v.z, v.w}, nan = 0;
#pragma unroll
        for (uint32_t j = 0; j < 4; j++) {
            const uint32_t w = words[j];
            nan |= (w & 0x7f7f7f7f) + 0x01010101;
            words[j] = Codes<T>::pack(w & 255, w >> 16 & 255) | Codes<T>::pack(w >> 8 & 255, w >> 24) << 16;
        }
        if (nan & 0x80808080) {
            *p.flag = 1;
        }
        static_cast<uint4 *>(p.weights)[fp8_piece(feature, uint32_t(at - feature * p.in_features), p.in_features)] =
            make_uint4(words[0], words[1], words[2], words[3]);
    }
}

// Each element in T, row by row: code times scale in f32, rounded.
template <class T>
__device__ __forceinline__ void widen_fp8(const WidenFp8 &p) {
    begin_kernel();
    const uint64_t total = uint64_t((p.out_features + 15) / 16) * ((p.in_features + FP8_BLOCK - 1) / FP8_BLOCK) * 128;
    const uint64_t stride = uint64_t(gridDim.x) * blockDim.x;
    for (uint64_t i = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < total; i += stride) {
        const Fp8Piece at(i, p.in_features);
        if (at.feature >= p.out_features || at.element >= p.in_features) {
            continue;
        }
        const uint32_t block = p.scale_cols == 1 ? 0 : at.element / FP8_BLOCK;
        const float scale = p.scales[uint64_t(at.feature >> p.scale_shift) * p.scale_cols + block];
        const uint4 codes = __ldcs(static_cast<const uint4 *>(p.weights) + i);
        const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
        T *to = static_cast<T *>(p.out) + uint64_t(at.feature) * p.in_features + at.element;
#pragma unroll
        for (uint32_t half = 0; half < 2; half++) {
            float x[8];
#pragma unroll
            for (uint32_t j = 0; j < 2; j++) {
                uint32_t pair[2];
                Codes<T>::widen(words[half * 2 + j], pair[0], pair[1]);
#pragma unroll
                for (uint32_t k = 0; k < 2; k++) {
                    x[j * 4 + k * 2] = low_half(pair[k], T()) * Codes<T>::UNIT * scale;
                    x[j * 4 + k * 2 + 1] = high_half(pair[k], T()) * Codes<T>::UNIT * scale;
                }
            }
            store(to + half * 8, x);
        }
    }
}

} // namespace distkv

// Any grid.
DISTKV_KERNELS(pack_fp8, PackFp8, 256)
DISTKV_KERNELS(widen_fp8, WidenFp8, 256)
