// Backward of the cost embedding's convolution to its weight and bias. From the gradient g of its output, with
// r = K // 2 and t over all maps:
//
//     dweight[c, p, i, j]  = Σ_tyx g[t, y, x, c] · cost[t, p, y + i − r, x + j − r]
//     dbias[c]             = Σ_tyx g[t, y, x, c]
//
// where g and cost are 0 outside the map.
//
// A block sums over a share of all maps' tiles, the bias being an element of the window that always sees a cost of 1; a
// second kernel adds the shares in a fixed order.

#include "device/cosines.cuh"
#include "device/map_tiles.h"

namespace ovseg {
namespace {

constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int TAPS = 64;          // elements of the windows, of a block
constexpr int SIDE = 32;          // of a tile, at most
constexpr int CHANNELS = 128;     // of the gradient, that a block sums; half of them to a warp
constexpr int MOST_PIXELS = 256;  // of a tile
constexpr int MOST_COSTS = 1040;  // of a tile with its halo
constexpr int RING = 3;

template <typename T> struct Arguments {
    const T *grad, *cost;
    float *partial;
    MapTiles tiles;
    int jobs, share;  // tiles of all maps, and of a part
    int prompts, height, width, outputs, size, tap_groups, channel_groups;
};

// A job's tile: its map and its first pixel.
struct JobTile {
    int64_t map;
    int top, left;

    DEVICE JobTile(const MapTiles &tiles, int job) : map(job / tiles.count) {
        const int tile = job % tiles.count;
        top = tile / tiles.across * tiles.height, left = tile % tiles.across * tiles.width;
    }

    DEVICE void advance(const MapTiles &tiles, int height, int width) {
        left += tiles.width;
        if (left < width) return;
        left = 0, top += tiles.height;
        if (top < height) return;
        top = 0, ++map;
    }
};

// Stages of the gradient: a few pixels of a tile after another. A thread copies a vector of every AT_ONCE-th of them.
template <typename T> struct Gradients {
    static constexpr int ROWS = 64 / int(sizeof(T)) * 2, VECS = CHANNELS / VEC<T>;
    static constexpr int PITCH = CHANNELS * int(sizeof(T)), BYTES = ROWS * PITCH;
    static constexpr int AT_ONCE = THREADS / VECS;
    static_assert(AT_ONCE % 8 == 0, "rows are permuted alike");

    const Arguments<T> &a;
    const short *pixels;  // of a tile, see below; of the thread's first row
    int jobs;
    int column, target;  // of the thread's vectors; the first one's offset in a tile
    JobTile tile;
    int pixel = 0;  // the next stage's first one

    DEVICE Gradients(const Arguments<T> &a, const short *all, int first, int end, int channel)
        : a(a), jobs(max(end - first, 0)), tile(a.tiles, first) {
        const int thread = recomputed(int(threadIdx.x)), row = thread / VECS, vec = thread % VECS;
        pixels = all + row, column = channel + vec * VEC<T>;
        target = tile_offset<PITCH>(row, vec);
    }

    DEVICE int count() const { return a.tiles.height * a.tiles.width; }  // of a tile's pixels
    DEVICE int stages() const { return jobs * ((count() + ROWS - 1) / ROWS); }

    DEVICE void operator()(int, unsigned char *buffer) {
        const T *const source = a.grad + ((tile.map * a.height + tile.top) * a.width + tile.left) * a.outputs + column;
        const int bottom = a.height - tile.top, right = a.width - tile.left, left = a.outputs - column;
        constexpr int COUNT = ROWS / AT_ONCE;
        int sources[COUNT];
        unrolled<COUNT>([&](int i) { sources[i] = pixels[pixel + i * AT_ONCE]; });
        with_constant(whole_vecs<T>(a.outputs), [&](auto whole) {
            unrolled<COUNT>([&](int i) {
                const int y = int(uint32_t(sources[i]) / SIDE), x = int(uint32_t(sources[i]) % SIDE);
                const bool inside = sources[i] >= 0 && y < bottom && x < right;
                copy_vec(buffer + target + i * AT_ONCE * PITCH,
                         source + int64_t(inside ? y * a.width + x : 0) * a.outputs, inside ? left : 0, whole);
            });
        });
        pixel += ROWS;
        if (pixel < count()) return;
        pixel = 0;
        tile.advance(a.tiles, a.height, a.width);
    }
};

template <typename T> struct Shared {
    unsigned char ring[RING * Gradients<T>::BYTES];
    T costs[MOST_COSTS + 8];                          // of tile and halo; behind all a zero and a one
    short corners[MOST_PIXELS + Gradients<T>::ROWS];  // of each pixel's window among them
    short pixels[MOST_PIXELS + Gradients<T>::ROWS];   // row · SIDE + column in the tile, −1 beyond
};

template <typename T> __global__ void __launch_bounds__(THREADS, 2) weight_gradient(const Arguments<T> a) {
    constexpr int ZERO = MOST_COSTS, ONE = MOST_COSTS + 1, STEPS = Gradients<T>::ROWS / K<T>;
    Shared<T> &shared = *reinterpret_cast<Shared<T> *>(shared_memory());
    const int thread = int(threadIdx.x), lane = thread % 32, warp = thread / 32;
    const int halo_width = a.tiles.width + a.size - 1, area = a.size * a.size, radius = a.size / 2;
    const int costs = (a.tiles.height + a.size - 1) * halo_width, pixels = a.tiles.height * a.tiles.width;
    int index = int(blockIdx.x);
    const int channel = index % a.channel_groups * CHANNELS + warp / 4 * (CHANNELS / 2);
    index /= a.channel_groups;
    const int tap = index % a.tap_groups * TAPS + warp % 4 * 16 + lane / 4;
    index /= a.tap_groups;
    const int prompt = index % a.prompts, part = index / a.prompts;
    const int first = part * a.share, end = min(first + a.share, a.jobs);

    for (int i = thread; i < MOST_PIXELS + Gradients<T>::ROWS; i += THREADS) {
        const int y = i / a.tiles.width, x = i % a.tiles.width;
        shared.corners[i] = short(i < pixels ? y * halo_width + x : 0);
        shared.pixels[i] = short(i < pixels ? y * SIDE + x : -1);
    }
    for (int i = thread; i < MOST_COSTS + 8; i += THREADS) shared.costs[i] = rounded<T>(i == ONE ? 1.0f : 0.0f);
    __syncthreads();

    // Of a lane's two rows: where the element lies in its window, and that a constant lies in none.
    int offset[2], corner_counts[2];
    unrolled<2>([&](int i) {
        const int element = tap + 8 * i;
        corner_counts[i] = element < area;
        offset[i] = element < area ? element / a.size * halo_width + element % a.size : element == area ? ONE : ZERO;
    });
    Acc sums[CHANNELS / 16] = {};
    Stages<RING, Gradients<T>::BYTES, Gradients<T>> stages(
        shared.ring, Gradients<T>(a, shared.pixels, first, end, channel / CHANNELS * CHANNELS));
    const int first_y = thread / halo_width, first_x = thread % halo_width;  // of the thread's costs
    const int rows_on = THREADS / halo_width, columns_on = THREADS % halo_width;
    JobTile tile(a.tiles, first);
#pragma unroll 1
    for (int job = first; job < end; ++job, tile.advance(a.tiles, a.height, a.width)) {
        const T *const volume = a.cost + (tile.map * a.prompts + prompt) * a.height * a.width;
        __syncthreads();  // nobody reads the costs of the tile before any more
        int y = tile.top - radius + first_y, x = first_x;
#pragma unroll 4
        for (int i = thread; i < costs; i += THREADS) {
            const int column = tile.left - radius + x;
            const bool inside = y >= 0 && y < a.height && column >= 0 && column < a.width;
            shared.costs[i] = inside ? volume[y * a.width + column] : rounded<T>(0.0f);
            y += rows_on, x += columns_on;
            if (x >= halo_width) x -= halo_width, ++y;
        }
#pragma unroll 1
        for (int row = 0; row < pixels; row += Gradients<T>::ROWS) {
            const Tile<T, CHANNELS> grads{stages.next()};
#pragma unroll(sizeof(T) == 2 ? 2 : 1)  // float32 is short of registers
            for (int k = 0; k < STEPS; ++k) {
                const short *const corners = shared.corners + row + k * K<T> + lane % 4 * 2;
                FragA frag_a;
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const auto cost = [&](int pixel) {
                        return shared.costs[corners[pixel] * corner_counts[i % 2] + offset[i % 2]];
                    };
                    if constexpr (sizeof(T) == 2) {
                        const Pair<T> pair{{cost(i / 2 * 8), cost(i / 2 * 8 + 1)}};
                        memcpy(&frag_a.word[i], &pair, 4);
                    } else {  // in the order of `load_b_by_rows`
                        frag_a.word[i] = __float_as_uint(cost(i / 2));
                    }
                }
                unrolled<CHANNELS / 32>([&](int n) {
                    mma<T>(sums + 2 * n, frag_a, load_b_by_rows(grads, k, warp / 4 * (CHANNELS / 32) + n, lane));
                });
            }
        }
    }
    each_value<CHANNELS / 16>([&](int n, int i) {
        const int c = channel + 8 * n + acc_col(lane, i), element = tap + i / 2 * 8;
        if (c >= a.outputs || element > area) return;
        a.partial[((int64_t(part) * a.outputs + c) * a.prompts + prompt) * (area + 1) + element] = sums[n].value[i];
    });
}

// Adds the parts up: every 32 neighbours of a block's threads read 32 neighbours of a part, eight parts at a time.
template <typename T>
__global__ void __launch_bounds__(THREADS)
    sum_parts(const float *partial, T *grad_weight, T *grad_bias, int64_t size, int parts, int prompts, int area) {
    float (&sums)[WARPS][32] = *reinterpret_cast<float (*)[WARPS][32]>(shared_memory());
    const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
    const int64_t i = int64_t(blockIdx.x) * 32 + lane;
    float sum = 0.0f;
    if (i < size) {
#pragma unroll 8
        for (int part = warp; part < parts; part += WARPS) sum += partial[part * size + i];
    }
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp || i >= size) return;
    sum = 0.0f;
    unrolled<WARPS>([&](int i) { sum += sums[i][lane]; });
    const int64_t map = i / (area + 1);  // of the weight: output and prompt
    const int element = int(i - map * (area + 1));
    if (element < area) {
        grad_weight[map * area + element] = rounded<T>(sum);
    } else if (map % prompts == 0) {
        grad_bias[map / prompts] = rounded<T>(sum);
    }
}

}  // namespace
}  // namespace ovseg

int ovseg_cost_embedding_weight_bwd(const void *grad, const void *cost, float *partial, void *grad_weight,
                                    void *grad_bias, int64_t maps, int64_t prompts, int64_t height, int64_t width,
                                    int64_t outputs, int64_t size, int64_t parts, int dtype, int device, void *stream) {
    using namespace ovseg;
    if (!takes_convolution(maps, prompts, height, width, outputs, size) || parts < 1) return OVSEG_UNSUPPORTED_SIZE;
    if (!aligned(grad, cost, partial, grad_weight, grad_bias)) return OVSEG_MISALIGNED;
    const MapTiles across = MapTiles::even(int(height), int(width), SIDE, SIDE);
    const MapTiles tiles =
        MapTiles::even(int(height), int(width), std::min(2 * SIDE, MOST_PIXELS / across.width), SIDE);
    const int64_t area = size * size, jobs = maps * tiles.count;
    const int tap_groups = int((area + TAPS) / TAPS), channel_groups = int((outputs + CHANNELS - 1) / CHANNELS);
    if (jobs > INT32_MAX / 2 || parts > INT32_MAX / 2 || parts > INT32_MAX / (prompts * tap_groups)) {
        return OVSEG_TOO_LARGE;
    }
    return by_dtype(dtype, [&](auto number) {
        using T = decltype(number);
        const auto a = filled<Arguments<T>>(grad, cost, partial, tiles, jobs, (jobs + parts - 1) / parts, prompts,
                                            height, width, outputs, size, tap_groups, channel_groups);
        if (const int error = launch(weight_gradient<T>, parts * prompts * tap_groups * channel_groups, THREADS,
                                     sizeof(Shared<T>), device, stream, a))
            return error;
        const int64_t sums = outputs * prompts * (area + 1);
        return launch(sum_parts<T>, (sums + 31) / 32, THREADS, sizeof(float) * THREADS, device, stream, partial,
                      grad_weight, grad_bias, sums, parts, prompts, area);
    });
}
