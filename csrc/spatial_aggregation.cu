// Spatial aggregation: one guided shifted-window transformer block over each class's map, in one kernel.
//
//     n = LN1(x);   q = Wq n + q_term,   k = Wk n + k_term,   v = Wv n + bv
//     y = x + Wo softmax(q kᵀ / √d + mask) v + bo,        within each window and head
//     out = y + W2 GELU(W1 LN2(y) + b1) + b2
//
// Nine warps own a window of up to 144 tokens, 16 tokens each, from x to out: rows never leave their warp, but for a
// head's keys and values, which all of the window read. Scores and what is attended to stay in registers, as the
// factors of the next product. Weights stream through a ring of stages. Nothing is written but out and, for training, y.

#include "device/transformer.cuh"
#include "device/window_attention.cuh"

namespace ovseg {
namespace {

constexpr int RING = 3;

template <typename T>
struct Arguments {
    const T *x, *q_term, *k_term, *norm1_weight, *norm1_bias, *qkv_weight, *v_bias, *proj_weight, *proj_bias;
    const T *norm2_weight, *norm2_bias, *fc1_weight, *fc1_bias, *fc2_weight, *fc2_bias;
    T *out, *middle;
    Windows windows;
    int classes, hidden;
};

template <typename T>
struct Shared {
    static constexpr int ROWS = TOKENS * C * int(sizeof(T));
    static constexpr int KEYS = TOKENS * WIDTH * int(sizeof(T));
    static constexpr int STAGE = STAGE_ROWS * C * int(sizeof(T));
    static constexpr int TOTAL = ROWS + 2 * KEYS + RING * STAGE + int(sizeof(Window));
};

// The weights in the order in which a block multiplies by them.
template <typename T>
struct Weights {
    static constexpr int QKV = 3 * HEADS, PROJECTIONS = C / STAGE_ROWS;

    const T *qkv, *proj, *fc1, *fc2;
    int hidden;

    __device__ __forceinline__ int stages() const { return QKV + PROJECTIONS + 2 * (hidden / STAGE_ROWS); }

    __device__ __forceinline__ void operator()(int stage, unsigned char *buffer) const {
        const int of_mlp = stage - QKV - PROJECTIONS;
        if (of_mlp >= 0 && of_mlp % 2) {
            copy_rows<C, THREADS>(Tile<T, STAGE_ROWS>{buffer}, fc2 + of_mlp / 2 * STAGE_ROWS, hidden);
            return;
        }
        const T *source = fc1 + of_mlp / 2 * (STAGE_ROWS * C);
        if (of_mlp < 0) source = proj + (of_mlp + PROJECTIONS) * (STAGE_ROWS * C);
        if (stage < QKV) source = qkv + (stage % 3 * C + stage / 3 * WIDTH) * C;  // q, k, v of a head, then of the next
        copy_rows<STAGE_ROWS, THREADS>(Tile<T, C>{buffer}, source, C);
    }
};

template <typename T>
__global__ void __launch_bounds__(THREADS) spatial_aggregation(const Arguments<T> a) {
    using Layout = Shared<T>;
    unsigned char *const row_memory = shared_memory();
    unsigned char *const key_memory = row_memory + Layout::ROWS;
    unsigned char *const value_memory = key_memory + Layout::KEYS;
    unsigned char *const stage_memory = value_memory + Layout::KEYS;
    Window &window = *reinterpret_cast<Window *>(stage_memory + RING * Layout::STAGE);

    int lane = int(threadIdx.x) % 32;
    const int row = int(threadIdx.x) / 32 * 16;  // the warp's first token
    const bool plain = window.find(a.windows, int(blockIdx.x), a.classes);

    Stages<RING, Layout::STAGE, Weights<T>> stages(
        stage_memory, Weights<T>{a.qkv_weight, a.proj_weight, a.fc1_weight, a.fc2_weight, a.hidden});
    __syncthreads();

    // One of the warp's tokens in maps or images that begin at `first`, or null beyond the map.
    const auto token_of = [&](auto *first, int token) {
        const int place = window.places[row + token];
        return place < 0 ? nullptr : first + int64_t(place) * C;
    };
    // Two channels of it in float, 0 beyond the map.
    const auto two_of = [&](const T *first, int token, int channel) -> Pair<float> {
        const T *place = token_of(first, token);
        const Pair<T> pair = place ? load<T, 2>(place + channel) : Pair<T>{};
        return {{to_float(pair.value[0]), to_float(pair.value[1])}};
    };

    const Tile<T, C> rows = Tile<T, C>{row_memory}.rows_from(row);
    const Tile<T, WIDTH> keys{key_memory}, values{value_memory};
    load_rows(rows, lane, [&](int token) { return token_of(a.x + window.map * C, token); });
    __syncwarp();
    normalise_rows(rows, a.norm1_weight, a.norm1_bias, lane);
    __syncwarp();

    A attended[HEADS][WIDTH / K<T>];
#pragma unroll 1
    for (int head = 0; head < HEADS; ++head) {
        lane = recomputed(lane);
        const Factors<T, C> normed(rows, lane);
        D d[WIDTH / 8];
        A q[WIDTH / K<T>];
        project(d, normed, Tile<T, C>{stages.next()}, lane);
        each_pair(d, lane, [&](int token, int column, float &first, float &second) {
            const Pair<float> share = two_of(a.q_term + window.image * C, token, head * WIDTH + column);
            first += share.value[0], second += share.value[1];
        });
#pragma unroll
        for (int k = 0; k < WIDTH / K<T>; ++k) q[k] = chained<T>(d, k);
        project(d, normed, Tile<T, C>{stages.next()}, lane);
        each_pair(d, lane, [&](int token, int column, float first, float second) {
            const Pair<float> share = two_of(a.k_term + window.image * C, token, head * WIDTH + column);
            store<T, 2>(keys.at(row + token, column),
                        rounded_pair<T>(first + share.value[0], second + share.value[1]));
        });
        project(d, normed, Tile<T, C>{stages.next()}, lane);
        each_pair(d, lane, [&](int token, int column, float first, float second) {
            const Pair<T> bias = load<T, 2>(a.v_bias + head * WIDTH + column);
            const bool there = window.places[row + token] >= 0;  // a weight of 0 times NaN would be NaN
            store<T, 2>(values.at(row + token, column),
                        rounded_pair<T>(there ? first + to_float(bias.value[0]) : 0.0f,
                                        there ? second + to_float(bias.value[1]) : 0.0f));
        });
        __syncthreads();
        // The heads move up, so that no register is indexed by a number known at run time only.
#pragma unroll
        for (int i = 0; i + 1 < HEADS; ++i) {
#pragma unroll
            for (int k = 0; k < WIDTH / K<T>; ++k) attended[i][k] = attended[i + 1][k];
        }
        attend<T>(d, q, keys, values, window, plain, row, lane);
#pragma unroll
        for (int k = 0; k < WIDTH / K<T>; ++k) attended[HEADS - 1][k] = chained<T>(d, k);
    }

    // Each part's columns of the rows are read by nobody any more: all of n has been multiplied.
#pragma unroll 1
    for (int part = 0; part < C / STAGE_ROWS; ++part) {
        lane = recomputed(lane);
        const Tile<T, C> weight{stages.next()};
        D d[STAGE_ROWS / 8] = {};
#pragma unroll
        for (int k = 0; k < C / K<T>; ++k) {
            const A factor = recomputed<T>(attended[k / (WIDTH / K<T>)][k % (WIDTH / K<T>)]);
#pragma unroll
            for (int n = 0; n < STAGE_ROWS / 16; ++n) {
                B b[2];
                load_b_chained(b, weight.rows_from(16 * n), k, lane);
                mma<T>(d[2 * n], factor, b[0]);
                mma<T>(d[2 * n + 1], factor, b[1]);
            }
        }
        each_pair(d, lane, [&](int token, int column, float first, float second) {
            const int channel = part * STAGE_ROWS + column;
            const Pair<float> x = two_of(a.x + window.map * C, token, channel);
            const Pair<T> bias = load<T, 2>(a.proj_bias + channel);
            store<T, 2>(rows.at(token, channel), rounded_pair<T>(first + to_float(bias.value[0]) + x.value[0],
                                                                 second + to_float(bias.value[1]) + x.value[1]));
        });
    }
    __syncwarp();
    if (a.middle) store_rows(rows, lane, [&](int token) { return token_of(a.middle + window.map * C, token); });
    residual_mlp<Gelu>(rows, a.norm2_weight, a.norm2_bias, a.fc1_bias, a.fc2_bias, a.hidden, stages, lane);
    store_rows(rows, lane, [&](int token) { return token_of(a.out + window.map * C, token); });
}

}  // namespace
}  // namespace ovseg

int ovseg_spatial_aggregation_fwd(const void *x, const void *q_term, const void *k_term, const void *norm1_weight,
                                  const void *norm1_bias, const void *qkv_weight, const void *v_bias,
                                  const void *proj_weight, const void *proj_bias, const void *norm2_weight,
                                  const void *norm2_bias, const void *fc1_weight, const void *fc1_bias,
                                  const void *fc2_weight, const void *fc2_bias, void *out, void *middle, int64_t batch,
                                  int64_t classes, int64_t height, int64_t width, int64_t channels, int64_t hidden,
                                  int64_t heads, int64_t window, int64_t shift, int dtype, int device, void *stream) {
    using namespace ovseg;
    if (!takes_windows(classes, height, width, channels, heads, window, shift) || hidden < STAGE_ROWS ||
        hidden % STAGE_ROWS || hidden > INT32_MAX / C) {
        return OVSEG_UNSUPPORTED_SIZE;
    }
    if (!aligned(x, q_term, k_term, norm1_weight, norm1_bias, qkv_weight, v_bias, proj_weight, proj_bias, norm2_weight,
                 norm2_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, out, middle)) {
        return OVSEG_MISALIGNED;
    }
    const Windows windows{int(height), int(width), int(window), int(shift)};
    return by_dtype(dtype, [&](auto number) {
        using T = decltype(number);
        const auto in = [](const void *pointer) { return static_cast<const T *>(pointer); };
        const Arguments<T> a{in(x),           in(q_term),     in(k_term),      in(norm1_weight), in(norm1_bias),
                             in(qkv_weight),  in(v_bias),     in(proj_weight), in(proj_bias),    in(norm2_weight),
                             in(norm2_bias),  in(fc1_weight), in(fc1_bias),    in(fc2_weight),   in(fc2_bias),
                             static_cast<T *>(out), static_cast<T *>(middle), windows, int(classes), int(hidden)};
        return launch(spatial_aggregation<T>, batch * classes * windows.count(), THREADS, Shared<T>::TOTAL, device,
                      stream, a);
    });
}
