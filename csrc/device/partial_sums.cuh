// The second step of sums that are taken in two, so that their order does not depend on when which block runs.

#pragma once

#include "numbers.cuh"

namespace ovseg {
namespace {

constexpr int ADDING_THREADS = 256;

// sums[b] = Σ partial[b · count + i]; a block for each sum.
template <typename T>
__global__ void __launch_bounds__(ADDING_THREADS) add_partial_sums(const float *partial, T *sums, int64_t count) {
    float *const of_warps = reinterpret_cast<float *>(shared_memory());
    const int thread = int(threadIdx.x), lane = thread % 32;
    partial += int64_t(blockIdx.x) * count;
    float sum = 0.0f;
#pragma unroll 4
    for (int64_t i = thread; i < count; i += ADDING_THREADS) sum += partial[i];
    sum = sum_over_lanes<32>(sum);
    if (lane == 0) of_warps[thread / 32] = sum;
    __syncthreads();
    if (thread >= 32) return;
    sum = sum_over_lanes<32>(lane < ADDING_THREADS / 32 ? of_warps[lane] : 0.0f);
    if (lane == 0) sums[blockIdx.x] = rounded<T>(sum);
}

template <typename T>
int launch_adding(const float *partial, void *sums, int64_t blocks, int64_t count, int device, void *stream) {
    return launch(add_partial_sums<T>, blocks, ADDING_THREADS, ADDING_THREADS / 32 * sizeof(float), device, stream,
                  partial, sums, count);
}

}  // namespace
}  // namespace ovseg
