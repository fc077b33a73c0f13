// Runs CUDA kernels on the CPU, thread by thread, so that their numbers can be tested where there is no GPU.
//
// Every CUDA thread is a fiber with its own stack. Fibers change only where threads have to meet: in __syncthreads and
// in what a warp does together (shuffles, ldmatrix, mma). Blocks run one after another. Faults that a GPU would hide
// are told: shared memory begins as NaN, blocks take turns in running their warps and lanes forwards and backwards, so
// that a missing barrier shows in the numbers; cp.async copies only when it is waited for; threads that wait for each
// other at different places, and misaligned addresses, end the process with a sentence.
//
// It says nothing of speed, of memory order within a warp's instruction, or of what another GPU's rounding does.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulator {

constexpr int WARP = 32;

struct alignas(16) Slot {  // what a lane brings to a meeting of its warp, and takes from it
    int kind;
    union {
        uint32_t words[20];
        float floats[20];
        const void *address;
    };
};

struct Lane;
extern Lane *self;
extern dim3 block_index, block_size, grid_size;

const dim3 &thread_index();
int lane_index();
void *shared_memory();
void barrier();

// All lanes of a warp meet: each fills its slot, then waits in `meet`; the last one to come calls `finish` on all 32
// slots, which `meet` returns. Meetings of different kinds do not match.
Slot &slot(int kind);
Slot *meet(void (*finish)(Slot *) = nullptr);

void async_copy(void *target, const void *source, int bytes, int present);
void async_commit();
void async_wait(int groups);

void run(dim3 grid, dim3 block, size_t shared, const std::function<void()> &kernel);
[[noreturn]] void fail(const char *what);

inline void check_aligned(const void *address, size_t bytes) {
    if (reinterpret_cast<uintptr_t>(address) % bytes) fail("an address is not aligned to the size of its access");
}

}  // namespace emulator

#define threadIdx (emulator::thread_index())
#define blockIdx (emulator::block_index)
#define blockDim (emulator::block_size)
#define gridDim (emulator::grid_size)

inline void __syncthreads() { emulator::barrier(); }

inline void __syncwarp() {
    emulator::slot(1);
    emulator::meet();
}

template <typename T> T __shfl_sync(unsigned, T value, int source) {
    static_assert(sizeof(T) == 4, "32-bit values");
    memcpy(emulator::slot(2).words, &value, 4);
    T result;
    memcpy(&result, emulator::meet()[source & 31].words, 4);
    return result;
}

template <typename T> T __shfl_xor_sync(unsigned mask, T value, int distance) {
    return __shfl_sync(mask, value, emulator::lane_index() ^ distance);
}

inline int __reduce_max_sync(unsigned mask, int value) {
    for (int distance = 16; distance; distance /= 2) value = std::max(value, __shfl_xor_sync(mask, value, distance));
    return value;
}

inline int __reduce_min_sync(unsigned mask, int value) { return ~__reduce_max_sync(mask, ~value); }

template <typename T> const T &__ldg(const T *address) {
    emulator::check_aligned(address, sizeof(T));
    return *address;
}

inline uint32_t __float_as_uint(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

inline float __uint_as_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
using std::max;
using std::min;

// --- 16-bit numbers, under the names of cuda_fp16.h and cuda_bf16.h ---

struct __half {
    uint16_t bits;
};

struct __nv_bfloat16 {
    uint16_t bits;
};

inline float __half2float(__half h) {
    const uint32_t magnitude = (h.bits & 0x7fffu) << 13, sign = uint32_t(h.bits & 0x8000u) << 16;
    if (magnitude >= 0x0f800000u) return __uint_as_float(sign | magnitude | 0x7f800000u);  // infinite or NaN
    return __uint_as_float(sign | __float_as_uint(__uint_as_float(magnitude) * 0x1p112f));
}

inline __half __float2half_rn(float x) {
    const uint32_t bits = __float_as_uint(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return {uint16_t(sign | 0x7fffu)};
    if (magnitude >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};
    if (magnitude < 0x38800000u) {  // subnormal: adding 2^-1 in units of 2^-24 rounds where it has to
        return {uint16_t(sign | (__float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000u))};
    }
    return {uint16_t(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13))};
}

inline float __bfloat162float(__nv_bfloat16 b) { return __uint_as_float(uint32_t(b.bits) << 16); }

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    const uint32_t bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {uint16_t(0x7fffu)};
    return {uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
