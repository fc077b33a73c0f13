/* The whole interface of the native library: plain C, no torch, no Python.
 *
 * The caller allocates every buffer; the library allocates nothing, waits for nothing and never ends the process. A function
 * queues its kernels on `stream` of GPU `device` and returns OVSEG_OK, an error of its own (negative), or one of the CUDA
 * runtime (positive); `ovseg_error_string` words it. Tensors are contiguous and aligned to 16 bytes, and all of `dtype`.
 */

#ifndef OVSEG_H
#define OVSEG_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define OVSEG_API __attribute__((visibility("default")))
#else
#define OVSEG_API
#endif

#define OVSEG_ABI_VERSION 1

enum { OVSEG_FLOAT32 = 0, OVSEG_FLOAT16 = 1, OVSEG_BFLOAT16 = 2 };

enum {
    OVSEG_OK = 0,
    OVSEG_BAD_DTYPE = -1,
    OVSEG_UNSUPPORTED_SIZE = -2,
    OVSEG_MISALIGNED = -3,
    OVSEG_TOO_LARGE = -4
};

OVSEG_API int ovseg_abi_version(void);

OVSEG_API const char *ovseg_error_string(int error);

/* Writes up to `size` of the architectures that the library was built for (80, 86, ...) and returns how many there are; none
 * says that it emulates a GPU on the CPU, where tensors are in the CPU's memory and `stream` is nothing. */
OVSEG_API int ovseg_architectures(int *architectures, int size);

/* One guided shifted-window block, attention and MLP: x, out (batch, classes, height, width, channels); q_term, k_term (batch,
 * height * width, channels), the guidance's share of queries and keys with their bias; qkv_weight (3 * channels, channels); proj_weight
 * (channels, channels); fc1_weight (hidden, channels); fc2_weight (channels, hidden). `middle`, like x, takes what the attention half gives, for the
 * backward pass; null where it is not wanted. channels = 128, heads = 4, window <= 12, hidden a multiple of 32. */
OVSEG_API int ovseg_spatial_aggregation_fwd(
    const void *x, const void *q_term, const void *k_term, const void *norm1_weight, const void *norm1_bias,
    const void *qkv_weight, const void *v_bias, const void *proj_weight, const void *proj_bias, const void *norm2_weight,
    const void *norm2_bias, const void *fc1_weight, const void *fc1_bias, const void *fc2_weight, const void *fc2_bias,
    void *out, void *middle, int64_t batch, int64_t classes, int64_t height, int64_t width, int64_t channels,
    int64_t hidden, int64_t heads, int64_t window, int64_t shift, int dtype, int device, void *stream);

/* Backward of its window attention: tokens (batch * classes * height * width, 3 * channels), q, k and v of each; grad_attended
 * (batch * classes * height * width, channels) -> grad_tokens like tokens, and what was attended to, like grad_attended, where that is
 * not null. */
OVSEG_API int ovseg_spatial_aggregation_bwd(const void *tokens, const void *grad_attended, void *grad_tokens,
                                            void *attended, int64_t batch, int64_t classes, int64_t height,
                                            int64_t width, int64_t channels, int64_t heads, int64_t window,
                                            int64_t shift, int dtype, int device, void *stream);

/* Cosines of image (batch, patches, channels) and text (prompts, channels), or (batch, prompts, channels) where `own_text` -> cost (batch,
 * prompts, patches). */
OVSEG_API int ovseg_cost_volume_fwd(const void *image, const void *text, void *cost, int64_t batch, int64_t patches,
                                    int64_t prompts, int64_t channels, int64_t own_text, int dtype, int device,
                                    void *stream);

/* Backward of its normalisation: x and products (rows, channels), the sums of the other side's rows of length 1, weighted by the
 * gradient -> out, the gradient of x. Where `products` is null, out takes the rows of x brought to length 1. */
OVSEG_API int ovseg_cost_volume_norm_bwd(const void *products, const void *x, void *out, int64_t rows,
                                         int64_t channels, int dtype, int device, void *stream);

/* Cosines of image (batch, height, width, channels) and text (classes, prompts, channels), or (batch, classes, ...) where `own_text`,
 * through a convolution: weight (outputs, prompts, size, size), bias (outputs) -> out (batch, classes, height, width, outputs). size is odd, at
 * most 11. */
OVSEG_API int ovseg_cost_embedding_fwd(const void *image, const void *text, const void *weight, const void *bias,
                                       void *out, int64_t batch, int64_t height, int64_t width, int64_t channels,
                                       int64_t classes, int64_t prompts, int64_t own_text, int64_t outputs,
                                       int64_t size, int dtype, int device, void *stream);

/* Backward of its convolution: grad (maps, height, width, outputs) and taps (prompts, size, size, outputs), the weight with its outputs
 * last -> grad_cost (maps, prompts, height, width), a map being that of a class of an image. */
OVSEG_API int ovseg_cost_embedding_cost_bwd(const void *grad, const void *taps, void *grad_cost, int64_t maps,
                                            int64_t prompts, int64_t height, int64_t width, int64_t outputs,
                                            int64_t size, int dtype, int device, void *stream);

/* grad and cost (maps, prompts, height, width) -> grad_weight (outputs, prompts, size, size), grad_bias (outputs). `partial`, of
 * float32, takes the sums of `parts` shares of the maps: (parts, outputs, prompts, size * size + 1). */
OVSEG_API int ovseg_cost_embedding_weight_bwd(const void *grad, const void *cost, void *partial, void *grad_weight,
                                              void *grad_bias, int64_t maps, int64_t prompts, int64_t height,
                                              int64_t width, int64_t outputs, int64_t size, int64_t parts, int dtype,
                                              int device, void *stream);

#ifdef __cplusplus
}
#endif

#endif
