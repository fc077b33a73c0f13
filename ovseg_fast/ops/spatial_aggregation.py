"""Spatial aggregation: one guided shifted-window transformer block over each class's map.

    n = LN₁(x);   q = W_q [n ; g] + b_q,   k = W_k [n ; g] + b_k,   v = W_v n + b_v
    x ← x + W_o · window-attention(q, k, v) + b_o
    x ← x + W₂ · GELU(W₁ LN₂(x) + b₁) + b₂

Exact rewrite: W [n ; g] = Wₙ n + W_g g, and g is the same for all classes, so its term is computed once an image.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from .common import registration
from .common.aggregation import Prepare, check_block, cpu_refusal, joint_weight, mlp_weights, need_gradient, prepare_now
from .common.residual_mlp import mlp_backward, mlp_refusal, residual_mlp
from .common.tiles import map_tiles, tile_size

REGION_MASK = -100.0  # added, as published, to scores between regions that only the shift made neighbours
WIDEST_WINDOW = 16  # of the Triton and the CPU kernels
SHARED_MEMORY = {torch.float32: 163}  # KB that a block of the CUDA C++ kernel needs and not every GPU has


class SpatialAggregationWeights(NamedTuple):
    """Weights of one block, of C channels, G guidance channels and M hidden units."""

    norm1_weight: Tensor  # (C,)
    norm1_bias: Tensor
    q_weight: Tensor  # (C, C + G): the first C columns read x, the last G the guidance
    q_bias: Tensor
    k_weight: Tensor  # (C, C + G)
    k_bias: Tensor
    v_weight: Tensor  # (C, C)
    v_bias: Tensor
    proj_weight: Tensor  # (C, C)
    proj_bias: Tensor
    norm2_weight: Tensor  # (C,)
    norm2_bias: Tensor
    fc1_weight: Tensor  # (M, C)
    fc1_bias: Tensor
    fc2_weight: Tensor  # (C, M)
    fc2_bias: Tensor


def spatial_aggregation(
    x: Tensor,
    guidance: Tensor,
    weights: SpatialAggregationWeights,
    *,
    heads: int,
    window: int,
    shift: int,
    prepare: Prepare = prepare_now,
) -> Tensor:
    """One Swin block on every class's map, guided by appearance (CAT-Seg, section 3.3, equation 2).

    Args:
        x: (B, T, H, W, C) cost embedding.
        guidance: (B, H, W, G) appearance guidance, normalised already, shared by the T classes.
        heads: attention heads; divides C.
        window: side of a square window in tokens, at most min(H, W).
        shift: cyclic displacement of the windows, up and left, in 0..window-1; 0 or half a window as published.
        prepare: `prepare(function, *tensors)` gives `function(*tensors)` of weights alone.

    Returns:
        (B, T, H, W, C). If H or W is not a multiple of the window, the map is padded to whole windows at the bottom
        and right, and displaced cyclically at that size. Padding takes no part in the attention.

    Raises:
        TypeError, ValueError: a tensor, `heads`, `window` or `shift` does not fit.
    """
    check_block("spatial_aggregation", SpatialAggregationWeights, x, guidance, "B H W G", weights, heads)
    height, width, channels = x.shape[2:]
    if window < 1 or not 0 <= shift < window:
        limits = "window must be positive and shift in 0..window-1"
        raise ValueError(f"spatial_aggregation: {limits}, got window = {window}, shift = {shift}.")
    if window > min(height, width):
        raise ValueError(f"spatial_aggregation: window must be at most min(H, W) = {min(height, width)}, got {window}.")
    too_wide = f"window {window} is larger than {WIDEST_WINDOW}" if window > WIDEST_WINDOW else None
    refusals = {
        "triton": too_wide or mlp_refusal(x, weights.fc1_weight),
        "cuda": _cuda_refusal(channels, heads, window, weights.fc1_weight.shape[0]),
        "cpu": cpu_refusal(channels, heads, weights.fc1_weight.shape[0]) or too_wide,
    }
    inputs = (x, guidance, *weights)
    backend = backends.choose("spatial_aggregation", *inputs, refusals=refusals, shared_memory=SHARED_MEMORY)
    guidance = guidance.flatten(1, 2)
    q_term = F.linear(guidance, weights.q_weight[:, channels:], weights.q_bias)
    k_term = F.linear(guidance, weights.k_weight[:, channels:], weights.k_bias)
    if backend == "torch":
        return torch_form(x, q_term, k_term, weights, heads, window, shift)
    qkv_weight = prepare(joint_weight, weights.q_weight, weights.k_weight, weights.v_weight)
    norm1, proj = (weights.norm1_weight, weights.norm1_bias), (weights.proj_weight, weights.proj_bias)
    tensors = registration.autocast(x, q_term, k_term, *norm1, qkv_weight, weights.v_bias, *proj, *mlp_weights(weights))
    return torch.ops.ovseg_fast.spatial_aggregation(*tensors, heads, window, shift, need_gradient(*tensors), backend)[0]


def torch_form(
    x: Tensor, q_term: Tensor, k_term: Tensor, weights: SpatialAggregationWeights, heads: int, window: int, shift: int
) -> Tensor:
    """The block with what guidance adds to queries and keys, (B, H · W, C) each."""
    batch, classes, height, width, channels = x.shape
    # A tracer's tensors must neither meet cached ones nor be cached.
    plain = type(x) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()
    layout = window_layout if plain else window_layout.__wrapped__
    order, inverse, mask = layout(height, width, window, shift, x.device, x.dtype)
    windows = order.numel() // window**2
    if mask is not None:
        mask = mask.repeat_interleave(heads, 0).unsqueeze(0)

    # The mask gives slots beyond the map weight 0, and 0 · NaN would be NaN: they must not hold a token of the map.
    beyond = None
    if order.numel() > height * width:
        beyond = torch.ones(order.numel(), 1, dtype=torch.bool, device=x.device).index_fill(0, inverse, False)

    def to_windows(tokens: Tensor, dim: int) -> Tensor:
        slots = tokens.index_select(dim, order)
        return slots if beyond is None else slots.masked_fill(beyond, 0)

    q_guidance, k_guidance = (to_windows(term, 1).unsqueeze(1) for term in (q_term, k_term))

    def split(tokens: Tensor) -> Tensor:
        """(B, t, window², windows, C) -> (B·t, windows·heads, window², C / heads), without a copy."""
        return tokens.view(-1, window**2, windows * heads, channels // heads).transpose(1, 2)

    def block(tile: Tensor) -> Tensor:
        tokens = tile.flatten(2, 3)
        normed = F.layer_norm(to_windows(tokens, 2), (channels,), weights.norm1_weight, weights.norm1_bias)
        q = split(F.linear(normed, weights.q_weight[:, :channels]) + q_guidance)
        k = split(F.linear(normed, weights.k_weight[:, :channels]) + k_guidance)
        v = split(F.linear(normed, weights.v_weight, weights.v_bias))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        attended = attended.transpose(1, 2).reshape(normed.shape).index_select(2, inverse)
        tokens = tokens + F.linear(attended, weights.proj_weight, weights.proj_bias)
        return residual_mlp(tokens, *mlp_weights(weights), activation="gelu").view(tile.shape)

    return map_tiles(block, x, 1, tile_size(classes, batch * height * width, x.device), q_term, k_term, *weights)


def _cuda_refusal(channels: int, heads: int, window: int, hidden: int) -> str | None:
    """Why the CUDA C++ kernels do not take these sizes; None if they do."""
    if channels == 128 and heads == 4 and window <= 12 and hidden % 128 == 0:
        return None
    taken = "its kernel takes 128 channels in 4 heads, windows up to 12 and hidden units in multiples of 128"
    if torch.compiler.is_compiling():
        return taken  # sizes may be symbols
    return f"{taken}, not {channels} channels in {heads} heads, windows of {window} and {hidden} hidden units"


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # cached tensors must serve training too
def window_layout(
    height: int, width: int, window: int, shift: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Where each window's tokens lie: `order`, (window² · windows,), the flat map position of each slot, window index
    fastest, 0 beyond the map; `inverse`, (H · W,), the slot of each position; and `mask`, (windows, window², window²),
    added to the scores, or None if all tokens of a window see each other."""
    rows, columns = -(-height // window), -(-width // window)
    # Slot (r, c, i, j) is row (r·window + i + shift) of the map padded to whole windows, cyclically.
    y = torch.arange(rows * window, device=device)
    x = torch.arange(columns * window, device=device)
    source_y, source_x = (y + shift) % (rows * window), (x + shift) % (columns * window)
    inside = (source_y < height)[:, None] & (source_x < width)[None, :]
    position = torch.where(inside, source_y[:, None] * width + source_x[None, :], -1)

    def by_window(grid: Tensor) -> Tensor:
        return grid.view(rows, window, columns, window).permute(1, 3, 0, 2).reshape(window**2, rows * columns)

    slots = by_window(position).flatten()
    order = slots.clamp(min=0)
    # Sorted by position, slots beyond the map come last.
    inverse = torch.where(slots < 0, height * width, slots).argsort()[: height * width]

    padded = (rows * window, columns * window) != (height, width)
    if not shift and not padded:
        return order, inverse, None
    # After the shift, the last window of an axis joins the map's end and its beginning, which the mask separates.
    wrapped = (y >= rows * window - shift).long()[:, None] * 2 + (x >= columns * window - shift).long()[None, :]
    region = by_window(wrapped).t()
    mask = torch.where(region[:, :, None] == region[:, None, :], 0.0, REGION_MASK).to(dtype)
    if padded:
        outside = by_window((~inside).long()).t().bool()
        mask = mask.masked_fill(outside[:, None, :], float("-inf"))
    return order, inverse, mask


# --- kernels ---


def _fake(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape if arguments[-1] else 0)


def _backward(kernels: Any, grad: Tensor, middle: Tensor, *arguments: Any) -> list[Any]:
    *tensors, heads, window, shift, _, needs = arguments
    attention, mlp = tensors[:9], tensors[9:]
    need_middle = any(needs[:9])
    middle_grad, *mlp_grads = mlp_backward(kernels, grad, middle, mlp, "gelu", need_middle, needs[9:])
    grads: list[Any] = [None] * 9
    if not need_middle:
        return [*grads, *mlp_grads]

    # A backend's kernels go through attention and norm, PyTorch takes products with weights and sums.
    x, _, _, norm_weight, norm_bias, qkv_weight, _, proj_weight, _ = attention
    need_x, need_q, need_k, need_gain, need_offset, need_qkv, need_v_bias, need_proj, need_proj_bias = needs[:9]
    rows = middle_grad.view(-1, x.shape[-1])
    grads[8] = rows.sum(0) if need_proj_bias else None
    if not any(needs[:8]):
        return [*grads, *mlp_grads]
    tokens_grad, attended, statistics = kernels.window_attention_backward(
        rows @ proj_weight, *attention[:7], heads, window, shift, need_proj
    )
    q, k, v = tokens_grad.view(*x.shape[:2], x.shape[2] * x.shape[3], 3, x.shape[-1]).unbind(3)
    grads[1] = q.sum(1) if need_q else None
    grads[2] = k.sum(1) if need_k else None
    grads[6] = v.sum((0, 1, 2)) if need_v_bias else None
    grads[7] = rows.t() @ attended if need_proj else None
    need_norm = [need_x, need_gain, need_offset]
    if any(need_norm) or need_qkv:
        normed_grad = tokens_grad @ qkv_weight if any(need_norm) else x.new_empty(0)
        grads[0], grads[3], grads[4], normed = kernels.norm_backward(
            normed_grad, middle_grad, x, norm_weight, norm_bias, statistics, need_norm, need_qkv
        )
        grads[5] = tokens_grad.t() @ normed if need_qkv else None
    return [*grads, *mlp_grads]


# Terms are (B, H · W, C), qkv_weight (3C, C). The second output is what the attention half gives, which the backward
# reads; empty unless `keep`.
registration.define(
    "spatial_aggregation(Tensor x, Tensor q_term, Tensor k_term, Tensor norm1_weight, Tensor norm1_bias, "
    "Tensor qkv_weight, Tensor v_bias, Tensor proj_weight, Tensor proj_bias, Tensor norm2_weight, Tensor norm2_bias, "
    "Tensor fc1_weight, Tensor fc1_bias, Tensor fc2_weight, Tensor fc2_bias, int heads, int window, int shift, "
    "bool keep) -> (Tensor, Tensor)",
    "spatial_aggregation",
    _fake,
    backward=_backward,
    saved=(1,),
)
