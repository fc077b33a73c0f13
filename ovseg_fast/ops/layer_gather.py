"""Layer gather: the patch tokens of several encoder blocks, brought into the image-text embedding space.

    f_l = unit( LN_l( LN_shared( h_l[patches] ) ) · P_l )           and, with weights, Σ_l w_l · f_l alone

Exact rewrite: only the S patch tokens are normalised and projected, not the class token and the prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from .common import registration
from .common.checks import check_tensors
from .gaussian_aggregation import torch_form as weighted_sum

MAX_WIDTH = 1024  # columns of a projection: a program of the kernels needs whole rows for their lengths
MAX_LAYERS = 32  # in one call of the CUDA C++ kernels


def layer_gather(
    hidden: Sequence[Tensor],
    patches: int,
    shared_weight: Tensor,
    shared_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    projection: Tensor,
    *,
    weights: Tensor | None = None,
    shared_eps: float = 1e-6,
    norm_eps: float = 1e-5,
) -> Tensor:
    """Normalise, project and scale to unit length the patch tokens of L blocks (Cascade-CLIP, section 3.2).

    Args:
        hidden: L tensors (B, N, D), outputs of encoder blocks; the patch tokens are the last `patches` of N.
        patches: S, the number of patch tokens.
        shared_weight, shared_bias: (D,) layer norm that all blocks share, with epsilon `shared_eps`.
        norm_weight, norm_bias: (L, D) layer norm of each block, with epsilon `norm_eps`.
        projection: (L, D, E).
        weights: (L,) learned Gaussian weights of a stage (section 3.3, equation 4), see `gaussian_aggregation`.

    Returns:
        (L, B, S, E), unit length over E; with `weights` their weighted sum (B, S, E), and the kernels then store no
        single layer's map.

    Raises:
        TypeError, ValueError: a tensor or `patches` does not fit, or there is no block.
    """
    if not isinstance(hidden, Sequence):
        raise TypeError(f"layer_gather: hidden must be a list of tensors (B, N, D), got {type(hidden).__name__}.")
    if not hidden:
        raise ValueError("layer_gather: hidden must hold at least one tensor (B, N, D), got none.")
    check_tensors(
        "layer_gather",
        **{f"hidden[{i}]": (tokens, "B N D") for i, tokens in enumerate(hidden)},
        shared_weight=(shared_weight, "D"),
        shared_bias=(shared_bias, "D"),
        norm_weight=(norm_weight, "L D"),
        norm_bias=(norm_bias, "L D"),
        projection=(projection, "L D E"),
        **({} if weights is None else {"weights": (weights, "L")}),
    )
    if (layers := len(hidden)) != norm_weight.shape[0]:
        raise ValueError(f"layer_gather: norm_weight must have one row per block, {layers}, got {len(norm_weight)}.")
    if not 1 <= patches <= hidden[0].shape[1]:
        raise ValueError(f"layer_gather: patches must be in 1..N = {hidden[0].shape[1]}, got {patches}.")
    parameters = (shared_weight, shared_bias, norm_weight, norm_bias, projection, weights)
    tensors = [tensor for tensor in (*hidden, *parameters) if tensor is not None]
    backend = backends.choose("layer_gather", *tensors, refusals=_refusals(layers, projection.shape[-1]))
    if backend == "torch":
        return torch_form(hidden, patches, *parameters, shared_eps, norm_eps)
    hidden, cast = list(registration.autocast(*hidden)), registration.autocast(*parameters)
    return torch.ops.ovseg_fast.layer_gather(hidden, patches, *cast, shared_eps, norm_eps, backend)


def _refusals(layers: int, width: int) -> dict[str, str | None]:
    """Reasons, by backend, why its kernels do not take a projection of this shape."""
    wide = f"E = {width} is larger than {MAX_WIDTH}" if width > MAX_WIDTH else None
    many = f"its CUDA C++ kernels take up to {MAX_LAYERS} layers, got {layers}" if layers > MAX_LAYERS else None
    return {"triton": wide, "cuda": wide or many}


def torch_form(hidden: Sequence[Tensor], patches: int, *rest: Any) -> Tensor:
    """As `layer_gather`, whose other arguments are `rest`, in its order."""
    shared_weight, shared_bias, norm_weight, norm_bias, projection, weights, shared_eps, norm_eps = rest
    width = (hidden[0].shape[-1],)
    features = []
    for tokens, weight, bias, proj in zip(hidden, norm_weight, norm_bias, projection, strict=True):
        normed = F.layer_norm(tokens[:, -patches:], width, shared_weight, shared_bias, shared_eps)
        normed = F.layer_norm(normed, width, weight, bias, norm_eps)
        features.append(F.normalize(normed @ proj, dim=-1))
    maps = torch.stack(features)
    return maps if weights is None else weighted_sum(maps, weights)


# --- kernels: the arguments of `torch_form` -> (L, B, S, E), or with weights (B, S, E) ---


def _fake(hidden: Sequence[Tensor], patches: int, *rest: Any) -> Tensor:
    projection, weights = rest[4:6]
    shape = (hidden[0].shape[0], patches, projection.shape[-1])
    return hidden[0].new_empty(shape if weights is not None else (len(hidden), *shape))


def _backward(kernels: Any, grad: Tensor, hidden: Sequence[Tensor], patches: int, *rest: Any) -> list[Tensor | None]:
    """The products with the projection, and the sums, between two launchers.

    With y the normalised tokens (L, B · S, D) and z = y · P: `projection_backward` gives the gradient of z, y if the
    projection's gradient needs it, statistics, and the gradient of the weights; `norms_backward` that of the hidden
    states (L, B, N, D), and float32 parts (L, parts, 4, D) of those of the shared weight and bias and each layer's.
    """
    *norms, projection, weights, shared_eps, norm_eps, needs = rest
    need_hidden, *need_norms, need_projection, need_weights = needs
    tokens = (hidden, patches, norms, shared_eps, norm_eps)
    z_grad, y, statistics, weights_grad = kernels.projection_backward(
        grad, *tokens, projection, weights, need_projection, need_weights
    )
    hidden_grad, norm_grads = None, [None] * 4
    if need_hidden or any(need_norms):
        y_grad = torch.bmm(z_grad, projection.transpose(1, 2))
        hidden_grad, parts = kernels.norms_backward(y_grad, *tokens, statistics, need_hidden, any(need_norms))
        if parts is not None:
            sums = parts.sum(1)
            norm_grads = [part.to(grad.dtype, copy=True) for part in (*sums[:, :2].sum(0), *sums[:, 2:].unbind(1))]
    projection_grad = torch.bmm(y.transpose(1, 2), z_grad) if need_projection else None
    return [hidden_grad, *norm_grads, projection_grad, weights_grad]


registration.define(
    "layer_gather(Tensor[] hidden, SymInt patches, Tensor shared_weight, Tensor shared_bias, Tensor norm_weight, "
    "Tensor norm_bias, Tensor projection, Tensor? weights, float shared_eps, float norm_eps) -> Tensor",
    "layer_gather",
    _fake,
    backward=_backward,
)
