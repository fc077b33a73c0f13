"""One residual attention block of CLIP (arXiv 2103.00020): pre-norm attention and a QuickGELU MLP."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._layers import layer_norm, linear, merge_heads, split_heads

HEAD_WIDTH = 64


def project_qkv(weights: dict[str, Tensor], prefix: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of x (N, L, D), from a joint `in_proj_weight` or from three split matrices."""
    bias = weights[prefix + "in_proj_bias"]
    if prefix + "in_proj_weight" in weights:
        q, k, v = F.linear(x, weights[prefix + "in_proj_weight"], bias).chunk(3, dim=-1)
        return q, k, v
    biases = bias.chunk(3)
    q, k, v = (F.linear(x, weights[f"{prefix}{n}_proj_weight"], b) for n, b in zip("qkv", biases, strict=True))
    return q, k, v


def clip_mlp(
    weights: dict[str, Tensor], prefix: str, x: Tensor, activation: str = "quick_gelu", eps: float = 1e-5
) -> Tensor:
    """x + MLP(ln_2(x)) with QuickGELU, x·sigmoid(1.702 x), or, as later CLIP models, GELU."""
    hidden = linear(weights, prefix + "mlp.c_fc", layer_norm(weights, prefix + "ln_2", x, eps))
    hidden = F.gelu(hidden) if activation == "gelu" else hidden * torch.sigmoid(1.702 * hidden)
    return x + linear(weights, prefix + "mlp.c_proj", hidden)


def clip_block(
    weights: dict[str, Tensor],
    prefix: str,
    x: Tensor,
    mask: Tensor | None = None,
    head_width: int | None = None,
    activation: str = "quick_gelu",
    eps: tuple[float, float] = (1e-5, 1e-5),
) -> Tensor:
    """x (N, L, D), mask (L, L) added to the scores; `prefix` ends in `resblocks.<i>.` -> (N, L, D)."""
    heads = x.shape[-1] // (head_width or HEAD_WIDTH)
    normed = layer_norm(weights, prefix + "ln_1", x, eps[0])
    q, k, v = (split_heads(y, heads) for y in project_qkv(weights, prefix + "attn.", normed))
    out = merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
    return clip_mlp(weights, prefix, x + linear(weights, prefix + "attn.out_proj", out), activation, eps[1])


def clip_value_block(weights: dict[str, Tensor], prefix: str, x: Tensor) -> Tensor:
    """The last image block as CAT-Seg runs it for dense features: no attention, values only.

    The residual is the class token of the block's input, for every token. x (N, 1+S, D) -> (N, 1+S, D).
    """
    _, _, v = project_qkv(weights, prefix + "attn.", layer_norm(weights, prefix + "ln_1", x))
    return clip_mlp(weights, prefix, x[:, :1] + linear(weights, prefix + "attn.out_proj", v))
