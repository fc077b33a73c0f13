// Class aggregation: at every position, a transformer layer with linear attention over all classes.
//
//     y = average-pool(x);   n = LN1(y)
//     q_t = φ(Wq n_t + q_term_t),   k_t = φ(Wk n_t + k_term_t),   v_t = Wv n_t + bv,   φ = elu + 1
//     y_t ← y_t + (q_t · Σ k ⊗ v) / (q_t · Σ k + 1e-6),        within each head
//     out = y + W2 ReLU(W1 LN2(y) + b1) + b2,   and + x where nothing is pooled
//
// The sums run over the classes of the position; a padding class, the same everywhere, enters them `pads` times.
//
// A task is a few neighbouring positions of one image, as many as make up a good number of rows: one for each class
// of each position. A longer list of classes is worked through in parts, and twice: for the sums, then for the queries.

#include "operators.h"
#include "transformer.h"

namespace {

constexpr int64_t MOST_ROWS = 192;  // that are worked through at once
constexpr int64_t AHEAD = 8;        // classes whose rows are fetched before they are needed
constexpr float NORMALISER_EPS = 1e-6f;

// elu(x) + 1
INLINE Floats feature(Floats x) {
    return select(x > Floats{}, x + broadcast(1.0f), exponential_of_negative<float>(at_most(x, Floats{})));
}

template <typename T> struct Layer {
    typedef typename Operand<T>::Type P;

    const ovseg_class_aggregation_params &params;
    const T *x, *terms;
    T *out, *middle;
    int64_t channels, width, keys_width, head_width, classes, columns, positions, terms_stride;
    int64_t together, groups, part;  // positions of a task, tasks of an image, classes worked through at once
    const float *norm1_weight, *norm1_bias, *v_bias;
    const float *pad_keys;   // what the padding class adds to Σ k: (channels)
    const float *pad_outer;  // and to Σ k ⊗ v, as a position's `outer`
    const P *queries, *keys;
    PackedMlp<P> mlp_weights;

    explicit Layer(const ovseg_class_aggregation_params &params)
        : params(params), x(static_cast<const T *>(params.x)), terms(static_cast<const T *>(params.terms)),
          out(static_cast<T *>(params.out)), middle(static_cast<T *>(params.middle)), channels(params.channels),
          width(round_up(params.channels, WEIGHT_PANEL)), keys_width(round_up(2 * params.channels, WEIGHT_PANEL)),
          head_width(params.channels / params.heads), classes(params.classes), columns(params.width / params.pooling),
          positions(params.height / params.pooling * columns),
          terms_stride((params.classes + (params.pads > 0)) * 2 * params.channels) {
        const int64_t parts = (classes + MOST_ROWS - 1) / MOST_ROWS;
        part = (classes + parts - 1) / parts;
        together = MOST_ROWS / part < positions ? MOST_ROWS / part : positions;
        if (parts > 1) together = 1;
        groups = (positions + together - 1) / together;
    }

    // Vectors of a head's panel of Σ k ⊗ v.
    int vectors() const { return head_width % (2 * LANES) ? 1 : 2; }

    // Vectors as float32, packed weights and the padding class's share of the sums, in `arena`.
    void prepare(Arena &arena) {
        const T *qkv = static_cast<const T *>(params.qkv_weight);
        norm1_weight = take_vector<T>(params.norm1_weight, channels, arena);
        norm1_bias = take_vector<T>(params.norm1_bias, channels, arena);
        v_bias = take_vector<T>(params.v_bias, channels, arena);
        queries = take_weight<T, P>(qkv, channels, channels, channels, arena);
        keys = take_weight<T, P>(qkv + channels * channels, channels, 2 * channels, channels, arena);
        mlp_weights = take_mlp<T, P>(params.norm2_weight, params.norm2_bias, params.fc1_weight, params.fc1_bias,
                                     params.fc2_weight, params.fc2_bias, channels, params.hidden, arena);
        float *pad_sums = arena.take<float>(channels), *pad_products = arena.take<float>(channels * head_width);
        float *token = arena.take<float>(channels), *key = arena.take<float>(keys_width);
        P *normed = arena.take<P>(channels);
        pad_keys = pad_sums;
        pad_outer = pad_products;
        if (!arena.memory) return;
        memset(pad_sums, 0, channels * sizeof *pad_sums);
        memset(pad_products, 0, channels * head_width * sizeof *pad_products);
        if (!params.pads) return;
        copy_to_floats(static_cast<const T *>(params.padding_token), channels, token);
        layer_norm(token, channels, 1, norm1_weight, norm1_bias, channels, normed);
        multiply<WEIGHT_VECTORS>(Matrix<P>{normed, channels, 1}, 1, keys, keys_width / WEIGHT_PANEL, channels, key,
                                 keys_width, false);
        const T *term = terms + classes * 2 * channels + channels;  // the same in all images
        for (int64_t c = 0; c < channels; c += LANES) {
            store(pad_sums + c, broadcast(float(params.pads)) * feature(load(key + c) + load(term + c)));
            store(key + channels + c, load(key + channels + c) + load(v_bias + c));
        }
        const int64_t panel = vectors() * LANES;
        for (int64_t c = 0; c < channels; ++c) {  // a panel of values at a time, as outer_products
            const int64_t head = c / head_width * head_width;
            for (int64_t value = 0; value < head_width; ++value) {
                pad_products[head * head_width + value / panel * panel * head_width + (c - head) * panel +
                             value % panel] = pad_sums[c] * key[channels + head + value];
            }
        }
    }

    struct Scratch {
        float *y;         // (rows, channels)
        float *keys;      // (rows, keys_width): keys and values
        float *values;    // a panel of each position's values after the other
        float *queries;   // (rows, width)
        float *sums;      // Σ k of each position
        float *outer;     // Σ k ⊗ v of each position, head and panel of values: (head_width, panel)
        float *attended;  // (rows, channels), in the memory of keys
        MlpScratch<P> mlp;

        void take(const Layer &layer, Arena &arena) {
            const int64_t rows = layer.together * layer.part, channels = layer.channels;
            const int64_t wide = channels > HIDDEN_CHUNK ? channels : HIDDEN_CHUNK;
            y = arena.take<float>(rows * channels);
            keys = arena.take<float>(rows * (layer.keys_width > wide ? layer.keys_width : wide));
            values = arena.take<float>(rows * wide);
            queries = arena.take<float>(rows * layer.width);
            sums = arena.take<float>(layer.together * channels);
            outer = arena.take<float>(layer.together * channels * layer.head_width);
            attended = keys;
            // The MLP works where keys, values and queries are no longer needed.
            mlp = {arena.take<P>(rows * channels), reinterpret_cast<P *>(values), keys, queries};
        }
    };

    // Some classes of neighbouring positions, whose rows are those of the first position, then those of the next.
    struct Rows {
        int64_t image, position, count, first, classes;
        int64_t total() const { return count * classes; }
    };

    // Where a pooled position begins in a class's map.
    int64_t place(int64_t position) const {
        return position / columns * params.pooling * params.width + position % columns * params.pooling;
    }

    // Fetches what gather reads for a row of a later class: it is far away, and no pattern foretells it.
    void fetch(const T *token) const {
        const int64_t bytes = params.pooling * channels * int64_t(sizeof *token);
        for (int64_t line = 0; line < params.pooling; ++line) {
            const char *from = reinterpret_cast<const char *>(token + line * params.width * channels);
            for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(from + byte);
        }
    }

    // y and n.
    void gather(const Rows &rows, const Scratch &s) const {
        const float share = 1.0f / float(params.pooling * params.pooling);
        const int64_t map = params.height * params.width;
        for (int64_t t = 0; t < rows.classes; ++t) {
            const T *from = x + (rows.image * classes + rows.first + t) * map * channels;
            for (int64_t i = 0; i < rows.count; ++i) {
                const int64_t row = i * rows.classes + t;
                const T *token = from + place(rows.position + i) * channels;
                if (t + AHEAD < rows.classes) fetch(token + AHEAD * map * channels);
                float *y = s.y + row * channels;
                if (params.pooling == 1) {
                    copy_to_floats(token, channels, y);
                } else {
                    for (int64_t c = 0; c < channels; c += LANES) {
                        Floats total{};
                        for (int64_t line = 0; line < params.pooling; ++line) {
                            const T *left = token + line * params.width * channels + c;
                            for (int64_t column = 0; column < params.pooling; ++column) {
                                total += load(left + column * channels);
                            }
                        }
                        store(y + c, total * broadcast(share));
                    }
                }
            }
        }
        layer_norm(s.y, channels, rows.total(), norm1_weight, norm1_bias, channels, s.mlp.normed);
    }

    const T *terms_of(const Rows &rows) const {
        return terms + (params.images_of_terms == 1 ? 0 : rows.image) * terms_stride + rows.first * 2 * channels;
    }

    // Adds the rows' keys and values to the sums.
    template <int VECTORS> void add_keys(const Rows &rows, const Scratch &s) const {
        multiply<WEIGHT_VECTORS>(Matrix<P>{s.mlp.normed, channels, 1}, rows.total(), keys, keys_width / WEIGHT_PANEL,
                                 channels, s.keys, keys_width, false);
        constexpr int64_t PANEL = VECTORS * LANES;
        const int64_t depth = rows.classes;
        for (int64_t i = 0; i < rows.count; ++i) {
            float *sums = s.sums + i * channels, *outer = s.outer + i * channels * head_width;
            float *own_keys = s.keys + i * depth * keys_width, *values = s.values + i * depth * channels;
            for (int64_t t = 0; t < depth; ++t) {
                float *row = own_keys + t * keys_width;
                const T *term = terms_of(rows) + t * 2 * channels + channels;
                for (int64_t c = 0; c < channels; c += LANES) {
                    const Floats key = feature(load(row + c) + load(term + c));
                    store(row + c, key);
                    store(sums + c, load(sums + c) + key);
                }
                for (int64_t c = 0; c < channels; c += PANEL) {
                    for (int64_t lane = 0; lane < PANEL; lane += LANES) {
                        store(values + c * depth + t * PANEL + lane,
                              load(row + channels + c + lane) + load(v_bias + c + lane));
                    }
                }
            }
            for (int64_t c = 0; c < channels; c += PANEL) {
                const int64_t head = c / head_width * head_width;
                multiply<VECTORS>(Matrix<float>{own_keys + head, 1, keys_width}, head_width, values + c * depth, 1,
                                  depth, outer + c * head_width, PANEL, true);
            }
        }
    }

    // Adds to y what the rows' queries find in the sums.
    template <int VECTORS> void attend(const Rows &rows, const Scratch &s) const {
        multiply<WEIGHT_VECTORS>(Matrix<P>{s.mlp.normed, channels, 1}, rows.total(), queries, width / WEIGHT_PANEL,
                                 channels, s.queries, width, false);
        for (int64_t i = 0; i < rows.count; ++i) {
            const float *sums = s.sums + i * channels, *outer = s.outer + i * channels * head_width;
            float *own = s.queries + i * rows.classes * width, *attended = s.attended + i * rows.classes * channels;
            for (int64_t t = 0; t < rows.classes; ++t) {
                const T *term = terms_of(rows) + t * 2 * channels;
                for (int64_t c = 0; c < channels; c += LANES) {
                    store(own + t * width + c, feature(load(own + t * width + c) + load(term + c)));
                }
            }
            for (int64_t head = 0; head < channels; head += head_width) {
                multiply<VECTORS>(Matrix<float>{own + head, width, 1}, rows.classes, outer + head * head_width,
                                  head_width / (VECTORS * LANES), head_width, attended + head, channels, false);
            }
            for (int64_t t = 0; t < rows.classes; ++t) {
                float *y = s.y + (i * rows.classes + t) * channels;
                for (int64_t head = 0; head < channels; head += head_width) {
                    Floats weight{};
                    for (int64_t c = head; c < head + head_width; c += LANES) {
                        weight += load(own + t * width + c) * load(sums + c);
                    }
                    const Floats share = broadcast(1.0f / (sum(weight) + NORMALISER_EPS));
                    for (int64_t c = head; c < head + head_width; c += LANES) {
                        store(y + c, load(y + c) + load(attended + t * channels + c) * share);
                    }
                }
            }
        }
    }

    void finish(const Rows &rows, const Scratch &s) const {
        mlp<false>(mlp_weights, s.y, channels, rows.total(), s.mlp);
        for (int64_t t = 0; t < rows.classes; ++t) {
            for (int64_t i = 0; i < rows.count; ++i) {
                const int64_t row = i * rows.classes + t;
                const int64_t at = ((rows.image * classes + rows.first + t) * positions + rows.position + i) * channels;
                for (int64_t c = 0; c < channels; c += LANES) {
                    const Floats y = load(s.y + row * channels + c);
                    Floats result = y + load(s.mlp.result + row * width + c) + load(mlp_weights.fc2_bias + c);
                    if (params.pooling == 1) result += load(x + at + c);
                    store(out + at + c, result);
                    if (middle) store(middle + at + c, y);
                }
            }
        }
    }

    template <int VECTORS> void run(int64_t image, int64_t group, const Scratch &s) const {
        Rows rows{image, group * together, together, 0, part};
        if (rows.position + rows.count > positions) rows.count = positions - rows.position;
        for (int64_t i = 0; i < rows.count; ++i) {
            memcpy(s.sums + i * channels, pad_keys, channels * sizeof *pad_keys);
            memcpy(s.outer + i * channels * head_width, pad_outer, channels * head_width * sizeof *pad_outer);
        }
        for (; rows.first < classes; rows.first += part) {
            if (rows.first + part > classes) rows.classes = classes - rows.first;
            gather(rows, s);
            add_keys<VECTORS>(rows, s);
        }
        for (rows.first = 0, rows.classes = part; rows.first < classes; rows.first += part) {
            if (rows.first + part > classes) rows.classes = classes - rows.first;
            if (part < classes) gather(rows, s);
            attend<VECTORS>(rows, s);
            finish(rows, s);
        }
    }

    static bool task(void *context, int64_t index) {
        const Layer &layer = *static_cast<const Layer *>(context);
        Scratch scratch;
        Arena sizes(nullptr);
        scratch.take(layer, sizes);
        Arena arena(ovseg_scratch(sizes.bytes));
        if (!arena.memory) return false;
        scratch.take(layer, arena);
        const int64_t image = index / layer.groups, group = index % layer.groups;
        layer.vectors() == 1 ? layer.template run<1>(image, group, scratch)
                             : layer.template run<2>(image, group, scratch);
        return true;
    }
};

template <typename T> int run(const ovseg_class_aggregation_params &params, int threads) {
    Layer<T> layer(params);
    ovseg_expect_writes(params.out,
                        size_t(params.batch * params.classes * layer.positions * params.channels) * sizeof(T));
    return prepare_and_run(layer, threads, params.batch * layer.groups);
}

}  // namespace

namespace OVSEG_ISA {

int class_aggregation(const ovseg_class_aggregation_params *params, int dtype, int threads, void *) {
    const int64_t channels = params->channels, heads = params->heads;
    if (heads < 1 || channels % 16 || channels % heads || channels / heads % 16 || params->hidden % 16 ||
        params->pooling < 1 || params->pooling > params->height || params->pooling > params->width ||
        params->classes < 1 || params->pads < 0) {
        return OVSEG_UNSUPPORTED_SIZE;
    }
    return dtype == OVSEG_FLOAT32 ? run<float>(*params, threads) : run<Bf16>(*params, threads);
}

}  // namespace OVSEG_ISA
