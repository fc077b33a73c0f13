// Tiles in shared memory, and copies into them that run beside the arithmetic.

#pragma once

#include "numbers.cuh"

namespace ovseg {

// Where the 16-byte piece `piece` of row `row` lies in a tile with rows of BYTES bytes, in bytes.
//
// Eight rows of a column of pieces are what ldmatrix reads at once: they have to lie in different banks (32 of 4
// bytes). So the pieces of a row are exchanged, by the number of the 128 bytes that the row lies in.
template <int BYTES>
__host__ __device__ constexpr int tile_offset(int row, int piece) {
    static_assert(BYTES >= 32 && (BYTES & (BYTES - 1)) == 0, "rows of 32 bytes or more, a power of two");
    return row * BYTES + (piece ^ (BYTES >= 128 ? row & 7 : row / (128 / BYTES) & (BYTES / 16 - 1))) * 16;
}

// Rows of WIDTH numbers.
template <typename T, int WIDTH>
struct Tile {
    static constexpr int BYTES = WIDTH * int(sizeof(T));
    static constexpr int PIECES = BYTES / 16;

    unsigned char *start;

    __device__ __forceinline__ unsigned char *piece(int row, int piece) const {
        return start + tile_offset<BYTES>(row, piece);
    }

    // The piece `first + step`, where these have no bit in common. What depends on the lane stays apart from what an
    // unrolled loop knows: one instruction a step.
    __device__ __forceinline__ unsigned char *stepped(int row, int first, int step) const {
        return start + (tile_offset<BYTES>(row, first) ^ step * 16);
    }

    // A number of the row; `step` pieces on, as above.
    __device__ __forceinline__ T *at(int row, int column, int step = 0) const {
        constexpr int EACH = 16 / int(sizeof(T));
        return reinterpret_cast<T *>(stepped(row, column / EACH, step)) + column % EACH;
    }

    __device__ __forceinline__ Tile rows_from(int row) const { return {start + row * BYTES}; }  // row: a multiple of 8
};

// Copies 16 bytes from global to shared memory in the background; zeros where `present` is false.
__device__ __forceinline__ void copy_async(void *target, const void *source, bool present = true) {
#ifdef __CUDACC__
    const uint32_t address = uint32_t(__cvta_generic_to_shared(target));
    const int bytes = present ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(source), "r"(bytes) : "memory");
#else
    emulator::async_copy(target, source, 16, present ? 16 : 0);
#endif
}

// Ends a group of copies; each thread counts its own.
__device__ __forceinline__ void commit_copies() {
#ifdef __CUDACC__
    asm volatile("cp.async.commit_group;" ::: "memory");
#else
    emulator::async_commit();
#endif
}

// Waits until at most GROUPS of this thread's groups are still on their way. Other threads' copies need a barrier too.
template <int GROUPS>
__device__ __forceinline__ void wait_for_copies() {
#ifdef __CUDACC__
    asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
#else
    emulator::async_wait(GROUPS);
#endif
}

}  // namespace ovseg
