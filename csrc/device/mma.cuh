// Matrix products of a warp on tensor cores: D (16×8) += A (16×K) · B (K×8), K being 32 bytes of numbers.
//
// With g = lane / 4 and t = lane % 4, a lane holds
//     of D         rows g, g, g+8, g+8 and columns 2t, 2t+1, 2t, 2t+1
//     of A, 16 bit row g, columns 2t, 2t+1; row g+8, the same; row g, columns 2t+8, 2t+9; row g+8, the same
//     of A, float  row g, column t; row g+8, the same; row g, column t+4; row g+8, the same
//     of B         as of A's rows g, with columns for rows.
// 16-bit products are mma.m16n8k16. float32 products are three mma.m16n8k8 of TF32 numbers each: of the leading 11 bits
// of both factors, and of each factor's lead with the other's rest, which leaves an error of about 2⁻²¹.
//
// D's columns 2t and 2t+1 lie in one lane, as A's do in 16 bit: what one product gives is a factor of the next without
// leaving the lane. For float32 the next product counts its K in another order, t, t+4 standing for 2t, 2t+1; its B is
// read accordingly (`load_b_chained`, `load_b_by_rows`). The sum does not mind.

#pragma once

#include "tiles.cuh"

namespace ovseg {

struct A {
    uint32_t word[4];
};

struct B {
    uint32_t word[2];
};

struct D {
    float value[4];
};

template <typename T>
constexpr int K = 32 / int(sizeof(T));  // numbers that one product sums over

// Row and column of a D that a lane's value i is.
__host__ __device__ constexpr int d_row(int lane, int i) { return lane / 4 + 8 * (i / 2); }
__host__ __device__ constexpr int d_column(int lane, int i) { return lane % 4 * 2 + i % 2; }

// Which row and piece of a tile a lane names to ldmatrix, four 8×16-byte matrices at once, to get
__host__ __device__ constexpr int a_row(int lane) { return lane & 15; }  // an A
__host__ __device__ constexpr int a_piece(int lane) { return lane >> 4; }
__host__ __device__ constexpr int b_row(int lane) { return (lane & 7) + (lane >> 4 << 3); }  // two B
__host__ __device__ constexpr int b_piece(int lane) { return lane >> 3 & 1; }

// A from rows 0..15 of a tile, its K numbers from piece 2 · k on.
template <typename T, int WIDTH>
DEVICE A load_a(Tile<T, WIDTH> tile, int k, int lane) {
    A a;
    ldmatrix(a.word, tile.stepped(a_row(lane), a_piece(lane), 2 * k));
    return a;
}

// The same with its K numbers in the order that `load_b_chained` and `load_b_by_rows` take them in.
template <typename T, int WIDTH>
DEVICE A load_a_chained(Tile<T, WIDTH> tile, int k, int lane) {
    if constexpr (sizeof(T) == 2) {
        return load_a(tile, k, lane);
    } else {
        const int column = k * K<T> + d_column(lane, 0);
        const Pair<float> upper = load<float, 2>(tile.at(d_row(lane, 0), column));
        const Pair<float> lower = load<float, 2>(tile.at(d_row(lane, 2), column));
        return {{__float_as_uint(upper.value[0]), __float_as_uint(lower.value[0]), __float_as_uint(upper.value[1]),
                 __float_as_uint(lower.value[1])}};
    }
}

// Writes what `chained` has made a factor to where `load_a_chained` would read it.
template <typename T, int WIDTH>
DEVICE void store_chained(Tile<T, WIDTH> tile, const A &a, int k, int lane) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int row = d_row(lane, 2 * i), column = k * K<T> + d_column(lane, 0);
        if constexpr (sizeof(T) == 2) {
            store<uint32_t, 1>(reinterpret_cast<uint32_t *>(tile.at(row, column)), {{a.word[i]}});
            store<uint32_t, 1>(reinterpret_cast<uint32_t *>(tile.at(row, column + 8)), {{a.word[i + 2]}});
        } else {
            store<T, 2>(tile.at(row, column), {{__uint_as_float(a.word[i]), __uint_as_float(a.word[i + 2])}});
        }
    }
}

// Two B from rows 0..7 and 8..15 of a tile that holds Bᵀ.
template <typename T, int WIDTH>
DEVICE void load_b(B (&b)[2], Tile<T, WIDTH> tile, int k, int lane) {
    uint32_t word[4];
    ldmatrix(word, tile.stepped(b_row(lane), b_piece(lane), 2 * k));
    b[0] = {{word[0], word[1]}};
    b[1] = {{word[2], word[3]}};
}

// The same for a product whose A comes from `chained`.
template <typename T, int WIDTH>
DEVICE void load_b_chained(B (&b)[2], Tile<T, WIDTH> tile, int k, int lane) {
    if constexpr (sizeof(T) == 2) {
        load_b(b, tile, k, lane);
    } else {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const Pair<float> pair = load<float, 2>(tile.at(8 * i + lane / 4, k * K<T> + lane % 4 * 2));
            b[i] = {{__float_as_uint(pair.value[0]), __float_as_uint(pair.value[1])}};
        }
    }
}

// Two B from columns 0..7 and 8..15, counted from 16 · n, of a tile that holds B: its rows from K · k on. A is
// `chained`.
template <typename T, int WIDTH>
DEVICE void load_b_by_rows(B (&b)[2], Tile<T, WIDTH> tile, int k, int n, int lane) {
    if constexpr (sizeof(T) == 2) {
        uint32_t word[4];
        ldmatrix<true>(word, tile.rows_from(k * K<T>).stepped(a_row(lane), a_piece(lane), 2 * n));
        b[0] = {{word[0], word[1]}};
        b[1] = {{word[2], word[3]}};
    } else {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int row = k * K<T> + lane % 4 * 2, column = 16 * n + 8 * i + lane / 4;
            b[i] = {{__float_as_uint(*tile.at(row, column)), __float_as_uint(*tile.at(row + 1, column))}};
        }
    }
}

// The A of step k of a product from the results of another, which lie side by side: A's rows are theirs, and so are its
// columns.
template <typename T>
DEVICE A chained(const D *results, int k) {
    if constexpr (sizeof(T) == 2) {
        const D &left = results[2 * k], &right = results[2 * k + 1];
        return {{rounded_word<T>(left.value[0], left.value[1]), rounded_word<T>(left.value[2], left.value[3]),
                 rounded_word<T>(right.value[0], right.value[1]), rounded_word<T>(right.value[2], right.value[3])}};
    } else {
        const D &d = results[k];
        return {{__float_as_uint(d.value[0]), __float_as_uint(d.value[2]), __float_as_uint(d.value[1]),
                 __float_as_uint(d.value[3])}};
    }
}

// The leading bits of a float32 that a TF32 product reads, and the rest: 0 where the number is not finite, and so is
// the lead that it meets, as 0 · ∞ would be NaN.
struct Split {
    uint32_t lead, finite_lead, rest;
};

DEVICE Split split(uint32_t word) {
    const uint32_t lead = word & 0xffffe000u;
    const bool finite = (word & 0x7f800000u) != 0x7f800000u;
    const float rest = __uint_as_float(word) - __uint_as_float(lead);
    return {lead, finite ? lead : 0u, finite ? __float_as_uint(rest) : 0u};
}

// A factor whose splitting is worked out again in each turn of a loop, see `recomputed(int)`.
template <typename T>
DEVICE A recomputed(A a) {
    if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a.word[i] = recomputed(a.word[i]);
    }
    return a;
}

// d += a · b
template <typename T>
DEVICE void mma(D &d, const A &a, const B &b) {
    if constexpr (sizeof(T) == 2) {
        mma_once<T>(d.value, a.word, b.word);
    } else {
        A lead_a, finite_a, rest_a;
        B lead_b, finite_b, rest_b;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const Split s = split(a.word[i]);
            lead_a.word[i] = s.lead, finite_a.word[i] = s.finite_lead, rest_a.word[i] = s.rest;
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const Split s = split(b.word[i]);
            lead_b.word[i] = s.lead, finite_b.word[i] = s.finite_lead, rest_b.word[i] = s.rest;
        }
        mma_once<T>(d.value, finite_a.word, rest_b.word);
        mma_once<T>(d.value, rest_a.word, finite_b.word);
        mma_once<T>(d.value, lead_a.word, lead_b.word);
    }
}

}  // namespace ovseg
