// A layer's FP8 keys and values of the sequences that are prefilled, as T and in
// the order of their pages: Hopper's matrix unit takes them from shared memory as
// they are. Each is read once here, and many times by the products.
#include "e4m3.cuh"
#include "paged_kv.cuh"
#include "rows.cuh"

namespace distkv {

template <class T>
__device__ __forceinline__ void widen_pages(const WidenPages &p) {
    begin_kernel();
    const Seq seq = p.seqs[blockIdx.y];
    if (is_decode(seq, p.group)) {
        return;
    }
    for (uint32_t page = seq.page + blockIdx.x; page < seq.page + seq.pages; page += gridDim.x) {
        const uint8_t *from = static_cast<const uint8_t *>(p.kv) + uint64_t(p.pages[page].block) * p.block_elements;
        T *to = static_cast<T *>(p.out) + uint64_t(page - p.first) * p.block_elements;
        for (uint32_t i = threadIdx.x * 16; i < p.block_elements; i += blockDim.x * 16) {
            const uint4 x = *reinterpret_cast<const uint4 *>(from + i);
            uint4 *out = reinterpret_cast<uint4 *>(to + i);
            out[0] = make_uint4(widen_two<T, 0, 1>(x.x), widen_two<T, 2, 3>(x.x), widen_two<T, 0, 1>(x.y),
                                widen_two<T, 2, 3>(x.y));
            out[1] = make_uint4(widen_two<T, 0, 1>(x.z), widen_two<T, 2, 3>(x.z), widen_two<T, 0, 1>(x.w),
                                widen_two<T, 2, 3>(x.w));
        }
    }
}

} // namespace distkv

// Pages along x, sequences along y.
DISTKV_KERNELS(widen_pages, WidenPages, 256)
