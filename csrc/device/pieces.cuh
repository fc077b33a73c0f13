// Rows of any length, read and written by pieces of 16 bytes.

#pragma once

#include "numbers.cuh"

namespace ovseg {

template <typename T>
struct Floats {
    float value[EACH<T>];
};

// A piece's numbers. Those of bfloat16 are halves of float32's: one instruction each.
template <typename T>
DEVICE Floats<T> floats(const Piece<T> &piece) {
    Floats<T> found;
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        uint32_t words[4];
        memcpy(words, &piece, 16);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            found.value[2 * i] = __uint_as_float(words[i] << 16);
            found.value[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
        }
    } else {
#pragma unroll
        for (int i = 0; i < EACH<T>; ++i) found.value[i] = to_float(piece.value[i]);
    }
    return found;
}

// Whether rows of this many numbers consist of whole pieces, each at a multiple of 16 bytes where the first row is.
template <typename T>
__host__ __device__ constexpr bool whole_pieces(int64_t count) {
    return count % EACH<T> == 0;
}

// Calls function(whole) with a constant: inlined, it asks nothing about single numbers of rows that are whole pieces.
template <typename Function>
DEVICE void by_wholeness(bool whole, Function function) {
    if (whole) {
        function(std::true_type());
    } else {
        function(std::false_type());
    }
}

// The piece of a row of `count` numbers that begins at `column`, zeros past the row's end. Rows that are not `whole`
// pieces are read number by number.
template <typename T>
DEVICE Piece<T> load_piece(const T *row, int64_t column, int64_t count, bool whole) {
    Words words{};
    Piece<T> piece{};
    if (whole) {
        if (column < count) words = load_words(row + column);
    } else {
#pragma unroll
        for (int i = 0; i < EACH<T>; ++i) {
            if (column + i < count) piece.value[i] = row[column + i];
        }
        memcpy(&words, &piece, 16);
    }
    keep_together(words);
    memcpy(&piece, &words, 16);
    return piece;
}

template <typename T>
DEVICE void store_piece(T *row, int64_t column, int64_t count, bool whole, const Piece<T> &piece) {
    if (whole) {
        if (column < count) store(row + column, piece);
    } else {
#pragma unroll
        for (int i = 0; i < EACH<T>; ++i) {
            if (column + i < count) row[column + i] = piece.value[i];
        }
    }
}

}  // namespace ovseg
