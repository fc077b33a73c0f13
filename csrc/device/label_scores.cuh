// Scores of a label map's pixels, a thread for each pixel of a block's rectangle of the result: a row of it to a warp,
// so that lanes are neighbours in memory.
//
// A resized result reads 2 × 2 pixels of the canvas, each of them up to 2 × 2 of a window's map and up to 4 × 4 of the
// whole image's. Where these lie depends on a row and on a column, whose parts are computed once for all pairs. Beyond
// a window's border the first row or column of its map is read and not counted.

#pragma once

#include "numbers.cuh"

namespace ovseg {

// Bilinear resizing with corners not aligned, as PyTorch's, pixel by pixel.
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

// Not needed for equal sizes: a pixel is read as it is, and an infinite neighbour does not make it NaN.
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

constexpr int ROWS = 8, COLUMNS = 32, WARPS = ROWS, THREADS = WARPS * 32;  // of a rectangle; its warps
constexpr int MOST_WINDOWS = 64;

template <typename T> struct LabelMap {
    const T *logits, *whole, *offset;
    T *scores;
    int32_t *labels;
    int64_t area;  // of a map of logits
    int windows, classes, k, out_height, out_width, window_height, window_width;
    Resizing from_maps, from_window, from_canvas;  // maps -> window; the whole image's window -> canvas -> result
    int tops[MOST_WINDOWS] = {}, lefts[MOST_WINDOWS] = {};

    DEVICE bool meets(int window, Rectangle r) const {
        return tops[window] <= r.bottom && tops[window] + window_height > r.top && lefts[window] <= r.right &&
               lefts[window] + window_width > r.left;
    }

    DEVICE int64_t at(int window, int c) const {  // where a map begins
        return (int64_t(window) * classes + c) * area;
    }
};

// One that meets the block's rectangle.
struct WindowBelow {
    int64_t start;  // of its maps
    int top, left;
    Rectangle logits;  // that the rectangle reads
};

struct WindowsBelow {
    WindowBelow list[MOST_WINDOWS];
    Rectangle whole;  // of the whole image's logits, that the rectangle reads
    int count;
};

// The block's rectangle number `tile` of the result, and its threads' pixels.
struct Target {
    int top, left, height, width;  // the result's height and width

    template <typename T> DEVICE Target(const LabelMap<T> &a, int tile) : height(a.out_height), width(a.out_width) {
        const int across = (width + COLUMNS - 1) / COLUMNS;
        top = tile / across * ROWS, left = tile % across * COLUMNS;
    }

    DEVICE Rectangle rectangle() const {
        return {top, left, min(top + ROWS, height) - 1, min(left + COLUMNS, width) - 1};
    }

    DEVICE int row() const { return top + recomputed(int(threadIdx.x)) / COLUMNS; }
    DEVICE int column() const { return left + recomputed(int(threadIdx.x)) % COLUMNS; }
    DEVICE bool inside() const { return row() < height && column() < width; }
    DEVICE int64_t index() const { return int64_t(row()) * width + column(); }
};

// Lists the windows below a block's rectangle of the result, in their order.
template <typename T> DEVICE void find(const LabelMap<T> &a, WindowsBelow &windows, const Target &target) {
    const int thread = int(threadIdx.x);
    const Rectangle below = a.from_canvas.source(target.rectangle());
    if (thread <= a.windows) {
        int index = 0;
#pragma unroll 1
        for (int n = 0; n < thread; ++n) index += a.meets(n, below);
        if (thread == a.windows) {
            windows.count = index;
            windows.whole = a.from_maps.source(a.from_window.source(below));
        } else if (a.meets(thread, below)) {
            const int from_y = a.tops[thread], from_x = a.lefts[thread];
            const Rectangle inside{max(below.top - from_y, 0), max(below.left - from_x, 0),
                                   min(below.bottom - from_y, a.window_height - 1),
                                   min(below.right - from_x, a.window_width - 1)};
            windows.list[index] = {a.at(thread, 0), from_y, from_x, a.from_maps.source(inside)};
        }
    }
    __syncthreads();
}

DEVICE float sigmoid(float x) { return fast_reciprocal(1.0f + fast_exp2(x * -1.4426950409f)); }

// Of the logit that these taps make of a map.
template <typename T> DEVICE float probability(const T *map, const Resizing &from_maps, const Taps &v, const Taps &h) {
    const auto at = [&](int y, int x) { return to_float(map[uint32_t(y * from_maps.x.size + x)]); };
    float logit = at(v.low, h.low);
    if (from_maps.needed) {
        const float upper = mixed(logit, at(v.low, h.high), h.weight);
        const float lower = mixed(at(v.high, h.low), at(v.high, h.high), h.weight);
        logit = mixed(upper, lower, v.weight);
    }
    return sigmoid(logit);
}

// Scores of N classes from `first` on, the last class again beyond it, at SIDE × SIDE pixels of the canvas.
template <int SIDE, int N, typename T>
DEVICE void score_canvas(float (&scores)[SIDE][SIDE][N], const LabelMap<T> &a, const WindowsBelow &windows, int first,
                         const int (&rows)[SIDE], const int (&columns)[SIDE]) {
    int64_t maps[N];
    float counts[SIDE][SIDE] = {};
    unrolled<N>([&](int i) { maps[i] = a.at(0, min(first + i, a.classes - 1)); });
    unrolled<SIDE * SIDE * N>([&](int pixel) { scores[pixel / N / SIDE][pixel / N % SIDE][pixel % N] = 0.0f; });
#pragma unroll 1
    for (int n = 0; n < windows.count; ++n) {
        const WindowBelow &window = windows.list[n];
        const T *const start = a.logits + window.start;
        Taps h[SIDE];
        bool holds_column[SIDE];
        unrolled<SIDE>([&](int c) {
            const int column = columns[c] - window.left;
            holds_column[c] = column >= 0 && column < a.window_width;
            h[c] = a.from_maps.along(holds_column[c] ? column : 0);
        });
#pragma unroll
        for (int r = 0; r < SIDE; ++r) {
            const int row = recomputed(rows[r]) - window.top;  // when it is its turn: registers are few
            const bool holds_row = row >= 0 && row < a.window_height;
            const Taps v = a.from_maps.down(holds_row ? row : 0);
            unrolled<SIDE>([&](int c) {
                const bool holds = holds_row && holds_column[c];
                unrolled<N>([&](int i) {
                    const float p = probability(start + maps[i], a.from_maps, v, h[c]);
                    scores[r][c][i] += holds ? p : 0.0f;
                });
                counts[r][c] += holds ? 1.0f : 0.0f;
            });
        }
    }
    unrolled<N>([&](int i) {
        const float lowered = a.offset ? to_float(a.offset[min(first + i, a.classes - 1)]) : 0.0f;
        unrolled<SIDE, SIDE>(
            [&](int r, int c) { scores[r][c][i] = fmaf(scores[r][c][i], fast_reciprocal(counts[r][c]), -lowered); });
    });
    if (!a.whole) return;

    Taps along[SIDE], h[SIDE][2];
    unrolled<SIDE>([&](int c) {
        along[c] = a.from_window.along(columns[c]);
        h[c][0] = a.from_maps.along(along[c].low), h[c][1] = a.from_maps.along(along[c].high);
    });
#pragma unroll
    for (int r = 0; r < SIDE; ++r) {
        const Taps down = a.from_window.down(recomputed(rows[r]));
        const Taps v[2] = {a.from_maps.down(down.low), a.from_maps.down(down.high)};
#pragma unroll
        for (int c = 0; c < SIDE; ++c) {
            float certain[N] = {};
#pragma unroll
            for (int corner = 0; corner < 4; ++corner) {
                if (corner > 0 && !a.from_window.needed) continue;
                const int lower = corner / 2, right = corner % 2;
                const float weight =
                    (lower ? down.weight : 1.0f - down.weight) * (right ? along[c].weight : 1.0f - along[c].weight);
                unrolled<N>([&](int i) {
                    const float p = probability(a.whole + maps[i], a.from_maps, v[lower], h[c][right]);
                    certain[i] = fmaf(weight, p, certain[i]);
                });
            }
            unrolled<N>([&](int i) { scores[r][c][i] = (scores[r][c][i] + certain[i]) * 0.5f; });
        }
    }
}

// What a thread's pixel reads of the canvas; pixels beyond the border repeat the last one.
struct Pixel {
    Taps y, x;

    DEVICE Pixel(const Target &target, const Resizing &from_canvas)
        : y(from_canvas.down(min(target.row(), target.height - 1))),
          x(from_canvas.along(min(target.column(), target.width - 1))) {}

    // Scores of N classes from `first` on.
    template <int N, typename T>
    DEVICE void score(float (&total)[N], const LabelMap<T> &a, const WindowsBelow &windows, int first) const {
        if (!a.from_canvas.needed) {
            float scores[1][1][N];
            score_canvas<1>(scores, a, windows, first, {y.low}, {x.low});
            unrolled<N>([&](int i) { total[i] = scores[0][0][i]; });
            return;
        }
        float scores[2][2][N];
        score_canvas<2>(scores, a, windows, first, {y.low, y.high}, {x.low, x.high});
        unrolled<N>([&](int i) {
            total[i] = 0.0f;
            unrolled<4>([&](int corner) {
                const float weight =
                    (corner / 2 ? y.weight : 1.0f - y.weight) * (corner % 2 ? x.weight : 1.0f - x.weight);
                total[i] = fmaf(weight, scores[corner / 2][corner % 2][i], total[i]);
            });
        });
    }
};

}  // namespace ovseg
