// The operators of one instruction set, and how their tasks are run.

#pragma once

#include "isa.h"
#include "memory.h"
#include "ovseg_cpu.h"
#include "pool.h"

// Each is the C function ovseg_<name>_fwd; dtype is OVSEG_FLOAT32 or OVSEG_BFLOAT16.
#define OVSEG_OPERATORS(USE)      \
    USE(class_aggregation)        \
    USE(class_aggregation_resize) \
    USE(cost_embedding)           \
    USE(cost_volume)              \
    USE(encoder_block)            \
    USE(gaussian_aggregation)     \
    USE(label_map)                \
    USE(label_map_kept)           \
    USE(layer_gather)             \
    USE(mask_attention)           \
    USE(mask_attention_scores)    \
    USE(spatial_aggregation)      \
    USE(upsampling_decoder_norm)  \
    USE(upsampling_decoder_head)  \
    USE(upsampling_decoder_stage)

struct Operators {
#define OVSEG_FIELD(name) decltype(ovseg_##name##_fwd) *name;
    OVSEG_OPERATORS(OVSEG_FIELD)
#undef OVSEG_FIELD
};

#ifdef OVSEG_ISA
namespace OVSEG_ISA {
extern const Operators OPERATORS;
#define OVSEG_FUNCTION(name) decltype(ovseg_##name##_fwd) name;
OVSEG_OPERATORS(OVSEG_FUNCTION)
#undef OVSEG_FUNCTION
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
