// Products of bfloat16 in the tile registers of Intel's AMX: C (16 × 16 float32) += A (16 × 32) · B (32 × 16), B packed
// as for products of pairs. Registers 0 to 3 hold tiles of C, 4 and 5 of A, 6 and 7 of B.
//
// In assembly, as the intrinsics of GCC 12 do not tell the compiler that they read memory.

#pragma once

#include "pool.h"
#include "vectors.h"

namespace {

constexpr int TILE_ROWS = 16, TILE_PAIRS = 16;  // the most rows, and pairs of depths, of a tile

#define TILE_ZERO(tile) __asm__ volatile("tilezero %%tmm" #tile : :)
#define TILE_LOAD(tile, from, stride) \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile : : "r"(from), "r"(int64_t(stride)) : "memory")
#define TILE_STORE(tile, to, stride) \
    __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" : : "r"(to), "r"(int64_t(stride)) : "memory")
#define TILE_MULTIPLY_ADD(c, a, b) __asm__ volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c : :)

// Tiles of so many rows of A and C, and so many pairs of depths. Another shape costs about 200 cycles and the contents.
INLINE void shape_tiles(int rows, int pairs) {
    const int shape = 32 * rows + pairs;
    if (ovseg_tile_shape == shape) return;
    struct alignas(64) {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config{};
    config.palette = 1;
    for (int tile = 0; tile < 8; ++tile) {
        config.rows[tile] = uint8_t(tile < 6 ? rows : pairs);
        config.row_bytes[tile] = uint16_t(tile == 4 || tile == 5 ? 4 * pairs : 4 * LANES);
    }
    __asm__ volatile("ldtilecfg %0" : : "m"(config));
    ovseg_tile_shape = shape;
}

// One or two tiles of rows times one or two vectors of columns, `steps` tiles deep. Strides are in bytes.
template <int TILES, int VECTORS>
INLINE void multiply_tiles(const char *a, int64_t a_stride, const char *b, int64_t b_stride, int64_t pairs,
                           int64_t steps, char *c, int64_t c_stride, bool add) {
    const int64_t a_below = TILE_ROWS * a_stride, c_below = TILE_ROWS * c_stride;
    constexpr int64_t C_RIGHT = 4 * LANES, B_RIGHT = 4 * LANES;
    if (add) {
        TILE_LOAD(0, c, c_stride);
        if constexpr (VECTORS > 1) TILE_LOAD(1, c + C_RIGHT, c_stride);
        if constexpr (TILES > 1) TILE_LOAD(2, c + c_below, c_stride);
        if constexpr (TILES > 1 && VECTORS > 1) TILE_LOAD(3, c + c_below + C_RIGHT, c_stride);
    } else {
        TILE_ZERO(0);
        if constexpr (VECTORS > 1) TILE_ZERO(1);
        if constexpr (TILES > 1) TILE_ZERO(2);
        if constexpr (TILES > 1 && VECTORS > 1) TILE_ZERO(3);
    }
    for (int64_t step = 0; step < steps; ++step, a += 4 * pairs, b += pairs * b_stride) {
        TILE_LOAD(4, a, a_stride);
        TILE_LOAD(6, b, b_stride);
        TILE_MULTIPLY_ADD(0, 4, 6);
        if constexpr (VECTORS > 1) {
            TILE_LOAD(7, b + B_RIGHT, b_stride);
            TILE_MULTIPLY_ADD(1, 4, 7);
        }
        if constexpr (TILES > 1) {
            TILE_LOAD(5, a + a_below, a_stride);
            TILE_MULTIPLY_ADD(2, 5, 6);
            if constexpr (VECTORS > 1) TILE_MULTIPLY_ADD(3, 5, 7);
        }
    }
    TILE_STORE(0, c, c_stride);
    if constexpr (VECTORS > 1) TILE_STORE(1, c + C_RIGHT, c_stride);
    if constexpr (TILES > 1) TILE_STORE(2, c + c_below, c_stride);
    if constexpr (TILES > 1 && VECTORS > 1) TILE_STORE(3, c + c_below + C_RIGHT, c_stride);
}

// Rows of a shape that the tiles have now, times the first VECTORS vectors of a panel that has STRIDE.
template <int VECTORS, int STRIDE>
INLINE void multiply_shaped(const char *a, int64_t a_stride, int64_t rows, const char *b, int64_t pairs, int64_t steps,
                            char *c, int64_t c_stride, bool add) {
    constexpr int64_t B_STRIDE = 4 * LANES * STRIDE;
    for (int64_t row = 0; row < rows; row += 2 * TILE_ROWS) {
        const char *from = a + row * a_stride;
        char *to = c + row * c_stride;
        const bool two = row + TILE_ROWS < rows;
#pragma GCC unroll 2
        for (int vector = 0; vector < VECTORS; vector += 2) {
            const char *panel = b + 4 * LANES * vector;
            char *columns = to + 4 * LANES * vector;
            if (vector + 1 < VECTORS) {
                two ? multiply_tiles<2, 2>(from, a_stride, panel, B_STRIDE, pairs, steps, columns, c_stride, add)
                    : multiply_tiles<1, 2>(from, a_stride, panel, B_STRIDE, pairs, steps, columns, c_stride, add);
            } else {
                two ? multiply_tiles<2, 1>(from, a_stride, panel, B_STRIDE, pairs, steps, columns, c_stride, add)
                    : multiply_tiles<1, 1>(from, a_stride, panel, B_STRIDE, pairs, steps, columns, c_stride, add);
            }
        }
    }
}

// C = A · B, or C += A · B, for some panels; rows and depths that fill no tile are left to tiles of their own shape.
template <int VECTORS, int STRIDE = VECTORS>
__attribute__((noinline)) void multiply_in_tiles(const Bf16 *a, int64_t a_stride, int64_t rows, const Bf16 *b,
                                                 int64_t panels, int64_t steps, float *c, int64_t c_stride, bool add) {
    const int64_t whole_rows = rows / TILE_ROWS * TILE_ROWS, whole_steps = steps / TILE_PAIRS * TILE_PAIRS;
    for (int last_rows = 0; last_rows < 2; ++last_rows) {
        const int64_t first = last_rows ? whole_rows : 0, count = last_rows ? rows - whole_rows : whole_rows;
        if (!count) continue;
        for (int last_steps = 0; last_steps < 2; ++last_steps) {
            const int64_t step = last_steps ? whole_steps : 0, deep = last_steps ? steps - whole_steps : whole_steps;
            if (!deep) continue;
            const int64_t pairs = last_steps ? deep : TILE_PAIRS;
            shape_tiles(int(last_rows ? count : TILE_ROWS), int(pairs));
            for (int64_t panel = 0; panel < panels; ++panel) {
                const Bf16 *columns = b + (panel * steps + step) * 2 * LANES * STRIDE;
                multiply_shaped<VECTORS, STRIDE>(
                    reinterpret_cast<const char *>(a + first * a_stride + 2 * step), 2 * a_stride, count,
                    reinterpret_cast<const char *>(columns), pairs, deep / pairs,
                    reinterpret_cast<char *>(c + first * c_stride + panel * VECTORS * LANES), 4 * c_stride,
                    add || step);
            }
        }
    }
}

}  // namespace
