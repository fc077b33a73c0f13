// Patch tokens of several encoder blocks, and the two layer norms that they go through:
//
//     x̂ = norm(x),  u = a · x̂ + c,  û = norm(u),  y = g_l · û + b_l
//
// with norm(x) = (x − mean(x)) / √(var(x) + eps). A warp reads a token of any length by vectors of 16 bytes, one a
// lane.

#pragma once

#include "vectors.cuh"

namespace ovseg {

constexpr int MOST_LAYERS = 32;  // whose hidden states one launch takes

// The hidden states of each layer, (batch, tokens, channels) with the last axis contiguous; the last `patches` of the
// tokens are the patch tokens, of which there are rows() in a layer.
template <typename T> struct PatchTokens {
    int64_t batch_stride, token_stride;
    int layers, batch, tokens, patches, channels;
    bool whole;  // every token consists of whole vectors
    const T *of_layer[MOST_LAYERS] = {};

    __host__ DEVICE int rows() const { return batch * patches; }

    DEVICE const T *row(int layer, int row) const {
        return of_layer[layer] + row / patches * batch_stride + (tokens - patches + row % patches) * token_stride;
    }
};

template <typename T> struct Norms {
    const T *shared_weight, *shared_bias;  // a, c: (channels)
    const T *weight, *bias = nullptr;      // g, b: (layers, channels)
    float shared_eps = 0.0f, eps = 0.0f;
};

// Means of x and u, and what their distances from it are scaled by.
struct alignas(16) Statistics {
    float x_mean, x_scale, u_mean, u_scale;

    DEVICE float x_hat(float x) const { return (x - x_mean) * x_scale; }
    DEVICE float u_hat(float u) const { return (u - u_mean) * u_scale; }
};

// A warp's statistics of ROWS rows at a time, in two passes: squares of the numbers themselves would cancel.
template <int ROWS, typename T>
DEVICE void find_statistics(Statistics (&found)[ROWS], const T *const (&rows)[ROWS], const Norms<T> &norms,
                            int channels, bool whole, int lane) {
    const float share = 1.0f / float(channels);
    const auto each_column = [&](auto function) { each_vec<T>(channels, lane, function); };
    float sums[ROWS] = {};
    each_column([&](int column) {
        unrolled<ROWS>([&](int row) {
            const Floats<T> x = floats(load_vec(rows[row], column, channels, whole));
            unrolled<VEC<T>>([&](int i) { sums[row] += x.value[i]; });
        });
    });
    float squares[ROWS] = {}, along[ROWS] = {}, offset = 0.0f;
    unrolled<ROWS>([&](int row) { found[row].x_mean = sum_over_lanes<32>(sums[row]) * share; });
    each_column([&](int column) {
        const Floats<T> a = floats(load_vec(norms.shared_weight, column, channels, whole));
        const Floats<T> c = floats(load_vec(norms.shared_bias, column, channels, whole));
        unrolled<VEC<T>>([&](int i) { offset += c.value[i]; });
        unrolled<ROWS>([&](int row) {
            const Floats<T> x = floats(load_vec(rows[row], column, channels, whole));
            unrolled<VEC<T>>([&](int i) {
                const float full = x.value[i] - found[row].x_mean;
                const float centred = whole || column + i < channels ? full : 0.0f;
                squares[row] += centred * centred;
                along[row] += centred * a.value[i];
            });
        });
    });
    offset = sum_over_lanes<32>(offset);
    unrolled<ROWS>([&](int row) {
        found[row].x_scale = rsqrtf(sum_over_lanes<32>(squares[row]) * share + norms.shared_eps);
        found[row].u_mean = (sum_over_lanes<32>(along[row]) * found[row].x_scale + offset) * share;
        squares[row] = 0.0f;
    });
    each_column([&](int column) {
        const Floats<T> a = floats(load_vec(norms.shared_weight, column, channels, whole));
        const Floats<T> c = floats(load_vec(norms.shared_bias, column, channels, whole));
        unrolled<ROWS>([&](int row) {
            const Floats<T> x = floats(load_vec(rows[row], column, channels, whole));
            unrolled<VEC<T>>([&](int i) {
                const float u = found[row].x_hat(x.value[i]) * a.value[i] + c.value[i];
                const float centred = whole || column + i < channels ? u - found[row].u_mean : 0.0f;
                squares[row] += centred * centred;
            });
        });
    });
    unrolled<ROWS>([&](int row) { found[row].u_scale = rsqrtf(sum_over_lanes<32>(squares[row]) * share + norms.eps); });
}

// y of a vector of x from `column` on; 0 past the channels, unless the row's statistics are NaN.
template <typename T>
DEVICE Vec<T> normalised(const Floats<T> &x, const Statistics &found, const Norms<T> &norms, int layer, int column,
                         int channels, bool whole) {
    const int first = layer * channels;  // `check_patch_tokens` keeps it small
    const Floats<T> a = floats(load_vec(norms.shared_weight, column, channels, whole));
    const Floats<T> c = floats(load_vec(norms.shared_bias, column, channels, whole));
    const Floats<T> g = floats(load_vec(norms.weight + first, column, channels, whole));
    const Floats<T> b = floats(load_vec(norms.bias + first, column, channels, whole));
    Vec<T> y;
    unrolled<VEC<T>>([&](int i) {
        const float u = found.x_hat(x.value[i]) * a.value[i] + c.value[i];
        y.value[i] = rounded<T>(found.u_hat(u) * g.value[i] + b.value[i]);
    });
    return y;
}

// The same for a single number.
template <typename T>
DEVICE T normalised(T x, const Statistics &found, const Norms<T> &norms, int layer, int column, int channels) {
    const int index = layer * channels + column;
    const float a = to_float(norms.shared_weight[column]), c = to_float(norms.shared_bias[column]);
    const float u = found.x_hat(to_float(x)) * a + c;
    return rounded<T>(found.u_hat(u) * to_float(norms.weight[index]) + to_float(norms.bias[index]));
}

// Whether a launch takes these sizes: an ovseg.h error code.
inline int check_patch_tokens(const void *const *hidden, int64_t layers, int64_t batch, int64_t tokens, int64_t patches,
                              int64_t channels) {
    if (layers < 1 || layers > MOST_LAYERS || patches < 1 || patches > tokens || channels < 1 ||
        channels > INT32_MAX / MOST_LAYERS) {
        return OVSEG_UNSUPPORTED_SIZE;
    }
    if (batch > INT32_MAX / tokens) return OVSEG_TOO_LARGE;
    for (int64_t layer = 0; layer < layers; ++layer) {
        if (!aligned(hidden[layer])) return OVSEG_MISALIGNED;
    }
    return OVSEG_OK;
}

// The tokens that the arguments of a C function describe.
template <typename T>
PatchTokens<T> patch_tokens(const void *const *hidden, int64_t layers, int64_t batch, int64_t tokens, int64_t patches,
                            int64_t channels, int64_t batch_stride, int64_t token_stride) {
    const bool whole = whole_vecs<T>(channels) && whole_vecs<T>(batch_stride) && whole_vecs<T>(token_stride);
    auto found = filled<PatchTokens<T>>(batch_stride, token_stride, layers, batch, tokens, patches, channels, whole);
    for (int64_t layer = 0; layer < layers; ++layer) found.of_layer[layer] = static_cast<const T *>(hidden[layer]);
    return found;
}

}  // namespace ovseg
