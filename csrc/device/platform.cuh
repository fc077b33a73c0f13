// What a kernel needs of its platform: CUDA under nvcc, or the emulator under a host compiler.

#pragma once

#include <cstddef>
#include <cstdint>

#include "../ovseg.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#include "../emulator/emulator.h"
#endif

namespace ovseg {

// The block's dynamic shared memory, aligned to 128 bytes.
__device__ __forceinline__ unsigned char *shared_memory() {
#ifdef __CUDACC__
    extern __shared__ __align__(128) unsigned char memory[];
    return memory;
#else
    return static_cast<unsigned char *>(emulator::shared_memory());
#endif
}

// The number, but the compiler does not know it: what a loop works out from it is worked out in each turn, where it
// would otherwise be kept in registers all the while.
__device__ __forceinline__ uint32_t recomputed(uint32_t x) {
#ifdef __CUDACC__
    asm volatile("" : "+r"(x));
#endif
    return x;
}

// The same of an index. It is not negative: dividing it by a power of two is one instruction, not four.
__device__ __forceinline__ int recomputed(int x) {
    const int same = int(recomputed(uint32_t(x)));
#ifdef __CUDACC__
    __builtin_assume(same >= 0);
#endif
    return same;
}

// Bytes of shared memory that a block may have on every GPU: sm_86, sm_89 and sm_120 have no more.
constexpr size_t SHARED_EVERYWHERE = 99 * 1024;

// Launches `kernel` on a device's stream without waiting; an ovseg.h error code.
template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared, int device, void *stream,
           Arguments... arguments) {
    if (blocks == 0) return OVSEG_OK;
    if (blocks < 0) return OVSEG_UNSUPPORTED_SIZE;
    if (blocks > INT32_MAX) return OVSEG_TOO_LARGE;
#ifdef __CUDACC__
    int before;
    cudaError_t error = cudaGetDevice(&before);
    if (error == cudaSuccess && before != device) error = cudaSetDevice(device);
    if (error == cudaSuccess && shared > 48 * 1024) {
        int most;
        error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
        if (error == cudaSuccess && shared > size_t(most)) {
            if (before != device) cudaSetDevice(before);
            return OVSEG_TOO_MUCH_SHARED_MEMORY;
        }
    }
    if (error == cudaSuccess && shared > 48 * 1024) {
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
    }
    if (error == cudaSuccess) {
        kernel<<<dim3(unsigned(blocks)), threads, shared, static_cast<cudaStream_t>(stream)>>>(arguments...);
        error = cudaGetLastError();
        if (before != device) cudaSetDevice(before);
    }
    return int(error);
#else
    (void)device, (void)stream;
    emulator::run(dim3(unsigned(blocks)), dim3(unsigned(threads)), shared, [=] { kernel(arguments...); });
    return OVSEG_OK;
#endif
}

// How many blocks the device can run beside each other at least: to share work out, results must not depend on it.
inline int multiprocessors(int device) {
#ifdef __CUDACC__
    int count = 0;
    if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) return 1;
    return count;
#else
    (void)device;
    return 2;
#endif
}

// Calls `function` with a number of the type that `dtype` names.
template <typename Function>
int by_dtype(int dtype, Function function) {
    switch (dtype) {
        case OVSEG_FLOAT32:
            return function(float());
        case OVSEG_FLOAT16:
            return function(__half());
        case OVSEG_BFLOAT16:
            return function(__nv_bfloat16());
        default:
            return OVSEG_BAD_DTYPE;
    }
}

// Whether all pointers are aligned to the 16 bytes that kernels read at a time.
template <typename... Pointers>
bool aligned(Pointers... pointers) {
    return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

}  // namespace ovseg
