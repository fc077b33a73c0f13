// Copies between global memory and tiles by pieces of 16 bytes. A thread works out the places of its first piece, from
// which those of the others follow.

#pragma once

#include "tiles.cuh"

namespace ovseg {

// A lane's number, see `recomputed`, of which the compiler knows its size.
__device__ __forceinline__ int recomputed_lane(int lane) {
    lane = recomputed(lane);
#ifdef __CUDACC__
    __builtin_assume(lane < 32);
#endif
    return lane;
}

// A piece, or zeros. Two 16-bit numbers share a register from the first on: the compiler would let the condition decide
// about each by itself.
template <typename T>
__device__ __forceinline__ Piece<T> load_if(bool present, const T *address) {
    Vector<uint32_t, 4> words{};
    if (present) words = load<uint32_t, 4>(reinterpret_cast<const uint32_t *>(address));
#ifdef __CUDACC__
    asm("" : "+r"(words.value[0]), "+r"(words.value[1]), "+r"(words.value[2]), "+r"(words.value[3]));
#endif
    Piece<T> piece;
    memcpy(&piece, &words, 16);
    return piece;
}

// One store, to global memory. Of numbers that were worked out the compiler would store two at a time.
template <typename T>
__device__ __forceinline__ void store_if(bool present, T *address, const Piece<T> &piece) {
    if (!present) return;
#ifdef __CUDACC__
    uint32_t word[4];
    memcpy(word, &piece, 16);
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(address)), "r"(word[0]),
                 "r"(word[1]), "r"(word[2]), "r"(word[3])
                 : "memory");
#else
    store<T, 16 / int(sizeof(T))>(address, piece);
#endif
}

// A lane's pieces of a warp's rows: of every AT_ONCE-th row, TOGETHER of them, all read before the first is used.
template <typename T, int WIDTH>
struct RowPieces {
    static constexpr int EACH = 16 / int(sizeof(T)), LANES = WIDTH / EACH, AT_ONCE = 32 / LANES;
    static constexpr int TOGETHER = AT_ONCE < 8 ? 4 : 16 / AT_ONCE, ROWS = TOGETHER * AT_ONCE;

    Piece<T> piece[TOGETHER];

    static __device__ __forceinline__ int row(int lane) { return lane / LANES; }
    static __device__ __forceinline__ int column(int lane) { return lane % LANES * EACH; }

    // Memory from the lane's first piece on, where rows are `pitch` numbers apart. `count` are there from the lane's
    // on; others are zeros.
    __device__ __forceinline__ void load(const T *from, int64_t pitch, int count) {
#pragma unroll
        for (int i = 0; i < TOGETHER; ++i, from += AT_ONCE * pitch) piece[i] = load_if(i * AT_ONCE < count, from);
    }

    __device__ __forceinline__ void store(T *to, int64_t pitch, int count) const {
#pragma unroll
        for (int i = 0; i < TOGETHER; ++i, to += AT_ONCE * pitch) store_if(i * AT_ONCE < count, to, piece[i]);
    }

    // A tile's rows from `first` on.
    __device__ __forceinline__ void load(Tile<T, WIDTH> tile, int first, int lane) {
#pragma unroll
        for (int i = 0; i < TOGETHER; ++i) piece[i] = ovseg::load<T, EACH>(place(tile, first, i, lane));
    }

    __device__ __forceinline__ void store(Tile<T, WIDTH> tile, int first, int lane) const {
#pragma unroll
        for (int i = 0; i < TOGETHER; ++i) ovseg::store<T, EACH>(place(tile, first, i, lane), piece[i]);
    }

    // Where piece i goes. What depends on the lane stays apart from what an unrolled loop knows.
    static __device__ __forceinline__ T *place(Tile<T, WIDTH> tile, int first, int i, int lane) {
        static_assert(Tile<T, WIDTH>::BYTES >= 128 || AT_ONCE % 8 == 0, "rows lie alike");
        const int before = first + i * AT_ONCE;
        return reinterpret_cast<T *>(tile.stepped(row(lane), lane % LANES, before % 8) + before * tile.BYTES);
    }
};

// 16 rows of memory, `pitch` numbers apart, to a tile; zeros from row `count` on.
template <typename T, int WIDTH>
__device__ __forceinline__ void copy_in(Tile<T, WIDTH> tile, const T *from, int64_t pitch, int count, int lane) {
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
__device__ __forceinline__ void copy_out(Tile<T, WIDTH> tile, T *to, int64_t pitch, int count, int lane) {
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
__device__ __forceinline__ void copy_weights(Tile<T, WIDTH> tile, const T *source, int pitch) {
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
