// Backward of the window attention in spatial_aggregation.cu, from the gradient da of what each token attended to:
//
//     P = softmax(q kᵀ / √d + mask),   δ = rowsum(da ∘ P v)
//     dv = Pᵀ da,   dS = P ∘ (da vᵀ − δ) / √d,   dq = dS k,   dk = dSᵀ q
//
// A block takes one head of one window. Each of its nine warps owns 16 tokens, first as queries, then as keys: scores
// are computed twice, so that no gradient is summed in memory. The softmax of the first pass waits in shared memory for
// the second. The products with weights around it are PyTorch's.

#include "device/window_attention.cuh"

namespace ovseg {
namespace {

constexpr int THREADS = TOKENS / 16 * 32;

template <typename T>
constexpr int CHUNK = sizeof(T) == 2 ? TOKENS / 3 : TOKENS / 9;  // tokens that a warp scores with its 16 at a time

template <typename T> struct Arguments {
    const T *tokens, *grad_attended;
    T *grad_tokens, *attended;
    Windows windows;
    int classes;
};

struct Query {
    float base, scale, delta;
};

template <typename T> struct Shared {
    static constexpr int TILE = TOKENS * WIDTH * int(sizeof(T));
    static constexpr int TOTAL = 4 * TILE + TOKENS * int(sizeof(Query)) + int(sizeof(Window));
};

// A head's channels of a warp's 16 tokens, `pitch` numbers apart from `first` on; 0 beyond the map.
template <typename T>
DEVICE void load_head(Tile<T, WIDTH> tile, const T *first, int pitch, const int *positions, int lane) {
    constexpr int LANES = WIDTH / VEC<T>;
#pragma unroll
    for (int row = lane / LANES; row < 16; row += 32 / LANES) {
        const int position = positions[row], column = lane % LANES * VEC<T>;
        const Vec<T> vec = position < 0 ? Vec<T>{} : load_vec(first + int64_t(position) * pitch + column);
        store(tile.at(row, column), vec);
    }
}

template <typename T>
DEVICE void store_head(T *first, int pitch, const int *positions, const Acc (&acc)[WIDTH / 8], int lane) {
#pragma unroll
    for (int n = 0; n < WIDTH / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
            const int position = positions[acc_row(lane, i)];
            if (position < 0) continue;
            store(first + int64_t(position) * pitch + 8 * n + acc_col(lane, i),
                  rounded_pair<T>(acc[n].value[i], acc[n].value[i + 1]));
        }
    }
}

// 16 rows of a tile, for a frag_b from `load_b_chained`.
template <typename T> DEVICE void load_rows(FragA (&frag_a)[WIDTH / K<T>], Tile<T, WIDTH> tile, int lane) {
    unrolled<WIDTH / K<T>>([&](int k) { frag_a[k] = load_a_chained(tile, k, lane); });
}

template <typename T> __global__ void __launch_bounds__(THREADS) spatial_attention_backward(const Arguments<T> a) {
    using Layout = Shared<T>;
    constexpr int COUNT = CHUNK<T> / 8;
    unsigned char *const memory = shared_memory();
    const Tile<T, WIDTH> smem_q{memory}, smem_k{memory + Layout::TILE}, smem_v{memory + 2 * Layout::TILE};
    const Tile<T, WIDTH> smem_grad{memory + 3 * Layout::TILE};  // of what the queries attended to
    Window &window = *reinterpret_cast<Window *>(memory + 4 * Layout::TILE);
    Query *const queries = reinterpret_cast<Query *>(&window + 1);

    int lane = int(threadIdx.x) % 32;
    const int row = int(threadIdx.x) / 32 * 16, head = int(blockIdx.x) % HEADS;
    window.init<THREADS>(a.windows, int(blockIdx.x) / HEADS, a.classes);
    __syncthreads();
    const int *const positions = window.positions + row;
    const T *const tokens = a.tokens + window.map * (3 * C) + head * WIDTH;
    T *const grad_tokens = a.grad_tokens + window.map * (3 * C) + head * WIDTH;
    load_head(smem_q.rows_from(row), tokens, 3 * C, positions, lane);
    load_head(smem_k.rows_from(row), tokens + C, 3 * C, positions, lane);
    load_head(smem_v.rows_from(row), tokens + 2 * C, 3 * C, positions, lane);
    load_head(smem_grad.rows_from(row), a.grad_attended + window.map * C + head * WIDTH, C, positions, lane);
    __syncthreads();

    FragA frag_a[WIDTH / K<T>];
    {
        Acc acc[WIDTH / 8];
        load_rows(frag_a, smem_q.rows_from(row), lane);
        const Softmax softmax = attend<T>(acc, frag_a, smem_k, smem_v, window, row, lane);
        if (a.attended) store_head(a.attended + window.map * C + head * WIDTH, C, positions, acc, lane);
        float delta[2] = {};
        each_value<WIDTH / 8>([&](int n, int i) {
            const T *const grad = smem_grad.at(row + acc_row(lane, i), 8 * n + acc_col(lane, i));
            delta[i / 2] += acc[n].value[i] * to_float(*grad);
        });
        unrolled<2>([&](int i) {
            delta[i] = sum_over_lanes<4>(delta[i]);
            if (lane % 4 == 0) queries[row + acc_row(lane, 2 * i)] = {softmax.base[i], softmax.scale[i], delta[i]};
        });
        unrolled<WIDTH / 8>([&](int n) { acc[n] = {}; });
#pragma unroll 1
        for (int first = 0; first < TOKENS; first += CHUNK<T>) {
            lane = recomputed(lane);
            Acc scores[COUNT], weight_grads[COUNT];
            load_rows(frag_a, smem_q.rows_from(row), lane);
            score<T>(scores, frag_a, smem_k.rows_from(first), lane);
            if (!window.plain) mask_scores<false>(scores, window, row, first, lane);
            load_rows(frag_a, smem_grad.rows_from(row), lane);
            score<T>(weight_grads, frag_a, smem_v.rows_from(first), lane);
            each_value<COUNT>([&](int n, int i) {
                const float power = scores[n].value[i] * POWER - softmax.base[i / 2];
                const float weight = fast_exp2(power) * softmax.scale[i / 2];
                scores[n].value[i] = weight * (weight_grads[n].value[i] - delta[i / 2]) * SCALE;
            });
            add_weighted<T>(acc, scores, smem_k.rows_from(first), lane);
        }
        store_head(grad_tokens, 3 * C, positions, acc, lane);
    }
    __syncthreads();

    Acc k_grad[WIDTH / 8] = {}, v_grad[WIDTH / 8] = {};
#pragma unroll 1
    for (int first = 0; first < TOKENS; first += CHUNK<T>) {
        lane = recomputed(lane);
        Acc weights[COUNT], weight_grads[COUNT];
        const auto query_of = [&](int n, int i) -> const Query & { return queries[first + 8 * n + acc_col(lane, i)]; };
        load_rows(frag_a, smem_k.rows_from(row), lane);
        score<T>(weights, frag_a, smem_q.rows_from(first), lane);
        if (!window.plain) mask_scores<true>(weights, window, row, first, lane);
        each_value<COUNT>([&](int n, int i) {
            const Query &query = query_of(n, i);
            weights[n].value[i] = fast_exp2(weights[n].value[i] * POWER - query.base) * query.scale;
        });
        add_weighted<T>(v_grad, weights, smem_grad.rows_from(first), lane);
        load_rows(frag_a, smem_v.rows_from(row), lane);
        score<T>(weight_grads, frag_a, smem_grad.rows_from(first), lane);
        each_value<COUNT>(
            [&](int n, int i) { weights[n].value[i] *= (weight_grads[n].value[i] - query_of(n, i).delta) * SCALE; });
        add_weighted<T>(k_grad, weights, smem_q.rows_from(first), lane);
    }
    store_head(grad_tokens + C, 3 * C, positions, k_grad, lane);
    store_head(grad_tokens + 2 * C, 3 * C, positions, v_grad, lane);
}

}  // namespace
}  // namespace ovseg

int ovseg_spatial_aggregation_attention_bwd(const void *tokens, const void *grad_attended, void *grad_tokens,
                                            void *attended, int64_t batch, int64_t classes, int64_t height,
                                            int64_t width, int64_t channels, int64_t heads, int64_t window,
                                            int64_t shift, int dtype, int device, void *stream) {
    using namespace ovseg;
    if (!takes_windows(classes, height, width, channels, heads, window, shift)) return OVSEG_UNSUPPORTED_SIZE;
    if (!aligned(tokens, grad_attended, grad_tokens, attended)) return OVSEG_MISALIGNED;
    const Windows windows{int(height), int(width), int(window), int(shift)};
    return by_dtype(dtype, [&](auto number) {
        using T = decltype(number);
        const auto a = filled<Arguments<T>>(tokens, grad_attended, grad_tokens, attended, windows, classes);
        return launch(spatial_attention_backward<T>, batch * classes * windows.count() * HEADS, THREADS,
                      Shared<T>::TOTAL, device, stream, a);
    });
}
