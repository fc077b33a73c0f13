// The end of class aggregation behind a pooling: x + y resized to the size of x, bilinear with aligned corners.
//
//     out[i, j] = x[i, j] + Σ_{a,b} hat(i · s_h − a) · hat(j · s_w − b) · y[a, b],   hat(d) = max(1 − |d|, 0)
//     dy[a, b] = Σ_{i,j} hat(i · s_h − a) · hat(j · s_w − b) · dout[i, j]
//
// with s_h = (h − 1) / (H − 1), s_w likewise. A thread takes 16 bytes of a token's channels: those of a token lie side by
// side, and neighbouring tokens of out read the same ones of y. Backward gathers, in the order of the map.

#include "device/numbers.cuh"

namespace ovseg {
namespace {

constexpr int THREADS = 256;

// One side of the maps.
struct Side {
    int size, low;
    float scale;

    Side(int64_t size, int64_t low)
        : size(int(size)), low(int(low)), scale(size > 1 ? float(double(low - 1) / double(size - 1)) : 0.0f) {}

    // The first place that `place` of the lower side may count in, and the one behind the last.
    __device__ __forceinline__ int first(int place) const {
        return low > 1 && place > 0 ? int(int64_t(place - 1) * (size - 1) / (low - 1)) : 0;
    }
    __device__ __forceinline__ int behind(int place) const {
        const int64_t end = low > 1 ? (int64_t(place + 1) * (size - 1) + low - 2) / (low - 1) + 1 : size;
        return end < size ? int(end) : size;
    }
    __device__ __forceinline__ float share(int i, int place) const {
        return fmaxf(1.0f - fabsf(float(i) * scale - float(place)), 0.0f);
    }
};

template <typename T>
struct Arguments {
    const T *x, *y;  // backward: grad and nothing
    T *out;
    int64_t pieces;
    Side lines, columns;
    int pieces_of_token;
};

// What a thread works on: a piece of the token (line, column) of a map.
struct Place {
    int64_t map;
    int line, column, piece;

    __device__ __forceinline__ Place(int64_t index, int pieces_of_token, int height, int width) {
        piece = int(index % pieces_of_token);
        const int64_t token = index / pieces_of_token;
        column = int(token % width);
        line = int(token / width % height);
        map = token / width / height;
    }
};

template <typename T>
__global__ void __launch_bounds__(THREADS) resize_add(const Arguments<T> a) {
    constexpr int EACH = 16 / int(sizeof(T));
    const int64_t index = int64_t(blockIdx.x) * THREADS + threadIdx.x;
    if (index >= a.pieces) return;
    const Place place(index, a.pieces_of_token, a.lines.size, a.columns.size);
    const float line = float(place.line) * a.lines.scale, column = float(place.column) * a.columns.scale;
    const int top = min(int(line), a.lines.low - 1), bottom = min(top + 1, a.lines.low - 1);
    const int left = min(int(column), a.columns.low - 1), right = min(left + 1, a.columns.low - 1);
    const float down = line - float(top), across = column - float(left);
    const auto read = [&](int i, int j) {
        const int64_t token = (place.map * a.lines.low + i) * a.columns.low + j;
        return load<T, EACH>(a.y + (token * a.pieces_of_token + place.piece) * EACH);
    };
    const Piece<T> corners[4] = {read(top, left), read(top, right), read(bottom, left), read(bottom, right)};
    Piece<T> sum = load<T, EACH>(a.x + index * EACH);
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const float upper = (1.0f - across) * to_float(corners[0].value[i]) + across * to_float(corners[1].value[i]);
        const float lower = (1.0f - across) * to_float(corners[2].value[i]) + across * to_float(corners[3].value[i]);
        sum.value[i] = rounded<T>(to_float(sum.value[i]) + ((1.0f - down) * upper + down * lower));
    }
    store<T, EACH>(a.out + index * EACH, sum);
}

template <typename T>
__global__ void __launch_bounds__(THREADS) resize_backward(const Arguments<T> a) {
    constexpr int EACH = 16 / int(sizeof(T));
    const int64_t index = int64_t(blockIdx.x) * THREADS + threadIdx.x;
    if (index >= a.pieces) return;
    const Place place(index, a.pieces_of_token, a.lines.low, a.columns.low);
    float total[EACH] = {};
#pragma unroll 1
    for (int i = a.lines.first(place.line); i < a.lines.behind(place.line); ++i) {
        const float of_line = a.lines.share(i, place.line);
        const int64_t first = (place.map * a.lines.size + i) * a.columns.size;
#pragma unroll 1
        for (int j = a.columns.first(place.column); j < a.columns.behind(place.column); ++j) {
            const float share = of_line * a.columns.share(j, place.column);
            if (share == 0.0f) continue;  // 0 times NaN would be NaN
            const Piece<T> grad = load<T, EACH>(a.x + ((first + j) * a.pieces_of_token + place.piece) * EACH);
#pragma unroll
            for (int c = 0; c < EACH; ++c) total[c] += share * to_float(grad.value[c]);
        }
    }
    Piece<T> sum;
#pragma unroll
    for (int c = 0; c < EACH; ++c) sum.value[c] = rounded<T>(total[c]);
    store<T, EACH>(a.out + index * EACH, sum);
}

template <bool BACKWARD>
int resize(const void *x, const void *y, void *out, int64_t maps, int64_t height, int64_t width, int64_t low_height,
           int64_t low_width, int64_t channels, int dtype, int device, void *stream) {
    if (height < 1 || width < 1 || low_height < 1 || low_width < 1 || low_height > height || low_width > width ||
        height > INT32_MAX / width || channels < 1 || channels > INT32_MAX) {
        return OVSEG_UNSUPPORTED_SIZE;
    }
    if (!aligned(x, y, out)) return OVSEG_MISALIGNED;
    return by_dtype(dtype, [&](auto number) {
        using T = decltype(number);
        constexpr int EACH = 16 / int(sizeof(T));
        if (channels % EACH) return int(OVSEG_UNSUPPORTED_SIZE);
        const int64_t tokens = maps * (BACKWARD ? low_height * low_width : height * width);
        const Arguments<T> a{static_cast<const T *>(x), static_cast<const T *>(y), static_cast<T *>(out),
                             tokens * (channels / EACH), Side(height, low_height), Side(width, low_width),
                             int(channels / EACH)};
        return launch(BACKWARD ? resize_backward<T> : resize_add<T>, (a.pieces + THREADS - 1) / THREADS, THREADS, 0,
                      device, stream, a);
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
