// Backward of the residual MLP of transformer.cuh, y + W2 act(W1 n + b1) + b2 with n = LN(y), from the gradient g:
//
//     a = W1 n + b1,   da = act'(a) ∘ (W2ᵀ g),   dn = W1ᵀ da,   dy = g + LN'(dn)
//
// a is computed again, 32 hidden units at a time, with W1 and W2 streaming through a ring of stages; dn stays in
// registers. n, act(a) and da, for the weights' gradients by PyTorch's products, are written unless `normed` is null.
// Each block writes its share of the sums over all rows, the gradients of norm weight, norm bias and b2.

#include "device/copies.cuh"
#include "device/products.cuh"
#include "device/transformer.cuh"

namespace ovseg {
namespace {

constexpr int C = 128;

template <typename T> constexpr int WARPS = sizeof(T) == 2 ? 8 : 4;

template <typename T> struct Arguments {
    const T *grad, *y, *norm_weight, *norm_bias, *fc1_weight, *fc1_bias, *fc2_weight;
    T *y_grad, *normed, *activated, *units_grad;
    float *sums;  // (blocks, 3, C), or null
    int64_t rows;
    int hidden;
};

template <typename T> constexpr int RING = sizeof(T) == 2 ? 3 : 2;  // as many as every GPU has memory for

template <typename T> struct Shared {
    static constexpr int ROWS = WARPS<T> * 16;
    static constexpr int TILE = ROWS * C * int(sizeof(T));
    static constexpr int STAGE = STAGE_ROWS * C * int(sizeof(T));
    static constexpr int TOTAL = 2 * TILE + RING<T> * STAGE;
    static_assert(RING<T> * STAGE >= WARPS<T> * 3 * C * int(sizeof(float)), "the warps' sums reuse the stages");
    static_assert(TOTAL <= SHARED_EVERYWHERE, "see platform.cuh");
};

template <typename T> struct Weights {
    const T *fc1, *fc2;
    int hidden;

    DEVICE int stages() const { return 2 * (hidden / STAGE_ROWS); }

    DEVICE void operator()(int stage, unsigned char *buffer) const {
        const int unit = stage / 2 * STAGE_ROWS;
        if (stage % 2) {
            copy_weights<STAGE_ROWS, 32 * WARPS<T>>(Tile<T, C>{buffer}, fc1 + unit * C, C);
        } else {
            copy_weights<C, 32 * WARPS<T>>(Tile<T, STAGE_ROWS>{buffer}, fc2 + unit, hidden);
        }
    }
};

// act(a), and grad · act'(a).
template <bool GELU> DEVICE Pair<float> activate_backward(float a, float grad) {
    if constexpr (GELU) {
        const float below = gaussian(a), bell = fast_exp2(a * a * -0.7213475204444817f - 1.3257480647361592f);
        return {{a * below, grad * (below + a * bell)}};
    } else {
        return {{a < 0.0f ? 0.0f : a, a <= 0.0f ? 0.0f : grad}};
    }
}

template <typename T, bool GELU>
__global__ void __launch_bounds__(32 * WARPS<T>) residual_mlp_backward(const Arguments<T> a) {
    using Layout = Shared<T>;
    unsigned char *const memory = shared_memory();
    int lane = int(threadIdx.x) % 32;
    const int warp = int(threadIdx.x) / 32;
    const int64_t first = int64_t(blockIdx.x) * Layout::ROWS + warp * 16;
    const int count = int(a.rows - first < 16 ? a.rows - first : 16);  // of the warp's rows, or less than 1
    const Tile<T, C> smem_normed = Tile<T, C>{memory}.rows_from(warp * 16);
    const Tile<T, C> smem_grad = Tile<T, C>{memory + Layout::TILE}.rows_from(warp * 16);
    unsigned char *const stage_memory = memory + 2 * Layout::TILE;

    Stages<RING<T>, Layout::STAGE, Weights<T>> stages(stage_memory, Weights<T>{a.fc1_weight, a.fc2_weight, a.hidden});
    copy_in(smem_normed, a.y + first * C, C, count, lane);
    copy_in(smem_grad, a.grad + first * C, C, count, lane);
    __syncwarp();
    normalise_rows(smem_normed, a.norm_weight, a.norm_bias, lane);
    __syncwarp();
    if (a.normed) copy_out(smem_normed, a.normed + first * C, C, count, lane);

    Acc normed_grad[C / 8];
    unrolled<C / 8>([&](int n) { normed_grad[n] = {}; });
    {
        const RowFrags<T, C> rows(smem_normed, lane);
        int unit = 0;
        do {
            lane = recomputed_lane(lane);
            Acc units_grad[STAGE_ROWS / 8] = {}, units[STAGE_ROWS / 8];
            multiply<T, C / K<T>, sizeof(T) == 2 ? C / K<T> : 1>(
                units_grad, Tile<T, STAGE_ROWS>{stages.next()}, lane,
                [&](int k) { return load_a_chained(smem_grad, k, lane); });
            const Tile<T, C> weight1{stages.next()};
            project(units, rows, weight1, lane);
            unrolled<STAGE_ROWS / 8>([&](int n) {
                const Pair<T> bias = load<T, 2>(a.fc1_bias + unit + 8 * n + acc_col(lane, 0));
                unrolled<4>([&](int i) {
                    float &x = units[n].value[i], &g = units_grad[n].value[i];
                    const Pair<float> both = activate_backward<GELU>(x + to_float(bias.value[i % 2]), g);
                    x = both.value[0], g = both.value[1];
                });
            });
            if (a.normed) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int row = acc_row(lane, 2 * i);
                    const int64_t offset = (first + row) * a.hidden + (unit + acc_col(lane, 0));
                    if (row >= count) continue;
                    unrolled<STAGE_ROWS / 8>([&](int n) {
                        const float (&x)[4] = units[n].value, (&g)[4] = units_grad[n].value;
                        store(a.activated + offset + 8 * n, rounded_pair<T>(x[2 * i], x[2 * i + 1]));
                        store(a.units_grad + offset + 8 * n, rounded_pair<T>(g[2 * i], g[2 * i + 1]));
                    });
                }
            }
            multiply<T, STAGE_ROWS / K<T>>(normed_grad, weight1, lane,
                                           [&](int k) { return chained<T>(units_grad, k); });
            unit += STAGE_ROWS;
        } while (unit < a.hidden);
    }

    // Through the norm: with x̂ the standardised row, dy = g + scale (w dn − mean(w dn) − x̂ mean(w dn x̂)).
    lane = recomputed_lane(lane);
    __syncwarp();
    copy_in(smem_normed, a.y + first * C, C, count, lane);
    __syncwarp();
    Acc standardised[C / 8];
    float mean[2] = {}, scale[2] = {};
#pragma unroll
    for (int n = 0; n < C / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
            const Pair<T> pair = load<T, 2>(acc_address(smem_normed, n, lane) + i / 2 * (8 * C));
            unrolled<2>([&](int j) { mean[i / 2] += standardised[n].value[i + j] = to_float(pair.value[j]); });
        }
    }
    unrolled<2>([&](int i) { mean[i] = sum_over_lanes<4>(mean[i]) / C; });
    each_value<C / 8>([&](int n, int i) {
        float &x = standardised[n].value[i];
        x -= mean[i / 2];
        scale[i / 2] += x * x;
    });
    unrolled<2>([&](int i) { scale[i] = rsqrtf(sum_over_lanes<4>(scale[i]) / C + LAYER_NORM_EPS); });
    float along[2] = {}, mean_grad[2] = {};
    __syncthreads();  // all are done with the stages, whose memory the warps' sums reuse
    float *const sums = reinterpret_cast<float *>(stage_memory) + warp * 3 * C;
#pragma unroll
    for (int n = 0; n < C / 8; ++n) {
        const int column = 8 * n + acc_col(lane, 0);
        const Pair<T> weight = load<T, 2>(a.norm_weight + column);
        const T *const address = acc_address(smem_grad, n, lane);
        const Pair<T> upper = load<T, 2>(address), lower = load<T, 2>(address + 8 * C);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            float weight_sum = 0.0f, bias_sum = 0.0f, grad_sum = to_float(upper.value[j]) + to_float(lower.value[j]);
#pragma unroll
            for (int i = j; i < 4; i += 2) {
                float &x = standardised[n].value[i], &inner = normed_grad[n].value[i];
                x *= scale[i / 2];
                weight_sum += inner * x;
                bias_sum += inner;
                inner *= to_float(weight.value[j]);
                mean_grad[i / 2] += inner;
                along[i / 2] += inner * x;
            }
            if (a.sums) {
#pragma unroll
                for (int distance = 4; distance < 32; distance *= 2) {
                    weight_sum += __shfl_xor_sync(ALL_LANES, weight_sum, distance);
                    bias_sum += __shfl_xor_sync(ALL_LANES, bias_sum, distance);
                    grad_sum += __shfl_xor_sync(ALL_LANES, grad_sum, distance);
                }
                if (lane < 4) {
                    sums[column + j] = weight_sum;
                    sums[C + column + j] = bias_sum;
                    sums[2 * C + column + j] = grad_sum;
                }
            }
        }
    }
    unrolled<2>([&](int i) {
        mean_grad[i] = sum_over_lanes<4>(mean_grad[i]) / C;
        along[i] = sum_over_lanes<4>(along[i]) / C;
    });
    lane = recomputed_lane(lane);
#pragma unroll
    for (int n = 0; n < C / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
            T *const address = acc_address(smem_grad, n, lane) + i / 2 * (8 * C);
            const Pair<T> g = load<T, 2>(address);
            float out[2];
            unrolled<2>([&](int j) {
                const float inner = normed_grad[n].value[i + j] - mean_grad[i / 2];
                out[j] = to_float(g.value[j]) + scale[i / 2] * (inner - standardised[n].value[i + j] * along[i / 2]);
            });
            store(address, rounded_pair<T>(out[0], out[1]));
        }
    }
    __syncwarp();
    if (a.y_grad) copy_out(smem_grad, a.y_grad + first * C, C, count, lane);
    if (!a.sums) return;
    __syncthreads();
    for (int i = int(threadIdx.x); i < 3 * C; i += 32 * WARPS<T>) {
        float sum = 0.0f;
        for (int w = 0; w < WARPS<T>; ++w) sum += reinterpret_cast<const float *>(stage_memory)[w * 3 * C + i];
        a.sums[int64_t(blockIdx.x) * 3 * C + i] = sum;
    }
}

}  // namespace
}  // namespace ovseg

int ovseg_residual_mlp_bwd(const ovseg_residual_mlp_params *params, int dtype, int device, void *stream) {
    using namespace ovseg;
    const auto &p = *params;
    if (p.channels != C || !takes_hidden(p.hidden, STAGE_ROWS)) return OVSEG_UNSUPPORTED_SIZE;
    if (!aligned_params(p, p.rows)) return OVSEG_MISALIGNED;
    return by_dtype(dtype, [&](auto number) {
        using T = decltype(number);
        const auto a =
            filled<Arguments<T>>(p.grad, p.y, p.norm_weight, p.norm_bias, p.fc1_weight, p.fc1_bias, p.fc2_weight,
                                 p.y_grad, p.normed, p.activated, p.units_grad, p.sums, p.rows, p.hidden);
        const int64_t blocks = (p.rows + Shared<T>::ROWS - 1) / Shared<T>::ROWS;
        return launch(p.gelu ? residual_mlp_backward<T, true> : residual_mlp_backward<T, false>, blocks, 32 * WARPS<T>,
                      Shared<T>::TOTAL, device, stream, a);
    });
}
