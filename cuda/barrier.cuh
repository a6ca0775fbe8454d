// How threads, the copy engine and kernels wait for each other: mbarriers by
// their address in shared memory, a barrier of some of a block's threads, and
// programmatic launches. What a GPU older than Hopper lacks is nothing there,
// or not to be called.
#pragma once
#include "shared.cuh"

namespace distkv {

// ---- Programmatic launch ----

// Until the kernels before this one are done and their writes are visible.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel's blocks may be brought up once every block has said this.
__device__ __forceinline__ void launch_next() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- Barriers ----

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers known to the copy engine and to the cluster.
__device__ __forceinline__ void barrier_init_done() {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.mbarrier_init.release.cluster;\n\tfence.proxy.async.shared::cta;" ::: "memory");
#endif
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
    asm volatile("{\n\t.reg .b64 state;\n\tmbarrier.arrive.shared::cta.b64 state, [%0];\n\t}" ::"r"(barrier) : "memory");
}

#if __CUDA_ARCH__ >= 900
// Arrives, and holds the phase open until so many more bytes were copied in.
__device__ __forceinline__ void barrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
#endif

// Arrives once this thread's `copy_16` so far have landed.
__device__ __forceinline__ void barrier_arrive_copies(uint32_t barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// Until the phase of this parity is over.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
    asm volatile("{\n\t.reg .pred done;\n\t"
                 "again:\n\t"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t"
                 "@!done bra again;\n\t}" ::"r"(barrier),
                 "r"(parity)
                 : "memory");
#else
    asm volatile("{\n\t.reg .pred done;\n\t"
                 "again:\n\t"
                 "mbarrier.test_wait.parity.shared::cta.b64 done, [%0], %1;\n\t"
                 "@!done bra again;\n\t}" ::"r"(barrier),
                 "r"(parity)
                 : "memory");
#endif
}

#if __CUDA_ARCH__ >= 900
// Whether the phase of this parity is over, which is waited for about so long.
__device__ __forceinline__ bool barrier_try(uint32_t barrier, uint32_t parity, uint32_t nanoseconds) {
    uint32_t over;
    asm volatile("{\n\t.reg .pred done;\n\t"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2, %3;\n\t"
                 "selp.u32 %0, 1, 0, done;\n\t}"
                 : "=r"(over)
                 : "r"(barrier), "r"(parity), "r"(nanoseconds)
                 : "memory");
    return over != 0;
}

// Arrives at the barrier at this place in block `rank` of the cluster: what this
// thread read may be written over. It publishes nothing to that block.
__device__ __forceinline__ void barrier_arrive_at(uint32_t barrier, uint32_t rank) {
    asm volatile("{\n\t.reg .b32 peer;\n\t"
                 "mapa.shared::cluster.u32 peer, %0, %1;\n\t"
                 "mbarrier.arrive.shared::cluster.b64 _, [peer];\n\t}" ::"r"(barrier),
                 "r"(rank)
                 : "memory");
}

// As `barrier_wait`, where other blocks of the cluster arrive, whose writes are
// then seen.
__device__ __forceinline__ void barrier_wait_cluster(uint32_t barrier, uint32_t parity) {
    asm volatile("{\n\t.reg .pred done;\n\t"
                 "again:\n\t"
                 "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n\t"
                 "@!done bra again;\n\t}" ::"r"(barrier),
                 "r"(parity)
                 : "memory");
}
#endif

// ---- Barriers by number: some threads wait, the others only report ----

__device__ __forceinline__ void named_wait(uint32_t id, uint32_t threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_arrive(uint32_t id, uint32_t threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// A barrier of the first `threads` threads of a block, apart from barrier 0.
__device__ __forceinline__ void sync_threads(uint32_t threads) {
    asm volatile("bar.sync 1, %0;" ::"r"(threads) : "memory");
}

// The same, and whether any of them says so.
__device__ __forceinline__ bool any_of_threads(uint32_t threads, bool so) {
    uint32_t any;
    asm volatile("{\n\t.reg .pred so, any;\n\tsetp.ne.b32 so, %1, 0;\n\t"
                 "bar.red.or.pred any, 1, %2, so;\n\t"
                 "selp.u32 %0, 1, 0, any;\n\t}"
                 : "=r"(any)
                 : "r"(uint32_t(so)), "r"(threads)
                 : "memory");
    return any != 0;
}

// ---- Time ----

__device__ __forceinline__ uint32_t nanoseconds() {
    uint32_t now;
    asm volatile("mov.u32 %0, %%globaltimer_lo;" : "=r"(now));
    return now;
}

} // namespace distkv
