// Matrix products of a warp on tensor cores: acc (16×8) += frag_a (16×K) · frag_b (K×8), K being 32 bytes of numbers.
//
// With g = lane / 4 and t = lane % 4, a lane holds
//     of acc          rows g, g, g+8, g+8 and columns 2t, 2t+1, 2t, 2t+1
//     of a, 16 bit    row g, columns 2t, 2t+1; row g+8, the same; row g, columns 2t+8, 2t+9; row g+8, the same
//     of a, float32   row g, column t; row g+8, the same; row g, column t+4; row g+8, the same
//     of b            as of a's rows g, with columns for rows.
// 16-bit products are mma.m16n8k16. A float32 product is three mma.m16n8k8 of TF32 numbers: of the leading 11 bits of
// both factors, and of each factor's lead with the other's rest, which leaves an error of about 2⁻²¹.
//
// Columns 2t and 2t+1 of acc lie in one lane, as a's do in 16 bit: an acc becomes the a of the next product without
// leaving the lane ("chained"). For float32 that product counts its K in another order, t, t+4 standing for 2t, 2t+1;
// its b is read accordingly (`load_b_chained`, `load_b_by_rows`).

#pragma once

#include "tiles.cuh"

namespace ovseg {

struct FragA {
    uint32_t word[4];
};

struct FragB {
    uint32_t word[2];
};

struct FragB2 {  // of 16 columns
    FragB left, right;
};

struct Acc {
    float value[4];
};

template <typename T> constexpr int K = 32 / int(sizeof(T));  // numbers that one product sums over

// Row and column of a lane's value i of an acc.
__host__ __device__ constexpr int acc_row(int lane, int i) { return lane / 4 + 8 * (i / 2); }
__host__ __device__ constexpr int acc_col(int lane, int i) { return lane % 4 * 2 + i % 2; }

// Which row and vector of a tile a lane names to ldmatrix, four 8×16-byte matrices at once, for a frag_a, a frag_b2.
__host__ __device__ constexpr int a_row(int lane) { return lane & 15; }
__host__ __device__ constexpr int a_vec(int lane) { return lane >> 4; }
__host__ __device__ constexpr int b_row(int lane) { return (lane & 7) + (lane >> 4 << 3); }
__host__ __device__ constexpr int b_vec(int lane) { return lane >> 3 & 1; }

// frag_a from rows 0..15 of a tile, its K numbers from vector 2 · k on.
template <typename T, int WIDTH> DEVICE FragA load_a(Tile<T, WIDTH> tile, int k, int lane) {
    FragA frag_a;
    ldmatrix(frag_a.word, tile.stepped(a_row(lane), a_vec(lane), 2 * k));
    return frag_a;
}

// The same for a frag_b from `load_b_chained` or `load_b_by_rows`.
template <typename T, int WIDTH> DEVICE FragA load_a_chained(Tile<T, WIDTH> tile, int k, int lane) {
    if constexpr (sizeof(T) == 2) {
        return load_a(tile, k, lane);
    } else {
        const int column = k * K<T> + acc_col(lane, 0);
        const Pair<float> upper = load<float, 2>(tile.at(acc_row(lane, 0), column));
        const Pair<float> lower = load<float, 2>(tile.at(acc_row(lane, 2), column));
        return {{__float_as_uint(upper.value[0]), __float_as_uint(lower.value[0]), __float_as_uint(upper.value[1]),
                 __float_as_uint(lower.value[1])}};
    }
}

// Writes a frag_a of `chained` to where `load_a_chained` would read it.
template <typename T, int WIDTH> DEVICE void store_chained(Tile<T, WIDTH> tile, const FragA &frag_a, int k, int lane) {
    const uint32_t (&word)[4] = frag_a.word;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int row = acc_row(lane, 2 * i), column = k * K<T> + acc_col(lane, 0);
        if constexpr (sizeof(T) == 2) {
            store<uint32_t, 1>(reinterpret_cast<uint32_t *>(tile.at(row, column)), {{word[i]}});
            store<uint32_t, 1>(reinterpret_cast<uint32_t *>(tile.at(row, column + 8)), {{word[i + 2]}});
        } else {
            store<T, 2>(tile.at(row, column), {{__uint_as_float(word[i]), __uint_as_float(word[i + 2])}});
        }
    }
}

// Both frag_b from rows 0..15 of a tile that holds bᵀ.
template <typename T, int WIDTH> DEVICE FragB2 load_b(Tile<T, WIDTH> tile, int k, int lane) {
    uint32_t word[4];
    ldmatrix(word, tile.stepped(b_row(lane), b_vec(lane), 2 * k));
    return {{{word[0], word[1]}}, {{word[2], word[3]}}};
}

// The same for a chained frag_a.
template <typename T, int WIDTH> DEVICE FragB2 load_b_chained(Tile<T, WIDTH> tile, int k, int lane) {
    if constexpr (sizeof(T) == 2) {
        return load_b(tile, k, lane);
    } else {
        const auto half = [&](int row) {
            const Pair<float> pair = load<float, 2>(tile.at(row + lane / 4, k * K<T> + lane % 4 * 2));
            return FragB{{__float_as_uint(pair.value[0]), __float_as_uint(pair.value[1])}};
        };
        return {half(0), half(8)};
    }
}

// Both frag_b from columns 16 · n on of a tile that holds b, its rows from K · k on; for a chained frag_a.
template <typename T, int WIDTH> DEVICE FragB2 load_b_by_rows(Tile<T, WIDTH> tile, int k, int n, int lane) {
    if constexpr (sizeof(T) == 2) {
        uint32_t word[4];
        ldmatrix<true>(word, tile.rows_from(k * K<T>).stepped(a_row(lane), a_vec(lane), 2 * n));
        return {{{word[0], word[1]}}, {{word[2], word[3]}}};
    } else {
        const auto half = [&](int first) {
            const int row = k * K<T> + lane % 4 * 2, column = 16 * n + first + lane / 4;
            return FragB{{__float_as_uint(*tile.at(row, column)), __float_as_uint(*tile.at(row + 1, column))}};
        };
        return {half(0), half(8)};
    }
}

// The frag_a of step k of a product from the results of another, which lie side by side: rows and columns stay.
template <typename T> DEVICE FragA chained(const Acc *acc, int k) {
    if constexpr (sizeof(T) == 2) {
        const Acc &left = acc[2 * k], &right = acc[2 * k + 1];
        return {{rounded_word<T>(left.value[0], left.value[1]), rounded_word<T>(left.value[2], left.value[3]),
                 rounded_word<T>(right.value[0], right.value[1]), rounded_word<T>(right.value[2], right.value[3])}};
    } else {
        const float (&value)[4] = acc[k].value;
        return {{__float_as_uint(value[0]), __float_as_uint(value[2]), __float_as_uint(value[1]),
                 __float_as_uint(value[3])}};
    }
}

// The leading bits of a float32 that a TF32 product reads, and the rest. Of a number that is not finite the rest is 0,
// and so is the lead that meets a rest: 0 · ∞ would be NaN.
struct Split {
    uint32_t lead, finite_lead, rest;
};

DEVICE Split split(uint32_t word) {
    const uint32_t lead = word & 0xffffe000u;
    const bool finite = (word & 0x7f800000u) != 0x7f800000u;
    const float rest = __uint_as_float(word) - __uint_as_float(lead);
    return {lead, finite ? lead : 0u, finite ? __float_as_uint(rest) : 0u};
}

// A frag_a that is split again in each turn of a loop, see `recomputed(int)`.
template <typename T> DEVICE FragA recomputed(FragA frag_a) {
    if constexpr (sizeof(T) == 4) {
        unrolled<4>([&](int i) { frag_a.word[i] = recomputed(frag_a.word[i]); });
    }
    return frag_a;
}

// acc += frag_a · frag_b
template <typename T> DEVICE void mma(Acc &acc, const FragA &frag_a, const FragB &frag_b) {
    if constexpr (sizeof(T) == 2) {
        mma_once<T>(acc.value, frag_a.word, frag_b.word);
    } else {
        FragA lead_a, finite_a, rest_a;
        FragB lead_b, finite_b, rest_b;
        unrolled<4>([&](int i) {
            const Split s = split(frag_a.word[i]);
            lead_a.word[i] = s.lead, finite_a.word[i] = s.finite_lead, rest_a.word[i] = s.rest;
        });
        unrolled<2>([&](int i) {
            const Split s = split(frag_b.word[i]);
            lead_b.word[i] = s.lead, finite_b.word[i] = s.finite_lead, rest_b.word[i] = s.rest;
        });
        mma_once<T>(acc.value, finite_a.word, rest_b.word);
        mma_once<T>(acc.value, rest_a.word, finite_b.word);
        mma_once<T>(acc.value, lead_a.word, lead_b.word);
    }
}

// The same for 16 columns: acc[0] and acc[1].
template <typename T> DEVICE void mma(Acc *acc, const FragA &frag_a, const FragB2 &frag_b) {
    mma<T>(acc[0], frag_a, frag_b.left);
    mma<T>(acc[1], frag_a, frag_b.right);
}

// Calls function(n, i) for every value i of N acc.
template <int N, typename Function> DEVICE void each_value(Function function) { unrolled<N, 4>(function); }

}  // namespace ovseg
