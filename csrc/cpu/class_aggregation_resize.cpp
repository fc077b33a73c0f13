// The end of class aggregation with pooling: x + y resized to the size of x, bilinear with aligned corners.
//
//     out[i, j] = x[i, j] + Σ_{a,b} hat(i · s_h − a) · hat(j · s_w − b) · y[a, b],   hat(d) = max(1 − |d|, 0)
//
// with s_h = (h − 1) / (H − 1), s_w likewise. A task is some lines of one map. Of each it resizes y first between the
// lines, then within the line.

#include "operators.h"
#include "vectors.h"

namespace {

constexpr int64_t LINES = 8;  // of a task

// The two neighbours of a place in the smaller side, and the weight of the second, as PyTorch finds them.
struct Taps {
    int64_t low, high;
    float weight;

    Taps(int64_t place, int64_t size, int64_t low_size) {
        const float scale = size > 1 ? float(low_size - 1) / float(size - 1) : 0.0f, exact = float(place) * scale;
        low = int64_t(exact);
        if (low > low_size - 1) low = low_size - 1;
        high = low < low_size - 1 ? low + 1 : low;
        weight = exact - float(low);
    }
};

INLINE Floats between(Floats a, Floats b, float weight) { return broadcast(1.0f - weight) * a + broadcast(weight) * b; }

template <typename T> struct Resize {
    const T *x, *y;
    T *out;
    int64_t height, width, low_height, low_width, channels, pieces;  // pieces: tasks of a map

    void line(int64_t map, int64_t i, float *resized) const {
        const Taps lines(i, height, low_height);
        const int64_t count = low_width * channels;
        const T *upper = y + (map * low_height + lines.low) * count,
                *lower = y + (map * low_height + lines.high) * count;
        for (int64_t c = 0; c < count; c += LANES) {
            store(resized + c, between(load(upper + c), load(lower + c), lines.weight));
        }
        for (int64_t j = 0; j < width; ++j) {
            const Taps columns(j, width, low_width);
            const float *left = resized + columns.low * channels, *right = resized + columns.high * channels;
            const int64_t at = ((map * height + i) * width + j) * channels;
            for (int64_t c = 0; c < channels; c += LANES) {
                store(out + at + c, load(x + at + c) + between(load(left + c), load(right + c), columns.weight));
            }
        }
    }

    static bool task(void *context, int64_t index) {
        const Resize &call = *static_cast<const Resize *>(context);
        float *resized = static_cast<float *>(ovseg_scratch(call.low_width * call.channels * sizeof(float)));
        if (!resized) return false;
        const int64_t first = index % call.pieces * LINES;
        for (int64_t i = first; i < first + LINES && i < call.height; ++i) call.line(index / call.pieces, i, resized);
        return true;
    }
};

template <typename T>
int run(const void *x, const void *y, void *out, int64_t maps, int64_t height, int64_t width, int64_t low_height,
        int64_t low_width, int64_t channels, int threads) {
    const int64_t pieces = (height + LINES - 1) / LINES;
    Resize<T> call{static_cast<const T *>(x),
                   static_cast<const T *>(y),
                   static_cast<T *>(out),
                   height,
                   width,
                   low_height,
                   low_width,
                   channels,
                   pieces};
    ovseg_expect_writes(out, size_t(maps * height * width * channels) * sizeof(T));
    return ovseg_parallel(threads, maps * pieces, Resize<T>::task, &call);
}

}  // namespace

namespace OVSEG_ISA {

int class_aggregation_resize(const void *x, const void *y, void *out, int64_t maps, int64_t height, int64_t width,
                             int64_t low_height, int64_t low_width, int64_t channels, int dtype, int threads, void *) {
    if (channels % 16) return OVSEG_UNSUPPORTED_SIZE;
    const auto use = dtype == OVSEG_FLOAT32 ? run<float> : run<Bf16>;
    return use(x, y, out, maps, height, width, low_height, low_width, channels, threads);
}

}  // namespace OVSEG_ISA
