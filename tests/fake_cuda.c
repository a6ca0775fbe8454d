// A CUDA driver and a matrix library that compute nothing: memory is the host's,
// kernels do not run. For tests of what happens around them, without a GPU.
//
//   cc -shared -fPIC -DDRIVER fake_cuda.c -o libcuda.so.1
//   cc -shared -fPIC -DMATRICES fake_cuda.c -o libcublasLt.so.13
//
// -DcuGraphLaunch=gone (of any function) makes a library that lacks it.
// FAKE_CUDA_LOADED=FILE in the environment: bf16 weights are appended to it, in the
// order in which they are converted.
// FAKE_CUDA_BREAKS=N in the environment: the N-th launch of a kernel is an illegal
// access, and everything after it fails.
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define HANDLE ((void *)0x1000)

#ifdef DRIVER
enum { OUT_OF_MEMORY = 2, ILLEGAL_ADDRESS = 700, NOT_SUPPORTED = 801 };

static int broken;
static long launches;
static size_t used;

// FAKE_CUDA_MIB: how much memory there is.
static size_t total_memory(void) {
    const char *mib = getenv("FAKE_CUDA_MIB");
    return (size_t)(mib ? atol(mib) : 1024) << 20;
}

static int status(void) { return broken ? ILLEGAL_ADDRESS : 0; }

static int launch(void) {
    const char *breaks = getenv("FAKE_CUDA_BREAKS");
    if (breaks && __atomic_add_fetch(&launches, 1, __ATOMIC_RELAXED) >= atol(breaks)) {
        broken = 1;
    }
    return 0;
}

int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
int cuDeviceGetName(char *name, int len, int device) { snprintf(name, len, "Fake Hopper"); return 0; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = total_memory(); return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    switch (attribute) {
    case 16: *value = 4; break;           // multiprocessors
    case 38: *value = 1 << 20; break;     // bytes of the second-level cache
    case 75: *value = 9; break;           // compute capability
    case 76: *value = 0; break;
    case 97: *value = 227 << 10; break;   // bytes of shared memory
    default: *value = 0;
    }
    return 0;
}
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = HANDLE; return 0; }
int cuDevicePrimaryCtxRelease_v2(int device) { return 0; }
int cuCtxSetCurrent(void *context) { return 0; }
int cuCtxSynchronize(void) { return status(); }
int cuCtxGetStreamPriorityRange(int *least, int *greatest) { *least = *greatest = 0; return 0; }
int cuGetErrorString(int error, const char **text) {
    *text = error == ILLEGAL_ADDRESS ? "an illegal memory access was encountered" : "refused";
    return 0;
}

// Every allocation begins with its size.
int cuMemAlloc_v2(uint64_t *address, size_t bytes) {
    if (broken) return ILLEGAL_ADDRESS;
    if (used + bytes > total_memory()) return OUT_OF_MEMORY;
    char *memory = calloc(1, bytes + 256);
    if (!memory) return OUT_OF_MEMORY;
    *(size_t *)memory = bytes;
    used += bytes;
    *address = (uint64_t)(memory + 256);
    return 0;
}
int cuMemFree_v2(uint64_t address) {
    char *memory = (char *)address - 256;
    used -= *(size_t *)memory;
    free(memory);
    return status();
}
int cuMemGetInfo_v2(size_t *left, size_t *total) {
    *left = total_memory() - used;
    *total = total_memory();
    return status();
}
int cuMemGetHandleForAddressRange(void *handle, uint64_t address, size_t bytes, int kind, unsigned long long flags) {
    return NOT_SUPPORTED;
}
int cuPointerSetAttribute(const void *value, int attribute, uint64_t address) { return 0; }
int cuMemHostAlloc(void **memory, size_t bytes, unsigned flags) {
    *memory = aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
    return *memory ? 0 : OUT_OF_MEMORY;
}
int cuMemFreeHost(void *memory) { free(memory); return 0; }
int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t bytes, void *stream) {
    if (!broken) memcpy((void *)to, from, bytes);
    return status();
}
int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t bytes, void *stream) {
    if (!broken) memcpy(to, (void *)from, bytes);
    return status();
}
int cuMemsetD8Async(uint64_t to, unsigned char byte, size_t bytes, void *stream) {
    if (!broken) memset((void *)to, byte, bytes);
    return status();
}

int cuStreamCreateWithPriority(void **stream, unsigned flags, int priority) { *stream = HANDLE; return 0; }
int cuStreamDestroy_v2(void *stream) { return 0; }
int cuStreamSynchronize(void *stream) { return status(); }
int cuStreamBeginCapture_v2(void *stream, int mode) { return status(); }
int cuStreamEndCapture(void *stream, void **graph) { *graph = HANDLE; return status(); }
int cuGraphInstantiateWithFlags(void **exec, void *graph, unsigned long long flags) { *exec = HANDLE; return 0; }
int cuGraphDestroy(void *graph) { return 0; }
int cuGraphExecDestroy(void *exec) { return 0; }
int cuGraphLaunch(void *exec, void *stream) { return broken ? ILLEGAL_ADDRESS : launch(); }
int cuEventCreate(void **event, unsigned flags) { *event = HANDLE; return 0; }
int cuEventDestroy_v2(void *event) { return 0; }
int cuEventRecord(void *event, void *stream) { return status(); }
int cuEventSynchronize(void *event) { return status(); }
int cuEventElapsedTime_v2(float *milliseconds, void *from, void *to) { *milliseconds = 1; return status(); }

int cuModuleLoadData(void **module, const void *image) { *module = HANDLE; return 0; }
// A function is its name.
int cuModuleGetFunction(void **function, void *module, const char *name) { *function = strdup(name); return 0; }
int cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, void *function, int threads, size_t shared) {
    *blocks = 1;
    return 0;
}
int cuOccupancyMaxActiveClusters(int *clusters, void *function, const void *config) { *clusters = 4; return 0; }
int cuTensorMapEncodeTiled(void *map, int type, unsigned rank, void *address, const void *sizes, const void *strides,
                           const void *box, const void *steps, int interleave, int swizzle, int l2, int fill) {
    return 0;
}
int cuLaunchKernelEx(const void *config, void *function, void **arguments, void **extra) {
    if (broken) return ILLEGAL_ADDRESS;
    const char *loaded = getenv("FAKE_CUDA_LOADED");
    if (loaded && !strncmp(function, "convert_bf16_", 13)) {
        // As `Convert` in cuda/api.h.
        const struct { const void *bytes; void *out; uint64_t offset, elements; } *p = arguments[0];
        FILE *file = fopen(loaded, "a");
        if (!file || fwrite((const char *)p->bytes + 2 * p->offset, 2, p->elements, file) != p->elements) return 1;
        fclose(file);
    }
    return launch();
}
#endif

#ifdef MATRICES
int cublasLtCreate(void **handle) { *handle = HANDLE; return 0; }
int cublasLtDestroy(void *handle) { return 0; }
int cublasLtMatmulDescCreate(void **description, int compute, int scale) { *description = HANDLE; return 0; }
int cublasLtMatmulDescDestroy(void *description) { return 0; }
int cublasLtMatmulDescSetAttribute(void *description, int attribute, const void *value, size_t size) { return 0; }
int cublasLtMatrixLayoutCreate(void **layout, int type, uint64_t rows, uint64_t cols, int64_t stride) {
    *layout = HANDLE;
    return 0;
}
int cublasLtMatrixLayoutDestroy(void *layout) { return 0; }
int cublasLtMatrixLayoutSetAttribute(void *layout, int attribute, const void *value, size_t size) { return 0; }
int cublasLtMatmulPreferenceCreate(void **preference) { *preference = HANDLE; return 0; }
int cublasLtMatmulPreferenceDestroy(void *preference) { return 0; }
int cublasLtMatmulPreferenceSetAttribute(void *preference, int attribute, const void *value, size_t size) { return 0; }
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *operation, void *a, void *b, void *c, void *d, void *preference,
                                   int wanted, void *results, int *found) {
    *found = 1;
    return 0;
}
int cublasLtMatmul(void *handle, void *operation, const void *alpha, const void *a, void *a_layout, const void *b,
                   void *b_layout, const void *beta, const void *c, void *c_layout, void *d, void *d_layout,
                   const void *algorithm, void *workspace, size_t size, void *stream) {
    return 0;
}
#endif
