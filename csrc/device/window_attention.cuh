// Attention within a window of the published sizes: up to 144 tokens, nine warps with 16 of them each, heads of 32.

#pragma once

#include "mma.cuh"
#include "warp.cuh"
#include "windows.h"

namespace ovseg {

constexpr int C = 128, WIDTH = 32, HEADS = C / WIDTH;
constexpr int TOKENS = 144, THREADS = TOKENS / 16 * 32;
constexpr float LOG2E = 1.4426950408889634f;
constexpr float REGION_MASK = -100.0f * LOG2E;  // published

constexpr int AT_ONCE = TOKENS / 3;  // keys that a warp scores at a time: more would not fit its registers

// The window that a block works on. It lies in shared memory, to be read again instead of kept in registers.
struct Window {
    int64_t map, image;  // positions before the class's map, among those of all, and before the image's
    int places[TOKENS];
    signed char regions[TOKENS];  // -1 beyond the map

    // Fills it in, by all threads of the block; a barrier has to follow. `index` counts the windows of all maps. Returns whether
    // the window has a token in every place, which all see each other.
    __device__ __forceinline__ bool find(const Windows &windows, int index, int classes) {
        const int which = index % windows.count();
        for (int token = int(threadIdx.x); token < TOKENS; token += THREADS) {
            const int place = windows.place(which, token);
            places[token] = place;
            regions[token] = static_cast<signed char>(place < 0 ? -1 : windows.region(which, token));
        }
        if (threadIdx.x == 0) {
            const int64_t positions = int64_t(windows.height) * windows.width;
            map = index / windows.count() * positions;
            image = index / windows.count() / classes * positions;
        }
        return windows.plain(which) && windows.tokens() == TOKENS;
    }
};

// Scores of 16 tokens, rows, with COUNT others, columns, from `first` on: scaled, in units of log 2, as the hardware's
// exponential has base two, and masked.
template <bool KEYS_ARE_ROWS, int COUNT>
__device__ __forceinline__ void finish_scores(D (&scores)[COUNT], const Window &window, bool plain, int row, int first,
                                              int lane) {
    const float scale = rsqrtf(float(WIDTH)) * LOG2E;
    const int own[2] = {window.regions[row + d_row(lane, 0)], window.regions[row + d_row(lane, 2)]};
#pragma unroll
    for (int n = 0; n < COUNT; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float &score = scores[n].value[i];
            score *= scale;
            if (!plain) {
                const int other = window.regions[first + 8 * n + d_column(lane, i)];
                if (other != own[i / 2]) score += REGION_MASK;
                if ((KEYS_ARE_ROWS ? own[i / 2] : other) < 0) score = -INFINITY;
            }
        }
    }
}

// d = rows · othersᵀ for 16 rows given as factors, and COUNT · 8 others from a tile on.
template <typename T, int COUNT>
__device__ __forceinline__ void score(D (&d)[COUNT], const A (&rows)[WIDTH / K<T>], Tile<T, WIDTH> others, int lane) {
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
__device__ __forceinline__ void add_weighted(D (&sums)[WIDTH / 8], const D (&weights)[COUNT], Tile<T, WIDTH> values,
                                             int lane) {
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

// What softmax needs of the scores of a lane's two rows: exp2(score − base) · share is a weight.
struct Softmax {
    float base[2], share[2];
};

// sums = softmax(q · keysᵀ) · values for a warp's 16 tokens from `row` on, of which q are the factors. Keys are taken `AT_ONCE`
// together, with the sums brought to each new maximum.
template <typename T>
__device__ __forceinline__ Softmax attend(D (&sums)[WIDTH / 8], const A (&q)[WIDTH / K<T>], Tile<T, WIDTH> keys,
                                          Tile<T, WIDTH> values, const Window &window, bool plain, int row, int lane) {
    constexpr int COUNT = AT_ONCE / 8;
    float largest[2] = {-INFINITY, -INFINITY}, total[2] = {};
    Softmax softmax;
#pragma unroll
    for (int n = 0; n < WIDTH / 8; ++n) sums[n] = {};
#pragma unroll 1
    for (int first = 0; first < TOKENS; first += AT_ONCE) {
        lane = recomputed(lane);
        D scores[COUNT];
        score<T>(scores, q, keys.rows_from(first), lane);
        finish_scores<false>(scores, window, plain, row, first, lane);
        const float before[2] = {largest[0], largest[1]};
#pragma unroll
        for (int n = 0; n < COUNT; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) largest[i / 2] = fmaxf(largest[i / 2], scores[n].value[i]);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            largest[i] = maximum_over_lanes<4>(largest[i]);
            softmax.base[i] = largest[i] == -INFINITY ? 0.0f : largest[i];  // who sees nothing attends to nothing
            const float kept = before[i] == largest[i] ? 1.0f : fast_exp2(before[i] - largest[i]);
            total[i] *= kept;
#pragma unroll
            for (int n = 0; n < WIDTH / 8; ++n) {
                sums[n].value[2 * i] *= kept;
                sums[n].value[2 * i + 1] *= kept;
            }
        }
#pragma unroll
        for (int n = 0; n < COUNT; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float &weight = scores[n].value[i];
                weight = fast_exp2(weight - softmax.base[i / 2]);
                total[i / 2] += weight;
            }
        }
        add_weighted<T>(sums, scores, values.rows_from(first), lane);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        total[i] = sum_over_lanes<4>(total[i]);
        softmax.share[i] = total[i] == 0.0f ? 1.0f : 1.0f / total[i];
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
