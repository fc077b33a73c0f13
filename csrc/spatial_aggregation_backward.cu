// Backward of the window attention in spatial_aggregation.cu, from the gradient da of what each token attended to:
//
//     P = softmax(q kᵀ / √d + mask),   δ = rowsum(da ∘ P v)
//     dv = Pᵀ da,   dS = P ∘ (da vᵀ − δ) / √d,   dq = dS k,   dk = dSᵀ q
//
// A block takes one head of one window. Each of its nine warps owns 16 tokens, first as queries, then as keys: the
// scores are worked out twice, so that no sum is shared and no gradient added up in memory. What the first turn found
// of a query's softmax waits for the second in shared memory. The products with weights around it are PyTorch's.

#include "device/window_attention.cuh"

namespace ovseg {
namespace {

constexpr int THREADS = TOKENS / 16 * 32;

template <typename T>
constexpr int CHUNK = sizeof(T) == 2 ? TOKENS / 3 : TOKENS / 9;  // tokens that a warp's 16 are held against at a time

template <typename T>
struct Arguments {
    const T *tokens, *grad_attended;
    T *grad_tokens, *attended;
    Windows windows;
    int classes;
};

struct Query {
    float base, share, delta;
};

template <typename T>
struct Shared {
    static constexpr int TILE = TOKENS * WIDTH * int(sizeof(T));
    static constexpr int TOTAL = 4 * TILE + TOKENS * int(sizeof(Query)) + int(sizeof(Window));
};

// A head's numbers of a warp's 16 tokens, `pitch` apart in memory that begins at `first`; 0 beyond the map.
template <typename T>
DEVICE void load_head(Tile<T, WIDTH> tile, const T *first, int pitch, const int *places, int lane) {
    constexpr int LANES = WIDTH / EACH<T>;
#pragma unroll
    for (int row = lane / LANES; row < 16; row += 32 / LANES) {
        const int place = places[row], column = lane % LANES * EACH<T>;
        const Piece<T> piece = place < 0 ? Piece<T>{} : load_piece(first + int64_t(place) * pitch + column);
        store(tile.at(row, column), piece);
    }
}

template <typename T>
DEVICE void store_head(T *first, int pitch, const int *places, const D (&d)[WIDTH / 8], int lane) {
#pragma unroll
    for (int n = 0; n < WIDTH / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
            const int place = places[d_row(lane, i)];
            if (place < 0) continue;
            store(first + int64_t(place) * pitch + 8 * n + d_column(lane, i),
                  rounded_pair<T>(d[n].value[i], d[n].value[i + 1]));
        }
    }
}

// 16 rows of a tile as factors whose K is in the order of `load_b_chained`.
template <typename T>
DEVICE void load_factors(A (&a)[WIDTH / K<T>], Tile<T, WIDTH> tile, int lane) {
#pragma unroll
    for (int k = 0; k < WIDTH / K<T>; ++k) a[k] = load_a_chained(tile, k, lane);
}

template <typename T>
__global__ void __launch_bounds__(THREADS) spatial_attention_backward(const Arguments<T> a) {
    using Layout = Shared<T>;
    unsigned char *const memory = shared_memory();
    const Tile<T, WIDTH> queries{memory}, keys{memory + Layout::TILE}, values{memory + 2 * Layout::TILE};
    const Tile<T, WIDTH> grads{memory + 3 * Layout::TILE};  // of what the queries attended to
    Window &window = *reinterpret_cast<Window *>(memory + 4 * Layout::TILE);
    Query *const found = reinterpret_cast<Query *>(&window + 1);

    int lane = int(threadIdx.x) % 32;
    const int row = int(threadIdx.x) / 32 * 16, head = int(blockIdx.x) % HEADS;
    window.find<THREADS>(a.windows, int(blockIdx.x) / HEADS, a.classes);
    __syncthreads();
    const int *const places = window.places + row;
    const T *const tokens = a.tokens + window.map * (3 * C) + head * WIDTH;
    T *const grad_tokens = a.grad_tokens + window.map * (3 * C) + head * WIDTH;
    load_head(queries.rows_from(row), tokens, 3 * C, places, lane);
    load_head(keys.rows_from(row), tokens + C, 3 * C, places, lane);
    load_head(values.rows_from(row), tokens + 2 * C, 3 * C, places, lane);
    load_head(grads.rows_from(row), a.grad_attended + window.map * C + head * WIDTH, C, places, lane);
    __syncthreads();

    {
        A own[WIDTH / K<T>];
        D sums[WIDTH / 8];
        load_factors(own, queries.rows_from(row), lane);
        const Softmax softmax = attend<T>(sums, own, keys, values, window, row, lane);
        if (a.attended) store_head(a.attended + window.map * C + head * WIDTH, C, places, sums, lane);
        float delta[2] = {};
#pragma unroll
        for (int n = 0; n < WIDTH / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                delta[i / 2] += sums[n].value[i] * to_float(*grads.at(row + d_row(lane, i), 8 * n + d_column(lane, i)));
            }
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            delta[i] = sum_over_lanes<4>(delta[i]);
            if (lane % 4 == 0) found[row + d_row(lane, 2 * i)] = {softmax.base[i], softmax.share[i], delta[i]};
        }
#pragma unroll
        for (int n = 0; n < WIDTH / 8; ++n) sums[n] = {};
#pragma unroll 1
        for (int first = 0; first < TOKENS; first += CHUNK<T>) {
            lane = recomputed(lane);
            D scores[CHUNK<T> / 8], weight_grads[CHUNK<T> / 8];
            load_factors(own, queries.rows_from(row), lane);
            score<T>(scores, own, keys.rows_from(first), lane);
            if (!window.plain) mask_scores<false>(scores, window, row, first, lane);
            load_factors(own, grads.rows_from(row), lane);
            score<T>(weight_grads, own, values.rows_from(first), lane);
#pragma unroll
            for (int n = 0; n < CHUNK<T> / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float power = scores[n].value[i] * POWER - softmax.base[i / 2];
                    const float weight = fast_exp2(power) * softmax.share[i / 2];
                    scores[n].value[i] = weight * (weight_grads[n].value[i] - delta[i / 2]) * SCALE;
                }
            }
            add_weighted<T>(sums, scores, keys.rows_from(first), lane);
        }
        store_head(grad_tokens, 3 * C, places, sums, lane);
    }
    __syncthreads();

    D key_grads[WIDTH / 8] = {}, value_grads[WIDTH / 8] = {};
#pragma unroll 1
    for (int first = 0; first < TOKENS; first += CHUNK<T>) {
        lane = recomputed(lane);
        D weights[CHUNK<T> / 8], grad[CHUNK<T> / 8];
        A own[WIDTH / K<T>];
        load_factors(own, keys.rows_from(row), lane);
        score<T>(weights, own, queries.rows_from(first), lane);
        if (!window.plain) mask_scores<true>(weights, window, row, first, lane);
#pragma unroll
        for (int n = 0; n < CHUNK<T> / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const Query &query = found[first + 8 * n + d_column(lane, i)];
                weights[n].value[i] = fast_exp2(weights[n].value[i] * POWER - query.base) * query.share;
            }
        }
        add_weighted<T>(value_grads, weights, grads.rows_from(first), lane);
        load_factors(own, values.rows_from(row), lane);
        score<T>(grad, own, grads.rows_from(first), lane);
#pragma unroll
        for (int n = 0; n < CHUNK<T> / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const Query &query = found[first + 8 * n + d_column(lane, i)];
                weights[n].value[i] *= (grad[n].value[i] - query.delta) * SCALE;
            }
        }
        add_weighted<T>(key_grads, weights, queries.rows_from(first), lane);
    }
    store_head(grad_tokens + C, 3 * C, places, key_grads, lane);
    store_head(grad_tokens + 2 * C, 3 * C, places, value_grads, lane);
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
