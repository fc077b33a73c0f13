// Where the tokens of shifted windows lie on a map.

#pragma once

#include "platform.cuh"

namespace ovseg {

struct Windows {
    int height, width, window, shift;
    int rows, columns;  // of windows

    Windows(int height, int width, int window, int shift)
        : height(height), width(width), window(window), shift(shift), rows((height + window - 1) / window),
          columns((width + window - 1) / window) {}

    __host__ __device__ int count() const { return rows * columns; }
    __host__ __device__ int tokens() const { return window * window; }

    // Row and column of a window's token on the displaced map, padded to whole windows.
    __host__ __device__ int row(int which, int token) const {
        return int(unsigned(which) / unsigned(columns)) * window + int(unsigned(token) / unsigned(window));
    }
    __host__ __device__ int column(int which, int token) const {
        return int(unsigned(which) % unsigned(columns)) * window + int(unsigned(token) % unsigned(window));
    }

    // The map position of a window's token, or -1 where the window reaches beyond the map. The map, padded to whole
    // windows at the bottom and right, is displaced cyclically by `shift` up and left.
    __host__ __device__ int position(int which, int token) const {
        if (token >= tokens()) return -1;
        int y = row(which, token) + shift, x = column(which, token) + shift;
        if (y >= rows * window) y -= rows * window;
        if (x >= columns * window) x -= columns * window;
        return y < height && x < width ? y * width + x : -1;
    }

    // Tokens see each other within a region: the last window of an axis joins the map's end and its beginning.
    __host__ __device__ int region(int which, int token) const {
        return (row(which, token) >= rows * window - shift) * 2 + (column(which, token) >= columns * window - shift);
    }

    // Whether windows reach beyond the map.
    __host__ __device__ bool padded() const { return rows * window != height || columns * window != width; }

    // Whether all tokens of a window lie on the map, in one region: no row and column of it is past the map's last.
    __host__ __device__ bool plain(int which) const {
        return (which / columns + 1) * window + shift <= height && (which % columns + 1) * window + shift <= width;
    }
};

}  // namespace ovseg
