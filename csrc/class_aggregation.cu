// Class aggregation: at every position, a transformer layer with linear attention over all classes, in one kernel.
//
//     n = LN1(average-pool(x));   q_t = φ(Wq n_t + g_t),   k_t = φ(Wk n_t + h_t),   v_t = Wv n_t + b,   φ = elu + 1
//     S = Σ w_t k_t ⊗ (v_t − m),   z = Σ w_t k_t,   m ≈ Σ w_t v_t,   w_t = 1 / N,   ε = 1e-6 / N
//     y_t = average-pool(x)_t + m + (q_t · S − ε m) / (q_t · z + ε)
//     out = y + W2 ReLU(W1 LN2(y) + b1) + b2,   and + x where nothing is pooled
//
// N counts the classes and what pads their list; the padding class is one more key, with w = pads / N.
//
// A warp owns 16 classes of a position, from x to out. A list that the block's warps hold together goes through one
// head after another, and short lists of several positions share a block; a longer list is gone through twice, once for
// the sums and once for what they are asked. Keys and values lie in shared memory, where each sum over classes is one
// warp's, in the order of the classes. Weights stream through a ring of stages. The resize that ends a pooled call, and
// its backward, are kernels of their own.

#include <algorithm>

#include "device/class_sums.cuh"
#include "device/transformer.cuh"

namespace ovseg {
namespace {

constexpr int RING = 3;

template <typename T>
constexpr int WARPS = sizeof(T) == 2 ? 12 : 4;

template <typename T>
constexpr int THREADS = WARPS<T> * 32;

template <typename T>
struct Arguments {
    const T *x, *terms, *norm1_weight, *norm1_bias, *qkv_weight, *v_bias, *padding_token;
    const T *norm2_weight, *norm2_bias, *fc1_weight, *fc1_bias, *fc2_weight, *fc2_bias;
    T *out, *middle;
    Classes classes;
    int64_t map, result_map;  // numbers of x and of a result from one class to the next
    int64_t terms_stride;     // and of terms from one image to the next
    int positions;            // of all images
    int height, width, pooling, hidden;
    int together;  // positions of a block; in a long list's kernel: turns that the block takes for one
};

template <typename T>
struct Shared {
    static constexpr int ROWS = WARPS<T> * 16 * C * int(sizeof(T));
    static constexpr int KEYS = WARPS<T> * 16 * WIDTH * int(sizeof(T));
    static constexpr int STAGE = STAGE_ROWS * C * int(sizeof(T));
    static constexpr int OUTER = WIDTH * WIDTH * int(sizeof(T));
    static constexpr int VECTORS = WARPS<T> * 2 * WIDTH * int(sizeof(float));
    static constexpr int TOTAL = ROWS + 2 * KEYS + RING * STAGE + VECTORS;
    static_assert(2 * KEYS >= WARPS<T> * OUTER && WARPS<T> >= HEADS, "S takes the place of keys and values");
};

// The weights in the order in which a block multiplies by them: k, v, q of a head, then of the next, then those of the
// MLP. For a long list k and v of each head in each of `turns`, then in each turn q of each head and those of the MLP.
template <typename T, bool LONG>
struct Weights {
    const T *qkv, *fc1, *fc2;
    int hidden, turns;

    __device__ __forceinline__ int of_mlp() const { return 2 * (hidden / STAGE_ROWS); }
    __device__ __forceinline__ int stages() const {
        return LONG ? turns * (3 * HEADS + of_mlp()) : 3 * HEADS + of_mlp();
    }

    __device__ __forceinline__ void operator()(int stage, unsigned char *buffer) const {
        int part = (stage + 1) % 3, head = stage / 3, mlp = stage - 3 * HEADS;  // of q, k, v
        if constexpr (LONG) {
            const int second = stage - turns * 2 * HEADS, step = second % recomputed(HEADS + of_mlp());
            part = second < 0 ? 1 + stage % 2 : 0;
            head = second < 0 ? stage / 2 % HEADS : step;
            mlp = second < 0 ? -1 : step - HEADS;
        }
        if (mlp >= 0 && mlp % 2) {
            copy_rows<C, THREADS<T>>(Tile<T, STAGE_ROWS>{buffer}, fc2 + mlp / 2 * STAGE_ROWS, hidden);
            return;
        }
        const T *source = mlp < 0 ? qkv + (part * C + head * WIDTH) * C : fc1 + mlp / 2 * (STAGE_ROWS * C);
        copy_rows<STAGE_ROWS, THREADS<T>>(Tile<T, C>{buffer}, source, C);
    }
};

// Where one position's first class begins in x and in the results, and the guidance of its image.
template <typename T>
struct Position {
    const T *x, *terms;
    int64_t result;

    // Worked out again wherever it is asked for, instead of kept in registers.
    __device__ __forceinline__ Position(const Arguments<T> &a, int number) {
        number = recomputed(number);
        const int width = recomputed(a.width), pooling = recomputed(a.pooling);
        const int columns = width / pooling, of_map = a.height / pooling * columns;
        const int image = number / of_map, place = number % of_map;
        const int first = place / columns * pooling * width + place % columns * pooling;
        x = a.x + int64_t(image) * a.classes.count * a.map + int64_t(first) * C;
        result = int64_t(image) * a.classes.count * a.result_map + int64_t(place) * C;
        terms = a.terms + image * a.terms_stride;
    }
};

// Neighbouring channels of a class at a position, `from` the first of them, averaged over the square that is pooled.
template <typename T>
__device__ __forceinline__ Piece<T> pooled(const Arguments<T> &a, const T *from) {
    constexpr int EACH = 16 / int(sizeof(T));
    if (a.pooling == 1) return load<T, EACH>(from);
    float total[EACH] = {};
#pragma unroll 1
    for (int i = 0; i < a.pooling * a.pooling; ++i) {
        const Piece<T> piece = load<T, EACH>(from + (int64_t(i / a.pooling) * a.width + i % a.pooling) * C);
#pragma unroll
        for (int j = 0; j < EACH; ++j) total[j] += to_float(piece.value[j]);
    }
    Piece<T> result;
    const float share = 1.0f / float(a.pooling * a.pooling);
#pragma unroll
    for (int j = 0; j < EACH; ++j) result.value[j] = rounded<T>(total[j] * share);
    return result;
}

// A warp's 16 classes from `first` on as rows of its tile, with the padding class behind the last; zeros beyond.
template <typename T>
__device__ __forceinline__ void load_classes(Tile<T, C> rows, const Arguments<T> &a, const Position<T> &position,
                                             int first, int lane) {
    constexpr int EACH = 16 / int(sizeof(T)), LANES = C / EACH, AT_ONCE = 32 / LANES;
#pragma unroll 1
    for (int i = 0; i < 16; i += AT_ONCE) {
        const int row = i + lane / LANES, column = lane % LANES * EACH, key = first + row;
        Piece<T> piece{};
        if (key < a.classes.count) {
            piece = pooled(a, position.x + key * a.map + column);
        } else if (key < a.classes.keys()) {
            piece = load<T, EACH>(a.padding_token + column);
        }
        store<T, EACH>(rows.at(row, column), piece);
    }
}

template <typename T, bool LONG>
__global__ void __launch_bounds__(THREADS<T>) class_aggregation(const Arguments<T> a) {
    using Layout = Shared<T>;
    unsigned char *const row_memory = shared_memory();
    unsigned char *const key_memory = row_memory + Layout::ROWS;
    unsigned char *const value_memory = key_memory + Layout::KEYS;
    unsigned char *const stage_memory = value_memory + Layout::KEYS;
    float *const vectors = reinterpret_cast<float *>(stage_memory + RING * Layout::STAGE);

    const Classes &classes = a.classes;
    const int warp = int(threadIdx.x) / 32, each = LONG ? WARPS<T> : classes.tiles();  // warps of a position
    const int slot = warp / each, own = warp % each, turns = LONG ? a.together : 1;
    const int number = LONG ? int(blockIdx.x) : int(blockIdx.x) * a.together + slot;
    int lane = int(threadIdx.x) % 32;

    using Fetch = Weights<T, LONG>;
    Stages<RING, Layout::STAGE, Fetch> stages(stage_memory,
                                              Fetch{a.qkv_weight, a.fc1_weight, a.fc2_weight, a.hidden, turns});
    if (!LONG && (slot >= a.together || number >= a.positions)) {  // a warp without a position copies weights only
#pragma unroll 1
        for (int stage = 0; stage < stages.stages; ++stage) {
            stages.next();
            if (stage >= 3 * HEADS || stage % 3 != 1) continue;
            __syncthreads();
            __syncthreads();
        }
        return;
    }

    const Tile<T, C> rows = Tile<T, C>{row_memory}.rows_from(warp * 16);
    const Tile<T, WIDTH> own_keys = Tile<T, WIDTH>{key_memory}.rows_from(warp * 16);
    const Tile<T, WIDTH> own_values = Tile<T, WIDTH>{value_memory}.rows_from(warp * 16);
    const Tile<T, WIDTH> keys = Tile<T, WIDTH>{key_memory}.rows_from(slot * each * 16);  // of the position
    const Tile<T, WIDTH> values = Tile<T, WIDTH>{value_memory}.rows_from(slot * each * 16);
    const auto outer_of = [&](int index) { return Tile<T, WIDTH>{key_memory + index * Layout::OUTER}; };
    const auto z_of = [&](int index) { return vectors + index * (2 * WIDTH); };

    const auto load_normed = [&](int first) {
        load_classes(rows, a, Position<T>(a, number), first, lane);
        __syncwarp();
        normalise_rows(rows, a.norm1_weight, a.norm1_bias, lane);
        __syncwarp();
    };

    // A head's guidance of two channels of a key, `part` 0 of queries and 1 of keys.
    const auto guidance = [&](const Position<T> &position, int key, int part, int channel) -> Pair<float> {
        if (key >= classes.keys()) return {};
        const Pair<T> pair = load<T, 2>(position.terms + int64_t(key) * (2 * C) + part * C + channel);
        return {{to_float(pair.value[0]), to_float(pair.value[1])}};
    };

    const auto stage_keys = [&](int head, int first) {
        const float share = classes.share();
        const Factors<T, C> normed(rows, lane);
        D d[WIDTH / 8];
        project(d, normed, Tile<T, C>{stages.next()}, lane);
        const Position<T> position(a, number);
        each_pair(d, lane, [&](int row, int column, float one, float other) {
            const Pair<float> term = guidance(position, first + row, 1, head * WIDTH + column);
            const float times = share * classes.times(first + row);
            const bool there = first + row < classes.keys();  // 0 times NaN would be NaN
            store<T, 2>(own_keys.at(row, column),
                        rounded_pair<T>(there ? feature(one + term.value[0]) * times : 0.0f,
                                        there ? feature(other + term.value[1]) * times : 0.0f));
        });
        project(d, normed, Tile<T, C>{stages.next()}, lane);
        each_pair(d, lane, [&](int row, int column, float one, float other) {
            const Pair<T> bias = load<T, 2>(a.v_bias + head * WIDTH + column);
            const bool there = first + row < classes.keys();
            store<T, 2>(own_values.at(row, column), rounded_pair<T>(there ? one + to_float(bias.value[0]) : 0.0f,
                                                                    there ? other + to_float(bias.value[1]) : 0.0f));
        });
        __syncthreads();
    };

    Waiting<T> attended[HEADS][WIDTH / 8][2];  // m and what is attended to, in the lanes as in D
    const auto clear = [&] {  // or the compiler would keep them from one turn to the next
#pragma unroll
        for (int h = 0; h < HEADS; ++h) {
#pragma unroll
            for (int n = 0; n < WIDTH / 8; ++n) attended[h][n][0] = attended[h][n][1] = {};
        }
    };
    const auto attend = [&](int head, int index, int first) {
        D q[WIDTH / 8], d[WIDTH / 8] = {};
        {
            const Factors<T, C> normed(rows, lane);
            project(q, normed, Tile<T, C>{stages.next()}, lane);
        }
        const Position<T> position(a, number);
        const float *const z = z_of(index), *const m = z + WIDTH;
        const float eps = NORMALISER_EPS * classes.share();
        float normaliser[2] = {};
#pragma unroll
        for (int n = 0; n < WIDTH / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; i += 2) {
                const int column = 8 * n + d_column(lane, 0);
                const Pair<float> term = guidance(position, first + d_row(lane, i), 0, head * WIDTH + column);
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    // Rounded before anything is taken of it, so that what should cancel does.
                    float &value = q[n].value[i + j];
                    value = to_float(rounded<T>(feature(value + term.value[j])));
                    normaliser[i / 2] += value * z[column + j];
                }
            }
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) normaliser[i] = 1.0f / (sum_over_lanes<4>(normaliser[i]) + eps);
#pragma unroll
        for (int k = 0; k < WIDTH / K<T>; ++k) {
            const A factor = chained<T>(q, k);
#pragma unroll
            for (int n = 0; n < WIDTH / 16; ++n) {
                B b[2];
                load_b_by_rows(b, outer_of(index), k, n, lane);
                mma<T>(d[2 * n], factor, b[0]);
                mma<T>(d[2 * n + 1], factor, b[1]);
            }
        }
        // The heads move up, so that no register is indexed by a number known at run time only.
#pragma unroll
        for (int n = 0; n < WIDTH / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
#pragma unroll
                for (int h = 0; h + 1 < HEADS; ++h) attended[h][n][i] = attended[h + 1][n][i];
                const Pair<float> mean = load<float, 2>(m + 8 * n + d_column(lane, 0));
                attended[HEADS - 1][n][i] = Waiting<T>::of(
                    mean.value[0] + (d[n].value[2 * i] - eps * mean.value[0]) * normaliser[i],
                    mean.value[1] + (d[n].value[2 * i + 1] - eps * mean.value[1]) * normaliser[i]);
            }
        }
    };

    // From what is attended to until the result, for the warp's classes from `first` on.
    const auto finish = [&](int first) {
        lane = recomputed(lane);
        load_classes(rows, a, Position<T>(a, number), first, lane);
        __syncwarp();
#pragma unroll
        for (int h = 0; h < HEADS; ++h) {
#pragma unroll
            for (int n = 0; n < WIDTH / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    T *const place = rows.at(d_row(lane, 2 * i), h * WIDTH + 8 * n + d_column(lane, 0));
                    const Pair<T> y = load<T, 2>(place), more = attended[h][n][i].pair();
                    store<T, 2>(place, rounded_pair<T>(to_float(y.value[0]) + to_float(more.value[0]),
                                                       to_float(y.value[1]) + to_float(more.value[1])));
                }
            }
        }
        __syncwarp();
        const auto row_of = [&](T *results, const Position<T> &position, int row) {
            const int key = first + row;
            return key < classes.count ? results + position.result + key * a.result_map : nullptr;
        };
        if (a.middle) {
            const Position<T> position(a, number);
            store_rows(rows, lane, [&](int row) { return row_of(a.middle, position, row); });
        }
        residual_mlp<Relu>(rows, a.norm2_weight, a.norm2_bias, a.fc1_bias, a.fc2_bias, a.hidden, stages, lane);
        const Position<T> position(a, number);
        if (a.pooling == 1) {
            constexpr int EACH = 16 / int(sizeof(T)), LANES = C / EACH, AT_ONCE = 32 / LANES;
#pragma unroll 1
            for (int i = 0; i < 16; i += AT_ONCE) {
                const int row = i + lane / LANES, column = lane % LANES * EACH, key = first + row;
                if (key >= classes.count) continue;
                Piece<T> sum = load<T, EACH>(rows.at(row, column));
                const Piece<T> x = load<T, EACH>(position.x + key * a.map + column);
#pragma unroll
                for (int j = 0; j < EACH; ++j) {
                    sum.value[j] = rounded<T>(to_float(sum.value[j]) + to_float(x.value[j]));
                }
                store<T, EACH>(row_of(a.out, position, row) + column, sum);
            }
        } else {
            store_rows(rows, lane, [&](int row) { return row_of(a.out, position, row); });
        }
    };

    if constexpr (!LONG) {
        load_normed(own * 16);
#pragma unroll 1
        for (int head = 0; head < HEADS; ++head) {
            lane = recomputed(lane);
            stage_keys(head, own * 16);
            // S takes the place of keys and values once all have been read; a warp may hold all four quarters.
            Waiting<T> held[QUARTERS][4] = {};
#pragma unroll 1
            for (int i = 0; i < QUARTERS; ++i) {
#pragma unroll
                for (int j = 0; j < 4; ++j) {
#pragma unroll
                    for (int k = 0; k + 1 < QUARTERS; ++k) held[k][j] = held[k + 1][j];
                }
                const int which = own + i * each;
                if (which >= QUARTERS) continue;
                Quarter quarter{};
                quarter.add(keys, values, which, 0, each * 16, classes, lane);
                quarter.store_vectors(z_of(slot), false, which, lane);
#pragma unroll
                for (int j = 0; j < 4; ++j) held[QUARTERS - 1][j] = quarter.pair<T>(j);
            }
            __syncthreads();
#pragma unroll
            for (int i = 0; i < QUARTERS; ++i) {
                if (own + i * each < QUARTERS) store_quarter(outer_of(slot), held[i], own + i * each, lane);
            }
            attend(head, slot, own * 16);
        }
        finish(own * 16);
    } else {
        float outers[HEADS][8] = {};  // the warp's quarter of each head's S, of the head that is next first
#pragma unroll 1
        for (int turn = 0; turn < turns; ++turn) {
            load_normed((turn * WARPS<T> + warp) * 16);
#pragma unroll 1
            for (int head = 0; head < HEADS; ++head) {
                lane = recomputed(lane);
                stage_keys(head, (turn * WARPS<T> + warp) * 16);
                Quarter quarter;
#pragma unroll
                for (int i = 0; i < 8; ++i) quarter.outer[i] = outers[0][i];
                if (warp < QUARTERS) {
                    quarter.add(keys, values, warp, turn * WARPS<T> * 16, WARPS<T> * 16, classes, lane);
                    quarter.store_vectors(z_of(head), turn > 0, warp, lane);
                }
#pragma unroll
                for (int i = 0; i < 8; ++i) {
#pragma unroll
                    for (int h = 0; h + 1 < HEADS; ++h) outers[h][i] = outers[h + 1][i];
                    outers[HEADS - 1][i] = quarter.outer[i];
                }
            }
        }
        __syncthreads();
        if (warp < QUARTERS) {
#pragma unroll
            for (int head = 0; head < HEADS; ++head) {
                Quarter quarter;
#pragma unroll
                for (int i = 0; i < 8; ++i) quarter.outer[i] = outers[head][i];
                quarter.load_vectors(z_of(head), warp, lane);
                Waiting<T> pairs[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) pairs[i] = quarter.pair<T>(i);
                store_quarter(outer_of(head), pairs, warp, lane);
            }
        }
#pragma unroll 1
        for (int first = warp * 16; first < a.together * WARPS<T> * 16; first += WARPS<T> * 16) {
            load_normed(first);
            clear();
#pragma unroll 1
            for (int head = 0; head < HEADS; ++head) {
                lane = recomputed(lane);
                attend(head, head, first);
            }
            finish(first);
        }
    }
}

}  // namespace
}  // namespace ovseg

int ovseg_class_aggregation_fwd(const void *x, const void *terms, const void *norm1_weight, const void *norm1_bias,
                                const void *qkv_weight, const void *v_bias, const void *padding_token,
                                const void *norm2_weight, const void *norm2_bias, const void *fc1_weight,
                                const void *fc1_bias, const void *fc2_weight, const void *fc2_bias, void *out,
                                void *middle, int64_t batch, int64_t classes, int64_t height, int64_t width,
                                int64_t channels, int64_t hidden, int64_t heads, int64_t pooling, int64_t pads,
                                int64_t images_of_terms, int dtype, int device, void *stream) {
    using namespace ovseg;
    if (!takes_classes(classes, height, width, channels, heads, pooling, pads) || hidden < STAGE_ROWS ||
        hidden % STAGE_ROWS || hidden > INT32_MAX / C) {
        return OVSEG_UNSUPPORTED_SIZE;
    }
    if (!aligned(x, terms, norm1_weight, norm1_bias, qkv_weight, v_bias, padding_token, norm2_weight, norm2_bias,
                 fc1_weight, fc1_bias, fc2_weight, fc2_bias, out, middle)) {
        return OVSEG_MISALIGNED;
    }
    return by_dtype(dtype, [&](auto number) {
        using T = decltype(number);
        const auto in = [](const void *pointer) { return static_cast<const T *>(pointer); };
        const Classes list{int(classes), int(pads)};
        const int64_t positions = batch * (height / pooling) * (width / pooling);
        if (positions > INT32_MAX - WARPS<T>) return int(OVSEG_TOO_LARGE);
        const bool fits = list.tiles() <= WARPS<T>;
        const int processors = multiprocessors(device);  // a block takes several positions once each of these has one
        const int64_t spread = (positions + processors - 1) / processors;
        const int64_t together = fits ? std::max<int64_t>(std::min<int64_t>(WARPS<T> / list.tiles(), spread), 1)
                                      : (list.tiles() + WARPS<T> - 1) / WARPS<T>;
        const Arguments<T> a{in(x),          in(terms),      in(norm1_weight),  in(norm1_bias),   in(qkv_weight),
                             in(v_bias),     in(padding_token), in(norm2_weight), in(norm2_bias), in(fc1_weight),
                             in(fc1_bias),   in(fc2_weight), in(fc2_bias),      static_cast<T *>(out),
                             static_cast<T *>(middle), list, height * width * C,
                             (height / pooling) * (width / pooling) * C,
                             images_of_terms > 1 ? list.keys() * int64_t(2 * C) : 0, int(positions), int(height),
                             int(width),     int(pooling),   int(hidden),       int(together)};
        return launch(fits ? class_aggregation<T, false> : class_aggregation<T, true>,
                      fits ? (positions + together - 1) / together : positions, THREADS<T>, Shared<T>::TOTAL, device,
                      stream, a);
    });
}
