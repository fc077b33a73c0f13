// Backward of the attention in class_aggregation.cu, from the gradient g_t of y_t, at each position and head:
//
//     r_t = g_t / e_t,   e_t = q_t · z + ε,   a_t = (q_t · S − ε m) / e_t
//     dq_t = S r_t − z (a_t · r_t)             dS = Σ q_t ⊗ r_t,   dz = −Σ q_t (a_t · r_t)
//     dk_t = w_t (dS (v_t − m) + dz)           dv_t = w_t dSᵀ k_t
//     dq'_t = dq_t · φ'(q'),  dk'_t likewise,  φ' = min(φ, 1),  ' marking what φ is applied to
//
// A block takes one head of one position, and its warps 16 classes at a time, in three sweeps over the list: keys and
// values for S, z and m; queries for dq, dS and dz; keys and values again for dk and dv. The warps' sums of a sweep are
// added in order through shared memory. The products with weights around it are PyTorch's.

#include "device/class_attention.cuh"
#include "device/copies.cuh"

namespace ovseg {
namespace {

constexpr int WARPS = 4, THREADS = WARPS * 32;
constexpr int ACCS = 8;  // acc of a 32 × 32 matrix is, number 4 · (rows / 16) + columns / 8

template <typename T> struct Arguments {
    const T *tokens, *terms, *v_bias, *grad;
    T *grad_tokens;
    float *grad_padding;
    Classes classes;
    int64_t batch, terms_stride;  // of terms: numbers from one image to the next
    int positions;                // of a map
};

// What a warp found of two vectors of 32 channels, side by side, and of a matrix.
struct Part {
    float vectors[2 * WIDTH];
    Vector<float, 4> matrix[ACCS][32];  // of each lane
};

template <typename T> struct Shared {
    static constexpr int TILE = 16 * WIDTH * int(sizeof(T)), OUTER = WIDTH * WIDTH * int(sizeof(T));
    static constexpr int VECTORS = 3 * WIDTH * int(sizeof(float));
    static constexpr int TOTAL = 2 * WARPS * TILE + 2 * OUTER + WARPS * int(sizeof(Part)) + VECTORS;
};

// matrix += leftᵀ · right for 16 rows of both.
template <typename T> DEVICE void add_outer(Acc (&matrix)[ACCS], Tile<T, WIDTH> left, Tile<T, WIDTH> right, int lane) {
    unrolled<16 / K<T>>([&](int k) {
        FragA frag_a[WIDTH / 16];
        unrolled<WIDTH / 16>([&](int m) { frag_a[m] = load_a_by_rows(left, k, m, lane); });
        unrolled<WIDTH / 16>([&](int n) {
            const FragB2 frag_b = load_b_by_rows(right, k, n, lane);
            unrolled<WIDTH / 16>([&](int m) { mma<T>(matrix + 4 * m + 2 * n, frag_a[m], frag_b); });
        });
    });
}

template <typename T>
__global__ void __launch_bounds__(THREADS, sizeof(T) == 2 ? 3 : 2) class_attention_backward(const Arguments<T> a) {
    using Layout = Shared<T>;
    using Rows = RowVecs<T, WIDTH>;
    constexpr int LANES = Rows::LANES, STEPS = WIDTH / K<T>;
    unsigned char *const memory = shared_memory();
    const int warp = int(threadIdx.x) / 32;
    const Tile<T, WIDTH> left{memory + 2 * warp * Layout::TILE}, right = left.rows_from(16);  // the warp's
    const Tile<T, WIDTH> outer{memory + 2 * WARPS * Layout::TILE}, outer_grad = outer.rows_from(WIDTH);
    Part *const parts = reinterpret_cast<Part *>(outer_grad.start + Layout::OUTER);
    float *const z = reinterpret_cast<float *>(parts + WARPS), *const m = z + WIDTH, *const z_grad = m + WIDTH;

    int lane = int(threadIdx.x) % 32;
    const Classes classes = a.classes;
    const int channel = int(blockIdx.x) % HEADS * WIDTH, position = int(blockIdx.x) / HEADS;
    const int64_t image = position / a.positions, first = image * classes.count * a.positions + position % a.positions;
    const float share = classes.share, eps = NORMALISER_EPS * share;

    const int64_t pitch = int64_t(a.positions) * (3 * C);  // of tokens, from one class to the next
    const T *const tokens = a.tokens + first * (3 * C) + channel;
    const T *const padding = a.tokens + a.batch * classes.count * pitch + channel;
    const T *const terms = a.terms + image * a.terms_stride + channel;

    // A lane's vector of queries, keys or values (`part` 0, 1, 2) before φ, the last key's beyond the list.
    const auto load_part = [&](float (&values)[VEC<T>], int part, int key) {
        key = min(key, classes.keys() - 1);
        const int column = part * C + Rows::column(lane);
        const Vec<T> vec = load_vec((key < classes.count ? tokens + key * pitch : padding) + column);
        const Vec<T> term =
            load_vec(part == 2 ? a.v_bias + channel + Rows::column(lane) : terms + int64_t(key) * (2 * C) + column);
        unrolled<VEC<T>>([&](int i) { values[i] = to_float(vec.value[i]) + to_float(term.value[i]); });
    };
    // function(vector, key) for a lane's vectors of a warp's tile.
    const auto each_vec = [&](int tile, auto function) {
        unrolled<Rows::COUNT>([&](int i) { function(i, tile * 16 + i * Rows::AT_ONCE + Rows::row(lane)); });
    };
    const auto store_part = [&](Tile<T, WIDTH> tile, int part, int tile_first) {
        copy_out(tile, a.grad_tokens + first * (3 * C) + channel + part * C + tile_first * pitch, pitch,
                 classes.count - tile_first, lane);
    };
    // The sum of the warps' parts: `count` numbers to `vectors`, and the thread's two acc of the matrix.
    const auto sum_parts = [&](Acc(&sums)[ACCS / WARPS], float *vectors, int count, float scale) {
        __syncthreads();
        if (int(threadIdx.x) < count) {
            float sum = 0.0f;
            unrolled<WARPS>([&](int i) { sum += parts[i].vectors[threadIdx.x]; });
            vectors[threadIdx.x] = sum * scale;
        }
        each_value<ACCS / WARPS>([&](int acc, int j) {
            float sum = 0.0f;
            unrolled<WARPS>([&](int i) { sum += parts[i].matrix[warp * (ACCS / WARPS) + acc][lane].value[j]; });
            sums[acc].value[j] = sum * scale;
        });
        __syncthreads();
    };
    const auto store_matrix = [&](const Acc(&matrix)[ACCS]) {
        unrolled<ACCS>([&](int i) {
            const float (&v)[4] = matrix[i].value;
            parts[warp].matrix[i][lane] = {{v[0], v[1], v[2], v[3]}};
        });
    };
    // Row and column of value i of an acc that `sum_parts` gives.
    const auto row_of = [&](int acc, int i) { return (warp * (ACCS / WARPS) + acc) / 4 * 16 + acc_row(lane, i); };
    const auto column_of = [&](int acc, int i) { return (warp * (ACCS / WARPS) + acc) % 4 * 8 + acc_col(lane, i); };

    {
        Acc matrix[ACCS] = {};
        float totals[VEC<T>] = {}, means[VEC<T>] = {};
#pragma unroll 1
        for (int tile = warp; tile < classes.tiles(); tile += WARPS) {
            lane = recomputed_lane(lane);
            each_vec(tile, [&](int i, int key) {
                const float times = classes.times(key) * share;  // 0 beyond the list
                float values[VEC<T>];
                load_part(values, 1, key);
                unrolled<VEC<T>>([&](int j) { values[j] = feature(values[j]) * times; });
                const Vec<T> k = rounded<T>(values);
                unrolled<VEC<T>>([&](int j) { totals[j] += to_float(k.value[j]); });
                store(Rows::address(left, 0, i, lane), k);
                load_part(values, 2, key);
                unrolled<VEC<T>>([&](int j) { means[j] += values[j] * times; });
                store(Rows::address(right, 0, i, lane), rounded<T>(values));
            });
            __syncwarp();
            add_outer(matrix, left, right, lane);
            __syncwarp();
        }
        store_matrix(matrix);
        unrolled<VEC<T>>([&](int i) {
            totals[i] = sum_over_lanes<32 / LANES, LANES>(totals[i]);
            means[i] = sum_over_lanes<32 / LANES, LANES>(means[i]);
            if (lane < LANES) {
                parts[warp].vectors[lane * VEC<T> + i] = totals[i];
                parts[warp].vectors[WIDTH + lane * VEC<T> + i] = means[i];
            }
        });
        Acc sums[ACCS / WARPS];
        sum_parts(sums, z, 2 * WIDTH, 1.0f);
        each_value<ACCS / WARPS>([&](int acc, int i) {
            const int row = row_of(acc, i), column = column_of(acc, i);
            *outer.at(row, column) = rounded<T>(sums[acc].value[i] - z[row] * m[column]);
        });
        __syncthreads();
    }

    {
        Acc matrix[ACCS] = {};
        Pair<float> totals[WIDTH / 8] = {};
#pragma unroll 1
        for (int tile = warp; tile < classes.tiles(); tile += WARPS) {
            lane = recomputed_lane(lane);
            each_vec(tile, [&](int i, int key) {
                float values[VEC<T>];
                load_part(values, 0, key);
                unrolled<VEC<T>>([&](int j) { values[j] = feature(values[j]); });
                store(Rows::address(left, 0, i, lane), rounded<T>(values));
                // The padding asks nothing, and a row beyond the list, which holds the last key once more, neither.
                const int64_t token = first + int64_t(key) * a.positions;
                const T *const grad = a.grad + token * C + channel + Rows::column(lane);
                store(Rows::address(right, 0, i, lane), load_if(key < classes.count, grad));
            });
            __syncwarp();
            FragA q[STEPS];
            Acc attended[WIDTH / 8] = {}, total = {};
            unrolled<STEPS>([&](int k) {
                q[k] = load_a_chained(left, k, lane);
                mma<T>(total, q[k], repeated_column<T>(z, k, lane));
            });
            multiply<T, STEPS>(attended, outer, lane, [&](int k) { return q[k]; });
            float normaliser[2], along[2] = {};
            unrolled<2>([&](int i) { normaliser[i] = fast_reciprocal(total.value[2 * i] + eps); });
            Acc ratio[WIDTH / 8], q_grad[WIDTH / 8];
#pragma unroll
            for (int n = 0; n < WIDTH / 8; ++n) {
                const Pair<float> mean = load<float, 2>(m + 8 * n + acc_col(lane, 0));
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    T *const address = acc_address(right, n, lane) + i * (8 * WIDTH);
                    const Pair<T> grad = load<T, 2>(address);
                    const Pair<T> pair = rounded_pair<T>(to_float(grad.value[0]) * normaliser[i],
                                                         to_float(grad.value[1]) * normaliser[i]);
                    store(address, pair);
                    unrolled<2>([&](int j) {
                        const float number = to_float(pair.value[j]);
                        ratio[n].value[2 * i + j] = number;
                        along[i] += (attended[n].value[2 * i + j] - eps * mean.value[j]) * number;
                    });
                }
            }
            unrolled<2>([&](int i) { along[i] = -normaliser[i] * sum_over_lanes<4>(along[i]); });
            __syncwarp();
            add_outer(matrix, left, right, lane);
            unrolled<WIDTH / 8>([&](int n) {
                const Pair<float> pair = load<float, 2>(z + 8 * n + acc_col(lane, 0));
                unrolled<4>([&](int i) { q_grad[n].value[i] = pair.value[i % 2] * along[i / 2]; });
            });
            multiply_transposed<T, STEPS>(q_grad, outer, lane, [&](int k) { return chained<T>(ratio, k); });
            __syncwarp();
            unrolled<WIDTH / 8, 2>([&](int n, int i) {
                const Pair<float> pair = chained_pair<T>(q, n, i);
                float grad[2];
                unrolled<2>([&](int j) {
                    totals[n].value[j] += pair.value[j] * along[i];
                    grad[j] = q_grad[n].value[2 * i + j] * fminf(pair.value[j], 1.0f);
                });
                store(acc_address(left, n, lane) + i * (8 * WIDTH), rounded_pair<T>(grad[0], grad[1]));
            });
            __syncwarp();
            store_part(left, 0, tile * 16);
            __syncwarp();
        }
        store_matrix(matrix);
        unrolled<WIDTH / 8, 2>([&](int n, int i) {
            const float total = sum_over_lanes<8, 4>(totals[n].value[i]);
            if (lane < 4) parts[warp].vectors[8 * n + acc_col(lane, i)] = total;
        });
        Acc sums[ACCS / WARPS];
        sum_parts(sums, z_grad, WIDTH, share);
        each_value<ACCS / WARPS>([&](int acc, int i) {
            *outer_grad.at(row_of(acc, i), column_of(acc, i)) = rounded<T>(sums[acc].value[i]);
        });
        __syncthreads();
    }

#pragma unroll 1
    for (int tile = warp; tile < classes.tiles(); tile += WARPS) {
        lane = recomputed_lane(lane);
        each_vec(tile, [&](int i, int key) {
            float values[VEC<T>];
            load_part(values, 1, key);
            unrolled<VEC<T>>([&](int j) { values[j] = feature(values[j]); });
            store(Rows::address(left, 0, i, lane), rounded<T>(values));
            load_part(values, 2, key);
            const Vec<T> v = rounded<T>(values);
            unrolled<VEC<T>>([&](int j) { values[j] = to_float(v.value[j]) - m[Rows::column(lane) + j]; });
            store(Rows::address(right, 0, i, lane), rounded<T>(values));
        });
        __syncwarp();
        FragA keys[STEPS];
        Acc k_grad[WIDTH / 8], v_grad[WIDTH / 8] = {};
        unrolled<STEPS>([&](int k) { keys[k] = load_a_chained(left, k, lane); });
        unrolled<WIDTH / 8>([&](int n) {
            const Pair<float> pair = load<float, 2>(z_grad + 8 * n + acc_col(lane, 0));
            unrolled<4>([&](int i) { k_grad[n].value[i] = pair.value[i % 2]; });
        });
        multiply_transposed<T, STEPS>(k_grad, outer_grad, lane, [&](int k) { return load_a_chained(right, k, lane); });
        multiply<T, STEPS>(v_grad, outer_grad, lane, [&](int k) { return keys[k]; });
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int key = tile * 16 + acc_row(lane, 2 * i);
            const float times = classes.times(key);
            const bool pad = key >= classes.count && key < classes.keys();
#pragma unroll
            for (int n = 0; n < WIDTH / 8; ++n) {
                const Pair<float> pair = chained_pair<T>(keys, n, i);
                Pair<float> of_key, of_value;
                unrolled<2>([&](int j) {
                    of_key.value[j] = k_grad[n].value[2 * i + j] * fminf(pair.value[j], 1.0f) * times;
                    of_value.value[j] = v_grad[n].value[2 * i + j] * times;
                });
                const int below = i * (8 * WIDTH);
                store(acc_address(left, n, lane) + below, rounded_pair<T>(of_key.value[0], of_key.value[1]));
                store(acc_address(right, n, lane) + below, rounded_pair<T>(of_value.value[0], of_value.value[1]));
                if (!pad) continue;
                float *const target = a.grad_padding + int64_t(position) * (2 * C) + channel + acc_col(lane, 0);
                store<float, 2>(target + 8 * n, of_key);
                store<float, 2>(target + C + 8 * n, of_value);
            }
        }
        __syncwarp();
        store_part(left, 1, tile * 16);
        store_part(right, 2, tile * 16);
        __syncwarp();
    }
}

}  // namespace
}  // namespace ovseg

int ovseg_class_aggregation_attention_bwd(const void *tokens, const void *terms, const void *v_bias, const void *grad,
                                          void *grad_tokens, float *grad_padding, int64_t batch, int64_t classes,
                                          int64_t positions, int64_t channels, int64_t heads, int64_t pads,
                                          int64_t images_of_terms, int dtype, int device, void *stream) {
    using namespace ovseg;
    if (!takes_classes(classes, 1, positions, channels, heads, 1, pads)) return OVSEG_UNSUPPORTED_SIZE;
    if (!aligned(tokens, terms, v_bias, grad, grad_tokens, grad_padding)) return OVSEG_MISALIGNED;
    return by_dtype(dtype, [&](auto number) {
        using T = decltype(number);
        const Classes list(classes, pads);
        const int64_t terms_stride = images_of_terms > 1 ? list.keys() * int64_t(2 * C) : 0;
        const auto a = filled<Arguments<T>>(tokens, terms, v_bias, grad, grad_tokens, grad_padding, list, batch,
                                            terms_stride, positions);
        return launch(class_attention_backward<T>, batch * positions * HEADS, THREADS, Shared<T>::TOTAL, device, stream,
                      a);
    });
}
