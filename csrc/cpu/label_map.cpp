// Label map: from low-resolution logits of one image's windows to the best classes of every pixel.
//
//     p_n    = sigmoid(resize(logits_n, window)) − offset
//     canvas = mean of p_n over the windows n that hold the pixel
//     canvas = ½ (canvas + resize(sigmoid(resize(whole, window)), canvas))     where a map of the whole image is given
//     scores = resize(canvas, size),   the best k classes of every pixel, or all of them
//
// A task is a band of the result's rows, from logits to labels. It takes one class after the other and computes each
// row of the canvas that the band reads, once: first between rows of the map, which are narrow, then along the row, a
// vector of neighbouring pixels at a time. Two rows of the canvas, which give a row of the result, are all that is held
// of a class. Everything is float32 whatever the logits are.

#include "operators.h"
#include "vectors.h"

namespace {

constexpr int64_t MOST_LABELS = 8;
constexpr int64_t BAND_ROWS = 16;       // at most: the more, the fewer rows are computed by two tasks
constexpr int64_t BAND_PIXELS = 32768;  // about so many of best scores and labels stay in the second-level cache
constexpr int64_t LEAST_ROWS = 4;
constexpr int64_t MARGIN = 2 * LANES;  // numbers behind a row that may be read and written, but do not count

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t vectors(int64_t size) { return (size + LANES - 1) / LANES; }
INLINE int64_t round_to_lanes(int64_t size) { return vectors(size) * LANES; }

INLINE Floats mixed(Floats first, Floats second, Floats weight) {
    return (broadcast(1.0f) - weight) * first + weight * second;
}

// Bilinear resizing with corners not aligned, as PyTorch's: the two source pixels that a pixel of an axis is mixed of,
// and the weight of the second.
struct Taps {
    int64_t low, high;
    float weight;
};

INLINE Taps taps(int64_t from, int64_t to, int64_t at) {
    if (from == to) return {at, at, 0.0f};
    const float source = float(from) / float(to) * (float(at) + 0.5f) - 0.5f;
    const int64_t low = smaller(int64_t(source > 0.0f ? source : 0.0f), from - 1);
    const float weight = source - float(low);
    return {low, smaller(low + 1, from - 1), weight < 0.0f ? 0.0f : weight > 1.0f ? 1.0f : weight};
}

// How many vectors of source pixels hold what a vector of pixels is mixed of.
enum Span { SAME, ONE, TWO, MANY };

// Vectors of a row, or its pixels: those from `first` on before `end`.
struct Range {
    int64_t first, end;
};

// Resizing of rows, a vector of LANES pixels at a time.
struct Columns {
    int64_t count;  // vectors
    Span span;
    int64_t *base;     // of each vector: its first source pixel
    Ints *low, *high;  // and from there the two of each lane,
    Floats *weight;    // the weight of the second

    // Rows of equal length stay as they are, unless an infinite number must become NaN: 0 times it is added.
    void take(int64_t from, int64_t to, bool spread, Arena &arena) {
        count = vectors(to);
        span = SAME;
        if (from == to && !spread) return;
        base = arena.take<int64_t>(count);
        low = arena.take<Ints>(count);
        high = arena.take<Ints>(count);
        weight = arena.take<Floats>(count);
        if (!arena.memory) return;
        int64_t widest = 0;
        for (int64_t v = 0; v < count; ++v) {
            base[v] = taps(from, to, v * LANES).low;
            for (int lane = 0; lane < LANES; ++lane) {
                const Taps found = taps(from, to, smaller(v * LANES + lane, to - 1));
                low[v][lane] = int32_t(found.low - base[v]);
                high[v][lane] = int32_t(found.high - base[v]);
                weight[v][lane] = found.weight;
            }
            widest = larger(widest, high[v][LANES - 1] + 1);
        }
        span = widest <= LANES ? ONE : widest <= 2 * LANES ? TWO : MANY;
    }

    void resize(const float *row, float *to, Range range) const;  // a row with a margin behind it
};

// Vector v of a resized row, which has a margin behind it.
template <Span SPAN> INLINE Floats resized(const Columns &columns, const float *row, int64_t v) {
    if constexpr (SPAN == SAME) {
        return load(row + v * LANES);
    } else {
        const float *from = row + columns.base[v];
        const Ints low = columns.low[v], high = columns.high[v];
        Floats first, second;
        if constexpr (SPAN == ONE) {
            const Floats x = load(from);
            first = shuffle(x, low), second = shuffle(x, high);
        } else if constexpr (SPAN == TWO) {
            const Floats x = load(from), y = load(from + LANES);
            first = shuffle(x, y, low), second = shuffle(x, y, high);
        } else {
            for (int lane = 0; lane < LANES; ++lane) first[lane] = from[low[lane]], second[lane] = from[high[lane]];
        }
        return mixed(first, second, columns.weight[v]);
    }
}

// use(v, x) for the vectors x of a resized row.
template <typename Use> INLINE void each_vector(Columns columns, const float *row, Range range, Use use) {
    if (columns.span == SAME) {
        for (int64_t v = range.first; v < range.end; ++v) use(v, resized<SAME>(columns, row, v));
    } else if (columns.span == ONE) {
        for (int64_t v = range.first; v < range.end; ++v) use(v, resized<ONE>(columns, row, v));
    } else if (columns.span == TWO) {
        for (int64_t v = range.first; v < range.end; ++v) use(v, resized<TWO>(columns, row, v));
    } else {
        for (int64_t v = range.first; v < range.end; ++v) use(v, resized<MANY>(columns, row, v));
    }
}

void Columns::resize(const float *row, float *to, Range range) const {
    each_vector(*this, row, range,
                [&](int64_t v, Floats x) __attribute__((always_inline)) { store(to + v * LANES, x); });
}

// (height, width) -> (new_height, new_width). Not needed for equal sizes: a pixel is read as it is, and an infinite
// neighbour does not make it NaN.
struct Resizing {
    int64_t height, width, new_height, new_width;
    bool needed;
    Columns columns;

    void set(int64_t from_height, int64_t from_width, int64_t to_height, int64_t to_width) {
        height = from_height, width = from_width, new_height = to_height, new_width = to_width;
        needed = height != new_height || width != new_width;
    }
    void take(bool infinite, Arena &arena) { columns.take(width, new_width, needed && infinite, arena); }
    Taps down(int64_t row) const { return taps(height, new_height, row); }
};

template <typename T> struct LabelMap {
    const ovseg_label_map_kept_params &params;
    const T *logits, *whole, *offset;
    const int64_t *positions;
    int64_t windows, classes, k;
    Resizing from_maps, from_window, from_canvas;  // maps -> window; the whole image's window -> canvas -> result
    int64_t band;                                  // rows of the result that a task computes
    float dropped;                                 // the probability of a class in a window that did not keep it

    explicit LabelMap(const ovseg_label_map_kept_params &params)
        : params(params), logits(static_cast<const T *>(params.logits)), whole(static_cast<const T *>(params.whole)),
          offset(static_cast<const T *>(params.offset)), positions(params.positions), windows(params.windows),
          classes(params.classes), k(params.k), dropped(sigmoid<float>(broadcast(float(params.dropped)))[0]) {
        from_maps.set(params.height, params.width, params.window_height, params.window_width);
        from_window.set(params.window_height, params.window_width, params.canvas_height, params.canvas_width);
        from_canvas.set(params.canvas_height, params.canvas_width, params.out_height, params.out_width);
        band = smaller(larger(BAND_PIXELS / (params.out_width * larger(k, 1)), LEAST_ROWS), BAND_ROWS);
    }

    // The map of class t in a window, or in the whole image's, which comes last; null if the window did not keep it.
    const T *map_of(int64_t n, int64_t t) const {
        const int64_t slot = params.slots ? params.slots[n * classes + t] : t;
        if (slot < 0) return nullptr;
        const T *maps = n < windows ? logits + n * params.maps * area() : whole;
        return maps + slot * area();
    }
    int64_t area() const { return from_maps.height * from_maps.width; }

    void prepare(Arena &arena) {
        from_maps.take(true, arena);
        if (whole) from_window.take(false, arena);
        from_canvas.take(offset, arena);
    }

    // A row of the canvas that a band reads.
    struct Row {
        int64_t row, first, count;  // the windows that hold it: so many of Scratch::holding from the first on
        const float *share;         // 1 / how many windows hold each pixel
    };

    // A window, what the band reads of each of its maps (so many logits from the first on), and the vectors of the
    // result that are mixed of its pixels.
    struct Near {
        int64_t window, first, count;
        Range vectors;
    };

    struct Scratch {
        int64_t top, height, stride;  // of the band; of its best scores
        Row *rows;
        int64_t (*reads)[2];  // for each row of the result: which two of `rows` it is mixed of
        int64_t *holding;
        Near *near;  // the windows that hold some of the rows, and the whole image's
        int64_t near_count;
        float *share, *narrow, *window, *wide, *canvas, *result;
        float *best;
        int32_t *names;
        int64_t canvas_stride;
        int64_t held[2], held_wide[2];  // the rows of the canvas that are in `result`, and of the window in `wide`

        void take(const LabelMap &map, Arena &arena) {
            const int64_t most = 2 * map.band;
            stride = vectors(map.from_canvas.new_width) * LANES;
            canvas_stride = vectors(map.from_canvas.width) * LANES + MARGIN;
            rows = arena.take<Row>(most);
            reads = reinterpret_cast<int64_t (*)[2]>(arena.take<int64_t>(2 * map.band));
            holding = arena.take<int64_t>(most * map.windows);
            near = arena.take<Near>(map.windows + 1);
            share = arena.take<float>(most * canvas_stride);
            narrow = arena.take<float>(map.from_maps.width + MARGIN);
            window = arena.take<float>(vectors(map.from_maps.new_width) * LANES + MARGIN);
            wide = arena.take<float>(2 * canvas_stride);
            canvas = arena.take<float>(canvas_stride);
            result = arena.take<float>(2 * stride);
            best = arena.take<float>(map.band * larger(map.k, 1) * stride);
            names = arena.take<int32_t>(map.band * map.k * stride);
        }
    };

    // Which rows of the canvas a band reads, and which windows hold them.
    void plan(Scratch &s) const {
        int64_t count = 0, holding = 0;
        const auto find = [&](int64_t row) {
            for (int64_t i = count - 1; i >= 0 && i >= count - 2; --i) {
                if (s.rows[i].row == row) return i;
            }
            float *share = s.share + count * s.canvas_stride;
            Row &found = s.rows[count];
            found = {row, holding, 0, share};
            memset(share, 0, sizeof(float) * s.canvas_stride);
            for (int64_t n = 0; n < windows; ++n) {
                const int64_t top = positions[2 * n], left = positions[2 * n + 1];
                if (row < top || row >= top + from_maps.new_height) continue;
                s.holding[holding++] = n;
                for (int64_t x = 0; x < from_maps.new_width; ++x) share[left + x] += 1.0f;
            }
            found.count = holding - found.first;
            for (int64_t x = 0; x < from_canvas.width; ++x) share[x] = 1.0f / share[x];
            return count++;
        };
        for (int64_t y = 0; y < s.height; ++y) {
            const Taps down = from_canvas.down(s.top + y);
            s.reads[y][0] = find(down.low);
            s.reads[y][1] = find(down.high);
        }
        s.near_count = 0;
        const auto add = [&](int64_t window, int64_t first, int64_t last) {  // rows of it
            const int64_t top = from_maps.down(first).low, bottom = from_maps.down(last).high, width = from_maps.width;
            const Range vectors =
                window < windows ? vectors_of(positions[2 * window + 1]) : Range{0, from_canvas.columns.count};
            s.near[s.near_count++] = {window, top * width, (bottom + 1 - top) * width, vectors};
        };
        const int64_t first = s.rows[0].row, last = s.rows[count - 1].row, height = from_maps.new_height;
        for (int64_t n = 0; n < windows; ++n) {
            const int64_t top = positions[2 * n];
            if (top <= last && top + height > first) add(n, larger(first - top, 0), smaller(last - top, height - 1));
        }
        if (whole) add(windows, from_window.down(first).low, from_window.down(last).high);
    }

    // The pixels of the canvas that a pixel of the result is mixed of.
    Taps across(int64_t x) const {
        return taps(from_canvas.width, from_canvas.new_width, smaller(x, from_canvas.new_width - 1));
    }

    // The vectors of the result that are mixed of pixels of a window which begins in this column of the canvas.
    Range vectors_of(int64_t left) const {
        Range found{0, from_canvas.columns.count};
        while (found.first < found.end && across((found.first + 1) * LANES - 1).high < left) ++found.first;
        while (found.first < found.end && across((found.end - 1) * LANES).low >= left + from_maps.new_width)
            --found.end;
        return found;
    }

    // The vectors of the result for which a window near the band kept the class. All others have the same score.
    Range kept_vectors(int64_t t, const Scratch &s) const {
        if (!params.slots) return {0, from_canvas.columns.count};
        Range found{0, 0};
        for (int64_t i = 0; i < s.near_count; ++i) {
            const Range more = s.near[i].vectors;
            if (more.first >= more.end || !map_of(s.near[i].window, t)) continue;
            const bool none = found.first == found.end;
            found = {none ? more.first : smaller(found.first, more.first), larger(found.end, more.end)};
        }
        return found;
    }

    // The pixels of the canvas that vectors of the result are mixed of, from a whole vector on.
    Range pixels_of(Range vectors) const {
        return {across(vectors.first * LANES).low / LANES * LANES, across(vectors.end * LANES - 1).high + 1};
    }

    // Loads what the band reads of a class into the cache: too few numbers of a map for the machine to see it coming.
    void prefetch(int64_t t, const Scratch &s) const {
        for (int64_t i = 0; i < s.near_count; ++i) {
            const T *map = map_of(s.near[i].window, t);
            if (!map) continue;
            const char *from = reinterpret_cast<const char *>(map + s.near[i].first);
            for (int64_t byte = 0; byte < int64_t(sizeof(T)) * s.near[i].count; byte += 64) {
                __builtin_prefetch(from + byte);
            }
        }
    }

    float offset_of(int64_t t) const { return offset ? to_float(offset[t]) : 0.0f; }

    // Row `row` of a map resized to the window, use(v, logits) for each vector.
    template <typename Use> INLINE_MEMBER void map_row(const T *map, int64_t row, Scratch &s, Use use) const {
        const Taps down = from_maps.down(row);
        const int64_t width = from_maps.width, whole_vectors = width / LANES * LANES;
        const T *low = map + down.low * width, *high = map + down.high * width;
        const Floats weight = broadcast(down.weight);
        const bool needed = from_maps.needed;
        for (int64_t x = 0; x < whole_vectors; x += LANES) {
            store(s.narrow + x, needed ? mixed(load(low + x), load(high + x), weight) : load(low + x));
        }
        for (int64_t x = whole_vectors; x < width; ++x) {
            const float a = to_float(low[x]), b = to_float(high[x]);
            s.narrow[x] = needed ? (1.0f - down.weight) * a + down.weight * b : a;
        }
        each_vector(from_maps.columns, s.narrow, {0, from_maps.columns.count}, use);
    }

    // A row of the whole image's window, as probabilities resized to the canvas's width.
    const float *wide_row(int64_t t, int64_t row, Scratch &s) const {
        float *wide = s.wide + row % 2 * s.canvas_stride;
        if (s.held_wide[row % 2] == row) return wide;
        s.held_wide[row % 2] = row;
        float *window = from_window.columns.span == SAME ? wide : s.window;
        map_row(map_of(windows, t), row, s, [&](int64_t v, Floats x) __attribute__((always_inline)) {
            store(window + v * LANES, sigmoid<float>(x));
        });
        if (window != wide) from_window.columns.resize(window, wide, {0, from_window.columns.count});
        return wide;
    }

    // A row of the canvas, `pixels` of it, resized to those vectors of the result.
    const float *canvas_row(int64_t t, const Row &row, Range pixels, Range vectors, Scratch &s) const {
        float *result = s.result + row.row % 2 * s.stride;
        if (s.held[row.row % 2] == row.row) return result;
        s.held[row.row % 2] = row.row;

        float *canvas = s.canvas;
        memset(canvas + pixels.first, 0, sizeof(float) * (round_to_lanes(pixels.end) - pixels.first));
        const int64_t last = from_maps.columns.count - 1, rest = from_maps.new_width - last * LANES;
        Ints inside;  // lanes of the last vector that lie in the window
        for (int lane = 0; lane < LANES; ++lane) inside[lane] = -(lane < rest);
        for (int64_t i = row.first; i < row.first + row.count; ++i) {
            const int64_t n = s.holding[i];
            float *to = canvas + positions[2 * n + 1];
            const auto add = [&](int64_t v, Floats p) __attribute__((always_inline)) {
                if (v == last) p = select(inside, p, Floats{});
                store(to + v * LANES, load(to + v * LANES) + p);
            };
            if (const T *map = map_of(n, t)) {
                map_row(map, row.row - positions[2 * n], s,
                        [&](int64_t v, Floats x) __attribute__((always_inline)) { add(v, sigmoid<float>(x)); });
            } else if (dropped != 0.0f) {
                for (int64_t v = 0; v <= last; ++v) add(v, broadcast(dropped));
            }
        }

        const Columns &columns = from_canvas.columns;
        float *out = columns.span == SAME ? result : canvas;
        const Floats less = broadcast(offset_of(t));
        if (!whole) {
            for (int64_t x = pixels.first; x < pixels.end; x += LANES) {
                store(out + x, load(canvas + x) * load(row.share + x) - less);
            }
        } else if (!map_of(windows, t)) {
            for (int64_t x = pixels.first; x < pixels.end; x += LANES) {
                const Floats mean = load(canvas + x) * load(row.share + x) - less;
                store(out + x, (mean + broadcast(dropped)) * broadcast(0.5f));
            }
        } else {
            const Taps down = from_window.down(row.row);
            const float *low = wide_row(t, down.low, s), *high = wide_row(t, down.high, s);
            const Floats weight = broadcast(down.weight);
            for (int64_t x = pixels.first; x < pixels.end; x += LANES) {
                const Floats mean = load(canvas + x) * load(row.share + x) - less;
                store(out + x, (mean + mixed(load(low + x), load(high + x), weight)) * broadcast(0.5f));
            }
        }
        if (out != result) columns.resize(canvas, result, vectors);
        return result;
    }

    // Scores of vectors of a row of the result, use(v, scores) for each.
    template <typename Use>
    INLINE_MEMBER void result_row(int64_t t, int64_t y, Range pixels, Range vectors, Scratch &s, Use use) const {
        const float *low = canvas_row(t, s.rows[s.reads[y][0]], pixels, vectors, s);
        if (!from_canvas.needed) {
            for (int64_t v = vectors.first; v < vectors.end; ++v) use(v, load(low + v * LANES));
            return;
        }
        const float *high = canvas_row(t, s.rows[s.reads[y][1]], pixels, vectors, s);
        const Floats weight = broadcast(from_canvas.down(s.top + y).weight);
        for (int64_t v = vectors.first; v < vectors.end; ++v) {
            use(v, mixed(load(low + v * LANES), load(high + v * LANES), weight));
        }
    }

    // The first of equals is kept, and NaN is above everything.
    INLINE Ints is_better(Floats score, Floats best) { return (score > best) | ((score != score) & (best == best)); }

    // `keep_best` for k = 1.
    INLINE_MEMBER void keep_first(int64_t t, int64_t y, int64_t v, Floats score, Scratch &s) const {
        float *best = s.best + y * s.stride + v * LANES;
        int32_t *names = s.names + y * s.stride + v * LANES;
        const Floats other = load(best);
        Ints name;
        memcpy(&name, names, sizeof name);
        const Ints moved = is_better(score, other) | (int32_t(t ? 0 : -1) - Ints{});
        store(best, select(moved, score, other));
        name = moved ? int32_t(t) - Ints{} : name;
        memcpy(names, &name, sizeof name);
    }

    // Merges scores of class t, vector v of a row, into the best of the classes before it.
    INLINE_MEMBER void keep_best(int64_t t, int64_t y, int64_t v, Floats score, Scratch &s) const {
        float *best = s.best + y * k * s.stride + v * LANES;
        int32_t *names = s.names + y * k * s.stride + v * LANES;
        const int64_t found = smaller(t, k), kept = smaller(t + 1, k);  // before and after it
        if (found == k && !any(is_better(score, load(best + (k - 1) * s.stride)))) return;
        Ints name = int32_t(t) - Ints{}, moved{};  // once the class has its place, all behind it move
        for (int64_t i = 0; i < kept; ++i, best += s.stride, names += s.stride) {
            const Floats other = load(best);
            Ints other_name;
            memcpy(&other_name, names, sizeof other_name);
            moved |= i < found ? is_better(score, other) : ~Ints{};
            store(best, select(moved, score, other));
            const Ints new_name = moved ? name : other_name;
            memcpy(names, &new_name, sizeof new_name);
            score = select(moved, other, score);
            name = moved ? other_name : name;
        }
    }

    // The score of class t where no window kept it.
    float dropped_score(int64_t t) const {
        const float mean = dropped - offset_of(t);
        return whole ? (mean + dropped) * 0.5f : mean;
    }

    template <typename To> static void write_row(const float *from, int64_t count, To *to) {
        const int64_t whole_vectors = count / LANES * LANES;
        for (int64_t x = 0; x < whole_vectors; x += LANES) store(to + x, load(from + x));
        for (int64_t x = whole_vectors; x < count; ++x) from_float(to + x, from[x]);
    }

    void write_best(const Scratch &s) const {
        const int64_t width = from_canvas.new_width;
        for (int64_t y = 0; y < s.height; ++y) {
            for (int64_t i = 0; i < k; ++i) {
                const int64_t at = (y * k + i) * s.stride, to = (i * from_canvas.new_height + s.top + y) * width;
                memcpy(params.labels + to, s.names + at, sizeof(int32_t) * width);
                if (params.scores) write_row(s.best + at, width, static_cast<T *>(params.scores) + to);
            }
        }
    }

    void run(int64_t index, Scratch &s) const {
        s.top = index * band;
        s.height = smaller(band, from_canvas.new_height - s.top);
        plan(s);
        const int64_t count = from_canvas.columns.count;
        for (int64_t t = 0; t < classes; ++t) {
            for (int i = 0; i < 2; ++i) s.held[i] = s.held_wide[i] = -1;
            if (t + 1 < classes) prefetch(t + 1, s);
            const Range kept = kept_vectors(t, s);
            const Range pixels = kept.first < kept.end ? pixels_of(kept) : Range{0, 0};
            const Floats elsewhere = broadcast(dropped_score(t));
            for (int64_t y = 0; y < s.height; ++y) {
                const auto keep = [&](int64_t v, Floats score)
                                      __attribute__((always_inline)) { keep_best(t, y, v, score, s); };
                const auto write = [&](int64_t v, Floats score)
                                       __attribute__((always_inline)) { store(s.best + v * LANES, score); };
                for (int64_t v = 0; v < kept.first; ++v) k ? keep(v, elsewhere) : write(v, elsewhere);
                for (int64_t v = kept.end; v < count; ++v) k ? keep(v, elsewhere) : write(v, elsewhere);
                if (kept.first < kept.end && k == 1) {
                    result_row(t, y, pixels, kept, s, [&](int64_t v, Floats score) __attribute__((always_inline)) {
                        keep_first(t, y, v, score, s);
                    });
                } else if (kept.first < kept.end && k) {
                    result_row(t, y, pixels, kept, s, keep);
                } else if (kept.first < kept.end) {
                    result_row(t, y, pixels, kept, s, write);
                }
                if (k) continue;
                const int64_t width = from_canvas.new_width, at = t * from_canvas.new_height + s.top + y;
                write_row(s.best, width, static_cast<T *>(params.scores) + at * width);
            }
        }
        if (k) write_best(s);
    }

    static bool task(void *context, int64_t index) {
        const LabelMap &map = *static_cast<const LabelMap *>(context);
        Scratch scratch;
        Arena sizes(nullptr);
        scratch.take(map, sizes);
        Arena arena(ovseg_scratch(sizes.bytes));
        if (!arena.memory) return false;
        scratch.take(map, arena);
        map.run(index, scratch);
        return true;
    }
};

template <typename T> int run(const ovseg_label_map_kept_params &params, int threads) {
    LabelMap<T> map(params);
    const int64_t kept = params.k ? params.k : params.classes;
    if (params.scores) {
        ovseg_expect_writes(params.scores, size_t(kept * params.out_height * params.out_width) * sizeof(T));
    }
    return prepare_and_run(map, threads, (params.out_height + map.band - 1) / map.band);
}

}  // namespace

namespace OVSEG_ISA {

int label_map_kept(const ovseg_label_map_kept_params *params, int dtype, int threads, void *) {
    if (params->k < 0 || params->k > MOST_LABELS || params->k > params->classes) return OVSEG_UNSUPPORTED_SIZE;
    return dtype == OVSEG_FLOAT32 ? run<float>(*params, threads) : run<Bf16>(*params, threads);
}

int label_map(const void *logits, const void *whole, const void *offset, const int64_t *positions, void *scores,
              int32_t *labels, int64_t windows, int64_t classes, int64_t height, int64_t width, int64_t window_height,
              int64_t window_width, int64_t canvas_height, int64_t canvas_width, int64_t out_height, int64_t out_width,
              int64_t k, int dtype, int threads, void *stream) {
    const ovseg_label_map_kept_params params{
        logits,     whole,     offset, positions, nullptr,       scores,       labels,        windows,
        classes,    classes,   height, width,     window_height, window_width, canvas_height, canvas_width,
        out_height, out_width, k,      0.0};
    return label_map_kept(&params, dtype, threads, stream);
}

}  // namespace OVSEG_ISA
