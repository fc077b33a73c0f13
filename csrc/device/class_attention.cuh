// Linear attention over the classes of a position, for the published sizes: four heads of 32 channels.
//
// A head's sums over all classes are the matrix S, 32 channels of keys (rows) by 32 of values (columns), a tile, and
// the vectors z, of keys' channels, and m, of values', float32 side by side. In S and z each class weighs 1 / N, so
// that they stay in float16's range. m, roughly the values' mean, is subtracted from them for precision: any m gives
// the same result but for rounding.

#pragma once

#include "products.cuh"

namespace ovseg {

constexpr int C = 128, WIDTH = 32, HEADS = C / WIDTH;
constexpr float NORMALISER_EPS = 1e-6f;  // published

// φ = elu + 1
DEVICE float feature(float x) { return x > 0.0f ? x + 1.0f : fast_exp2(x * 1.4426950408889634f); }

// The classes of a list, with the padding class as one more key if `pads` > 0.
struct Classes {
    int count, pads;
    float share;  // 1 / N

    Classes(int64_t count, int64_t pads)
        : count(int(count)), pads(int(pads)), share(float(1.0 / (double(count) + double(pads)))) {}

    __host__ DEVICE int keys() const { return count + (pads > 0); }
    __host__ DEVICE int tiles() const { return (keys() + 15) / 16; }
    DEVICE float times(int key) const {  // how often a key counts
        return key < count ? 1.0f : key < keys() ? float(pads) : 0.0f;
    }
};

// Whether the kernels take lists and maps of these sizes.
inline bool takes_classes(int64_t classes, int64_t height, int64_t width, int64_t channels, int64_t heads,
                          int64_t pooling, int64_t pads) {
    return channels == C && heads == HEADS && classes >= 1 && classes <= 1 << 24 && pads >= 0 && pads <= INT32_MAX &&
           pooling >= 1 && pooling <= height && pooling <= width && height <= INT32_MAX / width;
}

// frag_a from columns 16 · m on of a tile that holds aᵀ, its rows from K · k on; frag_b comes from `load_b_by_rows`.
template <typename T, int WIDTH> DEVICE FragA load_a_by_rows(Tile<T, WIDTH> tile, int k, int m, int lane) {
    FragA frag_a;
    if constexpr (sizeof(T) == 2) {
        ldmatrix<true>(frag_a.word, tile.rows_from(k * K<T>).stepped(b_row(lane), b_vec(lane), 2 * m));
    } else {
        unrolled<4>([&](int i) {
            const int row = k * K<T> + lane % 4 * 2 + i / 2, column = 16 * m + i % 2 * 8 + lane / 4;
            frag_a.word[i] = __float_as_uint(*tile.at(row, column));
        });
    }
    return frag_a;
}

// The frag_b of step k whose columns all are `column`, for a chained frag_a.
template <typename T> DEVICE FragB repeated_column(const float *column, int k, int lane) {
    const float *const from = column + k * K<T> + acc_col(lane, 0);
    const Pair<float> first = load<float, 2>(from);
    if constexpr (sizeof(T) == 2) {
        const Pair<float> second = load<float, 2>(from + 8);
        return {{rounded_word<T>(first.value[0], first.value[1]), rounded_word<T>(second.value[0], second.value[1])}};
    } else {
        return {{__float_as_uint(first.value[0]), __float_as_uint(first.value[1])}};
    }
}

}  // namespace ovseg
