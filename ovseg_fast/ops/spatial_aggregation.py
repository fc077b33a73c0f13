"""Spatial aggregation: one guided shifted-window transformer block over each class's map.

    n = LN₁(x);   q = W_q [n ; g] + b_q,   k = W_k [n ; g] + b_k,   v = W_v n + b_v
    x ← x + W_o · window-attention(q, k, v) + b_o
    x ← x + W₂ · GELU(W₁ LN₂(x) + b₁) + b₂

Exact rewrite: W [n ; g] = Wₙ n + W_g g, and g is the same for all classes, so its share is computed once an image
and added.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from .common import legacy, registration
from .common.checks import check_heads, check_positive, check_tensors
from .common.residual_mlp import mlp_refusal, residual_mlp
from .common.tiles import map_tiles, tile_size

REGION_MASK = -100.0  # what the published code adds to scores between regions that only the shift made neighbours
WIDEST_WINDOW = 16  # that the kernels hold in one piece


def spatial_aggregation(
    x: Tensor,
    guidance: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    q_weight: Tensor,
    q_bias: Tensor,
    k_weight: Tensor,
    k_bias: Tensor,
    v_weight: Tensor,
    v_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    *,
    heads: int = 4,
    window: int = 12,
    shift: int = 0,
) -> Tensor:
    """One Swin block on every class's map, guided by appearance (CAT-Seg, section 3.3, equation 2).

    Args:
        x: (B, T, H, W, C) cost embedding.
        guidance: (B, H, W, G) appearance guidance, normalised already, shared by the T classes.
        norm1_weight, norm1_bias, norm2_weight, norm2_bias: (C,).
        q_weight, k_weight: (C, C + G), the first C columns read x and the last G the guidance; v_weight, proj_weight:
            (C, C); their biases (C,).
        fc1_weight: (M, C); fc1_bias: (M,); fc2_weight: (C, M); fc2_bias: (C,).
        heads: attention heads; divides C.
        window: side of a square window in tokens, at most min(H, W).
        shift: how far windows are displaced up and left, cyclically, in 0..window-1; 0 or half a window as published.

    Returns:
        (B, T, H, W, C). Where H or W is not a multiple of the window, the windows are those of the map padded to whole
        windows at the bottom and right: a window that reaches beyond the map holds fewer tokens, and what lies beyond
        takes no part. With a shift, it is the padded map that is displaced cyclically.

    Raises:
        TypeError, ValueError: a tensor, `heads`, `window` or `shift` does not fit.
    """
    check_tensors(
        "spatial_aggregation",
        x=(x, "B T H W C"),
        guidance=(guidance, "B H W G"),
        norm1_weight=(norm1_weight, "C"),
        norm1_bias=(norm1_bias, "C"),
        q_weight=(q_weight, "C C+G"),
        q_bias=(q_bias, "C"),
        k_weight=(k_weight, "C C+G"),
        k_bias=(k_bias, "C"),
        v_weight=(v_weight, "C C"),
        v_bias=(v_bias, "C"),
        proj_weight=(proj_weight, "C C"),
        proj_bias=(proj_bias, "C"),
        norm2_weight=(norm2_weight, "C"),
        norm2_bias=(norm2_bias, "C"),
        fc1_weight=(fc1_weight, "M C"),
        fc1_bias=(fc1_bias, "M"),
        fc2_weight=(fc2_weight, "C M"),
        fc2_bias=(fc2_bias, "C"),
    )
    batch, classes, height, width, channels = x.shape
    check_positive("spatial_aggregation", T=classes, H=height, W=width)
    check_heads("spatial_aggregation", heads, channels)
    if q_weight.shape[1] != channels + guidance.shape[-1]:
        raise ValueError(
            f"spatial_aggregation: q_weight must have C + G = {channels + guidance.shape[-1]} columns, "
            f"got {q_weight.shape[1]}."
        )
    if window < 1 or not 0 <= shift < window:
        raise ValueError(
            f"spatial_aggregation: window must be positive and shift in 0..window-1, "
            f"got window = {window}, shift = {shift}."
        )
    if window > min(height, width):
        raise ValueError(f"spatial_aggregation: window must be at most min(H, W) = {min(height, width)}, got {window}.")
    too_wide = f"window {window} is larger than {WIDEST_WINDOW}" if window > WIDEST_WINDOW else None
    refusals = {
        "triton": too_wide or mlp_refusal(x, fc1_weight),
        "cuda": _cuda_refusal(channels, heads, window, fc1_weight.shape[0]),
    }
    weights = (norm1_weight, norm1_bias, q_weight, k_weight, v_weight, v_bias, proj_weight, proj_bias)
    backend = backends.choose("spatial_aggregation", x, guidance, *weights, refusals=refusals)
    mlp = (norm2_weight, norm2_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    guidance = guidance.flatten(1, 2)
    q_term = F.linear(guidance, q_weight[:, channels:], q_bias)
    k_term = F.linear(guidance, k_weight[:, channels:], k_bias)
    if backend != "torch":
        qkv_weight = torch.cat([q_weight[:, :channels], k_weight[:, :channels], v_weight])
        tensors = (x, q_term, k_term, norm1_weight, norm1_bias, qkv_weight, v_bias, proj_weight, proj_bias)
        if backend == "cuda":
            cast = registration.autocast(*tensors, *mlp)
            keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in cast)
            return torch.ops.ovseg_fast.spatial_aggregation(*cast, heads, window, shift, keep, backend)[0]
        x = torch.ops.ovseg_fast.window_attention(*registration.autocast(*tensors), heads, window, shift, backend)
        return residual_mlp(x, *mlp, activation="gelu", backend=backend)

    # A tracer's stand-ins for tensors must neither meet cached tensors nor be cached themselves.
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

    q_guidance = to_windows(q_term, 1).unsqueeze(1)
    k_guidance = to_windows(k_term, 1).unsqueeze(1)

    def split(tokens: Tensor) -> Tensor:
        """(B, t, window², windows, C) -> (B·t, windows·heads, window², C / heads), without a copy."""
        return tokens.view(-1, window**2, windows * heads, channels // heads).transpose(1, 2)

    def block(tile: Tensor) -> Tensor:
        tokens = tile.flatten(2, 3)
        normed = F.layer_norm(to_windows(tokens, 2), (channels,), norm1_weight, norm1_bias)
        q = split(F.linear(normed, q_weight[:, :channels]) + q_guidance)
        k = split(F.linear(normed, k_weight[:, :channels]) + k_guidance)
        v = split(F.linear(normed, v_weight, v_bias))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        attended = attended.transpose(1, 2).reshape(normed.shape).index_select(2, inverse)
        tokens = tokens + F.linear(attended, proj_weight, proj_bias)
        return residual_mlp(tokens, *mlp, activation="gelu", backend="torch").view(tile.shape)

    return map_tiles(block, x, dim=1, size=tile_size(classes, batch * height * width, x.device))


def _cuda_refusal(channels: int, heads: int, window: int, hidden: int) -> str | None:
    """Why the CUDA C++ kernel does not take these sizes; None where it does."""
    if channels == 128 and heads == 4 and window <= 12 and hidden % 128 == 0:
        return None
    taken = "its kernel takes 128 channels in 4 heads, windows up to 12 and hidden units in multiples of 128"
    if torch.compiler.is_compiling():
        return taken  # sizes may be symbols, which no sentence can name
    return f"{taken}, not {channels} channels in {heads} heads, windows of {window} and {hidden} hidden units"


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # cached tensors must serve training too
def window_layout(
    height: int, width: int, window: int, shift: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Where each window's tokens lie on the map, and which of them may see each other.

    Returns:
        order: (window² · windows,) the flat map position of each token, window index fastest; slots beyond the map
            hold 0.
        inverse: (H · W,) the slot of each map position.
        mask: (windows, window², window²) to be added to the scores, or None where every token of a window sees every
            other.
    """
    rows, columns = -(-height // window), -(-width // window)
    # Slot (r, c, i, j) shows row (r·window + i + shift) of the map, cyclically in the size padded to whole windows.
    y = torch.arange(rows * window, device=device)
    x = torch.arange(columns * window, device=device)
    source_y, source_x = (y + shift) % (rows * window), (x + shift) % (columns * window)
    inside = (source_y < height)[:, None] & (source_x < width)[None, :]
    position = torch.where(inside, source_y[:, None] * width + source_x[None, :], -1)

    def by_window(grid: Tensor) -> Tensor:
        return grid.view(rows, window, columns, window).permute(1, 3, 0, 2).reshape(window**2, rows * columns)

    slots = by_window(position).flatten()
    order = slots.clamp(min=0)
    # Sorted by position, the slots that hold one come first, those beyond the map last.
    inverse = torch.where(slots < 0, height * width, slots).argsort()[: height * width]

    padded = (rows * window, columns * window) != (height, width)
    if not shift and not padded:
        return order, inverse, None
    # After the shift, the last window of an axis joins the map's end and its beginning; the published mask cuts them
    # apart.
    wrapped = (y >= rows * window - shift).long()[:, None] * 2 + (x >= columns * window - shift).long()[None, :]
    region = by_window(wrapped).t()
    mask = torch.where(region[:, :, None] == region[:, None, :], 0.0, REGION_MASK).to(dtype)
    if padded:
        outside = by_window((~inside).long()).t().bool()
        mask = mask.masked_fill(outside[:, None, :], float("-inf"))
    return order, inverse, mask


# --- kernels: x (B, T, H, W, C), terms (B, H · W, C), qkv_weight (3 C, C), proj_weight (C, C), the others (C,) ---

TENSORS = (
    "Tensor x, Tensor q_term, Tensor k_term, Tensor norm_weight, Tensor norm_bias, Tensor qkv_weight, Tensor v_bias, "
    "Tensor proj_weight, Tensor proj_bias, int heads, int window, int shift"
)


def _fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _backward_fake(grad: Tensor, *arguments: Any) -> list[Tensor]:
    *tensors, _, _, _, needs = arguments
    return [tensor.new_empty(tensor.shape if needed else 0) for tensor, needed in zip(tensors, needs, strict=True)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.heads, ctx.window, ctx.shift, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[: len(ctx.saved_tensors)])
    grads = torch.ops.ovseg_fast.window_attention_backward(
        grad, *ctx.saved_tensors, ctx.heads, ctx.window, ctx.shift, needs, ctx.backend
    )
    found = (gradient if needed else None for gradient, needed in zip(grads, needs, strict=True))
    return (*found, None, None, None, None)


legacy.define(
    f"window_attention({TENSORS}, str backend) -> Tensor",
    "spatial_aggregation",
    _fake,
    backward=_backward,
    setup_context=_setup_context,
)
legacy.define(
    f"window_attention_backward(Tensor grad, {TENSORS}, bool[] needs, str backend) -> Tensor[]",
    "spatial_aggregation",
    _backward_fake,
)


# --- the whole block in one kernel: what `window_attention` takes, then the MLP's six -> out, and what the attention
# half gives where `keep`, for the backward, which goes through both halves ---

MLP_TENSORS = (
    "Tensor norm2_weight, Tensor norm2_bias, Tensor fc1_weight, Tensor fc1_bias, Tensor fc2_weight, Tensor fc2_bias"
)


def _block_fake(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape if arguments[-1] else 0)


def _block_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.heads, ctx.window, ctx.shift, _, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])


def _block_backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, middle = ctx.saved_tensors
    attention, mlp = tensors[:9], tensors[9:]
    needs = ctx.needs_input_grad[:15]
    need_attention, need_mlp = list(needs[:9]), needs[9:]
    need_sums, need_weights = any(need_mlp[i] for i in (0, 1, 5)), any(need_mlp[2:5])
    middle_grad, *mlp_grads = torch.ops.ovseg_fast.residual_mlp_backward(
        grad, middle, *mlp[:5], "gelu", any(need_attention), need_sums, need_weights, ctx.backend
    )
    grads = [None] * 9
    if any(need_attention):
        grads = torch.ops.ovseg_fast.window_attention_backward(
            middle_grad, *attention, ctx.heads, ctx.window, ctx.shift, need_attention, ctx.backend
        )
    found = (gradient if needed else None for gradient, needed in zip((*grads, *mlp_grads), needs, strict=True))
    return (*found, *[None] * 5)


legacy.define(
    f"spatial_aggregation({TENSORS.partition(', int')[0]}, {MLP_TENSORS}, int heads, int window, int shift, bool keep, "
    "str backend) -> (Tensor, Tensor)",
    "spatial_aggregation",
    _block_fake,
    backward=_block_backward,
    setup_context=_block_setup_context,
)
