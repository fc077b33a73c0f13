// Mask attention: cross-attention of class queries on patch tokens, and its raw scores, which are the class masks.
//
//     out = softmax(q kᵀ / √d) v                 within each head of width d
//     scores = q kᵀ / (heads √d)                 over all channels at once
//
// Patches lie in lanes: a head's keys are packed as B of the first product, its values as B of the second, which takes
// the weights as A where the softmax leaves them. The linear layers before and after are PyTorch's.
//
// A task of the attention is one head of an image, or a part of its queries; one of the scores a panel of patches.

#include "operators.h"
#include "transformer.h"

namespace {

constexpr int64_t ROWS = 8 * tile_rows<WEIGHT_VECTORS>();  // queries that are worked through at a time

INLINE int64_t fewer(int64_t a, int64_t b) { return a < b ? a : b; }

// A row of A: numbers of a tensor, with zeros up to whole pairs.
template <typename T, typename P> INLINE void copy_row(const T *from, int64_t count, int64_t depth, P *to) {
    if constexpr (sizeof(T) == sizeof(P)) {
        memcpy(to, from, count * sizeof *to);
    } else {
        copy_to_floats(from, count, to);
    }
    memset(to + count, 0, (depth - count) * sizeof *to);
}

// B from patches (count, depth), `stride` from one to the next. Where they have to be widened, it is a panel at a time,
// in `memory`.
template <typename T, typename P>
void pack_patches(const T *from, int64_t stride, int64_t count, int64_t depth, P *memory, P *to) {
    if constexpr (sizeof(T) == sizeof(P)) {
        pack_transposed<WEIGHT_VECTORS>(from, stride, count, depth, to);
    } else {
        for (int64_t first = 0; first < count; first += WEIGHT_PANEL, to += WEIGHT_PANEL * depth) {
            const int64_t some = fewer(count - first, WEIGHT_PANEL), apart = depth + LANES;  // other sets of caches
            for (int64_t row = 0; row < some; ++row) {
                copy_to_floats(from + (first + row) * stride, depth, memory + row * apart);
            }
            pack_transposed<WEIGHT_VECTORS>(memory, apart, some, depth, to);
        }
    }
}

template <typename T, typename P> int64_t widened_size(int64_t depth) {
    return sizeof(T) == sizeof(P) ? 0 : WEIGHT_PANEL * (depth + LANES);
}

// A row times a factor.
template <typename T> INLINE void write(const float *from, float factor, int64_t count, T *to) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store(to + i, load(from + i) * broadcast(factor));
    for (; i < count; ++i) from_float(to + i, from[i] * factor);
}

// Arguments of both functions; v is null for the scores.
struct Arguments {
    const void *q, *k, *v;
    void *out;
    int64_t batch, queries, patches, channels, heads;
};

template <typename T> struct Attention {
    typedef typename Operand<T>::Type P;
    static constexpr int PAIR = Operand<T>::PAIR;

    const Arguments &a;
    int64_t width, depth, keys;  // of a head; width and patches in whole pairs, as the products take them
    int64_t columns, outputs;    // patches and width in whole panels
    int64_t parts, part;         // tasks of a head, and queries of each
    float scale;

    Attention(const Arguments &a, int threads)
        : a(a), width(a.channels / a.heads), depth(round_up(width, PAIR)), keys(round_up(a.patches, PAIR)),
          columns(round_up(a.patches, WEIGHT_PANEL)), outputs(round_up(width, WEIGHT_PANEL)),
          scale(1.0f / __builtin_sqrtf(float(width))) {
        // Each part packs the head again, so no more than give every thread work.
        const int64_t wanted = (2 * int64_t(threads) + a.batch * a.heads - 1) / (a.batch * a.heads);
        const int64_t most = (a.queries + ROWS - 1) / ROWS;
        part = round_up((a.queries + fewer(wanted, most) - 1) / fewer(wanted, most), tile_rows<WEIGHT_VECTORS>());
        parts = (a.queries + part - 1) / part;
    }

    int64_t tasks() const { return a.batch * a.heads * parts; }
    int64_t apart() const { return columns + LANES; }  // from a row of scores to the next: in other sets of caches

    struct Scratch {
        P *packed_keys, *packed_values, *widened, *queries;
        float *scores, *attended;

        void take(const Attention &attention, Arena &arena) {
            packed_keys = arena.take<P>(attention.columns * attention.depth);
            packed_values = arena.take<P>(attention.keys * attention.outputs);
            widened = arena.take<P>(widened_size<T, P>(attention.width));
            queries = arena.take<P>(ROWS * attention.depth);
            scores = arena.take<float>(ROWS * attention.apart());
            attended = arena.take<float>(ROWS * attention.outputs);
        }
    };

    // Scores of a row become weights, in their place, without what makes their sum 1, which is returned.
    float soften(float *scores) const {
        const Floats lowest = broadcast(-__builtin_inff());
        for (int64_t c = a.patches; c < columns; ++c) scores[c] = -__builtin_inff();  // lanes without a patch
        Floats most[WEIGHT_VECTORS], totals[WEIGHT_VECTORS]{};
#pragma GCC unroll 4
        for (int vector = 0; vector < WEIGHT_VECTORS; ++vector) most[vector] = lowest;
        for (int64_t c = 0; c < columns; c += WEIGHT_PANEL) {
#pragma GCC unroll 4
            for (int vector = 0; vector < WEIGHT_VECTORS; ++vector) {
                most[vector] = larger(load(scores + c + vector * LANES), most[vector]);
            }
        }
        for (int vector = 1; vector < WEIGHT_VECTORS; ++vector) most[0] = larger(most[0], most[vector]);
        const float largest_score = largest(most[0]);
        // All −∞: all weights become 0.
        const Floats above = broadcast(largest_score == -__builtin_inff() ? 0.0f : largest_score * scale);
        P *weights = reinterpret_cast<P *>(scores);  // no larger than what is read before
        for (int64_t c = 0; c < columns; c += WEIGHT_PANEL) {
#pragma GCC unroll 4
            for (int vector = 0; vector < WEIGHT_VECTORS; ++vector) {
                const int64_t at = c + vector * LANES;
                const Floats weight = exponential_of_negative<P>(load(scores + at) * broadcast(scale) - above);
                totals[vector] += weight;
                store(weights + at, weight);
            }
        }
        for (int vector = 1; vector < WEIGHT_VECTORS; ++vector) totals[0] += totals[vector];
        const float total = sum(totals[0]);
        return total == 0.0f ? 0.0f : 1.0f / total;
    }

    void attend(const T *q, T *out, int64_t count, const Scratch &s) const {
        for (int64_t row = 0; row < count; ++row) copy_row(q + row * a.channels, width, depth, s.queries + row * depth);
        multiply<WEIGHT_VECTORS>(Matrix<P>{s.queries, depth, 1}, count, s.packed_keys, columns / WEIGHT_PANEL, depth,
                                 s.scores, apart(), false);
        float shares[ROWS];
        for (int64_t row = 0; row < count; ++row) shares[row] = soften(s.scores + row * apart());
        const Matrix<P> weights{reinterpret_cast<const P *>(s.scores), apart() * PAIR, 1};
        multiply<WEIGHT_VECTORS>(weights, count, s.packed_values, outputs / WEIGHT_PANEL, keys, s.attended, outputs,
                                 false);
        for (int64_t row = 0; row < count; ++row) {
            write(s.attended + row * outputs, shares[row], width, out + row * a.channels);
        }
    }

    static bool task(void *context, int64_t index) {
        const Attention &attention = *static_cast<const Attention *>(context);
        const Arguments &a = attention.a;
        Scratch scratch;
        Arena sizes(nullptr);
        scratch.take(attention, sizes);
        Arena arena(ovseg_scratch(sizes.bytes));
        if (!arena.memory) return false;
        scratch.take(attention, arena);
        const int64_t image = index / attention.parts / a.heads, head = index / attention.parts % a.heads,
                      first = index % attention.parts * attention.part, end = fewer(first + attention.part, a.queries);
        const int64_t at = image * a.patches * a.channels + head * attention.width;
        pack_patches(static_cast<const T *>(a.k) + at, a.channels, a.patches, attention.width, scratch.widened,
                     scratch.packed_keys);
        pack_rows_filled<WEIGHT_VECTORS>(static_cast<const T *>(a.v) + at, a.channels, a.patches, attention.width,
                                         scratch.packed_values);
        for (int64_t row = first; row < end; row += ROWS) {
            const int64_t place = (image * a.queries + row) * a.channels + head * attention.width;
            attention.attend(static_cast<const T *>(a.q) + place, static_cast<T *>(a.out) + place,
                             fewer(end - row, ROWS), scratch);
        }
        return true;
    }
};

template <typename T> struct Scores {
    typedef typename Operand<T>::Type P;
    static constexpr int PAIR = Operand<T>::PAIR;

    const Arguments &a;
    int64_t depth, panels;  // channels in whole pairs; panels of patches of an image
    float scale;
    P *copied;  // queries as the products read them; null if that is how they lie

    explicit Scores(const Arguments &a)
        : a(a), depth(round_up(a.channels, PAIR)), panels((a.patches + WEIGHT_PANEL - 1) / WEIGHT_PANEL),
          scale(1.0f / (float(a.heads) * __builtin_sqrtf(float(a.channels / a.heads)))), copied(nullptr) {}

    bool copies() const { return sizeof(T) != sizeof(P) || depth != a.channels; }

    void prepare(Arena &arena) {
        if (copies()) copied = arena.take<P>(a.batch * a.queries * depth);
    }

    static bool copy(void *context, int64_t image) {
        const Scores &s = *static_cast<const Scores *>(context);
        const int64_t channels = s.a.channels, end = (image + 1) * s.a.queries;
        for (int64_t row = image * s.a.queries; row < end; ++row) {
            copy_row(static_cast<const T *>(s.a.q) + row * channels, channels, s.depth, s.copied + row * s.depth);
        }
        return true;
    }

    static bool task(void *context, int64_t index) {
        const Scores &s = *static_cast<const Scores *>(context);
        const Arguments &a = s.a;
        const int64_t image = index / s.panels, first = index % s.panels * WEIGHT_PANEL,
                      count = fewer(a.patches - first, WEIGHT_PANEL), widened = widened_size<T, P>(a.channels);
        Arena sizes(nullptr);
        sizes.take<P>(WEIGHT_PANEL * s.depth);
        sizes.take<P>(widened);
        sizes.take<float>(ROWS * WEIGHT_PANEL);
        Arena arena(ovseg_scratch(sizes.bytes));
        if (!arena.memory) return false;
        P *keys = arena.take<P>(WEIGHT_PANEL * s.depth), *memory = arena.take<P>(widened);
        float *scores = arena.take<float>(ROWS * WEIGHT_PANEL);
        pack_patches(static_cast<const T *>(a.k) + (image * a.patches + first) * a.channels, a.channels, count,
                     a.channels, memory, keys);
        for (int64_t row = 0; row < a.queries; row += ROWS) {
            const int64_t some = fewer(a.queries - row, ROWS), place = image * a.queries + row;
            const P *queries = s.copied ? s.copied : static_cast<const P *>(a.q);
            multiply<WEIGHT_VECTORS>(Matrix<P>{queries + place * s.depth, s.depth, 1}, some, keys, 1, s.depth, scores,
                                     WEIGHT_PANEL, false);
            T *to = static_cast<T *>(a.out) + place * a.patches + first;
            for (int64_t i = 0; i < some; ++i, to += a.patches) write(scores + i * WEIGHT_PANEL, s.scale, count, to);
        }
        return true;
    }
};

template <typename T> int run(const Arguments &a, int threads) {
    ovseg_expect_writes(a.out, size_t(a.batch * a.queries * (a.v ? a.channels : a.patches)) * sizeof(T));
    if (a.v) {
        Attention<T> attention(a, threads);
        return ovseg_parallel(threads, attention.tasks(), attention.task, &attention);
    }
    Scores<T> scores(a);
    return prepare_and_run(scores, threads, a.batch * scores.panels, scores.copy, scores.copies() ? a.batch : 0);
}

int run(const Arguments &a, int dtype, int threads) {
    if (a.heads < 1 || a.channels < 1 || a.channels % a.heads || a.queries < 1 || a.patches < 1) {
        return OVSEG_UNSUPPORTED_SIZE;
    }
    if (a.batch < 1) return OVSEG_OK;
    return dtype == OVSEG_FLOAT32 ? run<float>(a, threads) : run<Bf16>(a, threads);
}

}  // namespace

namespace OVSEG_ISA {

int mask_attention(const void *q, const void *k, const void *v, void *out, int64_t batch, int64_t queries,
                   int64_t patches, int64_t channels, int64_t heads, int dtype, int threads, void *) {
    return run({q, k, v, out, batch, queries, patches, channels, heads}, dtype, threads);
}

int mask_attention_scores(const void *q, const void *k, void *out, int64_t batch, int64_t queries, int64_t patches,
                          int64_t channels, int64_t heads, int dtype, int threads, void *) {
    return run({q, k, nullptr, out, batch, queries, patches, channels, heads}, dtype, threads);
}

}  // namespace OVSEG_ISA
