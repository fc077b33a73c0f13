// One stage of the upsampling decoder.
//
//     y = ReLU(GN(up(x) + term)),   out = ReLU(GN(W ∗ y))        up: transposed convolution 4 × 4, stride 2, padding 1
//                                                                W: 3 × 3, padding 1
//
// A task is the map of one class, from x to out. Each quarter of up's outputs, those of one parity of row and column,
// is a convolution 2 × 2 of x. Convolutions read maps with a border of zeros: a row of a window, which is some
// neighbouring pixels with their channels, is one run of numbers, so that a product takes the pixels of a row of the
// map as its rows and reads them where they lie.

#include "group_norm.h"
#include "operators.h"
#include "transformer.h"

namespace {

// Arguments of ovseg_upsampling_decoder_stage_fwd.
struct Arguments {
    const void *x, *term, *up, *norm1_weight, *norm1_bias, *conv, *norm2_weight, *norm2_bias;
    void *out;
    int64_t batch, classes, height, width, channels, outputs, groups;
    float eps;
};

// VECTORS: of a panel of the outputs, all of which fill whole panels.
template <typename T, int VECTORS> struct Stage {
    typedef typename Operand<T>::Type P;
    static constexpr bool SAME = sizeof(T) == sizeof(float);  // whether results, operands and outputs are of one type

    const Arguments &a;
    int64_t panels;
    int64_t wide, high;             // x with its border
    int64_t out_width, out_height;  // without border
    const float *norm1_weight, *norm1_bias, *norm2_weight, *norm2_bias;
    P *up, *conv;

    explicit Stage(const Arguments &a)
        : a(a), panels(a.outputs / (VECTORS * LANES)), wide(a.width + 2), high(a.height + 2), out_width(2 * a.width),
          out_height(2 * a.height) {}

    void prepare(Arena &arena) {
        norm1_weight = take_vector<T>(a.norm1_weight, a.outputs, arena);
        norm1_bias = take_vector<T>(a.norm1_bias, a.outputs, arena);
        norm2_weight = take_vector<T>(a.norm2_weight, a.outputs, arena);
        norm2_bias = take_vector<T>(a.norm2_bias, a.outputs, arena);
        up = arena.take<P>(16 * a.channels * a.outputs);
        conv = arena.take<P>(9 * a.outputs * a.outputs);
    }

    // Packs the weights of one row of a window, `count` neighbours: output d and channel c of neighbour n at
    // from[d · outer + c · inner + n · next].
    bool pack_row(const T *from, int64_t outer, int64_t inner, int64_t next, int64_t count, int64_t channels,
                  P *to) const {
        const int64_t depth = count * channels;
        T *rows = static_cast<T *>(ovseg_scratch(size_t(a.outputs * depth) * sizeof(T)));
        if (!rows) return false;
        for (int64_t d = 0; d < a.outputs; ++d) {
            for (int64_t n = 0; n < count; ++n) {
                T *row = rows + d * depth + n * channels;
                for (int64_t c = 0; c < channels; ++c) row[c] = from[d * outer + c * inner + n * next];
            }
        }
        pack_transposed<VECTORS>(rows, depth, a.outputs, depth, to);
        return true;
    }

    // The eight rows of up's windows, two for each parity, and the three of the convolution's.
    static constexpr int64_t PACKS = 11;
    static bool pack(void *context, int64_t index) {
        const Stage &s = *static_cast<const Stage *>(context);
        const int64_t channels = s.a.channels, outputs = s.a.outputs;
        if (index >= 8) {
            const int64_t row = index - 8;
            return s.pack_row(static_cast<const T *>(s.a.conv) + 3 * row, 9 * outputs, 9, 1, 3, outputs,
                              s.conv + 3 * row * outputs * outputs);
        }
        // An even output meets the pixel before its own with tap 3 and its own with tap 1; an odd one its own with tap
        // 2 and the next with tap 0.
        const int64_t row_parity = index / 4, column_parity = index / 2 % 2, row = index % 2;
        const T *from =
            static_cast<const T *>(s.a.up) + (row_parity ? 2 - 2 * row : 3 - 2 * row) * 4 + (column_parity ? 2 : 3);
        return s.pack_row(from, 16, 16 * outputs, -2, 2, channels, s.up + 2 * index * channels * outputs);
    }

    struct Scratch {
        P *x, *operand;     // with borders
        float *y, *result;  // y with a border
        float *moments;

        void take(const Stage &s, Arena &arena) {
            const int64_t pixels = (s.out_width + 2) * (s.out_height + 2);
            x = arena.take<P>(s.wide * s.high * s.a.channels);
            y = arena.take<float>(pixels * s.a.outputs);
            operand = SAME ? reinterpret_cast<P *>(y) : arena.take<P>(pixels * s.a.outputs);
            moments = arena.take<float>(2 * s.a.outputs);
        }
    };

    void copy_with_border(const T *from, P *to) const {
        const int64_t row = a.width * a.channels;
        memset(to, 0, wide * high * a.channels * sizeof *to);
        for (int64_t y = 0; y < a.height; ++y) {
            P *inner = to + ((y + 1) * wide + 1) * a.channels;
            for (int64_t i = 0; i < row; i += LANES) store(inner + i, load(from + y * row + i));
        }
    }

    // up(x), into the inner part of `y`.
    void transposed_convolution(const P *x, float *y) const {
        const int64_t depth = 2 * a.channels, stride = (out_width + 2) * a.outputs;
        for (int64_t phase = 0; phase < 4; ++phase) {
            const int64_t row_parity = phase / 2, column_parity = phase % 2;
            float *inner = y + (1 + row_parity) * stride + (1 + column_parity) * a.outputs;
            const P *weights = up + phase * 2 * depth * a.outputs;
            for (int64_t i = 0; i < a.height; ++i) {
                for (int64_t row = 0; row < 2; ++row) {
                    const P *from = x + ((i + row_parity + row) * wide + column_parity) * a.channels;
                    multiply<VECTORS>(Matrix<P>{from, a.channels, 1}, a.width, weights + row * depth * a.outputs,
                                      panels, depth, inner + 2 * i * stride, 2 * a.outputs, row > 0);
                }
            }
        }
    }

    // W ∗ y of a row of the map.
    void convolution(const P *y, int64_t i, float *to) const {
        const int64_t depth = 3 * a.outputs;
        for (int64_t row = 0; row < 3; ++row) {
            multiply<VECTORS>(Matrix<P>{y + (i + row) * (out_width + 2) * a.outputs, a.outputs, 1}, out_width,
                              conv + row * depth * a.outputs, panels, depth, to, a.outputs, row > 0);
        }
    }

    void run(int64_t map, Scratch &s) const {
        const int64_t numbers = out_width * a.outputs, stride = (out_width + 2) * a.outputs;
        copy_with_border(static_cast<const T *>(a.x) + map * a.height * a.width * a.channels, s.x);
        memset(s.operand, 0, (out_height + 2) * stride * sizeof *s.operand);
        transposed_convolution(s.x, s.y);

        const T *term = static_cast<const T *>(a.term) + map / a.classes * out_height * numbers;
        Moments moments{s.moments, s.moments + a.outputs};
        for (int64_t i = 0; i < out_height; ++i) {
            float *row = s.y + (i + 1) * stride + a.outputs;
            for (int64_t n = 0; n < numbers; n += LANES) store(row + n, load(row + n) + load(term + i * numbers + n));
            add_rows(row, out_width, a.outputs, moments);
        }
        finish(moments, norm1_weight, norm1_bias, a.outputs, a.groups, a.eps, nullptr);
        for (int64_t i = 0; i < out_height; ++i) {
            const int64_t at = (i + 1) * stride + a.outputs;
            normalise(s.y + at, moments, s.operand + at);
        }

        T *out = static_cast<T *>(a.out) + map * out_height * numbers;
        float *result = SAME ? reinterpret_cast<float *>(out) : s.y;
        moments.rows = 0;
        for (int64_t i = 0; i < out_height; ++i) {
            convolution(s.operand, i, result + i * numbers);
            add_rows(result + i * numbers, out_width, a.outputs, moments);
        }
        finish(moments, norm2_weight, norm2_bias, a.outputs, a.groups, a.eps, nullptr);
        for (int64_t i = 0; i < out_height; ++i) normalise(result + i * numbers, moments, out + i * numbers);
    }

    // ReLU(GN(x)) of a row of the map.
    template <typename Q> void normalise(const float *x, const Moments &moments, Q *to) const {
        for (int64_t c = 0; c < a.outputs; c += LANES) {
            for (int64_t n = c; n < out_width * a.outputs; n += a.outputs) {
                store(to + n, normalised(load(x + n), moments, c));
            }
        }
    }

    static bool task(void *context, int64_t index) {
        const Stage &stage = *static_cast<const Stage *>(context);
        Scratch scratch;
        Arena sizes(nullptr);
        scratch.take(stage, sizes);
        Arena arena(ovseg_scratch(sizes.bytes));
        if (!arena.memory) return false;
        scratch.take(stage, arena);
        stage.run(index, scratch);
        return true;
    }
};

template <typename T, int VECTORS> int run(const Arguments &a, int threads) {
    Stage<T, VECTORS> stage(a);
    const int64_t maps = a.batch * a.classes;
    ovseg_expect_writes(a.out, size_t(maps * 4 * a.height * a.width * a.outputs) * sizeof(T));
    return prepare_and_run(stage, threads, maps, stage.pack, maps ? stage.PACKS : 0);
}

template <typename T> int run(const Arguments &a, int threads) {
    if (a.outputs % WEIGHT_PANEL == 0) return run<T, WEIGHT_VECTORS>(a, threads);
    return a.outputs % (2 * LANES) ? run<T, 1>(a, threads) : run<T, 2>(a, threads);
}

}  // namespace

namespace OVSEG_ISA {

int upsampling_decoder_stage(const void *x, const void *term, const void *up, const void *norm1_weight,
                             const void *norm1_bias, const void *conv, const void *norm2_weight, const void *norm2_bias,
                             void *out, int64_t batch, int64_t classes, int64_t height, int64_t width, int64_t channels,
                             int64_t outputs, int64_t groups, float eps, int dtype, int threads, void *) {
    const Arguments arguments{x,     term,    up,     norm1_weight, norm1_bias, conv,    norm2_weight, norm2_bias, out,
                              batch, classes, height, width,        channels,   outputs, groups,       eps};
    if (channels % 16 || outputs % 16 || groups < 1 || outputs % groups) return OVSEG_UNSUPPORTED_SIZE;
    return dtype == OVSEG_FLOAT32 ? run<float>(arguments, threads) : run<Bf16>(arguments, threads);
}

}  // namespace OVSEG_ISA
