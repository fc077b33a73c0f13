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

    DEVICE unsigned char *piece(int row, int piece) const { return start + tile_offset<BYTES>(row, piece); }

    // The piece `first + step`, where these have no bit in common. What depends on the lane stays apart from what an
    // unrolled loop knows: one instruction a step.
    DEVICE unsigned char *stepped(int row, int first, int step) const {
        return start + (tile_offset<BYTES>(row, first) ^ step * 16);
    }

    // A number of the row; `step` pieces on, as above.
    DEVICE T *at(int row, int column, int step = 0) const {
        return reinterpret_cast<T *>(stepped(row, column / EACH<T>, step)) + column % EACH<T>;
    }

    DEVICE Tile rows_from(int row) const { return {start + row * BYTES}; }  // row: a multiple of 8
};

}  // namespace ovseg
