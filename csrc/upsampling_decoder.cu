// Guided group normalisation, what a stage of the upsampling decoder does around the library's convolutions:
//
//     z = y + term,   x̂ = (z − mean) / s,   out = ReLU(w ⊙ x̂ + β),   s = √(variance + ε)
//
// with mean and variance over the positions and channels of a group, for each image and class by itself; term is the
// same for all classes, or absent. Moments are taken part by part, mean first and then centred squares, and combined as
// Chan, Golub and LeVeque do, so that a mean far from zero costs no digits.
//
// Backward, from the gradient g of out, with h = g where out > 0, else 0, and means over a group:
//
//     dy = (w ⊙ h − mean(w ⊙ h) − x̂ · mean(w ⊙ h ⊙ x̂)) / s,   dterm = Σ dy over the classes,   dw = Σ h ⊙ x̂,   dβ = Σ h
//
// A "map" is one class of one image. A block takes a chunk of its positions with all of their channels, one piece of
// memory; a thread keeps to N neighbouring channels of one group, 16 bytes of them where the sizes allow and else one.
// The last kernel's threads keep to one position instead, and go through the classes. Every sum has its order.

#include "device/warp.cuh"

namespace ovseg {
namespace {

constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int BATCH = 2;  // pieces of a tensor that a thread reads at once

struct Sizes {
    int classes, positions, channels, group, chunk;  // group: channels of one; chunk: positions that a block takes

    __device__ __forceinline__ int chunks() const { return (positions - 1) / chunk + 1; }
    __device__ __forceinline__ int groups() const { return channels / group; }
    __device__ __forceinline__ int64_t map() const { return int64_t(positions) * channels; }
};

// The thread's channels, and its position among those that a block reads at once.
template <int N>
struct Place {
    int column, row, rows;  // column: the first channel
    bool active;

    __device__ __forceinline__ Place(const Sizes &s, int part) {
        const int columns = min(s.channels / N, THREADS);
        rows = THREADS / columns, row = int(threadIdx.x) / columns;
        column = (part * columns + int(threadIdx.x) % columns) * N;
        active = row < rows && column < s.channels;
    }

    // Blocks that share a position's channels.
    static __host__ __device__ int parts(const Sizes &s) {
        const int pieces = s.channels / N;
        return (pieces - 1) / (pieces < THREADS ? pieces : THREADS) + 1;
    }
};

// A block's chunk of a map: block number -> map, chunk, part of the channels.
struct Chunk {
    int64_t map;
    int number, part, first, end;  // positions

    __device__ __forceinline__ Chunk(const Sizes &s, int64_t block, int parts) {
        part = int(block % parts);
        number = int(block / parts % s.chunks());
        map = block / parts / s.chunks();
        first = number * s.chunk, end = min(first + s.chunk, s.positions);
    }

    // Where its sums for the channels of a kind begin in (maps, chunks, 2, channels).
    __device__ __forceinline__ int64_t sums(const Sizes &s, int kind) const {
        return ((map * s.chunks() + number) * 2 + kind) * s.channels;
    }
};

template <int N, typename T>
__device__ __forceinline__ void load_floats(float (&values)[N], const T *address) {
    const Vector<T, N> vector = load<T, N>(address);
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = to_float(vector.value[i]);
}

template <int N, typename T>
__device__ __forceinline__ void store_floats(T *address, const float (&values)[N]) {
    constexpr int AT_ONCE = N * int(sizeof(T)) > 16 ? 16 / int(sizeof(T)) : N;
#pragma unroll
    for (int first = 0; first < N; first += AT_ONCE) {
        Vector<T, AT_ONCE> vector;
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) vector.value[i] = rounded<T>(values[first + i]);
        store<T, AT_ONCE>(address + first, vector);
    }
}

// Goes through the thread's positions of a chunk, BATCH of them at a time: calls `function` with the first one and a
// function that gives z of number b's channel i. The others lie `place.rows` apart.
template <int N, typename T, typename Function>
__device__ __forceinline__ void each_position(const Sizes &s, const Chunk &chunk, const Place<N> &place, const T *y,
                                              const T *term, Function function) {
    const T *const own = y + chunk.map * s.map() + place.column;
    const T *const shared = term ? term + chunk.map / s.classes * s.map() + place.column : nullptr;
#pragma unroll 1
    for (int start = chunk.first + place.row; start < chunk.end; start += BATCH * place.rows) {
        Vector<T, N> values[BATCH], terms[BATCH];
#pragma unroll
        for (int b = 0; b < BATCH; ++b) {
            const int position = start + b * place.rows;
            values[b] = terms[b] = {};
            if (position >= chunk.end) continue;
            values[b] = load<T, N>(own + int64_t(position) * s.channels);
            if (shared) terms[b] = load<T, N>(shared + int64_t(position) * s.channels);
        }
        function(start, [&](int b, int i) { return to_float(values[b].value[i]) + to_float(terms[b].value[i]); });
    }
}

// w ⊙ x̂ + β as z · slope + shift, in PyTorch's order, so that an infinite w gives what it gives there. Multiplied and
// added at once: forward and backward agree on what passes ReLU.
struct Affine {
    float slope, shift;

    __device__ __forceinline__ Affine(float mean, float scale, float weight, float bias)
        : slope(scale * weight), shift(fmaf(-mean, slope, bias)) {}

    __device__ __forceinline__ float operator()(float z) const { return fmaf(z, slope, shift); }
};

// Mean and centred squares of each piece of a position's channels over a chunk: `moments`, (maps, chunks, 2, channels),
// of which the first channels / N numbers of a row are used.
template <typename T, int N>
__global__ void __launch_bounds__(THREADS, 3) take_moments(const T *y, const T *term, float *moments, const Sizes s) {
    float *const counts = reinterpret_cast<float *>(shared_memory());
    float *const means = counts + THREADS, *const squares = means + THREADS;
    const Chunk chunk(s, blockIdx.x, Place<N>::parts(s));
    const Place<N> place(s, chunk.part);
    float count = 0.0f, mean = 0.0f, square = 0.0f;
    if (place.active) {
        each_position(s, chunk, place, y, term, [&](int start, auto z) {
            const int there = min((chunk.end - 1 - start) / place.rows + 1, BATCH);
            const float added = float(there * N);
            float sum = 0.0f, centred = 0.0f;
#pragma unroll
            for (int b = 0; b < BATCH; ++b) {
#pragma unroll
                for (int i = 0; i < N; ++i) sum += z(b, i);
            }
            const float own = sum / added;
#pragma unroll
            for (int b = 0; b < BATCH; ++b) {
#pragma unroll
                for (int i = 0; i < N; ++i) {
                    const float away = z(b, i) - own;
                    centred += b < there ? away * away : 0.0f;
                }
            }
            const float away = own - mean, share = added / (count + added);
            mean += away * share;
            square += centred + away * (count * share) * away;
            count += added;
        });
    }
    const int thread = int(threadIdx.x);
    counts[thread] = count, means[thread] = mean, squares[thread] = square;
    __syncthreads();
    if (!place.active || place.row > 0) return;
    const int columns = min(s.channels / N, THREADS);
    float total = 0.0f, sum = 0.0f;
    square = 0.0f;
#pragma unroll 4
    for (int i = thread; i < place.rows * columns; i += columns) {
        total += counts[i];
        sum += counts[i] * means[i];
    }
    mean = sum / total;
#pragma unroll 4
    for (int i = thread; i < place.rows * columns; i += columns) {
        const float away = means[i] - mean;
        square += squares[i] + (counts[i] > 0.0f ? counts[i] * away * away : 0.0f);
    }
    moments[chunk.sums(s, 0) + place.column / N] = mean;
    moments[chunk.sums(s, 1) + place.column / N] = square;
}

// Mean and 1 / s of each group: `statistics`, (maps, groups, 2). A warp a group.
template <int N>
__global__ void __launch_bounds__(THREADS, 3)
    combine_moments(const float *moments, float *statistics, int64_t last, float eps, const Sizes s) {
    const int64_t group = int64_t(blockIdx.x) * WARPS + threadIdx.x / 32;
    if (group >= last) return;
    const int pieces = s.group / N, lane = int(threadIdx.x) % 32;
    const int64_t map = group / s.groups();
    const float *const start = moments + map * s.chunks() * 2 * s.channels + group % s.groups() * pieces;
    const auto each = [&](auto function) {  // (numbers, their mean, their centred squares)
        float sum = 0.0f;
        for (int i = lane; i < s.chunks() * pieces; i += 32) {
            const int chunk = i / pieces;
            const float *const mean = start + int64_t(chunk) * 2 * s.channels + i % pieces;
            sum += function(float(min(s.positions - chunk * s.chunk, s.chunk)) * N, mean[0], mean[s.channels]);
        }
        return sum_over_lanes<32>(sum) / (float(s.positions) * float(s.group));
    };
    const float mean = each([](float count, float part, float) { return count * part; });
    const float variance = each([&](float count, float part, float squares) {
        return squares + count * (part - mean) * (part - mean);
    });
    if (lane == 0) store<float, 2>(statistics + group * 2, {{mean, 1.0f / sqrtf(variance + eps)}});
}

// Both numbers of the group of a channel of a map, from (maps, groups, 2).
__device__ __forceinline__ Pair<float> of_group(const float *values, const Sizes &s, int64_t map, int channel) {
    return load<float, 2>(values + (map * s.groups() + channel / s.group) * 2);
}

template <typename T, int N>
__global__ void __launch_bounds__(THREADS, 3)
    normalise(const T *y, const T *term, const float *statistics, const T *weight, const T *bias, T *out,
              const Sizes s) {
    // From the end: what the moments were taken of last may still be in the cache.
    const Chunk chunk(s, gridDim.x - 1 - blockIdx.x, Place<N>::parts(s));
    const Place<N> place(s, chunk.part);
    if (!place.active) return;
    const Pair<float> group = of_group(statistics, s, chunk.map, place.column);
    float w[N], shift[N];
    load_floats(w, weight + place.column);
    load_floats(shift, bias + place.column);
    each_position(s, chunk, place, y, term, [&](int start, auto z) {
#pragma unroll
        for (int b = 0; b < BATCH; ++b) {
            const int position = start + b * place.rows;
            if (position >= chunk.end) continue;
            float passed[N];
#pragma unroll
            for (int i = 0; i < N; ++i) {
                const float x = Affine(group.value[0], group.value[1], w[i], shift[i])(z(b, i));
                passed[i] = x < 0.0f ? 0.0f : x;  // NaN passes
            }
            store_floats(out + chunk.map * s.map() + int64_t(position) * s.channels + place.column, passed);
        }
    });
}

// Σ h and Σ h ⊙ x̂ of each channel over a chunk: `sums`, (maps, chunks, 2, channels).
template <typename T, int N>
__global__ void __launch_bounds__(THREADS, 2)
    sum_gradients(const T *grad, const T *y, const T *term, const float *statistics, const T *weight, const T *bias,
                  float *sums, const Sizes s) {
    float *const shared = reinterpret_cast<float *>(shared_memory());  // (2, threads, N)
    const Chunk chunk(s, blockIdx.x, Place<N>::parts(s));
    const Place<N> place(s, chunk.part);
    const int thread = int(threadIdx.x), columns = min(s.channels / N, THREADS);
    if (place.active) {
        const Pair<float> group = of_group(statistics, s, chunk.map, place.column);
        float w[N], shift[N], passed[N] = {}, along[N] = {};
        load_floats(w, weight + place.column);
        load_floats(shift, bias + place.column);
        each_position(s, chunk, place, y, term, [&](int start, auto z) {
            const T *const own = grad + chunk.map * s.map() + place.column;
            Vector<T, N> grads[BATCH];
#pragma unroll
            for (int b = 0; b < BATCH; ++b) {
                const int position = start + b * place.rows;
                grads[b] = {};
                if (position < chunk.end) grads[b] = load<T, N>(own + int64_t(position) * s.channels);
            }
#pragma unroll
            for (int b = 0; b < BATCH; ++b) {
                if (start + b * place.rows >= chunk.end) continue;
#pragma unroll
                for (int i = 0; i < N; ++i) {
                    const float x = Affine(group.value[0], group.value[1], w[i], shift[i])(z(b, i));
                    const float h = x <= 0.0f ? 0.0f : to_float(grads[b].value[i]);
                    passed[i] += h;
                    along[i] += h * (z(b, i) - group.value[0]);
                }
            }
        });
#pragma unroll
        for (int i = 0; i < N; ++i) along[i] *= group.value[1];
        store_floats(shared + thread * N, passed);
        store_floats(shared + (THREADS + thread) * N, along);
    }
    __syncthreads();
    const int first = chunk.part * columns * N;
    for (int i = thread; i < 2 * columns * N; i += THREADS) {
        const int kind = i / (columns * N), channel = i % (columns * N);
        if (first + channel >= s.channels) continue;
        const float *const values = shared + kind * THREADS * N + channel;
        float sum = 0.0f;
#pragma unroll 4
        for (int row = 0; row < place.rows; ++row) sum += values[row * columns * N];
        sums[chunk.sums(s, kind) + first + channel] = sum;
    }
}

// mean(w ⊙ h) and mean(w ⊙ h ⊙ x̂) of each group: `means`, (maps, groups, 2). A warp a group.
template <typename T>
__global__ void __launch_bounds__(THREADS, 3)
    combine_gradients(const float *sums, const T *weight, float *means, int64_t last, const Sizes s) {
    const int64_t group = int64_t(blockIdx.x) * WARPS + threadIdx.x / 32;
    if (group >= last) return;
    const int lane = int(threadIdx.x) % 32, first = int(group % s.groups()) * s.group;
    const float *const start = sums + group / s.groups() * s.chunks() * 2 * s.channels;
    float passed = 0.0f, along = 0.0f;
    for (int i = lane; i < s.chunks() * s.group; i += 32) {
        const int channel = first + i % s.group;
        const float *const sum = start + int64_t(i / s.group) * 2 * s.channels + channel;
        passed += to_float(weight[channel]) * sum[0];
        along += to_float(weight[channel]) * sum[s.channels];
    }
    const float count = float(s.positions) * float(s.group);
    passed = sum_over_lanes<32>(passed) / count, along = sum_over_lanes<32>(along) / count;
    if (lane == 0) store<float, 2>(means + group * 2, {{passed, along}});
}

// dy, where that is not null, and dterm of some of the classes, where that is not: (batch, splits, positions, channels).
template <typename T, int N>
__global__ void __launch_bounds__(THREADS, 3)
    differentiate(const T *grad, const T *y, const T *term, const float *statistics, const float *means,
                  const T *weight, const T *bias, T *y_grad, float *term_grad, int splits, const Sizes s) {
    const int parts = Place<N>::parts(s);
    const int64_t block = gridDim.x - 1 - blockIdx.x;  // from the end, as in the forward
    const Place<N> place(s, int(block % parts));
    const int tiles = (s.positions - 1) / place.rows + 1;
    const int position = int(block / parts % tiles) * place.rows + place.row;
    if (!place.active || position >= s.positions) return;
    const int64_t split = block / parts / tiles, image = split / splits;  // split: of all images
    const int each = (s.classes - 1) / splits + 1, begin = int(split % splits) * each;
    const int64_t within = int64_t(position) * s.channels + place.column;
    float shared[N] = {}, total[N] = {}, w[N], shift[N];
    if (term) load_floats(shared, term + image * s.map() + within);
    load_floats(w, weight + place.column);
    load_floats(shift, bias + place.column);
#pragma unroll 1
    for (int c = begin; c < min(begin + each, s.classes); ++c) {
        const int64_t map = image * s.classes + c, at = map * s.map() + within;
        const Vector<T, N> own = load<T, N>(y + at), g = load<T, N>(grad + at);
        const Pair<float> group = of_group(statistics, s, map, place.column);
        const Pair<float> mean = of_group(means, s, map, place.column);
        float z_grad[N];
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const float z = to_float(own.value[i]) + shared[i], normed = (z - group.value[0]) * group.value[1];
            const bool stopped = Affine(group.value[0], group.value[1], w[i], shift[i])(z) <= 0.0f;
            const float h = stopped ? 0.0f : to_float(g.value[i]);
            z_grad[i] = group.value[1] * (w[i] * h - mean.value[0] - normed * mean.value[1]);
            total[i] += z_grad[i];
        }
        if (y_grad) store_floats(y_grad + at, z_grad);
    }
    if (term_grad) store_floats(term_grad + split * s.map() + within, total);
}

// Calls `function` with a number of the format and how many channels a thread takes, as a type.
template <typename Function>
int by_format(const Sizes &s, int dtype, Function function) {
    return by_dtype(dtype, [&](auto number) {
        constexpr int MOST = 16 / int(sizeof(number));
        // A piece lies within one group.
        return s.group % MOST ? function(number, std::integral_constant<int, 1>())
                              : function(number, std::integral_constant<int, MOST>());
    });
}

bool takes(int64_t classes, int64_t positions, int64_t channels, int64_t groups, int64_t chunk) {
    constexpr int64_t MOST = INT32_MAX / 2;
    return classes >= 1 && classes <= MOST && positions >= 1 && positions <= MOST && channels >= 1 && channels <= MOST &&
           groups >= 1 && channels % groups == 0 && chunk >= 1 && chunk <= MOST &&
           ((positions - 1) / chunk + 1) * (channels / groups) <= MOST;
}

}  // namespace
}  // namespace ovseg

int ovseg_upsampling_decoder_norm_fwd(const void *y, const void *term, const void *weight, const void *bias, void *out,
                                      float *statistics, float *moments, int64_t batch, int64_t classes,
                                      int64_t positions, int64_t channels, int64_t groups, int64_t chunk, float eps,
                                      int dtype, int device, void *stream) {
    using namespace ovseg;
    if (!takes(classes, positions, channels, groups, chunk)) return OVSEG_UNSUPPORTED_SIZE;
    if (!aligned(y, term, weight, bias, out, statistics, moments)) return OVSEG_MISALIGNED;
    const Sizes s{int(classes), int(positions), int(channels), int(channels / groups), int(chunk)};
    const int64_t maps = batch * classes, last = maps * groups;
    return by_format(s, dtype, [&](auto number, auto together) {
        using T = decltype(number);
        constexpr int N = decltype(together)::value;
        const auto in = [](const void *pointer) { return static_cast<const T *>(pointer); };
        const int64_t blocks = maps * ((positions - 1) / chunk + 1) * Place<N>::parts(s);
        int error = launch(take_moments<T, N>, blocks, THREADS, 3 * THREADS * sizeof(float), device, stream, in(y),
                           in(term), moments, s);
        if (error) return error;
        error = launch(combine_moments<N>, (last + WARPS - 1) / WARPS, THREADS, 0, device, stream, moments, statistics,
                       last, eps, s);
        if (error) return error;
        return launch(normalise<T, N>, blocks, THREADS, 0, device, stream, in(y), in(term), statistics, in(weight),
                      in(bias), static_cast<T *>(out), s);
    });
}

int ovseg_upsampling_decoder_norm_bwd(const void *grad, const void *y, const void *term, const float *statistics,
                                      const void *weight, const void *bias, void *y_grad, float *term_grad, float *sums,
                                      float *means, int64_t batch, int64_t classes, int64_t positions, int64_t channels,
                                      int64_t groups, int64_t chunk, int64_t splits, int dtype, int device,
                                      void *stream) {
    using namespace ovseg;
    if (!takes(classes, positions, channels, groups, chunk) || splits < 1 || splits > classes) {
        return OVSEG_UNSUPPORTED_SIZE;
    }
    if (!aligned(grad, y, term, statistics, weight, bias, y_grad, term_grad, sums, means)) return OVSEG_MISALIGNED;
    const Sizes s{int(classes), int(positions), int(channels), int(channels / groups), int(chunk)};
    const int64_t maps = batch * classes, last = maps * groups;
    return by_format(s, dtype, [&](auto number, auto together) {
        using T = decltype(number);
        constexpr int N = decltype(together)::value;
        const auto in = [](const void *pointer) { return static_cast<const T *>(pointer); };
        const int64_t parts = Place<N>::parts(s), rows = THREADS / std::min<int64_t>(channels / N, THREADS);
        int error = launch(sum_gradients<T, N>, maps * ((positions - 1) / chunk + 1) * parts, THREADS,
                           2 * N * THREADS * sizeof(float), device, stream, in(grad), in(y), in(term), statistics,
                           in(weight), in(bias), sums, s);
        if (error || !(y_grad || term_grad)) return error;
        error = launch(combine_gradients<T>, (last + WARPS - 1) / WARPS, THREADS, 0, device, stream, sums, in(weight),
                       means, last, s);
        if (error) return error;
        return launch(differentiate<T, N>, batch * splits * ((positions - 1) / rows + 1) * parts, THREADS, 0, device,
                      stream, in(grad), in(y), in(term), statistics, means, in(weight), in(bias),
                      static_cast<T *>(y_grad), term_grad, int(splits), s);
    });
}
