// A position's tokens, one of each class, from maps (batch, classes, height, width, C). With a `pooling` of more than 1
// a position is a square of so many pixels a side, and what is left over at the maps' ends belongs to none.

#pragma once

#include "class_attention.cuh"
#include "copies.cuh"

namespace ovseg {

template <typename T>
struct ClassMaps {
    const T *x, *padding_token;
    Classes classes;
    int64_t map;  // numbers from one class to the next
    int width, pooling;
    int positions, columns;  // of a map, and of a row of it

    ClassMaps(const void *x, const void *padding_token, Classes classes, int64_t height, int64_t width, int64_t pooling)
        : x(static_cast<const T *>(x)), padding_token(static_cast<const T *>(padding_token)), classes(classes),
          map(height * width * C), width(int(width)), pooling(int(pooling)),
          positions(int(height / pooling * (width / pooling))), columns(int(width / pooling)) {}

    // Of maps with a token for each position: numbers from one class to the next, and where that of a class is.
    DEVICE int64_t pooled_map() const { return int64_t(positions) * C; }
    DEVICE T *result(T *results, int number, int key) const {
        number = recomputed(number);
        const int image = number / recomputed(positions), place = number - image * positions;
        return results + (int64_t(image) * classes.count + key) * pooled_map() + int64_t(place) * C;
    }
};

// Position `number` of those of all images: in which one, and where its first class's token begins.
template <typename T>
struct Position {
    int image;
    const T *x;

    // Worked out again wherever it is asked for, instead of kept in registers.
    DEVICE Position(const ClassMaps<T> &maps, int number) {
        number = recomputed(number);
        image = number / recomputed(maps.positions);
        const int place = number - image * maps.positions;
        const int row = place / recomputed(maps.columns), column = place - row * maps.columns;
        x = maps.x + int64_t(image) * maps.classes.count * maps.map +
            (int64_t(row) * maps.width + column) * (maps.pooling * C);
    }
};

// A warp's classes from `first` on as rows of its tile, averaged over the square of positions that is pooled; zeros
// beyond the list.
template <typename T>
DEVICE void load_pooled(Tile<T, C> rows, const ClassMaps<T> &maps, const T *from, int first, int lane) {
    using Pieces = RowPieces<T, C>;
    const float share = 1.0f / float(maps.pooling * maps.pooling);
    from += Pieces::row(lane) * maps.map + Pieces::column(lane);
#pragma unroll 1
    for (int row = 0; row < 16; row += Pieces::ROWS, from += Pieces::ROWS * maps.map) {
        Pieces pieces;
        float totals[Pieces::TOGETHER][EACH<T>] = {};
        const T *at = from;
#pragma unroll 1
        for (int i = 0; i < maps.pooling; ++i, at += int64_t(maps.width - maps.pooling) * C) {
#pragma unroll 1
            for (int j = 0; j < maps.pooling; ++j, at += C) {
                pieces.load(at, maps.map, maps.classes.count - first - row - Pieces::row(lane));
#pragma unroll
                for (int k = 0; k < Pieces::TOGETHER * EACH<T>; ++k) {
                    const int which = k / EACH<T>, number = k % EACH<T>;
                    totals[which][number] += to_float(pieces.piece[which].value[number]);
                }
            }
        }
#pragma unroll
        for (int k = 0; k < Pieces::TOGETHER * EACH<T>; ++k) {
            const int which = k / EACH<T>, number = k % EACH<T>;
            pieces.piece[which].value[number] = rounded<T>(totals[which][number] * share);
        }
        pieces.store(rows, row, lane);
    }
}

// A warp's 16 classes from `first` on as rows of its tile, with the padding class behind the last; zeros beyond.
template <typename T>
DEVICE void load_classes(Tile<T, C> rows, const ClassMaps<T> &maps, int number, int first, int lane) {
    const T *const from = Position<T>(maps, number).x + first * maps.map;
    if (maps.pooling == 1) {
        copy_in(rows, from, maps.map, maps.classes.count - first, lane);
    } else {
        load_pooled(rows, maps, from, first, lane);
    }
    const int padding = maps.classes.count - first;
    if (maps.classes.pads == 0 || padding < 0 || padding >= 16) return;
    __syncwarp();
    if (lane < C / EACH<T>) {
        store(rows.at(padding, lane * EACH<T>), load_piece(maps.padding_token + lane * EACH<T>));
    }
}

// A warp's classes from `first` on, where nothing is pooled, added to the rows of its tile on their way to memory.
template <typename T>
DEVICE void store_added(Tile<T, C> rows, const ClassMaps<T> &maps, int number, T *to, int first, int lane) {
    using Pieces = RowPieces<T, C>;
    const int64_t own = Pieces::row(lane) * maps.map + Pieces::column(lane);
    const T *from = Position<T>(maps, number).x + first * maps.map + own;
    to += own;
#pragma unroll
    for (int row = 0; row < 16; row += Pieces::ROWS, from += Pieces::ROWS * maps.map, to += Pieces::ROWS * maps.map) {
        const int count = maps.classes.count - first - row - Pieces::row(lane);
        Pieces x, y;
        x.load(from, maps.map, count);
        y.load(rows, row, lane);
#pragma unroll
        for (int k = 0; k < Pieces::TOGETHER * EACH<T>; ++k) {
            T &sum = x.piece[k / EACH<T>].value[k % EACH<T>];
            sum = rounded<T>(to_float(y.piece[k / EACH<T>].value[k % EACH<T>]) + to_float(sum));
        }
        x.store(to, maps.map, count);
    }
}

}  // namespace ovseg
