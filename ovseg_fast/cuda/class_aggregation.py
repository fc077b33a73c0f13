"""Launchers of `csrc/class_aggregation.cu`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import native
from .common.layer_norm import layer_norm_backward
from .common.residual_mlp import EPS


def class_aggregation(
    x: Tensor, terms: Tensor, norm1_weight: Tensor, norm1_bias: Tensor, weight: Tensor, v_bias: Tensor,
    padding_token: Tensor, norm2_weight: Tensor, norm2_bias: Tensor, fc1_weight: Tensor, fc1_bias: Tensor,
    fc2_weight: Tensor, fc2_bias: Tensor, pads: int, heads: int, pooling: int, keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(B, T, H, W, C) -> (B, T, H // pooling, W // pooling, C), and what the attention half gives where `keep`."""
    inputs = [
        native.aligned(tensor)
        for tensor in (
            x, terms, norm1_weight, norm1_bias, weight, v_bias, padding_token,
            norm2_weight, norm2_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias,
        )
    ]  # fmt: skip
    batch, classes, height, width, channels = x.shape
    out = x.new_empty(batch, classes, height // pooling, width // pooling, channels)
    middle = x.new_empty(out.shape if keep else 0)
    native.call(
        "ovseg_class_aggregation_fwd", *inputs, out, middle if keep else None,
        *x.shape, fc1_weight.shape[0], heads, pooling, pads, len(terms),
    )  # fmt: skip
    return out, middle


def class_aggregation_attention_backward(
    grad: Tensor, x: Tensor, terms: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, v_bias: Tensor,
    padding_token: Tensor, pads: int, heads: int, pooling: int, full: bool, parameters: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of the tensors behind `grad`; empty but for that of x where no parameter needs one.

    The kernel takes the attention itself; pooling, normalisation and products with weights are PyTorch's.
    """
    if full:
        raise NotImplementedError("the CUDA C++ kernels take linear attention only")
    batch, classes, height, width, channels = x.shape
    pooled = _pooled(x, pooling)
    tokens = pooled.numel() // channels
    rows = pooled.reshape(tokens, channels)
    if pads:
        rows = torch.cat([rows, padding_token.unsqueeze(0)])
    normed, mean, scale = torch.native_layer_norm(rows, (channels,), norm_weight, norm_bias, EPS)
    positions = (height // pooling) * (width // pooling)
    projected = native.aligned(F.linear(normed, weight))
    grads = torch.empty_like(projected)
    pad_grads = x.new_empty(batch, positions if pads else 0, 2 * channels, dtype=torch.float32)
    native.call(
        "ovseg_class_aggregation_attention_bwd", projected, native.aligned(terms), native.aligned(v_bias),
        native.aligned(grad), grads, pad_grads if pads else None,
        batch, classes, positions, channels, heads, pads, len(terms),
    )  # fmt: skip
    pad_sums = pad_grads.sum(1)
    if pads:
        grads[tokens, :channels] = 0
        grads[tokens, channels:] = pad_sums.sum(0)
    rows_grad, *norm_grads = layer_norm_backward(
        grads @ weight, rows, mean, scale, norm_weight, norm_bias, [True, parameters, parameters]
    )
    x_grad = _pooled_backward(rows_grad[:tokens].view(pooled.shape) + grad, x, pooling)
    if not parameters:
        return x_grad, *(x.new_empty(0) for _ in range(6))

    by_class = grads[:tokens].view(batch, classes, positions, 3 * channels).sum(2, dtype=torch.float32)
    v_bias_grad = by_class[..., 2 * channels :].sum((0, 1)) + pad_sums[:, channels:].sum(0)
    terms_grad = by_class[..., : 2 * channels]
    if pads:
        terms_grad = torch.cat([terms_grad, F.pad(pad_sums[:, None, :channels], (channels, 0))], 1)
    if len(terms) == 1:
        terms_grad = terms_grad.sum(0, keepdim=True)
    padding_grad = rows_grad[tokens].clone() if pads else torch.zeros_like(padding_token)
    return (
        x_grad, terms_grad.contiguous().to(x.dtype), *norm_grads, grads.t() @ normed, v_bias_grad.to(x.dtype),
        padding_grad,
    )  # fmt: skip


def class_aggregation_resize(x: Tensor, y: Tensor) -> Tensor:
    """(B, T, H, W, C) and (B, T, h, w, C) -> (B, T, H, W, C)."""
    out = x.new_empty(x.shape)
    native.call(
        "ovseg_class_aggregation_resize_fwd", native.aligned(x), native.aligned(y), out,
        x.shape[0] * x.shape[1], *x.shape[2:4], *y.shape[2:],
    )  # fmt: skip
    return out


def class_aggregation_resize_backward(grad: Tensor, low_height: int, low_width: int) -> Tensor:
    """Gradient of y; that of x is `grad` itself."""
    out = grad.new_empty(*grad.shape[:2], low_height, low_width, grad.shape[-1])
    native.call(
        "ovseg_class_aggregation_resize_bwd", native.aligned(grad), out,
        grad.shape[0] * grad.shape[1], *grad.shape[2:4], low_height, low_width, grad.shape[-1],
    )  # fmt: skip
    return out


def _pooled(x: Tensor, pooling: int) -> Tensor:
    """(B, T, H, W, C) -> (B, T, H // pooling, W // pooling, C)."""
    if pooling == 1:
        return x
    return _squares(x, pooling).mean((3, 5))


def _pooled_backward(grad: Tensor, x: Tensor, pooling: int) -> Tensor:
    """The share of each token of x; what is left over at the border has none."""
    if pooling == 1:
        return grad
    x_grad = x.new_zeros(x.shape)
    _squares(x_grad, pooling).copy_((grad / pooling**2)[:, :, :, None, :, None])
    return x_grad


def _squares(x: Tensor, pooling: int) -> Tensor:
    """(B, T, H // pooling, pooling, W // pooling, pooling, C), a view."""
    high, wide = x.shape[2] // pooling, x.shape[3] // pooling
    whole = x[:, :, : high * pooling, : wide * pooling]
    return whole.unflatten(3, (wide, pooling)).unflatten(2, (high, pooling))
