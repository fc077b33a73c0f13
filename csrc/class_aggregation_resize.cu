// The end of class aggregation with pooling: x + y resized to the size of x, bilinear with aligned corners.
//
//     out[i, j] = x[i, j] + Σ_{a,b} hat(i · s_h − a) · hat(j · s_w − b) · y[a, b],   hat(d) = max(1 − |d|, 0)
//     dy[a, b] = Σ_{i,j} hat(i · s_h − a) · hat(j · s_w − b) · dout[i, j]
//
// with s_h = (h − 1) / (H − 1), s_w likewise. A thread takes 16 bytes of a token's channels; neighbouring
// tokens of out read the same ones of y. Backward gathers, in the order of the map.

#include "device/numbers.cuh"

namespace ovseg {
namespace {

constexpr int THREADS = 256;

// Divides n < 2³¹ by d in three instructions: (n + n · more / 2³²) / 2^shift, more = ⌈2³² (2^shift − d) / d⌉.
struct Divisor {
    uint32_t divisor, more;
    int shift = 0;

    explicit Divisor(int64_t number) : divisor(uint32_t(number)) {
        while ((int64_t(1) << shift) < number) ++shift;
        more = uint32_t((uint64_t((int64_t(1) << shift) - number) << 32) / uint64_t(number) + 1);
    }

    DEVICE int of(int n) const { return int((uint32_t(uint64_t(uint32_t(n)) * more >> 32) + uint32_t(n)) >> shift); }
    DEVICE int rest(int n, int quotient) const { return n - quotient * int(divisor); }
};

// One side of the maps.
struct Side {
    int size, low;
    float scale;

    Side(int64_t size, int64_t low)
        : size(int(size)), low(int(low)), scale(size > 1 ? float(double(low - 1) / double(size - 1)) : 0.0f) {}

    // The first place that `low_place` of the lower side weighs in, and the end.
    DEVICE int first(int low_place) const {
        return low > 1 && low_place > 0 ? (low_place - 1) * (size - 1) / (low - 1) : 0;
    }
    DEVICE int end(int low_place) const {
        return low > 1 ? min(((low_place + 1) * (size - 1) + low - 2) / (low - 1) + 1, size) : size;
    }
    DEVICE float share(int i, int low_place) const {
        return fmaxf(1.0f - fabsf(float(i) * scale - float(low_place)), 0.0f);
    }
};

template <typename T> struct Arguments {
    const T *x, *y;  // backward: grad and nothing
    T *out;
    Side lines, columns;
    Divisor width, vecs, blocks;  // tokens of a line of `out`, vecs of a token, blocks of a map
    int height;                   // of `out`
};

// What a thread works on: a vec of a token of map `map`.
struct Item {
    int map, line, column, vec;
    int64_t index;  // among all vecs of `out`
    bool inside;

    template <typename T> DEVICE explicit Item(const Arguments<T> &a) {
        map = a.blocks.of(int(blockIdx.x));
        const int of_map = a.blocks.rest(int(blockIdx.x), map) * THREADS + int(threadIdx.x);
        const int token = a.vecs.of(of_map);
        vec = a.vecs.rest(of_map, token);
        line = a.width.of(token);
        column = a.width.rest(token, line);
        inside = line < a.height;
        index = int64_t(map) * (a.height * int(a.width.divisor * a.vecs.divisor)) + of_map;
    }
};

template <typename T> __global__ void __launch_bounds__(THREADS, 4) resize_add(const Arguments<T> a) {
    const Item item(a);
    if (!item.inside) return;
    const float line = float(item.line) * a.lines.scale, column = float(item.column) * a.columns.scale;
    const int top = min(int(line), a.lines.low - 1), bottom = min(top + 1, a.lines.low - 1);
    const int left = min(int(column), a.columns.low - 1), right = min(left + 1, a.columns.low - 1);
    const float down = line - float(top), across = column - float(left), up = 1.0f - down, back = 1.0f - across;
    const int vecs = int(a.vecs.divisor);
    const T *const map = a.y + (int64_t(item.map) * (a.lines.low * a.columns.low * vecs) + item.vec) * VEC<T>;
    const auto read = [&](int i, int j) { return load_vec(map + (i * a.columns.low + j) * vecs * VEC<T>); };
    const Vec<T> corners[4] = {read(top, left), read(top, right), read(bottom, left), read(bottom, right)};
    const float shares[4] = {up * back, up * across, down * back, down * across};
    Vec<T> sum = load_vec(a.x + item.index * VEC<T>);
    unrolled<VEC<T>>([&](int i) {
        float total = to_float(sum.value[i]);
        unrolled<4>([&](int j) { total += shares[j] * to_float(corners[j].value[i]); });
        sum.value[i] = rounded<T>(total);
    });
    store(a.out + item.index * VEC<T>, sum);
}

template <typename T> __global__ void __launch_bounds__(THREADS, 4) resize_backward(const Arguments<T> a) {
    const Item item(a);
    if (!item.inside) return;
    const int first = a.columns.first(item.column), end = a.columns.end(item.column);
    const int last = a.lines.end(item.line), pitch = int(a.vecs.divisor) * VEC<T>;
    const T *const map = a.x + int64_t(item.map) * (a.lines.size * a.columns.size * pitch) + item.vec * VEC<T>;
    float total[VEC<T>] = {};
#pragma unroll 1
    for (int i = a.lines.first(item.line); i < last; ++i) {
        const float of_line = a.lines.share(i, item.line);
        const T *from = map + (i * a.columns.size + first) * pitch;
#pragma unroll 1
        for (int j = first; j < end; ++j, from += pitch) {
            const float share = of_line * a.columns.share(j, item.column);
            if (share == 0.0f) continue;  // 0 times NaN would be NaN
            const Vec<T> grad = load_vec(from);
            unrolled<VEC<T>>([&](int c) { total[c] += share * to_float(grad.value[c]); });
        }
    }
    store(a.out + item.index * VEC<T>, rounded<T>(total));
}

template <bool BACKWARD>
int resize(const void *x, const void *y, void *out, int64_t maps, int64_t height, int64_t width, int64_t low_height,
           int64_t low_width, int64_t channels, int dtype, int device, void *stream) {
    constexpr int64_t LONGEST = 1 << 15;  // so that products of two sides fit 31 bits
    if (height < 1 || width < 1 || low_height < 1 || low_width < 1 || low_height > height || low_width > width ||
        height > LONGEST || width > LONGEST || channels < 1 || channels > INT32_MAX / 2 / (height * width)) {
        return OVSEG_UNSUPPORTED_SIZE;
    }
    if (!aligned(x, y, out)) return OVSEG_MISALIGNED;
    return by_dtype(dtype, [&](auto number) {
        using T = decltype(number);
        if (channels % VEC<T>) return int(OVSEG_UNSUPPORTED_SIZE);
        const int64_t of_map = (BACKWARD ? low_height * low_width : height * width) * (channels / VEC<T>);
        const int64_t blocks = (of_map + THREADS - 1) / THREADS;
        const auto a = filled<Arguments<T>>(x, y, out, Side(height, low_height), Side(width, low_width),
                                            Divisor(BACKWARD ? low_width : width), Divisor(channels / VEC<T>),
                                            Divisor(blocks), BACKWARD ? low_height : height);
        return launch(BACKWARD ? resize_backward<T> : resize_add<T>, maps * blocks, THREADS, 0, device, stream, a);
    });
}

}  // namespace
}  // namespace ovseg

int ovseg_class_aggregation_resize_fwd(const void *x, const void *y, void *out, int64_t maps, int64_t height,
                                       int64_t width, int64_t low_height, int64_t low_width, int64_t channels,
                                       int dtype, int device, void *stream) {
    return ovseg::resize<false>(x, y, out, maps, height, width, low_height, low_width, channels, dtype, device, stream);
}

int ovseg_class_aggregation_resize_bwd(const void *grad, void *grad_y, int64_t maps, int64_t height, int64_t width,
                                       int64_t low_height, int64_t low_width, int64_t channels, int dtype, int device,
                                       void *stream) {
    return ovseg::resize<true>(grad, nullptr, grad_y, maps, height, width, low_height, low_width, channels, dtype,
                               device, stream);
}
