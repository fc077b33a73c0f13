// Group normalisation of maps, (positions, channels), in a way that large means do not spoil.

#pragma once

#include "vectors.h"

namespace {

constexpr int64_t CHUNK_ROWS = 64;  // positions whose moments are taken at a time

// Mean and sum of squared deviations of every channel, of all rows so far; `width` is a multiple of the lanes.
struct Moments {
    float *mean, *squares;
    int64_t rows = 0;
};

// Joins rows, (count, width), to them (Chan, Golub and LeVeque).
INLINE void add_rows(const float *rows, int64_t count, int64_t width, Moments &moments) {
    const float joined = float(moments.rows + count), share = float(count) / joined,
                weight = float(moments.rows) * share;
    const int64_t fours = count / 4 * 4;
    for (int64_t c = 0; c < width; c += LANES) {
        Floats sums[4] = {};
        for (int64_t row = 0; row < fours; row += 4) {
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) sums[i] += load(rows + (row + i) * width + c);
        }
        for (int64_t row = fours; row < count; ++row) sums[0] += load(rows + row * width + c);
        const Floats mean = ((sums[0] + sums[1]) + (sums[2] + sums[3])) * broadcast(1.0f / float(count));
        Floats squares[4] = {};
        for (int64_t row = 0; row < fours; row += 4) {
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                const Floats centred = load(rows + (row + i) * width + c) - mean;
                squares[i] += centred * centred;
            }
        }
        for (int64_t row = fours; row < count; ++row) {
            const Floats centred = load(rows + row * width + c) - mean;
            squares[0] += centred * centred;
        }
        const Floats own = (squares[0] + squares[1]) + (squares[2] + squares[3]);
        if (!moments.rows) {
            store(moments.mean + c, mean);
            store(moments.squares + c, own);
            continue;
        }
        const Floats before = load(moments.mean + c), step = mean - before;
        store(moments.mean + c, before + step * broadcast(share));
        store(moments.squares + c, load(moments.squares + c) + own + step * step * broadcast(weight));
    }
    moments.rows += count;
}

// The channels' moments become what each is normalised with: weight / s in place of the squares, and bias − mean · that
// in place of the mean. statistics (groups, 2), or null, receives the groups' means and 1 / s.
INLINE void finish(const Moments &moments, const float *weight, const float *bias, int64_t channels, int64_t groups,
                   float eps, float *statistics) {
    const int64_t each = channels / groups;
    for (int64_t group = 0; group < groups; ++group) {
        float *means = moments.mean + group * each, *squares = moments.squares + group * each;
        float mean = 0, total = 0;
        for (int64_t c = 0; c < each; ++c) mean += (means[c] - means[0]) / float(each);
        mean += means[0];
        for (int64_t c = 0; c < each; ++c) {
            total += squares[c] + float(moments.rows) * (means[c] - mean) * (means[c] - mean);
        }
        const float scale = 1.0f / __builtin_sqrtf(total / (float(moments.rows) * float(each)) + eps);
        for (int64_t c = 0; c < each; ++c) {
            squares[c] = scale * weight[group * each + c];
            means[c] = bias[group * each + c] - mean * squares[c];
        }
        if (statistics) {
            statistics[2 * group] = mean;
            statistics[2 * group + 1] = scale;
        }
    }
}

// ReLU(GN(x)) of a vector of channels, with what `finish` left; NaN stays.
INLINE Floats normalised(Floats x, const Moments &moments, int64_t c) {
    const Floats y = x * load(moments.squares + c) + load(moments.mean + c);
    return select(y < Floats{}, Floats{}, y);
}

}  // namespace
