// Copies between global memory and tiles by pieces of 16 bytes. A thread works out the places of its first piece, from
// which those of the others follow.

#pragma once

#include "tiles.cuh"

namespace ovseg {

// A piece, or zeros.
template <typename T>
DEVICE Piece<T> load_if(bool present, const T *address) {
    Words words{};
    if (present) words = load_words(address);
    keep_together(words);
    Piece<T> piece;
    memcpy(&piece, &words, 16);
    return piece;
}

// A piece to global memory at once.
template <typename T>
DEVICE void store_if(bool present, T *address, const Piece<T> &piece) {
    Words words;
    memcpy(&words, &piece, 16);
    if (present) store_words(address, words);
}

// A lane's pieces of a warp's rows: of every AT_ONCE-th row, TOGETHER of them, all read before the first is used.
template <typename T, int WIDTH>
struct RowPieces {
    static constexpr int LANES = WIDTH / EACH<T>, AT_ONCE = 32 / LANES;
    static constexpr int TOGETHER = AT_ONCE < 8 ? 4 : 16 / AT_ONCE, ROWS = TOGETHER * AT_ONCE;

    Piece<T> piece[TOGETHER];

    static DEVICE int row(int lane) { return lane / LANES; }
    static DEVICE int column(int lane) { return lane % LANES * EACH<T>; }

    // Memory from the lane's first piece on, where rows are `pitch` numbers apart. `count` are there from the lane's
    // on; others are zeros.
    DEVICE void load(const T *from, int64_t pitch, int count) {
#pragma unroll
        for (int i = 0; i < TOGETHER; ++i, from += AT_ONCE * pitch) piece[i] = load_if(i * AT_ONCE < count, from);
    }

    DEVICE void store(T *to, int64_t pitch, int count) const {
#pragma unroll
        for (int i = 0; i < TOGETHER; ++i, to += AT_ONCE * pitch) store_if(i * AT_ONCE < count, to, piece[i]);
    }

    // A tile's rows from `first` on.
    DEVICE void load(Tile<T, WIDTH> tile, int first, int lane) {
#pragma unroll
        for (int i = 0; i < TOGETHER; ++i) piece[i] = ovseg::load_piece(place(tile, first, i, lane));
    }

    DEVICE void store(Tile<T, WIDTH> tile, int first, int lane) const {
#pragma unroll
        for (int i = 0; i < TOGETHER; ++i) ovseg::store(place(tile, first, i, lane), piece[i]);
    }

    // Where piece i goes. What depends on the lane stays apart from what an unrolled loop knows.
    static DEVICE T *place(Tile<T, WIDTH> tile, int first, int i, int lane) {
        static_assert(Tile<T, WIDTH>::BYTES >= 128 || AT_ONCE % 8 == 0, "rows lie alike");
        const int before = first + i * AT_ONCE;
        return reinterpret_cast<T *>(tile.stepped(row(lane), lane % LANES, before % 8) + before * tile.BYTES);
    }
};

// 16 rows of memory, `pitch` numbers apart, to a tile; zeros from row `count` on.
template <typename T, int WIDTH>
DEVICE void copy_in(Tile<T, WIDTH> tile, const T *from, int64_t pitch, int count, int lane) {
    using Pieces = RowPieces<T, WIDTH>;
    from += Pieces::row(lane) * pitch + Pieces::column(lane);
#pragma unroll
    for (int first = 0; first < 16; first += Pieces::ROWS, from += Pieces::ROWS * pitch) {
        Pieces pieces;
        pieces.load(from, pitch, count - first - Pieces::row(lane));
        pieces.store(tile, first, lane);
    }
}

// A tile's first `count` of 16 rows to memory.
template <typename T, int WIDTH>
DEVICE void copy_out(Tile<T, WIDTH> tile, T *to, int64_t pitch, int count, int lane) {
    using Pieces = RowPieces<T, WIDTH>;
    to += Pieces::row(lane) * pitch + Pieces::column(lane);
#pragma unroll
    for (int first = 0; first < 16; first += Pieces::ROWS, to += Pieces::ROWS * pitch) {
        Pieces pieces;
        pieces.load(tile, first, lane);
        pieces.store(to, pitch, count - first - Pieces::row(lane));
    }
}

// All THREADS threads of the block copy ROWS rows of weights, `pitch` numbers apart, into a tile.
template <int ROWS, int THREADS, typename T, int WIDTH>
DEVICE void copy_weights(Tile<T, WIDTH> tile, const T *source, int pitch) {
    constexpr int PIECES = Tile<T, WIDTH>::PIECES, AT_ONCE = THREADS / PIECES;
    static_assert(THREADS % PIECES == 0 && (AT_ONCE % 8 == 0 || (8 % AT_ONCE == 0 && PIECES >= 8)), "rows lie alike");
    const int thread = recomputed(int(threadIdx.x)), row = thread / PIECES, piece = thread % PIECES;
    const T *const from = source + (row * pitch + piece * (16 / int(sizeof(T))));
#pragma unroll
    for (int first = 0; first < ROWS; first += AT_ONCE) {
        unsigned char *const target = tile.stepped(row, piece, first % 8) + first * Tile<T, WIDTH>::BYTES;
        if (first + AT_ONCE <= ROWS || row < ROWS - first) copy_async(target, from + first * pitch);
    }
}

}  // namespace ovseg
