// Backward of the attention in class_aggregation.cu, from the gradient g_t of y_t, at each position and head:
//
//     r_t = g_t / e_t,   e_t = q_t · z + ε,   a_t = (q_t · S − ε m) / e_t
//     dq_t = S r_t − z (a_t · r_t)             dS = Σ q_t ⊗ r_t,   dz = −Σ q_t (a_t · r_t)
//     dk_t = w_t (dS (v_t − m) + dz)           dv_t = w_t dSᵀ k_t
//     dq'_t = dq_t · φ'(q'),  dk'_t likewise,  φ' = min(φ, 1),  ' marking what φ is applied to
//
// A block takes one head of one position, and its warps 16 classes at a time, in three sweeps over the list: keys and
// values for S, z and m; queries for dq, dS and dz; keys and values again for dk and dv. The warps' sums of a sweep are
// added in the warps' order through shared memory. The products with weights around it are PyTorch's.

#include "device/class_attention.cuh"

namespace ovseg {
namespace {

constexpr int WARPS = 4, THREADS = WARPS * 32;
constexpr int PIECES = 8;  // D that a 32 × 32 matrix is, number 4 · (rows / 16) + columns / 8

template <typename T>
struct Arguments {
    const T *tokens, *terms, *v_bias, *grad;
    T *grad_tokens;
    float *grad_padding;
    Classes classes;
    int64_t batch, terms_stride;  // of terms: numbers from one image to the next
    int positions;  // of a map
};

// What a warp found of two vectors of 32 channels, side by side, and of a matrix.
struct Part {
    float vectors[2 * WIDTH];
    Vector<float, 4> matrix[PIECES][32];  // of each lane
};

template <typename T>
struct Shared {
    static constexpr int TILE = 16 * WIDTH * int(sizeof(T)), OUTER = WIDTH * WIDTH * int(sizeof(T));
    static constexpr int VECTORS = 3 * WIDTH * int(sizeof(float));
    static constexpr int TOTAL = 2 * WARPS * TILE + 2 * OUTER + WARPS * int(sizeof(Part)) + VECTORS;
};

// d += rows · matrix, and d += rows · matrixᵀ, for 16 rows of a tile.
template <typename T>
__device__ __forceinline__ void multiply(D (&d)[WIDTH / 8], Tile<T, WIDTH> rows, Tile<T, WIDTH> matrix, int lane) {
#pragma unroll
    for (int k = 0; k < WIDTH / K<T>; ++k) {
        const A a = load_a_chained(rows, k, lane);
#pragma unroll
        for (int n = 0; n < WIDTH / 16; ++n) {
            B b[2];
            load_b_by_rows(b, matrix, k, n, lane);
            mma<T>(d[2 * n], a, b[0]);
            mma<T>(d[2 * n + 1], a, b[1]);
        }
    }
}

template <typename T>
__device__ __forceinline__ void multiply_transposed(D (&d)[WIDTH / 8], Tile<T, WIDTH> rows, Tile<T, WIDTH> matrix,
                                                    int lane) {
#pragma unroll
    for (int k = 0; k < WIDTH / K<T>; ++k) {
        const A a = load_a_chained(rows, k, lane);
#pragma unroll
        for (int n = 0; n < WIDTH / 16; ++n) {
            B b[2];
            load_b_chained(b, matrix.rows_from(16 * n), k, lane);
            mma<T>(d[2 * n], a, b[0]);
            mma<T>(d[2 * n + 1], a, b[1]);
        }
    }
}

// matrix += leftᵀ · right for 16 rows of both.
template <typename T>
__device__ __forceinline__ void add_outer(D (&matrix)[PIECES], Tile<T, WIDTH> left, Tile<T, WIDTH> right, int lane) {
#pragma unroll
    for (int k = 0; k < 16 / K<T>; ++k) {
        A a[WIDTH / 16];
#pragma unroll
        for (int m = 0; m < WIDTH / 16; ++m) a[m] = load_a_by_rows(left, k, m, lane);
#pragma unroll
        for (int n = 0; n < WIDTH / 16; ++n) {
            B b[2];
            load_b_by_rows(b, right, k, n, lane);
#pragma unroll
            for (int i = 0; i < PIECES / 2; ++i) mma<T>(matrix[i / 2 * 4 + 2 * n + i % 2], a[i / 2], b[i % 2]);
        }
    }
}

template <typename T>
__global__ void __launch_bounds__(THREADS, sizeof(T) == 2 ? 3 : 2) attention_backward(const Arguments<T> a) {
    using Layout = Shared<T>;
    constexpr int EACH = 16 / int(sizeof(T)), LANES = WIDTH / EACH;
    unsigned char *const memory = shared_memory();
    const int warp = int(threadIdx.x) / 32;
    const Tile<T, WIDTH> left{memory + 2 * warp * Layout::TILE}, right = left.rows_from(16);  // the warp's own
    const Tile<T, WIDTH> outer{memory + 2 * WARPS * Layout::TILE}, outer_grad = outer.rows_from(WIDTH);
    Part *const parts = reinterpret_cast<Part *>(outer_grad.start + Layout::OUTER);
    float *const z = reinterpret_cast<float *>(parts + WARPS), *const m = z + WIDTH, *const z_grad = m + WIDTH;

    int lane = int(threadIdx.x) % 32;
    const Classes classes = a.classes;
    const int channel = int(blockIdx.x) % HEADS * WIDTH, position = int(blockIdx.x) / HEADS;
    const int64_t image = position / a.positions, first = image * classes.count * a.positions + position % a.positions;
    const float share = classes.share(), eps = NORMALISER_EPS * share;

    const auto token_of = [&](int key) {
        return key < classes.count ? first + int64_t(key) * a.positions : a.batch * classes.count * a.positions;
    };
    // A piece of queries, keys or values (`part` 0, 1, 2) of a token before φ, in float.
    const auto load_part = [&](float (&values)[EACH], int part, int key, int column) {
        const Piece<T> piece = load<T, EACH>(a.tokens + token_of(key) * (3 * C) + part * C + channel + column);
        const T *more = a.terms + image * a.terms_stride + int64_t(key) * (2 * C) + part * C;
        const Piece<T> term = load<T, EACH>((part == 2 ? a.v_bias : more) + channel + column);
#pragma unroll
        for (int i = 0; i < EACH; ++i) values[i] = to_float(piece.value[i]) + to_float(term.value[i]);
    };
    const auto store_part = [&](Tile<T, WIDTH> tile, int part, int tile_first) {
#pragma unroll
        for (int row = lane / LANES; row < 16; row += 32 / LANES) {
            const int key = tile_first + row, column = lane % LANES * EACH;
            if (key >= classes.count) continue;
            store<T, EACH>(a.grad_tokens + token_of(key) * (3 * C) + part * C + channel + column,
                           load<T, EACH>(tile.at(row, column)));
        }
    };
    // The sum over the warps of what each left in its part: of `count` numbers of the vectors to `vectors`, and of the
    // thread's two pieces of the matrix. All threads call it together.
    const auto sum_parts = [&](D (&sums)[PIECES / WARPS], float *vectors, int count, float scale) {
        __syncthreads();
        if (int(threadIdx.x) < count) {
            float sum = 0.0f;
#pragma unroll
            for (int i = 0; i < WARPS; ++i) sum += parts[i].vectors[threadIdx.x];
            vectors[threadIdx.x] = sum * scale;
        }
#pragma unroll
        for (int piece = 0; piece < PIECES / WARPS; ++piece) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                sums[piece].value[j] = 0.0f;
#pragma unroll
                for (int i = 0; i < WARPS; ++i) {
                    sums[piece].value[j] += parts[i].matrix[warp * (PIECES / WARPS) + piece][lane].value[j];
                }
                sums[piece].value[j] *= scale;
            }
        }
        __syncthreads();
    };
    const auto leave = [&](const D (&matrix)[PIECES]) {
#pragma unroll
        for (int i = 0; i < PIECES; ++i) {
            const float(&v)[4] = matrix[i].value;
            parts[warp].matrix[i][lane] = {{v[0], v[1], v[2], v[3]}};
        }
    };
    // Row and column of value i of a piece that `sum_parts` gives.
    const auto row_of = [&](int piece, int i) {
        return (warp * (PIECES / WARPS) + piece) / 4 * 16 + d_row(lane, i);
    };
    const auto column_of = [&](int piece, int i) {
        return (warp * (PIECES / WARPS) + piece) % 4 * 8 + d_column(lane, i);
    };

    {
        D matrix[PIECES] = {};
        float totals[EACH] = {}, means[EACH] = {};
#pragma unroll 1
        for (int tile = warp; tile < classes.tiles(); tile += WARPS) {
            lane = recomputed(lane);
#pragma unroll
            for (int row = lane / LANES; row < 16; row += 32 / LANES) {
                const int key = tile * 16 + row, column = lane % LANES * EACH;
                const float times = classes.times(key) * share;
                Piece<T> k{}, v{};
                if (key < classes.keys()) {
                    float values[EACH];
                    load_part(values, 1, key, column);
#pragma unroll
                    for (int i = 0; i < EACH; ++i) k.value[i] = rounded<T>(feature(values[i]) * times);
                    load_part(values, 2, key, column);
#pragma unroll
                    for (int i = 0; i < EACH; ++i) v.value[i] = rounded<T>(values[i]);
                }
#pragma unroll
                for (int i = 0; i < EACH; ++i) {
                    totals[i] += to_float(k.value[i]);
                    means[i] += to_float(v.value[i]) * times;
                }
                store<T, EACH>(left.at(row, column), k);
                store<T, EACH>(right.at(row, column), v);
            }
            __syncwarp();
            add_outer(matrix, left, right, lane);
            __syncwarp();
        }
        leave(matrix);
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
#pragma unroll
            for (int distance = 16; distance >= LANES; distance /= 2) {
                totals[i] += __shfl_xor_sync(ALL_LANES, totals[i], distance);
                means[i] += __shfl_xor_sync(ALL_LANES, means[i], distance);
            }
            if (lane < LANES) {
                parts[warp].vectors[lane * EACH + i] = totals[i];
                parts[warp].vectors[WIDTH + lane * EACH + i] = means[i];
            }
        }
        D sums[PIECES / WARPS];
        sum_parts(sums, z, 2 * WIDTH, 1.0f);
#pragma unroll
        for (int piece = 0; piece < PIECES / WARPS; ++piece) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int row = row_of(piece, i), column = column_of(piece, i);
                *outer.at(row, column) = rounded<T>(sums[piece].value[i] - z[row] * m[column]);
            }
        }
        __syncthreads();
    }

    {
        D matrix[PIECES] = {};
        Pair<float> totals[WIDTH / 8] = {};
#pragma unroll 1
        for (int tile = warp; tile < classes.tiles(); tile += WARPS) {
            lane = recomputed(lane);
#pragma unroll
            for (int row = lane / LANES; row < 16; row += 32 / LANES) {
                const int key = tile * 16 + row, column = lane % LANES * EACH;
                Piece<T> q{}, grad{};
                if (key < classes.count) {
                    float values[EACH];
                    load_part(values, 0, key, column);
#pragma unroll
                    for (int i = 0; i < EACH; ++i) q.value[i] = rounded<T>(feature(values[i]));
                    grad = load<T, EACH>(a.grad + token_of(key) * C + channel + column);
                }
                store<T, EACH>(left.at(row, column), q);
                store<T, EACH>(right.at(row, column), grad);
            }
            __syncwarp();
            D attended[WIDTH / 8] = {}, q_grad[WIDTH / 8];
            multiply(attended, left, outer, lane);
            float normaliser[2] = {}, along[2] = {};
#pragma unroll
            for (int n = 0; n < WIDTH / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int column = 8 * n + d_column(lane, i);
                    normaliser[i / 2] += to_float(*left.at(d_row(lane, i), column)) * z[column];
                }
            }
#pragma unroll
            for (int i = 0; i < 2; ++i) normaliser[i] = 1.0f / (sum_over_lanes<4>(normaliser[i]) + eps);
#pragma unroll
            for (int n = 0; n < WIDTH / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int column = 8 * n + d_column(lane, i);
                    T *const place = right.at(d_row(lane, i), column);
                    const T ratio = rounded<T>(to_float(*place) * normaliser[i / 2]);
                    *place = ratio;
                    along[i / 2] -= (attended[n].value[i] - eps * m[column]) * normaliser[i / 2] * to_float(ratio);
                }
            }
#pragma unroll
            for (int i = 0; i < 2; ++i) along[i] = sum_over_lanes<4>(along[i]);
            __syncwarp();
            add_outer(matrix, left, right, lane);
#pragma unroll
            for (int n = 0; n < WIDTH / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int column = 8 * n + d_column(lane, i);
                    totals[n].value[i % 2] += to_float(*left.at(d_row(lane, i), column)) * along[i / 2];
                    q_grad[n].value[i] = z[column] * along[i / 2];
                }
            }
            multiply_transposed(q_grad, right, outer, lane);
            __syncwarp();
#pragma unroll
            for (int n = 0; n < WIDTH / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    T *const place = left.at(d_row(lane, i), 8 * n + d_column(lane, i));
                    *place = rounded<T>(q_grad[n].value[i] * fminf(to_float(*place), 1.0f));
                }
            }
            __syncwarp();
            store_part(left, 0, tile * 16);
            __syncwarp();
        }
        leave(matrix);
#pragma unroll
        for (int n = 0; n < WIDTH / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
#pragma unroll
                for (int distance = 16; distance >= 4; distance /= 2) {
                    totals[n].value[i] += __shfl_xor_sync(ALL_LANES, totals[n].value[i], distance);
                }
                if (lane < 4) parts[warp].vectors[8 * n + d_column(lane, i)] = totals[n].value[i];
            }
        }
        D sums[PIECES / WARPS];
        sum_parts(sums, z_grad, WIDTH, share);
#pragma unroll
        for (int piece = 0; piece < PIECES / WARPS; ++piece) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                *outer_grad.at(row_of(piece, i), column_of(piece, i)) = rounded<T>(sums[piece].value[i]);
            }
        }
        __syncthreads();
    }

#pragma unroll 1
    for (int tile = warp; tile < classes.tiles(); tile += WARPS) {
        lane = recomputed(lane);
#pragma unroll
        for (int row = lane / LANES; row < 16; row += 32 / LANES) {
            const int key = tile * 16 + row, column = lane % LANES * EACH;
            Piece<T> k{}, v{};
            if (key < classes.keys()) {
                float values[EACH];
                load_part(values, 1, key, column);
#pragma unroll
                for (int i = 0; i < EACH; ++i) k.value[i] = rounded<T>(feature(values[i]));
                load_part(values, 2, key, column);
#pragma unroll
                for (int i = 0; i < EACH; ++i) {
                    v.value[i] = rounded<T>(to_float(rounded<T>(values[i])) - m[column + i]);
                }
            }
            store<T, EACH>(left.at(row, column), k);
            store<T, EACH>(right.at(row, column), v);
        }
        __syncwarp();
        D k_grad[WIDTH / 8], v_grad[WIDTH / 8] = {};
#pragma unroll
        for (int n = 0; n < WIDTH / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) k_grad[n].value[i] = z_grad[8 * n + d_column(lane, i)];
        }
        multiply_transposed(k_grad, right, outer_grad, lane);
        multiply(v_grad, left, outer_grad, lane);
        __syncwarp();
#pragma unroll
        for (int n = 0; n < WIDTH / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int row = d_row(lane, i), column = 8 * n + d_column(lane, i), key = tile * 16 + row;
                const float times = classes.times(key);
                T *const place = left.at(row, column);
                const float grad = k_grad[n].value[i] * fminf(to_float(*place), 1.0f) * times;
                *place = rounded<T>(grad);
                *right.at(row, column) = rounded<T>(v_grad[n].value[i] * times);
                if (key < classes.count || key >= classes.keys()) continue;
                float *const target = a.grad_padding + int64_t(position) * (2 * C) + channel + column;
                target[0] = grad;
                target[C] = v_grad[n].value[i] * times;
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
                                          void *grad_tokens, void *grad_padding, int64_t batch, int64_t classes,
                                          int64_t positions, int64_t channels, int64_t heads, int64_t pads,
                                          int64_t images_of_terms, int dtype, int device, void *stream) {
    using namespace ovseg;
    if (!takes_classes(classes, 1, positions, channels, heads, 1, pads)) return OVSEG_UNSUPPORTED_SIZE;
    if (!aligned(tokens, terms, v_bias, grad, grad_tokens, grad_padding)) return OVSEG_MISALIGNED;
    return by_dtype(dtype, [&](auto number) {
        using T = decltype(number);
        const auto in = [](const void *pointer) { return static_cast<const T *>(pointer); };
        const Classes list{int(classes), int(pads)};
        const Arguments<T> a{in(tokens),
                             in(terms),
                             in(v_bias),
                             in(grad),
                             static_cast<T *>(grad_tokens),
                             static_cast<float *>(grad_padding),
                             list,
                             batch,
                             images_of_terms > 1 ? list.keys() * int64_t(2 * C) : 0,
                             int(positions)};
        return launch(attention_backward<T>, batch * positions * HEADS, THREADS, Shared<T>::TOTAL, device, stream, a);
    });
}
