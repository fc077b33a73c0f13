// Sums and maxima over lanes of a warp.

#pragma once

#include "numbers.cuh"

namespace ovseg {

constexpr unsigned ALL_LANES = 0xffffffffu;

// Over LANES neighbouring lanes, a power of two; each of them gets the result.
template <int LANES>
DEVICE float sum_over_lanes(float x) {
#pragma unroll
    for (int distance = LANES / 2; distance; distance /= 2) x += __shfl_xor_sync(ALL_LANES, x, distance);
    return x;
}

// NaN is passed over, as the hardware's maximum does.
template <int LANES>
DEVICE float maximum_over_lanes(float x) {
#pragma unroll
    for (int distance = LANES / 2; distance; distance /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, distance));
    return x;
}

}  // namespace ovseg
