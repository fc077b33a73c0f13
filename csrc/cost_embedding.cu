// Cost embedding: a convolution over every class's cost map, which is never stored.
//
//     out[b, t, y, x, c] = bias[c] + Σ_pij weight[c, p, i, j] · cost[b, t, p, y + i − r, x + j − r],    r = K // 2
//
// with the cosines of image and text embeddings as cost, and 0 outside the map.
//
// A block takes a tile of the map that has, with its halo, up to 128 pixels, and 16 text embeddings: 16 classes with
// one prompt each, else 16 prompts of a class after another. One product gives the costs of tile and halo, in shared
// memory. Windows gathered from there are the rows of a second product, with the weights (P · K², C), whose columns are
// permuted so that a lane's outputs are neighbours: see `column_of`.
//
// Padding never meets an infinite or NaN weight, as 0 · ∞ would spread it: products take the finite part of the
// weights, `add_rest` the rest.

#include "device/copies.cuh"
#include "device/cosines.cuh"
#include "device/map_tiles.h"

namespace ovseg {
namespace {

constexpr int RING = 3;
constexpr int OUTPUTS = 128;         // at a time
constexpr int TAPS = 64;             // elements of the windows at a time
constexpr int PITCH = PIXELS + 8;    // between the costs of two texts, so that they lie in other banks
constexpr int ZERO = TEXTS * PITCH;  // index of a zero behind them
constexpr int WARPS = COSINE_THREADS / 32;

template <typename T> constexpr int GROUP = 4 * VEC<T>;  // outputs of which a lane has VEC neighbours

template <typename T> struct Arguments {
    const T *image, *text, *weight, *bias;
    T *out;
    MapTiles tiles;
    int classes, prompts, height, width, channels, outputs, size;
};

template <typename T> struct Shared {
    unsigned char ring[RING * Embeddings<T>::BYTES];
    unsigned char weights[OUTPUTS * TAPS * sizeof(T)];
    float bias[OUTPUTS];
    T costs[ZERO + 8];
    int sources[PIXELS];  // of tile and halo: positions in the map, −1 beyond
    int targets[PIXELS];  // of the tile, likewise
    int corners[PIXELS];  // where the windows of the tile's pixels begin, among tile and halo
    int offsets[TAPS];    // from there to an element of the window, among the costs
    int not_finite;       // a weight
};
static_assert(sizeof(Shared<float>) <= SHARED_EVERYWHERE, "see platform.cuh");

// The column of output c of a group: a lane's columns 2t, 2t + 1 of each 8 are VEC neighbours.
template <typename T> DEVICE int column_of(int c) { return c % VEC<T> / 2 * 8 + c / VEC<T> * 2 + c % 2; }

// A block's share of the work.
template <typename T> struct Block {
    const Arguments<T> &a;
    Shared<T> &shared;
    int first, present;  // classes
    const T *image, *text;
    T *out;

    // Finds it, by all threads; a barrier has to follow.
    DEVICE Block(const Arguments<T> &a, Shared<T> &shared) : a(a), shared(shared) {
        const int together = a.prompts == 1 ? TEXTS : 1, groups = (a.classes + together - 1) / together;
        const int tile = int(blockIdx.x) % a.tiles.count, group = int(blockIdx.x) / a.tiles.count;
        const int64_t map = int64_t(a.height) * a.width, batch = group / groups;
        first = group % groups * together;
        present = min(together, a.classes - first);
        image = a.image + batch * map * a.channels;
        text = a.text + int64_t(first) * a.prompts * a.channels;
        out = a.out + (batch * a.classes + first) * map * a.outputs;
        const int top = tile / a.tiles.across * a.tiles.height, left = tile % a.tiles.across * a.tiles.width;
        const int halo_width = a.tiles.width + a.size - 1;
        const auto position = [&](int y, int x, bool real) {
            return real && y >= 0 && y < a.height && x >= 0 && x < a.width ? y * a.width + x : -1;
        };
        const int i = int(threadIdx.x);
        if (i < PIXELS) {
            const int row = i / halo_width, y = i / a.tiles.width, x = i % a.tiles.width;
            shared.sources[i] =
                position(top - a.size / 2 + row, left - a.size / 2 + i % halo_width, row < a.tiles.height + a.size - 1);
            shared.targets[i] = position(top + y, left + x, y < a.tiles.height);
            shared.corners[i] = y < a.tiles.height ? y * halo_width + x : 0;
        }
        if (i < 8) shared.costs[ZERO + i] = rounded<T>(0.0f);
        if (i == 0) shared.not_finite = 0;
    }

    DEVICE int items() const { return present * a.tiles.height * a.tiles.width; }

    // The costs of `texts` embeddings from prompt `prompt` on, whose copies begin with `stages`.
    DEVICE Embeddings<T> embeddings(int prompt, int texts) const {
        return Embeddings<T>(image, text + int64_t(prompt) * a.channels, shared.sources, texts, a.channels);
    }

    template <typename Stages> DEVICE void find_costs(Stages &stages, int warp, int lane) const {
        Acc acc[TEXTS / 8];
        cosines<T>(acc, stages, warp, lane);
        each_value<TEXTS / 8>([&](int n, int i) {
            const int pixel = 16 * warp + acc_row(lane, i);  // beyond the map 0, also where the text is NaN
            shared.costs[(8 * n + acc_col(lane, i)) * PITCH + pixel] =
                rounded<T>(shared.sources[pixel] >= 0 ? acc[n].value[i] : 0.0f);
        });
    }

    // Loads `taps` weights of OUTPUTS outputs from `output` on: elements from `tap` on, counted from `prompt`.
    DEVICE void load_weights(int output, int prompt, int tap, int taps) const {
        constexpr int AT_ONCE = COSINE_THREADS / TAPS;
        const Tile<T, TAPS> tile{shared.weights};
        const int area = a.size * a.size, i = recomputed(int(threadIdx.x)) % COSINE_THREADS;
        const int first = i / TAPS, column = i % TAPS, left = column < taps ? a.outputs - output - first : 0;
        const int64_t pitch = int64_t(a.prompts) * area;
        const T *source = a.weight + (output + first) * pitch + int64_t(prompt) * area + tap + column;
        bool all_finite = true;
#pragma unroll
        for (int at = 0; at < OUTPUTS; at += AT_ONCE, source += AT_ONCE * pitch) {
            const float value = at < left ? to_float(*source) : 0.0f;
            const bool finite = fabsf(value) < INFINITY;
            const int row = first + at;
            all_finite = all_finite && finite;
            *tile.at(row / GROUP<T> * GROUP<T> + column_of<T>(row % GROUP<T>), column) =
                rounded<T>(finite ? value : 0.0f);
        }
        if (!all_finite) shared.not_finite = 1;
        if (i < OUTPUTS) shared.bias[i] = output + i < a.outputs ? to_float(a.bias[output + i]) : 0.0f;
        if (i < TAPS) {
            const int whole = (tap + i) / area, element = (tap + i) % area;
            shared.offsets[i] =
                i >= taps ? ZERO : whole * PITCH + element / a.size * (a.tiles.width + a.size - 1) + element % a.size;
        }
    }
};

// 16 windows as the rows of a product: an item is a pixel of the tile of one of the classes.
template <typename T> struct Windows16 {
    const Block<T> &block;
    int corners[2];  // of a lane's two rows, among the costs
    int tokens[2];   // among those of the block's classes; −1 where there is none

    DEVICE Windows16(const Block<T> &block, int first, int lane) : block(block) {
        const int pixels = block.a.tiles.height * block.a.tiles.width;
        unrolled<2>([&](int i) {
            const int item = first + acc_row(lane, 2 * i), which = item / pixels, pixel = item % pixels;
            corners[i] = 0, tokens[i] = -1;
            if (item < block.items()) {
                const int position = block.shared.targets[pixel];
                corners[i] = which * PITCH + block.shared.corners[pixel];
                if (position >= 0) tokens[i] = which * (block.a.height * block.a.width) + position;
            }
        });
    }

    DEVICE FragA at(int k, int lane) const {
        const Shared<T> &shared = block.shared;
        FragA frag_a;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if constexpr (sizeof(T) == 2) {
                const Pair<int> offset = load<int, 2>(shared.offsets + k * K<T> + lane % 4 * 2 + i / 2 * 8);
                const Pair<T> pair{{shared.costs[min(corners[i % 2] + offset.value[0], ZERO)],
                                    shared.costs[min(corners[i % 2] + offset.value[1], ZERO)]}};
                memcpy(&frag_a.word[i], &pair, 4);
            } else {
                const int offset = shared.offsets[k * K<T> + lane % 4 + i / 2 * 4];
                frag_a.word[i] = __float_as_uint(shared.costs[min(corners[i % 2] + offset, ZERO)]);
            }
        }
        return frag_a;
    }

    // Adds the weights that are not finite, one after another, where the element of the window lies within the map.
    DEVICE void add_rest(Acc (&acc)[GROUP<T> / 8], int output, int prompt, int tap, int taps, int lane) const {
        const Arguments<T> &a = block.a;
        const int64_t area = a.size * a.size;
#pragma unroll 1
        for (int i = 0; i < taps; ++i) {
            lane = recomputed(lane);
#pragma unroll
            for (int j = 0; j < VEC<T>; ++j) {
                const int c = output + lane % 4 * VEC<T> + j;
                if (c >= a.outputs) continue;
                const float weight = to_float(a.weight[(int64_t(c) * a.prompts + prompt) * area + tap + i]);
                if (fabsf(weight) < INFINITY) continue;
#pragma unroll
                for (int row = 0; row < 2; ++row) {
                    const int index = corners[row] + block.shared.offsets[i];
                    if (block.shared.sources[index % PITCH] < 0) continue;
                    acc[j / 2].value[2 * row + j % 2] += to_float(block.shared.costs[index]) * weight;
                }
            }
        }
    }

    // Of the group that begins at output `first` of those from `output` on.
    DEVICE void store_outputs(const Acc (&acc)[GROUP<T> / 8], int output, int first, int lane) const {
        const Arguments<T> &a = block.a;
        const int index = first + lane % 4 * VEC<T>, left = a.outputs - output - index;
        float bias[VEC<T>];
#pragma unroll
        for (int j = 0; j < VEC<T>; j += 4) {
            const Vector<float, 4> four = load<float, 4>(block.shared.bias + index + j);
            unrolled<4>([&](int i) { bias[j + i] = four.value[i]; });
        }
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            if (tokens[row] < 0) continue;
            Vec<T> vec;
            unrolled<VEC<T>>([&](int j) { vec.value[j] = rounded<T>(acc[j / 2].value[2 * row + j % 2] + bias[j]); });
            T *const target = block.out + int64_t(tokens[row]) * a.outputs + output + index;
            if (whole_vecs<T>(a.outputs))
                store_if(left > 0, target, vec);
            else
                store_vec(target, 0, left, false, vec);
        }
    }
};

// acc += windows · weights of a step of K, for M times 16 windows and a group of outputs.
template <typename T, int M>
DEVICE void multiply(Acc (&acc)[M][GROUP<T> / 8], const FragA (&frag_a)[M], Tile<T, TAPS> weights, int k, int lane) {
#pragma unroll
    for (int n = 0; n < GROUP<T> / 8; n += 2) {
        const FragB2 frag_b = load_b(weights.rows_from(8 * n), k, lane);
        unrolled<M>([&](int m) { mma<T>(acc[m] + n, frag_a[m], frag_b); });
    }
}

// One prompt a class and windows of up to TAPS elements, as published: windows stay in registers for all outputs.
template <typename T> __global__ void __launch_bounds__(COSINE_THREADS, 2) embed_one_prompt(const Arguments<T> a) {
    constexpr int M = sizeof(T) == 2 ? 2 : 1, STEPS = TAPS / K<T>;
    Shared<T> &shared = *reinterpret_cast<Shared<T> *>(shared_memory());
    const int warp = int(threadIdx.x) / 32;
    int lane = int(threadIdx.x) % 32;
    const Block<T> block(a, shared);
    __syncthreads();
    Stages<RING, Embeddings<T>::BYTES, Embeddings<T>> stages(shared.ring, block.embeddings(0, block.present));
    const int taps = a.size * a.size;
    block.load_weights(0, 0, 0, taps);
    block.find_costs(stages, warp, lane);
    __syncthreads();
#pragma unroll 1
    for (int output = 0; output < a.outputs; output += OUTPUTS) {
        if (output) {
            __syncthreads();  // nobody reads the weights before any more
            block.load_weights(output, 0, 0, taps);
            __syncthreads();
        }
#pragma unroll 1
        for (int item = warp * 16 * M; item < block.items(); item += WARPS * 16 * M) {
            const Windows16<T> windows[2] = {{block, item, lane}, {block, item + 16 * (M - 1), lane}};
            FragA frag_a[STEPS][M];
#pragma unroll
            for (int k = 0; k < STEPS; ++k) {
                if (k * K<T> >= taps) continue;
                unrolled<M>([&](int m) { frag_a[k][m] = windows[m].at(k, lane); });
            }
            const int end = min(a.outputs - output, OUTPUTS);
#pragma unroll 1
            for (int c = 0; c < end; c += GROUP<T>) {
                lane = recomputed(lane);
                Acc acc[M][GROUP<T> / 8] = {};
#pragma unroll
                for (int k = 0; k < STEPS; ++k) {
                    if (k * K<T> >= taps) continue;
                    multiply<T, M>(acc, frag_a[k], Tile<T, TAPS>{shared.weights}.rows_from(c), k, lane);
                }
                unrolled<M>([&](int m) {
                    if (shared.not_finite) windows[m].add_rest(acc[m], output + c, 0, 0, taps, lane);
                    windows[m].store_outputs(acc[m], output, c, lane);
                });
            }
        }
    }
}

// Any number of prompts and any window: a warp keeps the sums of 16 windows and a group of outputs.
template <typename T> __global__ void __launch_bounds__(COSINE_THREADS, 2) embed(const Arguments<T> a) {
    Shared<T> &shared = *reinterpret_cast<Shared<T> *>(shared_memory());
    const int warp = int(threadIdx.x) / 32;
    int lane = int(threadIdx.x) % 32;
    const Block<T> block(a, shared);
    const int area = a.size * a.size;
    constexpr int GROUPS = OUTPUTS / GROUP<T>;
    const int jobs = (block.items() + 15) / 16 * GROUPS;
    bool found = false;
    __syncthreads();
#pragma unroll 1
    for (int output = 0; output < a.outputs; output += OUTPUTS) {
#pragma unroll 1
        for (int job = warp; job - warp < jobs; job += WARPS) {
            const int c = job % GROUPS * GROUP<T>;
            const Windows16<T> windows(block, job / GROUPS * 16, lane);
            Acc acc[1][GROUP<T> / 8] = {};
#pragma unroll 1
            for (int prompt = 0; prompt < a.prompts; prompt += TEXTS) {
                const int prompts = min(TEXTS, a.prompts - prompt), texts = a.prompts == 1 ? block.present : prompts;
                if (!found || a.prompts > TEXTS) {
                    __syncthreads();
                    Stages<RING, Embeddings<T>::BYTES, Embeddings<T>> stages(shared.ring,
                                                                             block.embeddings(prompt, texts));
                    block.find_costs(stages, warp, lane);
                    found = true;
                }
#pragma unroll 1
                for (int tap = 0; tap < prompts * area; tap += TAPS) {
                    const int taps = min(TAPS, prompts * area - tap);
                    lane = recomputed(lane);
                    __syncthreads();
                    block.load_weights(output, prompt, tap, taps);
                    __syncthreads();
#pragma unroll 1
                    for (int k = 0; k * K<T> < taps; ++k) {
                        const FragA frag_a[1] = {windows.at(k, lane)};
                        multiply<T, 1>(acc, frag_a, Tile<T, TAPS>{shared.weights}.rows_from(c), k, lane);
                    }
                    if (shared.not_finite) windows.add_rest(acc[0], output + c, prompt, tap, taps, lane);
                }
            }
            windows.store_outputs(acc[0], output, c, lane);
        }
    }
}

}  // namespace
}  // namespace ovseg

int ovseg_cost_embedding_fwd(const void *image, const void *text, const void *weight, const void *bias, void *out,
                             int64_t batch, int64_t height, int64_t width, int64_t channels, int64_t classes,
                             int64_t prompts, int64_t outputs, int64_t size, int dtype, int device, void *stream) {
    using namespace ovseg;
    if (size < 1 || size > LARGEST_WINDOW || size % 2 == 0 || height < 1 || width < 1 ||
        height > INT32_MAX / TEXTS / width || channels < 1 || channels > INT32_MAX / 2 || classes < 1 ||
        classes > INT32_MAX / 2 || prompts < 1 || prompts > INT32_MAX / 2 / (size * size) || outputs > INT32_MAX / 2) {
        return OVSEG_UNSUPPORTED_SIZE;
    }
    if (!aligned(image, text, weight, bias, out)) return OVSEG_MISALIGNED;
    const MapTiles tiles = MapTiles::with_halo(int(height), int(width), int(size), PIXELS);
    const int64_t together = prompts == 1 ? TEXTS : 1;
    const int64_t groups = batch * ((classes + together - 1) / together);
    if (groups > INT32_MAX) return OVSEG_TOO_LARGE;
    return by_dtype(dtype, [&](auto number) {
        using T = decltype(number);
        const auto a = filled<Arguments<T>>(image, text, weight, bias, out, tiles, classes, prompts, height, width,
                                            channels, outputs, size);
        const auto kernel = prompts == 1 && size * size <= TAPS ? embed_one_prompt<T> : embed<T>;
        return launch(kernel, groups * tiles.count, COSINE_THREADS, sizeof(Shared<T>), device, stream, a);
    });
}
