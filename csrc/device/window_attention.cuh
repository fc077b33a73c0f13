// Attention within a window of the published sizes: up to 144 tokens, 16 of them to a warp at a time, heads of 32.

#pragma once

#include "products.cuh"
#include "windows.h"

namespace ovseg {

constexpr int C = 128, WIDTH = 32, HEADS = C / WIDTH;
constexpr int TOKENS = 144;
constexpr float SCALE = 0.17677669529663688f;         // 1 / √WIDTH
constexpr float REGION_MASK = -100.0f / SCALE;        // published, of scores that are yet to be scaled
constexpr float POWER = SCALE * 1.4426950408889634f;  // exp(SCALE · score) = exp2(POWER · score)

template <typename T>
constexpr int AT_ONCE = sizeof(T) == 2 ? TOKENS : TOKENS / 3;  // keys that a warp scores at a time, for registers

// The window that a block works on, in shared memory rather than in registers.
struct Window {
    int64_t map, image;  // positions before the class's map, among those of all, and before the image's
    int positions[TOKENS], regions[TOKENS];  // -1 beyond the map
    int zero;                                // which the compiler does not know
    bool whole, plain;                       // no token is beyond the map; and all tokens see each other

    // Fills it in, by all threads of the block; a barrier has to follow. `index` counts the windows of all maps.
    template <int THREADS> DEVICE void init(const Windows &windows, int index, int classes) {
        const int which = index % windows.count();
        for (int token = int(threadIdx.x); token < TOKENS; token += THREADS) {
            const int position = windows.position(which, token);
            positions[token] = position;
            regions[token] = position < 0 ? -1 : windows.region(which, token);
        }
        if (threadIdx.x == 0) {
            zero = 0;
            const int64_t area = int64_t(windows.height) * windows.width;
            map = index / windows.count() * area;
            image = index / windows.count() / classes * area;
            whole = windows.tokens() == TOKENS && !windows.padded();
            plain = windows.tokens() == TOKENS && windows.plain(which);
        }
    }
};

// Masks scores of 16 tokens from `row` on, rows, with COUNT · 8 others from `first` on, columns.
template <bool KEYS_ARE_ROWS, int COUNT>
DEVICE void mask_scores(Acc (&scores)[COUNT], const Window &window, int row, int first, int lane) {
    const int row_regions[2] = {window.regions[row + acc_row(lane, 0)], window.regions[row + acc_row(lane, 2)]};
    const int *const col_regions = window.regions + first;
    each_value<COUNT>([&](int n, int i) {
        if (col_regions[8 * n + acc_col(lane, i)] != row_regions[i / 2]) scores[n].value[i] += REGION_MASK;
    });
    if (window.whole) return;
    each_value<COUNT>([&](int n, int i) {
        const int key = KEYS_ARE_ROWS ? row_regions[i / 2] : col_regions[8 * n + acc_col(lane, i)];
        if (key < 0) scores[n].value[i] = -INFINITY;
    });
}

// scores = rows · columnsᵀ for 16 rows and COUNT · 8 columns, the rows of a tile.
template <typename T, int COUNT>
DEVICE void score(Acc (&scores)[COUNT], const FragA (&rows)[WIDTH / K<T>], Tile<T, WIDTH> columns, int lane) {
#pragma unroll
    for (int n = 0; n < COUNT; n += 2) {
        scores[n] = scores[n + 1] = {};
        unrolled<WIDTH / K<T>>([&](int k) {
            const FragB2 frag_b = load_b_chained(columns.rows_from(8 * n), k, lane);
            mma<T>(scores + n, recomputed<T>(rows[k]), frag_b);
        });
    }
}

// acc += weights · values: weights of 16 rows for COUNT · 8 values, from a tile on.
template <typename T, int COUNT>
DEVICE void add_weighted(Acc (&acc)[WIDTH / 8], const Acc (&weights)[COUNT], Tile<T, WIDTH> values, int lane) {
    multiply<T, COUNT * 8 / K<T>>(acc, values, lane, [&](int k) {
        if constexpr (sizeof(T) == 4) __syncwarp();  // registers are short: no values are read ahead
        return chained<T>(weights, k);
    });
}

// Of a lane's two rows of scores: exp2(POWER · score − base) · scale is the softmax.
struct Softmax {
    float base[2], scale[2];
};

// acc = softmax(q · keysᵀ) · values for a warp's 16 tokens from `row` on, rescaled to each new maximum of the keys.
template <typename T>
DEVICE Softmax attend(Acc (&acc)[WIDTH / 8], const FragA (&q)[WIDTH / K<T>], Tile<T, WIDTH> keys, Tile<T, WIDTH> values,
                      const Window &window, int row, int lane) {
    constexpr int COUNT = AT_ONCE<T> / 8;
    float largest[2] = {-INFINITY, -INFINITY}, total[2] = {};
    Softmax softmax;
    unrolled<WIDTH / 8>([&](int n) { acc[n] = {}; });
#pragma unroll 1
    for (int first = 0; first < TOKENS; first += AT_ONCE<T>) {
        lane = recomputed(lane);
        Acc scores[COUNT];
        score<T>(scores, q, keys.rows_from(first), lane);
        if (!window.plain) mask_scores<false>(scores, window, row, first, lane);
        const float before[2] = {largest[0], largest[1]};
        each_value<COUNT>([&](int n, int i) { largest[i / 2] = fmaxf(largest[i / 2], scores[n].value[i]); });
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            largest[i] = maximum_over_lanes<4>(largest[i]);
            // A token that sees nothing attends to nothing.
            softmax.base[i] = largest[i] == -INFINITY ? 0.0f : largest[i] * POWER;
            if constexpr (AT_ONCE<T> < TOKENS) {
                const float rescale = before[i] == largest[i] ? 1.0f : fast_exp2((before[i] - largest[i]) * POWER);
                total[i] *= rescale;
                unrolled<WIDTH / 8>([&](int n) {
                    acc[n].value[2 * i] *= rescale;
                    acc[n].value[2 * i + 1] *= rescale;
                });
            }
        }
        each_value<COUNT>([&](int n, int i) {
            float &weight = scores[n].value[i];
            weight = fast_exp2(weight * POWER - softmax.base[i / 2]);
            total[i / 2] += weight;
        });
        add_weighted<T>(acc, scores, values.rows_from(first), lane);
    }
    unrolled<2>([&](int i) {
        total[i] = sum_over_lanes<4>(total[i]);
        softmax.scale[i] = total[i] == 0.0f ? 1.0f : fast_reciprocal(total[i]);
    });
    each_value<WIDTH / 8>([&](int n, int i) { acc[n].value[i] *= softmax.scale[i / 2]; });
    return softmax;
}

// Whether the kernels take windows of these sizes.
inline bool takes_windows(int64_t classes, int64_t height, int64_t width, int64_t channels, int64_t heads,
                          int64_t window, int64_t shift) {
    return channels == C && heads == HEADS && window >= 1 && window * window <= TOKENS && window <= height &&
           window <= width && shift >= 0 && shift < window && classes <= INT32_MAX && height <= INT32_MAX / width;
}

}  // namespace ovseg
