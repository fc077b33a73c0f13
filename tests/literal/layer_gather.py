"""Layer gather of Cascade-CLIP (arXiv 2406.00670): several CLIP layers brought to the text space."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ._layers import layer_norm, unit

PROMPT_NORM_EPSILON = 1e-6


def layer_gather(
    weights: dict[str, Tensor], hidden: Sequence[Tensor], grid: tuple[int, int], prefix: str = ""
) -> tuple[list[Tensor], Tensor]:
    """Unit-length maps of every layer and the unit-length global embedding.

    hidden: states (B, N, D) of the tapped layers, the last block's at the end, with the patch tokens last; every
    token is normalised and projected. -> list of (B, E, H, W), and (B, E) from the class token of the last one.
    """
    H, W = grid
    features = []
    for i, x in enumerate(hidden):
        x = layer_norm(weights, prefix + "prompt_norm", x, PROMPT_NORM_EPSILON)
        if i < len(hidden) - 1:
            x = layer_norm(weights, f"{prefix}ln_layers.{i}", x) @ weights[prefix + "proj_layers"][i]
        else:
            x = layer_norm(weights, prefix + "ln_post", x) @ weights[prefix + "proj"]
        patches = unit(x[:, -H * W :], dim=-1)
        features.append(patches.permute(0, 2, 1).reshape(len(x), -1, H, W))
    return features, unit(x[:, 0], dim=-1)
