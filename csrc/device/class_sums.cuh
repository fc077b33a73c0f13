// A head's sums over the classes, see class_attention.cuh, from keys and values in tiles.
//
// A warp takes a quarter of S at a time, 16 × 16, over all rows of the tiles: each sum is one warp's, in the order of
// the classes. z and m come from products as well, with ones.

#pragma once

#include "class_attention.cuh"

namespace ovseg {

constexpr int QUARTERS = 4;

// Two neighbours of a factor's row in a register, or in float32 the first of them alone.
template <typename T> DEVICE uint32_t factor_word(float first, float second) {
    if constexpr (sizeof(T) == 2) return rounded_word<T>(first, second);
    return __float_as_uint(first);
}

// Two numbers kept for later. As 16-bit ones they share a register; `recomputed` keeps the compiler from parting them.
template <typename T> struct Kept {
    uint32_t word[sizeof(T) / 2];

    static DEVICE Kept of(float first, float second) {
        if constexpr (sizeof(T) == 2) {
            return {{recomputed(rounded_word<T>(first, second))}};
        } else {
            return {{__float_as_uint(first), __float_as_uint(second)}};
        }
    }

    DEVICE Pair<T> pair() const {
        uint32_t same[sizeof(T) / 2];
        unrolled<int(sizeof(T) / 2)>([&](int i) { same[i] = recomputed(word[i]); });
        Pair<T> pair;
        memcpy(&pair, same, sizeof(pair));
        return pair;
    }
};

// A quarter of S, number 2 · (rows / 16) + columns / 16, as the values of two acc, with its part of z and of m.
struct Quarter {
    float outer[8], total[2], mean[4];

    // Adds `rows` keys and values, from number `first` of the list on, to S; z and m become theirs. Values beyond the
    // list are 0. m is a sum of ones times values, the padding class as often as it counts.
    template <typename T>
    DEVICE void add(Tile<T, WIDTH> keys, Tile<T, WIDTH> values, int which, int first, int rows, const Classes &classes,
                    int lane) {
        const uint32_t one = factor_word<T>(1.0f, 1.0f);
        Acc of_outer[2] = {{{outer[0], outer[1], outer[2], outer[3]}}, {{outer[4], outer[5], outer[6], outer[7]}}};
        Acc of_total = {}, of_mean[2] = {};
#pragma unroll 2
        for (int k = 0; k < rows / K<T>; ++k) {
            const FragA key = load_a_by_rows(keys, k, which / 2, lane);
            const FragB2 value = load_b_by_rows(values, k, which % 2, lane);
            mma<T>(of_total, key, FragB{{one, one}});
            mma<T>(of_outer, key, value);
            mma<T>(of_mean, FragA{{one, one, one, one}}, value);
        }
        unrolled<8>([&](int i) { outer[i] = of_outer[i / 4].value[i % 4]; });
        const int pad = classes.count - first;
        const bool padded = classes.pads > 1 && pad >= 0 && pad < rows;
        unrolled<4>([&](int i) {
            mean[i] = of_mean[i / 2].value[i % 2];
            if (padded) {
                const int column = which % 2 * 16 + i / 2 * 8 + acc_col(lane, i % 2);
                mean[i] += float(classes.pads - 1) * to_float(*values.at(pad, column));
            }
            mean[i] *= classes.share;
        });
        unrolled<2>([&](int i) { total[i] = of_total.value[2 * i]; });
    }

    // Values 2 i and 2 i + 1 of it, with m subtracted from the values.
    template <typename T> DEVICE Kept<T> pair(int i) const {
        const float z = total[i % 2];
        return Kept<T>::of(outer[2 * i] - z * mean[i / 2 * 2], outer[2 * i + 1] - z * mean[i / 2 * 2 + 1]);
    }

    // function(index, value) for its part of z, and of m behind it.
    template <typename OfZ, typename OfM> DEVICE void each_vector(int which, int lane, OfZ of_z, OfM of_m) {
        unrolled<2>([&](int i) { of_z(which / 2 * 16 + acc_row(lane, 2 * i), total[i]); });
        unrolled<4>([&](int i) { of_m(WIDTH + which % 2 * 16 + i / 2 * 8 + acc_col(lane, i % 2), mean[i]); });
    }

    // Two quarters have the same part of z, or of m, and so do several lanes: one of them stores or adds it.
    DEVICE void store_vectors(float *z, bool add, int which, int lane) {
        const auto put = [&](int index, float value) { z[index] = add ? z[index] + value : value; };
        each_vector(
            which, lane,
            [&](int i, float value) {
                if (which % 2 == 0 && lane % 4 == 0) put(i, value);
            },
            [&](int i, float value) {
                if (which / 2 == 0 && lane / 4 == 0) put(i, value);
            });
    }

    DEVICE void load_vectors(const float *z, int which, int lane) {
        const auto get = [&](int index, float &value) { value = z[index]; };
        each_vector(which, lane, get, get);
    }
};

template <typename T> DEVICE void store_quarter(Tile<T, WIDTH> outer, const Kept<T> (&pairs)[4], int which, int lane) {
    unrolled<4>([&](int i) {
        T *const address = acc_address(outer.rows_from(which / 2 * 16), which % 2 * 2 + i / 2, lane);
        store(address + i % 2 * (8 * WIDTH), pairs[i].pair());
    });
}

}  // namespace ovseg
