// Gaussian aggregation: the weighted sum of a stage's layers.
//
//     out = Σ_l w_l · f_l
//
// A task is a run of numbers of all layers.

#include "operators.h"
#include "transformer.h"

namespace {

constexpr int64_t RUN = 32768;  // numbers of a task

template <typename T> struct Aggregation {
    const T *features;
    const void *given_weights;
    T *out;
    int64_t layers, size;
    const float *weights;

    void prepare(Arena &arena) { weights = take_vector<T>(given_weights, layers, arena); }

    static bool task(void *context, int64_t index) {
        const Aggregation &g = *static_cast<const Aggregation *>(context);
        const int64_t end = g.size - index * RUN < RUN ? g.size : (index + 1) * RUN;
        int64_t i = index * RUN;
        for (; i + LANES <= end; i += LANES) {
            Floats total{};
            for (int64_t layer = 0; layer < g.layers; ++layer) {
                total += load(g.features + layer * g.size + i) * broadcast(g.weights[layer]);
            }
            store(g.out + i, total);
        }
        for (; i < end; ++i) {
            float total = 0.0f;
            for (int64_t layer = 0; layer < g.layers; ++layer) {
                total += to_float(g.features[layer * g.size + i]) * g.weights[layer];
            }
            from_float(g.out + i, total);
        }
        return true;
    }
};

template <typename T>
int run(const void *features, const void *weights, void *out, int64_t layers, int64_t size, int threads) {
    Aggregation<T> aggregation{static_cast<const T *>(features), weights, static_cast<T *>(out), layers, size, nullptr};
    ovseg_expect_writes(out, size_t(size) * sizeof(T));
    return prepare_and_run(aggregation, threads, (size + RUN - 1) / RUN);
}

}  // namespace

namespace OVSEG_ISA {

int gaussian_aggregation(const void *features, const void *weights, void *out, int64_t layers, int64_t size, int dtype,
                         int threads, void *) {
    return dtype == OVSEG_FLOAT32 ? run<float>(features, weights, out, layers, size, threads)
                                  : run<Bf16>(features, weights, out, layers, size, threads);
}

}  // namespace OVSEG_ISA
