// The upsampling decoder's last convolution, 3 × 3 with padding 1, to one number a pixel.
//
//     out[y, x] = bias + Σ_ij p[y + i − 1, x + j − 1, 3i + j],    p[y, x, k] = Σ_c x[y, x, c] · weight[c, k]
//
// A task is the map of one class: the nine products of each pixel, three rows at a time, and their sums. Products
// beyond the map are 0, whatever the weights.

#include "operators.h"
#include "transformer.h"

namespace {

constexpr int TAPS = 9;
constexpr int COLUMNS = 16;  // of a pixel's products: the taps fill whole vectors
constexpr int VECTORS = COLUMNS / LANES;

template <typename T> struct Head {
    typedef typename Operand<T>::Type P;

    const T *x, *given_weight, *given_bias;
    T *out;
    int64_t height, width, channels;
    const P *weight;

    void prepare(Arena &arena) {
        T *taps = arena.take<T>(TAPS * channels);
        P *packed = arena.take<P>(COLUMNS * channels);
        weight = packed;
        if (!packed) return;
        for (int64_t i = 0; i < TAPS * channels; ++i) taps[i % TAPS * channels + i / TAPS] = given_weight[i];
        pack_transposed<VECTORS>(taps, channels, TAPS, channels, packed);
    }

    static const float *operand(const float *row, float *, int64_t) { return row; }
#if OVSEG_BF16_PRODUCTS
    static const Bf16 *operand(const Bf16 *row, Bf16 *, int64_t) { return row; }
#else
    static const float *operand(const Bf16 *row, float *widened, int64_t count) {
        copy_to_floats(row, count, widened);
        return widened;
    }
#endif

    static bool task(void *context, int64_t index) {
        const Head &h = *static_cast<const Head *>(context);
        const int64_t width = h.width, row_size = width * h.channels, size = (width + 2) * COLUMNS;
        Arena arena(ovseg_scratch(size_t(3 * size + width + row_size + 48) * sizeof(float)));
        if (!arena.memory) return false;
        float *products = arena.take<float>(3 * size), *sums = arena.take<float>(width);
        P *widened = arena.take<P>(row_size);
        memset(products, 0, 3 * size * sizeof *products);
        const T *map = h.x + index * h.height * row_size;
        T *to = h.out + index * h.height * width;
        for (int64_t y = -1; y < h.height; ++y) {
            float *below = products + (y + 1) % 3 * size;  // the row after y, which comes into the window
            if (y + 1 < h.height) {
                multiply<VECTORS>(Matrix<P>{operand(map + (y + 1) * row_size, widened, row_size), h.channels, 1}, width,
                                  h.weight, 1, h.channels, below + COLUMNS, COLUMNS, false);
            } else {
                memset(below, 0, size * sizeof *below);
            }
            if (y < 0) continue;
            const float *rows[3] = {products + (y + 2) % 3 * size, products + y % 3 * size, below};
            for (int64_t x = 0; x < width; ++x) {
                float total[3];
                for (int i = 0; i < 3; ++i) {
                    const float *row = rows[i] + x * COLUMNS + 3 * i;
                    total[i] = row[0] + row[COLUMNS + 1] + row[2 * COLUMNS + 2];
                }
                sums[x] = total[0] + total[1] + total[2];
            }
            const float bias = to_float(*h.given_bias);
            int64_t x = 0;
            for (; x + LANES <= width; x += LANES) store(to + y * width + x, load(sums + x) + broadcast(bias));
            for (; x < width; ++x) from_float(to + y * width + x, sums[x] + bias);
        }
        return true;
    }
};

template <typename T>
int run(const void *x, const void *weight, const void *bias, void *out, int64_t maps, int64_t height, int64_t width,
        int64_t channels, int threads) {
    Head<T> head{static_cast<const T *>(x),
                 static_cast<const T *>(weight),
                 static_cast<const T *>(bias),
                 static_cast<T *>(out),
                 height,
                 width,
                 channels,
                 nullptr};
    ovseg_expect_writes(out, size_t(maps * height * width) * sizeof(T));
    return prepare_and_run(head, threads, maps);
}

}  // namespace

namespace OVSEG_ISA {

int upsampling_decoder_head(const void *x, const void *weight, const void *bias, void *out, int64_t maps,
                            int64_t height, int64_t width, int64_t channels, int dtype, int threads, void *) {
    if (channels % 2) return OVSEG_UNSUPPORTED_SIZE;
    return dtype == OVSEG_FLOAT32 ? run<float>(x, weight, bias, out, maps, height, width, channels, threads)
                                  : run<Bf16>(x, weight, bias, out, maps, height, width, channels, threads);
}

}  // namespace OVSEG_ISA
