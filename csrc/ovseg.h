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

/* A class aggregation layer, linear attention and MLP, up to the result on pooled maps; where pooling = 1, with x added. x
 * (batch, classes, height, width, channels); terms (images_of_terms, classes, and one more with the padding class where pads > 0,
 * 2 * channels), the guidance's share of queries and keys with their bias, images_of_terms = batch, or 1 for all images;
 * qkv_weight (3 * channels, channels); fc1_weight (hidden, channels); fc2_weight (channels, hidden). out (batch, classes,
 * height / pooling, width / pooling, channels); `middle`, like out, takes what the attention half gives, for the backward pass;
 * null where it is not wanted. channels = 128, heads = 4, hidden a multiple of 32. */
OVSEG_API int ovseg_class_aggregation_fwd(const void *x, const void *terms, const void *norm1_weight,
                                          const void *norm1_bias, const void *qkv_weight, const void *v_bias,
                                          const void *padding_token, const void *norm2_weight, const void *norm2_bias,
                                          const void *fc1_weight, const void *fc1_bias, const void *fc2_weight,
                                          const void *fc2_bias, void *out, void *middle, int64_t batch,
                                          int64_t classes, int64_t height, int64_t width, int64_t channels,
                                          int64_t hidden, int64_t heads, int64_t pooling, int64_t pads,
                                          int64_t images_of_terms, int dtype, int device, void *stream);

/* Backward of its attention: tokens (batch * classes * positions, and one more with the padding class where pads > 0,
 * 3 * channels), the products of normalised tokens with qkv_weight, `positions` being those of a map; terms as above; grad
 * (batch, classes, positions, channels) -> grad_tokens like tokens, but for the padding class, whose gradients, of keys and
 * values, go to grad_padding (batch, positions, 2 * channels), float32, null where pads = 0. */
OVSEG_API int ovseg_class_aggregation_attention_bwd(const void *tokens, const void *terms, const void *v_bias,
                                                    const void *grad, void *grad_tokens, void *grad_padding,
                                                    int64_t batch, int64_t classes, int64_t positions,
                                                    int64_t channels, int64_t heads, int64_t pads,
                                                    int64_t images_of_terms, int dtype, int device, void *stream);

/* out = x + y resized to x's size, bilinear with aligned corners: x, out (maps, height, width, channels); y (maps, low_height,
 * low_width, channels). channels: a multiple of what fits 16 bytes. */
OVSEG_API int ovseg_class_aggregation_resize_fwd(const void *x, const void *y, void *out, int64_t maps, int64_t height,
                                                 int64_t width, int64_t low_height, int64_t low_width,
                                                 int64_t channels, int dtype, int device, void *stream);

/* Backward of the resize: grad like out -> grad_y like y. */
OVSEG_API int ovseg_class_aggregation_resize_bwd(const void *grad, void *grad_y, int64_t maps, int64_t height,
                                                 int64_t width, int64_t low_height, int64_t low_width,
                                                 int64_t channels, int dtype, int device, void *stream);

#ifdef __cplusplus
}
#endif

#endif
