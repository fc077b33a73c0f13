// Bilinear resizing with corners not aligned, PyTorch's, pixel by pixel.

#pragma once

#include "platform.cuh"

namespace ovseg {

struct Taps {  // the two source pixels that a resizing reads for one pixel of an axis, and the weight of the second
    int low, high;
    float weight;
};

struct Axis {
    int size;  // of the source
    float scale;

    // Multiplied and added at once, so that every caller gets the same pixel.
    DEVICE Taps taps(int at) const {
        const float source = fmaxf(fmaf(float(at) + 0.5f, scale, -0.5f), 0.0f);
        const int low = min(int(source), size - 1);
        return {low, min(low + 1, size - 1), source - float(low)};
    }
};

struct Rectangle {  // of pixels, the last ones included
    int top, left, bottom, right;
};

// Not needed where the sizes are the same: then a pixel is read as it is, and an infinite neighbour does not make it
// NaN.
struct Resizing {
    Axis y, x;
    bool needed;

    Resizing(int64_t height, int64_t width, int64_t new_height, int64_t new_width)
        : y{int(height), float(height) / float(new_height)}, x{int(width), float(width) / float(new_width)},
          needed(height != new_height || width != new_width) {}

    DEVICE Taps down(int row) const { return needed ? y.taps(row) : Taps{row, row, 0.0f}; }
    DEVICE Taps along(int column) const { return needed ? x.taps(column) : Taps{column, column, 0.0f}; }

    // What the pixels of a rectangle read.
    DEVICE Rectangle source(Rectangle r) const {
        if (!needed) return r;
        return {y.taps(r.top).low, x.taps(r.left).low, y.taps(r.bottom).high, x.taps(r.right).high};
    }
};

DEVICE float mixed(float first, float second, float weight) { return fmaf(weight, second, (1.0f - weight) * first); }

}  // namespace ovseg
