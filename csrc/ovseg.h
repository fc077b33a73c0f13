/* The whole interface of the native library: plain C, no torch, no Python.
 *
 * The caller allocates every buffer; the library allocates nothing, waits for nothing and never ends the process. A
 * function queues its kernels on `stream` of GPU `device` and returns OVSEG_OK, an error of its own (negative) or one
 * of the CUDA runtime (positive); `ovseg_error_string` puts it into words. Tensors are contiguous, aligned to 16 bytes
 * and of `dtype`, unless a type says otherwise. "Or null" marks inputs that may be left out and outputs that are
 * not needed. */

#ifndef OVSEG_H
#define OVSEG_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define OVSEG_API __attribute__((visibility("default")))
#define OVSEG_ABI_VERSION 2

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

/* Writes up to `size` of the architectures that the library was built for (80, 86, ...) and returns their number. None
 * means that it emulates a GPU on the CPU: tensors are in the CPU's memory and `stream` is ignored. */
OVSEG_API int ovseg_architectures(int *architectures, int size);

/* One guided shifted-window block: attention and MLP. channels = 128, heads = 4, window <= 12, hidden a multiple of
 * 128. */
typedef struct {
    const void *x;                         /* (batch, classes, height, width, channels) */
    const void *q_term, *k_term;           /* (batch, height * width, channels): guidance, with the biases of q, k */
    const void *norm1_weight, *norm1_bias; /* (channels) */
    const void *qkv_weight;                /* (3 * channels, channels) */
    const void *v_bias;                    /* (channels) */
    const void *proj_weight, *proj_bias;   /* (channels, channels), (channels) */
    const void *norm2_weight, *norm2_bias; /* (channels) */
    const void *fc1_weight, *fc1_bias;     /* (hidden, channels), (hidden) */
    const void *fc2_weight, *fc2_bias;     /* (channels, hidden), (channels) */
    void *out;                             /* like x */
    void *middle;                          /* like x: the attention half's result, for the backward; or null */
    int64_t batch, classes, height, width, channels, hidden, heads, window, shift;
} ovseg_spatial_aggregation_params;

OVSEG_API int ovseg_spatial_aggregation_fwd(const ovseg_spatial_aggregation_params *params, int dtype, int device,
                                            void *stream);

/* Backward of its window attention: tokens (batch * classes * height * width, 3 * channels), q, k and v of each;
 * grad_attended (batch * classes * height * width, channels) -> grad_tokens like tokens and attended, the attention's
 * result, like grad_attended, or null. */
OVSEG_API int ovseg_spatial_aggregation_attention_bwd(const void *tokens, const void *grad_attended, void *grad_tokens,
                                                      void *attended, int64_t batch, int64_t classes, int64_t height,
                                                      int64_t width, int64_t channels, int64_t heads, int64_t window,
                                                      int64_t shift, int dtype, int device, void *stream);

/* Backward of the residual MLP of both aggregation blocks. channels = 128, hidden a multiple of 32. normed, activated
 * and units_grad, for the gradients of the weights, are null together. */
typedef struct {
    const void *grad, *y;                 /* (rows, channels): the result's gradient, the input */
    const void *norm_weight, *norm_bias;  /* (channels) */
    const void *fc1_weight, *fc1_bias;    /* (hidden, channels), (hidden) */
    const void *fc2_weight;               /* (channels, hidden) */
    void *y_grad;                         /* (rows, channels), or null */
    void *normed;                         /* (rows, channels): LN(y), or null */
    void *activated, *units_grad;         /* (rows, hidden): activations, the gradient before them; or null */
    float *sums;                          /* (blocks, 3, channels): each block's share of the gradients of
                                              norm_weight, norm_bias and the last bias; or null. A block takes 128 rows
                                              of 16-bit numbers, 64 of float32. */
    int64_t rows, channels, hidden, gelu; /* gelu: 1 for GELU, 0 for ReLU */
} ovseg_residual_mlp_params;

OVSEG_API int ovseg_residual_mlp_bwd(const ovseg_residual_mlp_params *params, int dtype, int device, void *stream);

/* Patch tokens of `layers` <= 32 encoder blocks, normalised twice, projected and scaled to length 1. `hidden` points to
 * one pointer a layer, read before the function returns: (batch, tokens, channels) with these two strides, the last
 * `patches` tokens being patch tokens. shared_weight, shared_bias (channels); norm_weight, norm_bias (layers,
 * channels); projection (layers, channels, width), width <= 1024. out (layers, batch, patches, width) without
 * `weights`; with weights (layers) their weighted sum, (batch, patches, width). */
OVSEG_API int ovseg_layer_gather_fwd(const void *const *hidden, const void *shared_weight, const void *shared_bias,
                                     const void *norm_weight, const void *norm_bias, const void *projection,
                                     const void *weights, void *out, int64_t layers, int64_t batch, int64_t tokens,
                                     int64_t patches, int64_t channels, int64_t width, int64_t batch_stride,
                                     int64_t token_stride, float shared_eps, float norm_eps, int dtype, int device,
                                     void *stream);

/* Its backward in three parts, with products with the projection between them. rows = batch * patches.
 *
 * First what the forward multiplies, normed (layers, rows, channels), and each row's statistics (layers, rows, 4). */
OVSEG_API int ovseg_layer_gather_normed_bwd(const void *const *hidden, const void *shared_weight,
                                            const void *shared_bias, const void *norm_weight, const void *norm_bias,
                                            void *normed, float *statistics, int64_t layers, int64_t batch,
                                            int64_t tokens, int64_t patches, int64_t channels, int64_t batch_stride,
                                            int64_t token_stride, float shared_eps, float norm_eps, int dtype,
                                            int device, void *stream);

/* Through the unit length: projected (layers, rows, width), the product of normed and projection, becomes its
 * gradient. grad (layers, rows, width) without `weights`, else (rows, width); weights_grad (layers), or null, is added
 * up from `along` (layers, rows). */
OVSEG_API int ovseg_layer_gather_length_bwd(const void *grad, void *projected, const void *weights, void *weights_grad,
                                            float *along, int64_t layers, int64_t rows, int64_t width, int dtype,
                                            int device, void *stream);

/* Through both norms: grad of normed (layers, rows, channels) -> hidden_grad (layers, batch, tokens, channels), or
 * null, and sums (layers, count, 4, channels), or null: the gradients of shared_weight, shared_bias, norm_weight and
 * norm_bias over 32 rows each, count = ceil(rows / 32). The sums need `means` (layers, rows, 2). */
OVSEG_API int ovseg_layer_gather_norms_bwd(const void *grad, const void *const *hidden, const void *shared_weight,
                                           const void *shared_bias, const void *norm_weight, const float *statistics,
                                           void *hidden_grad, float *means, float *sums, int64_t layers, int64_t batch,
                                           int64_t tokens, int64_t patches, int64_t channels, int64_t count,
                                           int64_t batch_stride, int64_t token_stride, int dtype, int device,
                                           void *stream);

/* Weighted sum over layers: features (layers, size), weights (layers) -> out (size). */
OVSEG_API int ovseg_gaussian_aggregation_fwd(const void *features, const void *weights, void *out, int64_t layers,
                                             int64_t size, int dtype, int device, void *stream);

/* grad (size) -> features_grad (layers, size) and weights_grad (layers), either or null. The latter needs `shares`
 * (layers, count), where count is 8 for each 16 KB of a layer, rounded up. */
OVSEG_API int ovseg_gaussian_aggregation_bwd(const void *grad, const void *features, const void *weights,
                                             void *features_grad, void *weights_grad, float *shares, int64_t layers,
                                             int64_t size, int64_t count, int dtype, int device, void *stream);

/* The best k <= 8 classes of every pixel, from logits (windows, classes, height, width), one map for each of at most 64
 * windows of `window_height` x `window_width` pixels: labels (k, out_height, out_width) and their scores, alike, or
 * null. k = 0: all scores (classes, out_height, out_width), no labels. whole (classes, height, width) and offset
 * (classes) or null. `positions`, in the host's memory: (top, left) of each window on the canvas in pixels; the windows
 * cover it. */
OVSEG_API int ovseg_label_map_fwd(const void *logits, const void *whole, const void *offset, const int64_t *positions,
                                  void *scores, int32_t *labels, int64_t windows, int64_t classes, int64_t height,
                                  int64_t width, int64_t window_height, int64_t window_width, int64_t canvas_height,
                                  int64_t canvas_width, int64_t out_height, int64_t out_width, int64_t k, int dtype,
                                  int device, void *stream);

/* Guided group normalisation, ReLU(GN(y + term)): y, out (batch, classes, positions, channels); term (batch, positions,
 * channels) or null; statistics (batch, classes, groups, 2) receives the mean and 1 / s of each group. A block sums
 * over `chunk` positions; moments (batch * classes, ceil(positions / chunk), 2, channels) is scratch. */
OVSEG_API int ovseg_upsampling_decoder_norm_fwd(const void *y, const void *term, const void *weight, const void *bias,
                                                void *out, float *statistics, float *moments, int64_t batch,
                                                int64_t classes, int64_t positions, int64_t channels, int64_t groups,
                                                int64_t chunk, float eps, int dtype, int device, void *stream);

/* Its backward: y_grad like y, or null; term_grad (batch, splits, positions, channels), or null, receives the sums over
 * each of `splits` runs of ceil(classes / splits) classes. sums, like moments, receives the chunks' shares of the
 * gradients of bias and weight; means, like statistics, is scratch. */
OVSEG_API int ovseg_upsampling_decoder_norm_bwd(const void *grad, const void *y, const void *term,
                                                const float *statistics, const void *weight, const void *bias,
                                                void *y_grad, float *term_grad, float *sums, float *means,
                                                int64_t batch, int64_t classes, int64_t positions, int64_t channels,
                                                int64_t groups, int64_t chunk, int64_t splits, int dtype, int device,
                                                void *stream);

/* Cosines of image (batch, patches, channels) and text (prompts, channels) -> cost (batch, prompts, patches). */
OVSEG_API int ovseg_cost_volume_fwd(const void *image, const void *text, void *cost, int64_t batch, int64_t patches,
                                    int64_t prompts, int64_t channels, int dtype, int device, void *stream);

/* Backward of its normalisation: x (rows, channels) and products, alike, the other side's rows scaled to length 1 and
 * summed with the gradient as weights -> out, the gradient of x. Without `products` out is x scaled to length 1. */
OVSEG_API int ovseg_cost_volume_norm_bwd(const void *products, const void *x, void *out, int64_t rows, int64_t channels,
                                         int dtype, int device, void *stream);

/* Cosines of image (batch, height, width, channels) and text (classes, prompts, channels), convolved with weight
 * (outputs, prompts, size, size) and bias (outputs) -> out (batch, classes, height, width, outputs). size is odd, at
 * most 11. */
OVSEG_API int ovseg_cost_embedding_fwd(const void *image, const void *text, const void *weight, const void *bias,
                                       void *out, int64_t batch, int64_t height, int64_t width, int64_t channels,
                                       int64_t classes, int64_t prompts, int64_t outputs, int64_t size, int dtype,
                                       int device, void *stream);

/* Backward of its convolution to the cost: grad (maps, height, width, outputs), a map for each class of each image, and
 * taps (prompts, size, size, outputs), the weight with its outputs last -> grad_cost (maps, prompts, height, width). */
OVSEG_API int ovseg_cost_embedding_cost_bwd(const void *grad, const void *taps, void *grad_cost, int64_t maps,
                                            int64_t prompts, int64_t height, int64_t width, int64_t outputs,
                                            int64_t size, int dtype, int device, void *stream);

/* To its weight: grad and cost (maps, prompts, height, width) -> grad_weight (outputs, prompts, size, size), grad_bias
 * (outputs). `partial` receives the sums of `parts` shares of the maps: (parts, outputs, prompts, size * size + 1). */
OVSEG_API int ovseg_cost_embedding_weight_bwd(const void *grad, const void *cost, float *partial, void *grad_weight,
                                              void *grad_bias, int64_t maps, int64_t prompts, int64_t height,
                                              int64_t width, int64_t outputs, int64_t size, int64_t parts, int dtype,
                                              int device, void *stream);

/* A class aggregation layer: linear attention and MLP, on pooled maps; without pooling (1), x is added. channels = 128,
 * heads = 4, hidden a multiple of 32. With pads > 0 a padding class follows the others and counts so often. */
typedef struct {
    const void *x;                         /* (batch, classes, height, width, channels) */
    const void *terms;                     /* (images_of_terms, classes + 1 if pads, 2 * channels): guidance, with the
                                               biases of q, k */
    const void *norm1_weight, *norm1_bias; /* (channels) */
    const void *qkv_weight;                /* (3 * channels, channels) */
    const void *v_bias, *padding_token;    /* (channels) */
    const void *norm2_weight, *norm2_bias; /* (channels) */
    const void *fc1_weight, *fc1_bias;     /* (hidden, channels), (hidden) */
    const void *fc2_weight, *fc2_bias;     /* (channels, hidden), (channels) */
    void *out;                             /* (batch, classes, height / pooling, width / pooling, channels) */
    void *middle;                          /* like out: the attention half's result, for the backward; or null */
    int64_t batch, classes, height, width, channels, hidden, heads, pooling, pads;
    int64_t images_of_terms; /* batch, or 1 if all images share the terms */
} ovseg_class_aggregation_params;

OVSEG_API int ovseg_class_aggregation_fwd(const ovseg_class_aggregation_params *params, int dtype, int device,
                                          void *stream);

/* Backward of its attention: tokens (batch * classes * positions, plus 1 for the padding class if pads, 3 * channels),
 * the products of normalised tokens with qkv_weight; terms as above; grad (batch, classes, positions, channels) ->
 * grad_tokens like tokens, without the padding class: the gradients of its keys and values go to grad_padding (batch,
 * positions, 2 * channels), null if pads = 0. */
OVSEG_API int ovseg_class_aggregation_attention_bwd(const void *tokens, const void *terms, const void *v_bias,
                                                    const void *grad, void *grad_tokens, float *grad_padding,
                                                    int64_t batch, int64_t classes, int64_t positions, int64_t channels,
                                                    int64_t heads, int64_t pads, int64_t images_of_terms, int dtype,
                                                    int device, void *stream);

/* out = x + y resized to x's size, bilinear with aligned corners: x, out (maps, height, width, channels); y (maps,
 * low_height, low_width, channels). channels fill whole pieces of 16 bytes. */
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
