// Products of a warp's 16 rows with a matrix in a tile, and the address of their results in another.
//
// The frag_a of step k is `frag_a(k)`, from `load_a_chained` or `chained`.

#pragma once

#include "mma.cuh"

namespace ovseg {

// acc += a · matrix, whose rows are STEPS · K. UNROLLED steps at a time: float32 is short of registers.
template <typename T, int STEPS, int UNROLLED = STEPS, int N, int WIDTH, typename Frag>
DEVICE void multiply(Acc (&acc)[N], Tile<T, WIDTH> matrix, int lane, Frag frag_a) {
#pragma unroll(UNROLLED)
    for (int k = 0; k < STEPS; ++k) {
        const FragA a = frag_a(k);
        unrolled<N / 2>([&](int n) { mma<T>(acc + 2 * n, a, load_b_by_rows(matrix, k, n, lane)); });
    }
}

// acc += a · matrixᵀ, whose rows are 8 · N.
template <typename T, int STEPS, int N, int WIDTH, typename Frag>
DEVICE void multiply_transposed(Acc (&acc)[N], Tile<T, WIDTH> matrix, int lane, Frag frag_a) {
    unrolled<STEPS>([&](int k) {
        const FragA a = frag_a(k);
        unrolled<N / 2>([&](int n) { mma<T>(acc + 2 * n, a, load_b_chained(matrix.rows_from(16 * n), k, lane)); });
    });
}

// The address of a lane's first two values of acc number n in a tile of 16 rows. Its other two lie 8 rows further, at
// + 8 · WIDTH. Vectors are permuted among eight, so that the ninth is 128 bytes from the first.
template <typename T, int WIDTH> DEVICE T *acc_address(Tile<T, WIDTH> tile, int n, int lane) {
    const int step = n * int(sizeof(T)) / 2;
    return tile.at(acc_row(lane, 0), acc_col(lane, 0), step % 8) + step / 8 * (128 / int(sizeof(T)));
}

// Two neighbours of acc number n, in the upper row for i = 0, back from the frag_a of all steps.
template <typename T, int STEPS> DEVICE Pair<float> chained_pair(const FragA (&frag_a)[STEPS], int n, int i) {
    if constexpr (sizeof(T) == 2) {
        Pair<T> pair;
        memcpy(&pair, &frag_a[n / 2].word[n % 2 * 2 + i], 4);
        return {{to_float(pair.value[0]), to_float(pair.value[1])}};
    } else {
        return {{__uint_as_float(frag_a[n].word[i]), __uint_as_float(frag_a[n].word[2 + i])}};
    }
}

}  // namespace ovseg
