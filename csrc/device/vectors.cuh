// Rows of any length, read and written by vectors of 16 bytes.

#pragma once

#include "numbers.cuh"

namespace ovseg {

template <typename T> struct Floats {
    float value[VEC<T>];
};

// A vector's numbers. Those of bfloat16 are the upper halves of float32's: one instruction each.
template <typename T> DEVICE Floats<T> floats(const Vec<T> &vec) {
    Floats<T> numbers;
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        Words words;
        memcpy(&words, &vec, 16);
        unrolled<4>([&](int i) {
            numbers.value[2 * i] = __uint_as_float(words.value[i] << 16);
            numbers.value[2 * i + 1] = __uint_as_float(words.value[i] & 0xffff0000u);
        });
    } else {
        unrolled<VEC<T>>([&](int i) { numbers.value[i] = to_float(vec.value[i]); });
    }
    return numbers;
}

// Whether rows of this many numbers consist of whole vectors, aligned where the first row is.
template <typename T> __host__ __device__ constexpr bool whole_vecs(int64_t count) { return count % VEC<T> == 0; }

// Calls function(whole) with a constant, so that whole vectors need no test of single numbers.
template <typename Function> DEVICE void with_constant(bool whole, Function function) {
    whole ? function(std::true_type()) : function(std::false_type());
}

// The vector at `column` of a row of `count` numbers, zeros past its end; number by number unless rows are `whole`.
template <typename T> DEVICE Vec<T> load_vec(const T *row, int64_t column, int64_t count, bool whole) {
    Words words{};
    Vec<T> vec{};
    if (whole) {
        if (column < count) words = load_words(row + column);
    } else {
        unrolled<VEC<T>>([&](int i) {
            if (column + i < count) vec.value[i] = row[column + i];
        });
        memcpy(&words, &vec, 16);
    }
    keep_together(words);
    memcpy(&vec, &words, 16);
    return vec;
}

template <typename T> DEVICE void store_vec(T *row, int64_t column, int64_t count, bool whole, const Vec<T> &vec) {
    if (whole) {
        if (column < count) store(row + column, vec);
    } else {
        unrolled<VEC<T>>([&](int i) {
            if (column + i < count) row[column + i] = vec.value[i];
        });
    }
}

// A lane's vectors of a row of `count` numbers, which a warp reads together: function(column).
template <typename T, int UNROLLED = 1, typename Function>
DEVICE void each_vec(int count, int lane, Function function) {
#pragma unroll(UNROLLED)
    for (int column = lane * VEC<T>; column < count; column += 32 * VEC<T>) function(column);
}

// A vector or zeros, read at once.
template <typename T> DEVICE Vec<T> load_if(bool present, const T *address) {
    Words words{};
    if (present) words = load_words(address);
    keep_together(words);
    Vec<T> vec;
    memcpy(&vec, &words, 16);
    return vec;
}

// A vector to global memory at once.
template <typename T> DEVICE void store_if(bool present, T *address, const Vec<T> &vec) {
    Words words;
    memcpy(&words, &vec, 16);
    if (present) store_words(address, words);
}

}  // namespace ovseg
