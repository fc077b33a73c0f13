// Rows scaled to length 1, and images as the second operand of the products that give cosines.

#pragma once

#include "pool.h"
#include "transformer.h"

namespace {

constexpr float LENGTH_EPS = 1e-12f;

// 1 / max(‖x‖, ε) of a row.
INLINE float inverse_length(const float *x, int64_t channels) {
    Floats squares{};
    int64_t c = 0;
    for (; c + LANES <= channels; c += LANES) squares += load(x + c) * load(x + c);
    float total = sum(squares);
    for (; c < channels; ++c) total += x[c] * x[c];
    const float length = __builtin_sqrtf(total);
    return 1.0f / (length < LENGTH_EPS ? LENGTH_EPS : length);
}

// A row with length 1.
template <typename T> INLINE void unit_length(const T *x, int64_t channels, float *to) {
    copy_to_floats(x, channels, to);
    const float scale = inverse_length(to, channels);
    int64_t c = 0;
    for (; c + LANES <= channels; c += LANES) store(to + c, load(to + c) * broadcast(scale));
    for (; c < channels; ++c) to[c] *= scale;
}

// The patches of images, (batch, patches, channels), with length 1, each image packed as B (channels, patches).
template <typename T> struct Images {
    const T *patch;
    int64_t batch, patches, channels, panels;  // panels: of an image
    float *packed;

    Images(const void *image, int64_t batch, int64_t patches, int64_t channels)
        : patch(static_cast<const T *>(image)), batch(batch), patches(patches), channels(channels),
          panels(round_up(patches, WEIGHT_PANEL) / WEIGHT_PANEL), packed(nullptr) {}

    void take(Arena &arena) { packed = arena.take<float>(batch * panels * channels * WEIGHT_PANEL); }

    const float *of(int64_t image) const { return packed + image * panels * channels * WEIGHT_PANEL; }

    // Packs a panel, `index` in 0..batch·panels−1. False if it lacks memory.
    bool pack(int64_t index) const {
        const int64_t first = index % panels * WEIGHT_PANEL, stride = channels + LANES,  // rows in other sets of caches
            count = patches - first < WEIGHT_PANEL ? patches - first : WEIGHT_PANEL;
        float *rows = static_cast<float *>(ovseg_scratch(size_t(count * stride) * sizeof(float)));
        if (!rows) return false;
        for (int64_t row = 0; row < count; ++row) {
            unit_length(patch + (index / panels * patches + first + row) * channels, channels, rows + row * stride);
        }
        pack_transposed<WEIGHT_VECTORS>(rows, stride, count, channels, packed + index * channels * WEIGHT_PANEL);
        return true;
    }
};

}  // namespace
