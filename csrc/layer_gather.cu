// Layer gather: patch tokens of several encoder blocks, brought into the image-text embedding space; singly, or summed
// over the layers of a stage.
//
//     f_l = z / max(‖z‖, ε),  z = LN_l(LN_shared(h_l[patch])) · P_l;      out_l = f_l   or   out = Σ_l w_l f_l
//
// Eight warps own a tile of tokens with all columns of the projection, a strip of them each; the strips meet once, for
// a token's length. Both norms are four numbers a token, found first; tokens are then normalised a few channels at a
// time, as they enter the product. The projection streams through a ring of stages, from one layer to the next without
// a break. No single layer's map is stored where they are summed.

#include "device/patch_tokens.cuh"
#include "device/transformer.cuh"

namespace ovseg {
namespace {

constexpr int WARPS = 8, THREADS = 32 * WARPS;
constexpr int STEPS = 4, CHUNK_VECS = 2 * STEPS;  // of products with what is normalised at a time: 128 bytes a token

template <typename T> struct Arguments {
    PatchTokens<T> hidden;
    Norms<T> norms;
    const T *projection, *weights;
    T *out;
    int width, together;  // columns of the projection; layers that are summed
};

// A block for projections of up to COLUMNS columns.
template <int COLUMNS> struct Shape {
    static constexpr int ROW_TILES = 1024 / COLUMNS, ROWS = 16 * ROW_TILES;
    static constexpr int STRIP = COLUMNS / WARPS;  // columns of a warp
    static constexpr int RING = 2048 / COLUMNS;
    static constexpr int STAGE = 32 * COLUMNS;  // bytes: what one product sums over is 32 bytes of numbers
    static constexpr int CHUNK = ROWS * CHUNK_VECS * 16;
    static constexpr int TOTAL =
        RING * STAGE + 2 * CHUNK + ROWS * int(sizeof(Statistics)) + ROWS * WARPS * int(sizeof(float));
};

// Rows of the projections of `layers` layers, K<T> of them a stage, in order; a layer's last stage ends with zeros.
template <typename T, int COLUMNS> struct Projections {
    static constexpr int PITCH = COLUMNS * int(sizeof(T));
    static constexpr int VECS = COLUMNS / VEC<T>, AT_ONCE = THREADS / VECS;  // rows that all threads copy at once
    static_assert(THREADS % VECS == 0 && K<T> % AT_ONCE == 0, "every thread copies as many vectors of a column");

    const T *source;  // of the thread's first vector of the next stage
    int layers, channels, width, chunks;
    int target;      // that vector's offset in the tile
    int present;     // rows of the layer from it on; none or less past the width
    int passed = 0;  // rows of the layer in earlier stages

    DEVICE Projections(const T *first, int layers, int channels, int width, int chunks)
        : layers(layers), channels(channels), width(width), chunks(chunks) {
        const int thread = recomputed(int(threadIdx.x)), row = thread / VECS, column = thread % VECS * VEC<T>;
        source = first + row * width + column;
        target = tile_offset<PITCH>(row, thread % VECS);
        present = column < width ? channels - row : INT32_MIN / 2;
    }

    DEVICE int stages() const { return layers * chunks * STEPS; }

    DEVICE void operator()(int, unsigned char *buffer) {
        // The first row is less than AT_ONCE: a row's permutation, first + at, is first ^ at.
        const auto address = [&](int at) { return buffer + at * COLUMNS * int(sizeof(T)) + (target ^ (at & 7) * 16); };
        const T *vec = source;
        if (whole_vecs<T>(width)) {
#pragma unroll
            for (int at = 0; at < K<T>; at += AT_ONCE, vec += AT_ONCE * width) {
                copy_async(address(at), vec, at < present);
            }
        } else {
            const int column = recomputed(int(threadIdx.x)) % VECS * VEC<T>;
#pragma unroll 1
            for (int at = 0; at < K<T>; at += AT_ONCE, vec += AT_ONCE * width) {
                const int count = at < present ? width - column : 0;
                store(reinterpret_cast<T *>(address(at)), load_vec(vec, 0, count, false));
            }
        }
        source += max(min(K<T>, channels - passed), 0) * width;
        passed += K<T>, present -= K<T>;
        if (passed == chunks * STEPS * K<T>) present += passed, passed = 0;
    }
};

// Blocks that share a multiprocessor, if only it has the shared memory.
template <typename T, int COLUMNS, bool SUMMED>
constexpr int BLOCKS = sizeof(T) == 2 && COLUMNS == 512 && !SUMMED ? 2 : 1;

// Without SUMMED a block takes one layer, and has no sum to hold.
template <typename T, int COLUMNS, bool SUMMED>
__global__ void __launch_bounds__(THREADS, BLOCKS<T, COLUMNS, SUMMED>) layer_gather(const Arguments<T> a) {
    using Layout = Shape<COLUMNS>;
    constexpr int ROWS = Layout::ROWS, ROW_TILES = Layout::ROW_TILES, COUNT = Layout::STRIP / 8;
    constexpr int WARP_ROWS = ROWS / WARPS, CHANNELS = CHUNK_VECS * VEC<T>;
    unsigned char *const chunk_memory = shared_memory() + Layout::RING * Layout::STAGE;
    Statistics *const statistics = reinterpret_cast<Statistics *>(chunk_memory + 2 * Layout::CHUNK);
    float *const squares = reinterpret_cast<float *>(statistics + ROWS);

    const int thread = int(threadIdx.x), warp = thread / 32, rows = a.hidden.rows(), channels = a.hidden.channels;
    int lane = thread % 32;
    const int tiles = (rows + ROWS - 1) / ROWS, group = int(blockIdx.x) / tiles;
    const int row = int(blockIdx.x) % tiles * ROWS, strip = warp * Layout::STRIP;
    const int layers = SUMMED ? a.together : 1, first = group * layers;
    const int chunks = (channels + CHANNELS - 1) / CHANNELS;

    Stages<Layout::RING, Layout::STAGE, Projections<T, COLUMNS>> stages(
        shared_memory(),
        Projections<T, COLUMNS>(a.projection + int64_t(first) * channels * a.width, layers, channels, a.width, chunks));

    // The last token, past it.
    const auto token = [&](int layer, int r) { return a.hidden.row(layer, min(row + r, rows - 1)); };

    Acc total[SUMMED ? ROW_TILES : 1][COUNT] = {};
#pragma unroll 1
    for (int layer = first; layer < first + layers; ++layer) {
        {
            const T *tokens[WARP_ROWS];
            Statistics found[WARP_ROWS];
            unrolled<WARP_ROWS>([&](int i) { tokens[i] = token(layer, warp * WARP_ROWS + i); });
            with_constant(a.hidden.whole,
                          [&](auto whole) { find_statistics(found, tokens, a.norms, channels, whole, lane); });
            unrolled<WARP_ROWS>([&](int i) {
                if (lane == 0) statistics[warp * WARP_ROWS + i] = found[i];
            });
        }
        __syncthreads();

        // A thread normalises one vector of a chunk, which the statistics have brought into the cache.
        const bool normalises = thread < ROWS * CHUNK_VECS;
        const T *const source = token(layer, normalises ? thread / CHUNK_VECS : 0);
        Acc acc[ROW_TILES][COUNT] = {};
        int chunk = 0;
        do {  // there is at least one chunk
            lane = recomputed(lane);
            const Tile<T, CHANNELS> smem_tokens{chunk_memory + chunk % 2 * Layout::CHUNK};
            if (normalises) {
                const int vec_row = thread / CHUNK_VECS, within = thread % CHUNK_VECS * VEC<T>;
                const int column = chunk * CHANNELS + within;
                T *const address = smem_tokens.at(vec_row, within);
                if (a.hidden.whole) {
                    const Floats<T> x = floats(load_vec(source, column, channels, true));
                    store(address, normalised(x, statistics[vec_row], a.norms, layer, column, channels, true));
                } else {
#pragma unroll 1
                    for (int i = 0; i < VEC<T>; ++i) {
                        const bool present = column + i < channels;
                        address[i] = present ? normalised(source[column + i], statistics[vec_row], a.norms, layer,
                                                          column + i, channels)
                                             : rounded<T>(0.0f);
                    }
                }
            }
#pragma unroll(SUMMED ? STEPS : 1)  // without a sum two blocks share the registers
            for (int step = 0; step < STEPS; ++step) {
                if (!SUMMED) lane = recomputed(lane);
                const Tile<T, COLUMNS> projection{stages.next()};
                FragA frag_a[ROW_TILES];
#pragma unroll
                for (int i = 0; i < ROW_TILES; ++i)
                    frag_a[i] = load_a_chained(smem_tokens.rows_from(16 * i), step, lane);
                unrolled<COUNT / 2>([&](int n) {
                    const FragB2 frag_b = load_b_by_rows(projection, 0, strip / 16 + n, lane);
                    unrolled<ROW_TILES>([&](int i) { mma<T>(acc[i] + 2 * n, frag_a[i], frag_b); });
                });
            }
        } while (++chunk < chunks);

        unrolled<2 * ROW_TILES>([&](int i) {
            float sum = 0.0f;
            unrolled<COUNT, 2>([&](int n, int j) {
                const float z = acc[i / 2][n].value[i % 2 * 2 + j];
                sum += z * z;  // 0 past the width, unless the whole row is infinite or NaN
            });
            sum = sum_over_lanes<4>(sum);
            if (lane % 4 == 0) squares[(i / 2 * 16 + acc_row(lane, i % 2 * 2)) * WARPS + warp] = sum;
        });
        __syncthreads();
        const float weight = a.weights ? to_float(a.weights[layer]) : 1.0f;
#pragma unroll
        for (int i = 0; i < 2 * ROW_TILES; ++i) {
            const float *const parts = squares + (i / 2 * 16 + acc_row(lane, i % 2 * 2)) * WARPS;
            float sum = 0.0f;
            unrolled<WARPS>([&](int j) { sum += parts[j]; });
            const float scale = weight / length_of(sum);
            unrolled<COUNT, 2>([&](int n, int j) {
                float &z = acc[i / 2][n].value[i % 2 * 2 + j];
                if (SUMMED) {
                    total[SUMMED ? i / 2 : 0][n].value[i % 2 * 2 + j] += z * scale;
                } else {
                    z *= scale;
                }
            });
        }

        if (SUMMED && layer + 1 < first + layers) continue;
        T *const map = a.out + int64_t(group) * rows * a.width;
        const bool pairs = a.width % 2 == 0;
#pragma unroll
        for (int i = 0; i < 2 * ROW_TILES; ++i) {
            const int r = row + i / 2 * 16 + acc_row(lane, i % 2 * 2);
            if (r >= rows) continue;
            unrolled<COUNT>([&](int n) {
                const Acc &result = SUMMED ? total[SUMMED ? i / 2 : 0][n] : acc[i / 2][n];
                const int column = strip + 8 * n + acc_col(lane, 0);
                const Pair<T> pair = rounded_pair<T>(result.value[i % 2 * 2], result.value[i % 2 * 2 + 1]);
                T *const address = map + int64_t(r) * a.width + column;
                if (pairs && column < a.width) store(address, pair);
                if (!pairs && column < a.width) address[0] = pair.value[0];
                if (!pairs && column + 1 < a.width) address[1] = pair.value[1];
            });
        }
    }
}

template <int COLUMNS, bool SUMMED, typename T> int launch_gather(const Arguments<T> &a, int device, void *stream) {
    using Layout = Shape<COLUMNS>;
    const int64_t tiles = (a.hidden.rows() + Layout::ROWS - 1) / Layout::ROWS;
    return launch(layer_gather<T, COLUMNS, SUMMED>, tiles * (a.hidden.layers / a.together), THREADS, Layout::TOTAL,
                  device, stream, a);
}

}  // namespace
}  // namespace ovseg

int ovseg_layer_gather_fwd(const void *const *hidden, const void *shared_weight, const void *shared_bias,
                           const void *norm_weight, const void *norm_bias, const void *projection, const void *weights,
                           void *out, int64_t layers, int64_t batch, int64_t tokens, int64_t patches, int64_t channels,
                           int64_t width, int64_t batch_stride, int64_t token_stride, float shared_eps, float norm_eps,
                           int dtype, int device, void *stream) {
    using namespace ovseg;
    if (width < 1 || width > 1024) return OVSEG_UNSUPPORTED_SIZE;
    if (const int error = check_patch_tokens(hidden, layers, batch, tokens, patches, channels)) return error;
    if (!aligned(shared_weight, shared_bias, norm_weight, norm_bias, projection, weights, out)) return OVSEG_MISALIGNED;
    return by_dtype(dtype, [&](auto number) {
        using T = decltype(number);
        const auto a = filled<Arguments<T>>(
            patch_tokens<T>(hidden, layers, batch, tokens, patches, channels, batch_stride, token_stride),
            filled<Norms<T>>(shared_weight, shared_bias, norm_weight, norm_bias, shared_eps, norm_eps), projection,
            weights, out, width, weights ? layers : 1);
        if (width > 512) return launch_gather<1024, true>(a, device, stream);
        if (weights) return launch_gather<512, true>(a, device, stream);
        return launch_gather<512, false>(a, device, stream);
    });
}
