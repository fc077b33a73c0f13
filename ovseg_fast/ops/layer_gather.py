"""Layer gather: the patch tokens of several encoder blocks, brought into the image-text embedding space.

    f_l = unit( LN_l( LN_shared( h_l[patches] ) ) · P_l )

Exact rewrite: only the S patch tokens are normalised and projected, not the class token and the prompts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import check_tensors


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
    if not isinstance(hidden, Sequence):
        raise TypeError(f"layer_gather: hidden must be a list of tensors (B, N, D), got {type(hidden).__name__}.")
    if not hidden:
        raise ValueError("layer_gather: hidden must hold at least one tensor (B, N, D), got none.")
    check_tensors(
        "layer_gather",
        **{f"hidden[{i}]": (h, "B N D") for i, h in enumerate(hidden)},
        shared_weight=(shared_weight, "D"),
        shared_bias=(shared_bias, "D"),
        norm_weight=(norm_weight, "L D"),
        norm_bias=(norm_bias, "L D"),
        projection=(projection, "L D E"),
    )
    if norm_weight.shape[0] != len(hidden):
        raise ValueError(
            f"layer_gather: norm_weight must have one row a block, {len(hidden)}, got {norm_weight.shape[0]}."
        )
    if not 1 <= patches <= hidden[0].shape[1]:
        raise ValueError(f"layer_gather: patches must be in 1..N = {hidden[0].shape[1]}, got {patches}.")

    width = (hidden[0].shape[-1],)
    features = []
    for tokens, weight, bias, proj in zip(hidden, norm_weight, norm_bias, projection, strict=True):
        normed = F.layer_norm(tokens[:, -patches:], width, shared_weight, shared_bias, shared_eps)
        normed = F.layer_norm(normed, width, weight, bias, norm_eps)
        features.append(F.normalize(normed @ proj, dim=-1))
    return torch.stack(features)
