// Guided group normalisation of the upsampling decoder.
//
//     out = ReLU(GN(y + term))
//
// A task is the map of one class: its moments, then its numbers, while it lies in the second-level cache.

#include "group_norm.h"
#include "operators.h"
#include "transformer.h"

namespace {

template <typename T> struct GuidedNorm {
    const T *y, *term;
    const void *given_weight, *given_bias;
    T *out;
    float *statistics;
    int64_t classes, positions, channels, groups;
    float eps;
    int64_t width;  // channels, filled up to whole vectors
    const float *weight, *bias;

    void prepare(Arena &arena) {
        weight = take_vector<T>(given_weight, channels, arena);
        bias = take_vector<T>(given_bias, channels, arena);
    }

    // Rows of y + term, with zeros behind their channels.
    void sum(const T *rows, const T *terms, int64_t count, float *to) const {
        const int64_t whole = channels / LANES * LANES;
        for (int64_t row = 0; row < count; ++row, rows += channels, to += width) {
            int64_t c = 0;
            for (; c < whole; c += LANES) {
                store(to + c, terms ? load(rows + c) + load(terms + c) : load(rows + c));
            }
            for (; c < channels; ++c) to[c] = to_float(rows[c]) + (terms ? to_float(terms[c]) : 0.0f);
            for (; c < width; ++c) to[c] = 0.0f;
            if (terms) terms += channels;
        }
    }

    static bool task(void *context, int64_t index) {
        const GuidedNorm &norm = *static_cast<const GuidedNorm *>(context);
        const int64_t positions = norm.positions, channels = norm.channels, width = norm.width,
                      offset = index * positions * channels;
        float *chunk = static_cast<float *>(ovseg_scratch(size_t((CHUNK_ROWS + 2) * width) * sizeof(float)));
        if (!chunk) return false;
        Moments moments{chunk + CHUNK_ROWS * width, chunk + (CHUNK_ROWS + 1) * width};
        const T *y = norm.y + offset, *term = norm.term;
        if (term) term += index / norm.classes * positions * channels;
        for (int64_t first = 0; first < positions; first += CHUNK_ROWS) {
            const int64_t count = positions - first < CHUNK_ROWS ? positions - first : CHUNK_ROWS;
            norm.sum(y + first * channels, term ? term + first * channels : nullptr, count, chunk);
            add_rows(chunk, count, width, moments);
        }
        finish(moments, norm.weight, norm.bias, channels, norm.groups, norm.eps,
               norm.statistics + index * norm.groups * 2);
        for (int64_t first = 0; first < positions; first += CHUNK_ROWS) {
            const int64_t count = positions - first < CHUNK_ROWS ? positions - first : CHUNK_ROWS;
            norm.sum(y + first * channels, term ? term + first * channels : nullptr, count, chunk);
            T *to = norm.out + offset + first * channels;
            for (int64_t row = 0; row < count; ++row, to += channels) {
                for (int64_t c = 0; c < width; c += LANES) {
                    const Floats x = normalised(load(chunk + row * width + c), moments, c);
                    if (c + LANES <= channels) {
                        store(to + c, x);
                    } else {
                        for (int64_t i = c; i < channels; ++i) from_float(to + i, x[i - c]);
                    }
                }
            }
        }
        return true;
    }
};

template <typename T>
int run(const void *y, const void *term, const void *weight, const void *bias, void *out, float *statistics,
        int64_t batch, int64_t classes, int64_t positions, int64_t channels, int64_t groups, float eps, int threads) {
    GuidedNorm<T> norm{static_cast<const T *>(y),
                       static_cast<const T *>(term),
                       weight,
                       bias,
                       static_cast<T *>(out),
                       statistics,
                       classes,
                       positions,
                       channels,
                       groups,
                       eps,
                       round_up(channels, LANES),
                       nullptr,
                       nullptr};
    ovseg_expect_writes(out, size_t(batch * classes * positions * channels) * sizeof(T));
    return prepare_and_run(norm, threads, batch * classes);
}

}  // namespace

namespace OVSEG_ISA {

int upsampling_decoder_norm(const void *y, const void *term, const void *weight, const void *bias, void *out,
                            float *statistics, float *, int64_t batch, int64_t classes, int64_t positions,
                            int64_t channels, int64_t groups, int64_t, float eps, int dtype, int threads, void *) {
    return dtype == OVSEG_FLOAT32 ? run<float>(y, term, weight, bias, out, statistics, batch, classes, positions,
                                               channels, groups, eps, threads)
                                  : run<Bf16>(y, term, weight, bias, out, statistics, batch, classes, positions,
                                              channels, groups, eps, threads);
}

}  // namespace OVSEG_ISA
