// Label map: from low-resolution logits of one image's windows to the best classes of every pixel.
//
//     p_n    = sigmoid(resize(logits_n, window)) − offset
//     canvas = mean of p_n over the windows n that hold the pixel
//     canvas = ½ (canvas + resize(sigmoid(resize(whole, window)), canvas))     where a map of the whole image is given
//     scores = resize(canvas, size),   the best k classes of every pixel, or all of them
//
// A block owns a rectangle of output pixels, a thread one of them. It reads the low-resolution logits below its
// rectangle (they stay in the cache) and keeps the best k scores of each pixel in registers: nothing between logits and
// labels is stored. First its warps find for each class the largest logits below the rectangle, which bound its scores
// there. Classes are then taken from the largest bound downwards, until none that is left can be among the best of any
// pixel: few in a photograph. Sums and products are float32 whatever the logits are, and written so that the compiler
// has no choice in rounding them: labels are those of the scores to the bit.
//
// Scores are compared as integers that order like them, NaN above everything, with the class in the lower half so that
// the lower one wins among equals.

#include "device/resize.cuh"
#include "device/warp.cuh"

namespace ovseg {
namespace {

constexpr int ROWS = 8, COLUMNS = 32, WARPS = ROWS, THREADS = WARPS * 32;  // a warp takes a row of the rectangle
constexpr int MOST_WINDOWS = 64;
constexpr int MOST_LABELS = 8;
constexpr int PARTS = 2048;     // bounds that a block keeps; where there are more classes, neighbours share one
constexpr int BOUNDED = 4;      // classes whose bounds a warp works out at a time
constexpr int PATCH_ROWS = 4;   // logits of each among which it looks for the largest at a time
constexpr int PATCH_COLUMNS = 32 / PATCH_ROWS;
constexpr int TOGETHER = 4;     // classes whose scores a thread works out together where all are wanted
constexpr int EACH_BLOCK = 16;  // classes that a block takes there

constexpr int32_t LAST = INT32_MAX, NONE = INT32_MIN;
constexpr float SLACK = 1e-5f;  // how far rounding may lift a score above its bound

template <typename T>
struct Arguments {
    const T *logits, *whole, *offset;
    T *scores;
    int32_t *labels;
    int64_t area;  // of a map of logits
    int windows, classes, k, out_height, out_width, window_height, window_width;
    Resizing from_maps, from_window, from_canvas;  // maps -> window; the whole image's window -> canvas -> result
    int tops[MOST_WINDOWS], lefts[MOST_WINDOWS];

    __device__ __forceinline__ bool meets(int window, Rectangle r) const {
        return tops[window] <= r.bottom && tops[window] + window_height > r.top && lefts[window] <= r.right &&
               lefts[window] + window_width > r.left;
    }

    __device__ __forceinline__ int64_t at(int window, int c) const {  // where a map begins
        return (int64_t(window) * classes + c) * area;
    }
};

struct Window {  // one that meets the block's rectangle
    int number, top, left;
    Rectangle logits;  // that the rectangle reads
};

struct Shared {
    Window windows[MOST_WINDOWS];
    Rectangle whole;  // of its logits, that the rectangle reads
    int count;
    int bounds[PARTS];
    int64_t largest[2][WARPS];
    int last[2][WARPS];
};

// The block's rectangle number `tile` of the result, and its threads' pixels.
struct Target {
    int top, left, height, width;  // the result's height and width

    template <typename T>
    __device__ __forceinline__ Target(const Arguments<T> &a, int tile) : height(a.out_height), width(a.out_width) {
        const int across = (width + COLUMNS - 1) / COLUMNS;
        top = tile / across * ROWS, left = tile % across * COLUMNS;
    }

    __device__ __forceinline__ Rectangle rectangle() const {
        return {top, left, min(top + ROWS, height) - 1, min(left + COLUMNS, width) - 1};
    }

    __device__ __forceinline__ int row() const { return top + recomputed(int(threadIdx.x)) / COLUMNS; }
    __device__ __forceinline__ int column() const { return left + recomputed(int(threadIdx.x)) % COLUMNS; }
    __device__ __forceinline__ bool there() const { return row() < height && column() < width; }
    __device__ __forceinline__ int64_t place() const { return int64_t(row()) * width + column(); }
};

// What a thread's pixel reads of the canvas; pixels beyond the border repeat the last one.
struct Pixel {
    Taps y, x;

    __device__ __forceinline__ Pixel(const Target &target, const Resizing &from_canvas) {
        const int row = min(target.row(), target.height - 1), column = min(target.column(), target.width - 1);
        y = from_canvas.needed ? from_canvas.y.taps(row) : Taps{row, row, 0.0f};
        x = from_canvas.needed ? from_canvas.x.taps(column) : Taps{column, column, 0.0f};
    }
};

// Lists the windows below a block's rectangle of the result, in their order.
template <typename T>
__device__ __forceinline__ void find(const Arguments<T> &a, Shared &shared, const Target &target) {
    const int thread = int(threadIdx.x);
    const Rectangle below = a.from_canvas.source(target.rectangle());
    if (thread <= a.windows) {
        int place = 0;
#pragma unroll 1
        for (int n = 0; n < thread; ++n) place += a.meets(n, below);
        if (thread == a.windows) {
            shared.count = place;
            shared.whole = a.from_maps.source(a.from_window.source(below));
        } else if (a.meets(thread, below)) {
            const int from_y = a.tops[thread], from_x = a.lefts[thread];
            const Rectangle inside{max(below.top - from_y, 0), max(below.left - from_x, 0),
                                   min(below.bottom - from_y, a.window_height - 1),
                                   min(below.right - from_x, a.window_width - 1)};
            shared.windows[place] = {thread, from_y, from_x, a.from_maps.source(inside)};
        }
    }
    __syncthreads();
}

__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }

// What a pixel of a window reads of its map of logits, whatever the class.
struct Source {
    int above_left, above_right, below_left, below_right;
    float down, along;
    bool resized;

    __device__ __forceinline__ Source(const Resizing &from_maps, int y, int x) : resized(from_maps.needed) {
        const int width = from_maps.x.size;
        const Taps v = resized ? from_maps.y.taps(y) : Taps{y, y, 0.0f};
        const Taps h = resized ? from_maps.x.taps(x) : Taps{x, x, 0.0f};
        above_left = v.low * width + h.low, above_right = v.low * width + h.high;
        below_left = v.high * width + h.low, below_right = v.high * width + h.high;
        down = v.weight, along = h.weight;
    }

    template <typename T>
    __device__ __forceinline__ float probability(const T *map) const {
        float logit = to_float(map[above_left]);
        if (resized) {
            const float upper = mixed(logit, to_float(map[above_right]), along);
            const float lower = mixed(to_float(map[below_left]), to_float(map[below_right]), along);
            logit = mixed(upper, lower, down);
        }
        return sigmoid(logit);
    }
};

// Scores of N classes from `first` on at pixel (y, x) of the canvas; beyond the last class, that one's again.
template <int N, typename T>
__device__ __forceinline__ void score_canvas(float (&total)[N], const Arguments<T> &a, const Shared &shared, int first,
                                             int y, int x) {
    const T *maps[N];
    float lowered[N];
    int count = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const int c = min(first + i, a.classes - 1);
        maps[i] = a.logits + a.at(0, c);
        lowered[i] = a.offset ? to_float(a.offset[c]) : 0.0f;
        total[i] = 0.0f;
    }
#pragma unroll 1
    for (int n = 0; n < shared.count; ++n) {
        const Window &window = shared.windows[n];
        const int within_y = y - window.top, within_x = x - window.left;
        if (within_y < 0 || within_y >= a.window_height || within_x < 0 || within_x >= a.window_width) continue;
        const Source source(a.from_maps, within_y, within_x);
        const int64_t start = a.at(window.number, 0);
#pragma unroll
        for (int i = 0; i < N; ++i) total[i] += source.probability(maps[i] + start);
        ++count;
    }
#pragma unroll
    for (int i = 0; i < N; ++i) total[i] = fmaf(total[i], __fdividef(1.0f, float(count)), -lowered[i]);
    if (!a.whole) return;

    float certain[N] = {};
    const Taps v = a.from_window.needed ? a.from_window.y.taps(y) : Taps{y, y, 0.0f};
    const Taps h = a.from_window.needed ? a.from_window.x.taps(x) : Taps{x, x, 0.0f};
#pragma unroll 1
    for (int corner = 0; corner < (a.from_window.needed ? 4 : 1); ++corner) {
        const Source source(a.from_maps, corner & 2 ? v.high : v.low, corner & 1 ? h.high : h.low);
        const float weight = (corner & 2 ? v.weight : 1.0f - v.weight) * (corner & 1 ? h.weight : 1.0f - h.weight);
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const T *const map = a.whole + a.at(0, min(first + i, a.classes - 1));
            certain[i] = fmaf(weight, source.probability(map), certain[i]);
        }
    }
#pragma unroll
    for (int i = 0; i < N; ++i) total[i] = (total[i] + certain[i]) * 0.5f;
}

// Scores of N classes from `first` on.
template <int N, typename T>
__device__ __forceinline__ void score(float (&total)[N], const Arguments<T> &a, const Shared &shared, int first,
                                      const Pixel &pixel) {
#pragma unroll
    for (int i = 0; i < N; ++i) total[i] = 0.0f;
#pragma unroll 1
    for (int corner = 0; corner < (a.from_canvas.needed ? 4 : 1); ++corner) {
        const Taps &v = pixel.y, &h = pixel.x;
        const float weight = (corner & 2 ? v.weight : 1.0f - v.weight) * (corner & 1 ? h.weight : 1.0f - h.weight);
        float part[N];
        score_canvas(part, a, shared, first, corner & 2 ? v.high : v.low, corner & 1 ? h.high : h.low);
#pragma unroll
        for (int i = 0; i < N; ++i) total[i] = fmaf(weight, part[i], total[i]);
    }
}

// An integer that orders like the score, and the score again.
__device__ __forceinline__ int key(float score) {
    const int bits = score == 0.0f ? 0 : int(__float_as_uint(score));  // −0 is as good as 0
    return score != score ? LAST : bits < 0 ? bits ^ LAST : bits;
}

__device__ __forceinline__ float score_of(int key) { return __uint_as_float(uint32_t(key < 0 ? key ^ LAST : key)); }

// An integer that orders like the key, and the lower number first among equals.
__device__ __forceinline__ int64_t order(int key, int number) {
    return int64_t(uint64_t(uint32_t(key)) << 32 | uint32_t(number ^ LAST));
}

__device__ __forceinline__ int key_of(int64_t order) { return int(order >> 32); }
__device__ __forceinline__ int number_of(int64_t order) { return int(order & LAST) ^ LAST; }

__device__ __forceinline__ int64_t maximum_of_warp(int64_t x) {
#pragma unroll
    for (int distance = 16; distance; distance /= 2) {
        const uint32_t upper = __shfl_xor_sync(ALL_LANES, uint32_t(x >> 32), distance);
        const uint32_t lower = __shfl_xor_sync(ALL_LANES, uint32_t(x), distance);
        x = max(x, int64_t(uint64_t(upper) << 32 | lower));
    }
    return x;
}

__device__ __forceinline__ int minimum_of_warp(int x) {
#pragma unroll
    for (int distance = 16; distance; distance /= 2) x = min(x, __shfl_xor_sync(ALL_LANES, x, distance));
    return x;
}

// Keys of what the scores of BOUNDED classes do not exceed in the block's rectangle, above all others where that is
// unknown: of classes `first`, `first` + `step`, ..., beyond the last class, that one's again. A warp works them out
// together. Every averaging keeps below the largest.
template <typename T>
__device__ __forceinline__ void bound(int (&keys)[BOUNDED], const Arguments<T> &a, const Shared &shared, int first,
                                      int step, int lane) {
    float found[BOUNDED], bounds[BOUNDED];
    // Larger of what was found and the logits in a rectangle; infinity where one is no finite number.
    const auto search = [&](const T *start, Rectangle r) {
        const T *maps[BOUNDED];
#pragma unroll
        for (int i = 0; i < BOUNDED; ++i) maps[i] = start + a.at(0, min(first + i * step, a.classes - 1));
#pragma unroll 1
        for (int y = r.top + lane / PATCH_COLUMNS; y <= r.bottom; y += PATCH_ROWS) {
#pragma unroll 1
            for (int x = r.left + lane % PATCH_COLUMNS; x <= r.right; x += PATCH_COLUMNS) {
#pragma unroll
                for (int i = 0; i < BOUNDED; ++i) {
                    const float logit = to_float(maps[i][y * a.from_maps.x.size + x]);
                    found[i] = fmaxf(found[i], fabsf(logit) < INFINITY ? logit : INFINITY);
                }
            }
        }
    };
    const auto certainty = [](float found) {
        found = maximum_over_lanes<32>(found);
        return found < INFINITY ? sigmoid(found) : INFINITY;
    };
#pragma unroll
    for (int i = 0; i < BOUNDED; ++i) found[i] = -INFINITY;
#pragma unroll 1
    for (int n = 0; n < shared.count; ++n) {
        const Window &window = shared.windows[n];
        search(a.logits + a.at(window.number, 0), window.logits);
    }
#pragma unroll
    for (int i = 0; i < BOUNDED; ++i) {
        bounds[i] = certainty(found[i]);
        if (a.offset) bounds[i] -= to_float(a.offset[min(first + i * step, a.classes - 1)]);
        found[i] = -INFINITY;
    }
    if (a.whole) search(a.whole, shared.whole);
#pragma unroll
    for (int i = 0; i < BOUNDED; ++i) {
        if (a.whole) bounds[i] = (bounds[i] + certainty(found[i])) * 0.5f;
        const float raised = bounds[i] + SLACK * (1.0f + fabsf(bounds[i]));
        keys[i] = fabsf(raised) < INFINITY ? key(raised) : LAST;
    }
}

// The best `k` ≤ K classes of each pixel.
template <typename T, int K>
__global__ void __launch_bounds__(THREADS, 4) top_labels(const Arguments<T> a) {
    Shared &shared = *reinterpret_cast<Shared *>(shared_memory());
    const int thread = int(threadIdx.x), lane = thread % 32, warp = thread / 32;
    const Target target(a, int(blockIdx.x));
    find(a, shared, target);
    const int each = (a.classes - 1) / PARTS + 1, parts = (a.classes - 1) / each + 1;
#pragma unroll 1
    for (int part = warp * BOUNDED; part < parts; part += WARPS * BOUNDED) {
        int highest[BOUNDED], keys[BOUNDED];
#pragma unroll
        for (int i = 0; i < BOUNDED; ++i) highest[i] = NONE;
#pragma unroll 1
        for (int i = 0; i < each; ++i) {
            bound(keys, a, shared, part * each + i, each, lane);
#pragma unroll
            for (int j = 0; j < BOUNDED; ++j) highest[j] = max(highest[j], keys[j]);
        }
#pragma unroll
        for (int i = 0; i < BOUNDED; ++i) {
            if (lane == 0 && part + i < parts) shared.bounds[part + i] = highest[i];
        }
    }
    __syncthreads();

    const Pixel pixel(target, a.from_canvas);
    int64_t best[K];
#pragma unroll
    for (int r = 0; r < K; ++r) best[r] = INT64_MIN;
#pragma unroll 1
    for (int turn = 0;; turn ^= 1) {
        // The part with the largest bound of those that are left, and the lowest of the pixels' k-th scores.
        int64_t chosen = INT64_MIN;
#pragma unroll 1
        for (int part = thread; part < parts; part += THREADS) chosen = max(chosen, order(shared.bounds[part], part));
        int last = NONE;
#pragma unroll
        for (int r = 0; r < K; ++r) last = r < a.k ? key_of(best[r]) : last;
        chosen = maximum_of_warp(chosen), last = minimum_of_warp(last);
        if (lane == 0) shared.largest[turn][warp] = chosen, shared.last[turn][warp] = last;
        __syncthreads();
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            chosen = max(chosen, shared.largest[turn][w]);
            last = min(last, shared.last[turn][w]);
        }
        if (key_of(chosen) == NONE || key_of(chosen) < last) break;
        const int part = number_of(chosen);
        if (part % THREADS == thread) shared.bounds[part] = NONE;  // done; only this thread looks at it
#pragma unroll 1
        for (int c = part * each; c < min((part + 1) * each, a.classes); ++c) {
            float found[1];
            score(found, a, shared, c, pixel);
            int64_t candidate = order(key(found[0]), c);
#pragma unroll
            for (int r = 0; r < K; ++r) {
                const int64_t better = max(best[r], candidate);
                candidate = min(best[r], candidate);
                best[r] = better;
            }
        }
    }
    if (!target.there()) return;
#pragma unroll
    for (int r = 0; r < K; ++r) {
        if (r == a.k) return;
        const int64_t place = target.place() + int64_t(a.out_height) * a.out_width * r;
        a.labels[place] = number_of(best[r]);
        if (a.scores) a.scores[place] = rounded<T>(score_of(key_of(best[r])));
    }
}

// All scores.
template <typename T>
__global__ void __launch_bounds__(THREADS, 4) score_map(const Arguments<T> a) {
    Shared &shared = *reinterpret_cast<Shared *>(shared_memory());
    const int runs = (a.classes - 1) / EACH_BLOCK + 1;
    const Target target(a, int(blockIdx.x) / runs);
    find(a, shared, target);
    const Pixel pixel(target, a.from_canvas);
    const int first = int(blockIdx.x) % runs * EACH_BLOCK, end = min(first + EACH_BLOCK, a.classes);
#pragma unroll 1
    for (int c = first; c < end; c += TOGETHER) {
        float found[TOGETHER];
        score(found, a, shared, c, pixel);
#pragma unroll
        for (int i = 0; i < TOGETHER; ++i) {
            const int64_t place = target.place() + int64_t(a.out_height) * a.out_width * (c + i);
            if (c + i < end && target.there()) a.scores[place] = rounded<T>(found[i]);
        }
    }
}

}  // namespace
}  // namespace ovseg

int ovseg_label_map_fwd(const void *logits, const void *whole, const void *offset, const int64_t *positions,
                        void *scores, int32_t *labels, int64_t windows, int64_t classes, int64_t height, int64_t width,
                        int64_t window_height, int64_t window_width, int64_t canvas_height, int64_t canvas_width,
                        int64_t out_height, int64_t out_width, int64_t k, int dtype, int device, void *stream) {
    using namespace ovseg;
    for (const int64_t size : {classes, height, width, window_height, window_width, canvas_height, canvas_width,
                               out_height, out_width}) {
        if (size < 1 || size > INT32_MAX / 2) return OVSEG_UNSUPPORTED_SIZE;
    }
    if (windows < 1 || windows > MOST_WINDOWS || k < 0 || k > MOST_LABELS || k > classes ||
        height * width > INT32_MAX) {
        return OVSEG_UNSUPPORTED_SIZE;
    }
    if (!aligned(logits, whole, offset, scores, labels)) return OVSEG_MISALIGNED;
    const int64_t tiles = (out_height + ROWS - 1) / ROWS * ((out_width + COLUMNS - 1) / COLUMNS);
    return by_dtype(dtype, [&](auto number) {
        using T = decltype(number);
        const auto in = [](const void *pointer) { return static_cast<const T *>(pointer); };
        Arguments<T> a{in(logits), in(whole), in(offset), static_cast<T *>(scores), labels, height * width,
                       int(windows), int(classes), int(k), int(out_height), int(out_width), int(window_height),
                       int(window_width), Resizing(height, width, window_height, window_width),
                       Resizing(window_height, window_width, canvas_height, canvas_width),
                       Resizing(canvas_height, canvas_width, out_height, out_width), {}, {}};
        for (int n = 0; n < windows; ++n) a.tops[n] = int(positions[2 * n]), a.lefts[n] = int(positions[2 * n + 1]);
        if (k == 0) {
            const int64_t runs = (classes - 1) / EACH_BLOCK + 1;
            return launch(score_map<T>, tiles * runs, THREADS, sizeof(Shared), device, stream, a);
        }
        const auto kernel = k == 1 ? top_labels<T, 1> : k <= 4 ? top_labels<T, 4> : top_labels<T, MOST_LABELS>;
        return launch(kernel, tiles, THREADS, sizeof(Shared), device, stream, a);
    });
}
