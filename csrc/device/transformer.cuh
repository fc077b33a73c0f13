// Parts of a transformer block that a warp computes for its 16 rows of a tile: layer norm, projections and the residual
// MLP. The weights come through shared memory a stage at a time, see `Stages`.

#pragma once

#include "products.cuh"

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

// Layer norm of rows of which LANES neighbouring lanes hold a vector each.
template <int LANES, typename T> DEVICE Vec<T> normalised(const Vec<T> &vec, const Vec<T> &weight, const Vec<T> &bias) {
    constexpr float SHARE = 1.0f / (LANES * VEC<T>);
    float sum = 0.0f, squares = 0.0f;
    unrolled<VEC<T>>([&](int i) { sum += to_float(vec.value[i]); });
    const float mean = sum_over_lanes<LANES>(sum) * SHARE;
    unrolled<VEC<T>>([&](int i) {
        const float centred = to_float(vec.value[i]) - mean;
        squares += centred * centred;
    });
    const float scale = rsqrtf(sum_over_lanes<LANES>(squares) * SHARE + LAYER_NORM_EPS);
    Vec<T> result;
    unrolled<VEC<T>>([&](int i) {
        const float x = (to_float(vec.value[i]) - mean) * scale;
        result.value[i] = rounded<T>(x * to_float(weight.value[i]) + to_float(bias.value[i]));
    });
    return result;
}

// The same for 16 rows of a tile, in place.
template <typename T, int C> DEVICE void normalise_rows(Tile<T, C> rows, const T *weight, const T *bias, int lane) {
    constexpr int LANES = C / VEC<T>, AT_ONCE = 32 / LANES;
    static_assert(LANES <= 32 && 32 % LANES == 0, "a row fits a warp");
    const int column = lane % LANES * VEC<T>;
    const Vec<T> w = load_vec(weight + column), b = load_vec(bias + column);
#pragma unroll 4
    for (int first = 0; first < 16; first += AT_ONCE) {
        T *const address = rows.at(first + lane / LANES, column);
        store(address, normalised<LANES>(load_vec(address), w, b));
    }
}

// A ring of COUNT buffers through which weights stream from global memory while earlier ones are multiplied.
// `fetch(stage, buffer)` starts the copies of one of `fetch.stages()`, in order; all threads call `next` together.
template <int COUNT, int BYTES, typename Fetch> struct Stages {
    static constexpr int LAST = (COUNT - 1) * BYTES;

    unsigned char *start;
    Fetch fetch;
    int stages;
    int started = 0, offset = 0;  // stages whose copies have started; offset of the next one

    DEVICE Stages(unsigned char *start, Fetch fetch) : start(start), fetch(fetch), stages(fetch.stages()) {
        for (int stage = 0; stage < COUNT - 1; ++stage) copy(start + stage * BYTES);
    }

    DEVICE void copy(unsigned char *buffer) {
        if (started < stages) fetch(started, buffer);
        ++started;
        commit_copies();
    }

    // The buffer of the next stage. After the barrier all are done with the stage before, whose buffer is free.
    DEVICE unsigned char *next() {
        wait_for_copies<COUNT - 2>();
        __syncthreads();
        copy(start + (offset == 0 ? LAST : offset - BYTES));
        unsigned char *const buffer = start + offset;
        offset = offset == LAST ? 0 : offset + BYTES;
        return buffer;
    }
};

// 16 rows of a tile as the a of products. 16-bit numbers are read once and kept in registers, 32 of them for 128
// numbers a row; float32 would take twice as many, and each product reads it again.
template <typename T, int C> struct RowFrags {
    static constexpr bool KEPT = sizeof(T) == 2;

    Tile<T, C> rows;
    FragA kept[KEPT ? C / K<T> : 1];

    DEVICE RowFrags(Tile<T, C> rows, int lane) : rows(rows) {
        if constexpr (KEPT) {
            unrolled<C / K<T>>([&](int k) { kept[k] = load_a(rows, k, lane); });
        }
    }

    DEVICE FragA at(int k, int lane) const {
        if constexpr (KEPT) return kept[k];
        return load_a(rows, k, lane);
    }
};

// acc = rows · weightᵀ: STAGE_ROWS outputs, from a weight (STAGE_ROWS, C).
template <typename T, int C>
DEVICE void project(Acc (&acc)[STAGE_ROWS / 8], const RowFrags<T, C> &rows, Tile<T, C> weight, int lane) {
    unrolled<STAGE_ROWS / 8>([&](int n) { acc[n] = {}; });
#pragma unroll(RowFrags<T, C>::KEPT ? C / K<T> : 1)
    for (int k = 0; k < C / K<T>; ++k) {
        const FragA frag_a = rows.at(k, lane);
#pragma unroll
        for (int n = 0; n < STAGE_ROWS / 16; ++n)
            mma<T>(acc + 2 * n, frag_a, load_b(weight.rows_from(16 * n), k, lane));
    }
}

// A lane's values of acc that lie side by side, two neighbours at a time: function(row, column, first, second).
template <int N, typename Function> DEVICE void each_pair(Acc (&acc)[N], int lane, Function function) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
            function(acc_row(lane, i), 8 * n + acc_col(lane, i), acc[n].value[i], acc[n].value[i + 1]);
        }
    }
}

// The residual MLP of a warp's 16 rows, in place:  y + W₂ act(W₁ LN(y) + b₁) + b₂. Takes two of `stages` for each
// STAGE_ROWS of the `hidden` units: of W₁ (STAGE_ROWS, C), then of W₂ (C, STAGE_ROWS).
template <typename Activation, typename T, int C, typename Stages>
DEVICE void residual_mlp(Tile<T, C> rows, const T *norm_weight, const T *norm_bias, const T *bias1, const T *bias2,
                         int hidden, Stages &stages, int lane) {
    Acc acc[C / 8];
    each_pair(acc, lane, [&](int row, int column, float &first, float &second) {
        const Pair<T> y = load<T, 2>(rows.at(row, column)), b = load<T, 2>(bias2 + column);
        first = to_float(y.value[0]) + to_float(b.value[0]);
        second = to_float(y.value[1]) + to_float(b.value[1]);
    });
    __syncwarp();
    normalise_rows(rows, norm_weight, norm_bias, lane);
    __syncwarp();
    const RowFrags<T, C> normed(rows, lane);
    int unit = 0;
    do {  // there is at least one stage, and the compiler need not keep sums for none
        lane = recomputed(lane);
        Acc units[STAGE_ROWS / 8];
        project(units, normed, Tile<T, C>{stages.next()}, lane);
        each_pair(units, lane, [&](int, int column, float &first, float &second) {
            const Pair<T> b = load<T, 2>(bias1 + unit + column);
            first = Activation::of(first + to_float(b.value[0]));
            second = Activation::of(second + to_float(b.value[1]));
        });
        multiply_transposed<T, STAGE_ROWS / K<T>>(acc, Tile<T, STAGE_ROWS>{stages.next()}, lane,
                                                  [&](int k) { return chained<T>(units, k); });
        unit += STAGE_ROWS;
    } while (unit < hidden);
    each_pair(acc, lane, [&](int row, int column, float first, float second) {
        store(rows.at(row, column), rounded_pair<T>(first, second));
    });
    __syncwarp();
}

}  // namespace ovseg
