"""Launchers of `csrc/layer_gather.cu` and `csrc/layer_gather_backward.cu`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import native

TOGETHER = 32  # rows of which a sum of the norms' gradients is made


def readable(hidden: Sequence[Tensor]) -> list[Tensor]:
    """The hidden states with equal strides, the last one 1, at addresses that kernels read: as they are, or copies."""
    first = hidden[0].stride()
    if first[-1] == 1 and all(tokens.stride() == first and tokens.data_ptr() % 16 == 0 for tokens in hidden):
        return list(hidden)
    return [native.aligned(tokens) for tokens in hidden]


def gather(
    hidden: Sequence[Tensor], patches: int, shared_weight: Tensor, shared_bias: Tensor, norm_weight: Tensor,
    norm_bias: Tensor, projection: Tensor, weights: Tensor | None, out: Tensor, shared_eps: float, norm_eps: float,
) -> None:  # fmt: skip
    """Fill `out` with the layers' maps (L, B, S, E), or with their sum (B, S, E) where there are weights (L,)."""
    hidden = readable(hidden)
    parameters = map(native.aligned, (shared_weight, shared_bias, norm_weight, norm_bias, projection))
    native.call(
        "ovseg_layer_gather_fwd", hidden, *parameters, None if weights is None else native.aligned(weights), out,
        len(hidden), *hidden[0].shape[:2], patches, *projection.shape[1:], *hidden[0].stride()[:2],
        shared_eps, norm_eps,
    )  # fmt: skip


def layer_gather(
    hidden: Sequence[Tensor], patches: int, shared_weight: Tensor, shared_bias: Tensor, norm_weight: Tensor,
    norm_bias: Tensor, projection: Tensor, shared_eps: float, norm_eps: float,
) -> Tensor:  # fmt: skip
    """L tensors (B, N, D), (D,) twice, (L, D) twice and (L, D, E) -> (L, B, S, E)."""
    maps = hidden[0].new_empty(len(hidden), len(hidden[0]), patches, projection.shape[-1])
    gather(
        hidden, patches, shared_weight, shared_bias, norm_weight, norm_bias, projection, None, maps,
        shared_eps, norm_eps,
    )  # fmt: skip
    return maps


def gather_backward(
    grad: Tensor, hidden: Sequence[Tensor], patches: int, shared_weight: Tensor, shared_bias: Tensor,
    norm_weight: Tensor, norm_bias: Tensor, projection: Tensor, weights: Tensor | None,
    shared_eps: float, norm_eps: float,
    need_hidden: bool, need_norms: bool, need_projection: bool, need_weights: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """From the gradient (L, B, S, E) of the layers' maps or, with weights (L,), (B, S, E) of their sum: the gradients
    of the hidden states (L, B, N, D), the five parameters and the weights; an empty tensor where none is needed.

    The products with the projection are PyTorch's.
    """
    hidden = readable(hidden)
    like, layers = hidden[0], len(hidden)
    batch, tokens, channels = like.shape
    rows, strides, empty = batch * patches, like.stride()[:2], like.new_empty(0)
    norms = [native.aligned(tensor) for tensor in (shared_weight, shared_bias, norm_weight, norm_bias)]

    normed = like.new_empty(layers, rows, channels)
    statistics = like.new_empty(layers, rows, 4, dtype=torch.float32)
    native.call(
        "ovseg_layer_gather_normed_bwd", hidden, *norms, normed, statistics,
        layers, batch, tokens, patches, channels, *strides, shared_eps, norm_eps,
    )  # fmt: skip
    projected = torch.bmm(normed, projection)
    weights_grad = like.new_empty(layers) if need_weights else None
    along = like.new_empty(layers, rows, dtype=torch.float32) if need_weights else None
    native.call(
        "ovseg_layer_gather_length_bwd", native.aligned(grad), projected,
        None if weights is None else native.aligned(weights), weights_grad, along,
        layers, rows, projection.shape[-1],
    )  # fmt: skip

    hidden_grad = like.new_empty(layers, batch, tokens, channels) if need_hidden else None
    chunks = -(-rows // TOGETHER)
    means = like.new_empty(layers, rows, 2, dtype=torch.float32) if need_norms else None
    sums = like.new_empty(layers, chunks, 4, channels, dtype=torch.float32) if need_norms else None
    if need_hidden or need_norms:
        native.call(
            "ovseg_layer_gather_norms_bwd", torch.bmm(projected, projection.transpose(1, 2)), hidden, *norms[:3],
            statistics, hidden_grad, means, sums, layers, batch, tokens, patches, channels, chunks, *strides,
        )  # fmt: skip
    norm_grads = [empty] * 4
    if sums is not None:
        by_layer = sums.sum(1)
        shared, own = by_layer[:, :2].sum(0), by_layer[:, 2:]
        norm_grads = [part.to(like.dtype, copy=True) for part in (*shared, *own.unbind(1))]
    return (
        empty if hidden_grad is None else hidden_grad,
        *norm_grads,
        torch.bmm(normed.transpose(1, 2), projected) if need_projection else empty,
        empty if weights_grad is None else weights_grad,
    )


def layer_gather_backward(
    grad: Tensor, hidden: Sequence[Tensor], patches: int, shared_weight: Tensor, shared_bias: Tensor,
    norm_weight: Tensor, norm_bias: Tensor, projection: Tensor, shared_eps: float, norm_eps: float,
    need_hidden: bool, need_norms: bool, need_projection: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of the hidden states (L, B, N, D), of the five parameters; an empty tensor where none is needed."""
    return gather_backward(
        grad, hidden, patches, shared_weight, shared_bias, norm_weight, norm_bias, projection, None,
        shared_eps, norm_eps, need_hidden, need_norms, need_projection, False,
    )[:6]  # fmt: skip
