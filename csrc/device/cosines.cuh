// Cosines between 128 image embeddings and 16 text embeddings, 16 of the image's to each of eight warps. Products and
// squares of both sides are summed in one pass over the channels, which come through shared memory a stage at a time,
// in rows of 128 bytes: the image's, then the text's.

#pragma once

#include "transformer.cuh"
#include "vectors.cuh"

namespace ovseg {

constexpr int PIXELS = 128, TEXTS = 16, COSINE_THREADS = PIXELS / 16 * 32;

// Copies 16 bytes of a row with `left` numbers left into a tile, zeros beyond; number by number unless `whole`.
template <typename T> DEVICE void copy_vec(void *target, const T *source, int left, bool whole) {
    if (whole) {
        copy_async(target, source, left > 0);
    } else {
        T *const numbers = static_cast<T *>(target);
#pragma unroll 4
        for (int i = 0; i < VEC<T>; ++i) numbers[i] = i < left ? source[i] : rounded<T>(0.0f);
    }
}

// The stages of both sides. A thread copies the same vector of every AT_ONCE-th row.
template <typename T> struct Embeddings {
    static constexpr int WIDTH = 128 / int(sizeof(T)), BYTES = (PIXELS + TEXTS) * 128;
    static constexpr int AT_ONCE = COSINE_THREADS / 8, COUNT = PIXELS / AT_ONCE;
    static_assert(PIXELS % AT_ONCE == 0 && TEXTS <= AT_ONCE, "a thread copies one of the text's rows at most");

    const T *sources[COUNT + 1];  // of the thread's vectors of the next stage: of the image, and of the text
    int left[COUNT + 1];          // numbers of their rows from there on; none or less where there is no row
    int target, channels, texts;

    // positions: the pixels' rows of `image`, or −1
    DEVICE Embeddings(const T *image, const T *text, const int *positions, int texts, int channels)
        : channels(channels), texts(texts) {
        const int thread = recomputed(int(threadIdx.x)), row = thread / 8, column = thread % 8 * VEC<T>;
        target = tile_offset<128>(row, thread % 8);
#pragma unroll
        for (int i = 0; i <= COUNT; ++i) {
            const int position = i < COUNT ? positions[row + i * AT_ONCE] : row < texts ? row : -1;
            sources[i] = (i < COUNT ? image : text) + int64_t(max(position, 0)) * channels + column;
            left[i] = position < 0 ? 0 : channels - column;
        }
    }

    DEVICE int stages() const { return (channels + WIDTH - 1) / WIDTH; }

    DEVICE void operator()(int, unsigned char *buffer) {
        with_constant(whole_vecs<T>(channels), [&](auto whole) {
#pragma unroll
            for (int i = 0; i <= COUNT; ++i) {
                if (i == COUNT && int(threadIdx.x) >= 8 * TEXTS) continue;
                copy_vec(buffer + target + i * AT_ONCE * 128, sources[i], left[i], whole);
            }
        });
#pragma unroll
        for (int i = 0; i <= COUNT; ++i) sources[i] += WIDTH, left[i] -= WIDTH;
    }
};

// Sums of the squares of 16 rows. Those of 16-bit numbers are the diagonal of the rows' products with each other: the
// rows of a frag_a are, as they lie in the lanes, also columns of a frag_b.
template <typename T> struct Squares {
    Acc products[2] = {};  // with rows 0..7, with rows 8..15

    DEVICE void add(const FragA &rows) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if constexpr (sizeof(T) == 2) {
                mma<T>(products[i], rows, FragB{{rows.word[i], rows.word[i + 2]}});
            } else {
                const float first = __uint_as_float(rows.word[i]), second = __uint_as_float(rows.word[i + 2]);
                products[i].value[0] = fmaf(first, first, fmaf(second, second, products[i].value[0]));
            }
        }
    }

    // Of row lane / 4 + 8 · i.
    DEVICE float of_row(int i, int lane) const {
        if constexpr (sizeof(T) == 2) {
            const int row = lane / 4;  // of the diagonal: in lane row / 2 of its four, value row % 2
            const float value = row % 2 ? products[i].value[2 * i + 1] : products[i].value[2 * i];
            return __shfl_sync(ALL_LANES, value, 4 * row + row / 2);
        } else {
            return sum_over_lanes<4>(products[i].value[0]);
        }
    }
};

// The cosines of a warp's 16 pixels and all texts.
template <typename T, typename Stages> DEVICE void cosines(Acc (&acc)[TEXTS / 8], Stages &stages, int warp, int lane) {
    Squares<T> pixels, texts;
    acc[0] = acc[1] = {};
#pragma unroll 1
    for (int stage = 0; stage < stages.stages; ++stage) {
        const Tile<T, Embeddings<T>::WIDTH> tile{stages.next()};
        unrolled<Embeddings<T>::WIDTH / K<T>>([&](int k) {
            const FragA frag_a = load_a(tile.rows_from(16 * warp), k, lane);
            const FragB2 frag_b = load_b(tile.rows_from(PIXELS), k, lane);
            const uint32_t (&left)[2] = frag_b.left.word, (&right)[2] = frag_b.right.word;
            pixels.add(frag_a);
            texts.add({{left[0], right[0], left[1], right[1]}});
            mma<T>(acc, frag_a, frag_b);
        });
    }
    float of_pixel[2];
    unrolled<2>([&](int i) { of_pixel[i] = fast_reciprocal(length_of(pixels.of_row(i, lane))); });
    unrolled<TEXTS / 8>([&](int n) {
        const float of_row = fast_reciprocal(length_of(texts.of_row(n, lane)));
        unrolled<4>([&](int i) {
            const float of_text = __shfl_sync(ALL_LANES, of_row, 4 * acc_col(lane, i));  // who holds that text's row
            acc[n].value[i] = acc[n].value[i] * of_text * of_pixel[i / 2];
        });
    });
}

}  // namespace ovseg
