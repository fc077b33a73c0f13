// Backward of the guided group normalisation in upsampling_decoder.cu, from the gradient g of out, with h = g where
// out > 0, else 0, and means over a group:
//
//     dy = (w ⊙ h − mean(w ⊙ h) − x̂ · mean(w ⊙ h ⊙ x̂)) / s,   dterm = Σ dy over the classes
//     dw = Σ h ⊙ x̂,   dβ = Σ h
//
// The last kernel's threads keep to one position and go through the classes. Every sum has a fixed order.

#include "device/group_norm.cuh"

namespace ovseg {
namespace {

// Σ h and Σ h ⊙ x̂ of each channel over a chunk: `sums`, (maps, chunks, 2, channels).
template <typename T, int N>
__global__ void __launch_bounds__(THREADS, 2)
    sum_gradients(const T *grad, const T *y, const T *term, const float *statistics, const T *weight, const T *bias,
                  float *sums, const Sizes s) {
    float *const shared = reinterpret_cast<float *>(shared_memory());  // (2, threads, N)
    const Chunk chunk(s, blockIdx.x, Slot<N>::parts(s));
    const Slot<N> slot(s, chunk.part);
    const int thread = int(threadIdx.x), columns = min(s.channels / N, THREADS);
    if (slot.active) {
        const Pair<float> group = of_group(statistics, s, chunk.map, slot.column);
        Affine affine[N];
        load_affine(affine, group, weight + slot.column, bias + slot.column);
        float passed[N] = {}, along[N] = {};
        each_position(s, chunk, slot, y, term, [&](int present, int64_t index, const float (&z)[BATCH][N]) {
            float grads[BATCH][N];  // 0 beyond the chunk
#pragma unroll
            for (int b = 0; b < BATCH; ++b)
                load_floats(grads[b], grad + index + b * slot.rows * s.channels, b < present);
            unrolled<BATCH, N>([&](int b, int i) {
                const float h = b >= present || affine[i](z[b][i]) <= 0.0f ? 0.0f : grads[b][i];
                passed[i] += h;
                along[i] += h * (z[b][i] - group.value[0]);
            });
        });
        unrolled<N>([&](int i) { along[i] *= group.value[1]; });
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
        for (int row = 0; row < slot.rows; ++row) sum += values[row * columns * N];
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

// dy, or null, and dterm of a split of the classes, or null: (batch, splits, positions, channels).
template <typename T, int N>
__global__ void __launch_bounds__(THREADS, 3)
    differentiate(const T *grad, const T *y, const T *term, const float *statistics, const float *means,
                  const T *weight, const T *bias, T *y_grad, float *term_grad, int splits, const Sizes s) {
    const int parts = Slot<N>::parts(s);
    const int64_t block = gridDim.x - 1 - blockIdx.x;  // from the end, as in the forward
    const Slot<N> slot(s, int(block % parts));
    const int tiles = (s.positions - 1) / slot.rows + 1;
    const int position = int(block / parts % tiles) * slot.rows + slot.row;
    if (!slot.active || position >= s.positions) return;
    const int64_t split = block / parts / tiles, image = split / splits;  // split: of all images
    const int each = (s.classes - 1) / splits + 1, begin = int(split % splits) * each;
    const int64_t within = int64_t(position) * s.channels + slot.column;
    float shared[N], total[N] = {}, w[N], shift[N];
    load_floats(shared, term + image * s.map() + within, term != nullptr);
    load_floats(w, weight + slot.column);
    load_floats(shift, bias + slot.column);
    const int64_t map = image * s.classes + begin;
    int64_t index = map * s.map() + within, of_group = (map * s.groups() + slot.column / s.group) * 2;
#pragma unroll 1
    for (int left = min(each, s.classes - begin); left > 0; --left, index += s.map(), of_group += 2 * s.groups()) {
        float z[N], h[N], z_grad[N];
        load_floats(z, y + index);
        load_floats(h, grad + index);
        const Pair<float> group = load<float, 2>(statistics + of_group), mean = load<float, 2>(means + of_group);
        const float base = -group.value[1] * mean.value[0], along = -group.value[1] * group.value[1] * mean.value[1];
        unrolled<N>([&](int i) {
            z[i] += shared[i];
            const Affine affine(group.value[0], group.value[1], w[i], shift[i]);
            if (affine(z[i]) <= 0.0f) h[i] = 0.0f;
            z_grad[i] = fmaf(affine.slope, h[i], fmaf(z[i] - group.value[0], along, base));
            total[i] += z_grad[i];
        });
        if (y_grad) store_floats(y_grad + index, z_grad);
    }
    if (term_grad) store_floats(term_grad + split * s.map() + within, total);
}

}  // namespace
}  // namespace ovseg

int ovseg_upsampling_decoder_norm_bwd(const void *grad, const void *y, const void *term, const float *statistics,
                                      const void *weight, const void *bias, void *y_grad, float *term_grad, float *sums,
                                      float *means, int64_t batch, int64_t classes, int64_t positions, int64_t channels,
                                      int64_t groups, int64_t chunk, int64_t splits, int dtype, int device,
                                      void *stream) {
    using namespace ovseg;
    if (!takes_norm(classes, positions, channels, groups, chunk) || splits < 1 || splits > classes) {
        return OVSEG_UNSUPPORTED_SIZE;
    }
    if (!aligned(grad, y, term, statistics, weight, bias, y_grad, term_grad, sums, means)) return OVSEG_MISALIGNED;
    const Sizes s{int(classes), int(positions), int(channels), int(channels / groups), int(chunk)};
    const int64_t maps = batch * classes, last = maps * groups;
    return by_format(s, dtype, [&](auto number, auto together) {
        using T = decltype(number);
        constexpr int N = decltype(together)::value;
        const int64_t parts = Slot<N>::parts(s), rows = THREADS / std::min<int64_t>(channels / N, THREADS);
        int error =
            launch(sum_gradients<T, N>, maps * ((positions - 1) / chunk + 1) * parts, THREADS,
                   2 * N * THREADS * sizeof(float), device, stream, grad, y, term, statistics, weight, bias, sums, s);
        if (error || !(y_grad || term_grad)) return error;
        if (const int error = launch(combine_gradients<T>, (last + WARPS - 1) / WARPS, THREADS, 0, device, stream, sums,
                                     weight, means, last, s))
            return error;
        return launch(differentiate<T, N>, batch * splits * ((positions - 1) / rows + 1) * parts, THREADS, 0, device,
                      stream, grad, y, term, statistics, means, weight, bias, y_grad, term_grad, splits, s);
    });
}
