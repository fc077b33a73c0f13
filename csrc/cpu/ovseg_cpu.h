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

/* Cross-attention within each of the heads, into which channels are divided: q (batch, queries, channels), k and v
 * (batch, patches, channels) -> out like q. */
OVSEG_API int ovseg_mask_attention_fwd(const void *q, const void *k, const void *v, void *out, int64_t batch,
                                       int64_t queries, int64_t patches, int64_t channels, int64_t heads, int dtype,
                                       int device, void *stream);

/* Its scores before the softmax, averaged over the heads -> out (batch, queries, patches). */
OVSEG_API int ovseg_mask_attention_scores_fwd(const void *q, const void *k, void *out, int64_t batch, int64_t queries,
                                              int64_t patches, int64_t channels, int64_t heads, int dtype, int device,
                                              void *stream);

/* A stage of the upsampling decoder: x (batch, classes, height, width, channels), term (batch, 2 height, 2 width,
 * outputs), up (channels, outputs, 4, 4), a transposed convolution with stride 2 and padding 1, conv (outputs, outputs,
 * 3, 3), weights and biases of both norms (outputs) -> out (batch, classes, 2 height, 2 width, outputs). channels and
 * outputs are multiples of 16. */
OVSEG_API int ovseg_upsampling_decoder_stage_fwd(const void *x, const void *term, const void *up,
                                                 const void *norm1_weight, const void *norm1_bias, const void *conv,
                                                 const void *norm2_weight, const void *norm2_bias, void *out,
                                                 int64_t batch, int64_t classes, int64_t height, int64_t width,
                                                 int64_t channels, int64_t outputs, int64_t groups, float eps,
                                                 int dtype, int device, void *stream);

/* The upsampling decoder's last convolution: x (maps, height, width, channels), an even number of channels, weight (1,
 * channels, 3, 3) with padding 1, bias (1) -> out (maps, height, width). */
OVSEG_API int ovseg_upsampling_decoder_head_fwd(const void *x, const void *weight, const void *bias, void *out,
                                                int64_t maps, int64_t height, int64_t width, int64_t channels,
                                                int dtype, int device, void *stream);

/* ovseg_label_map_fwd, which takes any number of windows here, of a few classes of each window. */
typedef struct {
    const void *logits;       /* (windows, maps, height, width) */
    const void *whole;        /* (maps, height, width), or null */
    const void *offset;       /* (classes), or null */
    const int64_t *positions; /* (windows, 2) */
    const int32_t *slots; /* (windows, classes), with `whole` a row more: which of a window's maps is a class's; -1 for
                                 a class that it did not keep, all of whose logits there are `dropped`. Or null: every
                                 window has the map of every class. */
    void *scores;         /* as in ovseg_label_map_fwd */
    int32_t *labels;
    int64_t windows, maps, classes, height, width, window_height, window_width, canvas_height, canvas_width;
    int64_t out_height, out_width, k;
    double dropped;
} ovseg_label_map_kept_params;

OVSEG_API int ovseg_label_map_kept_fwd(const ovseg_label_map_kept_params *params, int dtype, int device, void *stream);

#ifdef __cplusplus
}
#endif

#endif
