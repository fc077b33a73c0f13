// Spatial aggregation: one guided shifted-window transformer block over each class's map, in one kernel.
//
//     n = LN1(x);   q = Wq n + q_term,   k = Wk n + k_term,   v = Wv n + bv
//     y = x + Wo softmax(q kᵀ / √d + mask) v + bo,        within each window and head
//     out = y + W2 GELU(W1 LN2(y) + b1) + b2
//
// Twelve warps own a window of up to 144 tokens from x to out: three groups of 48 tokens by four heads of 32 channels.
// A product with weights gives each warp its tokens' results in its channels: a weight fragment serves three products,
// a token fragment four. Two tiles in shared memory hold one after another
//
//     smem_tokens     n,  keys,  what the tokens attended to,  128 hidden units at a time
//     smem_values       values,  y and LN2(y),  out
//
// and weights stream through a ring of buffers. Nothing is written to global memory but out and, for training, y.

#include "device/transformer.cuh"
#include "device/vectors.cuh"
#include "device/window_attention.cuh"

namespace ovseg {
namespace {

constexpr int GROUPS = 3, TILES = TOKENS / 16 / GROUPS, WARPS = GROUPS * HEADS, THREADS = WARPS * 32;
constexpr int UNITS = C;  // hidden units at a time

template <typename T> struct Arguments {
    const T *x, *q_term, *k_term, *norm1_weight, *norm1_bias, *qkv_weight, *v_bias, *proj_weight, *proj_bias;
    const T *norm2_weight, *norm2_bias, *fc1_weight, *fc1_bias, *fc2_weight, *fc2_bias;
    T *out, *middle;
    Windows windows;
    int classes, hidden;
};

// The thread's number in the block, and what follows from it: `refresh` recomputes it in each part of the
// kernel instead of kept in registers. Only a number from memory keeps ptxas from it; `recomputed` does not.
struct Thread {
    int index;

    DEVICE void refresh(const Window &window) {
        index += *static_cast<const volatile int *>(&window.zero);
        if (index < 0) __builtin_unreachable();
    }
    DEVICE int lane() const { return index % 32; }
    DEVICE int head() const { return index / 32 % HEADS; }
    DEVICE int channel() const { return head() * WIDTH; }                   // the warp's first
    DEVICE int token() const { return index / 32 / HEADS * (16 * TILES); }  // the warp's first
    DEVICE int row() const { return acc_row(lane(), 0); }                   // of each eight rows of results
    DEVICE int column() const { return acc_col(lane(), 0); }                // and of each eight columns
};

// A weight (C, C) comes in slices of its columns, 64 bytes wide.
template <typename T> struct Slices {
    static constexpr int WIDTH = 2 * K<T>, COUNT = C / WIDTH, BYTES = 64 * C;
    static constexpr int RING = sizeof(T) == 2 ? 3 : 2;  // as many as sm_89 has memory for, and sm_80 for float32
};

template <typename T> struct Shared {
    static constexpr int ROWS = TOKENS * C * int(sizeof(T)), HEAD = ROWS / HEADS;
    static constexpr int TOTAL = 2 * ROWS + Slices<T>::RING * Slices<T>::BYTES + int(sizeof(Window));
    static_assert(TOTAL <= (sizeof(T) == 2 ? SHARED_EVERYWHERE : 163 * 1024), "float32 needs an sm_80, 90 or 100");
};

// A weight (C, C), or such a part of one: its rows are `pitch` numbers apart. Nothing where `first` is null.
template <typename T> struct Weight {
    const T *first;
    int pitch;
};

// The slices of one weight after the other, on their way through a ring of buffers.
template <typename T> struct Stream {
    using Sizes = Slices<T>;
    static constexpr int LAST = (Sizes::RING - 1) * Sizes::BYTES;

    unsigned char *start;
    int offset = 0;  // of the next slice

    DEVICE Stream(unsigned char *start, Weight<T> weight, Thread thread) : start(start) {
#pragma unroll
        for (int slice = 0; slice < Sizes::RING - 1; ++slice)
            fetch(start + slice * Sizes::BYTES, weight, slice, thread);
    }

    DEVICE static void fetch(unsigned char *buffer, Weight<T> weight, int slice, Thread thread) {
        constexpr int COPYING = C * Tile<T, Sizes::WIDTH>::VECS / 2;  // threads, a vector of both halves each
        const Tile<T, Sizes::WIDTH> tile{buffer};
        const int row = thread.index / tile.VECS, vec = thread.index % tile.VECS;
        if (weight.first && thread.index < COPYING) {
            const int column = vec * VEC<T> + slice * Sizes::WIDTH;
            const T *const source = weight.first + int64_t(row) * weight.pitch + column;
            copy_async(tile.vec(row, vec), source);
            copy_async(tile.rows_from(C / 2).vec(row, vec), source + int64_t(C / 2) * weight.pitch);
        }
        commit_copies();
    }

    // A slice of `weight`, valid until the next one is taken, which all of the block do together.
    DEVICE Tile<T, Sizes::WIDTH> slice(int index, Weight<T> weight, Weight<T> following, Thread thread) {
        wait_for_copies<Sizes::RING - 2>();
        __syncthreads();
        const int ahead = index + Sizes::RING - 1;  // goes where the slice before this one was
        fetch(start + (offset == 0 ? LAST : offset - Sizes::BYTES), ahead < Sizes::COUNT ? weight : following,
              ahead % Sizes::COUNT, thread);
        const Tile<T, Sizes::WIDTH> tile{start + offset};
        offset = offset == LAST ? 0 : offset + Sizes::BYTES;
        return tile;
    }
};

// A warp's results: TILES times 16 tokens by WIDTH channels.
using WarpAcc = Acc[TILES][WIDTH / 8];

// acc += rows · weightᵀ. `following` is the weight that is multiplied next.
template <typename T>
DEVICE void multiply(WarpAcc &acc, Tile<T, C> rows, Stream<T> &stream, Weight<T> weight, Weight<T> following,
                     Thread thread) {
#pragma unroll(sizeof(T) == 2 ? Slices<T>::COUNT : 1)
    for (int slice = 0; slice < Slices<T>::COUNT; ++slice) {
        const auto columns = stream.slice(slice, weight, following, thread).rows_from(thread.channel());
#pragma unroll
        for (int step = 0; step < 2; ++step) {
            FragA frag_a[TILES];
            unrolled<TILES>(
                [&](int m) { frag_a[m] = load_a(rows.rows_from(16 * m), 2 * slice + step, thread.lane()); });
#pragma unroll
            for (int n = 0; n < WIDTH / 8; n += 2) {
                const FragB2 frag_b = load_b(columns.rows_from(8 * n), step, thread.lane());
                unrolled<TILES>([&](int m) { mma<T>(acc[m] + n, frag_a[m], frag_b); });
            }
        }
    }
}

// A lane's results, two neighbours at a time: function(row_of(eight), n, first, second) for those in the lane's row of
// the eight rows from `eight` on, and in its columns of the eight columns from 8 · n on.
template <typename RowOf, typename Function> DEVICE void each_pair(WarpAcc &acc, RowOf row_of, Function function) {
#pragma unroll
    for (int m = 0; m < TILES; ++m) {
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
            const auto row = row_of(16 * m + 4 * i);
            unrolled<WIDTH / 8>([&](int n) { function(row, n, acc[m][n].value[i], acc[m][n].value[i + 1]); });
        }
    }
}

// A lane's two of the WIDTH numbers at `first`, of each eight.
template <typename T> struct Bias {
    Pair<T> pairs[WIDTH / 8];

    DEVICE Bias(const T *first, int column) {
        unrolled<WIDTH / 8>([&](int n) { pairs[n] = load<T, 2>(first + 8 * n + column); });
    }
    DEVICE float at(int n, int i) const { return to_float(pairs[n].value[i]); }
};

DEVICE void zero(WarpAcc &acc) {
    unrolled<TILES, WIDTH / 8>([&](int m, int n) { acc[m][n] = {}; });
}

// acc = a number for each channel.
template <typename T> DEVICE void fill(WarpAcc &acc, const T *first, int column) {
    const Bias<T> bias(first, column);
    each_pair(
        acc, [](int) { return 0; },
        [&](int, int n, float &left, float &right) { left = bias.at(n, 0), right = bias.at(n, 1); });
}

template <typename T> __global__ void __launch_bounds__(THREADS) spatial_aggregation(const Arguments<T> a) {
    using Layout = Shared<T>;
    constexpr int LANES = C / VEC<T>, AT_ONCE = THREADS / LANES;  // lanes to a row, rows that the block takes at once
    unsigned char *const token_memory = shared_memory();
    unsigned char *const value_memory = token_memory + Layout::ROWS;
    unsigned char *const stage_memory = value_memory + Layout::ROWS;
    Window &window = *reinterpret_cast<Window *>(stage_memory + Slices<T>::RING * Slices<T>::BYTES);

    Thread thread{int(threadIdx.x)};
    const Weight<T> q_weight{a.qkv_weight, C}, k_weight{a.qkv_weight + C * C, C}, v_weight{a.qkv_weight + 2 * C * C, C};
    const Weight<T> proj_weight{a.proj_weight, C};
    Stream<T> stream(stage_memory, v_weight, thread);
    window.init<THREADS>(a.windows, int(blockIdx.x), a.classes);
    __syncthreads();

    const Tile<T, C> smem_tokens{token_memory}, smem_values{value_memory};
    const auto warp_rows = [&](Tile<T, C> tile) { return tile.rows_from(thread.token()); };
    const auto of_head = [&](unsigned char *memory) { return Tile<T, WIDTH>{memory + thread.head() * Layout::HEAD}; };

    // Adds the numbers at the warp's tokens and channels in maps or images that begin at `first`. Beyond the map they
    // are another token's: the results are masked or not written.
    const auto add_from = [&](WarpAcc &acc, const T *first) {
        const auto address_of = [&](int eight) {
            const int position = max(window.positions[thread.token() + eight + thread.row()], 0);
            return first + int64_t(position) * C + (thread.channel() + thread.column());
        };
        each_pair(acc, address_of, [&](const T *address, int n, float &left, float &right) {
            const Pair<T> pair = load<T, 2>(address + 8 * n);
            left += to_float(pair.value[0]);
            right += to_float(pair.value[1]);
        });
    };
    // The addresses of a lane's results in a tile, in the columns from `column` on: see `each_pair`.
    const auto rows_of = [&](auto tile, int column) {
        return [&thread, tile, column](int eight) {
            return [&thread, column, tile = tile.rows_from(thread.token() + eight)](int n) {
                return tile.at(thread.row(), column + thread.column(), n * 8 / VEC<T>);
            };
        };
    };
    const auto store_acc = [](auto row, int n, float left, float right) { store_pair(row(n), left, right); };
    const auto column = [&] { return thread.index % LANES * VEC<T>; };  // of the vectors that a thread takes of rows
    // function(row, the address in a map, whether it is on the map), for the vectors that a thread takes.
    const auto each_vec = [&](auto *map, auto function) {
#pragma unroll
        for (int first = 0; first < TOKENS; first += AT_ONCE) {
            const int row = first + thread.index / LANES, position = window.positions[row];
            function(row, map + int64_t(max(position, 0)) * C + column(), position >= 0);
        }
    };

    {
        const Vec<T> weight = load_vec(a.norm1_weight + column()), bias = load_vec(a.norm1_bias + column());
        each_vec(a.x + window.map * C, [&](int row, const T *address, bool) {
            store(smem_tokens.at(row, column()), normalised<LANES>(load_vec(address), weight, bias));
        });
    }

    WarpAcc acc;
    thread.refresh(window);
    fill(acc, a.v_bias + thread.channel(), thread.column());
    multiply(acc, warp_rows(smem_tokens), stream, v_weight, q_weight, thread);
    if (!window.whole) {  // a weight of 0 times NaN would be NaN
        each_pair(
            acc, [&](int eight) { return window.positions[thread.token() + eight + thread.row()]; },
            [](int position, int, float &left, float &right) {
                if (position < 0) left = right = 0.0f;
            });
    }
    each_pair(acc, rows_of(of_head(value_memory), 0), store_acc);
    thread.refresh(window);
    zero(acc);
    add_from(acc, a.q_term + window.image * C);
    multiply(acc, warp_rows(smem_tokens), stream, q_weight, k_weight, thread);
    constexpr int STEPS = WIDTH / K<T>;
    FragA frag_a[TILES][STEPS];  // the tokens' queries, and later what they attended to
    unrolled<TILES, STEPS>([&](int m, int k) { frag_a[m][k] = chained<T>(acc[m], k); });
    thread.refresh(window);
    zero(acc);
    multiply(acc, warp_rows(smem_tokens), stream, k_weight, proj_weight, thread);
    add_from(acc, a.k_term + window.image * C);  // not before: the queries wait in registers
    __syncthreads();                             // n has been read by all
    each_pair(acc, rows_of(of_head(token_memory), 0), store_acc);
    __syncthreads();

    // The tiles move up, so that no register is indexed by a number known at run time only.
#pragma unroll 1
    for (int m = 0; m < TILES; ++m) {
        thread.refresh(window);
        Acc attended[WIDTH / 8];
        attend<T>(attended, frag_a[0], of_head(token_memory), of_head(value_memory), window, thread.token() + 16 * m,
                  thread.lane());
#pragma unroll
        for (int k = 0; k < STEPS; ++k) {
#pragma unroll
            for (int i = 0; i + 1 < TILES; ++i) frag_a[i][k] = frag_a[i + 1][k];
            frag_a[TILES - 1][k] = chained<T>(attended, k);
        }
    }
    __syncthreads();  // keys and values have been read by all
    unrolled<TILES, STEPS>([&](int m, int k) {
        store_chained<T>(warp_rows(smem_tokens).rows_from(16 * m), frag_a[m][k], thread.head() * STEPS + k,
                         thread.lane());
    });
    fill(acc, a.proj_bias + thread.channel(), thread.column());
    add_from(acc, a.x + window.map * C);
    multiply(acc, warp_rows(smem_tokens), stream, proj_weight, {a.fc1_weight, C}, thread);
    {
        const Bias<T> bias(a.fc2_bias + thread.channel(), thread.column());
        each_pair(acc, rows_of(smem_values, thread.channel()), [&](auto row, int n, float &left, float &right) {
            const Pair<T> y = store_pair(row(n), left, right);
            left = to_float(y.value[0]) + bias.at(n, 0);
            right = to_float(y.value[1]) + bias.at(n, 1);
        });
    }
    __syncthreads();
    {
        const Vec<T> weight = load_vec(a.norm2_weight + column()), bias = load_vec(a.norm2_bias + column());
        each_vec(a.middle + window.map * C, [&](int row, T *address, bool on_map) {
            const Vec<T> y = load_vec(smem_values.at(row, column()));
            if (a.middle && on_map) store(address, y);
            store(smem_values.at(row, column()), normalised<LANES>(y, weight, bias));
        });
    }
    int unit = 0;
    do {  // there are hidden units, and the compiler need not keep sums for none
        thread.refresh(window);
        const Weight<T> fc1{a.fc1_weight + unit * C, C}, fc2{a.fc2_weight + unit, a.hidden};
        const Weight<T> following{unit + UNITS < a.hidden ? fc1.first + UNITS * C : nullptr, C};
        WarpAcc units;
        fill(units, a.fc1_bias + unit + thread.channel(), thread.column());
        multiply(units, warp_rows(smem_values), stream, fc1, fc2, thread);
        thread.refresh(window);
        each_pair(units, rows_of(smem_tokens, thread.channel()), [](auto row, int n, float left, float right) {
            store_pair(row(n), Gelu::of(left), Gelu::of(right));
        });
        multiply(acc, warp_rows(smem_tokens), stream, fc2, following, thread);
        unit += UNITS;
    } while (unit < a.hidden);
    each_pair(acc, rows_of(smem_values, thread.channel()), store_acc);
    __syncthreads();
    each_vec(a.out + window.map * C, [&](int row, T *address, bool on_map) {
        if (on_map) store(address, load_vec(smem_values.at(row, column())));
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
