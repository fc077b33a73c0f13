// Spatial aggregation: one guided shifted-window transformer block over each class's map.
//
//     n = LN1(x);   q = Wq n + q_term,   k = Wk n + k_term,   v = Wv n + bv
//     y = x + Wo softmax(q kᵀ / √d + mask) v + bo,        within each window and head
//     out = y + W2 GELU(W1 LN2(y) + b1) + b2
//
// A task is one window of one class, from x to out within the second-level cache. Tokens beyond the map, which windows
// at its end may have, are left out from the beginning: they take no part in the attention and nobody reads them.

#include "operators.h"
#include "transformer.h"

namespace {

constexpr int64_t LARGEST_WINDOW = 16;
constexpr int SCORE_VECTORS = 3;  // of a panel of keys: three panels are 144 tokens
constexpr int64_t SCORE_PANEL = SCORE_VECTORS * LANES;
constexpr int64_t QUERY_ROWS = 48;      // whose scores are held at a time
constexpr float REGION_MASK = -100.0f;  // added, as published, between regions that only the shift made neighbours

template <typename T> struct Block {
    typedef typename Operand<T>::Type P;

    const ovseg_spatial_aggregation_params &params;
    const T *x, *q_term, *k_term;
    T *out, *middle;
    int64_t channels, width, head_width, window, rows, columns;  // rows, columns: of windows
    float scale;
    const float *norm1_weight, *norm1_bias, *v_bias, *proj_bias;
    const P *qkv, *proj;
    PackedMlp<P> mlp_weights;

    explicit Block(const ovseg_spatial_aggregation_params &params)
        : params(params), x(static_cast<const T *>(params.x)), q_term(static_cast<const T *>(params.q_term)),
          k_term(static_cast<const T *>(params.k_term)), out(static_cast<T *>(params.out)),
          middle(static_cast<T *>(params.middle)), channels(params.channels),
          width(round_up(params.channels, WEIGHT_PANEL)), head_width(params.channels / params.heads),
          window(params.window), rows((params.height + params.window - 1) / params.window),
          columns((params.width + params.window - 1) / params.window),
          scale(1.0f / __builtin_sqrtf(float(params.channels / params.heads))) {}

    // Vectors as float32 and packed weights, in `arena`.
    void prepare(Arena &arena) {
        norm1_weight = take_vector<T>(params.norm1_weight, channels, arena);
        norm1_bias = take_vector<T>(params.norm1_bias, channels, arena);
        v_bias = take_vector<T>(params.v_bias, channels, arena);
        proj_bias = take_vector<T>(params.proj_bias, channels, arena);
        qkv = take_weight<T, P>(params.qkv_weight, channels, 3 * channels, channels, arena);
        proj = take_weight<T, P>(params.proj_weight, channels, channels, channels, arena);
        mlp_weights = take_mlp<T, P>(params.norm2_weight, params.norm2_bias, params.fc1_weight, params.fc1_bias,
                                     params.fc2_weight, params.fc2_bias, channels, params.hidden, arena);
    }

    struct Scratch {
        int64_t position[LARGEST_WINDOW * LARGEST_WINDOW];              // of each token on the map
        int32_t region[LARGEST_WINDOW * LARGEST_WINDOW + SCORE_PANEL];  // of each token
        int64_t tokens;
        bool regions_differ;
        float *y, *qkv, *scores, *tops, *shares, *attended, *result;
        P *normed, *q, *k, *keys, *values, *weights, *attended_operand;  // values of one head, keys of all
        MlpScratch<P> mlp;

        void take(const Block &block, Arena &arena) {
            const int64_t most = block.window * block.window, channels = block.channels, heads = block.params.heads;
            const int64_t pair = Operand<T>::PAIR;
            y = arena.take<float>(most * channels);
            qkv = arena.take<float>(most * round_up(3 * channels, WEIGHT_PANEL));
            scores = arena.take<float>(QUERY_ROWS * round_up(most, SCORE_PANEL));
            tops = arena.take<float>(QUERY_ROWS);
            shares = arena.take<float>(QUERY_ROWS);
            attended = arena.take<float>(most * channels);
            result = arena.take<float>(most * block.width);
            normed = arena.take<P>(most * channels);
            q = arena.take<P>(most * channels);
            k = arena.take<P>(most * channels);
            keys = arena.take<P>(heads * packed_size<P>(most, block.head_width, SCORE_VECTORS));
            values = arena.take<P>(round_up(most, pair) * block.head_width);
            weights = arena.take<P>(QUERY_ROWS * round_up(most, SCORE_PANEL));
            attended_operand = pair == 1 ? reinterpret_cast<P *>(attended) : arena.take<P>(most * channels);
            mlp = {normed, arena.take<P>(most * HIDDEN_CHUNK), qkv, result};
            if (round_up(3 * channels, WEIGHT_PANEL) < HIDDEN_CHUNK) mlp.units = arena.take<float>(most * HIDDEN_CHUNK);
        }
    };

    // Which tokens of the map lie in a window, and which of them were neighbours before the shift.
    void find_tokens(int64_t index, Scratch &s) const {
        const int64_t top = index / columns * window, left = index % columns * window, shift = params.shift;
        s.tokens = 0;
        s.regions_differ = false;
        for (int64_t i = 0; i < window; ++i) {
            const int64_t row = (top + i + shift) % (rows * window);
            for (int64_t j = 0; j < window; ++j) {
                const int64_t column = (left + j + shift) % (columns * window);
                if (row >= params.height || column >= params.width) continue;
                const int wrapped_row = top + i >= rows * window - shift,
                          wrapped_column = left + j >= columns * window - shift;
                s.position[s.tokens] = row * params.width + column;
                s.region[s.tokens] = 2 * wrapped_row + wrapped_column;
                s.regions_differ |= s.region[s.tokens] != s.region[0];
                ++s.tokens;
            }
        }
        for (int64_t token = s.tokens; token < round_up(s.tokens, SCORE_PANEL); ++token) s.region[token] = 0;
    }

    // q and keys of all heads as the attention's products read them, and the values.
    void split_heads(int64_t image, const Scratch &s) const {
        const int64_t stride = round_up(3 * channels, WEIGHT_PANEL), tokens = s.tokens;
        const T *q_terms = q_term + image * params.height * params.width * channels;
        const T *k_terms = k_term + image * params.height * params.width * channels;
        for (int64_t token = 0; token < tokens; ++token) {
            float *row = s.qkv + token * stride;
            const int64_t at = s.position[token] * channels;
            for (int64_t c = 0; c < channels; c += LANES) {
                store(s.q + token * channels + c, (load(row + c) + load(q_terms + at + c)) * broadcast(scale));
                store(s.k + token * channels + c, load(row + channels + c) + load(k_terms + at + c));
                store(row + 2 * channels + c, load(row + 2 * channels + c) + load(v_bias + c));
            }
        }
        for (int64_t head = 0; head < params.heads; ++head) {
            const int64_t channel = head * head_width;
            pack_transposed<SCORE_VECTORS>(s.k + channel, channels, tokens, head_width,
                                           s.keys + head * packed_size<P>(tokens, head_width, SCORE_VECTORS));
        }
    }

    // Rows of scores to those of the softmax before its division by their sums, whose reciprocals are `shares`; 0, as
    // in PyTorch, if all scores are −∞. Columns from `tokens` on become 0.
    void exponentiate(int64_t first, int64_t count, const Scratch &s) const {
        const int64_t stride = round_up(s.tokens, SCORE_PANEL), whole = s.tokens / LANES * LANES;
        const Floats nothing = broadcast(-__builtin_inff());
        Ints tail;  // lanes that hold tokens in the last vector
        for (int lane = 0; lane < LANES; ++lane) tail[lane] = -(whole + lane < s.tokens);
        for (int64_t row = 0; row < count; ++row) {
            float *scores = s.scores + row * stride;
            if (s.regions_differ) {
                const Ints own = s.region[first + row] - Ints{};
                for (int64_t c = 0; c < s.tokens; c += LANES) {
                    Ints other;
                    memcpy(&other, s.region + c, sizeof other);
                    store(scores + c, load(scores + c) + select(other != own, broadcast(REGION_MASK), Floats{}));
                }
            }
            Floats most = nothing;
            for (int64_t c = 0; c < whole; c += LANES) most = larger(load(scores + c), most);
            if (whole < s.tokens) {
                const Floats last = select(tail, load(scores + whole), nothing);
                store(scores + whole, last);
                most = larger(last, most);
            }
            const float found = largest(most);
            s.tops[row] = found == -__builtin_inff() ? 0.0f : found;
        }
        for (int64_t row = 0; row < count; ++row) {
            const float *scores = s.scores + row * stride;
            P *weights = s.weights + row * stride;
            const Floats top = broadcast(s.tops[row]);
            Floats total{};
            for (int64_t c = 0; c < s.tokens; c += LANES) {
                const Floats e = exponential_of_negative<P>(load(scores + c) - top);
                store(weights + c, e);
                total += e;
            }
            const float all = sum(total);
            s.shares[row] = all == 0.0f ? 0.0f : 1.0f / all;
        }
    }

    // Into s.attended; VECTORS is of a panel of values.
    template <int VECTORS> void attend(const Scratch &s) const {
        const int64_t tokens = s.tokens, stride = round_up(tokens, SCORE_PANEL),
                      depth = round_up(tokens, Operand<T>::PAIR);
        for (int64_t head = 0; head < params.heads; ++head) {
            const int64_t channel = head * head_width;
            const P *keys = s.keys + head * packed_size<P>(tokens, head_width, SCORE_VECTORS);
            pack_rows<VECTORS>(s.qkv + 2 * channels + channel, round_up(3 * channels, WEIGHT_PANEL), tokens, head_width,
                               s.values);
            for (int64_t first = 0; first < tokens; first += QUERY_ROWS) {
                const int64_t count = tokens - first < QUERY_ROWS ? tokens - first : QUERY_ROWS;
                multiply<SCORE_VECTORS>(Matrix<P>{s.q + first * channels + channel, channels, 1}, count, keys,
                                        stride / SCORE_PANEL, head_width, s.scores, stride, false);
                exponentiate(first, count, s);
                float *attended = s.attended + first * channels + channel;
                multiply<VECTORS>(Matrix<P>{s.weights, stride, 1}, count, s.values, head_width / (VECTORS * LANES),
                                  depth, attended, channels, false);
                for (int64_t row = 0; row < count; ++row) {
                    for (int64_t c = 0; c < head_width; c += LANES) {
                        float *number = attended + row * channels + c;
                        store(number, load(number) * broadcast(s.shares[row]));
                    }
                }
            }
        }
    }

    void run(int64_t map, int64_t index, Scratch &s) const {
        find_tokens(index, s);
        const int64_t tokens = s.tokens, offset = map * params.height * params.width;
        if (!tokens) return;
        for (int64_t token = 0; token < tokens; ++token) {
            copy_to_floats(x + (offset + s.position[token]) * channels, channels, s.y + token * channels);
        }
        layer_norm(s.y, channels, tokens, norm1_weight, norm1_bias, channels, s.normed);
        const int64_t stride = round_up(3 * channels, WEIGHT_PANEL);
        multiply<WEIGHT_VECTORS>(Matrix<P>{s.normed, channels, 1}, tokens, qkv, stride / WEIGHT_PANEL, channels, s.qkv,
                                 stride, false);
        split_heads(map / params.classes, s);
        head_width % (2 * LANES) ? attend<1>(s) : attend<2>(s);

        for (int64_t i = 0; Operand<T>::PAIR > 1 && i < tokens * channels; i += LANES) {
            store(s.attended_operand + i, load(s.attended + i));
        }
        multiply<WEIGHT_VECTORS>(Matrix<P>{s.attended_operand, channels, 1}, tokens, proj, width / WEIGHT_PANEL,
                                 channels, s.result, width, false);
        for (int64_t token = 0; token < tokens; ++token) {
            for (int64_t c = 0; c < channels; c += LANES) {
                const Floats attended = load(s.result + token * width + c) + load(proj_bias + c);
                const Floats y = load(s.y + token * channels + c) + attended;
                store(s.y + token * channels + c, y);
                if (middle) store(middle + (offset + s.position[token]) * channels + c, y);
            }
        }
        mlp<true>(mlp_weights, s.y, channels, tokens, s.mlp);
        for (int64_t token = 0; token < tokens; ++token) {
            for (int64_t c = 0; c < channels; c += LANES) {
                const Floats updated = load(s.result + token * width + c) + load(mlp_weights.fc2_bias + c);
                store(out + (offset + s.position[token]) * channels + c, load(s.y + token * channels + c) + updated);
            }
        }
    }

    static bool task(void *context, int64_t index) {
        const Block &block = *static_cast<const Block *>(context);
        Scratch scratch;
        Arena sizes(nullptr);
        scratch.take(block, sizes);
        Arena arena(ovseg_scratch(sizes.bytes));
        if (!arena.memory) return false;
        scratch.take(block, arena);
        const int64_t windows = block.rows * block.columns;
        block.run(index / windows, index % windows, scratch);
        return true;
    }
};

template <typename T> int run(const ovseg_spatial_aggregation_params &params, int threads) {
    Block<T> block(params);
    const int64_t numbers = params.batch * params.classes * params.height * params.width * params.channels;
    ovseg_expect_writes(params.out, size_t(numbers) * sizeof(T));
    const int64_t tasks = params.batch * params.classes * block.rows * block.columns;
    return prepare_and_run(block, threads, tasks);
}

}  // namespace

namespace OVSEG_ISA {

int spatial_aggregation(const ovseg_spatial_aggregation_params *params, int dtype, int threads, void *) {
    const int64_t channels = params->channels, heads = params->heads;
    if (heads < 1 || channels % 16 || channels % heads || channels / heads % 16 || params->hidden % 16 ||
        params->window < 1 || params->window > LARGEST_WINDOW || params->shift < 0 || params->shift >= params->window) {
        return OVSEG_UNSUPPORTED_SIZE;
    }
    return dtype == OVSEG_FLOAT32 ? run<float>(*params, threads) : run<Bf16>(*params, threads);
}

}  // namespace OVSEG_ISA
