// Kernels with one fault each, which the emulator has to tell: the program's argument names the fault. It prints how many
// numbers are wrong, unless the emulator ends it before.

#include <vector>

#include "device/numbers.cuh"
#include "device/tiles.cuh"

using namespace ovseg;

namespace {

constexpr int THREADS = 64, BLOCKS = 4;

enum Fault {
    NONE,
    NO_BARRIER,
    LATE_BARRIER,
    NO_WAIT,
    EARLY_READ,
    NO_BARRIER_AFTER_COPY,
    DIVERGENT_SHUFFLE,
    DIFFERENT_MEETINGS,
    BARRIER_IN_ONE_WARP,
    MISALIGNED_LOAD,
    MISALIGNED_COPY,
    PARTIAL_WARP,
    UNWRITTEN,
    PAST_SHARED,  // from here on the address sanitizer's
    PAST_GLOBAL
};

// Each thread takes what the thread opposite has brought: by shared memory, by a copy in the background, by a shuffle.
__global__ void exchange(const float *in, float *out, Fault fault) {
    float *const brought = reinterpret_cast<float *>(shared_memory());
    float *const copied = brought + THREADS;
    const int thread = int(threadIdx.x), opposite = THREADS - 1 - thread, lane = thread % 32;

    if (fault != UNWRITTEN || thread) brought[thread] = in[thread];
    if (fault != NO_BARRIER && fault != LATE_BARRIER && (fault != BARRIER_IN_ONE_WARP || thread < 32)) __syncthreads();
    float sum = brought[opposite];
    if (fault == LATE_BARRIER) __syncthreads();

    if (thread % 4 == 0) {
        copy_async(copied + thread + (fault == MISALIGNED_COPY), in + thread);
        commit_copies();
    }
    if (fault == EARLY_READ) sum += copied[thread / 4 * 4];
    if (fault != NO_WAIT) wait_for_copies<0>();
    if (fault != NO_BARRIER_AFTER_COPY) __syncthreads();
    if (fault != EARLY_READ) sum += copied[opposite];

    if (fault == DIVERGENT_SHUFFLE) {
        if (lane < 16) sum += __shfl_xor_sync(ALL_LANES, in[thread], 1);
    } else if (fault == DIFFERENT_MEETINGS && lane < 16) {
        __syncwarp();
    } else {
        sum += __shfl_xor_sync(ALL_LANES, in[thread], 1);
    }
    if (fault == PAST_SHARED) sum += brought[thread + 2 * THREADS];
    if (fault == PAST_GLOBAL) sum += out[blockIdx.x * THREADS + thread + THREADS];
    if (fault == MISALIGNED_LOAD) sum += load<float, 2>(in + 1).value[0];
    out[blockIdx.x * THREADS + thread] = sum;
}

}  // namespace

int main(int, char **arguments) {
    const Fault fault = Fault(atoi(arguments[1]));
    const int threads = fault == PARTIAL_WARP ? THREADS - 16 : THREADS;
    alignas(16) float in[THREADS];
    std::vector<float> out(BLOCKS * THREADS);
    for (int i = 0; i < THREADS; ++i) in[i] = float(i + 1);
    const int error = launch(exchange, BLOCKS, threads, 2 * sizeof(in), 0, nullptr, in, out.data(), fault);
    if (error) return error;
    int wrong = 0;
    for (int i = 0; i < BLOCKS * THREADS; ++i) {
        const int thread = i % THREADS;
        wrong += out[i] != 2 * in[THREADS - 1 - thread] + in[thread ^ 1];
    }
    printf("%d\n", wrong);
    return 0;
}
