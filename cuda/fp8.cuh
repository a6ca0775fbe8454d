// FP8 weights (e4m3: sign, 4 bits of exponent, 3 of mantissa, no infinity) in
// the GPU's memory, and how they become elements of T.
//
// Bricks of 16 features x 64 elements of `in`, 1 KiB, one after another along
// `in`, then along features; both are filled up with zeros, features to 16 and
// `in` to 128. In a brick, 16 bytes are 16 elements of a feature: first those of
// features 0 to 7, four of each, then those of 8 to 15. So a warp reads half a
// brick at once, and each lane has what the matrix unit wants of it, if it is told
// that these are elements of its own choice; x follows the same choice.
//
// Four codes are a word, as in the file, but with their bits moved: those of the
// first two lie where T has them, one in each half of the word, those of the last
// two in the bits between. So five instructions make four elements. A code's
// exponent is put into T's as it is, not biased anew: what comes out is 2^-120 of
// the value (bf16) or 2^-8 (f16), exactly, codes without a leading one included,
// which are then subnormal in T. The scale makes up for it.
#pragma once
#include "rows.cuh"

namespace distkv {

template <class T>
struct Codes;

template <>
struct Codes<__nv_bfloat16> {
    static constexpr float UNIT = 1.329227995784916e+36f; // 2^120
    static __device__ __forceinline__ uint32_t pack(uint32_t first, uint32_t last) {
        return (first & 0x80) << 8 | (first & 0x7f) << 4 | (last & 0x80) << 4 | (last & 0x70) << 8 | (last & 0x0f);
    }
    static __device__ __forceinline__ void widen(uint32_t word, uint32_t &first, uint32_t &last) {
        first = word & 0x87f087f0;
        last = (word << 4 & 0x80f080f0) | (word >> 4 & 0x07000700);
    }
};

template <>
struct Codes<__half> {
    static constexpr float UNIT = 256.0f; // 2^8
    static __device__ __forceinline__ uint32_t pack(uint32_t first, uint32_t last) {
        return (first & 0x80) << 8 | (first & 0x7f) << 7 | (last & 0x80) << 7 | (last & 0x7f);
    }
    static __device__ __forceinline__ void widen(uint32_t word, uint32_t &first, uint32_t &last) {
        first = word & 0xbf80bf80;
        last = (word << 1 & 0x80008000) | (word << 7 & 0x3f803f80);
    }
};

// The two elements of a word's half each.
__device__ __forceinline__ float low_half(uint32_t pair, __nv_bfloat16) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_half(uint32_t pair, __nv_bfloat16) { return __uint_as_float(pair & 0xffff0000); }
__device__ __forceinline__ float low_half(uint32_t pair, __half) { return __half2float(__ushort_as_half(uint16_t(pair))); }
__device__ __forceinline__ float high_half(uint32_t pair, __half) {
    return __half2float(__ushort_as_half(uint16_t(pair >> 16)));
}

constexpr uint32_t FP8_BLOCK = 128;  // elements of `in` that share a scale, where they do not all
constexpr uint32_t FP8_BRICK = 1024; // bytes

// Where the 16 bytes `piece` of the matrix belong.
struct Fp8Piece {
    uint32_t feature, element; // the first of 16
    __device__ __forceinline__ Fp8Piece(uint64_t piece, uint32_t in_features) {
        const uint32_t bricks = (in_features + FP8_BLOCK - 1) / FP8_BLOCK * 2; // of a feature
        const uint32_t brick = uint32_t(piece / 64), in_brick = uint32_t(piece % 64);
        const uint32_t row = brick / bricks;
        feature = row * 16 + in_brick / 4;
        element = (brick - row * bricks) * 64 + in_brick % 4 * 16;
    }
};

// The reverse.
__device__ __forceinline__ uint64_t fp8_piece(uint64_t feature, uint32_t element, uint32_t in_features) {
    const uint32_t bricks = (in_features + FP8_BLOCK - 1) / FP8_BLOCK * 2;
    return (feature / 16 * bricks + element / 64) * 64 + feature % 16 * 4 + element % 64 / 16;
}

} // namespace distkv
