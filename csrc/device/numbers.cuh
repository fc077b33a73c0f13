// Numbers of the three formats: float, __half, __nv_bfloat16. Kernels compute in float.

#pragma once

#include "platform.cuh"

namespace ovseg {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T rounded(float x);
template <>
__device__ __forceinline__ float rounded<float>(float x) {
    return x;
}
template <>
__device__ __forceinline__ __half rounded<__half>(float x) {
    return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 rounded<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}

// 2ˣ and 1 / x in one instruction, to about 2⁻²²; what is below 2⁻¹²⁶ counts as 0. `exp2f`, `__expf` and `__fdividef`
// take several more, for numbers that small.
__device__ __forceinline__ float fast_exp2(float x) {
#ifdef __CUDACC__
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
    return power;
#else
    return std::exp2(x);
#endif
}

__device__ __forceinline__ float fast_reciprocal(float x) {
#ifdef __CUDACC__
    float inverse;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
    return inverse;
#else
    return 1.0f / x;
#endif
}

// N neighbours that are read or written at once.
template <typename T, int N>
struct alignas(sizeof(T) * N) Vector {
    T value[N];
};

template <typename T>
using Pair = Vector<T, 2>;
template <typename T>
using Piece = Vector<T, 16 / sizeof(T)>;  // 16 bytes

template <typename T, int N>
__device__ __forceinline__ Vector<T, N> load(const T *address) {
#ifndef __CUDACC__
    emulator::check_aligned(address, sizeof(Vector<T, N>));
#endif
    return *reinterpret_cast<const Vector<T, N> *>(address);
}

template <typename T, int N>
__device__ __forceinline__ void store(T *address, const Vector<T, N> &vector) {
#ifndef __CUDACC__
    emulator::check_aligned(address, sizeof(vector));
#endif
    *reinterpret_cast<Vector<T, N> *>(address) = vector;
}

template <typename T>
__device__ __forceinline__ Pair<T> rounded_pair(float first, float second) {
    return {{rounded<T>(first), rounded<T>(second)}};
}

// Two 16-bit numbers as a register of a matrix product; the first one lies in its lower half.
template <typename T>
__device__ __forceinline__ uint32_t packed(float first, float second) {
    static_assert(sizeof(T) == 2, "16-bit numbers");
    const Pair<T> pair = rounded_pair<T>(first, second);
    uint32_t word;
    memcpy(&word, &pair, 4);
    return word;
}

// Stores two neighbours at once, whatever became of the floats that they come from; gives what was stored.
template <typename T>
__device__ __forceinline__ Pair<T> store_pair(T *address, float first, float second) {
    Pair<T> pair{{T(), T()}};
    if constexpr (sizeof(T) == 2) {
        const uint32_t word = recomputed(packed<T>(first, second));
        store<uint32_t, 1>(reinterpret_cast<uint32_t *>(address), {{word}});
        memcpy(&pair, &word, 4);
    } else {
        pair = {{first, second}};
        store<T, 2>(address, pair);
    }
    return pair;
}

}  // namespace ovseg
