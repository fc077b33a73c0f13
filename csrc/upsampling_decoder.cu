// Guided group normalisation, around the convolutions of a stage of the upsampling decoder:
//
//     z = y + term,   x̂ = (z − mean) / s,   out = ReLU(w ⊙ x̂ + β),   s = √(variance + ε)
//
// with mean and variance over the positions and channels of a group, for each image and class; term is the same for all
// classes, or absent. Moments are taken chunk by chunk, mean first and then centred squares, and combined as Chan,
// Golub and LeVeque do, so that a mean far from zero costs no digits. Every sum has a fixed order.

#include "device/group_norm.cuh"

namespace ovseg {
namespace {

// Mean and centred squares of each slot of N channels over a chunk: `moments`, (maps, chunks, 2, channels), of which
// the first channels / N numbers of a row are used.
template <typename T, int N>
__global__ void __launch_bounds__(THREADS, 3) take_moments(const T *y, const T *term, float *moments, const Sizes s) {
    float *const counts = reinterpret_cast<float *>(shared_memory());
    float *const means = counts + THREADS, *const squares = means + THREADS;
    const Chunk chunk(s, blockIdx.x, Slot<N>::parts(s));
    const Slot<N> slot(s, chunk.part);
    float count = 0.0f, mean = 0.0f, square = 0.0f;
    if (slot.active) {
        each_position(s, chunk, slot, y, term, [&](int present, int64_t, const float (&z)[BATCH][N]) {
            const float added = float(present * N);  // a power of two
            float sum = 0.0f, centred = 0.0f;
            unrolled<BATCH * N>([&](int i) { sum += z[i / N][i % N]; });
            const float batch_mean = sum * (present == BATCH ? 1.0f / (BATCH * N) : 1.0f / N);
            unrolled<BATCH * N>([&](int i) {
                const float offset = z[i / N][i % N] - batch_mean;
                centred += i / N < present ? offset * offset : 0.0f;
            });
            const float offset = batch_mean - mean, share = added * fast_reciprocal(count + added);
            mean += offset * share;
            square += centred + offset * (count * share) * offset;
            count += added;
        });
    }
    const int thread = int(threadIdx.x);
    counts[thread] = count, means[thread] = mean, squares[thread] = square;
    __syncthreads();
    if (!slot.active || slot.row > 0) return;
    const int columns = min(s.channels / N, THREADS);
    float total = 0.0f, sum = 0.0f;
    square = 0.0f;
#pragma unroll 4
    for (int i = thread; i < slot.rows * columns; i += columns) {
        total += counts[i];
        sum += counts[i] * means[i];
    }
    mean = sum / total;
#pragma unroll 4
    for (int i = thread; i < slot.rows * columns; i += columns) {
        const float offset = means[i] - mean;
        square += squares[i] + (counts[i] > 0.0f ? counts[i] * offset * offset : 0.0f);
    }
    moments[chunk.sums(s, 0) + slot.column / N] = mean;
    moments[chunk.sums(s, 1) + slot.column / N] = square;
}

// Mean and 1 / s of each group: `statistics`, (maps, groups, 2). A warp a group.
template <int N>
__global__ void __launch_bounds__(THREADS, 3)
    combine_moments(const float *moments, float *statistics, int64_t last, float eps, const Sizes s) {
    const int64_t group = int64_t(blockIdx.x) * WARPS + threadIdx.x / 32;
    if (group >= last) return;
    const int vecs = s.group / N, lane = int(threadIdx.x) % 32;
    const int64_t map = group / s.groups();
    const float *const start = moments + map * s.chunks() * 2 * s.channels + group % s.groups() * vecs;
    const auto each = [&](auto function) {  // (numbers, their mean, their centred squares)
        float sum = 0.0f;
        for (int i = lane; i < s.chunks() * vecs; i += 32) {
            const int chunk = i / vecs;
            const float *const mean = start + int64_t(chunk) * 2 * s.channels + i % vecs;
            sum += function(float(min(s.positions - chunk * s.chunk, s.chunk)) * N, mean[0], mean[s.channels]);
        }
        return sum_over_lanes<32>(sum) / (float(s.positions) * float(s.group));
    };
    const float mean = each([](float count, float part, float) { return count * part; });
    const float variance =
        each([&](float count, float part, float squares) { return squares + count * (part - mean) * (part - mean); });
    if (lane == 0) store<float, 2>(statistics + group * 2, {{mean, 1.0f / sqrtf(variance + eps)}});
}

template <typename T, int N>
__global__ void __launch_bounds__(THREADS, 3) normalise_groups(const T *y, const T *term, const float *statistics,
                                                               const T *weight, const T *bias, T *out, const Sizes s) {
    // From the end: what the moments were taken of last may still be in the cache.
    const Chunk chunk(s, gridDim.x - 1 - blockIdx.x, Slot<N>::parts(s));
    const Slot<N> slot(s, chunk.part);
    if (!slot.active) return;
    const Pair<float> group = of_group(statistics, s, chunk.map, slot.column);
    Affine affine[N];
    load_affine(affine, group, weight + slot.column, bias + slot.column);
    each_position(s, chunk, slot, y, term, [&](int present, int64_t index, const float (&z)[BATCH][N]) {
#pragma unroll
        for (int b = 0; b < BATCH; ++b) {
            if (b >= present) continue;
            float passed[N];
            unrolled<N>([&](int i) {
                const float x = affine[i](z[b][i]);
                passed[i] = x < 0.0f ? 0.0f : x;  // NaN passes
            });
            store_floats(out + index + b * slot.rows * s.channels, passed);
        }
    });
}

}  // namespace
}  // namespace ovseg

int ovseg_upsampling_decoder_norm_fwd(const void *y, const void *term, const void *weight, const void *bias, void *out,
                                      float *statistics, float *moments, int64_t batch, int64_t classes,
                                      int64_t positions, int64_t channels, int64_t groups, int64_t chunk, float eps,
                                      int dtype, int device, void *stream) {
    using namespace ovseg;
    if (!takes_norm(classes, positions, channels, groups, chunk)) return OVSEG_UNSUPPORTED_SIZE;
    if (!aligned(y, term, weight, bias, out, statistics, moments)) return OVSEG_MISALIGNED;
    const Sizes s{int(classes), int(positions), int(channels), int(channels / groups), int(chunk)};
    const int64_t maps = batch * classes, last = maps * groups;
    return by_format(s, dtype, [&](auto number, auto together) {
        using T = decltype(number);
        constexpr int N = decltype(together)::value;
        const int64_t blocks = maps * ((positions - 1) / chunk + 1) * Slot<N>::parts(s);
        if (const int error = launch(take_moments<T, N>, blocks, THREADS, 3 * THREADS * sizeof(float), device, stream,
                                     y, term, moments, s))
            return error;
        if (const int error = launch(combine_moments<N>, (last + WARPS - 1) / WARPS, THREADS, 0, device, stream,
                                     moments, statistics, last, eps, s))
            return error;
        return launch(normalise_groups<T, N>, blocks, THREADS, 0, device, stream, y, term, statistics, weight, bias,
                      out, s);
    });
}
