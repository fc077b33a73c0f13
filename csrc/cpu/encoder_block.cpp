// Encoder block: one block of CLIP's vision transformer.
//
//     n = LN1(x);   q = Wq n + bq,   k = Wk n + bk,   v = Wv n + bv
//     y = x + Wo softmax(q kᵀ / √d) v + bo,        within each head
//     out = y + W2 act(W1 LN2(y) + b1) + b2
//
// or, dense, as CAT-Seg's last block: y = x[first token] + Wo v + bo, without attention.
//
// Tokens lie in lanes and channels in rows: a panel (channels, PANEL tokens) is the B operand of every product, whose A
// operand is a weight as PyTorch holds it, so that no weight is packed or copied. Sums over channels and over keys add
// vectors, never lanes. There are three parallel regions: projections of tiles of tokens, attention of heads and panels
// of queries, and the rest of tiles of tokens; dense has only the last.

#include "operators.h"
#include "products.h"

namespace {

constexpr int VECTORS = 2;
constexpr int64_t PANEL = VECTORS * LANES;
constexpr int64_t TILE = 96;    // tokens of a task, at most: its arrays fill the second-level cache
constexpr int64_t UNITS = 256;  // hidden units that are worked through at a time
constexpr int64_t WEIGHT_ROWS = OVSEG_TILE_PRODUCTS ? 32 : tile_rows<VECTORS>();  // by which all panels are multiplied

// Two rows of a panel, neighbours in depth, for the columns of one vector.
INLINE void store_rows(float *panel, int64_t row, int64_t column, Floats first, Floats second) {
    store(panel + row * PANEL + column, first);
    store(panel + (row + 1) * PANEL + column, second);
}
#if OVSEG_BF16_PRODUCTS
INLINE void store_rows(Bf16 *panel, int64_t row, int64_t column, Floats first, Floats second) {
    const Words pairs = bf16_pairs(first, second);
    memcpy(panel + row * PANEL + 2 * column, &pairs, sizeof pairs);
}
#endif

// Rows of a weight as an operand: as they lie, or widened into `memory`.
template <typename P> INLINE Matrix<P> operand_rows(const P *from, int64_t stride, int64_t, int64_t, P *) {
    return {from, stride, 1};
}
#if !OVSEG_BF16_PRODUCTS
INLINE Matrix<float> operand_rows(const Bf16 *from, int64_t stride, int64_t rows, int64_t depth, float *memory) {
    for (int64_t row = 0; row < rows; ++row) {
        for (int64_t k = 0; k < depth; k += LANES) store(memory + row * depth + k, load(from + row * stride + k));
    }
    return {memory, depth, 1};
}
#endif

template <typename T> struct Block {
    typedef typename Operand<T>::Type P;

    const ovseg_encoder_block_params &params;
    const T *x;
    T *out;
    int64_t tokens, channels, head_width, panels, tile_panels, tiles;  // of one image; of a tile, at most
    float scale;
    const float *norm1_weight, *norm1_bias, *qkv_bias, *proj_bias, *norm2_weight, *norm2_bias, *fc1_bias, *fc2_bias;
    P *q, *k, *v, *attended;  // panels; (tokens, channels); (channels, tokens); panels. Tokens are whole panels.

    Block(const ovseg_encoder_block_params &params, int threads)
        : params(params), x(static_cast<const T *>(params.x)), out(static_cast<T *>(params.out)), tokens(params.tokens),
          channels(params.channels), head_width(params.channels / params.heads),
          panels((params.tokens + PANEL - 1) / PANEL), scale(1.0f / __builtin_sqrtf(float(head_width))) {
        if (threads < 1) threads = 1;
        const int64_t share = params.batch * panels / (2 * threads);
        tile_panels = share < 1 ? 1 : share < TILE / PANEL ? share : TILE / PANEL;
        tiles = (panels + tile_panels - 1) / tile_panels;
        while (tiles < panels && params.batch * tiles % threads) ++tiles;  // as many for every thread
        tile_panels = (panels + tiles - 1) / tiles;
    }

    void prepare(Arena &arena) {
        const auto vector = [&](const void *from, int64_t count) {
            float *to = arena.take<float>(count);
            for (int64_t i = 0; to && i < count; ++i) to[i] = to_float(static_cast<const T *>(from)[i]);
            return to;
        };
        norm1_weight = vector(params.norm1_weight, channels);
        norm1_bias = vector(params.norm1_bias, channels);
        qkv_bias = vector(params.qkv_bias, 3 * channels);
        proj_bias = vector(params.proj_bias, channels);
        norm2_weight = vector(params.norm2_weight, channels);
        norm2_bias = vector(params.norm2_bias, channels);
        fc1_bias = vector(params.fc1_bias, params.hidden);
        fc2_bias = vector(params.fc2_bias, channels);
        const int64_t size = params.dense ? 0 : params.batch * panels * PANEL * channels;
        q = arena.take<P>(size);
        k = arena.take<P>(size);
        v = arena.take<P>(size);
        attended = arena.take<P>(size);
    }

    struct Scratch {
        float *y, *result, *units;  // panels of a tile
        P *normed, *active, *widened;

        void take(const Block &block, Arena &arena) {
            const int64_t columns = block.tile_panels * PANEL, channels = block.channels;
            y = arena.take<float>(columns * channels);
            result = arena.take<float>(columns * channels);
            units = arena.take<float>(columns * UNITS);
            normed = arena.take<P>(columns * channels);
            active = arena.take<P>(columns * (channels > UNITS ? channels : UNITS));
            widened = arena.take<P>(sizeof(T) == sizeof(P) ? 0 : WEIGHT_ROWS * (channels > UNITS ? channels : UNITS));
        }
    };

    // Tokens of a panel, and vectors that hold them.
    int64_t count(int64_t panel) const { return tokens - panel * PANEL < PANEL ? tokens - panel * PANEL : PANEL; }
    int vectors(int64_t panel) const { return count(panel) > LANES ? 2 : 1; }

    // Tokens of an image, (tokens, channels), as a panel (channels, PANEL), and back.
    void load_panel(int64_t image, int64_t panel, float *to) const {
        const T *from = x + (image * tokens + panel * PANEL) * channels;
        alignas(64) float square[LANES * LANES];
        for (int64_t column = 0; column < vectors(panel) * LANES; column += LANES) {
            for (int64_t c = 0; c < channels; c += LANES) {
                for (int64_t lane = 0; lane < LANES; ++lane) {
                    const bool inside = column + lane < count(panel);
                    store(square + lane * LANES, inside ? load(from + (column + lane) * channels + c) : Floats{});
                }
                transpose(square, LANES, to + c * PANEL + column, PANEL);
            }
        }
    }

    void store_panel(int64_t image, int64_t panel, const float *from) const {
        T *to = out + (image * tokens + panel * PANEL) * channels;
        alignas(64) float square[LANES * LANES];
        for (int64_t column = 0; column < vectors(panel) * LANES; column += LANES) {
            for (int64_t c = 0; c < channels; c += LANES) {
                transpose(from + c * PANEL + column, PANEL, square, LANES);
                for (int64_t lane = 0; lane < LANES && column + lane < count(panel); ++lane) {
                    store(to + (column + lane) * channels + c, load(square + lane * LANES));
                }
            }
        }
    }

    void norm_panel(const float *from, int used, const float *weight, const float *bias, float eps, P *to) const {
        for (int64_t column = 0; column < used * LANES; column += LANES) {
            Floats total{}, squares{};
            for (int64_t c = 0; c < channels; ++c) total += load(from + c * PANEL + column);
            const Floats mean = total / broadcast(float(channels));
            for (int64_t c = 0; c < channels; ++c) {
                const Floats centred = load(from + c * PANEL + column) - mean;
                squares += centred * centred;
            }
            Floats factor = squares / broadcast(float(channels)) + broadcast(eps);
            for (int lane = 0; lane < LANES; ++lane) factor[lane] = 1.0f / __builtin_sqrtf(factor[lane]);
            for (int64_t c = 0; c < channels; c += 2) {
                const Floats first = (load(from + c * PANEL + column) - mean) * factor;
                const Floats second = (load(from + (c + 1) * PANEL + column) - mean) * factor;
                store_rows(to, c, column, first * broadcast(weight[c]) + broadcast(bias[c]),
                           second * broadcast(weight[c + 1]) + broadcast(bias[c + 1]));
            }
        }
    }

    // C = or += W · B for panels first..last-1: W (rows, depth), `stride` from row to row.
    void project(const void *weight, int64_t rows, int64_t stride, int64_t depth, const P *b, int64_t first,
                 int64_t last, P *widened, float *c, bool add) const {
        const T *from = static_cast<const T *>(weight);
        for (int64_t row = 0; row < rows; row += WEIGHT_ROWS) {
            const int64_t some = rows - row < WEIGHT_ROWS ? rows - row : WEIGHT_ROWS;
            const Matrix<P> a = operand_rows(from + row * stride, stride, some, depth, widened);
            for (int64_t panel = first; panel < last; ++panel) {
                const P *columns = b + (panel - first) * depth * PANEL;
                float *to = c + ((panel - first) * rows + row) * PANEL;
                if (vectors(panel) == 2) {
                    multiply_panel<2>(a, some, columns, depth / Pair<Matrix<P>>::SIZE, to, PANEL, add);
                } else {
                    multiply_panel<1, 2>(a, some, columns, depth / Pair<Matrix<P>>::SIZE, to, PANEL, add);
                }
            }
        }
    }

    // First region: q, k and v of a tile.
    void project_tile(int64_t image, int64_t first, int64_t last, const Scratch &s) const {
        for (int64_t panel = first; panel < last; ++panel) {
            load_panel(image, panel, s.y);
            norm_panel(s.y, vectors(panel), norm1_weight, norm1_bias, params.norm1_eps,
                       s.normed + (panel - first) * PANEL * channels);
        }
        for (int part = 0; part < 3; ++part) {
            const void *weights[] = {params.q_weight, params.k_weight, params.v_weight};
            project(weights[part], channels, channels, channels, s.normed, first, last, s.widened, s.result, false);
            for (int64_t panel = first; panel < last; ++panel) {
                const float *from = s.result + (panel - first) * PANEL * channels, *bias = qkv_bias + part * channels;
                const int64_t index = image * panels + panel;
                if (part == 0) store_queries(from, bias, vectors(panel), q + index * PANEL * channels);
                if (part == 1) store_keys(from, bias, vectors(panel), k + index * PANEL * channels);
                if (part == 2) {
                    store_values(from, bias, panel, v + image * panels * PANEL * channels + panel * PANEL);
                }
            }
        }
    }

    void store_queries(const float *from, const float *bias, int used, P *to) const {
        const Floats factor = broadcast(scale);
        for (int64_t c = 0; c < channels; c += 2) {
            for (int64_t column = 0; column < used * LANES; column += LANES) {
                store_rows(to, c, column, (load(from + c * PANEL + column) + broadcast(bias[c])) * factor,
                           (load(from + (c + 1) * PANEL + column) + broadcast(bias[c + 1])) * factor);
            }
        }
    }

    void store_keys(const float *from, const float *bias, int used, P *to) const {
        alignas(64) float square[LANES * LANES];
        for (int64_t column = 0; column < used * LANES; column += LANES) {
            for (int64_t c = 0; c < channels; c += LANES) {
                transpose(from + c * PANEL + column, PANEL, square, LANES);
                for (int64_t lane = 0; lane < LANES; ++lane) {
                    store(to + (column + lane) * channels + c, load(square + lane * LANES) + load(bias + c));
                }
            }
        }
    }

    // Columns without a token become 0: their weights are 0 too, and the product must not be NaN.
    void store_values(const float *from, const float *bias, int64_t panel, P *to) const {
        for (int64_t c = 0; c < channels; ++c) {
            for (int64_t column = 0; column < PANEL; column += LANES) {
                Floats value{};
                if (column < count(panel)) value = load(from + c * PANEL + column) + broadcast(bias[c]);
                for (int64_t lane = count(panel) - column; lane < LANES; ++lane) {
                    if (lane >= 0) value[lane] = 0;
                }
                store(to + c * panels * PANEL + column, value);
            }
        }
    }

    // Second region: what one head's queries of a panel attend to. Scores are (keys, queries).
    template <int USED> void attend(int64_t image, int64_t head, int64_t panel, float *scores, P *weights) const {
        const int64_t channel = head * head_width, index = image * panels + panel;
        const P *keys = k + image * panels * PANEL * channels + channel;
        const P *queries = q + index * PANEL * channels + channel * PANEL;
        const P *values = v + (image * channels + channel) * panels * PANEL;
        const int64_t depth = round_up(tokens, 2);
        constexpr int PAIR = Pair<Matrix<P>>::SIZE;
        multiply_panel<USED, 2>(Matrix<P>{keys, channels, 1}, tokens, queries, head_width / PAIR, scores, PANEL, false);
        Floats shares[USED];
        for (int vector = 0; vector < USED; ++vector) {
            float *column = scores + vector * LANES;
            Floats most = broadcast(-__builtin_inff()), total{};
            for (int64_t key = 0; key < tokens; ++key) most = larger(load(column + key * PANEL), most);
            most = select(most == broadcast(-__builtin_inff()), Floats{}, most);  // all −∞: all weights become 0
            for (int64_t key = 0; key < depth; key += 2) {
                const Floats first = exponential_of_negative<P>(load(column + key * PANEL) - most);
                Floats second{};
                if (key + 1 < tokens) second = exponential_of_negative<P>(load(column + (key + 1) * PANEL) - most);
                total += first + second;
                store_rows(weights, key, vector * LANES, first, second);
            }
            shares[vector] = select(total == Floats{}, Floats{}, broadcast(1.0f) / total);
        }
        multiply_panel<USED, 2>(Matrix<P>{values, panels * PANEL, 1}, head_width, weights, depth / PAIR, scores, PANEL,
                                false);
        P *to = attended + index * PANEL * channels + channel * PANEL;
        for (int64_t c = 0; c < head_width; c += 2) {
            for (int vector = 0; vector < USED; ++vector) {
                const float *from = scores + c * PANEL + vector * LANES;
                store_rows(to, c, vector * LANES, load(from) * shares[vector], load(from + PANEL) * shares[vector]);
            }
        }
    }

    // Third region: projection, residual and MLP of a tile.
    void finish_tile(int64_t image, int64_t first, int64_t last, const Scratch &s) const {
        const P *input = attended + (image * panels + first) * PANEL * channels;
        for (int64_t panel = first; panel < last; ++panel) {
            load_panel(image, panel, s.y + (panel - first) * PANEL * channels);
        }
        if (params.dense) {
            project_values(first, last, s);
            input = s.active;
        }
        project(params.proj_weight, channels, channels, channels, input, first, last, s.widened, s.result, false);
        for (int64_t panel = first; panel < last; ++panel) {
            float *y = s.y + (panel - first) * PANEL * channels;
            const float *result = s.result + (panel - first) * PANEL * channels;
            for (int64_t c = 0; c < channels; ++c) {
                const Floats own = broadcast(params.dense ? to_float(x[image * tokens * channels + c]) : 0.0f);
                for (int64_t column = 0; column < vectors(panel) * LANES; column += LANES) {
                    float *to = y + c * PANEL + column;
                    const Floats update = load(result + c * PANEL + column) + broadcast(proj_bias[c]);
                    store(to, (params.dense ? own : load(to)) + update);
                }
            }
            norm_panel(y, vectors(panel), norm2_weight, norm2_bias, params.norm2_eps,
                       s.normed + (panel - first) * PANEL * channels);
        }
        for (int64_t unit = 0; unit < params.hidden; unit += UNITS) {
            const int64_t units = params.hidden - unit < UNITS ? params.hidden - unit : UNITS;
            project(static_cast<const T *>(params.fc1_weight) + unit * channels, units, channels, channels, s.normed,
                    first, last, s.widened, s.units, false);
            params.quick ? activate<true>(unit, units, first, last, s) : activate<false>(unit, units, first, last, s);
            project(static_cast<const T *>(params.fc2_weight) + unit, channels, params.hidden, units, s.active, first,
                    last, s.widened, s.result, unit > 0);
        }
        for (int64_t panel = first; panel < last; ++panel) {
            float *y = s.y + (panel - first) * PANEL * channels;
            const float *result = s.result + (panel - first) * PANEL * channels;
            for (int64_t c = 0; c < channels; ++c) {
                for (int64_t column = 0; column < vectors(panel) * LANES; column += LANES) {
                    float *to = y + c * PANEL + column;
                    store(to, load(to) + load(result + c * PANEL + column) + broadcast(fc2_bias[c]));
                }
            }
            store_panel(image, panel, y);
        }
    }

    // Dense: the values of a tile, as if each token attended to itself alone.
    void project_values(int64_t first, int64_t last, const Scratch &s) const {
        for (int64_t panel = first; panel < last; ++panel) {
            const int64_t at = (panel - first) * PANEL * channels;
            norm_panel(s.y + at, vectors(panel), norm1_weight, norm1_bias, params.norm1_eps, s.normed + at);
        }
        project(params.v_weight, channels, channels, channels, s.normed, first, last, s.widened, s.result, false);
        for (int64_t panel = first; panel < last; ++panel) {
            const float *from = s.result + (panel - first) * PANEL * channels, *bias = qkv_bias + 2 * channels;
            P *to = s.active + (panel - first) * PANEL * channels;
            for (int64_t c = 0; c < channels; c += 2) {
                for (int64_t column = 0; column < vectors(panel) * LANES; column += LANES) {
                    store_rows(to, c, column, load(from + c * PANEL + column) + broadcast(bias[c]),
                               load(from + (c + 1) * PANEL + column) + broadcast(bias[c + 1]));
                }
            }
        }
    }

    template <bool QUICK>
    void activate(int64_t unit, int64_t units, int64_t first, int64_t last, const Scratch &s) const {
        const auto active = [](Floats x) { return QUICK ? x * sigmoid<P>(x * broadcast(1.702f)) : gelu<P>(x); };
        for (int64_t panel = first; panel < last; ++panel) {
            const float *from = s.units + (panel - first) * PANEL * units;
            P *to = s.active + (panel - first) * PANEL * units;
            for (int64_t c = 0; c < units; c += 2) {
                for (int64_t column = 0; column < vectors(panel) * LANES; column += LANES) {
                    store_rows(to, c, column, active(load(from + c * PANEL + column) + broadcast(fc1_bias[unit + c])),
                               active(load(from + (c + 1) * PANEL + column) + broadcast(fc1_bias[unit + c + 1])));
                }
            }
        }
    }

    template <typename Work> bool with_scratch(int64_t index, Work work) const {
        Scratch scratch;
        Arena sizes(nullptr);
        scratch.take(*this, sizes);
        Arena arena(ovseg_scratch(sizes.bytes));
        if (!arena.memory) return false;
        scratch.take(*this, arena);
        const int64_t tile = index % tiles;
        work(index / tiles, tile * panels / tiles, (tile + 1) * panels / tiles, scratch);
        return true;
    }

    static bool project_task(void *context, int64_t index) {
        const Block &block = *static_cast<const Block *>(context);
        return block.with_scratch(index, [&](int64_t image, int64_t first, int64_t last, const Scratch &scratch) {
            block.project_tile(image, first, last, scratch);
        });
    }

    static bool attend_task(void *context, int64_t index) {
        const Block &block = *static_cast<const Block *>(context);
        const int64_t heads = block.params.heads, panel = index % block.panels, head = index / block.panels % heads;
        const int64_t rows = block.tokens > block.head_width ? block.tokens : block.head_width;
        Arena sizes(nullptr);
        sizes.take<float>(rows * PANEL);
        sizes.take<P>(round_up(block.tokens, 2) * PANEL);
        Arena arena(ovseg_scratch(sizes.bytes));
        if (!arena.memory) return false;
        float *scores = arena.take<float>(rows * PANEL);
        P *weights = arena.take<P>(round_up(block.tokens, 2) * PANEL);
        const int64_t image = index / block.panels / heads;
        if (block.vectors(panel) == 2) {
            block.template attend<2>(image, head, panel, scores, weights);
        } else {
            block.template attend<1>(image, head, panel, scores, weights);
        }
        return true;
    }

    static bool finish_task(void *context, int64_t index) {
        const Block &block = *static_cast<const Block *>(context);
        return block.with_scratch(index, [&](int64_t image, int64_t first, int64_t last, const Scratch &scratch) {
            block.finish_tile(image, first, last, scratch);
        });
    }
};

template <typename T> int run(const ovseg_encoder_block_params &params, int threads) {
    Block<T> block(params, threads);
    Arena sizes(nullptr);
    block.prepare(sizes);
    void *memory = ovseg_allocate(sizes.bytes);
    if (!memory) return OVSEG_OUT_OF_MEMORY;
    Arena arena(memory);
    block.prepare(arena);
    const int64_t tiles = params.batch * block.tiles;
    int error = OVSEG_OK;
    if (!params.dense) {
        error = ovseg_parallel(threads, tiles, Block<T>::project_task, &block);
        if (!error) {
            const int64_t tasks = params.batch * params.heads * block.panels;
            error = ovseg_parallel(threads, tasks, Block<T>::attend_task, &block);
        }
    }
    if (!error) error = ovseg_parallel(threads, tiles, Block<T>::finish_task, &block);
    ovseg_release(memory);
    return error;
}

}  // namespace

namespace OVSEG_ISA {

int encoder_block(const ovseg_encoder_block_params *params, int dtype, int threads, void *) {
    const int64_t channels = params->channels, heads = params->heads;
    if (heads < 1 || channels % 16 || channels % heads || channels / heads % 2 || params->hidden % 16 ||
        params->tokens < 1) {
        return OVSEG_UNSUPPORTED_SIZE;
    }
    return dtype == OVSEG_FLOAT32 ? run<float>(*params, threads) : run<Bf16>(*params, threads);
}

}  // namespace OVSEG_ISA
