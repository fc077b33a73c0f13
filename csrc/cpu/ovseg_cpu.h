/* The interface of the CPU library, as far as it differs from that of the CUDA library, ovseg.h.
 *
 * The functions of operators that it has are those of ovseg.h with the same arguments, but for the last three: dtype is
 * OVSEG_FLOAT32 or OVSEG_BFLOAT16, `device` is the number of threads to run on, the calling one among them, and `stream`
 * is ignored. A function returns when its results are there. Tensors need no alignment beyond that of their numbers. The
 * library allocates scratch memory by itself, keeps a few MB of it for each thread, and may be called by several threads
 * at once and after a fork. Results do not depend on the number of threads. */

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

/* A stage of the upsampling decoder: x (batch, classes, height, width, channels), term (batch, 2 height, 2 width,
 * outputs), up (channels, outputs, 4, 4), a transposed convolution with stride 2 and padding 1, conv (outputs, outputs,
 * 3, 3), weights and biases of both norms (outputs) -> out (batch, classes, 2 height, 2 width, outputs). channels and
 * outputs are multiples of 16. */
OVSEG_API int ovseg_upsampling_stage_fwd(const void *x, const void *term, const void *up, const void *norm1_weight,
                                         const void *norm1_bias, const void *conv, const void *norm2_weight,
                                         const void *norm2_bias, void *out, int64_t batch, int64_t classes,
                                         int64_t height, int64_t width, int64_t channels, int64_t outputs,
                                         int64_t groups, float eps, int dtype, int device, void *stream);

/* The upsampling decoder's last convolution: x (maps, height, width, channels), an even number of channels, weight (1,
 * channels, 3, 3) with padding 1, bias (1) -> out (maps, height, width). */
OVSEG_API int ovseg_upsampling_head_fwd(const void *x, const void *weight, const void *bias, void *out, int64_t maps,
                                        int64_t height, int64_t width, int64_t channels, int dtype, int device,
                                        void *stream);

#ifdef __cplusplus
}
#endif

#endif
