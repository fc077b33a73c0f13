// Rows of any length, read and written by pieces of 16 bytes.

#pragma once

#include "numbers.cuh"

namespace ovseg {

template <typename T>
constexpr int EACH = 16 / int(sizeof(T));  // numbers of a piece

// Whether rows of this many numbers consist of whole pieces, each at a multiple of 16 bytes where the first row is.
template <typename T>
__host__ __device__ constexpr bool whole_pieces(int64_t count) {
    return count % EACH<T> == 0;
}

// The piece of a row of `count` numbers that begins at `column`, zeros past the row's end. Rows that are not `whole`
// pieces are read number by number.
template <typename T>
__device__ __forceinline__ Piece<T> load_piece(const T *row, int64_t column, int64_t count, bool whole) {
    Piece<T> piece{};
    if (whole) {
        if (column < count) piece = load<T, EACH<T>>(row + column);
    } else {
#pragma unroll
        for (int i = 0; i < EACH<T>; ++i) {
            if (column + i < count) piece.value[i] = row[column + i];
        }
    }
#ifdef __CUDACC__
    // Two 16-bit numbers share a register, whichever way they came.
    uint32_t words[4];
    memcpy(words, &piece, 16);
    asm("" : "+r"(words[0]), "+r"(words[1]), "+r"(words[2]), "+r"(words[3]));
    memcpy(&piece, words, 16);
#endif
    return piece;
}

template <typename T>
__device__ __forceinline__ void store_piece(T *row, int64_t column, int64_t count, bool whole, const Piece<T> &piece) {
    if (whole) {
        if (column < count) store<T, EACH<T>>(row + column, piece);
    } else {
#pragma unroll
        for (int i = 0; i < EACH<T>; ++i) {
            if (column + i < count) row[column + i] = piece.value[i];
        }
    }
}

}  // namespace ovseg
