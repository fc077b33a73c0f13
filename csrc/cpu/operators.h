// The operators of one instruction set, and how their tasks are run.

#pragma once

#include "isa.h"
#include "memory.h"
#include "ovseg_cpu.h"
#include "pool.h"

// Each is the operator's C function of ovseg.h; dtype is OVSEG_FLOAT32 or OVSEG_BFLOAT16.
struct Operators {
    int (*class_aggregation)(const ovseg_class_aggregation_params *params, int dtype, int threads);
    int (*class_aggregation_resize)(const void *x, const void *y, void *out, int64_t maps, int64_t height,
                                    int64_t width, int64_t low_height, int64_t low_width, int64_t channels, int dtype,
                                    int threads);
    int (*encoder_block)(const ovseg_encoder_block_params *params, int dtype, int threads);
    int (*spatial_aggregation)(const ovseg_spatial_aggregation_params *params, int dtype, int threads);
};

#ifdef OVSEG_ISA
namespace OVSEG_ISA {
extern const Operators OPERATORS;
int class_aggregation(const ovseg_class_aggregation_params *params, int dtype, int threads);
int class_aggregation_resize(const void *x, const void *y, void *out, int64_t maps, int64_t height, int64_t width,
                             int64_t low_height, int64_t low_width, int64_t channels, int dtype, int threads);
int encoder_block(const ovseg_encoder_block_params *params, int dtype, int threads);
int spatial_aggregation(const ovseg_spatial_aggregation_params *params, int dtype, int threads);
}  // namespace OVSEG_ISA

namespace {

// Runs a call's tasks, `Call::task`, after `Call::prepare` has filled the memory that they share.
template <typename Call> int prepare_and_run(Call &call, int threads, int64_t tasks) {
    Arena sizes(nullptr);
    call.prepare(sizes);
    void *memory = ovseg_allocate(sizes.bytes);
    if (!memory) return OVSEG_OUT_OF_MEMORY;
    Arena arena(memory);
    call.prepare(arena);
    const int error = ovseg_parallel(threads, tasks, Call::task, &call);
    ovseg_release(memory);
    return error;
}

}  // namespace
#endif
