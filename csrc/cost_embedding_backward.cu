// Backward of the cost embedding's convolution. From the gradient g of its output, with r = K // 2 and t over all maps:
//
//     z[y, x, i, j]        = Σ_c g[t, y, x, c] · weight[c, p, i, j]
//     dcost[t, p, y, x]    = Σ_ij z[y + r − i, x + r − j, i, j]
//     dweight[c, p, i, j]  = Σ_tyx g[t, y, x, c] · cost[t, p, y + i − r, x + j − r]
//     dbias[c]             = Σ_tyx g[t, y, x, c]
//
// where g and cost are 0 outside the map.
//
// dcost: a block takes a tile of up to 32 × 32 pixels of a map, which it keeps as sums in registers, and works out z for a
// few rows of the tile and its halo at a time. No pixel outside the map is read or multiplied.
// dweight: a block sums over a share of all maps' tiles, with the bias as an element of the window that always sees a cost
// of 1; a second kernel adds the shares up, always in the same order.

#include "device/cosines.cuh"
#include "device/map_tiles.h"

namespace ovseg {
namespace {

constexpr int LARGEST = 11;  // window
constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int TAPS = 64;  // elements of the windows at a time

// --- dcost ---

constexpr int SOURCES = WARPS * 16;  // pixels whose z is worked out at a time
constexpr int SIDE = 32;             // of a tile
constexpr int SUMS = SIDE * SIDE / THREADS;
constexpr int COST_RING = 4;
constexpr int PITCH = SOURCES + 4;  // between the z of two elements of the window: a warp writes to other banks

template <typename T>
struct CostArguments {
    const T *grad, *taps;
    T *grad_cost;
    MapTiles tiles;
    int prompts, height, width, outputs, size;
};

// A tile of the map and the rectangle of pixels, within the map, whose windows reach into it.
struct Region {
    int top, left, bottom, right;
    int first_row, end_row, first_column, columns;
    int at_once;  // rows of SOURCES pixels or less

    __device__ __forceinline__ Region(const MapTiles &tiles, int tile, int height, int width, int size) {
        const int radius = size / 2;
        top = tile / tiles.across * tiles.height, left = tile % tiles.across * tiles.width;
        bottom = min(top + tiles.height, height), right = min(left + tiles.width, width);
        first_row = max(top - radius, 0), end_row = min(bottom + radius, height);
        first_column = max(left - radius, 0), columns = min(right + radius, width) - first_column;
        at_once = SOURCES / columns;
    }
};

// Stages of both factors of z: SOURCES pixels' gradients and TAPS elements of the window.
template <typename T>
struct GradientsAndTaps {
    static constexpr int WIDTH = 64 / int(sizeof(T));
    static constexpr int BYTES = (SOURCES + TAPS) * 64;

    const T *grad, *taps;  // of the map, of the prompt
    const int *places;     // of the pixels, counted from the first one of the rows at hand
    Region region;
    int width, outputs, size;

    __device__ __forceinline__ int steps() const { return (outputs + WIDTH - 1) / WIDTH; }
    __device__ __forceinline__ int groups() const {
        return (region.end_row - region.first_row + region.at_once - 1) / region.at_once;
    }
    __device__ __forceinline__ int rows_of_window() const { return TAPS / size; }
    __device__ __forceinline__ int stages() const {
        return steps() * groups() * ((size + rows_of_window() - 1) / rows_of_window());
    }

    __device__ __forceinline__ void operator()(int stage, unsigned char *buffer) const {
        constexpr int PIECES = 4, EACH = 16 / int(sizeof(T));
        const Tile<T, WIDTH> tile{buffer};
        const int column = stage % steps() * WIDTH, group = stage / steps() % groups();
        const int tap = stage / steps() / groups() * rows_of_window() * size;
        const int row = region.first_row + group * region.at_once;
        const int present = min(region.at_once, region.end_row - row) * region.columns;
        const T *const source = grad + (int64_t(row) * width + region.first_column) * outputs;
        const bool whole = outputs % EACH == 0;
#pragma unroll 1
        for (int i = int(threadIdx.x); i < (SOURCES + TAPS) * PIECES; i += THREADS) {
            const int own = i / PIECES, piece = i % PIECES, element = tap + own - SOURCES;
            const bool of_grad = own < SOURCES, there = of_grad ? own < present : element < size * size;
            const T *const first = of_grad ? source + int64_t(there ? places[own] : 0) * outputs
                                           : taps + int64_t(there ? element : 0) * outputs;
            copy_piece(tile.piece(own, piece), first, column + piece * EACH, outputs, there, whole);
        }
    }
};

template <typename T>
struct CostShared {
    unsigned char ring[COST_RING * GradientsAndTaps<T>::BYTES];
    float z[TAPS * PITCH];
    int places[SOURCES];
};

template <typename T>
__global__ void __launch_bounds__(THREADS, 2) cost_gradient(const CostArguments<T> a) {
    using Fetch = GradientsAndTaps<T>;
    CostShared<T> &shared = *reinterpret_cast<CostShared<T> *>(shared_memory());
    const int thread = int(threadIdx.x), warp = thread / 32, radius = a.size / 2;
    int lane = thread % 32;
    const int64_t map = int(blockIdx.x) / a.tiles.count, pixels = int64_t(a.height) * a.width;
    const Region region(a.tiles, int(blockIdx.x) % a.tiles.count, a.height, a.width, a.size);
    if (thread < SOURCES) shared.places[thread] = thread / region.columns * a.width + thread % region.columns;
    __syncthreads();
    const Fetch fetch{a.grad + map / a.prompts * pixels * a.outputs,
                      a.taps + map % a.prompts * (a.size * a.size) * a.outputs, shared.places, region, a.width,
                      a.outputs, a.size};
    Stages<COST_RING, Fetch::BYTES, Fetch> stages(shared.ring, fetch);
    float sums[SUMS] = {};
    int pixels_of_tile[SUMS];  // of which these are: row and column in the tile, or −1
#pragma unroll
    for (int own = 0; own < SUMS; ++own) {
        const int pixel = own * THREADS + thread, y = pixel / a.tiles.width, x = pixel % a.tiles.width;
        const bool real = region.top + y < region.bottom && region.left + x < region.right;
        pixels_of_tile[own] = real ? y * SIDE + x : -1;
    }
#pragma unroll 1
    for (int first_i = 0; first_i < a.size; first_i += fetch.rows_of_window()) {
        const int end_i = min(first_i + fetch.rows_of_window(), a.size);
#pragma unroll 1
        for (int row = region.first_row; row < region.end_row; row += region.at_once) {
            const int end_row = min(row + region.at_once, region.end_row);
            lane = recomputed(lane);
            D z[TAPS / 8] = {};
#pragma unroll 1
            for (int step = 0; step < fetch.steps(); ++step) {
                const Tile<T, Fetch::WIDTH> tile{stages.next()};
#pragma unroll(sizeof(T) == 2 ? Fetch::WIDTH / K<T> : 1)  // float32 has no registers to spare
                for (int k = 0; k < Fetch::WIDTH / K<T>; ++k) {
                    const A factor = load_a(tile.rows_from(16 * warp), k, lane);
#pragma unroll
                    for (int n = 0; n < TAPS / 16; ++n) {
                        B b[2];
                        load_b(b, tile.rows_from(SOURCES + 16 * n), k, lane);
                        mma<T>(z[2 * n], factor, b[0]);
                        mma<T>(z[2 * n + 1], factor, b[1]);
                    }
                }
            }
#pragma unroll
            for (int n = 0; n < TAPS / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    shared.z[(8 * n + d_column(lane, i)) * PITCH + 16 * warp + d_row(lane, i)] = z[n].value[i];
                }
            }
            __syncthreads();  // the next one is that of the next stage
#pragma unroll
            for (int own = 0; own < SUMS; ++own) {
                const int pixel = int(recomputed(uint32_t(pixels_of_tile[own])));  // -1 where there is none
                if (pixel < 0) continue;
                const int y = region.top + pixel / SIDE, x = region.left + pixel % SIDE;
                const int last_i = min(end_i, y + radius - row + 1);
                const int first_j = max(0, x + radius - (region.first_column + region.columns - 1));
                const int end_j = min(a.size, x + radius - region.first_column + 1);
#pragma unroll 1
                for (int i = max(first_i, y + radius - end_row + 1); i < last_i; ++i) {
                    const int source = (y + radius - i - row) * region.columns + x + radius - region.first_column;
                    const float *const terms = shared.z + (i - first_i) * a.size * PITCH + source;
                    for (int j = first_j; j < end_j; ++j) sums[own] += terms[j * (PITCH - 1)];
                }
            }
        }
    }
#pragma unroll
    for (int own = 0; own < SUMS; ++own) {
        const int pixel = pixels_of_tile[own];
        if (pixel < 0) continue;
        const int y = region.top + pixel / SIDE, x = region.left + pixel % SIDE;
        a.grad_cost[map * pixels + y * a.width + x] = rounded<T>(sums[own]);
    }
}

// --- dweight, dbias ---

constexpr int CHANNELS = 128;         // of the gradient, that a block sums; half of them to a warp
constexpr int MOST_PIXELS = 256;      // of a tile
constexpr int MOST_COSTS = 1040;      // of a tile with its halo
constexpr int WEIGHT_RING = 3;

template <typename T>
struct WeightArguments {
    const T *grad, *cost;
    float *partial;
    MapTiles tiles;
    int jobs, share;  // tiles of all maps, and of a part
    int prompts, height, width, outputs, size, tap_groups, channel_groups;
};

// Where a job's tile lies: of which map, and its first pixel.
struct Place {
    int64_t map;
    int top, left;

    __device__ __forceinline__ Place(const MapTiles &tiles, int job) : map(job / tiles.count) {
        const int tile = job % tiles.count;
        top = tile / tiles.across * tiles.height, left = tile % tiles.across * tiles.width;
    }
};

// Stages of the gradient: a few pixels of a tile, one tile after another.
template <typename T>
struct Gradients {
    static constexpr int ROWS = 64 / int(sizeof(T)) * 2;
    static constexpr int BYTES = ROWS * CHANNELS * int(sizeof(T));

    const WeightArguments<T> &a;
    const short *pixels;  // of a tile, see below
    int first, end;       // jobs
    int channel;

    __device__ __forceinline__ int groups() const { return (a.tiles.height * a.tiles.width + ROWS - 1) / ROWS; }
    __device__ __forceinline__ int stages() const { return max(end - first, 0) * groups(); }

    __device__ __forceinline__ void operator()(int stage, unsigned char *buffer) const {
        constexpr int EACH = 16 / int(sizeof(T)), PIECES = CHANNELS / EACH;
        const Tile<T, CHANNELS> tile{buffer};
        const Place place(a.tiles, first + stage / groups());
        const T *const source = a.grad + place.map * a.height * a.width * a.outputs;
        const int first_pixel = stage % groups() * ROWS;
        const bool whole = a.outputs % EACH == 0;
#pragma unroll 1
        for (int i = int(threadIdx.x); i < ROWS * PIECES; i += THREADS) {
            const int row = i / PIECES, piece = i % PIECES, pixel = pixels[first_pixel + row];
            const int y = place.top + pixel / SIDE, x = place.left + pixel % SIDE;
            const bool there = pixel >= 0 && y < a.height && x < a.width;
            const T *const token = source + int64_t(there ? y * a.width + x : 0) * a.outputs;
            copy_piece(tile.piece(row, piece), token, channel + piece * EACH, a.outputs, there, whole);
        }
    }
};

template <typename T>
struct WeightShared {
    unsigned char ring[WEIGHT_RING * Gradients<T>::BYTES];
    T costs[MOST_COSTS + 8];  // of tile and halo; behind all a zero and a one
    short corners[MOST_PIXELS + Gradients<T>::ROWS];  // of each pixel's window among them
    short pixels[MOST_PIXELS + Gradients<T>::ROWS];   // row · SIDE + column in the tile, −1 beyond
};

template <typename T>
__global__ void __launch_bounds__(THREADS, 2) weight_gradient(const WeightArguments<T> a) {
    constexpr int ZERO = MOST_COSTS, ONE = MOST_COSTS + 1, STEPS = Gradients<T>::ROWS / K<T>;
    WeightShared<T> &shared = *reinterpret_cast<WeightShared<T> *>(shared_memory());
    const int thread = int(threadIdx.x), lane = thread % 32, warp = thread / 32;
    const int halo_width = a.tiles.width + a.size - 1, area = a.size * a.size, radius = a.size / 2;
    const int costs = (a.tiles.height + a.size - 1) * halo_width, pixels = a.tiles.height * a.tiles.width;
    int place = int(blockIdx.x);
    const int channel = place % a.channel_groups * CHANNELS + warp / 4 * (CHANNELS / 2);
    place /= a.channel_groups;
    const int tap = place % a.tap_groups * TAPS + warp % 4 * 16 + lane / 4;
    place /= a.tap_groups;
    const int prompt = place % a.prompts, part = place / a.prompts;
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
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int own = tap + 8 * i;
        corner_counts[i] = own < area;
        offset[i] = own < area ? own / a.size * halo_width + own % a.size : own == area ? ONE : ZERO;
    }
    D sums[CHANNELS / 16] = {};
    Stages<WEIGHT_RING, Gradients<T>::BYTES, Gradients<T>> stages(
        shared.ring, Gradients<T>{a, shared.pixels, first, end, channel / CHANNELS * CHANNELS});
#pragma unroll 1
    for (int job = first; job < end; ++job) {
        const Place tile(a.tiles, job);
        const T *const volume = a.cost + (tile.map * a.prompts + prompt) * a.height * a.width;
        __syncthreads();  // nobody reads the costs of the tile before any more
        for (int i = thread; i < costs; i += THREADS) {
            const int y = tile.top - radius + i / halo_width, x = tile.left - radius + i % halo_width;
            const bool inside = y >= 0 && y < a.height && x >= 0 && x < a.width;
            shared.costs[i] = inside ? volume[int64_t(y) * a.width + x] : rounded<T>(0.0f);
        }
#pragma unroll 1
        for (int row = 0; row < pixels; row += Gradients<T>::ROWS) {
            const Tile<T, CHANNELS> grads{stages.next()};
#pragma unroll 2
            for (int k = 0; k < STEPS; ++k) {
                const short *const corners = shared.corners + row + k * K<T> + lane % 4 * 2;
                A factor;
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const auto cost = [&](int pixel) {
                        return shared.costs[corners[pixel] * corner_counts[i % 2] + offset[i % 2]];
                    };
                    if constexpr (sizeof(T) == 2) {
                        const Pair<T> pair{{cost(i / 2 * 8), cost(i / 2 * 8 + 1)}};
                        memcpy(&factor.word[i], &pair, 4);
                    } else {  // in the order of `load_b_by_rows`
                        factor.word[i] = __float_as_uint(cost(i / 2));
                    }
                }
#pragma unroll
                for (int n = 0; n < CHANNELS / 32; ++n) {
                    B b[2];
                    load_b_by_rows(b, grads, k, warp / 4 * (CHANNELS / 32) + n, lane);
                    mma<T>(sums[2 * n], factor, b[0]);
                    mma<T>(sums[2 * n + 1], factor, b[1]);
                }
            }
        }
    }
#pragma unroll
    for (int n = 0; n < CHANNELS / 16; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int c = channel + 8 * n + d_column(lane, i), own = tap + i / 2 * 8;
            if (c >= a.outputs || own > area) continue;
            a.partial[((int64_t(part) * a.outputs + c) * a.prompts + prompt) * (area + 1) + own] = sums[n].value[i];
        }
    }
}

// Adds the parts up: every 32 neighbours of a block's threads read 32 neighbours of a part, eight parts at a time.
template <typename T>
__global__ void __launch_bounds__(THREADS) sum_parts(const float *partial, T *grad_weight, T *grad_bias, int64_t size,
                                                     int parts, int prompts, int area) {
    float(&sums)[WARPS][32] = *reinterpret_cast<float(*)[WARPS][32]>(shared_memory());
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
#pragma unroll
    for (int other = 0; other < WARPS; ++other) sum += sums[other][lane];
    const int64_t map = i / (area + 1);  // of the weight: output and prompt
    const int element = int(i - map * (area + 1));
    if (element < area) {
        grad_weight[map * area + element] = rounded<T>(sum);
    } else if (map % prompts == 0) {
        grad_bias[map / prompts] = rounded<T>(sum);
    }
}

bool takes(int64_t maps, int64_t prompts, int64_t height, int64_t width, int64_t outputs, int64_t size) {
    return size >= 1 && size <= LARGEST && size % 2 == 1 && height >= 1 && width >= 1 && height <= INT32_MAX / width &&
           prompts >= 1 && prompts <= INT32_MAX / 2 && outputs <= INT32_MAX / 2 && maps <= INT32_MAX;
}

}  // namespace
}  // namespace ovseg

int ovseg_cost_embedding_cost_bwd(const void *grad, const void *taps, void *grad_cost, int64_t maps, int64_t prompts,
                                  int64_t height, int64_t width, int64_t outputs, int64_t size, int dtype, int device,
                                  void *stream) {
    using namespace ovseg;
    if (!takes(maps, prompts, height, width, outputs, size)) return OVSEG_UNSUPPORTED_SIZE;
    if (!aligned(grad, taps, grad_cost)) return OVSEG_MISALIGNED;
    const MapTiles tiles = MapTiles::even(int(height), int(width), SIDE, SIDE);
    if (maps * prompts > INT32_MAX) return OVSEG_TOO_LARGE;
    return by_dtype(dtype, [&](auto number) {
        using T = decltype(number);
        const CostArguments<T> a{static_cast<const T *>(grad), static_cast<const T *>(taps),
                                 static_cast<T *>(grad_cost), tiles, int(prompts), int(height), int(width),
                                 int(outputs), int(size)};
        return launch(cost_gradient<T>, maps * prompts * tiles.count, THREADS, sizeof(CostShared<T>), device, stream,
                      a);
    });
}

int ovseg_cost_embedding_weight_bwd(const void *grad, const void *cost, void *partial, void *grad_weight,
                                    void *grad_bias, int64_t maps, int64_t prompts, int64_t height, int64_t width,
                                    int64_t outputs, int64_t size, int64_t parts, int dtype, int device,
                                    void *stream) {
    using namespace ovseg;
    if (!takes(maps, prompts, height, width, outputs, size) || parts < 1) return OVSEG_UNSUPPORTED_SIZE;
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
        const WeightArguments<T> a{static_cast<const T *>(grad), static_cast<const T *>(cost),
                                   static_cast<float *>(partial), tiles, int(jobs),
                                   int((jobs + parts - 1) / parts),
                                   int(prompts), int(height), int(width), int(outputs), int(size), tap_groups,
                                   channel_groups};
        const int error = launch(weight_gradient<T>, parts * prompts * tap_groups * channel_groups, THREADS,
                                 sizeof(WeightShared<T>), device, stream, a);
        if (error) return error;
        const int64_t sums = outputs * prompts * (area + 1);
        return launch(sum_parts<T>, (sums + 31) / 32, THREADS, sizeof(float) * THREADS, device, stream, a.partial,
                      static_cast<T *>(grad_weight), static_cast<T *>(grad_bias), sums, int(parts), int(prompts),
                      int(area));
    });
}
