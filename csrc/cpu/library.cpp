// The C interface of the CPU library: it chooses an instruction set and hands calls on to operators compiled for it.

#include <string.h>

#include <atomic>

#include "operators.h"

#if defined(__x86_64__)
#define FOR_EACH_ISA(USE) USE(avx512_bf16) USE(avx512) USE(avx2)  // the best first
#else
#define FOR_EACH_ISA(USE) USE(neon)
#endif

#define DECLARE(isa)                  \
    namespace isa {                   \
    extern const Operators OPERATORS; \
    }
FOR_EACH_ISA(DECLARE)

namespace {

struct Isa {
    const char *name;
    const Operators &operators;
};

#define ENTRY(isa) {#isa, isa::OPERATORS},
const Isa ISAS[] = {FOR_EACH_ISA(ENTRY)};

#if defined(__x86_64__)
// Whether this machine and its operating system run what CMakeLists.txt compiles for it.
bool runs(const char *name) {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("bmi2"))
        return false;
    if (!strcmp(name, "avx2")) return true;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512cd") || !__builtin_cpu_supports("avx512dq") ||
        !__builtin_cpu_supports("avx512vl")) {
        return false;
    }
    return !strcmp(name, "avx512") || __builtin_cpu_supports("avx512bf16");
}
#else
bool runs(const char *) { return true; }
#endif

const Isa *best() {
    for (const Isa &isa : ISAS) {
        if (runs(isa.name)) return &isa;
    }
    return nullptr;
}

std::atomic<const Isa *> chosen{best()};

// `call` of the chosen operators and the dtype, once both are there.
template <typename Call> int with_operators(int dtype, Call call) {
    const Isa *isa = chosen;
    if (!isa) return OVSEG_UNSUPPORTED_CPU;
    if (dtype != OVSEG_FLOAT32 && dtype != OVSEG_BFLOAT16) return OVSEG_BAD_DTYPE;
    return call(isa->operators);
}

}  // namespace

int ovseg_abi_version(void) { return OVSEG_ABI_VERSION; }

const char *ovseg_error_string(int error) {
    switch (error) {
        case OVSEG_OK: return "no error";
        case OVSEG_BAD_DTYPE: return "the CPU kernels take float32 and bfloat16";
        case OVSEG_UNSUPPORTED_SIZE: return "there is no CPU kernel for these sizes";
        case OVSEG_OUT_OF_MEMORY: return "there is too little memory";
        case OVSEG_UNSUPPORTED_CPU: return "the CPU kernels need AVX2 and FMA, which this CPU lacks";
        default: return "unknown error";
    }
}

const char *ovseg_cpu_isa(void) {
    const Isa *isa = chosen;
    return isa ? isa->name : nullptr;
}

int ovseg_cpu_choose(const char *name) {
    for (const Isa &isa : ISAS) {
        if (!strcmp(isa.name, name) && runs(name)) {
            chosen = &isa;
            return OVSEG_OK;
        }
    }
    return OVSEG_UNSUPPORTED_CPU;
}

int ovseg_class_aggregation_fwd(const ovseg_class_aggregation_params *params, int dtype, int threads, void *) {
    return with_operators(dtype, [&](const Operators &use) { return use.class_aggregation(params, dtype, threads); });
}

int ovseg_class_aggregation_resize_fwd(const void *x, const void *y, void *out, int64_t maps, int64_t height,
                                       int64_t width, int64_t low_height, int64_t low_width, int64_t channels,
                                       int dtype, int threads, void *) {
    return with_operators(dtype, [&](const Operators &use) {
        return use.class_aggregation_resize(x, y, out, maps, height, width, low_height, low_width, channels, dtype,
                                            threads);
    });
}

int ovseg_encoder_block_fwd(const ovseg_encoder_block_params *params, int dtype, int threads, void *) {
    return with_operators(dtype, [&](const Operators &use) { return use.encoder_block(params, dtype, threads); });
}

int ovseg_spatial_aggregation_fwd(const ovseg_spatial_aggregation_params *params, int dtype, int threads, void *) {
    return with_operators(dtype, [&](const Operators &use) { return use.spatial_aggregation(params, dtype, threads); });
}
