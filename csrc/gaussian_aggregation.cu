// Neighbourhood Gaussian aggregation: a stage's map is the weighted sum of its layers' maps.
//
//     out = Σ_l w_l f_l;      backward, from the gradient d of out:  df_l = w_l d,  dw_l = Σ <d, f_l>
//
// Memory is read and written once, 16 bytes a thread. A warp adds up its share of each dw_l; a second kernel adds the
// shares. The weights stay on the GPU.

#include "device/partial_sums.cuh"
#include "device/vectors.cuh"

namespace ovseg {
namespace {

constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int VECS = 4;  // that a thread of the backward pass takes: shuffles and shares are few for what is read

template <typename T>
__global__ void __launch_bounds__(THREADS)
    aggregate(const T *features, const T *weights, T *out, int layers, int64_t size) {
    const int64_t index = (int64_t(blockIdx.x) * THREADS + threadIdx.x) * VEC<T>;
    const bool whole = whole_vecs<T>(size);
    if (index >= size) return;
    float total[VEC<T>] = {};
#pragma unroll 4
    for (int layer = 0; layer < layers; ++layer) {
        const Floats<T> f = floats(load_vec(features + layer * size, index, size, whole));
        const float weight = to_float(weights[layer]);
        unrolled<VEC<T>>([&](int i) { total[i] += weight * f.value[i]; });
    }
    store_vec(out, index, size, whole, rounded<T>(total));
}

// Either gradient may be null. `shares` holds one number a layer and warp.
template <typename T>
__global__ void __launch_bounds__(THREADS)
    aggregate_backward(const T *grad, const T *features, const T *weights, T *features_grad, float *shares, int layers,
                       int64_t size) {
    const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
    const int64_t first = ((int64_t(blockIdx.x) * WARPS + warp) * VECS * 32 + lane) * VEC<T>;
    const bool whole = whole_vecs<T>(size);
    Vec<T> d[VECS];
    unrolled<VECS>([&](int j) { d[j] = load_vec(grad, first + j * 32 * VEC<T>, size, whole); });
#pragma unroll 1
    for (int layer = 0; layer < layers; ++layer) {
        if (features_grad) {
            const float weight = to_float(weights[layer]);
            unrolled<VECS>([&](int j) {
                Vec<T> result;
                unrolled<VEC<T>>([&](int i) { result.value[i] = rounded<T>(weight * to_float(d[j].value[i])); });
                store_vec(features_grad + layer * size, first + j * 32 * VEC<T>, size, whole, result);
            });
        }
        if (shares) {
            float sum = 0.0f;
            unrolled<VECS>([&](int j) {
                const Vec<T> f = load_vec(features + layer * size, first + j * 32 * VEC<T>, size, whole);
                unrolled<VEC<T>>([&](int i) { sum += to_float(d[j].value[i]) * to_float(f.value[i]); });
            });
            sum = sum_over_lanes<32>(sum);
            if (lane == 0) shares[(int64_t(layer) * gridDim.x + blockIdx.x) * WARPS + warp] = sum;
        }
    }
}

}  // namespace
}  // namespace ovseg

int ovseg_gaussian_aggregation_fwd(const void *features, const void *weights, void *out, int64_t layers, int64_t size,
                                   int dtype, int device, void *stream) {
    using namespace ovseg;
    if (layers < 1 || layers > INT32_MAX) return OVSEG_UNSUPPORTED_SIZE;
    if (!aligned(features, weights, out)) return OVSEG_MISALIGNED;
    return by_dtype(dtype, [&](auto number) {
        using T = decltype(number);
        constexpr int64_t BLOCK = THREADS * VEC<T>;
        return launch(aggregate<T>, (size + BLOCK - 1) / BLOCK, THREADS, 0, device, stream, features, weights, out,
                      layers, size);
    });
}

int ovseg_gaussian_aggregation_bwd(const void *grad, const void *features, const void *weights, void *features_grad,
                                   void *weights_grad, float *shares, int64_t layers, int64_t size, int64_t count,
                                   int dtype, int device, void *stream) {
    using namespace ovseg;
    if (layers < 1 || layers > INT32_MAX) return OVSEG_UNSUPPORTED_SIZE;
    if (!aligned(grad, features, weights, features_grad, weights_grad, shares)) return OVSEG_MISALIGNED;
    return by_dtype(dtype, [&](auto number) {
        using T = decltype(number);
        constexpr int64_t BLOCK = THREADS * VECS * VEC<T>;
        const int64_t blocks = (size + BLOCK - 1) / BLOCK;
        if (weights_grad && count != blocks * WARPS) return int(OVSEG_UNSUPPORTED_SIZE);
        const int error = launch(aggregate_backward<T>, blocks, THREADS, 0, device, stream, grad, features, weights,
                                 features_grad, weights_grad ? shares : nullptr, layers, size);
        if (error || !weights_grad) return error;
        return launch_adding<T>(shares, weights_grad, layers, count, device, stream);
    });
}
