// Label map: from low-resolution logits of one image's windows to the best classes of every pixel.
//
//     p_n    = sigmoid(resize(logits_n, window)) − offset
//     canvas = mean of p_n over the windows n that hold the pixel
//     canvas = ½ (canvas + resize(sigmoid(resize(whole, window)), canvas))     where a map of the whole image is given
//     scores = resize(canvas, size),   the best k classes of every pixel, or all of them
//
// A block owns a rectangle of output pixels, a thread one of them. It reads the low-resolution logits below its
// rectangle from the cache and keeps the best k scores of each pixel in registers: nothing between logits and labels is
// stored. First its warps find each class's largest logits below the rectangle, which bound its scores there. Classes
// are then taken from the largest bound down, until none that is left can be among the best of any pixel: few in a
// photograph. Everything is float32 whatever the logits are, and rounding is fixed: labels are those of the scores to
// the bit.
//
// Scores are compared as integers that order like them, NaN above everything, with the class in the lower half so that
// the lower class wins among equals.

#include "device/label_scores.cuh"

namespace ovseg {
namespace {

constexpr int MOST_LABELS = 8;
constexpr int PARTS = 2048;    // bounds that a block keeps; with more classes, neighbours share one
constexpr int BOUNDED = 4;     // classes whose bounds a warp computes at a time
constexpr int PATCH_ROWS = 4;  // logits of each among which it looks for the largest at a time
constexpr int PATCH_COLUMNS = 32 / PATCH_ROWS;
constexpr int TOGETHER = 2;     // classes whose scores a thread computes together for all scores
constexpr int EACH_BLOCK = 16;  // classes that a block takes there

constexpr int32_t LAST = INT32_MAX, NONE = INT32_MIN;
constexpr float SLACK = 1e-5f;  // how far rounding may lift a score above its bound

// The largest bound, the first part of the classes that has it, and the lowest of the pixels' k-th scores, as keys.
struct alignas(16) Choice {
    int key, part, last;
};

struct Shared {
    WindowsBelow windows;
    int bounds[PARTS];
    Choice choices[2][WARPS];
};

// An integer that orders like the score, and its score.
DEVICE int key(float score) {
    const int bits = score == 0.0f ? 0 : int(__float_as_uint(score));  // −0 equals 0
    return score != score ? LAST : bits < 0 ? bits ^ LAST : bits;
}

DEVICE float score_of(int key) { return __uint_as_float(uint32_t(key < 0 ? key ^ LAST : key)); }

// An integer that orders like the key, and the lower number first among equals.
DEVICE int64_t order(int key, int number) { return int64_t(uint64_t(uint32_t(key)) << 32 | uint32_t(number ^ LAST)); }

DEVICE int key_of(int64_t order) { return int(order >> 32); }
DEVICE int number_of(int64_t order) { return int(order & LAST) ^ LAST; }

DEVICE Choice choice_of_warp(const Choice &choice) {
    const int key = __reduce_max_sync(ALL_LANES, choice.key);
    return {key, __reduce_min_sync(ALL_LANES, choice.key == key ? choice.part : LAST),
            __reduce_min_sync(ALL_LANES, choice.last)};
}

// The largest of all lanes' numbers i, for the lanes whose number is i modulo N; NaN is passed over.
template <int N> DEVICE float shared_maximum(float (&x)[N], int lane) {
#pragma unroll
    for (int half = N / 2; half; half /= 2) {  // a lane gives away those of its partner
        const bool upper = lane & half;
#pragma unroll
        for (int i = 0; i < half; ++i) {
            const float received = __shfl_xor_sync(ALL_LANES, upper ? x[i] : x[i + half], half);
            x[i] = fmaxf(upper ? x[i + half] : x[i], received);
        }
    }
    return maximum_over_lanes<32 / N, N>(x[0]);
}

// The key of a bound on the scores of a class in the block's rectangle, the largest key if it is unknown. A warp
// computes it for BOUNDED classes `first`, `first` + `step`, ..., one for each of the first lanes.
template <typename T>
DEVICE int bound(const LabelMap<T> &a, const WindowsBelow &windows, int first, int step, int lane) {
    float largest[2 * BOUNDED], spoilt[2 * BOUNDED] = {};  // of the windows' logits, of the whole image's
    unrolled<2 * BOUNDED>([&](int i) { largest[i] = -INFINITY; });
    int64_t maps[BOUNDED];
    unrolled<BOUNDED>([&](int i) { maps[i] = a.at(0, min(first + i * step, a.classes - 1)); });
    const auto search = [&](const T *start, Rectangle r, int kind) {
        const T *starts[BOUNDED];
        unrolled<BOUNDED>([&](int i) { starts[i] = start + maps[i]; });
#pragma unroll 1
        for (int y = r.top + lane / PATCH_COLUMNS; y <= r.bottom; y += PATCH_ROWS) {
#pragma unroll 1
            for (int x = r.left + lane % PATCH_COLUMNS; x <= r.right; x += PATCH_COLUMNS) {
                const uint32_t offset = y * a.from_maps.x.size + x;
                unrolled<BOUNDED>([&](int i) {
                    const float logit = to_float(starts[i][offset]);
                    largest[kind * BOUNDED + i] = fmaxf(largest[kind * BOUNDED + i], logit);
                    spoilt[kind * BOUNDED + i] = fmaf(logit, 0.0f, spoilt[kind * BOUNDED + i]);  // NaN if not finite
                });
            }
        }
    };
#pragma unroll 1
    for (int n = 0; n < windows.count; ++n) search(a.logits + windows.list[n].start, windows.list[n].logits, 0);
    if (a.whole) search(a.whole, windows.whole, 1);
    unrolled<2 * BOUNDED>([&](int i) { largest[i] = spoilt[i] == 0.0f ? largest[i] : INFINITY; });
    const float logit = shared_maximum(largest, lane);
    float bound = logit < INFINITY ? sigmoid(logit) : INFINITY;
    const float certain = __shfl_xor_sync(ALL_LANES, bound, BOUNDED);
    if (a.offset) bound -= to_float(a.offset[min(first + lane % BOUNDED * step, a.classes - 1)]);
    if (a.whole) bound = (bound + certain) * 0.5f;
    bound += SLACK * (1.0f + fabsf(bound));
    return fabsf(bound) < INFINITY ? key(bound) : LAST;
}

template <int K> constexpr int BLOCKS = K == 1 ? 4 : K <= 4 ? 3 : 2;  // on a multiprocessor

// The best `k` ≤ K classes of each pixel.
template <typename T, int K> __global__ void __launch_bounds__(THREADS, BLOCKS<K>) top_labels(const LabelMap<T> a) {
    Shared &shared = *reinterpret_cast<Shared *>(shared_memory());
    const int thread = int(threadIdx.x), lane = thread % 32, warp = thread / 32;
    const Target target(a, int(blockIdx.x));
    find(a, shared.windows, target);
    const int each = (a.classes - 1) / PARTS + 1, parts = (a.classes - 1) / each + 1;
#pragma unroll 1
    for (int part = warp * BOUNDED; part < parts; part += WARPS * BOUNDED) {
        int highest = NONE;
#pragma unroll 1
        for (int i = 0; i < each; ++i) highest = max(highest, bound(a, shared.windows, part * each + i, each, lane));
        if (lane < BOUNDED && part + lane < parts) shared.bounds[part + lane] = highest;
    }
    __syncthreads();

    const Pixel pixel(target, a.from_canvas);
    int64_t best[K];
    unrolled<K>([&](int r) { best[r] = INT64_MIN; });
#pragma unroll 1
    for (int turn = 0;; turn ^= 1) {
        // The part with the largest bound of those that are left, and the lowest of the pixels' k-th scores.
        Choice choice{NONE, LAST, NONE};
#pragma unroll 1
        for (int part = thread; part < parts; part += THREADS) {
            const int key = shared.bounds[part];
            if (key > choice.key) choice.key = key, choice.part = part;
        }
        unrolled<K>([&](int r) { choice.last = r < a.k ? key_of(best[r]) : choice.last; });
        choice = choice_of_warp(choice);
        if (lane == 0) shared.choices[turn][warp] = choice;
        __syncthreads();
        choice = choice_of_warp(shared.choices[turn][lane % WARPS]);
        if (choice.key == NONE || choice.key < choice.last) break;
        const int part = choice.part;
        if (part % THREADS == thread) shared.bounds[part] = NONE;  // done; only this thread looks at it
#pragma unroll 1
        for (int c = part * each; c < min((part + 1) * each, a.classes); ++c) {
            float found[1];
            pixel.score(found, a, shared.windows, c);
            int64_t candidate = order(key(found[0]), c);
            unrolled<K>([&](int r) {
                const int64_t better = max(best[r], candidate);
                candidate = min(best[r], candidate);
                best[r] = better;
            });
        }
    }
    if (!target.inside()) return;
#pragma unroll
    for (int r = 0; r < K; ++r) {
        if (r == a.k) return;
        const int64_t index = target.index() + int64_t(a.out_height) * a.out_width * r;
        a.labels[index] = number_of(best[r]);
        if (a.scores) a.scores[index] = rounded<T>(score_of(key_of(best[r])));
    }
}

// All scores.
template <typename T> __global__ void __launch_bounds__(THREADS, 3) score_map(const LabelMap<T> a) {
    Shared &shared = *reinterpret_cast<Shared *>(shared_memory());
    const int runs = (a.classes - 1) / EACH_BLOCK + 1;
    const Target target(a, int(blockIdx.x) / runs);
    find(a, shared.windows, target);
    const Pixel pixel(target, a.from_canvas);
    const int first = int(blockIdx.x) % runs * EACH_BLOCK, end = min(first + EACH_BLOCK, a.classes);
#pragma unroll 1
    for (int c = first; c < end; c += TOGETHER) {
        float found[TOGETHER];
        pixel.score(found, a, shared.windows, c);
        unrolled<TOGETHER>([&](int i) {
            const int64_t index = target.index() + int64_t(a.out_height) * a.out_width * (c + i);
            if (c + i < end && target.inside()) a.scores[index] = rounded<T>(found[i]);
        });
    }
}

}  // namespace
}  // namespace ovseg

int ovseg_label_map_fwd(const void *logits, const void *whole, const void *offset, const int64_t *positions,
                        void *scores, int32_t *labels, int64_t windows, int64_t classes, int64_t height, int64_t width,
                        int64_t window_height, int64_t window_width, int64_t canvas_height, int64_t canvas_width,
                        int64_t out_height, int64_t out_width, int64_t k, int dtype, int device, void *stream) {
    using namespace ovseg;
    for (const int64_t size :
         {classes, height, width, window_height, window_width, canvas_height, canvas_width, out_height, out_width}) {
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
        auto a = filled<LabelMap<T>>(logits, whole, offset, scores, labels, height * width, windows, classes, k,
                                     out_height, out_width, window_height, window_width,
                                     Resizing(height, width, window_height, window_width),
                                     Resizing(window_height, window_width, canvas_height, canvas_width),
                                     Resizing(canvas_height, canvas_width, out_height, out_width));
        for (int n = 0; n < windows; ++n) a.tops[n] = int(positions[2 * n]), a.lefts[n] = int(positions[2 * n + 1]);
        if (k == 0) {
            const int64_t runs = (classes - 1) / EACH_BLOCK + 1;
            return launch(score_map<T>, tiles * runs, THREADS, sizeof(Shared), device, stream, a);
        }
        const auto kernel = k == 1 ? top_labels<T, 1> : k <= 4 ? top_labels<T, 4> : top_labels<T, MOST_LABELS>;
        return launch(kernel, tiles, THREADS, sizeof(Shared), device, stream, a);
    });
}
