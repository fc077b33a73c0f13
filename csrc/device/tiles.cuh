// Tiles in shared memory: rows of 32 bytes or more, a power of two, in vectors of 16 bytes.

#pragma once

#include "numbers.cuh"

namespace ovseg {

// The byte offset of vector `vec` of row `row` in a tile with rows of BYTES bytes. ldmatrix reads eight rows of a
// column of vectors at once, which have to lie in different banks: a row's vectors are permuted by the row's 128 bytes.
template <int BYTES> __host__ __device__ constexpr int tile_offset(int row, int vec) {
    static_assert(BYTES >= 32 && (BYTES & (BYTES - 1)) == 0, "rows of 32 bytes or more, a power of two");
    return row * BYTES + (vec ^ (BYTES >= 128 ? row & 7 : row / (128 / BYTES) & (BYTES / 16 - 1))) * 16;
}

// Rows of WIDTH numbers.
template <typename T, int WIDTH> struct Tile {
    static constexpr int BYTES = WIDTH * int(sizeof(T)), VECS = BYTES / 16;

    unsigned char *start;

    DEVICE unsigned char *vec(int row, int vec) const { return start + tile_offset<BYTES>(row, vec); }

    // Vector `first + step`, which have no bit in common: with `step` known when compiled, one instruction.
    DEVICE unsigned char *stepped(int row, int first, int step) const {
        return start + (tile_offset<BYTES>(row, first) ^ step * 16);
    }

    // A number of the row; `step` vectors on, as above.
    DEVICE T *at(int row, int column, int step = 0) const {
        return reinterpret_cast<T *>(stepped(row, column / VEC<T>, step)) + column % VEC<T>;
    }

    DEVICE Tile rows_from(int row) const { return {start + row * BYTES}; }  // row: a multiple of 8
};

}  // namespace ovseg
