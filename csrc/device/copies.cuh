// Copies between global memory and tiles by vectors of 16 bytes.

#pragma once

#include "tiles.cuh"
#include "vectors.cuh"

namespace ovseg {

// A lane's vectors of a warp's rows: of every AT_ONCE-th row, COUNT of them, all read before the first is used.
template <typename T, int WIDTH> struct RowVecs {
    static constexpr int LANES = WIDTH / VEC<T>, AT_ONCE = 32 / LANES;
    static constexpr int COUNT = AT_ONCE < 8 ? 4 : 16 / AT_ONCE, ROWS = COUNT * AT_ONCE;

    Vec<T> vec[COUNT];

    static DEVICE int row(int lane) { return lane / LANES; }
    static DEVICE int column(int lane) { return lane % LANES * VEC<T>; }

    // From memory at the lane's first vector, its rows `pitch` numbers apart; zeros after the first `rows` of them.
    DEVICE void load(const T *source, int64_t pitch, int rows) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i, source += AT_ONCE * pitch) vec[i] = load_if(i * AT_ONCE < rows, source);
    }

    DEVICE void store(T *target, int64_t pitch, int rows) const {
#pragma unroll
        for (int i = 0; i < COUNT; ++i, target += AT_ONCE * pitch) store_if(i * AT_ONCE < rows, target, vec[i]);
    }

    // A tile's rows from `first` on.
    DEVICE void load(Tile<T, WIDTH> tile, int first, int lane) {
        unrolled<COUNT>([&](int i) { vec[i] = load_vec(address(tile, first, i, lane)); });
    }

    DEVICE void store(Tile<T, WIDTH> tile, int first, int lane) const {
        unrolled<COUNT>([&](int i) { ovseg::store(address(tile, first, i, lane), vec[i]); });
    }

    // Of vector i. What depends on the lane stays apart from what an unrolled loop knows.
    static DEVICE T *address(Tile<T, WIDTH> tile, int first, int i, int lane) {
        static_assert(Tile<T, WIDTH>::BYTES >= 128 || AT_ONCE % 8 == 0, "rows are permuted alike");
        const int before = first + i * AT_ONCE;
        return reinterpret_cast<T *>(tile.stepped(row(lane), lane % LANES, before % 8) + before * tile.BYTES);
    }
};

// 16 rows of memory, `pitch` numbers apart, to a tile; zeros from row `count` on.
template <typename T, int WIDTH>
DEVICE void copy_in(Tile<T, WIDTH> tile, const T *source, int64_t pitch, int count, int lane) {
    using Rows = RowVecs<T, WIDTH>;
    source += Rows::row(lane) * pitch + Rows::column(lane);
#pragma unroll
    for (int first = 0; first < 16; first += Rows::ROWS, source += Rows::ROWS * pitch) {
        Rows rows;
        rows.load(source, pitch, count - first - Rows::row(lane));
        rows.store(tile, first, lane);
    }
}

// A tile's first `count` of 16 rows to memory.
template <typename T, int WIDTH>
DEVICE void copy_out(Tile<T, WIDTH> tile, T *target, int64_t pitch, int count, int lane) {
    using Rows = RowVecs<T, WIDTH>;
    target += Rows::row(lane) * pitch + Rows::column(lane);
#pragma unroll
    for (int first = 0; first < 16; first += Rows::ROWS, target += Rows::ROWS * pitch) {
        Rows rows;
        rows.load(tile, first, lane);
        rows.store(target, pitch, count - first - Rows::row(lane));
    }
}

// All THREADS threads of the block copy ROWS rows of weights, `pitch` numbers apart, into a tile.
template <int ROWS, int THREADS, typename T, int WIDTH>
DEVICE void copy_weights(Tile<T, WIDTH> tile, const T *source, int pitch) {
    constexpr int VECS = Tile<T, WIDTH>::VECS, AT_ONCE = THREADS / VECS;
    static_assert(THREADS % VECS == 0 && (AT_ONCE % 8 == 0 || (8 % AT_ONCE == 0 && VECS >= 8)), "rows permuted alike");
    const int thread = recomputed(int(threadIdx.x)), row = thread / VECS, vec = thread % VECS;
    source += row * pitch + vec * VEC<T>;
#pragma unroll
    for (int first = 0; first < ROWS; first += AT_ONCE) {
        unsigned char *const target = tile.stepped(row, vec, first % 8) + first * Tile<T, WIDTH>::BYTES;
        if (first + AT_ONCE <= ROWS || row < ROWS - first) copy_async(target, source + first * pitch);
    }
}

}  // namespace ovseg
