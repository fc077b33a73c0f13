// Attention within a window of the published sizes: up to 144 tokens, 16 of them to a warp at a time, heads of 32.

#pragma once

#include "mma.cuh"
#include "warp.cuh"
#include "windows.h"

namespace ovseg {

constexpr int C = 128, WIDTH = 32, HEADS = C / WIDTH;
constexpr int TOKENS = 144;
constexpr float SCALE = 0.17677669529663688f;         // 1 / √WIDTH
constexpr float REGION_MASK = -100.0f / SCALE;        // published, of scores that are yet to be scaled
constexpr float POWER = SCALE * 1.4426950408889634f;  // exp(SCALE · score) = exp2(POWER · score)

template <typename T>
constexpr int AT_ONCE = sizeof(T) == 2 ? TOKENS : TOKENS / 3;  // keys that a warp scores at a time, as registers allow

// The window that a block works on. It lies in shared memory, to be read again instead of kept in registers.
struct Window {
    int64_t map, image;  // positions before the class's map, among those of all, and before the image's
    int places[TOKENS], regions[TOKENS];  // -1 beyond the map
    int zero;                             // which the compiler does not know
    bool whole, plain;                    // no token is beyond it; and all tokens see each other

    // Fills it in, by all threads of the block; a barrier has to follow. `index` counts the windows of all maps.
    template <int THREADS>
    DEVICE void find(const Windows &windows, int index, int classes) {
        const int which = index % windows.count();
        for (int token = int(threadIdx.x); token < TOKENS; token += THREADS) {
            const int place = windows.place(which, token);
            places[token] = place;
            regions[token] = place < 0 ? -1 : windows.region(which, token);
        }
        if (threadIdx.x == 0) {
            zero = 0;
            const int64_t positions = int64_t(windows.height) * windows.width;
            map = index / windows.count() * positions;
            image = index / windows.count() / classes * positions;
            whole = windows.tokens() == TOKENS && !windows.padded();
            plain = windows.tokens() == TOKENS && windows.plain(which);
        }
    }
};

// Masks scores of 16 tokens, rows, with COUNT others, columns, from `first` on.
template <bool KEYS_ARE_ROWS, int COUNT>
DEVICE void mask_scores(D (&scores)[COUNT], const Window &window, int row, int first, int lane) {
    const int own[2] = {window.regions[row + d_row(lane, 0)], window.regions[row + d_row(lane, 2)]};
    const int *const others = window.regions + first;
#pragma unroll
    for (int n = 0; n < COUNT; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (others[8 * n + d_column(lane, i)] != own[i / 2]) scores[n].value[i] += REGION_MASK;
        }
    }
    if (window.whole) return;
#pragma unroll
    for (int n = 0; n < COUNT; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int key = KEYS_ARE_ROWS ? own[i / 2] : others[8 * n + d_column(lane, i)];
            if (key < 0) scores[n].value[i] = -INFINITY;
        }
    }
}

// d = rows · othersᵀ for 16 rows given as factors, and COUNT · 8 others from a tile on.
template <typename T, int COUNT>
DEVICE void score(D (&d)[COUNT], const A (&rows)[WIDTH / K<T>], Tile<T, WIDTH> others, int lane) {
#pragma unroll
    for (int n = 0; n < COUNT / 2; ++n) {
        d[2 * n] = d[2 * n + 1] = {};
#pragma unroll
        for (int k = 0; k < WIDTH / K<T>; ++k) {
            B b[2];
            load_b_chained(b, others.rows_from(16 * n), k, lane);
            const A factor = recomputed<T>(rows[k]);
            mma<T>(d[2 * n], factor, b[0]);
            mma<T>(d[2 * n + 1], factor, b[1]);
        }
    }
}

// sums += weights · values: weights of 16 rows for COUNT · 8 values, from a tile on.
template <typename T, int COUNT>
DEVICE void add_weighted(D (&sums)[WIDTH / 8], const D (&weights)[COUNT], Tile<T, WIDTH> values, int lane) {
#pragma unroll
    for (int k = 0; k < COUNT * 8 / K<T>; ++k) {
        if constexpr (sizeof(T) == 4) __syncwarp();  // registers are short: no values are read ahead
        const A factor = chained<T>(weights, k);
#pragma unroll
        for (int n = 0; n < WIDTH / 16; ++n) {
            B b[2];
            load_b_by_rows(b, values, k, n, lane);
            mma<T>(sums[2 * n], factor, b[0]);
            mma<T>(sums[2 * n + 1], factor, b[1]);
        }
    }
}

// What softmax needs of the scores of a lane's two rows: exp2(POWER · score − base) · share is a weight.
struct Softmax {
    float base[2], share[2];
};

// sums = softmax(q · keysᵀ) · values for a warp's 16 tokens from `row` on, of which q are the factors. Where not all
// keys are taken at once, the sums are brought to each new maximum.
template <typename T>
DEVICE Softmax attend(D (&sums)[WIDTH / 8], const A (&q)[WIDTH / K<T>], Tile<T, WIDTH> keys, Tile<T, WIDTH> values,
                      const Window &window, int row, int lane) {
    constexpr int COUNT = AT_ONCE<T> / 8;
    float largest[2] = {-INFINITY, -INFINITY}, total[2] = {};
    Softmax softmax;
#pragma unroll
    for (int n = 0; n < WIDTH / 8; ++n) sums[n] = {};
#pragma unroll 1
    for (int first = 0; first < TOKENS; first += AT_ONCE<T>) {
        lane = recomputed(lane);
        D scores[COUNT];
        score<T>(scores, q, keys.rows_from(first), lane);
        if (!window.plain) mask_scores<false>(scores, window, row, first, lane);
        const float before[2] = {largest[0], largest[1]};
#pragma unroll
        for (int n = 0; n < COUNT; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) largest[i / 2] = fmaxf(largest[i / 2], scores[n].value[i]);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            largest[i] = maximum_over_lanes<4>(largest[i]);
            // Who sees nothing attends to nothing.
            softmax.base[i] = largest[i] == -INFINITY ? 0.0f : largest[i] * POWER;
            if constexpr (AT_ONCE<T> < TOKENS) {
                const float kept = before[i] == largest[i] ? 1.0f : fast_exp2((before[i] - largest[i]) * POWER);
                total[i] *= kept;
#pragma unroll
                for (int n = 0; n < WIDTH / 8; ++n) {
                    sums[n].value[2 * i] *= kept;
                    sums[n].value[2 * i + 1] *= kept;
                }
            }
        }
#pragma unroll
        for (int n = 0; n < COUNT; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float &weight = scores[n].value[i];
                weight = fast_exp2(weight * POWER - softmax.base[i / 2]);
                total[i / 2] += weight;
            }
        }
        add_weighted<T>(sums, scores, values.rows_from(first), lane);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        total[i] = sum_over_lanes<4>(total[i]);
        softmax.share[i] = total[i] == 0.0f ? 1.0f : fast_reciprocal(total[i]);
    }
#pragma unroll
    for (int n = 0; n < WIDTH / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[n].value[i] *= softmax.share[i / 2];
    }
    return softmax;
}

// Whether the kernels take windows of these sizes.
inline bool takes_windows(int64_t classes, int64_t height, int64_t width, int64_t channels, int64_t heads,
                          int64_t window, int64_t shift) {
    return channels == C && heads == HEADS && window >= 1 && window * window <= TOKENS && window <= height &&
           window <= width && shift >= 0 && shift < window && classes <= INT32_MAX && height <= INT32_MAX / width;
}

}  // namespace ovseg
