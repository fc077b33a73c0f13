// Cost embedding: a convolution over every class's cost map.
//
//     out[b, t, y, x, c] = bias[c] + Σ_pij weight[c, p, i, j] · cost[b, t, p, y + i − r, x + j − r],    r = K // 2
//
// with the cosines of image and text embeddings as cost, and 0 outside the map.
//
// A task is a few classes of one image: one product gives their maps, which get a border of zeros and are then read
// through a table of the window's offsets as the first operand of a product with the weights. Everything is float32
// until out is written: the cosines cost little next to the convolution, whose operand would have to be made of pairs.
//
// The border never meets an infinite or NaN weight, as 0 · ∞ would spread it: the product takes the finite part of the
// weights, `add_rest` the rest.

#include "cosines.h"
#include "operators.h"

namespace {

constexpr int64_t ROWS = tile_rows<WEIGHT_VECTORS>();  // of a product's tile: so many texts use it well
constexpr int64_t PIXELS = 8 * ROWS;                   // of a row of the map, whose outputs are scratch at a time

// Arguments of ovseg_cost_embedding_fwd.
struct Arguments {
    const void *image, *text, *weight, *bias;
    void *out;
    int64_t batch, height, width, channels, classes, prompts, outputs, size;
};

template <typename T> struct Embedding {
    const T *text, *weight, *given_bias;
    T *out;
    int64_t height, width, channels, classes, prompts, outputs, size;
    int64_t depth, columns;       // of the convolution's product
    int64_t map_width, map_size;  // of a map with its border
    int64_t groups, grouped;      // tasks of an image, classes of a task
    Images<T> images;
    float *finite, *packed, *bias;
    int32_t *taps;
    bool all_finite = true;

    explicit Embedding(const Arguments &a)
        : text(static_cast<const T *>(a.text)), weight(static_cast<const T *>(a.weight)),
          given_bias(static_cast<const T *>(a.bias)), out(static_cast<T *>(a.out)), height(a.height), width(a.width),
          channels(a.channels), classes(a.classes), prompts(a.prompts), outputs(a.outputs), size(a.size),
          depth(a.prompts * a.size * a.size), columns(round_up(a.outputs, WEIGHT_PANEL)),
          map_width(a.width + a.size - 1), map_size((a.height + a.size - 1) * map_width),
          images(a.image, a.batch, a.height * a.width, a.channels) {
        const int64_t most = prompts < ROWS ? ROWS / prompts : 1;
        groups = (classes + most - 1) / most;
        grouped = (classes + groups - 1) / groups;
    }

    void prepare(Arena &arena) {
        images.take(arena);
        finite = arena.take<float>(outputs * depth);
        packed = arena.take<float>(packed_size<float>(outputs, depth, WEIGHT_VECTORS));
        bias = arena.take<float>(columns);
        taps = arena.take<int32_t>(depth);
        if (!packed) return;
        for (int64_t i = 0; i < outputs * depth; ++i) {
            const float number = to_float(weight[i]);
            const bool is_finite = number - number == 0.0f;
            finite[i] = is_finite ? number : 0.0f;
            all_finite &= is_finite;
        }
        pack_transposed<WEIGHT_VECTORS>(finite, depth, outputs, depth, packed);
        copy_to_floats(static_cast<const T *>(given_bias), outputs, bias);
        for (int64_t k = 0; k < depth; ++k) {
            taps[k] = int32_t(k / (size * size) * map_size + k / size % size * map_width + k % size);
        }
    }

    static bool pack(void *context, int64_t index) {
        return static_cast<const Embedding *>(context)->images.pack(index);
    }

    struct Scratch {
        float *units, *costs, *maps, *result;

        void take(const Embedding &e, Arena &arena) {
            const int64_t texts = e.grouped * e.prompts;
            units = arena.take<float>(texts * e.channels);
            costs = arena.take<float>(texts * e.images.panels * WEIGHT_PANEL);
            maps = arena.take<float>(texts * e.map_size);
            result = arena.take<float>(PIXELS * e.columns);
        }
    };

    // The maps of `count` texts, with their borders.
    void cost_maps(int64_t image, int64_t first, int64_t count, const Scratch &s) const {
        for (int64_t row = 0; row < count; ++row) {
            unit_length(text + (first + row) * channels, channels, s.units + row * channels);
        }
        const int64_t stride = images.panels * WEIGHT_PANEL;
        multiply<WEIGHT_VECTORS>(Matrix<float>{s.units, channels, 1}, count, images.of(image), images.panels, channels,
                                 s.costs, stride, false);
        memset(s.maps, 0, count * map_size * sizeof(float));
        for (int64_t row = 0; row < count; ++row) {
            float *inner = s.maps + row * map_size + size / 2 * (map_width + 1);
            for (int64_t y = 0; y < height; ++y) {
                memcpy(inner + y * map_width, s.costs + row * stride + y * width, width * sizeof(float));
            }
        }
    }

    // Adds the share of infinite and NaN weights to the outputs of pixels (y, first..first+count−1).
    void add_rest(const float *maps, int64_t y, int64_t first, int64_t count, float *result) const {
        for (int64_t i = 0; i < outputs * depth; ++i) {
            const float number = to_float(weight[i]);
            if (number - number == 0.0f) continue;
            const int64_t k = i % depth, row = y + k / size % size - size / 2;
            for (int64_t x = first; x < first + count && row >= 0 && row < height; ++x) {
                const int64_t column = x + k % size - size / 2;
                if (column < 0 || column >= width) continue;
                result[(x - first) * columns + i / depth] += number * maps[y * map_width + x + taps[k]];
            }
        }
    }

    void convolve(const float *maps, T *to, float *result) const {
        for (int64_t y = 0; y < height; ++y) {
            for (int64_t first = 0; first < width; first += PIXELS) {
                const int64_t count = width - first < PIXELS ? width - first : PIXELS;
                multiply<WEIGHT_VECTORS>(Taps{maps + y * map_width + first, taps}, count, packed,
                                         columns / WEIGHT_PANEL, depth, result, columns, false);
                if (!all_finite) add_rest(maps, y, first, count, result);
                for (int64_t row = 0; row < count; ++row, to += outputs) {
                    const float *from = result + row * columns;
                    int64_t c = 0;
                    for (; c + LANES <= outputs; c += LANES) store(to + c, load(from + c) + load(bias + c));
                    for (; c < outputs; ++c) from_float(to + c, from[c] + bias[c]);
                }
            }
        }
    }

    static bool task(void *context, int64_t index) {
        const Embedding &e = *static_cast<const Embedding *>(context);
        Scratch scratch;
        Arena sizes(nullptr);
        scratch.take(e, sizes);
        Arena arena(ovseg_scratch(sizes.bytes));
        if (!arena.memory) return false;
        scratch.take(e, arena);
        const int64_t image = index / e.groups, first = index % e.groups * e.grouped,
                      count = e.classes - first < e.grouped ? e.classes - first : e.grouped;
        if (count <= 0) return true;
        e.cost_maps(image, first * e.prompts, count * e.prompts, scratch);
        for (int64_t i = 0; i < count; ++i) {
            e.convolve(scratch.maps + i * e.prompts * e.map_size,
                       e.out + (image * e.classes + first + i) * e.height * e.width * e.outputs, scratch.result);
        }
        return true;
    }
};

template <typename T> int run(const Arguments &arguments, int threads) {
    Embedding<T> e(arguments);
    ovseg_expect_writes(e.out, size_t(arguments.batch * e.classes * e.height * e.width * e.outputs) * sizeof(T));
    return prepare_and_run(e, threads, arguments.batch * e.groups, e.pack, arguments.batch * e.images.panels);
}

}  // namespace

namespace OVSEG_ISA {

int cost_embedding(const void *image, const void *text, const void *weight, const void *bias, void *out, int64_t batch,
                   int64_t height, int64_t width, int64_t channels, int64_t classes, int64_t prompts, int64_t outputs,
                   int64_t size, int dtype, int threads, void *) {
    const Arguments arguments{image, text,     weight,  bias,    out,     batch, height,
                              width, channels, classes, prompts, outputs, size};
    if (size < 1 || size % 2 == 0 || prompts * (height + size) * (width + size) > INT32_MAX) {
        return OVSEG_UNSUPPORTED_SIZE;
    }
    return dtype == OVSEG_FLOAT32 ? run<float>(arguments, threads) : run<Bf16>(arguments, threads);
}

}  // namespace OVSEG_ISA
