/* The interface of the CPU library, as far as it differs from that of the CUDA library, ovseg.h.
 *
 * The functions of operators that it has are those of ovseg.h with the same arguments, but for the last three: dtype is
 * OVSEG_FLOAT32 or OVSEG_BFLOAT16, `device` is the number of threads to run on, the calling one among them, `stream` is
 * ignored. A function returns when its results are there. Tensors need no alignment beyond that of their numbers. The
 * library allocates scratch memory by itself and keeps a few MB of it for each thread. Several threads may call it at
 * once, also after a fork. Results do not depend on the number of threads. */

#ifndef OVSEG_CPU_H
#define OVSEG_CPU_H

#include "../ovseg.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { OVSEG_OUT_OF_MEMORY = -100, OVSEG_UNSUPPORTED_CPU = -101 };

/* The instruction set that the library runs on, "avx512" for example: at first the best that the machine has. Null if
 * the machine has none of those that it was compiled for. */
OVSEG_API const char *ovseg_cpu_isa(void);

/* Chooses another one by its name, for all calls from now on; OVSEG_UNSUPPORTED_CPU if the machine or the library lacks
 * it. */
OVSEG_API int ovseg_cpu_choose(const char *name);

/* One block of CLIP's vision transformer. channels and hidden multiples of 16, channels of a head even. */
typedef struct {
    const void *x;                              /* (batch, tokens, channels) */
    const void *norm1_weight, *norm1_bias;      /* (channels) */
    const void *q_weight, *k_weight, *v_weight; /* (channels, channels) */
    const void *qkv_bias;                       /* (3 * channels) */
    const void *proj_weight, *proj_bias;        /* (channels, channels), (channels) */
    const void *norm2_weight, *norm2_bias;      /* (channels) */
    const void *fc1_weight, *fc1_bias;          /* (hidden, channels), (hidden) */
    const void *fc2_weight, *fc2_bias;          /* (channels, hidden), (channels) */
    void *out;                                  /* like x */
    int64_t batch, tokens, channels, hidden, heads;
    int64_t quick; /* 1 for QuickGELU, 0 for GELU */
    int64_t dense; /* 1: no attention; each token's value is added to the first token */
    double norm1_eps, norm2_eps;
} ovseg_encoder_block_params;

OVSEG_API int ovseg_encoder_block_fwd(const ovseg_encoder_block_params *params, int dtype, int threads, void *stream);

#ifdef __cplusplus
}
#endif

#endif
