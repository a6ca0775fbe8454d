// Linear layers of up to eight rows with FP8 weights: as linear_fp8.cu, but a block
// takes all of `in` for a few bricks of features, so that no two blocks have to
// meet, and half a multiprocessor, so that the next kernel's blocks find room for
// their first weights while this one's end.
//
// Its warps take blocks of 128 elements of `in` in turn. A warp's x of such a block
// lies in registers and serves all of the bricks. Where these are few, the next
// block's is on its way; where they are many, registers are short, and waiting for
// it once in so many bricks is little.
#include "linear_fp8.cuh"

namespace distkv {

namespace fp8 {

constexpr uint32_t FEW_WARPS = 8, FEW_THREADS = 32 * FEW_WARPS, FEW_ROWS = 8;
constexpr uint32_t FEW_STAGES = 7;
constexpr uint32_t FEW_STAGE = 2 * FP8_BRICK; // bytes: 16 features, 128 elements of `in`
constexpr uint32_t FEW_SHARED = FEW_STAGES * FEW_WARPS * FEW_STAGE;

// A lane's x in 128 elements: row l / 4, 16 elements of each half.
struct Row {
    uint4 piece[4];
    __device__ __forceinline__ void fetch(const void *row, uint32_t at, uint32_t lane, uint32_t in_features, bool there) {
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            const uint32_t element = at + i / 2 * 64 + lane % 4 * 16 + i % 2 * 8;
            const uint4 *from = reinterpret_cast<const uint4 *>(static_cast<const uint16_t *>(row) + element);
            piece[i] = there && element < in_features ? *from : make_uint4(0, 0, 0, 0);
        }
    }
    template <class T>
    __device__ __forceinline__ void lift() {
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            const uint4 v = piece[i];
            piece[i] = make_uint4(Lift<T>::up(v.x), Lift<T>::up(v.y), Lift<T>::up(v.z), Lift<T>::up(v.w));
        }
    }
};

} // namespace fp8

// BRICKS: the most bricks of features a block.
template <class T, uint32_t BRICKS, bool BLOCKS>
__device__ __forceinline__ void linear_fp8_few(const LinearFp8 &p) {
    using namespace fp8;
    constexpr bool AHEAD = BRICKS <= 4;
    static_assert(FEW_WARPS * FEW_ROWS * (BRICKS * 16 + 4) * 4 <= FEW_SHARED, "sums take the ring's place");
    extern __shared__ __align__(16) uint8_t shared[];
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, bricks = p.bricks;
    const uint32_t blocks = (p.in_features + FP8_BLOCK - 1) / FP8_BLOCK;
    const uint32_t all_bricks = (p.out_features + 15) / 16;
    const uint32_t ring = shared_address(shared), slots = ring + warp * FEW_STAGES * FEW_STAGE + lane * 16;
    // The matrix's brick that is the block's `u`th: with SwiGLU one of gate, then the
    // one of up that goes with it. What is beyond the matrix is not stored: any will
    // do.
    const auto brick = [&](uint32_t u) {
        const uint32_t first = blockIdx.x * bricks;
        return min(p.end == SWIGLU ? (first + u) / 2 + u % 2 * (all_bricks / 2) : first + u, all_bricks - 1);
    };
    // The next stage to bring: block and brick, and the slot.
    uint32_t ahead_block = warp, ahead_brick = 0, ahead_slot = 0;
    const auto bring = [&] {
        if (ahead_block < blocks) {
            const uint8_t *from = static_cast<const uint8_t *>(p.weights) +
                                  (uint64_t(brick(ahead_brick)) * blocks + ahead_block) * FEW_STAGE + lane * 16;
#pragma unroll
            for (uint32_t i = 0; i < 4; i++) {
                copy_16(slots + ahead_slot * FEW_STAGE + i * 512, from + i * 512);
            }
        }
        if (++ahead_brick == bricks) {
            ahead_brick = 0;
            ahead_block += FEW_WARPS;
        }
        ahead_slot = ahead_slot + 1 == FEW_STAGES ? 0 : ahead_slot + 1;
        copies_commit();
    };
#pragma unroll 1
    for (uint32_t i = 0; i + 1 < FEW_STAGES; i++) {
        bring();
    }
    // With block scales: of features l / 4 and l / 4 + 8 of a brick, a stage ahead.
    float scale[2] = {1.0f, 1.0f};
    const auto scales = [&](uint32_t block, uint32_t u) {
        const uint32_t feature = brick(u) * 16 + lane / 4;
#pragma unroll
        for (uint32_t i = 0; i < 2; i++) {
            const uint32_t f = min(feature + i * 8, p.out_features - 1);
            scale[i] = p.scales[uint64_t(f >> p.scale_shift) * p.scale_cols + min(block, blocks - 1)];
        }
    };
    if (BLOCKS) {
        scales(warp, 0);
    }
    const uint32_t used = *reinterpret_cast<const volatile uint32_t *>(p.rows);
    const uint32_t rows = used > p.first ? min(used - p.first, FEW_ROWS) : 0;
    wait_for_previous();
    launch_next();

    const T *row = static_cast<const T *>(p.x) + uint64_t(lane / 4) * p.x_stride;
    const bool there = lane / 4 < rows;
    float sums[BRICKS][4] = {};
    Row x, next;
    x.fetch(row, warp * FP8_BLOCK, lane, p.in_features, there);
    x.lift<T>();
    uint32_t slot = 0;
    for (uint32_t block = warp; block < blocks; block += FEW_WARPS) {
        if (AHEAD) {
            next.fetch(row, (block + FEW_WARPS) * FP8_BLOCK, lane, p.in_features, there);
        }
#pragma unroll
        for (uint32_t u = 0; u < BRICKS; u++) {
            if (u >= bricks) {
                break;
            }
            float part[2][4] = {};
            const float now[2] = {scale[0], scale[1]};
            if (BLOCKS) {
                const bool last = u + 1 == bricks;
                scales(last ? block + FEW_WARPS : block, last ? 0 : u + 1);
            }
            copies_wait<FEW_STAGES - 2>();
            const uint32_t from = slots + slot * FEW_STAGE;
            uint4 w[4];
#pragma unroll
            for (uint32_t i = 0; i < 4; i++) {
                w[i] = read_16(from + i * 512);
            }
#pragma unroll
            for (uint32_t j = 0; j < 4; j++) {
#pragma unroll
                for (uint32_t half = 0; half < 2; half++) {
                    uint32_t a[4];
                    Codes<T>::widen(word(w[half * 2], j), a[0], a[2]);
                    Codes<T>::widen(word(w[half * 2 + 1], j), a[1], a[3]);
                    const uint4 &b = x.piece[half * 2 + j / 2];
                    multiply(part[half], a, word(b, j % 2 * 2), word(b, j % 2 * 2 + 1), T());
                }
            }
            slot = slot + 1 == FEW_STAGES ? 0 : slot + 1;
            bring();
#pragma unroll
            for (uint32_t v = 0; v < 4; v++) {
                const float sum = part[0][v] + part[1][v];
                sums[u][v] += BLOCKS ? sum * now[v / 2] : sum;
            }
        }
        if (AHEAD) {
            x = next;
        } else {
            x.fetch(row, (block + FEW_WARPS) * FP8_BLOCK, lane, p.in_features, there);
        }
        x.lift<T>();
    }
    copies_wait<0>();
    __syncthreads(); // the ring is read
    const uint32_t pitch = bricks * 16 + 4;
    float *to = reinterpret_cast<float *>(shared) + warp * FEW_ROWS * pitch + lane / 4;
#pragma unroll
    for (uint32_t i = 0; i < BRICKS * 4; i++) {
        const uint32_t u = i / 4, v = i % 4, at = lane % 4 * 2 + v % 2;
        if (u < bricks && at < rows) {
            to[at * pitch + u * 16 + v / 2 * 8] = sums[u][v];
        }
    }
    __syncthreads();
    const auto total = [&](float (&y)[4], uint32_t at, uint32_t local, uint32_t feature) {
        y[0] = y[1] = y[2] = y[3] = 0.0f;
#pragma unroll
        for (uint32_t w = 0; w < FEW_WARPS; w++) {
            const float *from = reinterpret_cast<const float *>(shared) + (w * FEW_ROWS + at) * pitch + local;
            const float4 v = *reinterpret_cast<const float4 *>(from);
            y[0] += v.x;
            y[1] += v.y;
            y[2] += v.z;
            y[3] += v.w;
        }
        finish_sums<T, BLOCKS>(p, y, feature);
    };
    const uint32_t quads = p.end == SWIGLU ? bricks * 2 : bricks * 4;
    for (uint32_t i = threadIdx.x; i < rows * quads; i += FEW_THREADS) {
        const uint32_t at = i / quads, quad = i - at * quads, feature = (blockIdx.x * quads + quad) * 4;
        float y[4];
        if (p.end == SWIGLU) {
            const uint32_t half = p.out_features / 2, local = quad / 4 * 32 + quad % 4 * 4;
            if (feature < half) {
                float up[4];
                total(y, at, local, feature);
                total(up, at, local + 16, half + feature);
#pragma unroll
                for (uint32_t j = 0; j < 4; j++) {
                    y[j] = silu_times(y[j], up[j]);
                }
                put(static_cast<T *>(p.out), y, at, feature, half);
            }
        } else if (feature < p.out_features) {
            total(y, at, quad * 4, feature);
            store_sums<T>(p, y, at, feature);
        }
    }
}

} // namespace distkv

// Blocks of FEW_THREADS threads, one for each `bricks` bricks of features (an even
// number with end 1), at most as many as the kernel's name says. FEW_SHARED bytes of
// dynamic shared memory.
#define DISTKV_FP8_FEW(B, T, name, blocks, BLOCKS)                                                                     \
    extern "C" __global__ void __launch_bounds__(distkv::fp8::FEW_THREADS, 2)                                          \
        linear_fp8_few##blocks##_b##B##_##name(const __grid_constant__ distkv::LinearFp8 p) {                          \
        distkv::linear_fp8_few<T, B, BLOCKS>(p);                                                                       \
    }
#define DISTKV_FP8_FEW_BRICKS(T, name, blocks, BLOCKS)                                                                 \
    DISTKV_FP8_FEW(4, T, name, blocks, BLOCKS)                                                                         \
    DISTKV_FP8_FEW(14, T, name, blocks, BLOCKS)
DISTKV_FP8_FEW_BRICKS(__nv_bfloat16, bf16, , false)
DISTKV_FP8_FEW_BRICKS(__nv_bfloat16, bf16, _blocks, true)
DISTKV_FP8_FEW_BRICKS(__half, f16, , false)
DISTKV_FP8_FEW_BRICKS(__half, f16, _blocks, true)
