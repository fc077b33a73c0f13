// Spatial aggregation: one guided shifted-window transformer block over each class's map, in one kernel.
//
//     n = LN1(x);   q = Wq n + q_term,   k = Wk n + k_term,   v = Wv n + bv
//     y = x + Wo softmax(q kᵀ / √d + mask) v + bo,        within each window and head
//     out = y + W2 GELU(W1 LN2(y) + b1) + b2
//
// Twelve warps own a window of up to 144 tokens from x to out: three groups of 48 tokens by four heads of 32 channels.
// A product with weights gives each warp its tokens' results in its channels: a weight that it has read serves three
// products, a token four. Factors are shared through two tiles, which hold one after another
//
//     rows     n,  keys,  what the tokens attended to,  128 hidden units at a time
//     others       values,  y and LN2(y),  out
//
// and weights stream through a ring of buffers. Nothing is written to global memory but out and, for training, y.

#include "device/pieces.cuh"
#include "device/transformer.cuh"
#include "device/window_attention.cuh"

namespace ovseg {
namespace {

constexpr int GROUPS = 3, TILES = TOKENS / 16 / GROUPS, WARPS = GROUPS * HEADS, THREADS = WARPS * 32;
constexpr int UNITS = C;  // hidden units at a time

template <typename T>
struct Arguments {
    const T *x, *q_term, *k_term, *norm1_weight, *norm1_bias, *qkv_weight, *v_bias, *proj_weight, *proj_bias;
    const T *norm2_weight, *norm2_bias, *fc1_weight, *fc1_bias, *fc2_weight, *fc2_bias;
    T *out, *middle;
    Windows windows;
    int classes, hidden;
};

// Which thread of the block this is. What follows from its number, its places in tiles and maps, is worked out `again`
// in each part of the kernel instead of kept in registers all the while: `recomputed` alone does not keep ptxas from
// it, a number that comes from memory does.
struct Self {
    int thread;

    DEVICE void again(const Window &window) {
        thread += *static_cast<const volatile int *>(&window.zero);
        if (thread < 0) __builtin_unreachable();
    }
    DEVICE int lane() const { return thread % 32; }
    DEVICE int head() const { return thread / 32 % HEADS; }
    DEVICE int channel() const { return head() * WIDTH; }                    // the warp's first
    DEVICE int token() const { return thread / 32 / HEADS * (16 * TILES); }  // the warp's first
    DEVICE int row() const { return d_row(lane(), 0); }                      // of each eight rows of results
    DEVICE int column() const { return d_column(lane(), 0); }                // and of each eight columns
};

// A weight (C, C) comes in slices of its columns, 64 bytes wide.
template <typename T>
struct Slices {
    static constexpr int WIDTH = 2 * K<T>, COUNT = C / WIDTH, BYTES = 64 * C;
    static constexpr int RING = sizeof(T) == 2 ? 3 : 2;  // as many as sm_89 has memory for, and sm_80 for float32
};

template <typename T>
struct Shared {
    static constexpr int ROWS = TOKENS * C * int(sizeof(T)), HEAD = ROWS / HEADS;
    static constexpr int TOTAL = 2 * ROWS + Slices<T>::RING * Slices<T>::BYTES + int(sizeof(Window));
    static_assert(TOTAL <= (sizeof(T) == 2 ? SHARED_EVERYWHERE : 163 * 1024), "see SHARED_MEMORY of native.py");
};

// A weight (C, C), or such a part of one: its rows are `pitch` numbers apart. Nothing where `first` is null.
template <typename T>
struct Weight {
    const T *first;
    int pitch;
};

// The slices of one weight after the other, on their way through a ring of buffers.
template <typename T>
struct Stream {
    using Sizes = Slices<T>;
    static constexpr int LAST = (Sizes::RING - 1) * Sizes::BYTES;

    unsigned char *start;
    int place = 0;  // of the next slice

    DEVICE Stream(unsigned char *start, Weight<T> weight, Self self) : start(start) {
#pragma unroll
        for (int slice = 0; slice < Sizes::RING - 1; ++slice) fetch(start + slice * Sizes::BYTES, weight, slice, self);
    }

    DEVICE static void fetch(unsigned char *buffer, Weight<T> weight, int slice, Self self) {
        constexpr int COPYING = C * Tile<T, Sizes::WIDTH>::PIECES / 2;  // threads, a piece of both halves each
        const Tile<T, Sizes::WIDTH> tile{buffer};
        const int row = self.thread / tile.PIECES, piece = self.thread % tile.PIECES;
        if (weight.first && self.thread < COPYING) {
            const int column = piece * EACH<T> + slice * Sizes::WIDTH;
            const T *const source = weight.first + int64_t(row) * weight.pitch + column;
            copy_async(tile.piece(row, piece), source);
            copy_async(tile.rows_from(C / 2).piece(row, piece), source + int64_t(C / 2) * weight.pitch);
        }
        commit_copies();
    }

    // A slice of `weight`, to be multiplied before the next one is asked for, after which it is gone. All of the block
    // ask together, slice by slice, and say which weight follows.
    DEVICE Tile<T, Sizes::WIDTH> slice(int index, Weight<T> weight, Weight<T> following, Self self) {
        wait_for_copies<Sizes::RING - 2>();
        __syncthreads();
        const int ahead = index + Sizes::RING - 1;  // goes where the slice before this one was
        fetch(start + (place == 0 ? LAST : place - Sizes::BYTES), ahead < Sizes::COUNT ? weight : following,
              ahead % Sizes::COUNT, self);
        const Tile<T, Sizes::WIDTH> tile{start + place};
        place = place == LAST ? 0 : place + Sizes::BYTES;
        return tile;
    }
};

// A warp's results: TILES times 16 tokens by WIDTH channels.
using Results = D[TILES][WIDTH / 8];

// results += rows · weightᵀ. `following` is the weight that is multiplied next.
template <typename T>
DEVICE void multiply(Results &results, Tile<T, C> rows, Stream<T> &stream, Weight<T> weight, Weight<T> following,
                     Self self) {
#pragma unroll(sizeof(T) == 2 ? Slices<T>::COUNT : 1)
    for (int slice = 0; slice < Slices<T>::COUNT; ++slice) {
        const auto columns = stream.slice(slice, weight, following, self).rows_from(self.channel());
#pragma unroll
        for (int step = 0; step < 2; ++step) {
            A a[TILES];
#pragma unroll
            for (int m = 0; m < TILES; ++m) a[m] = load_a(rows.rows_from(16 * m), 2 * slice + step, self.lane());
#pragma unroll
            for (int n = 0; n < WIDTH / 16; ++n) {
                B b[2];
                load_b(b, columns.rows_from(16 * n), step, self.lane());
#pragma unroll
                for (int m = 0; m < TILES; ++m) {
                    mma<T>(results[m][2 * n], a[m], b[0]);
                    mma<T>(results[m][2 * n + 1], a[m], b[1]);
                }
            }
        }
    }
}

// A lane's results, two neighbours at a time: function(row_of(eight), n, first, second) for those in the lane's row of
// the eight rows from `eight` on, and in its columns of the eight columns from 8 · n on.
template <typename RowOf, typename Function>
DEVICE void each_pair(Results &results, RowOf row_of, Function function) {
#pragma unroll
    for (int m = 0; m < TILES; ++m) {
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
            const auto row = row_of(16 * m + 4 * i);
#pragma unroll
            for (int n = 0; n < WIDTH / 8; ++n) {
                float *const values = results[m][n].value;
                function(row, n, values[i], values[i + 1]);
            }
        }
    }
}

// A lane's two of the WIDTH numbers at `first`, of each eight.
template <typename T>
struct Bias {
    Pair<T> pairs[WIDTH / 8];

    DEVICE Bias(const T *first, int column) {
#pragma unroll
        for (int n = 0; n < WIDTH / 8; ++n) pairs[n] = load<T, 2>(first + 8 * n + column);
    }
    DEVICE float at(int n, int i) const { return to_float(pairs[n].value[i]); }
};

// Begins results with a number for each channel.
template <typename T>
DEVICE void begin(Results &results, const T *first, int column) {
    const Bias<T> bias(first, column);
    each_pair(
        results, [](int) { return 0; },
        [&](int, int n, float &first, float &second) { first = bias.at(n, 0), second = bias.at(n, 1); });
}

DEVICE void zero(Results &results) {
#pragma unroll
    for (int m = 0; m < TILES; ++m) {
#pragma unroll
        for (int n = 0; n < WIDTH / 8; ++n) results[m][n] = {};
    }
}

template <typename T>
__global__ void __launch_bounds__(THREADS) spatial_aggregation(const Arguments<T> a) {
    using Layout = Shared<T>;
    constexpr int LANES = C / EACH<T>, AT_ONCE = THREADS / LANES;  // lanes to a row, rows that the block takes at once
    unsigned char *const row_memory = shared_memory();
    unsigned char *const other_memory = row_memory + Layout::ROWS;
    unsigned char *const stage_memory = other_memory + Layout::ROWS;
    Window &window = *reinterpret_cast<Window *>(stage_memory + Slices<T>::RING * Slices<T>::BYTES);

    Self self{int(threadIdx.x)};
    const Weight<T> of_q{a.qkv_weight, C}, of_k{a.qkv_weight + C * C, C}, of_v{a.qkv_weight + 2 * C * C, C};
    const Weight<T> projection{a.proj_weight, C};
    Stream<T> stream(stage_memory, of_v, self);
    window.find<THREADS>(a.windows, int(blockIdx.x), a.classes);
    __syncthreads();

    const Tile<T, C> rows{row_memory}, others{other_memory};
    const auto own = [&](Tile<T, C> tile) { return tile.rows_from(self.token()); };
    const auto of_head = [&](unsigned char *memory) { return Tile<T, WIDTH>{memory + self.head() * Layout::HEAD}; };

    // Adds what lies at the warp's tokens and channels in maps or images that begin at `first`. Beyond the map it is
    // another token: what comes of it is masked or not written.
    const auto raise = [&](Results &results, const T *first) {
        const auto place_of = [&](int eight) {
            const int place = max(window.places[self.token() + eight + self.row()], 0);
            return first + int64_t(place) * C + (self.channel() + self.column());
        };
        each_pair(results, place_of, [&](const T *place, int n, float &left, float &right) {
            const Pair<T> pair = load<T, 2>(place + 8 * n);
            left += to_float(pair.value[0]);
            right += to_float(pair.value[1]);
        });
    };
    // Where in eight rows of a tile a lane's results go, in the columns from `column` on: see `each_pair`.
    const auto to = [&](auto tile, int column) {
        return [&self, tile, column](int eight) {
            return [&self, column, tile = tile.rows_from(self.token() + eight)](int n) {
                return tile.at(self.row(), column + self.column(), n * 8 / EACH<T>);
            };
        };
    };
    const auto keep = [](auto target, int n, float first, float second) { store_pair(target(n), first, second); };
    const auto piece = [&] { return self.thread % LANES * EACH<T>; };  // the channels that a thread takes of whole rows
    // function(row, where its piece of a map lies, whether it is there), for the pieces that a thread takes.
    const auto each_piece = [&](auto *map, auto function) {
#pragma unroll
        for (int first = 0; first < TOKENS; first += AT_ONCE) {
            const int row = first + self.thread / LANES, place = window.places[row];
            function(row, map + int64_t(max(place, 0)) * C + piece(), place >= 0);
        }
    };

    {
        const Piece<T> weight = load_piece(a.norm1_weight + piece());
        const Piece<T> bias = load_piece(a.norm1_bias + piece());
        each_piece(a.x + window.map * C, [&](int row, const T *place, bool) {
            store(rows.at(row, piece()), normalised<LANES>(load_piece(place), weight, bias));
        });
    }

    Results results;
    self.again(window);
    begin(results, a.v_bias + self.channel(), self.column());
    multiply(results, own(rows), stream, of_v, of_q, self);
    if (!window.whole) {  // a weight of 0 times NaN would be NaN
        each_pair(
            results, [&](int eight) { return window.places[self.token() + eight + self.row()]; },
            [](int place, int, float &first, float &second) {
                if (place < 0) first = second = 0.0f;
            });
    }
    each_pair(results, to(of_head(other_memory), 0), keep);
    self.again(window);
    zero(results);
    raise(results, a.q_term + window.image * C);
    multiply(results, own(rows), stream, of_q, of_k, self);
    constexpr int STEPS = WIDTH / K<T>;
    A tokens[TILES][STEPS];  // the tokens' queries, and later what they attended to, as factors
#pragma unroll
    for (int m = 0; m < TILES; ++m) {
#pragma unroll
        for (int k = 0; k < STEPS; ++k) tokens[m][k] = chained<T>(results[m], k);
    }
    self.again(window);
    zero(results);
    multiply(results, own(rows), stream, of_k, projection, self);
    // Not before: the queries wait in registers.
    raise(results, a.k_term + window.image * C);
    __syncthreads();  // n has been read by all
    each_pair(results, to(of_head(row_memory), 0), keep);
    __syncthreads();

    // The tiles move up, so that no register is indexed by a number known at run time only.
#pragma unroll 1
    for (int m = 0; m < TILES; ++m) {
        self.again(window);
        D attended[WIDTH / 8];
        attend<T>(attended, tokens[0], of_head(row_memory), of_head(other_memory), window, self.token() + 16 * m,
                  self.lane());
#pragma unroll
        for (int k = 0; k < STEPS; ++k) {
#pragma unroll
            for (int i = 0; i + 1 < TILES; ++i) tokens[i][k] = tokens[i + 1][k];
            tokens[TILES - 1][k] = chained<T>(attended, k);
        }
    }
    __syncthreads();  // keys and values have been read by all
#pragma unroll
    for (int m = 0; m < TILES; ++m) {
#pragma unroll
        for (int k = 0; k < STEPS; ++k) {
            store_chained<T>(own(rows).rows_from(16 * m), tokens[m][k], self.head() * STEPS + k, self.lane());
        }
    }
    begin(results, a.proj_bias + self.channel(), self.column());
    raise(results, a.x + window.map * C);
    multiply(results, own(rows), stream, projection, {a.fc1_weight, C}, self);
    {
        const Bias<T> bias(a.fc2_bias + self.channel(), self.column());
        each_pair(results, to(others, self.channel()), [&](auto target, int n, float &first, float &second) {
            const Pair<T> y = store_pair(target(n), first, second);
            first = to_float(y.value[0]) + bias.at(n, 0);
            second = to_float(y.value[1]) + bias.at(n, 1);
        });
    }
    __syncthreads();
    {
        const Piece<T> weight = load_piece(a.norm2_weight + piece());
        const Piece<T> bias = load_piece(a.norm2_bias + piece());
        each_piece(a.middle + window.map * C, [&](int row, T *place, bool there) {
            const Piece<T> y = load_piece(others.at(row, piece()));
            if (a.middle && there) store(place, y);
            store(others.at(row, piece()), normalised<LANES>(y, weight, bias));
        });
    }
    int unit = 0;
    do {  // there are hidden units, and the compiler need not keep sums for none
        self.again(window);
        const Weight<T> first{a.fc1_weight + unit * C, C}, second{a.fc2_weight + unit, a.hidden};
        const Weight<T> following{unit + UNITS < a.hidden ? first.first + UNITS * C : nullptr, C};
        Results units;
        begin(units, a.fc1_bias + unit + self.channel(), self.column());
        multiply(units, own(others), stream, first, second, self);
        self.again(window);
        each_pair(units, to(rows, self.channel()), [](auto target, int n, float first, float second) {
            store_pair(target(n), Gelu::of(first), Gelu::of(second));
        });
        multiply(results, own(rows), stream, second, following, self);
        unit += UNITS;
    } while (unit < a.hidden);
    each_pair(results, to(others, self.channel()), keep);
    __syncthreads();
    each_piece(a.out + window.map * C, [&](int row, T *place, bool there) {
        if (there) store(place, load_piece(others.at(row, piece())));
    });
}

}  // namespace
}  // namespace ovseg

int ovseg_spatial_aggregation_fwd(const ovseg_spatial_aggregation_params *params, int dtype, int device, void *stream) {
    using namespace ovseg;
    const auto &p = *params;
    if (!takes_windows(p.classes, p.height, p.width, p.channels, p.heads, p.window, p.shift) ||
        !takes_hidden(p.hidden, UNITS)) {
        return OVSEG_UNSUPPORTED_SIZE;
    }
    if (!aligned_params(p, p.batch)) return OVSEG_MISALIGNED;
    const Windows windows{int(p.height), int(p.width), int(p.window), int(p.shift)};
    return by_dtype(dtype, [&](auto number) {
        using T = decltype(number);
        const auto a =
            filled<Arguments<T>>(p.x, p.q_term, p.k_term, p.norm1_weight, p.norm1_bias, p.qkv_weight, p.v_bias,
                                 p.proj_weight, p.proj_bias, p.norm2_weight, p.norm2_bias, p.fc1_weight, p.fc1_bias,
                                 p.fc2_weight, p.fc2_bias, p.out, p.middle, windows, p.classes, p.hidden);
        return launch(spatial_aggregation<T>, p.batch * p.classes * windows.count(), THREADS, Shared<T>::TOTAL, device,
                      stream, a);
    });
}
