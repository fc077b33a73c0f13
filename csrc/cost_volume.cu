// Cost volume: cosines between every patch of an image and every prompt of every class.
//
//     cost[b, k, s] = <image[b, s], text[k]> / (max(‖image[b, s]‖, ε) · max(‖text[k]‖, ε))
//
// A block takes 128 patches and 16 prompts, a warp 16 patches.
//
// Backward, for one side with rows x and the other side's rows of length 1, ŷ, from the gradient g of cost:
//
//     dx = (p − x̂ · <x̂, p>) / n,    p = Σ g · ŷ,  n = max(‖x‖, ε),  x̂ = x / n
//
// where PyTorch computes p. One kernel computes ŷ before it and dx after it; a warp takes a row.

#include "device/cosines.cuh"

namespace ovseg {
namespace {

constexpr int RING = 4;
constexpr int ROWS = 8;  // of the backward, to a block

template <typename T> struct Arguments {
    const T *image, *text;
    T *cost;
    int patches, prompts, channels;
};

template <typename T> struct Shared {
    unsigned char ring[RING * Embeddings<T>::BYTES];
    int positions[PIXELS];
};
static_assert(sizeof(Shared<float>) <= SHARED_EVERYWHERE, "see platform.cuh");

template <typename T> __global__ void __launch_bounds__(COSINE_THREADS) cost_volume(const Arguments<T> a) {
    Shared<T> &shared = *reinterpret_cast<Shared<T> *>(shared_memory());
    const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
    const int patch_tiles = (a.patches + PIXELS - 1) / PIXELS, prompt_tiles = (a.prompts + TEXTS - 1) / TEXTS;
    const int64_t batch = int(blockIdx.x) / patch_tiles / prompt_tiles;
    const int first_patch = int(blockIdx.x) % patch_tiles * PIXELS;
    const int first_prompt = int(blockIdx.x) / patch_tiles % prompt_tiles * TEXTS;
    for (int i = int(threadIdx.x); i < PIXELS; i += COSINE_THREADS) {
        shared.positions[i] = first_patch < a.patches - i ? first_patch + i : -1;
    }
    __syncthreads();
    const Embeddings<T> embeddings(a.image + batch * a.patches * a.channels,
                                   a.text + int64_t(first_prompt) * a.channels, shared.positions,
                                   min(TEXTS, a.prompts - first_prompt), a.channels);
    Stages<RING, Embeddings<T>::BYTES, Embeddings<T>> stages(shared.ring, embeddings);
    Acc acc[TEXTS / 8];
    cosines<T>(acc, stages, warp, lane);
    T *const cost = a.cost + (batch * a.prompts + first_prompt) * a.patches;
    each_value<TEXTS / 8>([&](int n, int i) {
        const int patch = shared.positions[16 * warp + acc_row(lane, i)], prompt = 8 * n + acc_col(lane, i);
        if (patch >= 0 && prompt < embeddings.texts) {
            cost[int64_t(prompt) * a.patches + patch] = rounded<T>(acc[n].value[i]);
        }
    });
}

// dx of each row from its p, or x̂ where `products` is null.
template <typename T>
__global__ void __launch_bounds__(ROWS * 32)
    through_norm(const T *products, const T *x, T *out, int64_t rows, int columns) {
    const int lane = int(threadIdx.x) % 32;
    const int64_t row = int64_t(blockIdx.x) * ROWS + int(threadIdx.x) / 32;
    if (row >= rows) return;
    x += row * columns;
    const T *const product = products ? products + row * columns : x;
    with_constant(whole_vecs<T>(columns), [&](auto whole) {
        float squares = 0.0f, along = 0.0f;
        each_vec<T, 2>(columns, lane, [&](int column) {
            const Floats<T> a = floats(load_vec(x, column, columns, whole));
            const Floats<T> b = floats(load_vec(product, column, columns, whole));
            unrolled<VEC<T>>([&](int i) {
                squares = fmaf(a.value[i], a.value[i], squares);
                along = fmaf(a.value[i], b.value[i], along);
            });
        });
        const float scale = fast_reciprocal(length_of(sum_over_lanes<32>(squares)));
        along = sum_over_lanes<32>(along) * scale;
        each_vec<T, 2>(columns, lane, [&](int column) {
            const Floats<T> a = floats(load_vec(x, column, columns, whole));
            const Floats<T> b = floats(load_vec(product, column, columns, whole));
            Vec<T> result;
            unrolled<VEC<T>>([&](int i) {
                const float unit = a.value[i] * scale;
                result.value[i] = rounded<T>(products ? (b.value[i] - unit * along) * scale : unit);
            });
            store_vec(out + row * columns, column, columns, whole, result);
        });
    });
}

}  // namespace
}  // namespace ovseg

int ovseg_cost_volume_fwd(const void *image, const void *text, void *cost, int64_t batch, int64_t patches,
                          int64_t prompts, int64_t channels, int dtype, int device, void *stream) {
    using namespace ovseg;
    if (patches < 1 || patches > INT32_MAX || prompts < 1 || prompts > INT32_MAX || channels < 1 ||
        channels > INT32_MAX / 2) {
        return OVSEG_UNSUPPORTED_SIZE;
    }
    if (!aligned(image, text, cost)) return OVSEG_MISALIGNED;
    const int64_t blocks = (patches + PIXELS - 1) / PIXELS * ((prompts + TEXTS - 1) / TEXTS);
    if (blocks > INT32_MAX) return OVSEG_TOO_LARGE;
    return by_dtype(dtype, [&](auto number) {
        using T = decltype(number);
        const auto a = filled<Arguments<T>>(image, text, cost, patches, prompts, channels);
        return launch(cost_volume<T>, batch * blocks, COSINE_THREADS, sizeof(Shared<T>), device, stream, a);
    });
}

int ovseg_cost_volume_norm_bwd(const void *products, const void *x, void *out, int64_t rows, int64_t channels,
                               int dtype, int device, void *stream) {
    using namespace ovseg;
    if (channels < 1 || channels > INT32_MAX / 2) return OVSEG_UNSUPPORTED_SIZE;
    if (!aligned(products, x, out)) return OVSEG_MISALIGNED;
    return by_dtype(dtype, [&](auto number) {
        return launch(through_norm<decltype(number)>, (rows + ROWS - 1) / ROWS, ROWS * 32, 0, device, stream, products,
                      x, out, rows, channels);
    });
}
