"""Layer gather: the patch tokens of several encoder blocks, brought into the image-text embedding space.

    f_l = unit( LN_l( LN_shared( h_l[patches] ) ) · P_l )

Exact rewrite: only the S patch tokens are normalised and projected, not the class token and the prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from .common import legacy, registration
from .common.checks import check_tensors

WIDEST = 1024  # columns of a projection whose rows' lengths one program of the kernels can take
MOST_LAYERS = 32  # that one call of the CUDA C++ kernels takes


def layer_gather(
    hidden: Sequence[Tensor],
    patches: int,
    shared_weight: Tensor,
    shared_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    projection: Tensor,
    *,
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

    Returns:
        (L, B, S, E), unit length over E.

    Raises:
        TypeError, ValueError: a tensor does not fit, there is no block, or `patches` is not in 1..N.
    """
    parameters = (shared_weight, shared_bias, norm_weight, norm_bias, projection)
    check_gather_inputs("layer_gather", hidden, patches, *parameters)
    backend = backends.choose("layer_gather", *hidden, *parameters, refusals=gather_refusals(projection))
    if backend == "torch":
        return gather_layers(hidden, patches, *parameters, shared_eps, norm_eps)
    cast = registration.autocast(*hidden, *parameters)
    layers = len(hidden)
    return torch.ops.ovseg_fast.layer_gather(
        list(cast[:layers]), patches, *cast[layers:], shared_eps, norm_eps, backend
    )


def check_gather_inputs(
    operator: str,
    hidden: Sequence[Tensor],
    patches: int,
    shared_weight: Tensor,
    shared_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    projection: Tensor,
    **others: tuple[Tensor, str],
) -> None:
    """Check what `layer_gather` takes, and `others` with it."""
    if not isinstance(hidden, Sequence):
        raise TypeError(f"{operator}: hidden must be a list of tensors (B, N, D), got {type(hidden).__name__}.")
    if not hidden:
        raise ValueError(f"{operator}: hidden must hold at least one tensor (B, N, D), got none.")
    check_tensors(
        operator,
        **{f"hidden[{i}]": (h, "B N D") for i, h in enumerate(hidden)},
        shared_weight=(shared_weight, "D"),
        shared_bias=(shared_bias, "D"),
        norm_weight=(norm_weight, "L D"),
        norm_bias=(norm_bias, "L D"),
        projection=(projection, "L D E"),
        **others,
    )
    if norm_weight.shape[0] != len(hidden):
        raise ValueError(
            f"{operator}: norm_weight must have one row a block, {len(hidden)}, got {norm_weight.shape[0]}."
        )
    if not 1 <= patches <= hidden[0].shape[1]:
        raise ValueError(f"{operator}: patches must be in 1..N = {hidden[0].shape[1]}, got {patches}.")


def gather_refusals(projection: Tensor) -> dict[str, str | None]:
    """Reasons, by backend, why kernels cannot gather with this projection."""
    layers, _, width = projection.shape
    wide = f"E = {width} is larger than {WIDEST}" if width > WIDEST else None
    many = f"its CUDA C++ kernels take up to {MOST_LAYERS} layers, got {layers}" if layers > MOST_LAYERS else None
    return {"triton": wide, "cuda": wide or many}


def gather_layers(
    hidden: Sequence[Tensor],
    patches: int,
    shared_weight: Tensor,
    shared_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    projection: Tensor,
    shared_eps: float,
    norm_eps: float,
) -> Tensor:
    """The PyTorch form of `layer_gather`."""
    width = (hidden[0].shape[-1],)
    features = []
    for tokens, weight, bias, proj in zip(hidden, norm_weight, norm_bias, projection, strict=True):
        normed = F.layer_norm(tokens[:, -patches:], width, shared_weight, shared_bias, shared_eps)
        normed = F.layer_norm(normed, width, weight, bias, norm_eps)
        features.append(F.normalize(normed @ proj, dim=-1))
    return torch.stack(features)


# --- kernels: the arguments of `layer_gather`; the backward gives the L hidden states' gradients as (L, B, N, D) ---

PARAMETERS = (
    "Tensor[] hidden, SymInt patches, Tensor shared_weight, Tensor shared_bias, Tensor norm_weight, Tensor norm_bias, "
    "Tensor projection"
)
EPSILONS = "float shared_eps, float norm_eps"


def _fake(hidden: Sequence[Tensor], patches: int, *rest: Any) -> Tensor:
    projection = rest[4]
    return hidden[0].new_empty(len(hidden), hidden[0].shape[0], patches, projection.shape[-1])


def gather_backward_fake(
    hidden: Sequence[Tensor],
    parameters: Sequence[Tensor],
    need_hidden: bool,
    need_norms: bool,
    need_projection: bool,
) -> tuple[Tensor, ...]:
    """Empty gradients of the hidden states, stacked, and of the five parameters, the projection last."""
    like = hidden[0]
    *norms, projection = parameters
    return (
        like.new_empty((len(hidden), *like.shape) if need_hidden else 0),
        *(like.new_empty(tensor.shape if need_norms else 0) for tensor in norms),
        like.new_empty(projection.shape if need_projection else 0),
    )


def _backward_fake(grad: Tensor, hidden: Sequence[Tensor], patches: int, *rest: Any) -> tuple[Tensor, ...]:
    *parameters, _, _, need_hidden, need_norms, need_projection = rest
    return gather_backward_fake(hidden, parameters, need_hidden, need_norms, need_projection)


def setup_gather_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep the inputs of a forward: a list, a number, tensors, two epsilons and the backend."""
    hidden, ctx.patches, *parameters, ctx.shared_eps, ctx.norm_eps, ctx.backend = inputs
    ctx.layers = len(hidden)
    ctx.save_for_backward(*hidden, *parameters)


def gather_gradients(ctx: Any, gradients: Sequence[Tensor]) -> tuple[Any, ...]:
    """What autograd takes: None where no gradient is needed, and the hidden states' gradients one by one."""
    stacked, *others = gradients
    need_hidden, _, *needs = ctx.needs_input_grad
    hidden = [grad if needed else None for grad, needed in zip(stacked, need_hidden, strict=False)]
    hidden = hidden or [None] * ctx.layers
    return hidden, None, *(grad if needed else None for grad, needed in zip(others, needs, strict=False)), None, None


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    hidden, parameters = ctx.saved_tensors[: ctx.layers], ctx.saved_tensors[ctx.layers :]
    need_hidden, _, *needs = ctx.needs_input_grad
    gradients = torch.ops.ovseg_fast.layer_gather_backward(
        grad,
        list(hidden),
        ctx.patches,
        *parameters,
        ctx.shared_eps,
        ctx.norm_eps,
        any(need_hidden),
        any(needs[:4]),
        needs[4],
        ctx.backend,
    )
    return *gather_gradients(ctx, gradients), None


legacy.define(
    f"layer_gather({PARAMETERS}, {EPSILONS}, str backend) -> Tensor",
    "layer_gather",
    _fake,
    backward=_backward,
    setup_context=setup_gather_context,
)
legacy.define(
    f"layer_gather_backward(Tensor grad, {PARAMETERS}, {EPSILONS}, bool need_hidden, bool need_norms, "
    "bool need_projection, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "layer_gather",
    _backward_fake,
)
