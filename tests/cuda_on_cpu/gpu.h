// A GPU whose threads are fibers of one thread of the CPU: what kernels and their
// headers take from the language, and from barrier.cuh, cluster.cuh, copies.cuh,
// wgmma.cuh, words.cuh and rows.cuh, in whose place this stands; matrix.h stands in
// that of matrix.cuh and e4m3.cuh.
//
// Which thread goes on is drawn from a seed, blocks and warps of a sudden faster or
// slower than others; copies, sums sent to another block and words stored without a
// fence happen at a moment that is drawn, whatever came before. What waits for ever
// ends the program. The same seed gives the same run.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#include "language.h"

// ---- The language ----

#define __global__
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__
#define __align__(n)
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct __half {
    _Float16 value;
};
struct Index {
    uint32_t x;
};
static Index threadIdx, blockIdx, gridDim;

// A matrix in the device's memory and a box of it, as the copy engine knows them; the
// first stride is an element's.
struct alignas(128) CUtensorMap {
    const uint8_t *base;
    uint64_t strides[5]; // bytes
    uint32_t dims[5], box[5];
    uint32_t rank;
    uint32_t swizzle; // of 128 bytes (0), of 64 (1), none (2)
    uint64_t unused[4];
};
static_assert(sizeof(CUtensorMap) == 128, "as on a GPU");

// Strides in elements, from the second dimension on.
static CUtensorMap matrix(const void *base, std::vector<uint32_t> dims, std::vector<uint64_t> strides, std::vector<uint32_t> box) {
    CUtensorMap map{static_cast<const uint8_t *>(base)};
    map.rank = dims.size();
    for (uint32_t d = 0; d < map.rank; d++)
        map.dims[d] = dims[d], map.strides[d] = d == 0 ? 2 : strides[d - 1] * 2, map.box[d] = box[d];
    return map;
}

// ---- Fibers ----

namespace gpu {

constexpr uint32_t SHARED_BASE = 1024, SHARED_BYTES = 232448, BLOCK_SHIFT = 20, CLUSTER = 2, BARRIERS = 128;
constexpr size_t STACK = 48 << 10;
constexpr uint64_t MOST_STEPS = 40'000'000;

using Waiting = std::vector<uint32_t>; // fibers

struct Fiber {
    ucontext_t begin;
    jmp_buf at; // since it began: unlike a context, nothing is asked of the system
    bool began;
    std::unique_ptr<char[]> stack;
    uint32_t block, thread;
    uint32_t left; // the cluster's phase in which it arrived
    uint32_t copies; // of its own that have not landed
    Waiting landing;
    std::vector<std::function<void()>> multiplications;
    std::vector<std::vector<std::function<void()>>> groups; // of multiplications
};

// A barrier in shared memory.
struct Barrier {
    uint32_t count = 0, pending = 0, phase = 0;
    int64_t bytes = 0;
    Waiting waiting;
};

// One of a block, of a warp or of a cluster.
struct Meeting {
    uint32_t come = 0, phase = 0;
    bool any = false, result = false;
    Waiting waiting;
};

struct Block {
    std::vector<uint8_t> shared;
    Barrier barriers[BARRIERS];
    Meeting named[16];
    std::vector<Meeting> warps;
    std::vector<uint64_t> lanes;
    Waiting ready;
    uint32_t speed = 1, slow = 0; // beside other blocks; the warp that is slow
};

static std::mt19937_64 source;
static std::vector<Fiber> fibers;
static std::vector<Block> blocks;
static std::vector<Meeting> clusters;
using Events = std::vector<std::function<void()>>;
static Events pending, crumbs, stores; // what happens by itself: boxes, copies of threads, words
static uint32_t lateness = 1; // of copies, up to six; more than one where nobody spins
static jmp_buf scheduler;
static uint32_t here, clock_now, ended;
static uint32_t barriers_at = SHARED_BASE; // where a block's barriers begin
static std::function<void()> kernel;
// What the kernel before writes, which is there only when that one is over.
static std::function<void()> previous;
static bool over;
static Waiting before;

static uint32_t draw(uint32_t below) { return source() % below; }

[[noreturn]] static void fail(const char *why) {
    printf("%s\n", why);
    fflush(stdout);
    _Exit(1);
}

static Fiber &me() { return fibers[here]; }
static Block &my_block() { return blocks[me().block]; }

static void switch_away() {
    if (_setjmp(me().at) == 0)
        _longjmp(scheduler, 1);
}
static void yield() {
    my_block().ready.push_back(here);
    switch_away();
}
static void wake(Waiting &waiting) {
    for (uint32_t fiber : waiting)
        blocks[fibers[fiber].block].ready.push_back(fiber);
    waiting.clear();
}
static void wait(Waiting &waiting) {
    waiting.push_back(here);
    switch_away();
}

static void run_fiber() {
    kernel();
    ended++;
    _longjmp(scheduler, 1);
}

// Until it waits, or lets others go on.
static void __attribute__((noinline)) go_on(Fiber &fiber) {
    if (_setjmp(scheduler) != 0)
        return;
    if (fiber.began)
        _longjmp(fiber.at, 1);
    fiber.began = true;
    setcontext(&fiber.begin);
}

static void happen(Events &events) {
    std::swap(events[draw(events.size())], events.back());
    const auto what = std::move(events.back());
    events.pop_back();
    what();
}

// Runs a kernel to its end: so many blocks of so many threads; or of a grid of `all`
// those from `first` on.
static void launch(uint64_t seed, uint32_t count, uint32_t threads, std::function<void()> what, uint32_t first = 0, uint32_t all = 0) {
    source.seed(seed);
    const uint32_t late = 8u << 3 * draw(3);
    kernel = std::move(what);
    gridDim.x = max(count, all), ended = 0, over = !previous;
    // One step of so many, a box, a thread's copy, a word, or the kernel before is over.
    const uint32_t chances[] = {8u << 3 * draw(lateness), 8u << 3 * draw(lateness), late, 1u << 2 * draw(7)};
    Events *const events[] = {&pending, &crumbs, &stores};
    blocks.assign(count, {});
    clusters.assign(count / CLUSTER, {});
    fibers.resize(count * threads);
    for (Block &block : blocks) {
        block.shared.assign(SHARED_BASE + SHARED_BYTES, 0xff);
        block.warps.resize(threads / 32), block.lanes.resize(threads);
    }
    for (uint32_t i = 0; i < fibers.size(); i++) {
        Fiber &fiber = fibers[i];
        if (!fiber.stack)
            fiber.stack.reset(new char[STACK]);
        fiber.block = i / threads, fiber.thread = i % threads, fiber.copies = 0;
        fiber.began = false;
        getcontext(&fiber.begin);
        fiber.begin.uc_stack.ss_sp = fiber.stack.get(), fiber.begin.uc_stack.ss_size = STACK;
        fiber.begin.uc_link = nullptr;
        makecontext(&fiber.begin, run_fiber, 0);
        blocks[fiber.block].ready.push_back(i);
    }
    for (uint64_t step = 0;; step++) {
        if (step == MOST_STEPS)
            fail("it does not end");
        if (step % 4096 == 0)
            for (Block &block : blocks)
                block.speed = 1u << 2 * draw(5), block.slow = draw(threads / 32);
        uint32_t can = 0;
        for (Block &block : blocks)
            can += block.ready.empty() ? 0 : block.speed;
        // What happens by itself: where nobody can go on, any of it.
        const uint32_t from = can == 0 ? draw(4) : 0;
        bool happened = false;
        for (uint32_t i = 0; i < 4 && !happened; i++) {
            const uint32_t kind = (from + i) % 4;
            happened = (kind < 3 ? !events[kind]->empty() : !over) && (can == 0 || draw(chances[kind]) == 0);
            if (happened && kind < 3)
                happen(*events[kind]);
            else if (happened)
                previous(), over = true, wake(before);
        }
        if (happened)
            continue;
        if (can == 0)
            break;
        uint32_t at = draw(can), b = 0;
        for (;; b++) {
            const uint32_t speed = blocks[b].ready.empty() ? 0 : blocks[b].speed;
            if (at < speed)
                break;
            at -= speed;
        }
        Waiting &ready = blocks[b].ready;
        for (uint32_t again = 0; again < 8; again++) {
            std::swap(ready[draw(ready.size())], ready.back());
            if (fibers[ready.back()].thread / 32 != blocks[b].slow)
                break;
        }
        here = ready.back();
        ready.pop_back();
        threadIdx.x = me().thread, blockIdx.x = first + me().block;
        go_on(me());
    }
    if (ended < fibers.size())
        fail("threads wait for ever");
}

// Comes to a meeting of `count`; whether it is complete with that.
static bool come(Meeting &meeting, uint32_t count, bool any = false) {
    meeting.any |= any;
    if (++meeting.come < count)
        return false;
    if (meeting.come > count)
        fail("more threads came to a barrier than it has");
    meeting.come = 0, meeting.phase++, meeting.result = meeting.any, meeting.any = false;
    wake(meeting.waiting);
    return true;
}

static void meet(Meeting &meeting, uint32_t count, bool any = false) {
    if (!come(meeting, count, any))
        wait(meeting.waiting);
}

static Meeting &my_warp() { return my_block().warps[threadIdx.x / 32]; }

// What another lane of the warp has.
static uint64_t exchange(uint64_t mine, uint32_t lane) {
    const uint32_t first = threadIdx.x / 32 * 32;
    my_block().lanes[threadIdx.x] = mine;
    meet(my_warp(), 32);
    const uint64_t other = my_block().lanes[first + lane % 32];
    meet(my_warp(), 32);
    return other;
}

// ---- Shared memory ----

static uint32_t block_at(uint32_t at) { return at >> BLOCK_SHIFT ? (at >> BLOCK_SHIFT) - 1 : me().block; }
static uint32_t offset_at(uint32_t at) { return at & ((1u << BLOCK_SHIFT) - 1); }
static uint8_t *memory(uint32_t block, uint32_t offset, uint32_t bytes) {
    if (offset < SHARED_BASE || offset + bytes > SHARED_BASE + SHARED_BYTES || offset % min(bytes, 16u) != 0)
        fail("an access beyond shared memory, or not aligned");
    return blocks[block].shared.data() + offset;
}

static Barrier &barrier(uint32_t block, uint32_t offset) {
    if (offset % 8 != 0 || (offset - barriers_at) / 8 >= BARRIERS)
        fail("no place for a barrier");
    return blocks[block].barriers[(offset - barriers_at) / 8];
}

static void settle(Barrier &barrier) {
    if (barrier.pending == 0 && barrier.bytes == 0) {
        barrier.pending = barrier.count, barrier.phase++;
        wake(barrier.waiting);
    }
}

static void arrive(Barrier &barrier) {
    if (barrier.pending == 0)
        fail("more arrivals at a barrier than it was made for");
    barrier.pending--;
    settle(barrier);
}

static void land(Barrier &barrier, uint32_t bytes) {
    barrier.bytes -= bytes;
    settle(barrier);
}

// Where the copy engine puts what lies at `at` of a matrix, and the matrix unit looks
// for it: 16 bytes of a row of 128 (of 64) change places by the row.
static uint32_t swizzled(uint32_t at, uint32_t swizzle = 0) {
    constexpr uint32_t ROWS[] = {7, 3, 0};
    return at ^ (at >> 7 & ROWS[swizzle]) << 4;
}

// A box that goes no further than the cache.
static void fetch(const CUtensorMap &map, const std::vector<uint32_t> &first) {
    for (uint32_t d = 0; d < map.rank; d++)
        if (first[d] >= map.dims[d])
            fail("a box that lies outside is fetched");
}

// A box, 16-bit elements, zeros outside of the tensor.
static void copy(uint32_t block, uint32_t to, const CUtensorMap &map, const std::vector<uint32_t> &first, uint32_t landing) {
    pending.push_back([=, &map] {
        uint32_t elements = 1;
        for (uint32_t d = 0; d < map.rank; d++)
            elements *= map.box[d];
        for (uint32_t i = 0; i < elements; i++) {
            const uint8_t *from = map.base;
            bool inside = true;
            for (uint32_t d = 0, left = i; d < map.rank; left /= map.box[d], d++) {
                const uint32_t place = first[d] + left % map.box[d];
                inside &= place < map.dims[d];
                from += place * map.strides[d];
            }
            uint16_t bits = 0;
            if (inside)
                memcpy(&bits, from, 2);
            memcpy(memory(block, swizzled(to + i * 2, map.swizzle), 2), &bits, 2);
        }
        land(barrier(block, landing), elements * 2);
    });
}

} // namespace gpu

static void __syncthreads() { gpu::meet(gpu::my_block().named[0], gpu::my_block().lanes.size()); }
static void __syncwarp() { gpu::meet(gpu::my_warp(), 32); }
static uint32_t __shfl_sync(uint32_t, uint32_t x, uint32_t lane) { return gpu::exchange(x, lane); }
static float __shfl_xor_sync(uint32_t, float x, uint32_t mask) {
    const uint32_t other = gpu::exchange(__float_as_uint(x), threadIdx.x % 32 ^ mask);
    memcpy(&x, &other, 4);
    return x;
}
static void *__cvta_shared_to_generic(uint32_t at) { return gpu::memory(gpu::block_at(at), gpu::offset_at(at), 4); }
static float __fdividef(float a, float b) { return a / b; }
#define __expf expf

namespace distkv {

static uint8_t shared[1]; // what a kernel calls its memory

// ---- rows.cuh ----

static float to_float(__half x) { return float(x.value); }
template <> __half from_float<__half>(float x) { return {_Float16(x)}; }
template <> float from_float<float>(float x) { return x; }
static float to_float(float x) { return x; }
template <uint32_t N, class T> T *run_at(T *p) {
    if (reinterpret_cast<uint64_t>(p) % min(N * sizeof(T), size_t(16)) != 0)
        gpu::fail("a run that is not aligned");
    return p;
}
template <uint32_t N, class T> void load(const T *from, float (&to)[N]) {
    for (uint32_t i = 0; i < N; i++)
        to[i] = to_float(run_at<N>(from)[i]);
}
template <uint32_t N, class T> void store(T *to, const float (&from)[N]) {
    for (uint32_t i = 0; i < N; i++)
        run_at<N>(to)[i] = from_float<T>(from[i]);
}
static float lanes_sum(float x, uint32_t lanes = 32) {
    for (uint32_t step = lanes / 2; step > 0; step /= 2)
        x += __shfl_xor_sync(~0u, x, step);
    return x;
}

// ---- words.cuh ----

static uint32_t load_word(const uint32_t *from) {
    gpu::yield();
    return *from;
}
static uint32_t acquire_word(const uint32_t *from) { return load_word(from); }
static float2 load_words(const float *from) {
    gpu::yield();
    return {from[0], from[1]};
}
static void store_word(void *to, uint32_t v) {
    gpu::stores.push_back([=] { memcpy(to, &v, 4); });
}
static void store_words(void *to, uint2 v) {
    store_word(to, v.x);
    store_word(static_cast<uint32_t *>(to) + 1, v.y);
}
static void add_to_word(uint32_t *to, uint32_t v) {
    *to += v;
    gpu::yield();
}
static void fence_stores() { gpu::yield(); } // other stores are at once seen here
static void fence_copies() {}

// ---- barrier.cuh ----

// What is not in the block's memory is what a kernel calls all of it.
static uint32_t shared_address(const void *p) {
    const uint64_t at = static_cast<const uint8_t *>(p) - gpu::my_block().shared.data();
    return at < gpu::my_block().shared.size() ? at : gpu::SHARED_BASE;
}
static void wait_for_previous() {
    gpu::yield();
    if (!gpu::over)
        gpu::wait(gpu::before);
}
static void launch_next() {}
static void begin_kernel() { wait_for_previous(); } // of rows.cuh
static gpu::Barrier &barrier_at(uint32_t at) { return gpu::barrier(gpu::block_at(at), gpu::offset_at(at)); }
static void barrier_init(uint32_t at, uint32_t arrivals) { barrier_at(at).count = barrier_at(at).pending = arrivals; }
static void barrier_init_done() {}
static void barrier_arrive(uint32_t at) { gpu::arrive(barrier_at(at)); }
static void barrier_arrive_expect(uint32_t at, uint32_t bytes) {
    barrier_at(at).bytes += bytes;
    gpu::arrive(barrier_at(at));
}
static void barrier_wait(uint32_t at, uint32_t parity) {
    gpu::yield();
    while (barrier_at(at).phase % 2 == parity)
        gpu::wait(barrier_at(at).waiting);
}
static void sync_threads(uint32_t threads) { gpu::meet(gpu::my_block().named[1], threads); }
static bool any_of_threads(uint32_t threads, bool so) {
    gpu::meet(gpu::my_block().named[1], threads, so);
    return gpu::my_block().named[1].result;
}

static void barrier_arrive_at(uint32_t at, uint32_t rank) {
    gpu::arrive(gpu::barrier(gpu::me().block / gpu::CLUSTER * gpu::CLUSTER + rank, at));
}
// Says no at times, and else waits, as who asks for ever is not seen to hang.
static bool barrier_try(uint32_t at, uint32_t parity, uint32_t) {
    gpu::yield();
    if (barrier_at(at).phase % 2 == parity) {
        if (gpu::draw(2) == 0)
            return false;
        barrier_wait(at, parity);
    }
    return true;
}
static void barrier_wait_cluster(uint32_t at, uint32_t parity) { barrier_wait(at, parity); }
static void named_arrive(uint32_t id, uint32_t threads) { gpu::come(gpu::my_block().named[id], threads); }
static void named_wait(uint32_t id, uint32_t threads) { gpu::meet(gpu::my_block().named[id], threads); }
static uint32_t nanoseconds() {
    gpu::yield();
    return gpu::clock_now += 1000;
}
static void shared_zero_4(uint32_t at) { memset(gpu::memory(gpu::me().block, at, 16), 0, 16); }
static uint4 shared_load_4(uint32_t from) {
    uint4 v;
    memcpy(&v, gpu::memory(gpu::me().block, from, 16), 16);
    return v;
}

// ---- copies.cuh ----

static void copy_box_3(uint32_t to, const CUtensorMap *map, uint32_t b, uint32_t c, uint32_t barrier) {
    gpu::copy(gpu::me().block, to, *map, {0, b, c}, barrier);
}
static void copy_box_3_kept(uint32_t to, const CUtensorMap *map, uint32_t b, uint32_t c, uint32_t barrier) {
    copy_box_3(to, map, b, c, barrier);
}
static void copy_box_4(uint32_t to, const void *map, uint32_t d, uint32_t barrier) {
    gpu::copy(gpu::me().block, to, *static_cast<const CUtensorMap *>(map), {0, 0, 0, d}, barrier);
}
static void copy_box_4_kept(uint32_t to, const void *map, uint32_t a, uint32_t d, uint32_t barrier) {
    gpu::copy(gpu::me().block, to, *static_cast<const CUtensorMap *>(map), {a, 0, 0, d}, barrier);
}
static void fence_async_proxy() {}
static void fetch_box_3(const CUtensorMap *map, uint32_t b, uint32_t c) { gpu::fetch(*map, {0, b, c}); }
static void fetch_box_5(const CUtensorMap *map, uint32_t d, uint32_t e) { gpu::fetch(*map, {0, 0, 0, d, e}); }
static void copy_box_5(uint32_t to, const CUtensorMap *map, uint32_t d, uint32_t e, uint32_t barrier) {
    gpu::copy(gpu::me().block, to, *map, {0, 0, 0, d, e}, barrier);
}
static void prefetch_map(const void *) {}

// ---- wgmma.cuh ----

static uint64_t operand(uint32_t address, uint32_t column, uint32_t eight) {
    return uint64_t(address) >> 4 | uint64_t(column >> 4) << 16 | uint64_t(eight >> 4) << 32;
}
template <uint32_t N> void registers_less() {}
template <uint32_t N> void registers_more() {}
template <class V, uint32_t N> void pin(V (&)[N]) {}
static void wgmma_fence() {}
// Groups happen at once, or when they are waited for: then what was given back before
// shows.
static void wgmma_happen(uint32_t left) {
    auto &groups = gpu::me().groups;
    for (; groups.size() > left; groups.erase(groups.begin()))
        for (auto &multiplication : groups.front())
            multiplication();
}
static void wgmma_commit() {
    gpu::me().groups.push_back(std::move(gpu::me().multiplications));
    gpu::me().multiplications.clear();
    if (gpu::draw(2) == 0)
        wgmma_happen(0);
}
template <uint32_t LEFT> void wgmma_wait() {
    __syncwarp(); // a warp waits as one
    wgmma_happen(LEFT);
    __syncwarp();
}
template <class T, uint32_t N> struct Wgmma {
    // Of an operand in shared memory: rows of 16 elements, or columns if it is turned.
    static float element(uint32_t block, uint64_t matrix, bool turned, uint32_t row, uint32_t k) {
        const uint32_t base = uint32_t(matrix & 0xffff) << 4, column = uint32_t(matrix >> 16 & 0xffff) << 4;
        const uint32_t eight = uint32_t(matrix >> 32 & 0xffff) << 4;
        const uint32_t at = turned ? base + row / 64 * column + k / 8 * eight + k % 8 * 128 + row % 64 * 2
                                   : base + row / 8 * eight + row % 8 * 128 + k * 2;
        T x;
        memcpy(&x, gpu::memory(block, gpu::swizzled(at), 2), 2);
        return to_float(x);
    }
    // Of A, a lane has rows lane / 4 of its warp's 16 and 8 further: a(row, k).
    template <class A> static void happens(float *to, bool turned, uint64_t b, bool add, A a) {
        const uint32_t block = gpu::me().block, lane = threadIdx.x % 32;
        gpu::me().multiplications.push_back([=] {
            float left[2][16], right[16];
            for (uint32_t i = 0; i < 32; i++)
                left[i / 16][i % 16] = a(lane / 4 + i / 16 * 8, i % 16);
            for (uint32_t i = 0; i < N / 4; i++) {
                for (uint32_t k = 0; k < 16; k++)
                    right[k] = element(block, b, turned, i / 2 * 8 + 2 * (lane % 4) + i % 2, k);
                for (uint32_t half = 0; half < 2; half++) {
                    float sum = 0.0f;
                    for (uint32_t k = 0; k < 16; k++)
                        sum += left[half][k] * right[k];
                    float &at = to[i / 2 * 4 + half * 2 + i % 2];
                    at = (add ? at : 0.0f) + sum;
                }
            }
        });
    }
    static void ss(float (&c)[N / 2], uint64_t a, uint64_t b, uint32_t add) {
        const uint32_t block = gpu::me().block, warp = threadIdx.x / 32 % 4;
        happens(c, false, b, add, [=](uint32_t row, uint32_t k) { return element(block, a, false, warp * 16 + row, k); });
    }
    template <bool TURNED> static void rs(float (&c)[N / 2], const uint32_t *a, uint64_t b, uint32_t add) {
        const uint32_t row_lanes = threadIdx.x % 32 / 4 * 4;
        struct Four {
            const uint32_t *lane[4];
        };
        gpu::my_block().lanes[threadIdx.x] = reinterpret_cast<uint64_t>(a);
        __syncwarp();
        Four of_row;
        for (uint32_t i = 0; i < 4; i++)
            of_row.lane[i] = reinterpret_cast<const uint32_t *>(gpu::my_block().lanes[threadIdx.x / 32 * 32 + row_lanes + i]);
        __syncwarp();
        happens(c, TURNED, b, add, [=](uint32_t row, uint32_t k) {
            const uint32_t word = of_row.lane[k % 8 / 2][row / 8 + k / 8 * 2];
            T two[2];
            memcpy(two, &word, 4);
            return to_float(two[k % 2]);
        });
    }
};

// ---- cluster.cuh ----

static uint32_t cluster_rank_again() { return gpu::me().block % gpu::CLUSTER; }
static uint32_t cluster_blocks_again() { return gpu::CLUSTER; }
static uint32_t peer_address(uint32_t at, uint32_t rank) {
    return (gpu::me().block / gpu::CLUSTER * gpu::CLUSTER + rank + 1) << gpu::BLOCK_SHIFT | at;
}
static void store_peer_if(bool so, uint32_t peer, float a, float b, uint32_t second, uint32_t peer_barrier) {
    const float value = second ? b : a;
    if (so)
        gpu::pending.push_back([=] {
            memcpy(gpu::memory(gpu::block_at(peer), gpu::offset_at(peer), 4), &value, 4);
            gpu::land(barrier_at(peer_barrier), 4);
        });
}
static void store_shared_if(bool so, uint32_t to, float a, float b, uint32_t second) {
    const float value = second ? b : a;
    if (so)
        memcpy(gpu::memory(gpu::me().block, to, 4), &value, 4);
}
static gpu::Meeting &my_cluster() { return gpu::clusters[gpu::me().block / gpu::CLUSTER]; }
static void cluster_arrive() {
    gpu::me().left = my_cluster().phase;
    gpu::come(my_cluster(), gpu::CLUSTER * gpu::my_block().lanes.size());
}
static void cluster_wait() {
    while (my_cluster().phase == gpu::me().left)
        gpu::wait(my_cluster().waiting);
}

} // namespace distkv
