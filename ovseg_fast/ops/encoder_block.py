"""Encoder block: one block of CLIP's vision transformer.

    n = LN₁(x);   q = W_q n + b_q,   k = W_k n + b_k,   v = W_v n + b_v
    y = x + W_o · softmax(q kᵀ / √d) v + b_o                 within each head
    out = y + W₂ · act(W₁ LN₂(y) + b₁) + b₂

or, dense, as CAT-Seg's last block: y = x[:, 0] + W_o v + b_o, each token attending to itself alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from .common import registration
from .common.attention import check_attention, plain_attention
from .common.checks import check_heads, check_positive, check_tensors

ACTIVATIONS = ("quick_gelu", "gelu")


class EncoderBlockWeights(NamedTuple):
    """Weights of one block, of D channels and M hidden units."""

    norm1_weight: Tensor  # (D,)
    norm1_bias: Tensor
    q_weight: Tensor  # (D, D)
    k_weight: Tensor
    v_weight: Tensor
    qkv_bias: Tensor  # (3 D,)
    proj_weight: Tensor  # (D, D)
    proj_bias: Tensor
    norm2_weight: Tensor  # (D,)
    norm2_bias: Tensor
    fc1_weight: Tensor  # (M, D)
    fc1_bias: Tensor
    fc2_weight: Tensor  # (D, M)
    fc2_bias: Tensor


SHAPES = {
    **dict.fromkeys(("norm1_weight", "norm1_bias", "norm2_weight", "norm2_bias", "proj_bias", "fc2_bias"), "D"),
    **dict.fromkeys(("q_weight", "k_weight", "v_weight", "proj_weight"), "D D"),
    "qkv_bias": "3D",
    "fc1_weight": "M D",
    "fc1_bias": "M",
    "fc2_weight": "D M",
}


def encoder_block(
    x: Tensor,
    weights: EncoderBlockWeights,
    *,
    heads: int,
    activation: str = "quick_gelu",
    causal: bool = False,
    dense: bool = False,
    eps: tuple[float, float] = (1e-5, 1e-5),
    attention: str = "sdpa",
) -> Tensor:
    """One pre-norm transformer block of CLIP (Radford et al., 2021); `dense`: CAT-Seg's last one, section 3.1.

    Args:
        x: (B, N, D) tokens, the class token first.
        heads: attention heads; divides D.
        activation: of the MLP, `"quick_gelu"` (x · sigmoid(1.702 x)) or `"gelu"` (exact).
        causal: token n attends to the tokens 0..n only.
        dense: no attention: the residual of every token is the class token, to which its own value is added.
        eps: of both layer norms.
        attention: what the PyTorch form attends with, `"sdpa"` (PyTorch's own) or `"xformers"`.

    Returns:
        (B, N, D).

    Raises:
        TypeError, ValueError: an argument does not fit. ImportError, RuntimeError: as `plain_attention`.
    """
    if not isinstance(weights, EncoderBlockWeights):
        raise TypeError(f"encoder_block: weights must be EncoderBlockWeights, got {type(weights).__name__}.")
    named = {name: (tensor, SHAPES[name]) for name, tensor in zip(weights._fields, weights, strict=True)}
    check_tensors("encoder_block", x=(x, "B N D"), **named)
    channels, hidden = x.shape[2], weights.fc1_weight.shape[0]
    check_positive("encoder_block", N=x.shape[1])
    check_heads("encoder_block", heads, channels)
    if weights.qkv_bias.shape[0] != 3 * channels:
        raise ValueError(f"encoder_block: qkv_bias must have 3 D = {3 * channels}, got {weights.qkv_bias.shape[0]}.")
    if activation not in ACTIVATIONS:
        raise ValueError(f"encoder_block: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}.")
    check_attention(attention)
    autocast = torch.is_autocast_enabled(x.device.type)
    refusals = {"cpu": _cpu_refusal(channels, heads, hidden, causal, attention, autocast)}
    backend = backends.choose("encoder_block", x, *weights, refusals=refusals)
    if backend == "torch":
        return torch_form(x, weights, heads, activation, causal, dense, eps, attention)
    return torch.ops.ovseg_fast.encoder_block(x, *weights, heads, activation == "quick_gelu", dense, *eps, backend)


def torch_form(
    x: Tensor, weights: EncoderBlockWeights, heads: int, activation: str, causal: bool, dense: bool,
    eps: tuple[float, float], attention: str,
) -> Tensor:  # fmt: skip
    """As `encoder_block`."""
    width = (x.shape[-1],)
    normed = F.layer_norm(x, width, weights.norm1_weight, weights.norm1_bias, eps[0])
    q_bias, k_bias, v_bias = weights.qkv_bias.chunk(3)
    attended = F.linear(normed, weights.v_weight, v_bias)
    if not dense:
        parts = F.linear(normed, weights.q_weight, q_bias), F.linear(normed, weights.k_weight, k_bias), attended
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in parts)
        attended = plain_attention(q, k, v, causal=causal, attention=attention).transpose(1, 2).flatten(-2)
    y = (x[:, :1] if dense else x) + F.linear(attended, weights.proj_weight, weights.proj_bias)
    normed = F.layer_norm(y, width, weights.norm2_weight, weights.norm2_bias, eps[1])
    units = F.linear(normed, weights.fc1_weight, weights.fc1_bias)
    units = units * torch.sigmoid(1.702 * units) if activation == "quick_gelu" else F.gelu(units)
    return y + F.linear(units, weights.fc2_weight, weights.fc2_bias)


def _cpu_refusal(channels: int, heads: int, hidden: int, causal: bool, attention: str, autocast: bool) -> str | None:
    """Why the CPU kernel does not take such a call; None if it does."""
    if autocast:
        return "under autocast the sums of residuals stay in float32, which its CPU kernel cannot do"
    if causal:
        return "its CPU kernel has no causal attention"
    if attention != "sdpa":
        return f"attention={attention!r} was asked for"
    if channels % 16 == 0 and channels // heads % 2 == 0 and hidden % 16 == 0:
        return None
    taken = "its CPU kernel takes channels and hidden units in multiples of 16 and heads of even width"
    if torch.compiler.is_compiling():
        return taken  # sizes may be symbols
    return f"{taken}, not {channels} channels in {heads} heads and {hidden} hidden units"


registration.define(
    "encoder_block(Tensor x, Tensor norm1_weight, Tensor norm1_bias, Tensor q_weight, Tensor k_weight, "
    "Tensor v_weight, Tensor qkv_bias, Tensor proj_weight, Tensor proj_bias, Tensor norm2_weight, Tensor norm2_bias, "
    "Tensor fc1_weight, Tensor fc1_bias, Tensor fc2_weight, Tensor fc2_bias, SymInt heads, bool quick, bool dense, "
    "float norm1_eps, float norm2_eps) -> Tensor",
    "encoder_block",
    lambda x, *_: x.new_empty(x.shape),
    differentiable=False,
)
