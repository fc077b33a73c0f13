// Numbers of the three formats, float, __half and __nv_bfloat16, and sums over the lanes of a warp. Kernels compute in
// float.

#pragma once

#include "platform.cuh"

namespace ovseg {

DEVICE float to_float(float x) { return x; }
DEVICE float to_float(__half x) { return __half2float(x); }
DEVICE float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T> DEVICE T rounded(float x) {
    if constexpr (std::is_same_v<T, __half>) return __float2half_rn(x);
    if constexpr (std::is_same_v<T, __nv_bfloat16>) return __float2bfloat16_rn(x);
    if constexpr (std::is_same_v<T, float>) return x;
}

constexpr float SHORTEST = 1e-12f;  // torch.nn.functional.normalize

// The length of a vector, from the sum of its squares.
DEVICE float length_of(float squares) {
    const float length = sqrtf(squares);
    return length < SHORTEST ? SHORTEST : length;  // NaN stays
}

template <typename T> constexpr int VEC = 16 / int(sizeof(T));  // numbers of a vector of 16 bytes

// Calls function(i) for all i < N, or function(i, j) for all j < M as well; unrolled, for numbers in registers.
template <int N, typename Function> DEVICE void unrolled(Function function) {
#pragma unroll
    for (int i = 0; i < N; ++i) function(i);
}

template <int N, int M, typename Function> DEVICE void unrolled(Function function) {
    unrolled<N>([&](int i) { unrolled<M>([&](int j) { function(i, j); }); });
}

// N neighbours that are read or written at once.
template <typename T, int N> struct alignas(sizeof(T) * N) Vector {
    T value[N];
};

template <typename T> using Pair = Vector<T, 2>;
template <typename T> using Vec = Vector<T, VEC<T>>;

template <typename T, int N> DEVICE Vector<T, N> load(const T *address) {
    check_aligned(address, sizeof(Vector<T, N>));
    return *reinterpret_cast<const Vector<T, N> *>(address);
}

template <typename T> DEVICE Vec<T> load_vec(const T *address) { return load<T, VEC<T>>(address); }

template <typename T, int N> DEVICE void store(T *address, const Vector<T, N> &vector) {
    check_aligned(address, sizeof(vector));
    *reinterpret_cast<Vector<T, N> *>(address) = vector;
}

template <typename T> DEVICE Pair<T> rounded_pair(float first, float second) {
    return {{rounded<T>(first), rounded<T>(second)}};
}

// N neighbours rounded together.
template <typename T, int N> DEVICE Vector<T, N> rounded(const float (&numbers)[N]) {
    Vector<T, N> vector;
    if constexpr (sizeof(T) == 2) {
        uint32_t words[N / 2];
#pragma unroll
        for (int i = 0; i < N / 2; ++i) words[i] = rounded_word<T>(numbers[2 * i], numbers[2 * i + 1]);
        memcpy(&vector, words, sizeof(words));
    } else {
        memcpy(&vector, numbers, sizeof(numbers));
    }
    return vector;
}

// Stores two neighbours at once, wherever they come from; returns what was stored.
template <typename T> DEVICE Pair<T> store_pair(T *address, float first, float second) {
    Pair<T> pair{{T(), T()}};
    if constexpr (sizeof(T) == 2) {
        const uint32_t word = recomputed(rounded_word<T>(first, second));
        store<uint32_t, 1>(reinterpret_cast<uint32_t *>(address), {{word}});
        memcpy(&pair, &word, 4);
    } else {
        pair = {{first, second}};
        store(address, pair);
    }
    return pair;
}

constexpr unsigned ALL_LANES = 0xffffffffu;

// Over LANES lanes, a power of two, that are STRIDE apart; each of them gets the result.
template <int LANES, int STRIDE = 1> DEVICE float sum_over_lanes(float x) {
#pragma unroll
    for (int i = LANES / 2; i; i /= 2) x += __shfl_xor_sync(ALL_LANES, x, i * STRIDE);
    return x;
}

// NaN is ignored, as the hardware's maximum does.
template <int LANES, int STRIDE = 1> DEVICE float maximum_over_lanes(float x) {
#pragma unroll
    for (int i = LANES / 2; i; i /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, i * STRIDE));
    return x;
}

}  // namespace ovseg
