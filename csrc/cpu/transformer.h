// What both aggregation blocks share: layer norm of rows, the products of a tile of rows with weights, and the MLP.

#pragma once

#include "memory.h"
#include "products.h"

namespace {

constexpr float NORM_EPS = 1e-5f;
constexpr int64_t HIDDEN_CHUNK = 128;               // hidden units of the MLP that are worked through at a time
constexpr int WEIGHT_VECTORS = LANES == 8 ? 2 : 4;  // of a panel of weights: AVX2 has half the registers
constexpr int64_t WEIGHT_PANEL = WEIGHT_VECTORS * LANES;

// LN(x) of some rows at a time, whose sums then do not wait for each other.
template <int ROWS, typename P>
INLINE void layer_norm_rows(const float *x, int64_t stride, const float *weight, const float *bias, int64_t channels,
                            P *out) {
    Floats totals[ROWS]{}, squares[ROWS]{}, means[ROWS], scales[ROWS];
    for (int64_t c = 0; c < channels; c += LANES) {
#pragma GCC unroll 4
        for (int row = 0; row < ROWS; ++row) totals[row] += load(x + row * stride + c);
    }
#pragma GCC unroll 4
    for (int row = 0; row < ROWS; ++row) means[row] = broadcast(sum(totals[row]) / channels);
    for (int64_t c = 0; c < channels; c += LANES) {
#pragma GCC unroll 4
        for (int row = 0; row < ROWS; ++row) {
            const Floats centred = load(x + row * stride + c) - means[row];
            squares[row] += centred * centred;
        }
    }
#pragma GCC unroll 4
    for (int row = 0; row < ROWS; ++row) {
        scales[row] = broadcast(1.0f / __builtin_sqrtf(sum(squares[row]) / channels + NORM_EPS));
    }
    for (int64_t c = 0; c < channels; c += LANES) {
        const Floats gain = load(weight + c), offset = load(bias + c);
#pragma GCC unroll 4
        for (int row = 0; row < ROWS; ++row) {
            store(out + row * channels + c, (load(x + row * stride + c) - means[row]) * scales[row] * gain + offset);
        }
    }
}

// LN(x): x (rows, channels), `stride` from row to row, out (rows, channels); channels are a multiple of the lanes.
template <typename P>
void layer_norm(const float *x, int64_t stride, int64_t rows, const float *weight, const float *bias, int64_t channels,
                P *out) {
    int64_t row = 0;
    for (; row + 4 <= rows; row += 4)
        layer_norm_rows<4>(x + row * stride, stride, weight, bias, channels, out + row * channels);
    for (; row < rows; ++row)
        layer_norm_rows<1>(x + row * stride, stride, weight, bias, channels, out + row * channels);
}

template <typename T> INLINE void copy_to_floats(const T *from, int64_t count, float *to) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store(to + i, load(from + i));
    for (; i < count; ++i) to[i] = to_float(from[i]);
}

// Weights of x + W₂ · act(W₁ LN(x) + b₁) + b₂ as the products read them. Of W₂ each chunk of hidden units is packed by
// itself.
template <typename P> struct PackedMlp {
    const float *norm_weight, *norm_bias, *fc1_bias, *fc2_bias;
    const P *fc1, *fc2;
    int64_t channels, hidden;
};

// A vector as float32, in `arena`.
template <typename T> const float *take_vector(const void *from, int64_t count, Arena &arena) {
    float *to = arena.take<float>(count);
    if (to) copy_to_floats(static_cast<const T *>(from), count, to);
    return to;
}

// A weight (columns, depth), `stride` from row to row, packed, in `arena`.
template <typename T, typename P>
const P *take_weight(const void *from, int64_t stride, int64_t columns, int64_t depth, Arena &arena) {
    P *to = arena.take<P>(packed_size<P>(columns, depth, WEIGHT_VECTORS));
    if (to) pack_transposed<WEIGHT_VECTORS>(static_cast<const T *>(from), stride, columns, depth, to);
    return to;
}

template <typename T, typename P>
PackedMlp<P> take_mlp(const void *norm_weight, const void *norm_bias, const void *fc1_weight, const void *fc1_bias,
                      const void *fc2_weight, const void *fc2_bias, int64_t channels, int64_t hidden, Arena &arena) {
    PackedMlp<P> mlp{};
    mlp.norm_weight = take_vector<T>(norm_weight, channels, arena);
    mlp.norm_bias = take_vector<T>(norm_bias, channels, arena);
    mlp.fc1_bias = take_vector<T>(fc1_bias, hidden, arena);
    mlp.fc2_bias = take_vector<T>(fc2_bias, channels, arena);
    mlp.fc1 = take_weight<T, P>(fc1_weight, channels, hidden, channels, arena);
    P *fc2 = arena.take<P>(packed_size<P>(channels, hidden, WEIGHT_VECTORS));
    for (int64_t unit = 0; fc2 && unit < hidden; unit += HIDDEN_CHUNK) {
        const int64_t units = hidden - unit < HIDDEN_CHUNK ? hidden - unit : HIDDEN_CHUNK;
        pack_transposed<WEIGHT_VECTORS>(static_cast<const T *>(fc2_weight) + unit, hidden, channels, units,
                                        fc2 + unit * round_up(channels, WEIGHT_PANEL));
    }
    mlp.fc2 = fc2;
    mlp.channels = channels;
    mlp.hidden = hidden;
    return mlp;
}

// Scratch of `mlp` for `rows` rows: normed and activated in the operand's type, units and result in float32.
template <typename P> struct MlpScratch {
    P *normed;      // (rows, channels)
    P *activated;   // (rows, HIDDEN_CHUNK)
    float *units;   // (rows, HIDDEN_CHUNK)
    float *result;  // (rows, whole panels of channels)
};

// y + W₂ · act(W₁ LN(y) + b₁) without y and b₂, into scratch.result; y is (rows, stride).
template <bool GELU, typename P>
void mlp(const PackedMlp<P> &weights, const float *y, int64_t y_stride, int64_t rows, const MlpScratch<P> &scratch) {
    const int64_t channels = weights.channels, width = round_up(channels, WEIGHT_PANEL);
    layer_norm(y, y_stride, rows, weights.norm_weight, weights.norm_bias, channels, scratch.normed);
    for (int64_t unit = 0; unit < weights.hidden; unit += HIDDEN_CHUNK) {
        const int64_t units = weights.hidden - unit < HIDDEN_CHUNK ? weights.hidden - unit : HIDDEN_CHUNK;
        multiply<WEIGHT_VECTORS>(Matrix<P>{scratch.normed, channels, 1}, rows, weights.fc1 + unit * channels,
                                 round_up(units, WEIGHT_PANEL) / WEIGHT_PANEL, channels, scratch.units, HIDDEN_CHUNK,
                                 false);
        for (int64_t row = 0; row < rows; ++row) {
            for (int64_t c = 0; c < units; c += LANES) {
                const Floats x = load(scratch.units + row * HIDDEN_CHUNK + c) + load(weights.fc1_bias + unit + c);
                store(scratch.activated + row * HIDDEN_CHUNK + c,
                      GELU ? gelu<P>(x) : select(x < Floats{}, Floats{}, x));
            }
        }
        multiply<WEIGHT_VECTORS>(Matrix<P>{scratch.activated, HIDDEN_CHUNK, 1}, rows, weights.fc2 + unit * width,
                                 width / WEIGHT_PANEL, units, scratch.result, width, unit > 0);
    }
}

}  // namespace
