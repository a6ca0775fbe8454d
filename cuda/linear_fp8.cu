// Linear layers of nine to 32 rows with FP8 weights, which stay FP8 in memory:
// activations are 16 bits wide, sums f32, and codes are widened in registers.
//
// A block takes a tile of 128 features: four warps abreast, 32 features each, in
// groups that take blocks of 128 elements of `in` in turn. Every weight is used
// by one thread alone, so each thread brings its own into shared memory, in a
// ring, and takes them out again: no thread waits for another over weights. x
// goes through registers into a slab of shared memory that all warps share, the
// next slab's on its way while this one is multiplied.
//
// On Hopper the blocks of a cluster share a tile and split `in`; sums meet in
// shared memory and are added in the same order always, so results do not depend
// on timing. The first weights are under way before the kernel before is done.
//
// With a scale for each 128 elements of `in`, sums are taken over 128 elements,
// scaled and added in f32; otherwise the whole sum is scaled.
#include "linear_fp8.cuh"

namespace distkv {

namespace fp8 {

constexpr uint32_t TILE = 128;                // features a block
constexpr uint32_t ABREAST = 4;               // warps of a group
constexpr uint32_t OF_WARP = TILE / ABREAST;  // features a warp: two bricks'
constexpr uint32_t STAGE_BYTES = 2 * FP8_BRICK; // of a warp
constexpr uint32_t PITCH = TILE + 4;          // f32 from a row of sums to the next

// What depends on the rows, in eights, and on the scales.
template <uint32_t N, bool BLOCKS>
struct Size {
    static constexpr uint32_t ROWS = 8 * N;
    // Up to 16 rows two blocks fit a multiprocessor; with more, one of as many
    // threads, but for the registers that block scales take.
    static constexpr uint32_t GROUPS = N == 4 && !BLOCKS ? 4 : 2;
    static constexpr uint32_t WARPS = ABREAST * GROUPS, THREADS = 32 * WARPS;
    static constexpr uint32_t STAGES = GROUPS == 4 ? 4 : 5;
    static constexpr uint32_t SLAB_BLOCKS = 4;                    // of 128 elements
    static constexpr uint32_t SLAB = SLAB_BLOCKS * FP8_BLOCK;     // elements of a row
    static constexpr uint32_t SLAB_PITCH = SLAB * 2 + 16;         // bytes; rows begin in different banks
    static constexpr uint32_t PIECES = ROWS * SLAB / 8 / THREADS; // of 16 bytes of a slab, a thread
    static constexpr uint32_t RING = STAGES * WARPS * STAGE_BYTES;
    static constexpr uint32_t SHARED = RING + 2 * ROWS * SLAB_PITCH;
    static_assert(GROUPS * ROWS * PITCH * 4 <= RING, "sums take the ring's place");
    static_assert(SLAB_BLOCKS % GROUPS == 0 && PIECES > 0, "each group has its share of a slab");
};

// A block's place in the product.
struct Place {
    uint32_t tile;       // of the matrix
    uint32_t rank;       // of the blocks that share it
    uint32_t begin, end; // blocks of `in`
    uint32_t half;       // features of gate, with SwiGLU
    __device__ __forceinline__ explicit Place(const LinearFp8 &p) {
        const uint32_t blocks = (p.in_features + FP8_BLOCK - 1) / FP8_BLOCK;
        tile = blockIdx.x / p.splits;
        rank = blockIdx.x - tile * p.splits;
        begin = blocks * rank / p.splits;
        end = blocks * (rank + 1) / p.splits;
        half = p.out_features / 2;
    }
    // The feature of the matrix that is the block's `local`th; with SwiGLU each
    // warp has 16 of gate and the 16 of up that go with them. Beyond the matrix:
    // out_features.
    __device__ __forceinline__ uint32_t feature(const LinearFp8 &p, uint32_t local) const {
        if (p.end != SWIGLU) {
            return min(tile * TILE + local, p.out_features);
        }
        const uint32_t gate = tile * TILE / 2 + local / 32 * 16 + local % 16;
        return gate < half ? gate + (local % 32 < 16 ? 0 : half) : p.out_features;
    }
};

// The weights of a lane: its 16 bytes of each half of its warp's two bricks.
struct Weights {
    const uint8_t *brick[2]; // at element 0 of `in`
    __device__ __forceinline__ Weights(const LinearFp8 &p, const Place &at, uint32_t abreast, uint32_t lane) {
        const uint32_t bricks = (p.out_features + 15) / 16;
        const uint64_t row = uint64_t((p.in_features + FP8_BLOCK - 1) / FP8_BLOCK) * (2 * FP8_BRICK);
#pragma unroll
        for (uint32_t m = 0; m < 2; m++) {
            const uint32_t first = p.end == SWIGLU ? at.tile * 4 + abreast + m * at.half / 16 : at.tile * 8 + abreast * 2 + m;
            // What is beyond the matrix is not stored: any weights will do.
            brick[m] = static_cast<const uint8_t *>(p.weights) + min(first, bricks - 1) * row + lane * 16;
        }
    }
    // Those of stage `k` of the matrix, to `slot`.
    __device__ __forceinline__ void bring(uint32_t slot, uint32_t k) const {
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            copy_16(slot + i * 512, brick[i / 2] + k * FP8_BRICK + i % 2 * 512);
        }
    }
};

// A slab of x, held by the block's threads.
template <class T, uint32_t N, bool BLOCKS>
struct Slab {
    static constexpr uint32_t THREADS = Size<N, BLOCKS>::THREADS;
    uint4 piece[Size<N, BLOCKS>::PIECES];
    __device__ __forceinline__ void fetch(const LinearFp8 &p, uint32_t k, uint32_t rows) {
#pragma unroll
        for (uint32_t i = 0; i < Size<N, BLOCKS>::PIECES; i++) {
            const uint32_t index = i * THREADS + threadIdx.x, row = index / (Size<N, BLOCKS>::SLAB / 8);
            const uint32_t at = k + index % (Size<N, BLOCKS>::SLAB / 8) * 8;
            const T *from = static_cast<const T *>(p.x) + uint64_t(row) * p.x_stride + at;
            const bool there = row < rows && at < p.in_features;
            piece[i] = there ? *reinterpret_cast<const uint4 *>(from) : make_uint4(0, 0, 0, 0);
        }
    }
    __device__ __forceinline__ void put(uint32_t to) const {
#pragma unroll
        for (uint32_t i = 0; i < Size<N, BLOCKS>::PIECES; i++) {
            const uint32_t index = i * THREADS + threadIdx.x, row = index / (Size<N, BLOCKS>::SLAB / 8);
            const uint32_t column = index % (Size<N, BLOCKS>::SLAB / 8);
            const uint4 v = piece[i];
            write_16(to + row * Size<N, BLOCKS>::SLAB_PITCH + column * 16,
                     make_uint4(Lift<T>::up(v.x), Lift<T>::up(v.y), Lift<T>::up(v.z), Lift<T>::up(v.w)));
        }
    }
};

// The stage at `slot` times x from `x` on.
template <class T, uint32_t N, bool BLOCKS>
__device__ __forceinline__ void multiply_stage(float (&sums)[2][N][4], uint32_t slot, uint32_t x) {
    uint4 w[4], b[N][2];
#pragma unroll
    for (uint32_t i = 0; i < 4; i++) {
        w[i] = read_16(slot + i * 512);
    }
#pragma unroll
    for (uint32_t n = 0; n < N; n++) {
        b[n][0] = read_16(x + n * 8 * Size<N, BLOCKS>::SLAB_PITCH);
        b[n][1] = read_16(x + n * 8 * Size<N, BLOCKS>::SLAB_PITCH + 16);
    }
#pragma unroll
    for (uint32_t j = 0; j < 4; j++) {
#pragma unroll
        for (uint32_t m = 0; m < 2; m++) {
            uint32_t a[4];
            Codes<T>::widen(word(w[m * 2], j), a[0], a[2]);
            Codes<T>::widen(word(w[m * 2 + 1], j), a[1], a[3]);
#pragma unroll
            for (uint32_t n = 0; n < N; n++) {
                multiply(sums[m][n], a, word(b[n][j / 2], j % 2 * 2), word(b[n][j / 2], j % 2 * 2 + 1), T());
            }
        }
    }
}

template <class T, uint32_t N, bool BLOCKS>
struct Finish {
    static constexpr uint32_t THREADS = Size<N, BLOCKS>::THREADS, GROUPS = Size<N, BLOCKS>::GROUPS;
    const LinearFp8 &p;
    const Place &at;
    uint32_t sums; // this block's, [GROUPS][ROWS][PITCH]

    // Four of the block's features of a row, scaled, with the bias.
    __device__ __forceinline__ void total(float (&y)[4], uint32_t row, uint32_t local, uint32_t feature) const {
        y[0] = y[1] = y[2] = y[3] = 0.0f;
        const uint32_t from = sums + (row * PITCH + local) * 4;
        for (uint32_t s = 0; s < p.splits; s++) {
#pragma unroll
            for (uint32_t g = 0; g < GROUPS; g++) {
                const float4 v = read_sums(from + g * Size<N, BLOCKS>::ROWS * PITCH * 4, s);
                y[0] += v.x;
                y[1] += v.y;
                y[2] += v.z;
                y[3] += v.w;
            }
        }
        finish_sums<T, BLOCKS>(p, y, feature);
    }

    // This block's share of the tile's outputs.
    __device__ __forceinline__ void run(uint32_t rows) const {
        const uint32_t row_quads = p.end == SWIGLU ? TILE / 8 : TILE / 4;
        for (uint32_t i = at.rank * THREADS + threadIdx.x; i < rows * row_quads; i += p.splits * THREADS) {
            const uint32_t row = i / row_quads, quad = i - row * row_quads;
            float y[4];
            if (p.end == SWIGLU) {
                const uint32_t local = quad / 4 * 32 + quad % 4 * 4, feature = at.tile * TILE / 2 + quad * 4;
                if (feature < at.half) {
                    float up[4];
                    total(y, row, local, feature);
                    total(up, row, local + 16, at.half + feature);
#pragma unroll
                    for (uint32_t j = 0; j < 4; j++) {
                        y[j] = silu_times(y[j], up[j]);
                    }
                    put(static_cast<T *>(p.out), y, row, feature, at.half);
                }
                continue;
            }
            const uint32_t feature = at.tile * TILE + quad * 4;
            if (feature >= p.out_features) {
                continue;
            }
            total(y, row, quad * 4, feature);
            store_sums<T>(p, y, row, feature);
        }
    }
};

// All blocks that share a tile; what they wrote to shared memory is then seen.
__device__ __forceinline__ void meet(uint32_t splits) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (splits > 1) {
        cluster_sync();
        return;
    }
#endif
    __syncthreads();
}

} // namespace fp8

template <class T, uint32_t N, bool BLOCKS>
__device__ __forceinline__ void linear_fp8(const LinearFp8 &p) {
    using namespace fp8;
    using S = Size<N, BLOCKS>;
    constexpr uint32_t GROUPS = S::GROUPS;
    extern __shared__ __align__(16) uint8_t shared[];
    const uint32_t ring = shared_address(shared), slabs = ring + S::RING;
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, abreast = warp % ABREAST, group = warp / ABREAST;
    const Place at(p);
    const Weights weights(p, at, abreast, lane);
    // This group's blocks of `in` are one of GROUPS; a stage is half a block.
    const uint32_t blocks = at.end - at.begin, stages = (blocks + GROUPS - 1 - group) / GROUPS * 2;
    const uint32_t slots = ring + warp * S::STAGES * STAGE_BYTES + lane * 16;
    uint32_t ahead = 0, ahead_slot = 0; // the next stage to bring, and where to
    const auto bring = [&] {
        if (ahead < stages) {
            const uint32_t block = at.begin + ahead / 2 * GROUPS + group;
            weights.bring(slots + ahead_slot * STAGE_BYTES, block * 2 + ahead % 2);
        }
        ahead++;
        ahead_slot = ahead_slot + 1 == S::STAGES ? 0 : ahead_slot + 1;
        copies_commit();
    };
#pragma unroll
    for (uint32_t i = 0; i + 1 < S::STAGES; i++) {
        bring();
    }
    // With block scales: of the lane's four features.
    uint32_t scales[4];
#pragma unroll
    for (uint32_t i = 0; BLOCKS && i < 4; i++) {
        const uint32_t f = min(at.feature(p, abreast * OF_WARP + i * 8 + lane / 4), p.out_features - 1);
        scales[i] = (f >> p.scale_shift) * p.scale_cols + at.begin + group;
    }
    const uint32_t used = *reinterpret_cast<const volatile uint32_t *>(p.rows);
    const uint32_t rows = used > p.first ? min(used - p.first, S::ROWS) : 0;
    launch_next();
    wait_for_previous();

    Slab<T, N, BLOCKS> next;
    next.fetch(p, at.begin * FP8_BLOCK, rows);
    next.put(slabs);
    __syncthreads();
    float sums[2][N][4] = {};
    uint32_t stage = 0, slot = 0;
    for (uint32_t slab = 0; slab * S::SLAB_BLOCKS < blocks; slab++) {
        const bool more = (slab + 1) * S::SLAB_BLOCKS < blocks;
        if (more) {
            next.fetch(p, (at.begin + (slab + 1) * S::SLAB_BLOCKS) * FP8_BLOCK, rows);
        }
        const uint32_t here = slabs + slab % 2 * S::ROWS * S::SLAB_PITCH;
        // A lane's x: rows l / 4, 16 elements of a stage.
        uint32_t x = here + lane / 4 * S::SLAB_PITCH + lane % 4 * 32 + group * FP8_BLOCK * 2;
        const uint32_t last = min(stages, (slab + 1) * S::SLAB_BLOCKS / GROUPS * 2);
        for (; stage < last; stage += 2, x += GROUPS * FP8_BLOCK * 2) {
            float scale[4];
            float part[2][N][4];
            if (BLOCKS) {
#pragma unroll
                for (uint32_t i = 0; i < 4; i++) {
                    scale[i] = p.scales[scales[i]];
                    scales[i] += GROUPS;
                }
#pragma unroll
                for (uint32_t i = 0; i < 2 * N * 4; i++) {
                    part[i / (N * 4)][i / 4 % N][i % 4] = 0.0f;
                }
            }
#pragma unroll
            for (uint32_t half = 0; half < 2; half++) {
                copies_wait<S::STAGES - 2>();
                multiply_stage<T, N, BLOCKS>(BLOCKS ? part : sums, slots + slot * STAGE_BYTES, x + half * FP8_BLOCK);
                slot = slot + 1 == S::STAGES ? 0 : slot + 1;
                bring();
            }
            if (BLOCKS) {
#pragma unroll
                for (uint32_t i = 0; i < 2 * N * 4; i++) {
                    const uint32_t m = i / (N * 4), n = i / 4 % N, v = i % 4;
                    sums[m][n][v] += part[m][n][v] * scale[m * 2 + v / 2];
                }
            }
        }
        if (more) {
            next.put(slabs + (slab + 1) % 2 * S::ROWS * S::SLAB_PITCH);
            __syncthreads();
        }
    }
    copies_wait<0>();
    __syncthreads(); // the ring is read
    float *to = reinterpret_cast<float *>(shared) + group * S::ROWS * PITCH + abreast * OF_WARP + lane / 4;
#pragma unroll
    for (uint32_t i = 0; i < 2 * N * 4; i++) {
        const uint32_t m = i / (N * 4), n = i / 4 % N, v = i % 4;
        to[(n * 8 + lane % 4 * 2 + v % 2) * PITCH + m * 16 + v / 2 * 8] = sums[m][n][v];
    }
    meet(p.splits);
    Finish<T, N, BLOCKS>{p, at, ring}.run(rows);
    if (p.splits > 1) {
        meet(p.splits); // peers may still read the sums of this block
    }
}

} // namespace distkv

// Blocks of Size::THREADS threads, `splits` for each tile; on Hopper these are a
// cluster, elsewhere `splits` is 1. Size::SHARED bytes of dynamic shared memory.
#define DISTKV_FP8(N, T, rows, name, blocks, BLOCKS)                                                                   \
    extern "C" __global__ void __launch_bounds__(distkv::fp8::Size<N, BLOCKS>::THREADS, N == 4 ? 1 : 2)                \
        linear_fp8##blocks##_m##rows##_##name(const __grid_constant__ distkv::LinearFp8 p) {                           \
        distkv::linear_fp8<T, N, BLOCKS>(p);                                                                           \
    }
#define DISTKV_FP8_ROWS(T, name, blocks, BLOCKS)                                                                       \
    DISTKV_FP8(2, T, 16, name, blocks, BLOCKS)                                                                         \
    DISTKV_FP8(4, T, 32, name, blocks, BLOCKS)
DISTKV_FP8_ROWS(__nv_bfloat16, bf16, , false)
DISTKV_FP8_ROWS(__nv_bfloat16, bf16, _blocks, true)
DISTKV_FP8_ROWS(__half, f16, , false)
DISTKV_FP8_ROWS(__half, f16, _blocks, true)
