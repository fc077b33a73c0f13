// Layer gather: the patch tokens of several encoder blocks, brought into the image-text embedding space.
//
//     f_l = unit( LN_l( LN_shared( h_l[patches] ) ) · P_l )           and, with weights, Σ_l w_l · f_l alone
//
// A task is a tile of patches through all layers, or through one layer if each is wanted by itself.

#include "cosines.h"
#include "operators.h"

namespace {

constexpr int64_t ROWS = 16 * tile_rows<WEIGHT_VECTORS>();  // patches of a task, at most

// Arguments of ovseg_layer_gather_fwd.
struct Arguments {
    const void *const *hidden;
    const void *shared_weight, *shared_bias, *norm_weight, *norm_bias, *projection, *weights;
    void *out;
    int64_t layers, batch, tokens, patches, channels, width, batch_stride, token_stride;
    float shared_eps, norm_eps;
};

// LN(x) of a row in its place, of any number of channels.
INLINE void normalise(float *x, const float *weight, const float *bias, int64_t channels, float eps) {
    const int64_t whole = channels / LANES * LANES;
    Floats totals{};
    for (int64_t c = 0; c < whole; c += LANES) totals += load(x + c);
    float total = sum(totals);
    for (int64_t c = whole; c < channels; ++c) total += x[c];
    const float mean = total / float(channels);
    Floats squares{};
    for (int64_t c = 0; c < whole; c += LANES) {
        const Floats centred = load(x + c) - broadcast(mean);
        squares += centred * centred;
    }
    total = sum(squares);
    for (int64_t c = whole; c < channels; ++c) total += (x[c] - mean) * (x[c] - mean);
    const float scale = 1.0f / __builtin_sqrtf(total / float(channels) + eps);
    for (int64_t c = 0; c < whole; c += LANES) {
        store(x + c, (load(x + c) - broadcast(mean)) * broadcast(scale) * load(weight + c) + load(bias + c));
    }
    for (int64_t c = whole; c < channels; ++c) x[c] = (x[c] - mean) * scale * weight[c] + bias[c];
}

// A vector of columns of B, of one depth or a pair.
template <typename T> INLINE void pack_lanes(const T *row, const T *, float *to) { store(to, load(row)); }
#if OVSEG_BF16_PRODUCTS
INLINE void pack_lanes(const Bf16 *row, const Bf16 *next, Bf16 *to) {
    Halves low, high;
    memcpy(&low, row, sizeof low);
    memcpy(&high, next, sizeof high);
    const Words pairs = widen(low) | widen(high) << 16;
    memcpy(to, &pairs, sizeof pairs);
}
#endif

template <typename T> struct Gather {
    typedef typename Operand<T>::Type P;
    static constexpr int PAIR = Operand<T>::PAIR;

    const Arguments &a;
    int64_t depth, stride, columns;  // of the product: channels in whole pairs and whole vectors, width in whole panels
    int64_t tiles, rows;             // of an image, and patches of each
    const float *shared_weight, *shared_bias, *norm_weight, *norm_bias, *weights;
    P *projection;

    explicit Gather(const Arguments &a)
        : a(a), depth(round_up(a.channels, PAIR)), stride(round_up(a.channels, LANES)),
          columns(round_up(a.width, WEIGHT_PANEL)), tiles((a.patches + ROWS - 1) / ROWS),
          rows(round_up((a.patches + tiles - 1) / tiles, tile_rows<WEIGHT_VECTORS>())) {}

    int64_t panels() const { return columns / WEIGHT_PANEL; }

    void prepare(Arena &arena) {
        shared_weight = take_vector<T>(a.shared_weight, a.channels, arena);
        shared_bias = take_vector<T>(a.shared_bias, a.channels, arena);
        norm_weight = take_vector<T>(a.norm_weight, a.layers * a.channels, arena);
        norm_bias = take_vector<T>(a.norm_bias, a.layers * a.channels, arena);
        weights = a.weights ? take_vector<T>(a.weights, a.layers, arena) : nullptr;
        projection = arena.take<P>(a.layers * columns * depth);
    }

    // Packs one panel of a layer's projection.
    static bool pack(void *context, int64_t index) {
        const Gather &g = *static_cast<const Gather *>(context);
        const int64_t channels = g.a.channels, width = g.a.width, first = index % g.panels() * WEIGHT_PANEL;
        const T *from = static_cast<const T *>(g.a.projection) + index / g.panels() * channels * width;
        P *to = g.projection + index * g.depth * WEIGHT_PANEL;
        for (int64_t k = 0; k < g.depth; k += PAIR) {
            for (int64_t c = first; c < first + WEIGHT_PANEL; c += LANES, to += PAIR * LANES) {
                const T *row = from + k * width + c;
                if (c + LANES <= width && k + PAIR <= channels) {
                    pack_lanes(row, row + width, to);
                    continue;
                }
                memset(to, 0, PAIR * LANES * sizeof *to);
                for (int64_t i = 0; i < LANES && c + i < width; ++i) {
                    for (int64_t part = 0; part < PAIR && k + part < channels; ++part) {
                        pack_number(to + PAIR * i + part, row[part * width + i]);
                    }
                }
            }
        }
        return true;
    }

    struct Scratch {
        float *row, *projected, *total;
        P *normed;

        void take(const Gather &g, Arena &arena) {
            row = arena.take<float>(g.stride);
            normed = arena.take<P>(g.rows * g.stride);
            projected = arena.take<float>(g.rows * g.columns);
            total = g.weights ? arena.take<float>(g.rows * g.columns) : nullptr;
        }
    };

    // Projected patches first..first+count−1 of an image, in one layer, into s.projected; what scales each to length 1
    // is left to the caller.
    void project(int64_t layer, int64_t image, int64_t first, int64_t count, const Scratch &s) const {
        const T *from = static_cast<const T *>(a.hidden[layer]) + image * a.batch_stride +
                        (a.tokens - a.patches + first) * a.token_stride;
        for (int64_t c = a.channels; c < stride; ++c) s.row[c] = 0.0f;
        for (int64_t row = 0; row < count; ++row) {
            copy_to_floats(from + row * a.token_stride, a.channels, s.row);
            normalise(s.row, shared_weight, shared_bias, a.channels, a.shared_eps);
            normalise(s.row, norm_weight + layer * a.channels, norm_bias + layer * a.channels, a.channels, a.norm_eps);
            for (int64_t c = 0; c < stride; c += LANES) store(s.normed + row * stride + c, load(s.row + c));
        }
        multiply<WEIGHT_VECTORS>(Matrix<P>{s.normed, stride, 1}, count, projection + layer * columns * depth, panels(),
                                 depth, s.projected, columns, false);
    }

    // A row times `factor` as an output.
    void write(const float *row, float factor, T *to) const {
        int64_t c = 0;
        for (; c + LANES <= a.width; c += LANES) store(to + c, load(row + c) * broadcast(factor));
        for (; c < a.width; ++c) from_float(to + c, row[c] * factor);
    }

    void run(int64_t layer, int64_t image, int64_t tile, const Scratch &s) const {
        const int64_t first = tile * rows, count = a.patches - first < rows ? a.patches - first : rows;
        if (count <= 0) return;
        T *out = static_cast<T *>(a.out) + ((layer * a.batch + image) * a.patches + first) * a.width;
        if (!weights) {
            project(layer, image, first, count, s);
            for (int64_t row = 0; row < count; ++row) {
                const float *projected = s.projected + row * columns;
                write(projected, inverse_length(projected, a.width), out + row * a.width);
            }
            return;
        }
        memset(s.total, 0, count * columns * sizeof *s.total);
        for (layer = 0; layer < a.layers; ++layer) {
            project(layer, image, first, count, s);
            for (int64_t row = 0; row < count; ++row) {
                const float *projected = s.projected + row * columns;
                const Floats factor = broadcast(weights[layer] * inverse_length(projected, a.width));
                float *total = s.total + row * columns;
                for (int64_t c = 0; c < columns; c += LANES) {
                    store(total + c, load(total + c) + load(projected + c) * factor);
                }
            }
        }
        for (int64_t row = 0; row < count; ++row) write(s.total + row * columns, 1.0f, out + row * a.width);
    }

    static bool task(void *context, int64_t index) {
        const Gather &g = *static_cast<const Gather *>(context);
        Scratch scratch;
        Arena sizes(nullptr);
        scratch.take(g, sizes);
        Arena arena(ovseg_scratch(sizes.bytes));
        if (!arena.memory) return false;
        scratch.take(g, arena);
        g.run(index / (g.a.batch * g.tiles), index / g.tiles % g.a.batch, index % g.tiles, scratch);
        return true;
    }
};

template <typename T> int run(const Arguments &a, int threads) {
    Gather<T> gather(a);
    const int64_t maps = (a.weights ? 1 : a.layers) * a.batch;
    ovseg_expect_writes(a.out, size_t(maps * a.patches * a.width) * sizeof(T));
    return prepare_and_run(gather, threads, maps * gather.tiles, gather.pack, maps ? a.layers * gather.panels() : 0);
}

}  // namespace

namespace OVSEG_ISA {

int layer_gather(const void *const *hidden, const void *shared_weight, const void *shared_bias, const void *norm_weight,
                 const void *norm_bias, const void *projection, const void *weights, void *out, int64_t layers,
                 int64_t batch, int64_t tokens, int64_t patches, int64_t channels, int64_t width, int64_t batch_stride,
                 int64_t token_stride, float shared_eps, float norm_eps, int dtype, int threads, void *) {
    const Arguments arguments{hidden,   shared_weight, shared_bias,  norm_weight,  norm_bias,  projection,
                              weights,  out,           layers,       batch,        tokens,     patches,
                              channels, width,         batch_stride, token_stride, shared_eps, norm_eps};
    return dtype == OVSEG_FLOAT32 ? run<float>(arguments, threads) : run<Bf16>(arguments, threads);
}

}  // namespace OVSEG_ISA
