/* The whole interface of the native library: plain C, no torch, no Python.
 *
 * The caller allocates every buffer; the library allocates nothing, waits for nothing and never ends the process. A
 * function queues its kernels on `stream` of GPU `device` and returns OVSEG_OK, an error of its own (negative), or one
 * of the CUDA runtime (positive); `ovseg_error_string` words it. Tensors are contiguous and aligned to 16 bytes, and
 * all of `dtype`.
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
    OVSEG_TOO_LARGE = -4,
    OVSEG_TOO_MUCH_SHARED_MEMORY = -5
};

OVSEG_API int ovseg_abi_version(void);

OVSEG_API const char *ovseg_error_string(int error);

/* Writes up to `size` of the architectures that the library was built for (80, 86, ...) and returns how many there are;
 * none says that it emulates a GPU on the CPU, where tensors are in the CPU's memory and `stream` is nothing. */
OVSEG_API int ovseg_architectures(int *architectures, int size);

/* One guided shifted-window block, attention and MLP: x, out (batch, classes, height, width, channels); q_term, k_term
 * (batch, height * width, channels), the guidance's share of queries and keys with their bias; qkv_weight
 * (3 * channels, channels); proj_weight (channels, channels); fc1_weight (hidden, channels); fc2_weight (channels,
 * hidden). `middle`, like x, takes what the attention half gives, for the backward pass; null where it is not wanted.
 * channels = 128, heads = 4, window <= 12, hidden a multiple of 128. */
OVSEG_API int ovseg_spatial_aggregation_fwd(const void *x, const void *q_term, const void *k_term,
                                            const void *norm1_weight, const void *norm1_bias, const void *qkv_weight,
                                            const void *v_bias, const void *proj_weight, const void *proj_bias,
                                            const void *norm2_weight, const void *norm2_bias, const void *fc1_weight,
                                            const void *fc1_bias, const void *fc2_weight, const void *fc2_bias,
                                            void *out, void *middle, int64_t batch, int64_t classes, int64_t height,
                                            int64_t width, int64_t channels, int64_t hidden, int64_t heads,
                                            int64_t window, int64_t shift, int dtype, int device, void *stream);

/* Backward of its window attention: tokens (batch * classes * height * width, 3 * channels), q, k and v of each;
 * grad_attended (batch * classes * height * width, channels) -> grad_tokens like tokens, and what was attended to, like
 * grad_attended, where that is not null. */
OVSEG_API int ovseg_spatial_aggregation_bwd(const void *tokens, const void *grad_attended, void *grad_tokens,
                                            void *attended, int64_t batch, int64_t classes, int64_t height,
                                            int64_t width, int64_t channels, int64_t heads, int64_t window,
                                            int64_t shift, int dtype, int device, void *stream);

/* Backward of the residual MLP of both aggregation blocks on rows y (rows, channels): grad, y_grad and normed, LN(y),
 * like y; activated, units_grad (rows, hidden): the activations and the gradient before them, for the weights'
 * gradients, null together with `normed` where these are not wanted; sums (blocks, 3, channels) in float32, each
 * block's share of the gradients of norm_weight, norm_bias and the last bias, or null. A block takes 128 rows of 16-bit
 * numbers, 64 of float32. gelu: 1 for GELU, 0 for ReLU. channels = 128, hidden a multiple of 32. */
OVSEG_API int ovseg_residual_mlp_bwd(const void *grad, const void *y, const void *norm_weight, const void *norm_bias,
                                     const void *fc1_weight, const void *fc1_bias, const void *fc2_weight, void *y_grad,
                                     void *normed, void *activated, void *units_grad, void *sums, int64_t rows,
                                     int64_t channels, int64_t hidden, int64_t gelu, int dtype, int device,
                                     void *stream);

/* Patch tokens of `layers` encoder blocks, at most 32 of them, normalised twice, projected and brought to unit
 * length. `hidden` points to as many pointers, read before the function returns: (batch, tokens, channels) each,
 * whose tokens lie as the two strides say, the last `patches` of them patch tokens. shared_weight, shared_bias
 * (channels); norm_weight, norm_bias (layers, channels); projection (layers, channels, width), width <= 1024. out
 * (layers, batch, patches, width) where `weights` is null, else (batch, patches, width), the sum over the layers
 * with weights (layers). */
OVSEG_API int ovseg_layer_gather_fwd(const void *const *hidden, const void *shared_weight, const void *shared_bias,
                                     const void *norm_weight, const void *norm_bias, const void *projection,
                                     const void *weights, void *out, int64_t layers, int64_t batch, int64_t tokens,
                                     int64_t patches, int64_t channels, int64_t width, int64_t batch_stride,
                                     int64_t token_stride, float shared_eps, float norm_eps, int dtype, int device,
                                     void *stream);

/* Its backward, in three parts, between which lie products with the projection. rows = batch * patches.
 *
 * What the forward multiplies: normed (layers, rows, channels) of `dtype`, and each row's statistics (layers, rows,
 * 4) of float. */
OVSEG_API int ovseg_layer_gather_normed_bwd(const void *const *hidden, const void *shared_weight,
                                            const void *shared_bias, const void *norm_weight, const void *norm_bias,
                                            void *normed, float *statistics, int64_t layers, int64_t batch,
                                            int64_t tokens, int64_t patches, int64_t channels, int64_t batch_stride,
                                            int64_t token_stride, float shared_eps, float norm_eps, int dtype,
                                            int device, void *stream);

/* Through the unit length: projected (layers, rows, width), the product of normed and projection, becomes its
 * gradient. grad (layers, rows, width) where `weights` is null, else (rows, width); weights_grad (layers), or null
 * where it is not wanted, is added up from `along` (layers, rows) of float. */
OVSEG_API int ovseg_layer_gather_length_bwd(const void *grad, void *projected, const void *weights, void *weights_grad,
                                            float *along, int64_t layers, int64_t rows, int64_t width, int dtype,
                                            int device, void *stream);

/* Through both norms: grad (layers, rows, channels), of normed -> hidden_grad (layers, batch, tokens, channels), and
 * sums (layers, count, 4, channels) of float, of 32 rows each (count = ceil(rows / 32)): the gradients of
 * shared_weight, shared_bias, norm_weight and norm_bias. Either may be null; `means` (layers, rows, 2) of float is
 * needed for the sums. */
OVSEG_API int ovseg_layer_gather_norms_bwd(const void *grad, const void *const *hidden, const void *shared_weight,
                                           const void *shared_bias, const void *norm_weight, const float *statistics,
                                           void *hidden_grad, float *means, float *sums, int64_t layers, int64_t batch,
                                           int64_t tokens, int64_t patches, int64_t channels, int64_t count,
                                           int64_t batch_stride, int64_t token_stride, int dtype, int device,
                                           void *stream);

/* Weighted sum over layers: features (layers, size), weights (layers) -> out (size). */
OVSEG_API int ovseg_gaussian_aggregation_fwd(const void *features, const void *weights, void *out, int64_t layers,
                                             int64_t size, int dtype, int device, void *stream);

/* grad (size) -> features_grad (layers, size) and weights_grad (layers), either null where it is not wanted.
 * `shares` (layers, count) of float, with count = 8 for each 16 KB of a layer, the last ones begun, is needed for
 * the weights. */
OVSEG_API int ovseg_gaussian_aggregation_bwd(const void *grad, const void *features, const void *weights,
                                             void *features_grad, void *weights_grad, float *shares, int64_t layers,
                                             int64_t size, int64_t count, int dtype, int device, void *stream);

/* The best k <= 8 classes of every pixel, from logits (windows, classes, height, width), one map a window of
 * `window_height` x `window_width` pixels: labels (k, out_height, out_width) and, where `scores` is not null, their
 * scores, like labels. k = 0: all scores (classes, out_height, out_width) and no labels. whole (classes, height, width)
 * and offset (classes,) may be null. `positions` lies in the host's memory: (top, left) of each window on the canvas,
 * in pixels; they cover it. At most 64 windows. */
OVSEG_API int ovseg_label_map_fwd(const void *logits, const void *whole, const void *offset, const int64_t *positions,
                                  void *scores, int32_t *labels, int64_t windows, int64_t classes, int64_t height,
                                  int64_t width, int64_t window_height, int64_t window_width, int64_t canvas_height,
                                  int64_t canvas_width, int64_t out_height, int64_t out_width, int64_t k, int dtype,
                                  int device, void *stream);

/* Guided group normalisation, ReLU(GN(y + term)): y, out (batch, classes, positions, channels); term (batch, positions,
 * channels) or null; statistics (batch, classes, groups, 2), float32, takes mean and 1 / s of each group. One block
 * sums over `chunk` positions; moments (batch * classes, ceil(positions / chunk), 2, channels), float32, is scratch. */
OVSEG_API int ovseg_upsampling_decoder_norm_fwd(const void *y, const void *term, const void *weight, const void *bias,
                                                void *out, float *statistics, float *moments, int64_t batch,
                                                int64_t classes, int64_t positions, int64_t channels, int64_t groups,
                                                int64_t chunk, float eps, int dtype, int device, void *stream);

/* Its backward: y_grad like y, or null; term_grad (batch, splits, positions, channels), float32, or null, takes the
 * sums over each of `splits` runs of ceil(classes / splits) classes. sums, float32, shaped like moments, takes what the
 * chunks add to the gradients of bias and weight; means, like statistics, is scratch. */
OVSEG_API int ovseg_upsampling_decoder_norm_bwd(const void *grad, const void *y, const void *term,
                                                const float *statistics, const void *weight, const void *bias,
                                                void *y_grad, float *term_grad, float *sums, float *means,
                                                int64_t batch, int64_t classes, int64_t positions, int64_t channels,
                                                int64_t groups, int64_t chunk, int64_t splits, int dtype, int device,
                                                void *stream);

/* Cosines of image (batch, patches, channels) and text (prompts, channels), or (batch, prompts, channels) where
 * `own_text` -> cost (batch, prompts, patches). */
OVSEG_API int ovseg_cost_volume_fwd(const void *image, const void *text, void *cost, int64_t batch, int64_t patches,
                                    int64_t prompts, int64_t channels, int64_t own_text, int dtype, int device,
                                    void *stream);

/* Backward of its normalisation: x and products (rows, channels), the sums of the other side's rows of length 1,
 * weighted by the gradient -> out, the gradient of x. Where `products` is null, out takes the rows of x brought to
 * length 1. */
OVSEG_API int ovseg_cost_volume_norm_bwd(const void *products, const void *x, void *out, int64_t rows, int64_t channels,
                                         int dtype, int device, void *stream);

/* Cosines of image (batch, height, width, channels) and text (classes, prompts, channels), or (batch, classes, ...)
 * where `own_text`, through a convolution: weight (outputs, prompts, size, size), bias (outputs) -> out (batch,
 * classes, height, width, outputs). size is odd, at most 11. */
OVSEG_API int ovseg_cost_embedding_fwd(const void *image, const void *text, const void *weight, const void *bias,
                                       void *out, int64_t batch, int64_t height, int64_t width, int64_t channels,
                                       int64_t classes, int64_t prompts, int64_t own_text, int64_t outputs,
                                       int64_t size, int dtype, int device, void *stream);

/* Backward of its convolution: grad (maps, height, width, outputs) and taps (prompts, size, size, outputs), the weight
 * with its outputs last -> grad_cost (maps, prompts, height, width), a map being that of a class of an image. */
OVSEG_API int ovseg_cost_embedding_cost_bwd(const void *grad, const void *taps, void *grad_cost, int64_t maps,
                                            int64_t prompts, int64_t height, int64_t width, int64_t outputs,
                                            int64_t size, int dtype, int device, void *stream);

/* grad and cost (maps, prompts, height, width) -> grad_weight (outputs, prompts, size, size), grad_bias (outputs).
 * `partial`, of float32, takes the sums of `parts` shares of the maps: (parts, outputs, prompts, size * size + 1). */
OVSEG_API int ovseg_cost_embedding_weight_bwd(const void *grad, const void *cost, void *partial, void *grad_weight,
                                              void *grad_bias, int64_t maps, int64_t prompts, int64_t height,
                                              int64_t width, int64_t outputs, int64_t size, int64_t parts, int dtype,
                                              int device, void *stream);

/* A class aggregation layer, linear attention and MLP, up to the result on pooled maps; where pooling = 1, with x
 * added. x (batch, classes, height, width, channels); terms (images_of_terms, classes, and one more with the padding
 * class where pads > 0, 2 * channels), the guidance's share of queries and keys with their bias,
 * images_of_terms = batch, or 1 for all images; qkv_weight (3 * channels, channels); fc1_weight (hidden, channels);
 * fc2_weight (channels, hidden). out (batch, classes, height / pooling, width / pooling, channels); `middle`, like out,
 * takes what the attention half gives, for the backward pass; null where it is not wanted. channels = 128, heads = 4,
 * hidden a multiple of 32. */
OVSEG_API int ovseg_class_aggregation_fwd(const void *x, const void *terms, const void *norm1_weight,
                                          const void *norm1_bias, const void *qkv_weight, const void *v_bias,
                                          const void *padding_token, const void *norm2_weight, const void *norm2_bias,
                                          const void *fc1_weight, const void *fc1_bias, const void *fc2_weight,
                                          const void *fc2_bias, void *out, void *middle, int64_t batch, int64_t classes,
                                          int64_t height, int64_t width, int64_t channels, int64_t hidden,
                                          int64_t heads, int64_t pooling, int64_t pads, int64_t images_of_terms,
                                          int dtype, int device, void *stream);

/* Backward of its attention: tokens (batch * classes * positions, and one more with the padding class where pads > 0,
 * 3 * channels), the products of normalised tokens with qkv_weight, `positions` being those of a map; terms as above;
 * grad (batch, classes, positions, channels) -> grad_tokens like tokens, but for the padding class, whose gradients, of
 * keys and values, go to grad_padding (batch, positions, 2 * channels), float32, null where pads = 0. */
OVSEG_API int ovseg_class_aggregation_attention_bwd(const void *tokens, const void *terms, const void *v_bias,
                                                    const void *grad, void *grad_tokens, void *grad_padding,
                                                    int64_t batch, int64_t classes, int64_t positions, int64_t channels,
                                                    int64_t heads, int64_t pads, int64_t images_of_terms, int dtype,
                                                    int device, void *stream);

/* out = x + y resized to x's size, bilinear with aligned corners: x, out (maps, height, width, channels); y (maps,
 * low_height, low_width, channels). channels: a multiple of what fits 16 bytes. */
OVSEG_API int ovseg_class_aggregation_resize_fwd(const void *x, const void *y, void *out, int64_t maps, int64_t height,
                                                 int64_t width, int64_t low_height, int64_t low_width, int64_t channels,
                                                 int dtype, int device, void *stream);

/* Backward of the resize: grad like out -> grad_y like y. */
OVSEG_API int ovseg_class_aggregation_resize_bwd(const void *grad, void *grad_y, int64_t maps, int64_t height,
                                                 int64_t width, int64_t low_height, int64_t low_width, int64_t channels,
                                                 int dtype, int device, void *stream);

#ifdef __cplusplus
}
#endif

#endif
