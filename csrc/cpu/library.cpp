// The C interface of the CPU library: it chooses an instruction set and hands calls on to operators compiled for it.

#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <atomic>

#include "operators.h"

#if defined(__x86_64__)
#define FOR_EACH_ISA(USE) USE(amx) USE(avx512_bf16) USE(avx512) USE(avx2)  // the best first
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
// Whether the machine has AMX with bfloat16, and the system lets this process use it, which it must be asked for.
bool has_tiles() {
#if defined(__linux__)
    unsigned eax, ebx, ecx, edx;
    constexpr unsigned BF16 = 1u << 22, TILE = 1u << 24;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & (BF16 | TILE)) != (BF16 | TILE)) return false;
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return false;
#endif
}

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
    if (!strcmp(name, "avx512")) return true;
    if (!__builtin_cpu_supports("avx512bf16")) return false;
    return !strcmp(name, "avx512_bf16") || has_tiles();
}

// On Intel's cores a product of bfloat16 pairs takes longer than the two products of float32 that it replaces.
bool pays(const char *name) { return strcmp(name, "avx512_bf16") || !__builtin_cpu_is("intel"); }
#else
bool runs(const char *) { return true; }
bool pays(const char *) { return true; }
#endif

const Isa *best() {
    for (const Isa &isa : ISAS) {
        if (runs(isa.name) && pays(isa.name)) return &isa;
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

int ovseg_class_aggregation_fwd(const ovseg_class_aggregation_params *params, int dtype, int threads, void *stream) {
    return with_operators(dtype,
                          [&](const Operators &use) { return use.class_aggregation(params, dtype, threads, stream); });
}

int ovseg_class_aggregation_resize_fwd(const void *x, const void *y, void *out, int64_t maps, int64_t height,
                                       int64_t width, int64_t low_height, int64_t low_width, int64_t channels,
                                       int dtype, int threads, void *stream) {
    return with_operators(dtype, [&](const Operators &use) {
        return use.class_aggregation_resize(x, y, out, maps, height, width, low_height, low_width, channels, dtype,
                                            threads, stream);
    });
}

int ovseg_cost_embedding_fwd(const void *image, const void *text, const void *weight, const void *bias, void *out,
                             int64_t batch, int64_t height, int64_t width, int64_t channels, int64_t classes,
                             int64_t prompts, int64_t outputs, int64_t size, int dtype, int threads, void *stream) {
    return with_operators(dtype, [&](const Operators &use) {
        return use.cost_embedding(image, text, weight, bias, out, batch, height, width, channels, classes, prompts,
                                  outputs, size, dtype, threads, stream);
    });
}

int ovseg_cost_volume_fwd(const void *image, const void *text, void *cost, int64_t batch, int64_t patches,
                          int64_t prompts, int64_t channels, int dtype, int threads, void *stream) {
    return with_operators(dtype, [&](const Operators &use) {
        return use.cost_volume(image, text, cost, batch, patches, prompts, channels, dtype, threads, stream);
    });
}

int ovseg_encoder_block_fwd(const ovseg_encoder_block_params *params, int dtype, int threads, void *stream) {
    return with_operators(dtype,
                          [&](const Operators &use) { return use.encoder_block(params, dtype, threads, stream); });
}

int ovseg_gaussian_aggregation_fwd(const void *features, const void *weights, void *out, int64_t layers, int64_t size,
                                   int dtype, int threads, void *stream) {
    return with_operators(dtype, [&](const Operators &use) {
        return use.gaussian_aggregation(features, weights, out, layers, size, dtype, threads, stream);
    });
}

int ovseg_label_map_fwd(const void *logits, const void *whole, const void *offset, const int64_t *positions,
                        void *scores, int32_t *labels, int64_t windows, int64_t classes, int64_t height, int64_t width,
                        int64_t window_height, int64_t window_width, int64_t canvas_height, int64_t canvas_width,
                        int64_t out_height, int64_t out_width, int64_t k, int dtype, int threads, void *stream) {
    return with_operators(dtype, [&](const Operators &use) {
        return use.label_map(logits, whole, offset, positions, scores, labels, windows, classes, height, width,
                             window_height, window_width, canvas_height, canvas_width, out_height, out_width, k, dtype,
                             threads, stream);
    });
}

int ovseg_label_map_kept_fwd(const ovseg_label_map_kept_params *params, int dtype, int threads, void *stream) {
    return with_operators(dtype,
                          [&](const Operators &use) { return use.label_map_kept(params, dtype, threads, stream); });
}

int ovseg_layer_gather_fwd(const void *const *hidden, const void *shared_weight, const void *shared_bias,
                           const void *norm_weight, const void *norm_bias, const void *projection, const void *weights,
                           void *out, int64_t layers, int64_t batch, int64_t tokens, int64_t patches, int64_t channels,
                           int64_t width, int64_t batch_stride, int64_t token_stride, float shared_eps, float norm_eps,
                           int dtype, int threads, void *stream) {
    return with_operators(dtype, [&](const Operators &use) {
        return use.layer_gather(hidden, shared_weight, shared_bias, norm_weight, norm_bias, projection, weights, out,
                                layers, batch, tokens, patches, channels, width, batch_stride, token_stride, shared_eps,
                                norm_eps, dtype, threads, stream);
    });
}

int ovseg_mask_attention_fwd(const void *q, const void *k, const void *v, void *out, int64_t batch, int64_t queries,
                             int64_t patches, int64_t channels, int64_t heads, int dtype, int threads, void *stream) {
    return with_operators(dtype, [&](const Operators &use) {
        return use.mask_attention(q, k, v, out, batch, queries, patches, channels, heads, dtype, threads, stream);
    });
}

int ovseg_mask_attention_scores_fwd(const void *q, const void *k, void *out, int64_t batch, int64_t queries,
                                    int64_t patches, int64_t channels, int64_t heads, int dtype, int threads,
                                    void *stream) {
    return with_operators(dtype, [&](const Operators &use) {
        return use.mask_attention_scores(q, k, out, batch, queries, patches, channels, heads, dtype, threads, stream);
    });
}

int ovseg_spatial_aggregation_fwd(const ovseg_spatial_aggregation_params *params, int dtype, int threads,
                                  void *stream) {
    return with_operators(
        dtype, [&](const Operators &use) { return use.spatial_aggregation(params, dtype, threads, stream); });
}

int ovseg_upsampling_decoder_norm_fwd(const void *y, const void *term, const void *weight, const void *bias, void *out,
                                      float *statistics, float *moments, int64_t batch, int64_t classes,
                                      int64_t positions, int64_t channels, int64_t groups, int64_t chunk, float eps,
                                      int dtype, int threads, void *stream) {
    return with_operators(dtype, [&](const Operators &use) {
        return use.upsampling_decoder_norm(y, term, weight, bias, out, statistics, moments, batch, classes, positions,
                                           channels, groups, chunk, eps, dtype, threads, stream);
    });
}

int ovseg_upsampling_decoder_head_fwd(const void *x, const void *weight, const void *bias, void *out, int64_t maps,
                                      int64_t height, int64_t width, int64_t channels, int dtype, int threads,
                                      void *stream) {
    return with_operators(dtype, [&](const Operators &use) {
        return use.upsampling_decoder_head(x, weight, bias, out, maps, height, width, channels, dtype, threads, stream);
    });
}

int ovseg_upsampling_decoder_stage_fwd(const void *x, const void *term, const void *up, const void *norm1_weight,
                                       const void *norm1_bias, const void *conv, const void *norm2_weight,
                                       const void *norm2_bias, void *out, int64_t batch, int64_t classes,
                                       int64_t height, int64_t width, int64_t channels, int64_t outputs, int64_t groups,
                                       float eps, int dtype, int threads, void *stream) {
    return with_operators(dtype, [&](const Operators &use) {
        return use.upsampling_decoder_stage(x, term, up, norm1_weight, norm1_bias, conv, norm2_weight, norm2_bias, out,
                                            batch, classes, height, width, channels, outputs, groups, eps, dtype,
                                            threads, stream);
    });
}
