// Cosines between 128 image embeddings and 16 text embeddings, 16 of the image's to each of eight warps. Products and
// squares of both sides are summed in one pass over the channels, which come through shared memory a stage at a time,
// in rows of 128 bytes: the image's, then the text's.

#pragma once

#include "pieces.cuh"
#include "transformer.cuh"

namespace ovseg {

constexpr int PIXELS = 128, TEXTS = 16, COSINE_THREADS = PIXELS / 16 * 32;

// Copies 16 bytes of a row, of which `left` numbers are left, into a tile; zeros beyond its end. Rows that are no whole
// pieces are read number by number, at once.
template <typename T>
DEVICE void copy_piece(void *target, const T *source, int left, bool whole) {
    if (whole) {
        copy_async(target, source, left > 0);
    } else {
        T *const place = static_cast<T *>(target);
#pragma unroll 4
        for (int i = 0; i < EACH<T>; ++i) place[i] = i < left ? source[i] : rounded<T>(0.0f);
    }
}

// The stages of both sides. A thread copies the same piece of every AT_ONCE-th row.
template <typename T>
struct Embeddings {
    static constexpr int WIDTH = 128 / int(sizeof(T));
    static constexpr int BYTES = (PIXELS + TEXTS) * 128;
    static constexpr int AT_ONCE = COSINE_THREADS / 8, OWN = PIXELS / AT_ONCE;
    static_assert(PIXELS % AT_ONCE == 0 && TEXTS <= AT_ONCE, "the text's rows are one of a thread at most");

    const T *sources[OWN + 1];  // of the thread's pieces of the next stage: of the image, and of the text
    int left[OWN + 1];          // numbers of their rows from there on; none or less where there is no row
    int target, channels, texts;

    // places: the pixels' rows of `image`, or −1
    DEVICE Embeddings(const T *image, const T *text, const int *places, int texts, int channels)
        : channels(channels), texts(texts) {
        const int thread = recomputed(int(threadIdx.x)), row = thread / 8, column = thread % 8 * EACH<T>;
        target = tile_offset<128>(row, thread % 8);
#pragma unroll
        for (int i = 0; i <= OWN; ++i) {
            const int place = i < OWN ? places[row + i * AT_ONCE] : row < texts ? row : -1;
            sources[i] = (i < OWN ? image : text) + int64_t(max(place, 0)) * channels + column;
            left[i] = place < 0 ? 0 : channels - column;
        }
    }

    DEVICE int stages() const { return (channels + WIDTH - 1) / WIDTH; }

    DEVICE void operator()(int, unsigned char *buffer) {
        by_wholeness(whole_pieces<T>(channels), [&](auto whole) {
#pragma unroll
            for (int i = 0; i <= OWN; ++i) {
                if (i == OWN && int(threadIdx.x) >= 8 * TEXTS) continue;
                copy_piece(buffer + target + i * AT_ONCE * 128, sources[i], left[i], whole);
            }
        });
#pragma unroll
        for (int i = 0; i <= OWN; ++i) sources[i] += WIDTH, left[i] -= WIDTH;
    }
};

// Sums of the squares of 16 rows. Those of 16-bit numbers are the diagonal of the rows' products with each other: a
// factor's rows are, as they lie in the lanes, also columns of the other one.
template <typename T>
struct Squares {
    D products[2] = {};  // with rows 0..7, with rows 8..15

    DEVICE void add(const A &a) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if constexpr (sizeof(T) == 2) {
                mma<T>(products[i], a, B{{a.word[i], a.word[i + 2]}});
            } else {
                const float first = __uint_as_float(a.word[i]), second = __uint_as_float(a.word[i + 2]);
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

// The cosines of a warp's 16 pixels and all texts, in the layout of a product.
template <typename T, typename Stages>
DEVICE void cosines(D (&d)[TEXTS / 8], Stages &stages, int warp, int lane) {
    Squares<T> pixels, texts;
    d[0] = d[1] = {};
#pragma unroll 1
    for (int stage = 0; stage < stages.stages; ++stage) {
        const Tile<T, Embeddings<T>::WIDTH> rows{stages.next()};
#pragma unroll
        for (int k = 0; k < Embeddings<T>::WIDTH / K<T>; ++k) {
            const A a = load_a(rows.rows_from(16 * warp), k, lane);
            B b[2];
            load_b(b, rows.rows_from(PIXELS), k, lane);
            pixels.add(a);
            texts.add({{b[0].word[0], b[1].word[0], b[0].word[1], b[1].word[1]}});
#pragma unroll
            for (int i = 0; i < 2; ++i) mma<T>(d[i], a, b[i]);
        }
    }
    float of_pixel[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) of_pixel[i] = fast_reciprocal(length_of(pixels.of_row(i, lane)));
#pragma unroll
    for (int n = 0; n < TEXTS / 8; ++n) {
        const float own = fast_reciprocal(length_of(texts.of_row(n, lane)));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float of_text = __shfl_sync(ALL_LANES, own, 4 * d_column(lane, i));  // who holds that text's row
            d[n].value[i] = d[n].value[i] * of_text * of_pixel[i / 2];
        }
    }
}

}  // namespace ovseg
