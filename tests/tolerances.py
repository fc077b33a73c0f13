"""The one table of tolerances, each with its grounds. Tests take limits from here and never widen one.

Every limit except `ARGMAX_AGREEMENT` is a relative error ||a - b|| / ||b||, see `relative_error`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

# --- float32 results against the golden numbers of tests/parity ---
# The published code itself moves by up to 1.5e-6 when thread count and matrix library change. The smallest
# wrong detail among those measured (tanh instead of exact GELU) moves logits by 1.5e-4. Outputs may be off by
# 2e-5: the rewrites sum in another order, and every wrong detail is still caught.
GOLDEN_OUTPUT = 2e-5
GOLDEN_LOSS = 1e-5  # the published code moves by less than 1e-6
GOLDEN_OPERATOR_GRADIENT = 2e-4  # norm weights of the class block move by up to 7e-5, the rest by about 1e-7
GOLDEN_CATSEG_GRADIENT = 1e-3  # of a training step: tensors move by up to 1e-4, their projections by 2.4e-4
GOLDEN_CASCADE_CLIP_GRADIENT = 1e-4  # moves by up to 1.2e-6
ARGMAX_AGREEMENT = 0.999  # share of pixels; near ties may fall either way

# Gradients that are zero in exact arithmetic (softmax does not see a key bias) hold rounding noise only, so a
# relative error says nothing. Their norm is compared with that of the same projection's weight gradient
# instead: the published code's own noise reaches 2.3e-7 of it.
ZERO_GRADIENT = 1e-5

# --- exact rewrites against the literal forms of tests/literal ---
# The two are one function, summed in another order. Rounding grows with the number of terms (a few thousand
# per output, over a chain of layers) and stays below; the smallest wrong detail measured shows at 1e-4.
REWRITE = {torch.float64: 1e-10, torch.float32: 1e-5}
REWRITE_FLOAT64 = REWRITE[torch.float64]
REWRITE_FLOAT32 = REWRITE[torch.float32]
REWRITE_GRADIENT_FACTOR = 3  # a gradient runs through every product twice

# Where terms cancel (softmax does not see a key's bias, a norm over one channel has no slope), a relative error says
# nothing. Rounding was measured at up to 8e-14 of the largest gradient of the same call.
CANCELLED_FLOAT64 = 1e-12

# --- kernels against the float64 PyTorch form ---
# float32 without TF32 keeps about 7 digits, float16 3.3 and bfloat16 2.4; inputs and outputs are rounded to
# the dtype, sums are kept in float32.
KERNEL = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
KERNEL_GRADIENT_FACTOR = 3

# Logits of the small CAT-Seg with random weights in bfloat16, weights rounded too, against float32: measured 0.007 to
# 0.018 over 12 seeds, head and whole model alike. Another choice of classes differs in whole classes.
BFLOAT16_TINY = 4e-2

# Gradients through ReLU, of upsampling_decoder and class_aggregation, jump where rounding carries a number over its
# zero. In 500 random calls outside the sample table 16 low-precision gradients went beyond the limit above, none in
# float32; the PyTorch form in the same dtype does so as often (81 small decoders in bfloat16: the kernels 56 times, the
# PyTorch form 55 times), but not in the same calls. So the limit holds with ReLU deciding alike on both sides, which
# tells whether a kernel is right. With ReLU free, the median error over many calls is held against the median of the
# PyTorch form in the same dtype: measured 1.0 times that for both.
RELU_KINK = 1.5

# Labels are those of the float64 PyTorch form wherever its two best scores, of at most about 1, lie further apart than
# this. Kernels read logits of any dtype exactly and work in float32: where a resized pixel lies in its source is known
# to about 1e-7 of the map's size there, so scores from maps of less than a hundred pixels stay within a few 1e-6.
LABEL_MARGIN = 1e-5


def _float64(value: Any) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        value = value.detach().to("cpu", torch.float64).numpy()
    return np.asarray(value, dtype=np.float64)


def relative_error(a: Any, b: Any) -> float:
    """||a - b|| / ||b|| in float64, where b is the truth; tensors, arrays and numbers alike.

    Equal zeros give 0.0, anything else against a zero truth inf, and a NaN or infinity on either side gives
    nan or inf: every comparison ``relative_error(a, b) <= limit`` then fails, as it should.

    Raises:
        ValueError: when the shapes differ, since broadcasting would hide a missing axis.
    """
    a, b = _float64(a), _float64(b)
    if a.shape != b.shape:
        raise ValueError(f"relative_error: a has shape {a.shape}, b has shape {b.shape}; they must be equal")
    with np.errstate(invalid="ignore"):
        difference = float(np.linalg.norm((a - b).ravel()))
    scale = float(np.linalg.norm(b.ravel()))
    if scale == 0.0:
        return difference if difference == 0.0 or np.isnan(difference) else float("inf")
    return difference / scale
