// Cosines between 128 image embeddings and 16 text embeddings, 16 of the image's to each of eight warps. Products and
// squares of both sides are summed in one pass over the channels, which come through shared memory a stage at a time.

#pragma once

#include "transformer.cuh"

namespace ovseg {

constexpr int PIXELS = 128, TEXTS = 16, COSINE_THREADS = PIXELS / 16 * 32;
constexpr float SHORTEST = 1e-12f;  // torch.nn.functional.normalize

// Copies 16 bytes of a row of `columns` numbers, from `column` on, into a tile: zeros beyond its end, and where `present` is
// false. Rows that are no multiple of 16 bytes (`whole` is false) are read number by number, at once.
template <typename T>
__device__ __forceinline__ void copy_piece(void *target, const T *row, int column, int columns, bool present,
                                           bool whole) {
    constexpr int EACH = 16 / int(sizeof(T));
    if (whole) {
        const bool there = present && column < columns;
        copy_async(target, there ? row + column : row, there);
    } else {
        Piece<T> piece;
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            piece.value[i] = present && column + i < columns ? row[column + i] : rounded<T>(0.0f);
        }
        store<T, EACH>(static_cast<T *>(target), piece);
    }
}

// The stages of both sides: rows of 128 bytes, of the image, then of the text.
template <typename T>
struct Embeddings {
    static constexpr int WIDTH = 128 / int(sizeof(T));
    static constexpr int BYTES = (PIXELS + TEXTS) * 128;

    const T *image, *text;
    const int *places;  // the pixels' rows of `image`, or −1
    int texts, channels;

    __device__ __forceinline__ int stages() const { return (channels + WIDTH - 1) / WIDTH; }

    __device__ __forceinline__ void operator()(int stage, unsigned char *buffer) const {
        constexpr int PIECES = 8, EACH = 16 / int(sizeof(T));
        const Tile<T, WIDTH> rows{buffer};
        const bool whole = channels % EACH == 0;
#pragma unroll 1
        for (int i = int(threadIdx.x); i < (PIXELS + TEXTS) * PIECES; i += COSINE_THREADS) {
            const int row = i / PIECES, piece = i % PIECES;
            const int place = row < PIXELS ? places[row] : row - PIXELS < texts ? row - PIXELS : -1;
            const T *const source = (row < PIXELS ? image : text) + int64_t(max(place, 0)) * channels;
            copy_piece(rows.piece(row, piece), source, stage * WIDTH + piece * EACH, channels, place >= 0, whole);
        }
    }
};

template <typename T>
__device__ __forceinline__ float square(uint32_t word) {  // or two of them
    if constexpr (sizeof(T) == 2) {
        T pair[2];
        memcpy(pair, &word, 4);
        const float first = to_float(pair[0]), second = to_float(pair[1]);
        return first * first + second * second;
    } else {
        return __uint_as_float(word) * __uint_as_float(word);
    }
}

__device__ __forceinline__ float length_of(float squares) {
    const float length = sqrtf(squares);
    return length < SHORTEST ? SHORTEST : length;  // NaN stays
}

// d = cosines of the warp's 16 pixels, rows, with the 16 texts, columns.
template <typename T, typename Stages>
__device__ __forceinline__ void cosines(D (&d)[TEXTS / 8], Stages &stages, int warp, int lane) {
    float pixels[2] = {}, texts[2] = {};  // squares
    d[0] = d[1] = {};
#pragma unroll 1
    for (int stage = 0; stage < stages.stages; ++stage) {
        const Tile<T, Embeddings<T>::WIDTH> rows{stages.next()};
#pragma unroll
        for (int k = 0; k < Embeddings<T>::WIDTH / K<T>; ++k) {
            const A a = load_a(rows.rows_from(16 * warp), k, lane);
            B b[2];
            load_b(b, rows.rows_from(PIXELS), k, lane);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                pixels[i] += square<T>(a.word[i]) + square<T>(a.word[i + 2]);
                texts[i] += square<T>(b[i].word[0]) + square<T>(b[i].word[1]);
                mma<T>(d[i], a, b[i]);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        pixels[i] = length_of(sum_over_lanes<4>(pixels[i]));
        texts[i] = length_of(sum_over_lanes<4>(texts[i]));
    }
#pragma unroll
    for (int n = 0; n < TEXTS / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float text = __shfl_sync(ALL_LANES, texts[n], 4 * d_column(lane, i));  // who read that text's row
            d[n].value[i] = d[n].value[i] / text / pixels[i / 2];
        }
    }
}

}  // namespace ovseg
