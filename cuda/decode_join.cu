// Joins the parts of the sequences that several blocks of attention_decode.cu
// shared.
//
// Launch: a block of 256 threads a multiprocessor, right after attention_decode.
// There a block stands by from the start where registers and shared memory are
// left for it.
//
// The sum of a column goes the same way whatever ends first, so results are the
// same to the bit. What is on its way at once decides how long this takes: all
// of a column's parts, if they are that few, else an equal share of them.
#include "decode.cuh"

namespace distkv {
namespace {

constexpr uint32_t JOIN_WARPS = 8;

// 4 of a column's elements, over some of its parts.
struct Joined {
    float4 o = {0, 0, 0, 0};
    float max = NO_SCORE, sum = 0;
};

// Joins parts `begin`, `begin + step` and so on, of N columns together, AHEAD parts
// at a time: `element` and the 3 behind it.
template <uint32_t N, uint32_t AHEAD>
__device__ __forceinline__ void join_parts(const DecodeJoin &p, const DecodeCut &cut, const uint32_t (&columns)[N],
                                           uint32_t element, uint32_t begin, uint32_t step, Joined (&to)[N]) {
    // As `part_of` and `state_of` have it: floats of a kv head's part, and of a block's.
    const uint32_t head = DECODE_TILE * (p.head_dim + 2), block = p.together * head;
    uint32_t at[N], state_at[N];
#pragma unroll
    for (uint32_t n = 0; n < N; n++) {
        const uint32_t from = cut.first * 2 * block + columns[n] / cut.columns * head, column = columns[n] % cut.columns;
        at[n] = from + column * p.head_dim + element, state_at[n] = from + DECODE_TILE * p.head_dim + column * 2;
    }
    for (uint32_t base = begin; base < cut.parts; base += AHEAD * step) {
        float4 add[AHEAD][N];
        float2 state[AHEAD][N];
#pragma unroll
        for (uint32_t i = 0; i < AHEAD; i++) {
            const uint32_t part = base + i * step, offset = (2 * part + (part == 0)) * block;
#pragma unroll
            for (uint32_t n = 0; n < N; n++) {
                add[i][n] = {0, 0, 0, 0}, state[i][n] = {NO_SCORE, 0};
                if (part < cut.parts && (N == 1 || columns[n] < p.together * cut.columns)) {
                    add[i][n] = __ldcg(reinterpret_cast<const float4 *>(p.parts + at[n] + offset));
                    state[i][n] = __ldcg(reinterpret_cast<const float2 *>(p.parts + state_at[n] + offset));
                }
            }
        }
#pragma unroll
        for (uint32_t n = 0; n < N; n++) {
            float most = to[n].max;
#pragma unroll
            for (uint32_t i = 0; i < AHEAD; i++)
                most = fmaxf(most, state[i][n].x);
            const float before = fast_exp2(to[n].max - most);
            to[n].max = most, to[n].sum *= before;
            to[n].o.x *= before, to[n].o.y *= before, to[n].o.z *= before, to[n].o.w *= before;
#pragma unroll
            for (uint32_t i = 0; i < AHEAD; i++) {
                const float factor = fast_exp2(state[i][n].x - most);
                to[n].sum += state[i][n].y * factor;
                to[n].o.x += add[i][n].x * factor, to[n].o.y += add[i][n].y * factor;
                to[n].o.z += add[i][n].z * factor, to[n].o.w += add[i][n].w * factor;
            }
        }
    }
}

template <class T>
__device__ __forceinline__ void write(const DecodeJoin &p, const DecodeCut &cut, uint32_t column, uint32_t element,
                                      const Joined &from) {
    const uint64_t head = head_of(cut.row, cut.head + column / cut.columns, column % cut.columns, p.heads, p.kv_heads);
    finish<T>(p.o, p.lse, head, p.head_dim, element, from.o, from.max, from.sum);
}

// A warp has N columns at a time, all parts of them.
template <class T, uint32_t N, uint32_t AHEAD>
__device__ __forceinline__ void join_columns(const DecodeJoin &p, const DecodeCut &cut, uint32_t sharer, uint32_t sharers) {
    const uint32_t all = p.together * cut.columns, warps = sharers * JOIN_WARPS;
    for (uint32_t c = sharer * JOIN_WARPS + threadIdx.x / 32; c < all; c += N * warps)
        for (uint32_t element = threadIdx.x % 32 * 4; element < p.head_dim; element += 128) {
            uint32_t columns[N];
            Joined joined[N];
#pragma unroll
            for (uint32_t n = 0; n < N; n++)
                columns[n] = c + n * warps;
            join_parts<N, AHEAD>(p, cut, columns, element, 0, 1, joined);
#pragma unroll
            for (uint32_t n = 0; n < N; n++)
                if (columns[n] < all)
                    write<T>(p, cut, columns[n], element, joined[n]);
        }
}

// Adds what the lanes have whose number differs in this bit.
__device__ __forceinline__ void add_lanes(Joined &to, uint32_t bit) {
    const auto other = [&](float x) { return __shfl_xor_sync(~0u, x, bit); };
    const float4 o = {other(to.o.x), other(to.o.y), other(to.o.z), other(to.o.w)};
    add_part(to.o, to.max, to.sum, o, {other(to.max), other(to.sum)});
}

// A group of WARPS warps (one, or the block) has SLICE elements of a column at a
// time; 8 lanes have every 4 WARPS-th part.
constexpr uint32_t SLICE = 32;
template <class T, uint32_t WARPS>
__device__ __forceinline__ void join_slices(const DecodeJoin &p, const DecodeCut &cut, uint32_t sharer, uint32_t sharers) {
    __shared__ float4 sums[JOIN_WARPS][SLICE / 4];
    __shared__ float2 states[JOIN_WARPS];
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, slices = (p.head_dim + SLICE - 1) / SLICE;
    const uint32_t group = WARPS == 1 ? sharer * JOIN_WARPS + warp : sharer;
    const uint32_t groups = WARPS == 1 ? sharers * JOIN_WARPS : sharers;
    for (uint32_t i = group; i < p.together * cut.columns * slices; i += groups) {
        const uint32_t columns[1] = {i / slices}, element = i % slices * SLICE + lane % 8 * 4;
        Joined joined[1];
        Joined &all = joined[0];
        if (element < p.head_dim)
            join_parts<1, 5>(p, cut, columns, element, (WARPS == 1 ? 0 : warp * 4) + lane / 8, 4 * WARPS, joined);
        add_lanes(all, 8), add_lanes(all, 16);
        if constexpr (WARPS > 1) {
            __syncthreads();
            if (lane < 8)
                sums[warp][lane] = all.o;
            if (lane == 0)
                states[warp] = {all.max, all.sum};
            __syncthreads();
            if (warp == 0)
                for (uint32_t w = 1; w < WARPS; w++)
                    add_part(all.o, all.max, all.sum, sums[w][lane % 8], states[w]);
        }
        if (lane < 8 && element < p.head_dim && (WARPS == 1 || warp == 0))
            write<T>(p, cut, columns[0], element, all);
    }
}

template <class T> __device__ __forceinline__ void join_cuts(const DecodeJoin &p) {
    launch_next();
    // The plan is older than the kernel before this one: no need to wait.
    const uint32_t cuts = p.cuts[0].row;
    // Blocks share out the cuts, then each its columns.
    const uint32_t sharers = max(gridDim.x / max(cuts, 1u), 1u), first = blockIdx.x / sharers, sharer = blockIdx.x % sharers;
    DecodeCut next = {};
    if (first < cuts)
        next = p.cuts[1 + first];
    wait_for_previous();
    for (uint32_t i = first; i < cuts; i += max(gridDim.x / sharers, 1u)) {
        const DecodeCut cut = i == first ? next : p.cuts[1 + i];
        const uint32_t columns = p.together * cut.columns;
        if (cut.parts > 20 && 2 * SLICE * sharers >= columns * p.head_dim)
            join_slices<T, JOIN_WARPS>(p, cut, sharer, sharers);
        else if (cut.parts > 5)
            join_slices<T, 1>(p, cut, sharer, sharers);
        else if (columns > sharers * JOIN_WARPS)
            join_columns<T, 2, 2>(p, cut, sharer, sharers);
        else
            join_columns<T, 1, 5>(p, cut, sharer, sharers);
    }
}

} // namespace
} // namespace distkv

extern "C" __global__ void __launch_bounds__(256, 4) decode_join_bf16(const __grid_constant__ distkv::DecodeJoin p) {
    distkv::join_cuts<__nv_bfloat16>(p);
}
extern "C" __global__ void __launch_bounds__(256, 4) decode_join_f16(const __grid_constant__ distkv::DecodeJoin p) {
    distkv::join_cuts<__half>(p);
}
