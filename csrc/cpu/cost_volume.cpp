// Cost volume: cosines between every patch of an image and every prompt of every class.
//
//     cost[b, k, s] = <image[b, s], text[k]> / (max(‖image[b, s]‖, ε) · max(‖text[k]‖, ε))
//
// A task is a few prompts and all patches of an image.

#include "cosines.h"
#include "operators.h"

namespace {

constexpr int64_t ROWS = 4 * tile_rows<WEIGHT_VECTORS>();  // prompts of a task

template <typename T> struct Volume {
    Images<T> images;
    const T *text;
    T *cost;
    int64_t prompts, groups;  // groups: tasks of an image

    void prepare(Arena &arena) { images.take(arena); }

    static bool pack(void *context, int64_t index) { return static_cast<const Volume *>(context)->images.pack(index); }

    static bool task(void *context, int64_t index) {
        const Volume &v = *static_cast<const Volume *>(context);
        const Images<T> &images = v.images;
        const int64_t image = index / v.groups, first = index % v.groups * ROWS, channels = images.channels,
                      count = v.prompts - first < ROWS ? v.prompts - first : ROWS,
                      stride = images.panels * WEIGHT_PANEL;
        float *units = static_cast<float *>(ovseg_scratch(size_t(count * (channels + stride)) * sizeof(float)));
        if (!units) return false;
        float *costs = units + count * channels;
        for (int64_t row = 0; row < count; ++row) {
            unit_length(v.text + (first + row) * channels, channels, units + row * channels);
        }
        multiply<WEIGHT_VECTORS>(Matrix<float>{units, channels, 1}, count, images.of(image), images.panels, channels,
                                 costs, stride, false);
        T *to = v.cost + (image * v.prompts + first) * images.patches;
        for (int64_t row = 0; row < count; ++row, to += images.patches) {
            const float *from = costs + row * stride;
            int64_t patch = 0;
            for (; patch + LANES <= images.patches; patch += LANES) store(to + patch, load(from + patch));
            for (; patch < images.patches; ++patch) from_float(to + patch, from[patch]);
        }
        return true;
    }
};

template <typename T>
int run(const void *image, const void *text, void *cost, int64_t batch, int64_t patches, int64_t prompts,
        int64_t channels, int threads) {
    Volume<T> v{Images<T>(image, batch, patches, channels), static_cast<const T *>(text), static_cast<T *>(cost),
                prompts, (prompts + ROWS - 1) / ROWS};
    ovseg_expect_writes(cost, size_t(batch * prompts * patches) * sizeof(T));
    return prepare_and_run(v, threads, batch * v.groups, v.pack, batch * v.images.panels);
}

}  // namespace

namespace OVSEG_ISA {

int cost_volume(const void *image, const void *text, void *cost, int64_t batch, int64_t patches, int64_t prompts,
                int64_t channels, int dtype, int threads, void *) {
    return dtype == OVSEG_FLOAT32 ? run<float>(image, text, cost, batch, patches, prompts, channels, threads)
                                  : run<Bf16>(image, text, cost, batch, patches, prompts, channels, threads);
}

}  // namespace OVSEG_ISA
