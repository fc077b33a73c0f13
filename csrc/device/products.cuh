// Products of a warp's 16 rows with a matrix in a tile, and where their results go in another.
//
// The factor of step k is `factor(k)`, an A whose K is in the order of `chained`: from a tile by `load_a_chained`, or
// from other results by `chained`.

#pragma once

#include "mma.cuh"

namespace ovseg {

// d += factor · matrix, the matrix having STEPS · K rows. UNROLLED steps at a time: float32 is short of registers.
template <typename T, int STEPS, int UNROLLED = STEPS, int N, int WIDTH, typename Factor>
DEVICE void multiply(D (&d)[N], Tile<T, WIDTH> matrix, int lane, Factor factor) {
#pragma unroll(UNROLLED)
    for (int k = 0; k < STEPS; ++k) {
        const A a = factor(k);
#pragma unroll
        for (int n = 0; n < N / 2; ++n) {
            B b[2];
            load_b_by_rows(b, matrix, k, n, lane);
            mma<T>(d[2 * n], a, b[0]);
            mma<T>(d[2 * n + 1], a, b[1]);
        }
    }
}

// d += factor · matrixᵀ, the matrix having 8 · N rows.
template <typename T, int STEPS, int N, int WIDTH, typename Factor>
DEVICE void multiply_transposed(D (&d)[N], Tile<T, WIDTH> matrix, int lane, Factor factor) {
#pragma unroll
    for (int k = 0; k < STEPS; ++k) {
        const A a = factor(k);
#pragma unroll
        for (int n = 0; n < N / 2; ++n) {
            B b[2];
            load_b_chained(b, matrix.rows_from(16 * n), k, lane);
            mma<T>(d[2 * n], a, b[0]);
            mma<T>(d[2 * n + 1], a, b[1]);
        }
    }
}

// Where a lane's first two values of D number n go in a tile of 16 rows: row d_row(lane, 0), column 8 n +
// d_column(lane, 0). Its other two go 8 rows further, to + 8 · WIDTH. Pieces change places among eight, so that the
// ninth is 128 bytes from the first.
template <typename T, int WIDTH>
DEVICE T *pair_place(Tile<T, WIDTH> tile, int n, int lane) {
    const int step = n * int(sizeof(T)) / 2;
    return tile.at(d_row(lane, 0), d_column(lane, 0), step % 8) + step / 8 * (128 / int(sizeof(T)));
}

// Back from `chained`: two neighbours of D number n of which the factors of all steps came, i 0 for the upper row.
template <typename T, int STEPS>
DEVICE Pair<float> chained_pair(const A (&factors)[STEPS], int n, int i) {
    if constexpr (sizeof(T) == 2) {
        Pair<T> pair;
        memcpy(&pair, &factors[n / 2].word[n % 2 * 2 + i], 4);
        return {{to_float(pair.value[0]), to_float(pair.value[1])}};
    } else {
        return {{__uint_as_float(factors[n].word[i]), __uint_as_float(factors[n].word[2 + i])}};
    }
}

}  // namespace ovseg
