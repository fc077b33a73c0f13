// Rows of any length, read and written by pieces of 16 bytes.

#pragma once

#include "numbers.cuh"

namespace ovseg {

template <typename T>
constexpr int EACH = 16 / int(sizeof(T));  // numbers of a piece

template <typename T>
struct Floats {
    float value[EACH<T>];
};

// A piece's numbers. Those of bfloat16 are halves of float32's: one instruction each.
template <typename T>
__device__ __forceinline__ Floats<T> floats(const Piece<T> &piece) {
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
__device__ __forceinline__ void by_wholeness(bool whole, Function function) {
    if (whole) {
        function(std::true_type());
    } else {
        function(std::false_type());
    }
}

// The piece of a row of `count` numbers that begins at `column`, zeros past the row's end. Rows that are not `whole`
// pieces are read number by number.
template <typename T>
__device__ __forceinline__ Piece<T> load_piece(const T *row, int64_t column, int64_t count, bool whole) {
    Vector<uint32_t, 4> words{};  // two 16-bit numbers share a register, whichever way they came
    Piece<T> piece{};
    if (whole) {
#ifdef __CUDACC__
        if (column < count) words = load<uint32_t, 4>(reinterpret_cast<const uint32_t *>(row + column));
#else
        if (column < count) piece = load<T, EACH<T>>(row + column);
        memcpy(&words, &piece, 16);
#endif
    } else {
#pragma unroll
        for (int i = 0; i < EACH<T>; ++i) {
            if (column + i < count) piece.value[i] = row[column + i];
        }
        memcpy(&words, &piece, 16);
    }
#ifdef __CUDACC__
#pragma unroll
    for (int i = 0; i < 4; ++i) asm("" : "+r"(words.value[i]));
#endif
    memcpy(&piece, &words, 16);
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

// A whole piece in one instruction; the compiler stores numbers one by one that come from different places.
template <typename T>
__device__ __forceinline__ void store_at_once(T *address, const Piece<T> &piece) {
#ifdef __CUDACC__
    uint32_t words[4];
    memcpy(words, &piece, 16);
    asm volatile("st.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(words[0]), "r"(words[1]), "r"(words[2]),
                 "r"(words[3])
                 : "memory");
#else
    store<T, EACH<T>>(address, piece);
#endif
}

}  // namespace ovseg
