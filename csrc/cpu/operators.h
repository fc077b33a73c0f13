// The operators of one instruction set, and how their tasks are run.

#pragma once

#include "isa.h"
#include "memory.h"
#include "ovseg_cpu.h"
#include "pool.h"

// Each is the operator's C function of ovseg.h; dtype is OVSEG_FLOAT32 or OVSEG_BFLOAT16.
struct Operators {
    int (*cost_embedding)(const void *image, const void *text, const void *weight, const void *bias, void *out,
                          int64_t batch, int64_t height, int64_t width, int64_t channels, int64_t classes,
                          int64_t prompts, int64_t outputs, int64_t size, int dtype, int threads);
    int (*cost_volume)(const void *image, const void *text, void *cost, int64_t batch, int64_t patches, int64_t prompts,
                       int64_t channels, int dtype, int threads);
    int (*gaussian_aggregation)(const void *features, const void *weights, void *out, int64_t layers, int64_t size,
                                int dtype, int threads);
    int (*layer_gather)(const void *const *hidden, const void *shared_weight, const void *shared_bias,
                        const void *norm_weight, const void *norm_bias, const void *projection, const void *weights,
                        void *out, int64_t layers, int64_t batch, int64_t tokens, int64_t patches, int64_t channels,
                        int64_t width, int64_t batch_stride, int64_t token_stride, float shared_eps, float norm_eps,
                        int dtype, int threads);
    int (*spatial_aggregation)(const ovseg_spatial_aggregation_params *params, int dtype, int threads);
    int (*upsampling_decoder_norm)(const void *y, const void *term, const void *weight, const void *bias, void *out,
                                   float *statistics, int64_t batch, int64_t classes, int64_t positions,
                                   int64_t channels, int64_t groups, float eps, int dtype, int threads);
    int (*upsampling_head)(const void *x, const void *weight, const void *bias, void *out, int64_t maps, int64_t height,
                           int64_t width, int64_t channels, int dtype, int threads);
    int (*upsampling_stage)(const void *x, const void *term, const void *up, const void *norm1_weight,
                            const void *norm1_bias, const void *conv, const void *norm2_weight, const void *norm2_bias,
                            void *out, int64_t batch, int64_t classes, int64_t height, int64_t width, int64_t channels,
                            int64_t outputs, int64_t groups, float eps, int dtype, int threads);
};

#ifdef OVSEG_ISA
namespace OVSEG_ISA {
extern const Operators OPERATORS;
int cost_embedding(const void *image, const void *text, const void *weight, const void *bias, void *out, int64_t batch,
                   int64_t height, int64_t width, int64_t channels, int64_t classes, int64_t prompts, int64_t outputs,
                   int64_t size, int dtype, int threads);
int cost_volume(const void *image, const void *text, void *cost, int64_t batch, int64_t patches, int64_t prompts,
                int64_t channels, int dtype, int threads);
int gaussian_aggregation(const void *features, const void *weights, void *out, int64_t layers, int64_t size, int dtype,
                         int threads);
int layer_gather(const void *const *hidden, const void *shared_weight, const void *shared_bias, const void *norm_weight,
                 const void *norm_bias, const void *projection, const void *weights, void *out, int64_t layers,
                 int64_t batch, int64_t tokens, int64_t patches, int64_t channels, int64_t width, int64_t batch_stride,
                 int64_t token_stride, float shared_eps, float norm_eps, int dtype, int threads);
int spatial_aggregation(const ovseg_spatial_aggregation_params *params, int dtype, int threads);
int upsampling_decoder_norm(const void *y, const void *term, const void *weight, const void *bias, void *out,
                            float *statistics, int64_t batch, int64_t classes, int64_t positions, int64_t channels,
                            int64_t groups, float eps, int dtype, int threads);
int upsampling_head(const void *x, const void *weight, const void *bias, void *out, int64_t maps, int64_t height,
                    int64_t width, int64_t channels, int dtype, int threads);
int upsampling_stage(const void *x, const void *term, const void *up, const void *norm1_weight, const void *norm1_bias,
                     const void *conv, const void *norm2_weight, const void *norm2_bias, void *out, int64_t batch,
                     int64_t classes, int64_t height, int64_t width, int64_t channels, int64_t outputs, int64_t groups,
                     float eps, int dtype, int threads);
}  // namespace OVSEG_ISA

namespace {

// Runs a call's tasks, `Call::task`, after `Call::prepare` has filled the memory that they share; what is too much for
// one thread is filled by tasks of their own, `pack`.
template <typename Call>
int prepare_and_run(Call &call, int threads, int64_t tasks, ovseg_task pack = nullptr, int64_t packs = 0) {
    Arena sizes(nullptr);
    call.prepare(sizes);
    void *memory = ovseg_allocate(sizes.bytes);
    if (!memory) return OVSEG_OUT_OF_MEMORY;
    Arena arena(memory);
    call.prepare(arena);
    int error = pack ? ovseg_parallel(threads, packs, pack, &call) : int(OVSEG_OK);
    if (!error) error = ovseg_parallel(threads, tasks, Call::task, &call);
    ovseg_release(memory);
    return error;
}

}  // namespace
#endif
