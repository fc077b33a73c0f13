// A head's sums over the classes, see class_attention.cuh, as warps work them out from keys and values in tiles.
//
// A warp takes a quarter of S at a time, 16 × 16, over all rows of the tiles: each sum is one warp's, in the order of
// the classes. z and m come from products as well, with ones.

#pragma once

#include "class_attention.cuh"

namespace ovseg {

constexpr int QUARTERS = 4;

// Two neighbours of a factor's row in a register, or in float32 the first of them alone.
template <typename T>
DEVICE uint32_t factor_word(float first, float second) {
    if constexpr (sizeof(T) == 2) return rounded_word<T>(first, second);
    return __float_as_uint(first);
}

// Two numbers that wait in registers. As 16-bit ones they share one; `recomputed`, both ways, keeps the compiler from
// parting them.
template <typename T>
struct Waiting {
    uint32_t word[sizeof(T) / 2];

    static DEVICE Waiting of(float first, float second) {
        if constexpr (sizeof(T) == 2) {
            return {{recomputed(rounded_word<T>(first, second))}};
        } else {
            return {{__float_as_uint(first), __float_as_uint(second)}};
        }
    }

    DEVICE Pair<T> pair() const {
        uint32_t same[sizeof(T) / 2];
#pragma unroll
        for (int i = 0; i < int(sizeof(T) / 2); ++i) same[i] = recomputed(word[i]);
        Pair<T> pair;
        memcpy(&pair, same, sizeof(pair));
        return pair;
    }
};

// A quarter of S, number 2 · (rows / 16) + columns / 16, in the lanes as in the two D that it is, with what belongs to
// it of z and m.
struct Quarter {
    float outer[8], total[2], mean[4];

    // Adds to S what `rows` keys and values give, the first being number `first` of the list; z and m become theirs.
    // Values beyond the list are 0. m is a sum of ones times values, and the padding class, as often as it counts.
    template <typename T>
    DEVICE void add(Tile<T, WIDTH> keys, Tile<T, WIDTH> values, int which, int first, int rows, const Classes &classes,
                    int lane) {
        const uint32_t one = factor_word<T>(1.0f, 1.0f);
        D of_outer[2] = {{{outer[0], outer[1], outer[2], outer[3]}}, {{outer[4], outer[5], outer[6], outer[7]}}};
        D of_total = {}, of_mean[2] = {};
#pragma unroll 2
        for (int k = 0; k < rows / K<T>; ++k) {
            const A key = load_a_by_rows(keys, k, which / 2, lane);
            B value[2];
            load_b_by_rows(value, values, k, which % 2, lane);
            mma<T>(of_total, key, B{{one, one}});
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                mma<T>(of_outer[n], key, value[n]);
                mma<T>(of_mean[n], A{{one, one, one, one}}, value[n]);
            }
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) outer[i] = of_outer[i / 4].value[i % 4];
        const int pad = classes.count - first;
        const bool padded = classes.pads > 1 && pad >= 0 && pad < rows;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            mean[i] = of_mean[i / 2].value[i % 2];
            if (padded) {
                const int column = which % 2 * 16 + i / 2 * 8 + d_column(lane, i % 2);
                mean[i] += float(classes.pads - 1) * to_float(*values.at(pad, column));
            }
            mean[i] *= classes.share;
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) total[i] = of_total.value[2 * i];
    }

    // Values 2 i and 2 i + 1 of it, with m taken out of the values.
    template <typename T>
    DEVICE Waiting<T> pair(int i) const {
        const float z = total[i % 2];
        return Waiting<T>::of(outer[2 * i] - z * mean[i / 2 * 2], outer[2 * i + 1] - z * mean[i / 2 * 2 + 1]);
    }

    // Its places in z, function(place, value), and in m likewise.
    template <typename OfZ, typename OfM>
    DEVICE void each_vector(int which, int lane, OfZ of_z, OfM of_m) {
#pragma unroll
        for (int i = 0; i < 2; ++i) of_z(which / 2 * 16 + d_row(lane, 2 * i), total[i]);
#pragma unroll
        for (int i = 0; i < 4; ++i) of_m(which % 2 * 16 + i / 2 * 8 + d_column(lane, i % 2), mean[i]);
    }

    // Two quarters know the same of z, or of m, and so do several lanes: one of them writes it, or adds it.
    DEVICE void store_vectors(float *z, bool more, int which, int lane) {
        const auto put = [&](float *place, float value) { *place = more ? *place + value : value; };
        each_vector(
            which, lane,
            [&](int place, float value) {
                if (which % 2 == 0 && lane % 4 == 0) put(z + place, value);
            },
            [&](int place, float value) {
                if (which / 2 == 0 && lane / 4 == 0) put(z + WIDTH + place, value);
            });
    }

    DEVICE void load_vectors(const float *z, int which, int lane) {
        each_vector(
            which, lane, [&](int place, float &value) { value = z[place]; },
            [&](int place, float &value) { value = z[WIDTH + place]; });
    }
};

template <typename T>
DEVICE void store_quarter(Tile<T, WIDTH> outer, const Waiting<T> (&pairs)[4], int which, int lane) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        T *const place = pair_place(outer.rows_from(which / 2 * 16), which % 2 * 2 + i / 2, lane);
        store(place + i % 2 * (8 * WIDTH), pairs[i].pair());
    }
}

}  // namespace ovseg
