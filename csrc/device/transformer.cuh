// Parts of a transformer block that a warp works out for its own 16 rows of a tile: layer norm, projections and the
// residual MLP. The weights come through shared memory a stage at a time, see `Stages`.

#pragma once

#include "mma.cuh"
#include "warp.cuh"

namespace ovseg {

constexpr float LAYER_NORM_EPS = 1e-5f;  // torch.nn.functional.layer_norm
constexpr int STAGE_ROWS = 32;           // outputs of a layer, or hidden units of the MLP, in a stage

inline bool takes_hidden(int64_t hidden, int multiple) {
    return hidden >= multiple && hidden % multiple == 0 && hidden <= INT32_MAX / 128;
}

// The distribution of the Gaussian. Its logarithm to base 2 below 0 is nearly a parabola; this polynomial for it leaves
// an error of 9e-7 in the result, and in GELU.
DEVICE float gaussian(float x) {
    const float z = fabsf(x);
    const float power =
        z * (-1.1510661f + z * (-0.45937163f + z * (-0.052397665f + z * (0.0073105135f - z * 0.00050511486f)))) - 1.0f;
    const float tail = fast_exp2(power);
    return x < 0.0f ? tail : 1.0f - tail;
}

struct Gelu {
    static DEVICE float of(float x) { return x * gaussian(x); }
};

struct Relu {
    static DEVICE float of(float x) { return x < 0.0f ? 0.0f : x; }  // NaN stays
};

// Layer norm of rows of which LANES neighbouring lanes hold a piece each. A row is summed twice.
template <int LANES, typename T>
DEVICE Piece<T> normalised(const Piece<T> &piece, const Piece<T> &weight, const Piece<T> &bias) {
    constexpr float SHARE = 1.0f / (LANES * EACH<T>);
    float sum = 0.0f, squares = 0.0f;
#pragma unroll
    for (int i = 0; i < EACH<T>; ++i) sum += to_float(piece.value[i]);
    const float mean = sum_over_lanes<LANES>(sum) * SHARE;
#pragma unroll
    for (int i = 0; i < EACH<T>; ++i) {
        const float away = to_float(piece.value[i]) - mean;
        squares += away * away;
    }
    const float scale = rsqrtf(sum_over_lanes<LANES>(squares) * SHARE + LAYER_NORM_EPS);
    Piece<T> result;
#pragma unroll
    for (int i = 0; i < EACH<T>; ++i) {
        const float x = (to_float(piece.value[i]) - mean) * scale;
        result.value[i] = rounded<T>(x * to_float(weight.value[i]) + to_float(bias.value[i]));
    }
    return result;
}

// The same of 16 rows that lie in a tile, in place.
template <typename T, int C>
DEVICE void normalise_rows(Tile<T, C> rows, const T *weight, const T *bias, int lane) {
    constexpr int LANES = C / EACH<T>, AT_ONCE = 32 / LANES;
    static_assert(LANES <= 32 && 32 % LANES == 0, "a row fits a warp");
    const int column = lane % LANES * EACH<T>;
    const Piece<T> w = load_piece(weight + column), b = load_piece(bias + column);
#pragma unroll 4
    for (int first = 0; first < 16; first += AT_ONCE) {
        T *const place = rows.at(first + lane / LANES, column);
        store(place, normalised<LANES>(load_piece(place), w, b));
    }
}

// A ring of COUNT buffers through which weights stream from global memory while earlier ones are multiplied.
// `fetch(stage, buffer)` begins the copies of one of `fetch.stages()`, stage after stage; all threads call `next`
// together, once a stage.
template <int COUNT, int BYTES, typename Fetch>
struct Stages {
    static constexpr int LAST = (COUNT - 1) * BYTES;

    unsigned char *start;
    Fetch fetch;
    int stages;
    int begun = 0, place = 0;  // stages whose copies have begun; where the next one lies

    DEVICE Stages(unsigned char *start, Fetch fetch) : start(start), fetch(fetch), stages(fetch.stages()) {
        for (int stage = 0; stage < COUNT - 1; ++stage) begin(start + stage * BYTES);
    }

    DEVICE void begin(unsigned char *buffer) {
        if (begun < stages) fetch(begun, buffer);
        ++begun;
        commit_copies();
    }

    // The buffer of the next stage. The barrier also tells that everybody is done with the stage before, whose place is
    // free.
    DEVICE unsigned char *next() {
        wait_for_copies<COUNT - 2>();
        __syncthreads();
        begin(start + (place == 0 ? LAST : place - BYTES));
        unsigned char *const buffer = start + place;
        place = place == LAST ? 0 : place + BYTES;
        return buffer;
    }
};

// 16 rows of a tile as the A of products. 16-bit numbers are read once and kept in registers, 32 of them for 128
// numbers a row; float32 would take twice as many, and is read again by each product.
template <typename T, int C>
struct Factors {
    static constexpr bool KEPT = sizeof(T) == 2;

    Tile<T, C> rows;
    A kept[KEPT ? C / K<T> : 1];

    DEVICE Factors(Tile<T, C> rows, int lane) : rows(rows) {
        if constexpr (KEPT) {
#pragma unroll
            for (int k = 0; k < C / K<T>; ++k) kept[k] = load_a(rows, k, lane);
        }
    }

    DEVICE A at(int k, int lane) const {
        if constexpr (KEPT) return kept[k];
        return load_a(rows, k, lane);
    }
};

// d = rows · weightᵀ: STAGE_ROWS outputs, from a weight (STAGE_ROWS, C).
template <typename T, int C>
DEVICE void project(D (&d)[STAGE_ROWS / 8], const Factors<T, C> &rows, Tile<T, C> weight, int lane) {
#pragma unroll
    for (int n = 0; n < STAGE_ROWS / 8; ++n) d[n] = {};
#pragma unroll(Factors<T, C>::KEPT ? C / K<T> : 1)
    for (int k = 0; k < C / K<T>; ++k) {
        const A a = rows.at(k, lane);
#pragma unroll
        for (int n = 0; n < STAGE_ROWS / 16; ++n) {
            B b[2];
            load_b(b, weight.rows_from(16 * n), k, lane);
            mma<T>(d[2 * n], a, b[0]);
            mma<T>(d[2 * n + 1], a, b[1]);
        }
    }
}

// A lane's values of results that lie side by side, two neighbours at a time: function(row, column, first, second).
template <int N, typename Function>
DEVICE void each_pair(D (&d)[N], int lane, Function function) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
            function(d_row(lane, i), 8 * n + d_column(lane, i), d[n].value[i], d[n].value[i + 1]);
        }
    }
}

// The residual MLP of a warp's 16 rows, in place:  y + W₂ act(W₁ LN(y) + b₁) + b₂. Takes two of `stages` for each
// STAGE_ROWS of the `hidden` units: of W₁ (STAGE_ROWS, C), then of W₂ (C, STAGE_ROWS).
template <typename Activation, typename T, int C, typename Stages>
DEVICE void residual_mlp(Tile<T, C> rows, const T *norm_weight, const T *norm_bias, const T *bias1, const T *bias2,
                         int hidden, Stages &stages, int lane) {
    D total[C / 8];
    each_pair(total, lane, [&](int row, int column, float &first, float &second) {
        const Pair<T> y = load<T, 2>(rows.at(row, column)), b = load<T, 2>(bias2 + column);
        first = to_float(y.value[0]) + to_float(b.value[0]);
        second = to_float(y.value[1]) + to_float(b.value[1]);
    });
    __syncwarp();
    normalise_rows(rows, norm_weight, norm_bias, lane);
    __syncwarp();
    const Factors<T, C> normed(rows, lane);
    int unit = 0;
    do {  // there is at least one stage, and the compiler need not keep sums for none
        lane = recomputed(lane);
        D units[STAGE_ROWS / 8];
        project(units, normed, Tile<T, C>{stages.next()}, lane);
        each_pair(units, lane, [&](int, int column, float &first, float &second) {
            const Pair<T> b = load<T, 2>(bias1 + unit + column);
            first = Activation::of(first + to_float(b.value[0]));
            second = Activation::of(second + to_float(b.value[1]));
        });
        const Tile<T, STAGE_ROWS> weight{stages.next()};
#pragma unroll
        for (int k = 0; k < STAGE_ROWS / K<T>; ++k) {
            const A activated = chained<T>(units, k);
#pragma unroll
            for (int n = 0; n < C / 16; ++n) {
                B b[2];
                load_b_chained(b, weight.rows_from(16 * n), k, lane);
                mma<T>(total[2 * n], activated, b[0]);
                mma<T>(total[2 * n + 1], activated, b[1]);
            }
        }
        unit += STAGE_ROWS;
    } while (unit < hidden);
    each_pair(total, lane, [&](int row, int column, float first, float second) {
        store(rows.at(row, column), rounded_pair<T>(first, second));
    });
    __syncwarp();
}

}  // namespace ovseg
