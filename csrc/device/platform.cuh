// What every kernel needs of its platform: CUDA under nvcc, the emulator under a host compiler. Only this header knows
// which.

#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "../ovseg.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#define DEVICE __device__ __forceinline__

namespace ovseg {

struct alignas(16) Words {  // 16 bytes in registers
    uint32_t value[4];
};

}  // namespace ovseg

#ifdef __CUDACC__
#include "instructions.cuh"
#else
#include "../emulator/instructions.h"
#endif

namespace ovseg {

constexpr size_t SHARED_EVERYWHERE = 99 * 1024;  // bytes that a block may have on every GPU; sm_86 has no more

// An argument of a C function, cast to what it initialises: void * to T *, int64_t to int.
template <typename From> struct Cast {
    From from;

    template <typename To> operator To() const {
        static_assert(std::is_pointer_v<From> == std::is_pointer_v<To>, "a pointer for a pointer, a number for one");
        return static_cast<To>(from);
    }
};

template <typename From> auto cast(const From &from) {
    if constexpr (std::is_scalar_v<From>) {
        return Cast<From>{from};
    } else {
        return from;
    }
}

// An aggregate whose members are cast from these arguments.
template <typename Aggregate, typename... Arguments> Aggregate filled(const Arguments &...arguments) {
    return Aggregate{cast(arguments)...};
}

// Queues `kernel`, its arguments cast to its parameters; an ovseg.h error code.
template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared, int device, void *stream,
           const Arguments &...arguments) {
    if (blocks == 0) return OVSEG_OK;
    if (blocks < 0) return OVSEG_UNSUPPORTED_SIZE;
    if (blocks > INT32_MAX) return OVSEG_TOO_LARGE;
    return queue(kernel, unsigned(blocks), unsigned(threads), shared, device, stream, cast(arguments)...);
}

// Calls `function` with a number of the type that `dtype` names.
template <typename Function> int by_dtype(int dtype, Function function) {
    switch (dtype) {
        case OVSEG_FLOAT32: return function(float());
        case OVSEG_FLOAT16: return function(__half());
        case OVSEG_BFLOAT16: return function(__nv_bfloat16());
        default: return OVSEG_BAD_DTYPE;
    }
}

// Whether all pointers are aligned to the 16 bytes that kernels read at a time.
template <typename... Pointers> bool aligned(Pointers... pointers) {
    return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

// The same for a params struct, whose pointers come before `first_size`.
template <typename Params> bool aligned_params(const Params &params, const int64_t &first_size) {
    const auto *const pointers = reinterpret_cast<const void *const *>(&params);
    const auto *const end = reinterpret_cast<const void *const *>(&first_size);
    for (const auto *pointer = pointers; pointer < end; ++pointer) {
        if (!aligned(*pointer)) return false;
    }
    return true;
}

}  // namespace ovseg
