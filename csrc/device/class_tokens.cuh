// A position's tokens, one of each class, from maps (batch, classes, height, width, C). With a `pooling` of more than 1
// a position is a square of so many pixels a side, and what is left over at the maps' ends belongs to none.

#pragma once

#include "class_attention.cuh"
#include "copies.cuh"

namespace ovseg {

template <typename T> struct ClassMaps {
    const T *x, *padding_token;
    Classes classes;
    int64_t map;  // numbers from one class to the next
    int width, pooling;
    int positions, columns;  // of a map, and of a row of it

    ClassMaps(const void *x, const void *padding_token, Classes classes, int64_t height, int64_t width, int64_t pooling)
        : x(static_cast<const T *>(x)), padding_token(static_cast<const T *>(padding_token)), classes(classes),
          map(height * width * C), width(int(width)), pooling(int(pooling)),
          positions(int(height / pooling * (width / pooling))), columns(int(width / pooling)) {}

    // Of maps with a token for each position: numbers from one class to the next, and the address of a class's token.
    DEVICE int64_t pooled_map() const { return int64_t(positions) * C; }
    DEVICE T *result(T *results, int number, int key) const {
        number = recomputed(number);
        const int image = number / recomputed(positions), position = number - image * positions;
        return results + (int64_t(image) * classes.count + key) * pooled_map() + int64_t(position) * C;
    }
};

// Position `number` of those of all images: its image, and its first class's token.
template <typename T> struct Position {
    int image;
    const T *x;

    // Recomputed wherever it is needed, instead of kept in registers.
    DEVICE Position(const ClassMaps<T> &maps, int number) {
        number = recomputed(number);
        image = number / recomputed(maps.positions);
        const int position = number - image * maps.positions;
        const int row = position / recomputed(maps.columns), column = position - row * maps.columns;
        x = maps.x + int64_t(image) * maps.classes.count * maps.map +
            (int64_t(row) * maps.width + column) * (maps.pooling * C);
    }
};

// A warp's classes from `first` on as rows of its tile, averaged over the pooled positions; zeros beyond the list.
template <typename T>
DEVICE void load_pooled(Tile<T, C> tile, const ClassMaps<T> &maps, const T *source, int first, int lane) {
    using Rows = RowVecs<T, C>;
    const float scale = 1.0f / float(maps.pooling * maps.pooling);
    source += Rows::row(lane) * maps.map + Rows::column(lane);
#pragma unroll 1
    for (int row = 0; row < 16; row += Rows::ROWS, source += Rows::ROWS * maps.map) {
        Rows rows;
        float totals[Rows::COUNT][VEC<T>] = {};
        const T *pixel = source;
#pragma unroll 1
        for (int i = 0; i < maps.pooling; ++i, pixel += int64_t(maps.width - maps.pooling) * C) {
#pragma unroll 1
            for (int j = 0; j < maps.pooling; ++j, pixel += C) {
                rows.load(pixel, maps.map, maps.classes.count - first - row - Rows::row(lane));
                unrolled<Rows::COUNT * VEC<T>>(
                    [&](int k) { totals[k / VEC<T>][k % VEC<T>] += to_float(rows.vec[k / VEC<T>].value[k % VEC<T>]); });
            }
        }
        unrolled<Rows::COUNT * VEC<T>>([&](int k) {
            rows.vec[k / VEC<T>].value[k % VEC<T>] = rounded<T>(totals[k / VEC<T>][k % VEC<T>] * scale);
        });
        rows.store(tile, row, lane);
    }
}

// A warp's 16 classes from `first` on as rows of its tile, with the padding class behind the last; zeros beyond.
template <typename T>
DEVICE void load_classes(Tile<T, C> tile, const ClassMaps<T> &maps, int number, int first, int lane) {
    const T *const source = Position<T>(maps, number).x + first * maps.map;
    if (maps.pooling == 1) {
        copy_in(tile, source, maps.map, maps.classes.count - first, lane);
    } else {
        load_pooled(tile, maps, source, first, lane);
    }
    const int padding = maps.classes.count - first;
    if (maps.classes.pads == 0 || padding < 0 || padding >= 16) return;
    __syncwarp();
    const int column = lane * VEC<T>;
    if (column < C) store(tile.at(padding, column), load_vec(maps.padding_token + column));
}

// Adds a warp's classes from `first` on, without pooling, to the rows of its tile and stores the sum.
template <typename T>
DEVICE void store_added(Tile<T, C> tile, const ClassMaps<T> &maps, int number, T *target, int first, int lane) {
    using Rows = RowVecs<T, C>;
    const int64_t offset = Rows::row(lane) * maps.map + Rows::column(lane);
    const T *source = Position<T>(maps, number).x + first * maps.map + offset;
    target += offset;
#pragma unroll
    for (int row = 0; row < 16; row += Rows::ROWS, source += Rows::ROWS * maps.map, target += Rows::ROWS * maps.map) {
        const int count = maps.classes.count - first - row - Rows::row(lane);
        Rows x, y;
        x.load(source, maps.map, count);
        y.load(tile, row, lane);
        unrolled<Rows::COUNT * VEC<T>>([&](int k) {
            T &sum = x.vec[k / VEC<T>].value[k % VEC<T>];
            sum = rounded<T>(to_float(y.vec[k / VEC<T>].value[k % VEC<T>]) + to_float(sum));
        });
        x.store(target, maps.map, count);
    }
}

}  // namespace ovseg
