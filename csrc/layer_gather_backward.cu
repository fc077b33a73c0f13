// Backward of the layer gather and of its weighted sum over layers; names as in layer_gather.cu and patch_tokens.cuh.
//
// From the gradient d of the layer's map, w · d in a sum over layers (w = 1 alone):
//
//     y as forward, z = y · P,  n = max(‖z‖, ε),  f = z / n
//     dw = Σ <d, f>                       over all patches
//     dz = (w · d − f · <w · d, f>) / n   the second term is 0 where ‖z‖ < ε
//     dy = dz · Pᵀ,                       dP = Σ yᵀ · dz
//     dg = Σ dy · û,   db = Σ dy,         du = norm'(g · dy; u)
//     da = Σ du · x̂,   dc = Σ du,         dx = norm'(a · du; x)
//
// with norm'(h; v) = (h − mean(h) − v̂ · mean(h · v̂)) / √(var(v) + eps). The three products are PyTorch's. In each
// kernel a warp takes one token; the sums over tokens have a kernel of their own, a thread for each channel.

#include "device/partial_sums.cuh"
#include "device/patch_tokens.cuh"

namespace ovseg {
namespace {

constexpr int WARPS = 8, THREADS = 32 * WARPS;
constexpr int TOGETHER = 32;  // tokens that a thread of `sum_norm_gradients` adds up

DEVICE int64_t row_of_warp() { return int64_t(blockIdx.x) * WARPS + threadIdx.x / 32; }

int64_t blocks_for(int64_t rows) { return (rows + WARPS - 1) / WARPS; }

// Means over the channels of h and h · û, h being the gradient of û.
struct Means {
    float h, h_along;
};

// y (layers, rows, channels) and the statistics (layers, rows).
template <typename T>
__global__ void __launch_bounds__(THREADS)
    normalise_patches(const PatchTokens<T> hidden, const Norms<T> norms, T *y, Statistics *statistics) {
    const int64_t index = row_of_warp();
    const int rows = hidden.rows(), channels = hidden.channels, lane = int(threadIdx.x) % 32;
    const int layer = int(index / rows);
    if (layer >= hidden.layers) return;
    const T *const row[1] = {hidden.row(layer, int(index % rows))};
    with_constant(hidden.whole, [&](auto whole) {
        Statistics found[1];
        find_statistics(found, row, norms, channels, whole, lane);
        if (lane == 0) statistics[index] = found[0];
        each_vec<T>(channels, lane, [&](int column) {
            const Floats<T> x = floats(load_vec(row[0], column, channels, whole));
            store_vec(y + index * channels, column, channels, whole,
                      normalised(x, found[0], norms, layer, column, channels, whole));
        });
    });
}

// dz replaces z (layers, rows, width). With weights (layers) all layers share d (rows, width), and <d, f> of each row
// goes to `along`, or null; else d is (layers, rows, width).
template <typename T>
__global__ void __launch_bounds__(THREADS)
    length_backward(const T *grad, T *z, const T *weights, float *along, int layers, int64_t rows, int width) {
    const int64_t index = row_of_warp();
    const int lane = int(threadIdx.x) % 32;
    const int layer = int(index / rows);
    if (layer >= layers) return;
    const T *const d = grad + (weights ? index % rows : index) * width;
    z += index * width;
    with_constant(whole_vecs<T>(width), [&](auto whole) {
        float squares = 0.0f, product = 0.0f;
        each_vec<T>(width, lane, [&](int column) {
            const Floats<T> zs = floats(load_vec(z, column, width, whole));
            const Floats<T> ds = floats(load_vec(d, column, width, whole));
#pragma unroll
            for (int i = 0; i < VEC<T>; ++i) {
                squares += zs.value[i] * zs.value[i];
                product += zs.value[i] * ds.value[i];
            }
        });
        const float length = sqrtf(sum_over_lanes<32>(squares));
        const bool shortened = length < SHORTEST;
        const float scale = 1.0f / (shortened ? SHORTEST : length);  // NaN stays
        product = sum_over_lanes<32>(product) * scale;
        if (along && lane == 0) along[index] = product;
        const float weight = (weights ? to_float(weights[layer]) : 1.0f) * scale;
        const float of_z = shortened ? 0.0f : product * scale;
        each_vec<T>(width, lane, [&](int column) {
            const Floats<T> zs = floats(load_vec(z, column, width, whole));
            const Floats<T> ds = floats(load_vec(d, column, width, whole));
            Vec<T> dz;
#pragma unroll
            for (int i = 0; i < VEC<T>; ++i) dz.value[i] = rounded<T>(weight * (ds.value[i] - of_z * zs.value[i]));
            store_vec(z, column, width, whole, dz);
        });
    });
}

// From dy (layers, rows, channels): dx (layers, batch, tokens, channels), 0 where tokens are not patches, and the means
// for the sums; either or null.
template <typename T>
__global__ void __launch_bounds__(THREADS)
    norms_backward(const T *grad, const PatchTokens<T> hidden, const Norms<T> norms, const Statistics *statistics,
                   T *hidden_grad, Means *means) {
    const int64_t index = row_of_warp(), tokens = int64_t(hidden.batch) * hidden.tokens;
    const int channels = hidden.channels, lane = int(threadIdx.x) % 32;
    const int layer = int(index / tokens), token = int(index % tokens);
    if (layer >= hidden.layers) return;
    const int patch = token % hidden.tokens - (hidden.tokens - hidden.patches);
    with_constant(hidden.whole, [&](auto whole) {
        T *const dx = hidden_grad ? hidden_grad + index * channels : nullptr;
        if (patch < 0) {
            if (!dx) return;
            each_vec<T>(channels, lane, [&](int column) { store_vec(dx, column, channels, whole, Vec<T>{}); });
            return;
        }
        const int row = token / hidden.tokens * hidden.patches + patch;
        const int64_t patch_row = int64_t(layer) * hidden.rows() + row;
        const T *const x = hidden.row(layer, row), *const dy = grad + patch_row * channels;
        const Statistics found = statistics[patch_row];
        const float share = 1.0f / float(channels);

        // function(x̂, û, h, a) for each of the lane's channels, h and a 0 past the last; its result is dx if `stored`.
        const auto each_channel = [&](bool stored, auto function) {
            each_vec<T>(channels, lane, [&](int column) {
                const auto read = [&](const T *row) { return floats(load_vec(row, column, channels, whole)); };
                const Floats<T> xs = read(x), dys = read(dy), gs = read(norms.weight + layer * channels);
                const Floats<T> as = read(norms.shared_weight), cs = read(norms.shared_bias);
                Vec<T> result;
#pragma unroll
                for (int i = 0; i < VEC<T>; ++i) {
                    const float x_hat = found.x_hat(xs.value[i]), a = as.value[i];
                    const float u_hat = found.u_hat(x_hat * a + cs.value[i]);
                    result.value[i] = rounded<T>(function(x_hat, u_hat, gs.value[i] * dys.value[i], a));
                }
                if (stored) store_vec(dx, column, channels, whole, result);
            });
        };
        float sum = 0.0f, sum_along = 0.0f;
        each_channel(false, [&](float, float u_hat, float h, float) {
            sum += h, sum_along += h * u_hat;
            return 0.0f;
        });
        const Means of_h{sum_over_lanes<32>(sum) * share, sum_over_lanes<32>(sum_along) * share};
        if (means && lane == 0) means[patch_row] = of_h;
        if (!dx) return;
        const auto u_grad = [&](float u_hat, float h) { return (h - of_h.h - u_hat * of_h.h_along) * found.u_scale; };
        sum = sum_along = 0.0f;
        each_channel(false, [&](float x_hat, float u_hat, float h, float a) {
            const float along = a * u_grad(u_hat, h);
            sum += along, sum_along += along * x_hat;
            return 0.0f;
        });
        const float mean = sum_over_lanes<32>(sum) * share, mean_along = sum_over_lanes<32>(sum_along) * share;
        each_channel(true, [&](float x_hat, float u_hat, float h, float a) {
            return (a * u_grad(u_hat, h) - mean - x_hat * mean_along) * found.x_scale;
        });
    });
}

// da, dc, dg and db of TOGETHER tokens: sums (layers, count, 4, channels).
template <typename T>
__global__ void __launch_bounds__(THREADS)
    sum_norm_gradients(const T *grad, const PatchTokens<T> hidden, const Norms<T> norms, const Statistics *statistics,
                       const Means *means, float *sums) {
    const int rows = hidden.rows(), channels = hidden.channels;
    const int parts = (channels + THREADS - 1) / THREADS, count = (rows + TOGETHER - 1) / TOGETHER;
    const int channel = int(blockIdx.x) % parts * THREADS + int(threadIdx.x), chunk = int(blockIdx.x) / parts;
    const int layer = chunk / count, first = chunk % count * TOGETHER;
    if (channel >= channels) return;
    const float a = to_float(norms.shared_weight[channel]), c = to_float(norms.shared_bias[channel]);
    const float g = to_float(norms.weight[int64_t(layer) * channels + channel]);
    float a_sum = 0.0f, c_sum = 0.0f, g_sum = 0.0f, b_sum = 0.0f;
    const T *x = hidden.row(layer, first) + channel;
    int patch = first % hidden.patches;
    const int64_t start = int64_t(layer) * rows + first;
    const T *dy = grad + start * channels + channel;
    const int together = min(TOGETHER, rows - first);
#pragma unroll 4
    for (int i = 0; i < together; ++i) {
        const Statistics found = statistics[start + i];
        const Means mean = means[start + i];
        const float d = to_float(*dy), x_hat = found.x_hat(to_float(*x)), u_hat = found.u_hat(x_hat * a + c);
        const float du = (g * d - mean.h - u_hat * mean.h_along) * found.u_scale;
        a_sum += du * x_hat, c_sum += du, g_sum += d * u_hat, b_sum += d;
        dy += channels, x += hidden.token_stride;
        if (++patch == hidden.patches) {  // the next image
            patch = 0, x += hidden.batch_stride - hidden.patches * hidden.token_stride;
        }
    }
    float *const target = sums + int64_t(chunk) * 4 * channels + channel;
    const float all[4] = {a_sum, c_sum, g_sum, b_sum};
#pragma unroll
    for (int i = 0; i < 4; ++i) target[int64_t(i) * channels] = all[i];
}

}  // namespace
}  // namespace ovseg

int ovseg_layer_gather_normed_bwd(const void *const *hidden, const void *shared_weight, const void *shared_bias,
                                  const void *norm_weight, const void *norm_bias, void *normed, float *statistics,
                                  int64_t layers, int64_t batch, int64_t tokens, int64_t patches, int64_t channels,
                                  int64_t batch_stride, int64_t token_stride, float shared_eps, float norm_eps,
                                  int dtype, int device, void *stream) {
    using namespace ovseg;
    if (const int error = check_patch_tokens(hidden, layers, batch, tokens, patches, channels)) return error;
    if (!aligned(shared_weight, shared_bias, norm_weight, norm_bias, normed, statistics)) return OVSEG_MISALIGNED;
    return by_dtype(dtype, [&](auto number) {
        using T = decltype(number);
        return launch(normalise_patches<T>, blocks_for(layers * batch * patches), THREADS, 0, device, stream,
                      patch_tokens<T>(hidden, layers, batch, tokens, patches, channels, batch_stride, token_stride),
                      filled<Norms<T>>(shared_weight, shared_bias, norm_weight, norm_bias, shared_eps, norm_eps),
                      normed, reinterpret_cast<Statistics *>(statistics));
    });
}

int ovseg_layer_gather_length_bwd(const void *grad, void *projected, const void *weights, void *weights_grad,
                                  float *along, int64_t layers, int64_t rows, int64_t width, int dtype, int device,
                                  void *stream) {
    using namespace ovseg;
    if (layers < 1 || layers > MOST_LAYERS || width < 1 || width > INT32_MAX / 2) return OVSEG_UNSUPPORTED_SIZE;
    if (rows > INT32_MAX) return OVSEG_TOO_LARGE;
    if (!aligned(grad, projected, weights, weights_grad, along)) return OVSEG_MISALIGNED;
    return by_dtype(dtype, [&](auto number) {
        using T = decltype(number);
        const int error = launch(length_backward<T>, blocks_for(layers * rows), THREADS, 0, device, stream, grad,
                                 projected, weights, weights_grad ? along : nullptr, layers, rows, width);
        if (error || !weights_grad) return error;
        return launch_adding<T>(along, weights_grad, layers, rows, device, stream);
    });
}

int ovseg_layer_gather_norms_bwd(const void *grad, const void *const *hidden, const void *shared_weight,
                                 const void *shared_bias, const void *norm_weight, const float *statistics,
                                 void *hidden_grad, float *means, float *sums, int64_t layers, int64_t batch,
                                 int64_t tokens, int64_t patches, int64_t channels, int64_t count, int64_t batch_stride,
                                 int64_t token_stride, int dtype, int device, void *stream) {
    using namespace ovseg;
    if (const int error = check_patch_tokens(hidden, layers, batch, tokens, patches, channels)) return error;
    if (sums && count != (batch * patches + TOGETHER - 1) / TOGETHER) return OVSEG_UNSUPPORTED_SIZE;
    if (!aligned(grad, shared_weight, shared_bias, norm_weight, statistics, hidden_grad, means, sums)) {
        return OVSEG_MISALIGNED;
    }
    return by_dtype(dtype, [&](auto number) {
        using T = decltype(number);
        const PatchTokens<T> found =
            patch_tokens<T>(hidden, layers, batch, tokens, patches, channels, batch_stride, token_stride);
        const auto norms = filled<Norms<T>>(shared_weight, shared_bias, norm_weight);
        const auto *const of_rows = reinterpret_cast<const Statistics *>(statistics);
        Means *const of_h = sums ? reinterpret_cast<Means *>(means) : nullptr;
        const int error = launch(norms_backward<T>, blocks_for(layers * batch * tokens), THREADS, 0, device, stream,
                                 grad, found, norms, of_rows, hidden_grad, of_h);
        if (error || !sums) return error;
        return launch(sum_norm_gradients<T>, layers * count * ((channels + THREADS - 1) / THREADS), THREADS, 0, device,
                      stream, grad, found, norms, of_rows, of_h, sums);
    });
}
