// How the kernels of a guided group normalisation share out positions and channels.
//
// A "map" is one class of one image, (positions, channels). A block takes a chunk of its positions with all channels; a
// thread keeps to N neighbouring channels of one group, a vector of 16 bytes where the sizes allow, else one.

#pragma once

#include "vectors.cuh"

namespace ovseg {

constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int BATCH = 2;  // vecs of a tensor that a thread reads at once

struct Sizes {
    int classes, positions, channels, group, chunk;  // group: channels of one; chunk: positions that a block takes

    DEVICE int chunks() const { return (positions - 1) / chunk + 1; }
    DEVICE int groups() const { return channels / group; }
    DEVICE int64_t map() const { return int64_t(positions) * channels; }
};

// The thread's channels, and its position among those that a block reads at once.
template <int N> struct Slot {
    int column, row, rows;  // column: the first channel
    bool active;

    DEVICE Slot(const Sizes &s, int part) {
        const int columns = min(s.channels / N, THREADS);
        rows = THREADS / columns, row = int(threadIdx.x) / columns;
        column = (part * columns + int(threadIdx.x) % columns) * N;
        active = row < rows && column < s.channels;
    }

    // Blocks that share a position's channels.
    static __host__ __device__ int parts(const Sizes &s) {
        const int vecs = s.channels / N;
        return (vecs - 1) / (vecs < THREADS ? vecs : THREADS) + 1;
    }
};

// A block's chunk of a map: block number -> map, chunk, part of the channels.
struct Chunk {
    int64_t map;
    int number, part, first, end;  // positions

    DEVICE Chunk(const Sizes &s, int64_t block, int parts) {
        part = int(block % parts);
        number = int(block / parts % s.chunks());
        map = block / parts / s.chunks();
        first = number * s.chunk, end = min(first + s.chunk, s.positions);
    }

    // The start of its sums of a kind in (maps, chunks, 2, channels).
    DEVICE int64_t sums(const Sizes &s, int kind) const {
        return ((map * s.chunks() + number) * 2 + kind) * s.channels;
    }
};

// N numbers, a vector or a single one; zeros unless `present`.
template <int N, typename T> DEVICE void load_floats(float (&values)[N], const T *address, bool present = true) {
    if constexpr (N == VEC<T>) {
        const Floats<T> found = floats(load_vec(address, 0, present ? N : 0, true));
        unrolled<N>([&](int i) { values[i] = found.value[i]; });
    } else {
        static_assert(N == 1);
        values[0] = present ? to_float(*address) : 0.0f;
    }
}

template <int N, typename T> DEVICE void store_floats(T *address, const float (&values)[N]) {
    constexpr int AT_ONCE = N * int(sizeof(T)) > 16 ? 16 / int(sizeof(T)) : N;
#pragma unroll
    for (int first = 0; first < N; first += AT_ONCE) {
        Vector<T, AT_ONCE> vector;
        unrolled<AT_ONCE>([&](int i) { vector.value[i] = rounded<T>(values[first + i]); });
        store<T, AT_ONCE>(address + first, vector);
    }
}

// function(present, index, z) for the thread's positions of a chunk, BATCH at a time: how many there are, the index of
// the first one among the maps, and z of their channels, 0 beyond the chunk. The second lies slot.rows · s.channels
// behind.
template <int N, typename T, typename Function>
DEVICE void each_position(const Sizes &s, const Chunk &chunk, const Slot<N> &slot, const T *y, const T *term,
                          Function function) {
    const int step = slot.rows * s.channels;
    const int64_t to_term = (chunk.map / s.classes - chunk.map) * s.map();
    int64_t index = chunk.map * s.map() + int64_t(chunk.first + slot.row) * s.channels + slot.column;
#pragma unroll 1
    for (int left = chunk.end - chunk.first - slot.row; left > 0; left -= BATCH * slot.rows) {
        float z[BATCH][N], terms[BATCH][N];
        unrolled<BATCH>([&](int b) {
            load_floats(z[b], y + index + b * step, b * slot.rows < left);
            load_floats(terms[b], term + to_term + index + b * step, term != nullptr && b * slot.rows < left);
        });
        unrolled<BATCH, N>([&](int b, int i) { z[b][i] += terms[b][i]; });
        static_assert(BATCH == 2);
        function(left > slot.rows ? 2 : 1, index, z);
        index += BATCH * step;
    }
}

// w ⊙ x̂ + β as z · slope + shift, in PyTorch's order for infinite w. One fma: both passes agree on what passes ReLU.
struct Affine {
    float slope, shift;

    Affine() = default;
    DEVICE Affine(float mean, float scale, float weight, float bias)
        : slope(scale * weight), shift(fmaf(-mean, slope, bias)) {}

    DEVICE float operator()(float z) const { return fmaf(z, slope, shift); }
};

template <int N, typename T>
DEVICE void load_affine(Affine (&affine)[N], const Pair<float> &group, const T *weight, const T *bias) {
    float w[N], shift[N];
    load_floats(w, weight);
    load_floats(shift, bias);
    unrolled<N>([&](int i) { affine[i] = Affine(group.value[0], group.value[1], w[i], shift[i]); });
}

// Both numbers of the group of a channel, from (maps, groups, 2).
DEVICE Pair<float> of_group(const float *values, const Sizes &s, int64_t map, int channel) {
    return load<float, 2>(values + (map * s.groups() + channel / s.group) * 2);
}

// function(number of the format, channels that a thread takes, as a type).
template <typename Function> int by_format(const Sizes &s, int dtype, Function function) {
    return by_dtype(dtype, [&](auto number) {
        constexpr int MOST = 16 / int(sizeof(number));
        return s.group % MOST ? function(number, std::integral_constant<int, 1>())
                              : function(number, std::integral_constant<int, MOST>());
    });
}

inline bool takes_norm(int64_t classes, int64_t positions, int64_t channels, int64_t groups, int64_t chunk) {
    constexpr int64_t MOST = INT32_MAX / 2;
    return classes >= 1 && classes <= MOST && positions >= 1 && positions <= MOST && channels >= 1 &&
           channels <= MOST && groups >= 1 && channels % groups == 0 && chunk >= 1 && chunk <= MOST &&
           ((positions - 1) / chunk + 1) * (channels / groups) <= MOST;
}

}  // namespace ovseg
