// Class aggregation: at every position, a transformer layer with linear attention over all classes, in one kernel.
//
//     n = LN1(average-pool(x));   q_t = φ(Wq n_t + g_t),   k_t = φ(Wk n_t + h_t),   v_t = Wv n_t + b,   φ = elu + 1
//     S = Σ w_t k_t ⊗ (v_t − m),   z = Σ w_t k_t,   m ≈ Σ w_t v_t,   w_t = 1 / N,   ε = 1e-6 / N
//     y_t = average-pool(x)_t + m + (q_t · S − ε m) / (q_t · z + ε)
//     out = y + W2 ReLU(W1 LN2(y) + b1) + b2,   and + x where nothing is pooled
//
// N counts the classes and what pads their list; the padding class is one more key, with w = pads / N.
//
// A warp owns 16 classes of a position, from x to out. A list that fits the block is processed head by head,
// and short lists of several positions share a block; a longer list is read twice, for the sums and for the queries.
// Keys and values lie in shared memory, where each sum over classes is one warp's, in the order of the classes; the
// others compute their queries meanwhile. Weights stream through a ring of stages.

#include <algorithm>

#include "device/class_sums.cuh"
#include "device/class_tokens.cuh"
#include "device/transformer.cuh"

namespace ovseg {
namespace {

constexpr int RING = 3;

template <typename T> constexpr int WARPS = sizeof(T) == 2 ? 12 : 4;

template <typename T> constexpr int THREADS = WARPS<T> * 32;

template <typename T> struct Arguments {
    ClassMaps<T> maps;
    const T *terms, *norm1_weight, *norm1_bias, *qkv_weight, *v_bias;
    const T *norm2_weight, *norm2_bias, *fc1_weight, *fc1_bias, *fc2_weight, *fc2_bias;
    T *out, *middle;
    int64_t terms_stride;  // numbers of terms from one image to the next
    int positions;         // of all images
    int hidden;
    int together;  // positions of a block; for a long list: turns that the block takes for one
};

template <typename T> struct Shared {
    static constexpr int ROWS = WARPS<T> * 16 * C * int(sizeof(T));
    static constexpr int KEYS = WARPS<T> * 16 * WIDTH * int(sizeof(T));
    static constexpr int STAGE = STAGE_ROWS * C * int(sizeof(T));
    static constexpr int OUTER = WIDTH * WIDTH * int(sizeof(T));
    static constexpr int VECTORS = WARPS<T> * 2 * WIDTH * int(sizeof(float));
    static constexpr int TOTAL = ROWS + 2 * KEYS + RING * STAGE + VECTORS;
    static_assert(2 * KEYS >= WARPS<T> * OUTER && WARPS<T> >= HEADS, "S reuses the memory of keys and values");
    static_assert(TOTAL <= SHARED_EVERYWHERE, "see platform.cuh");
};

// The weights in the order in which a block multiplies by them: k, v, q of a head, then of the next, then those of the
// MLP. For a long list k and v of each head in each of `turns`, then in each turn q of each head and those of the MLP.
template <typename T, bool LONG> struct Weights {
    const T *qkv, *fc1, *fc2;
    int hidden, turns;

    DEVICE int of_mlp() const { return 2 * (hidden / STAGE_ROWS); }
    DEVICE int stages() const { return LONG ? turns * (3 * HEADS + of_mlp()) : 3 * HEADS + of_mlp(); }

    DEVICE void operator()(int stage, unsigned char *buffer) const {
        int head = recomputed(stage) / 3, part = stage - 3 * head, mlp = stage - 3 * HEADS;  // parts: k, v, q
        if constexpr (LONG) {
            const int second = stage - turns * 2 * HEADS, step = second % recomputed(HEADS + of_mlp());
            part = second < 0 ? stage % 2 : 2;
            head = second < 0 ? stage / 2 % HEADS : step;
            mlp = second < 0 ? -1 : step - HEADS;
        }
        if (mlp >= 0 && mlp % 2) {
            copy_weights<C, THREADS<T>>(Tile<T, STAGE_ROWS>{buffer}, fc2 + mlp / 2 * STAGE_ROWS, hidden);
            return;
        }
        const T *const source =
            mlp < 0 ? qkv + ((part == 2 ? 0 : part + 1) * C + head * WIDTH) * C : fc1 + mlp / 2 * (STAGE_ROWS * C);
        copy_weights<STAGE_ROWS, THREADS<T>>(Tile<T, C>{buffer}, source, C);
    }
};

template <typename T, bool LONG>
__global__ void __launch_bounds__(THREADS<T>, 1) class_aggregation(const Arguments<T> a) {
    using Layout = Shared<T>;
    unsigned char *const token_memory = shared_memory();
    unsigned char *const key_memory = token_memory + Layout::ROWS;
    unsigned char *const value_memory = key_memory + Layout::KEYS;
    unsigned char *const stage_memory = value_memory + Layout::KEYS;
    float *const vectors = reinterpret_cast<float *>(stage_memory + RING * Layout::STAGE);

    const Classes &classes = a.maps.classes;
    const int warp = int(threadIdx.x) / 32, each = LONG ? WARPS<T> : classes.tiles();  // warps of a position
    const int slot = warp / each, tile = warp % each, turns = LONG ? a.together : 1;
    const int number = LONG ? int(blockIdx.x) : int(blockIdx.x) * a.together + slot;
    int lane = int(threadIdx.x) % 32;

    using Fetch = Weights<T, LONG>;
    Stages<RING, Layout::STAGE, Fetch> stages(stage_memory,
                                              Fetch{a.qkv_weight, a.fc1_weight, a.fc2_weight, a.hidden, turns});
    if (!LONG && (slot >= a.together || number >= a.positions)) {  // a warp without a position copies weights only
#pragma unroll 1
        for (int stage = 0; stage < stages.stages; ++stage) {
            stages.next();
            if (stage >= 3 * HEADS || stage % 3 != 2) continue;
            __syncthreads();
            __syncthreads();
        }
        return;
    }

    const Tile<T, C> smem_tokens = Tile<T, C>{token_memory}.rows_from(warp * 16);
    const Tile<T, WIDTH> warp_keys = Tile<T, WIDTH>{key_memory}.rows_from(warp * 16);
    const Tile<T, WIDTH> warp_values = Tile<T, WIDTH>{value_memory}.rows_from(warp * 16);
    const Tile<T, WIDTH> keys = Tile<T, WIDTH>{key_memory}.rows_from(slot * each * 16);  // of the position
    const Tile<T, WIDTH> values = Tile<T, WIDTH>{value_memory}.rows_from(slot * each * 16);
    const auto outer_of = [&](int index) { return Tile<T, WIDTH>{key_memory + index * Layout::OUTER}; };
    const auto z_of = [&](int index) { return vectors + index * (2 * WIDTH); };

    const T *guidance = nullptr;  // of the position's image
    const auto load_normed = [&](int first) {
        load_classes(smem_tokens, a.maps, number, first, lane);
        __syncwarp();
        normalise_rows(smem_tokens, a.norm1_weight, a.norm1_bias, lane);
        __syncwarp();
        guidance = a.terms + Position<T>(a.maps, number).image * a.terms_stride;
    };

    // acc = φ(acc + guidance) for 16 classes from `first` on, the last key again beyond the list; terms: class 0's.
    const auto guide = [&](Acc(&acc)[WIDTH / 8], const T *terms, int first) {
        unrolled<2>([&](int i) {
            const int key = min(first + acc_row(lane, 2 * i), classes.keys() - 1);
            const T *const row = terms + int64_t(key) * (2 * C) + acc_col(lane, 0);
            unrolled<WIDTH / 8>([&](int n) {
                const Pair<T> term = load<T, 2>(row + 8 * n);
                unrolled<2>([&](int j) {
                    float &value = acc[n].value[2 * i + j];
                    value = feature(value + to_float(term.value[j]));
                });
            });
        });
    };

    // The warp's rows of keys and values; a barrier has to follow.
    const auto stage_keys = [&](const RowFrags<T, C> &normed, int head, int first) {
        Acc acc[WIDTH / 8];
        project(acc, normed, Tile<T, C>{stages.next()}, lane);
        guide(acc, guidance + C + head * WIDTH, first);
        unrolled<2>([&](int i) {
            const float times = classes.share * classes.times(first + acc_row(lane, 2 * i));  // 0 beyond the list
            unrolled<WIDTH / 8>([&](int n) {
                store_pair(acc_address(warp_keys, n, lane) + i * (8 * WIDTH), acc[n].value[2 * i] * times,
                           acc[n].value[2 * i + 1] * times);
            });
        });
        project(acc, normed, Tile<T, C>{stages.next()}, lane);
        unrolled<WIDTH / 8>([&](int n) {
            const Pair<T> bias = load<T, 2>(a.v_bias + head * WIDTH + 8 * n + acc_col(lane, 0));
            unrolled<2>([&](int i) {
                const bool present = first + acc_row(lane, 2 * i) < classes.keys();
                const Kept<T> pair = Kept<T>::of(acc[n].value[2 * i] + to_float(bias.value[0]),
                                                 acc[n].value[2 * i + 1] + to_float(bias.value[1]));
                store(acc_address(warp_values, n, lane) + i * (8 * WIDTH), (present ? pair : Kept<T>{}).pair());
            });
        });
    };

    struct Query {  // rounded before its products, so that what should cancel does
        FragA frag_a[WIDTH / K<T>];
    };
    const auto query_of = [&](const RowFrags<T, C> &normed, unsigned char *weight, int head, int first) {
        Acc acc[WIDTH / 8];
        project(acc, normed, Tile<T, C>{weight}, lane);
        guide(acc, guidance + head * WIDTH, first);
        Query query;
        unrolled<WIDTH / K<T>>([&](int k) { query.frag_a[k] = chained<T>(acc, k); });
        return query;
    };

    Kept<T> attended[HEADS][WIDTH / 8][2];  // m and what is attended to, in the lanes as in acc
    // Else the compiler would keep them from one turn to the next.
    const auto clear = [&] {
        unrolled<HEADS, WIDTH / 8>([&](int h, int n) { attended[h][n][0] = attended[h][n][1] = {}; });
    };
    const auto attend = [&](const Query &query, int index) {
        const float *const z = z_of(index), *const m = z + WIDTH;
        const float eps = NORMALISER_EPS * classes.share;
        const auto frag_a = [&](int k) { return query.frag_a[k]; };
        Acc acc[WIDTH / 8] = {}, total = {};
        multiply<T, WIDTH / K<T>>(acc, outer_of(index), lane, frag_a);
        unrolled<WIDTH / K<T>>([&](int k) { mma<T>(total, query.frag_a[k], repeated_column<T>(z, k, lane)); });
        float normaliser[2];
        unrolled<2>([&](int i) { normaliser[i] = fast_reciprocal(total.value[2 * i] + eps); });
        // The heads move up, so that no register is indexed by a number known at run time only.
#pragma unroll
        for (int n = 0; n < WIDTH / 8; ++n) {
            const Pair<float> mean = load<float, 2>(m + 8 * n + acc_col(lane, 0));
#pragma unroll
            for (int i = 0; i < 2; ++i) {
#pragma unroll
                for (int h = 0; h + 1 < HEADS; ++h) attended[h][n][i] = attended[h + 1][n][i];
                attended[HEADS - 1][n][i] =
                    Kept<T>::of(mean.value[0] + (acc[n].value[2 * i] - eps * mean.value[0]) * normaliser[i],
                                mean.value[1] + (acc[n].value[2 * i + 1] - eps * mean.value[1]) * normaliser[i]);
            }
        }
    };

    // From what is attended to until the result, for the warp's classes from `first` on.
    const auto finish = [&](int first) {
        lane = recomputed_lane(lane);
        load_classes(smem_tokens, a.maps, number, first, lane);
        __syncwarp();
        unrolled<HEADS * WIDTH / 8, 2>([&](int n, int i) {
            T *const address = acc_address(smem_tokens, n, lane) + i * (8 * C);
            const Pair<T> y = load<T, 2>(address), added = attended[n / (WIDTH / 8)][n % (WIDTH / 8)][i].pair();
            store(address, rounded_pair<T>(to_float(y.value[0]) + to_float(added.value[0]),
                                           to_float(y.value[1]) + to_float(added.value[1])));
        });
        __syncwarp();
        const int count = classes.count - first;
        if (a.middle) copy_out(smem_tokens, a.maps.result(a.middle, number, first), a.maps.pooled_map(), count, lane);
        residual_mlp<Relu>(smem_tokens, a.norm2_weight, a.norm2_bias, a.fc1_bias, a.fc2_bias, a.hidden, stages, lane);
        lane = recomputed_lane(lane);  // else the compiler would keep addresses from before the MLP
        first = recomputed(first);
        T *const result = a.maps.result(a.out, number, first);
        if (a.maps.pooling == 1) {
            store_added(smem_tokens, a.maps, number, result, first, lane);
        } else {
            copy_out(smem_tokens, result, a.maps.pooled_map(), count, lane);
        }
    };

    if constexpr (!LONG) {
        load_normed(tile * 16);
        const RowFrags<T, C> normed(smem_tokens, lane);
#pragma unroll 1
        for (int head = 0; head < HEADS; ++head) {
            lane = recomputed_lane(lane);
            stage_keys(normed, head, tile * 16);
            // All keys and values are present once the queries' weights are. S reuses their memory when all have been
            // read; until then a warp may hold all four quarters.
            unsigned char *const query_weight = stages.next();
            Kept<T> held[QUARTERS][4] = {};
            int which = tile;
#pragma unroll 1
            for (; which < QUARTERS; which += each) {
                Quarter quarter{};
                quarter.add(keys, values, which, 0, each * 16, classes, lane);
                quarter.store_vectors(z_of(slot), false, which, lane);
#pragma unroll
                for (int j = 0; j < 4; ++j) {
#pragma unroll
                    for (int k = 0; k + 1 < QUARTERS; ++k) held[k][j] = held[k + 1][j];
                    held[QUARTERS - 1][j] = quarter.pair<T>(j);
                }
            }
            const Query query = query_of(normed, query_weight, head, tile * 16);
            __syncthreads();
#pragma unroll
            for (int i = QUARTERS - 1; i >= 0; --i) {
                which -= each;
                if (which >= 0) store_quarter(outer_of(slot), held[i], which, lane);
            }
            __syncthreads();
            attend(query, slot);
        }
        finish(tile * 16);
    } else {
        float outers[HEADS][8] = {};  // the warp's quarter of each head's S, of the head that is next first
#pragma unroll 1
        for (int turn = 0; turn < turns; ++turn) {
            load_normed((turn * WARPS<T> + warp) * 16);
            const RowFrags<T, C> normed(smem_tokens, lane);
#pragma unroll 1
            for (int head = 0; head < HEADS; ++head) {
                lane = recomputed_lane(lane);
                stage_keys(normed, head, (turn * WARPS<T> + warp) * 16);
                __syncthreads();
                Quarter quarter;
                unrolled<8>([&](int i) { quarter.outer[i] = outers[0][i]; });
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
            unrolled<HEADS>([&](int head) {
                Quarter quarter;
                unrolled<8>([&](int i) { quarter.outer[i] = outers[head][i]; });
                quarter.load_vectors(z_of(head), warp, lane);
                Kept<T> pairs[4];
                unrolled<4>([&](int i) { pairs[i] = quarter.pair<T>(i); });
                store_quarter(outer_of(head), pairs, warp, lane);
            });
        }
#pragma unroll 1
        for (int first = warp * 16; first < a.together * WARPS<T> * 16; first += WARPS<T> * 16) {
            load_normed(first);
            const RowFrags<T, C> normed(smem_tokens, lane);
            clear();
#pragma unroll 1
            for (int head = 0; head < HEADS; ++head) {
                lane = recomputed_lane(lane);
                attend(query_of(normed, stages.next(), head, first), head);
            }
            finish(first);
        }
    }
}

}  // namespace
}  // namespace ovseg

int ovseg_class_aggregation_fwd(const ovseg_class_aggregation_params *params, int dtype, int device, void *stream) {
    using namespace ovseg;
    const auto &p = *params;
    if (!takes_classes(p.classes, p.height, p.width, p.channels, p.heads, p.pooling, p.pads) ||
        !takes_hidden(p.hidden, STAGE_ROWS)) {
        return OVSEG_UNSUPPORTED_SIZE;
    }
    if (!aligned_params(p, p.batch)) return OVSEG_MISALIGNED;
    return by_dtype(dtype, [&](auto number) {
        using T = decltype(number);
        const Classes list(p.classes, p.pads);
        const ClassMaps<T> maps(p.x, p.padding_token, list, p.height, p.width, p.pooling);
        const int64_t positions = p.batch * maps.positions;
        if (positions > INT32_MAX - WARPS<T>) return int(OVSEG_TOO_LARGE);
        const bool fits = list.tiles() <= WARPS<T>;
        const int processors = multiprocessors(device);  // a block takes several positions once each of these has one
        const int64_t spread = (positions + processors - 1) / processors;
        const int64_t together = fits ? std::max<int64_t>(std::min<int64_t>(WARPS<T> / list.tiles(), spread), 1)
                                      : (list.tiles() + WARPS<T> - 1) / WARPS<T>;
        const int64_t terms_stride = p.images_of_terms > 1 ? list.keys() * int64_t(2 * C) : 0;
        const auto a = filled<Arguments<T>>(maps, p.terms, p.norm1_weight, p.norm1_bias, p.qkv_weight, p.v_bias,
                                            p.norm2_weight, p.norm2_bias, p.fc1_weight, p.fc1_bias, p.fc2_weight,
                                            p.fc2_bias, p.out, p.middle, terms_stride, positions, p.hidden, together);
        return launch(fits ? class_aggregation<T, false> : class_aggregation<T, true>,
                      fits ? (positions + together - 1) / together : positions, THREADS<T>, Shared<T>::TOTAL, device,
                      stream, a);
    });
}
