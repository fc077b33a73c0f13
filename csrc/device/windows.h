// Where the tokens of shifted windows lie on a map.

#pragma once

#ifndef __CUDACC__
#define __host__
#define __device__
#endif

namespace ovseg {

struct Windows {
    int height, width, window, shift;

    __host__ __device__ int rows() const { return (height + window - 1) / window; }
    __host__ __device__ int columns() const { return (width + window - 1) / window; }
    __host__ __device__ int count() const { return rows() * columns(); }
    __host__ __device__ int tokens() const { return window * window; }

    // The map position of a window's token, or -1 where the window reaches beyond the map. The map, padded to whole
    // windows at the bottom and right, is displaced cyclically by `shift` up and left.
    __host__ __device__ int place(int which, int token) const {
        if (token >= tokens()) return -1;
        const int y = (which / columns() * window + token / window + shift) % (rows() * window);
        const int x = (which % columns() * window + token % window + shift) % (columns() * window);
        return y < height && x < width ? y * width + x : -1;
    }

    // Tokens see each other within a region: the last window of an axis joins the map's end and its beginning.
    __host__ __device__ int region(int which, int token) const {
        const int y = which / columns() * window + token / window, x = which % columns() * window + token % window;
        return (y >= rows() * window - shift) * 2 + (x >= columns() * window - shift);
    }

    // Whether all tokens of a window lie on the map, in one region: no row and column of it is past the map's last.
    __host__ __device__ bool plain(int which) const {
        return (which / columns() + 1) * window + shift <= height && (which % columns() + 1) * window + shift <= width;
    }
};

}  // namespace ovseg
