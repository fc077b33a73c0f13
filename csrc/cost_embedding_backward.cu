// Backward of the cost embedding's convolution to the costs. From the gradient g of its output, with r = K // 2:
//
//     z[y, x, i, j]      = Σ_c g[t, y, x, c] · weight[c, p, i, j]
//     dcost[t, p, y, x]  = Σ_ij z[y + r − i, x + r − j, i, j]
//
// where g is 0 outside the map.
//
// A block takes a tile of up to 32 × 32 pixels of a map, kept as sums in registers, and computes z for a few rows of
// the tile and its halo at a time. No pixel outside the map is read.

#include "device/cosines.cuh"
#include "device/map_tiles.h"

namespace ovseg {
namespace {

constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int TAPS = 64;             // elements of the windows at a time
constexpr int SOURCES = WARPS * 16;  // pixels whose z is computed at a time
constexpr int SIDE = 32;             // of a tile
constexpr int SUMS = SIDE * SIDE / THREADS;
constexpr int RING = 4;
constexpr int PITCH = SOURCES + 4;  // between the z of two elements of the window: a warp writes to other banks

constexpr int NEIGHBOURS = 8;  // elements of a window's row that are added at a time

template <typename T> struct Arguments {
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

    DEVICE Region(const MapTiles &tiles, int tile, int height, int width, int size) {
        const int radius = size / 2;
        top = tile / tiles.across * tiles.height, left = tile % tiles.across * tiles.width;
        bottom = min(top + tiles.height, height), right = min(left + tiles.width, width);
        first_row = max(top - radius, 0), end_row = min(bottom + radius, height);
        first_column = max(left - radius, 0), columns = min(right + radius, width) - first_column;
        at_once = SOURCES / columns;
    }
};

// Stages of both factors of z: SOURCES pixels' gradients and TAPS elements of the window. A thread copies the same
// vector of every AT_ONCE-th of them. Stages advance in the outputs, then in the rows of the map, then in the elements.
template <typename T> struct GradientsAndTaps {
    static constexpr int WIDTH = 64 / int(sizeof(T)), VECS = 4;
    static constexpr int BYTES = (SOURCES + TAPS) * 64;
    static constexpr int AT_ONCE = THREADS / VECS, COUNT = SOURCES / AT_ONCE;
    static_assert(TAPS == AT_ONCE, "one of a thread's vectors is of the taps");

    const Region &region;
    const T *first_tap, *pixels[COUNT];  // pixels: of the thread's vectors of the next stage
    int width, outputs, size, steps;
    int first, target;           // row of the first one in a stage, its offset in the tile
    int left;                    // numbers of a row from the next stage's vector on
    int step = 0, row, element;  // where the next stage is; element: of the window, the thread's

    DEVICE GradientsAndTaps(const Region &region, const T *grad, const T *first_tap, int width, int outputs, int size)
        : region(region), first_tap(first_tap), width(width), outputs(outputs), size(size) {
        const int thread = recomputed(int(threadIdx.x)), column = thread % VECS * VEC<T>;
        first = element = thread / VECS, target = tile_offset<64>(first, thread % VECS), left = outputs - column;
        steps = (outputs + WIDTH - 1) / WIDTH;
        row = region.first_row;
        grad += (int64_t(region.first_row) * width + region.first_column) * outputs;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const int pixel = first + i * AT_ONCE, offset = pixel / region.columns * width + pixel % region.columns;
            pixels[i] = grad + int64_t(offset) * outputs + column;
        }
    }

    DEVICE int rows_of_window() const { return TAPS / size; }
    DEVICE int stages() const {
        const int groups = (region.end_row - region.first_row + region.at_once - 1) / region.at_once;
        return steps * groups * ((size + rows_of_window() - 1) / rows_of_window());
    }

    DEVICE void operator()(int, unsigned char *buffer) {
        const int present = min(region.at_once, region.end_row - row) * region.columns;
        with_constant(whole_vecs<T>(outputs), [&](auto whole) {
#pragma unroll
            for (int i = 0; i < COUNT; ++i) {
                const bool copied = first + i * AT_ONCE < present;
                copy_vec(buffer + target + i * AT_ONCE * 64, pixels[i], copied ? left : 0, whole);
            }
            copy_vec(buffer + target + SOURCES * 64, first_tap + (int64_t(element) + 1) * outputs - left,
                     element < size * size ? left : 0, whole);
        });
        int64_t step_by = WIDTH;  // to the next stage
        left -= WIDTH;
        if (++step == steps) {
            step_by -= steps * WIDTH, left += steps * WIDTH, step = 0;
            step_by += int64_t(region.at_once) * width * outputs, row += region.at_once;
            if (row >= region.end_row) {
                step_by -= int64_t(row - region.first_row) * width * outputs, row = region.first_row;
                element += rows_of_window() * size;
            }
        }
#pragma unroll
        for (int i = 0; i < COUNT; ++i) pixels[i] += step_by;
    }
};

template <typename T> struct Shared {
    unsigned char ring[RING * GradientsAndTaps<T>::BYTES];
    float z[TAPS * PITCH];
};
static_assert(sizeof(Shared<float>) <= SHARED_EVERYWHERE, "see platform.cuh");

template <typename T> __global__ void __launch_bounds__(THREADS, 2) cost_gradient(const Arguments<T> a) {
    using Fetch = GradientsAndTaps<T>;
    Shared<T> &shared = *reinterpret_cast<Shared<T> *>(shared_memory());
    const int warp = int(threadIdx.x) / 32, radius = a.size / 2;
    int lane = int(threadIdx.x) % 32;
    const int64_t map = int(blockIdx.x) / a.tiles.count, pixels = int64_t(a.height) * a.width;
    const Region region(a.tiles, int(blockIdx.x) % a.tiles.count, a.height, a.width, a.size);
    const Fetch fetch(region, a.grad + map / a.prompts * pixels * a.outputs,
                      a.taps + map % a.prompts * (a.size * a.size) * a.outputs, a.width, a.outputs, a.size);
    Stages<RING, Fetch::BYTES, Fetch> stages(shared.ring, fetch);
    float sums[SUMS] = {};
    // Calls function(sum, y, x) for the thread's pixels, THREADS apart in the tile.
    const auto each_pixel = [&](auto function) {
        const int wide = a.tiles.width, first = recomputed(int(threadIdx.x));
        int y = region.top + first / wide, x = region.left + first % wide;
#pragma unroll
        for (int i = 0; i < SUMS; ++i) {
            if (y < region.bottom && x < region.right) function(sums[i], y, x);
            y += THREADS / wide, x += THREADS % wide;
            if (x >= region.left + wide) x -= wide, ++y;
        }
    };
#pragma unroll 1
    for (int first_i = 0; first_i < a.size; first_i += fetch.rows_of_window()) {
#pragma unroll 1
        for (int row = region.first_row; row < region.end_row; row += region.at_once) {
            const int end_row = min(row + region.at_once, region.end_row);
            Acc z[TAPS / 8] = {};
#pragma unroll 1
            for (int step = 0; step < fetch.steps; ++step) {
                lane = recomputed(lane);
                const Tile<T, Fetch::WIDTH> tile{stages.next()};
#pragma unroll(sizeof(T) == 2 ? Fetch::WIDTH / K<T> : 1)  // float32 has no registers to spare
                for (int k = 0; k < Fetch::WIDTH / K<T>; ++k) {
                    const FragA frag_a = load_a(tile.rows_from(16 * warp), k, lane);
#pragma unroll
                    for (int n = 0; n < TAPS / 8; n += 2) {
                        mma<T>(z + n, frag_a, load_b(tile.rows_from(SOURCES + 8 * n), k, lane));
                    }
                }
            }
#pragma unroll
            for (int n = 0; n < TAPS / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    shared.z[(8 * n + acc_col(lane, i)) * PITCH + 16 * warp + acc_row(lane, i)] = z[n].value[i];
                }
            }
            __syncthreads();  // the next one is that of the next stage
            each_pixel([&](float &sum, int y, int x) {
                const int last_i = min(min(first_i + fetch.rows_of_window(), a.size), y + radius - row + 1);
                const int first_j = max(0, x + radius - (region.first_column + region.columns - 1));
                const int end_j = min(a.size, x + radius - region.first_column + 1);
                const uint32_t seen = (1u << end_j) - (1u << first_j);
#pragma unroll 1
                for (int i = max(first_i, y + radius - end_row + 1); i < last_i; ++i) {
                    const int source = (y + radius - i - row) * region.columns + x + radius - region.first_column;
                    const float *const terms = shared.z + (i - first_i) * a.size * PITCH + source;
#pragma unroll 1
                    for (int j = 0; j < a.size; j += NEIGHBOURS) {
                        const float *const first = terms + j * (PITCH - 1);
                        const uint32_t here = seen >> j;
#pragma unroll
                        for (int k = 0; k < NEIGHBOURS; ++k) {
                            if (here & 1u << k) sum += first[k * (PITCH - 1)];
                        }
                    }
                }
            });
        }
    }
    T *const target = a.grad_cost + recomputed(int(blockIdx.x)) / a.tiles.count * pixels;
    each_pixel([&](float sum, int y, int x) { target[y * a.width + x] = rounded<T>(sum); });
}

}  // namespace
}  // namespace ovseg

int ovseg_cost_embedding_cost_bwd(const void *grad, const void *taps, void *grad_cost, int64_t maps, int64_t prompts,
                                  int64_t height, int64_t width, int64_t outputs, int64_t size, int dtype, int device,
                                  void *stream) {
    using namespace ovseg;
    if (!takes_convolution(maps, prompts, height, width, outputs, size)) return OVSEG_UNSUPPORTED_SIZE;
    if (!aligned(grad, taps, grad_cost)) return OVSEG_MISALIGNED;
    const MapTiles tiles = MapTiles::even(int(height), int(width), SIDE, SIDE);
    if (maps * prompts > INT32_MAX) return OVSEG_TOO_LARGE;
    return by_dtype(dtype, [&](auto number) {
        using T = decltype(number);
        const auto a = filled<Arguments<T>>(grad, taps, grad_cost, tiles, prompts, height, width, outputs, size);
        return launch(cost_gradient<T>, maps * prompts * tiles.count, THREADS, sizeof(Shared<T>), device, stream, a);
    });
}
