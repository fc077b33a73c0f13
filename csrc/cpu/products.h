// Products of small matrices that lie in the caches: C (rows, columns) = A (rows, depth) · B (depth, columns).
//
// B is packed into panels of some vectors of columns. A tile of rows and one panel's columns is added up in registers.
// A is read where it lies, a number at a time for all lanes. With bfloat16 products a lane takes two depths at once.

#pragma once

#include "vectors.h"
#if OVSEG_TILE_PRODUCTS
#include "tiles.h"
#endif

namespace {

// Where an operand's numbers lie: at row * rows + depth * depths. For bfloat16, depths lie beside each other.
template <typename P> struct Matrix {
    const P *data;
    int64_t rows, depths;
};

// Numbers of A at other places: row r and depth k at r + taps[k]. For convolutions.
struct Taps {
    const float *data;
    const int32_t *taps;
};

INLINE Floats a_lane(const Matrix<float> &a, int row, int64_t k) {
    return broadcast(a.data[row * a.rows + k * a.depths]);
}
INLINE Floats a_lane(const Taps &a, int row, int64_t k) { return broadcast(a.data[row + a.taps[k]]); }
INLINE Floats b_lanes(const float *panel, int64_t k, int vectors, int vector) {
    return load(panel + (k * vectors + vector) * LANES);
}
INLINE Floats multiply_add(Floats a, Floats b, Floats sum) { return a * b + sum; }

INLINE Matrix<float> below(const Matrix<float> &a, int64_t row) { return {a.data + row * a.rows, a.rows, a.depths}; }
INLINE Taps below(const Taps &a, int64_t row) { return {a.data + row, a.taps}; }
INLINE Matrix<float> deeper(const Matrix<float> &a, int64_t k) { return {a.data + k * a.depths, a.rows, a.depths}; }
INLINE Taps deeper(const Taps &a, int64_t k) { return {a.data, a.taps + k}; }
template <typename A> struct Pair {
    static constexpr int SIZE = 1;
};

#if OVSEG_BF16_PRODUCTS
struct Bf16Pairs {  // two numbers in each lane
    __m512bh lanes;
};

INLINE Bf16Pairs a_lane(const Matrix<Bf16> &a, int row, int64_t k) {
    int32_t pair;
    memcpy(&pair, a.data + row * a.rows + 2 * k, sizeof pair);
    return {(__m512bh)_mm512_set1_epi32(pair)};
}
INLINE Bf16Pairs b_lanes(const Bf16 *panel, int64_t k, int vectors, int vector) {
    return {(__m512bh)_mm512_loadu_si512(panel + (k * vectors + vector) * 2 * LANES)};
}
INLINE Floats multiply_add(Bf16Pairs a, Bf16Pairs b, Floats sum) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, a.lanes, b.lanes);
}
INLINE Matrix<Bf16> below(const Matrix<Bf16> &a, int64_t row) { return {a.data + row * a.rows, a.rows, a.depths}; }
INLINE Matrix<Bf16> deeper(const Matrix<Bf16> &a, int64_t k) { return {a.data + 2 * k, a.rows, a.depths}; }
template <> struct Pair<Matrix<Bf16>> {
    static constexpr int SIZE = 2;
};
#endif

// Rows of a tile: as many sums as leave registers for B and A.
template <int VECTORS> constexpr int tile_rows() {
    constexpr int REGISTERS = LANES == 8 ? 16 : 32;
    constexpr int ROWS = (REGISTERS - VECTORS - 1) / VECTORS;
    return ROWS > 12 ? 12 : ROWS > 8 ? 8 : ROWS;
}

// A panel of B has STRIDE vectors, of which the tile takes the first.
template <int ROWS, int VECTORS, int STRIDE = VECTORS, typename A, typename P>
INLINE void multiply_tile(const A &a, const P *panel, int64_t steps, float *c, int64_t c_stride, bool add) {
    Floats sums[ROWS][VECTORS];
#pragma GCC unroll 16
    for (int row = 0; row < ROWS; ++row) {
#pragma GCC unroll 4
        for (int vector = 0; vector < VECTORS; ++vector) {
            sums[row][vector] = add ? load(c + row * c_stride + vector * LANES) : Floats{};
        }
    }
    for (int64_t k = 0; k < steps; ++k) {
        decltype(b_lanes(panel, k, STRIDE, 0)) b[VECTORS];
#pragma GCC unroll 4
        for (int vector = 0; vector < VECTORS; ++vector) b[vector] = b_lanes(panel, k, STRIDE, vector);
#pragma GCC unroll 16
        for (int row = 0; row < ROWS; ++row) {
            const auto lane = a_lane(a, row, k);
#pragma GCC unroll 4
            for (int vector = 0; vector < VECTORS; ++vector) {
                sums[row][vector] = multiply_add(lane, b[vector], sums[row][vector]);
            }
        }
    }
#pragma GCC unroll 16
    for (int row = 0; row < ROWS; ++row) {
#pragma GCC unroll 4
        for (int vector = 0; vector < VECTORS; ++vector) store(c + row * c_stride + vector * LANES, sums[row][vector]);
    }
}

template <int ROWS, int VECTORS, int STRIDE = VECTORS, typename A, typename P>
INLINE void multiply_rest(int64_t rows, const A &a, const P *panel, int64_t steps, float *c, int64_t c_stride,
                          bool add) {
    if (rows == ROWS) {
        multiply_tile<ROWS, VECTORS, STRIDE>(a, panel, steps, c, c_stride, add);
    } else if constexpr (ROWS > 1) {
        multiply_rest<ROWS - 1, VECTORS, STRIDE>(rows, a, panel, steps, c, c_stride, add);
    }
}

// C = A · B, or C += A · B, for any number of rows and the first VECTORS vectors of one panel that has STRIDE.
template <int VECTORS, int STRIDE = VECTORS, typename A, typename P>
INLINE void multiply_panel(const A &a, int64_t rows, const P *panel, int64_t steps, float *c, int64_t c_stride,
                           bool add) {
#if OVSEG_TILE_PRODUCTS
    if constexpr (sizeof(P) == sizeof(Bf16)) {
        multiply_in_tiles<VECTORS, STRIDE>(a.data, a.rows, rows, panel, 1, steps, c, c_stride, add);
        return;
    }
#endif
    constexpr int ROWS = tile_rows<STRIDE>();
    int64_t row = 0;
    for (; row + ROWS <= rows; row += ROWS) {
        multiply_tile<ROWS, VECTORS, STRIDE>(below(a, row), panel, steps, c + row * c_stride, c_stride, add);
    }
    if (row < rows) {
        multiply_rest<ROWS - 1, VECTORS, STRIDE>(rows - row, below(a, row), panel, steps, c + row * c_stride, c_stride,
                                                 add);
    }
}

constexpr int64_t DEPTH_STEPS = 128;  // a panel of 4 vectors and as many steps fits the first-level cache

// C = A · B, or C += A · B; C is (rows, panels · VECTORS · LANES), `depth` a multiple of the operand's pair.
template <int VECTORS, typename A, typename P>
__attribute__((noinline)) void multiply(const A &a, int64_t rows, const P *b, int64_t panels, int64_t depth, float *c,
                                        int64_t c_stride, bool add) {
    const int64_t steps = depth / Pair<A>::SIZE, panel_size = depth * VECTORS * LANES;
#if OVSEG_TILE_PRODUCTS
    if constexpr (sizeof(P) == sizeof(Bf16)) {
        multiply_in_tiles<VECTORS>(a.data, a.rows, rows, b, panels, steps, c, c_stride, add);
        return;
    }
#endif
    for (int64_t first = 0; first < steps; first += DEPTH_STEPS) {
        const int64_t count = steps - first < DEPTH_STEPS ? steps - first : DEPTH_STEPS;
        for (int64_t panel = 0; panel < panels; ++panel) {
            const P *columns = b + panel * panel_size + first * Pair<A>::SIZE * VECTORS * LANES;
            multiply_panel<VECTORS>(deeper(a, first), rows, columns, count, c + panel * VECTORS * LANES, c_stride,
                                    add || first);
        }
    }
}

constexpr int64_t round_up(int64_t size, int64_t step) { return (size + step - 1) / step * step; }

// Numbers of a packed B, with columns filled up to whole panels, depth up to pairs.
template <typename P> constexpr int64_t packed_size(int64_t columns, int64_t depth, int vectors) {
    return round_up(columns, vectors * LANES) * round_up(depth, int64_t(4 / sizeof(P)));
}

INLINE void pack_number(float *to, float x) { *to = x; }
#if OVSEG_BF16_PRODUCTS
INLINE void pack_number(Bf16 *to, Bf16 x) { *to = x; }
INLINE void pack_number(Bf16 *to, float x) { from_float(to, x); }
#else
INLINE void pack_number(float *to, Bf16 x) { *to = to_float(x); }
#endif

// A square of LANES × LANES words, its rows `stride` words apart, with rows and columns exchanged.
INLINE void transpose(const void *from, int64_t stride, void *to, int64_t to_stride) {
    Floats rows[LANES];
#pragma GCC unroll 16
    for (int row = 0; row < LANES; ++row)
        memcpy(&rows[row], static_cast<const char *>(from) + 4 * row * stride, sizeof rows[row]);
#pragma GCC unroll 4
    for (int half = 1; half < LANES; half *= 2) {
        // Lanes of a pair of rows that go to the first and to the second of them.
        const Ints low = LANE_NUMBERS + (((LANE_NUMBERS & half) != 0) & (LANES - half)), high = low + half;
#pragma GCC unroll 16
        for (int row = 0; row < LANES; ++row) {
            if (row & half) continue;
            const Floats first = rows[row], second = rows[row + half];
            rows[row] = shuffle(first, second, low);
            rows[row + half] = shuffle(first, second, high);
        }
    }
#pragma GCC unroll 16
    for (int row = 0; row < LANES; ++row)
        memcpy(static_cast<char *>(to) + 4 * row * to_stride, &rows[row], sizeof rows[row]);
}

// B from a matrix that holds its columns as rows, as weights do: (columns, depth), `stride` from row to row.
template <int VECTORS, typename T, typename P>
void pack_transposed(const T *from, int64_t stride, int64_t columns, int64_t depth, P *to) {
    constexpr int PAIR = 4 / sizeof(P);
    const int64_t width = VECTORS * LANES, words = round_up(depth, PAIR) / PAIR;
    for (int64_t first = 0; first < columns; first += LANES) {
        P *panel = to + first / width * width * words * PAIR + first % width * PAIR;
        int64_t word = 0;
        if (sizeof(T) == sizeof(P) && first + LANES <= columns && stride % PAIR == 0) {
            for (; (word + LANES) * PAIR <= depth; word += LANES) {
                transpose(from + first * stride + word * PAIR, stride / PAIR, panel + word * width * PAIR, width);
            }
        }
        for (; word < words; ++word) {
            for (int64_t lane = 0; lane < LANES; ++lane) {
                for (int part = 0; part < PAIR; ++part) {
                    P *number = panel + (word * width + lane) * PAIR + part;
                    memset(number, 0, sizeof *number);
                    const int64_t column = first + lane, k = word * PAIR + part;
                    if (column < columns && k < depth) pack_number(number, from[column * stride + k]);
                }
            }
        }
    }
    // Vectors of the last panel without a column.
    for (int64_t first = round_up(columns, LANES); first < round_up(columns, width); first += LANES) {
        P *panel = to + first / width * width * words * PAIR + first % width * PAIR;
        for (int64_t word = 0; word < words; ++word) memset(panel + word * width * PAIR, 0, 4 * LANES);
    }
}

// B from a matrix of float32 that holds it as it is: (depth, columns), columns a multiple of a panel's.
template <int VECTORS>
INLINE void pack_rows(const float *from, int64_t stride, int64_t depth, int64_t columns, float *to) {
    for (int64_t first = 0; first < columns; first += VECTORS * LANES) {
        for (int64_t k = 0; k < depth; ++k, to += VECTORS * LANES) {
            memcpy(to, from + k * stride + first, VECTORS * sizeof(Floats));
        }
    }
}

#if OVSEG_BF16_PRODUCTS
template <int VECTORS>
INLINE void pack_rows(const float *from, int64_t stride, int64_t depth, int64_t columns, Bf16 *to) {
    for (int64_t first = 0; first < columns; first += VECTORS * LANES) {
        for (int64_t k = 0; k < depth; k += 2) {
            const float *row = from + k * stride + first;
            for (int64_t c = 0; c < VECTORS * LANES; c += LANES, to += 2 * LANES) {
                const Words pairs = bf16_pairs(load(row + c), k + 1 < depth ? load(row + stride + c) : Floats{});
                memcpy(to, &pairs, sizeof pairs);
            }
        }
    }
}
#endif

// A vector of columns of B, of one depth or a pair.
template <typename T> INLINE void pack_lanes(const T *row, const T *, float *to) { store(to, load(row)); }
#if OVSEG_BF16_PRODUCTS
INLINE void pack_lanes(const Bf16 *row, const Bf16 *next, Bf16 *to) {
    Halves low, high;
    memcpy(&low, row, sizeof low);
    memcpy(&high, next, sizeof high);
    const Words pairs = widen(low) | widen(high) << 16;
    memcpy(to, &pairs, sizeof pairs);
}
#endif

// B from a tensor that holds it as it is, (depth, columns), of any size: zeros fill it up to whole panels and pairs.
template <int VECTORS, typename T, typename P>
void pack_rows_filled(const T *from, int64_t stride, int64_t depth, int64_t columns, P *to) {
    constexpr int PAIR = 4 / sizeof(P);
    for (int64_t first = 0; first < columns; first += VECTORS * LANES) {
        for (int64_t k = 0; k < depth; k += PAIR) {
            for (int64_t c = first; c < first + VECTORS * LANES; c += LANES, to += PAIR * LANES) {
                const T *row = from + k * stride + c;
                if (c + LANES <= columns && k + PAIR <= depth) {
                    pack_lanes(row, row + stride, to);
                    continue;
                }
                memset(to, 0, PAIR * LANES * sizeof *to);
                for (int64_t i = 0; i < LANES && c + i < columns; ++i) {
                    for (int64_t part = 0; part < PAIR && k + part < depth; ++part) {
                        pack_number(to + PAIR * i + part, row[part * stride + i]);
                    }
                }
            }
        }
    }
}

}  // namespace
