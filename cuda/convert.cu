// Weights as they lie in a file into the device's element type. The formats are
// read as src/device/cpu/quant.rs reads them, with the same roundings.
//
// Kernels `convert_<from>_<to>`: from f32, f16, bf16, q8_0, q4_0, q4_1, q4_k,
// q6_k; to f32, f16, bf16.
#include "rows.cuh"

namespace distkv {

// Elements that a block converts at a time: whole blocks of every format.
constexpr uint32_t TILE = 2048;
constexpr uint32_t CONVERT_THREADS = TILE / WIDE;

// A tile's bytes in shared memory, which begin anywhere in its first word.
struct Bytes {
    const uint32_t *words;

    // Four bytes, one byte, a half at any place.
    __device__ __forceinline__ uint32_t four(uint32_t at) const {
        const uint32_t word = at / 4, shift = at % 4 * 8;
        return __funnelshift_r(words[word], words[word + 1], shift);
    }
    __device__ __forceinline__ uint32_t byte(uint32_t at) const { return words[at / 4] >> (at % 4 * 8) & 255; }
    __device__ __forceinline__ float half_at(uint32_t at) const {
        return __half2float(__ushort_as_half(uint16_t(four(at))));
    }
};

// Byte i, 0 .. 8, of two words.
__device__ __forceinline__ uint32_t byte_of(uint32_t low, uint32_t high, uint32_t i) {
    return (i < 4 ? low : high) >> (i % 4 * 8) & 255;
}

// A format: blocks of LENGTH elements in BYTES bytes; `read` gives the eight
// elements from `first` (a multiple of 8) on of the block at `at`. No product
// is fused with a sum, as on the CPU.
struct F32 {
    using Element = float;
    static constexpr uint32_t LENGTH = 1, BYTES = 4;
    static __device__ __forceinline__ float one(Bytes b, uint32_t at) { return __uint_as_float(b.four(at)); }
};

struct F16 {
    using Element = __half;
    static constexpr uint32_t LENGTH = 1, BYTES = 2;
    static __device__ __forceinline__ float one(Bytes b, uint32_t at) { return b.half_at(at); }
};

struct Bf16 {
    using Element = __nv_bfloat16;
    static constexpr uint32_t LENGTH = 1, BYTES = 2;
    static __device__ __forceinline__ float one(Bytes b, uint32_t at) { return __uint_as_float(b.four(at) << 16); }
};

struct Q8_0 {
    static constexpr uint32_t LENGTH = 32, BYTES = 34;
    static __device__ __forceinline__ void read(Bytes b, uint32_t at, uint32_t first, float (&x)[WIDE]) {
        const float d = b.half_at(at);
        const uint32_t low = b.four(at + 2 + first), high = b.four(at + 2 + first + 4);
#pragma unroll
        for (uint32_t i = 0; i < WIDE; i++) {
            x[i] = d * float(int8_t(byte_of(low, high, i)));
        }
    }
};

// Eight 4-bit codes of a block of 32: the low nibbles of 16 bytes are its first
// half, the high ones its second.
__device__ __forceinline__ void nibbles(Bytes b, uint32_t at, uint32_t first, float (&x)[WIDE]) {
    const uint32_t low = b.four(at + first % 16), high = b.four(at + first % 16 + 4), shift = first / 16 * 4;
#pragma unroll
    for (uint32_t i = 0; i < WIDE; i++) {
        x[i] = float(byte_of(low, high, i) >> shift & 15);
    }
}

struct Q4_0 {
    static constexpr uint32_t LENGTH = 32, BYTES = 18;
    static __device__ __forceinline__ void read(Bytes b, uint32_t at, uint32_t first, float (&x)[WIDE]) {
        const float d = b.half_at(at);
        nibbles(b, at + 2, first, x);
#pragma unroll
        for (uint32_t i = 0; i < WIDE; i++) {
            x[i] = d * (x[i] - 8.0f);
        }
    }
};

struct Q4_1 {
    static constexpr uint32_t LENGTH = 32, BYTES = 20;
    static __device__ __forceinline__ void read(Bytes b, uint32_t at, uint32_t first, float (&x)[WIDE]) {
        const float d = b.half_at(at), m = b.half_at(at + 2);
        nibbles(b, at + 4, first, x);
#pragma unroll
        for (uint32_t i = 0; i < WIDE; i++) {
            x[i] = __fadd_rn(__fmul_rn(d, x[i]), m);
        }
    }
};

struct Q4K {
    static constexpr uint32_t LENGTH = 256, BYTES = 144;
    static __device__ __forceinline__ void read(Bytes b, uint32_t at, uint32_t first, float (&x)[WIDE]) {
        const uint32_t j = first / 32, s = at + 4;
        // 6-bit scale and minimum of sub-block j, out of 12 bytes.
        uint32_t scale, min;
        if (j < 4) {
            scale = b.byte(s + j) & 63;
            min = b.byte(s + j + 4) & 63;
        } else {
            scale = (b.byte(s + j + 4) & 15) | (b.byte(s + j - 4) >> 6) << 4;
            min = b.byte(s + j + 4) >> 4 | (b.byte(s + j) >> 6) << 4;
        }
        const float d = b.half_at(at) * float(scale), m = b.half_at(at + 2) * float(min);
        const uint32_t codes = at + 16 + j / 2 * 32 + first % 32, shift = j % 2 * 4;
        const uint32_t low = b.four(codes), high = b.four(codes + 4);
#pragma unroll
        for (uint32_t i = 0; i < WIDE; i++) {
            x[i] = __fsub_rn(__fmul_rn(d, float(byte_of(low, high, i) >> shift & 15)), m);
        }
    }
};

struct Q6K {
    static constexpr uint32_t LENGTH = 256, BYTES = 210;
    static __device__ __forceinline__ void read(Bytes b, uint32_t at, uint32_t first, float (&x)[WIDE]) {
        // Halves of 128; in each, four runs of 32 share 64 low and 32 high bytes.
        const uint32_t half = first / 128, run = first / 32 % 4, l = first % 32;
        const uint32_t lows = at + half * 64 + run % 2 * 32 + l, highs = at + 128 + half * 32 + l;
        const uint32_t a = b.four(lows), c = b.four(lows + 4), e = b.four(highs), f = b.four(highs + 4);
        const float d = b.half_at(at + 208) * float(int8_t(b.byte(at + 192 + first / 16)));
#pragma unroll
        for (uint32_t i = 0; i < WIDE; i++) {
            const uint32_t low = byte_of(a, c, i) >> (run / 2 * 4) & 15, high = byte_of(e, f, i) >> (2 * run) & 3;
            x[i] = d * (float(low | high << 4) - 32.0f);
        }
    }
};

// Bytes `begin` to `end` of device memory into `words`, 16 at a time where whole
// ones lie inside; returns where the first byte is in them.
__device__ __forceinline__ uint32_t stage(const uint8_t *begin, const uint8_t *end, uint4 *words) {
    const uint32_t skew = uint32_t(reinterpret_cast<uint64_t>(begin) & 15);
    const uint8_t *base = begin - skew;
    const uint32_t chunks = (uint32_t(end - base) + 15) / 16;
    for (uint32_t i = threadIdx.x; i < chunks; i += blockDim.x) {
        const uint8_t *at = base + i * 16;
        if (at >= begin && at + 16 <= end) {
            words[i] = *reinterpret_cast<const uint4 *>(at);
        } else {
            uint8_t *to = reinterpret_cast<uint8_t *>(words + i);
            for (uint32_t j = 0; j < 16; j++) {
                to[j] = at + j >= begin && at + j < end ? at[j] : 0;
            }
        }
    }
    return skew;
}

template <class From, class To>
__device__ __forceinline__ void convert(const Convert &p) {
    constexpr uint32_t SOURCE = TILE / From::LENGTH * From::BYTES;
    // Two words of slack: an unaligned read takes the word behind.
    __shared__ uint4 words[SOURCE / 16 + 2];
    begin_kernel();
    const uint8_t *source = static_cast<const uint8_t *>(p.bytes) + p.offset / From::LENGTH * From::BYTES;
    To *out = static_cast<To *>(p.out);
    const bool wide = is_aligned(out);
    // Plain elements of whole words need no sorting of bytes.
    const bool direct = From::LENGTH == 1 && is_aligned(source);
    for (uint64_t tile = uint64_t(blockIdx.x) * TILE; tile < p.elements; tile += uint64_t(gridDim.x) * TILE) {
        const uint32_t count = uint32_t(p.elements - tile < TILE ? p.elements - tile : TILE);
        const uint32_t first = threadIdx.x * WIDE, live = first < count ? min(count - first, WIDE) : 0;
        const uint8_t *begin = source + tile / From::LENGTH * From::BYTES;
        float x[WIDE];
        if (direct && count == TILE) {
            if constexpr (From::LENGTH == 1) {
                load(reinterpret_cast<const typename From::Element *>(begin) + first, x);
            }
        } else {
            // The tile before may still be being read.
            __syncthreads();
            const uint32_t skew = stage(begin, begin + count / From::LENGTH * From::BYTES, words);
            __syncthreads();
            const Bytes bytes{reinterpret_cast<const uint32_t *>(words)};
            if constexpr (From::LENGTH == 1) {
#pragma unroll
                for (uint32_t i = 0; i < WIDE; i++) {
                    x[i] = i < live ? From::one(bytes, skew + (first + i) * From::BYTES) : 0.0f;
                }
            } else if (live > 0) {
                From::read(bytes, skew + first / From::LENGTH * From::BYTES, first % From::LENGTH, x);
            }
        }
        To *to = out + tile + first;
        if (wide && live == WIDE) {
            store(to, x);
        } else {
#pragma unroll
            for (uint32_t i = 0; i < WIDE; i++) {
                if (i < live) {
                    to[i] = from_float<To>(x[i]);
                }
            }
        }
    }
}

} // namespace distkv

// Any grid; blocks of exactly CONVERT_THREADS.
#define DISTKV_CONVERT(from, From, to, To)                                                                             \
    extern "C" __global__ void __launch_bounds__(distkv::CONVERT_THREADS)                                              \
        convert_##from##_##to(const __grid_constant__ distkv::Convert p) {                                             \
        distkv::convert<distkv::From, To>(p);                                                                          \
    }
#define DISTKV_CONVERT_FROM(from, From)                                                                                \
    DISTKV_CONVERT(from, From, f32, float)                                                                             \
    DISTKV_CONVERT(from, From, f16, __half)                                                                            \
    DISTKV_CONVERT(from, From, bf16, __nv_bfloat16)

DISTKV_CONVERT_FROM(f32, F32)
DISTKV_CONVERT_FROM(f16, F16)
DISTKV_CONVERT_FROM(bf16, Bf16)
DISTKV_CONVERT_FROM(q8_0, Q8_0)
DISTKV_CONVERT_FROM(q4_0, Q4_0)
DISTKV_CONVERT_FROM(q4_1, Q4_1)
DISTKV_CONVERT_FROM(q4_k, Q4K)
DISTKV_CONVERT_FROM(q6_k, Q6K)
