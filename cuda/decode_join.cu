// Joins the parts of the sequences that several blocks of attention_decode.cu
// shared.
//
// Launch: any grid, two blocks an SM serve well, of 256 threads, right after
// attention_decode.
#include "decode.cuh"
namespace distkv {
namespace {

constexpr uint32_t JOIN_WARPS = 8;

// Joins one column's parts, every `step`th from `begin`: 4 elements a lane.
__device__ __forceinline__ void join_parts(const DecodeJoin &p, const DecodeCut &cut, uint32_t kv_head, uint32_t column,
                                           uint32_t element, uint32_t begin, uint32_t step, float4 &o, float &max, float &sum) {
    constexpr uint32_t AHEAD = 5;
    max = NO_SCORE, sum = 0, o = {0, 0, 0, 0};
    for (uint32_t base = begin; base < cut.parts; base += AHEAD * step) {
        float2 state[AHEAD];
        float4 add[AHEAD];
#pragma unroll
        for (uint32_t i = 0; i < AHEAD; i++) {
            const uint32_t part = base + i * step;
            state[i] = {NO_SCORE, 0}, add[i] = {0, 0, 0, 0};
            if (part < cut.parts) {
                float *from = part_of(p.parts, cut.first + part, part == 0, p.together, kv_head, p.head_dim);
                state[i] = *state_of(from, column, p.head_dim);
                add[i] = *reinterpret_cast<const float4 *>(from + column * p.head_dim + element);
            }
        }
        float most = max;
#pragma unroll
        for (uint32_t i = 0; i < AHEAD; i++)
            most = fmaxf(most, state[i].x);
        const float before = fast_exp2(max - most);
        max = most, sum *= before, o.x *= before, o.y *= before, o.z *= before, o.w *= before;
#pragma unroll
        for (uint32_t i = 0; i < AHEAD; i++) {
            const float factor = fast_exp2(state[i].x - max);
            sum += state[i].y * factor;
            o.x += add[i].x * factor, o.y += add[i].y * factor, o.z += add[i].z * factor, o.w += add[i].w * factor;
        }
    }
}

template <class T> __device__ __forceinline__ void join_cuts(const DecodeJoin &p) {
    __shared__ float4 others[JOIN_WARPS][32];
    __shared__ float2 states[JOIN_WARPS];
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    launch_next();
    // The plan is older than the kernel before this one: no need to wait.
    const uint32_t cuts = p.cuts[0].row;
    // Blocks share out the cuts, then each its rows.
    const uint32_t sharers = max(gridDim.x / max(cuts, 1u), 1u);
    DecodeCut next = {};
    if (blockIdx.x / sharers < cuts)
        next = p.cuts[1 + blockIdx.x / sharers];
    wait_for_previous();
    for (uint32_t i = blockIdx.x / sharers; i < cuts; i += max(gridDim.x / sharers, 1u)) {
        const DecodeCut cut = i == blockIdx.x / sharers ? next : p.cuts[1 + i];
        const uint32_t columns = p.together * cut.columns;
        // Many parts: all warps on one column. Few: a column each.
        const uint32_t helpers = cut.parts > 8 ? JOIN_WARPS : 1;
        for (uint32_t c = blockIdx.x % sharers * (JOIN_WARPS / helpers); c < columns; c += sharers * (JOIN_WARPS / helpers)) {
            const uint32_t mine = c + (helpers == 1 ? warp : 0), kv_head = mine / cut.columns, column = mine % cut.columns;
            const uint64_t head = head_of(cut.row, cut.head + kv_head, column, p.heads, p.kv_heads);
            for (uint32_t base = 0; base < p.head_dim; base += 128) {
                const uint32_t element = base + lane * 4;
                const bool inside = mine < columns && element < p.head_dim;
                float4 o = {0, 0, 0, 0};
                float max = NO_SCORE, sum = 0;
                if (inside)
                    join_parts(p, cut, kv_head, column, element, helpers == 1 ? 0 : warp, helpers, o, max, sum);
                if (helpers > 1) {
                    others[warp][lane] = o;
                    if (lane == 0)
                        states[warp] = {max, sum};
                    __syncthreads();
                    if (warp == 0) {
                        float most = NO_SCORE;
                        for (uint32_t w = 0; w < JOIN_WARPS; w++)
                            most = fmaxf(most, states[w].x);
                        o = {0, 0, 0, 0}, max = most, sum = 0;
                        for (uint32_t w = 0; w < JOIN_WARPS; w++) {
                            const float factor = fast_exp2(states[w].x - most);
                            const float4 add = others[w][lane];
                            sum += states[w].y * factor;
                            o.x += add.x * factor, o.y += add.y * factor, o.z += add.z * factor, o.w += add.w * factor;
                        }
                    }
                    __syncthreads();
                }
                if (inside && (helpers == 1 || warp == 0))
                    finish<T>(p.o, p.lse, head, p.head_dim, element, o, max, sum);
            }
        }
    }
}

} // namespace
} // namespace distkv

extern "C" __global__ void __launch_bounds__(256) decode_join_bf16(const __grid_constant__ distkv::DecodeJoin p) {
    distkv::join_cuts<__nv_bfloat16>(p);
}
extern "C" __global__ void __launch_bounds__(256) decode_join_f16(const __grid_constant__ distkv::DecodeJoin p) {
    distkv::join_cuts<__half>(p);
}
