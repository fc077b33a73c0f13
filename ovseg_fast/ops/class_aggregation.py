"""Class aggregation: at every position, a transformer layer with linear, or full, attention over all classes.

    y = average-pool(x)
    n = LN₁(y);   q = φ(W_q [n ; g] + b_q),   k = φ(W_k [n ; g] + b_k),   v = W_v n + b_v,   φ = elu + 1
    y ← y + (q · Σ_t k_t ⊗ v_t) / (q · Σ_t k_t + 1e-6),   or with full attention, where φ(x) = x,
    y ← y + Σ_t softmax_t(q · k_t / √d) v_t
    y ← y + W₂ · ReLU(W₁ LN₂(y) + b₁) + b₂
    out = x + upsample(y)

Exact rewrites: W [n ; g] = Wₙ n + W_g g, with the share of the text guidance computed once for all positions; and the
classes that pad a short list are all alike, so they enter both sums as a constant times their number instead of as
tokens, and the softmax as one key with the logarithm of their number added to its score.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from .common import legacy, registration
from .common.checks import check_heads, check_positive, check_tensors
from .common.residual_mlp import mlp_refusal, residual_mlp
from .common.tiles import map_tiles, tile_size

NORMALISER_EPS = 1e-6
KERNEL_HEAD_CHANNELS = 128  # the widest heads that the Triton kernels take


def class_aggregation(
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
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    padding_token: Tensor,
    padding_guidance: Tensor,
    *,
    heads: int = 4,
    pooling: int = 1,
    pad_length: int = 256,
    attention: str = "linear",
) -> Tensor:
    """One transformer layer over the classes, guided by text (CAT-Seg, section 3.3, equation 3).

    Args:
        x: (B, T, H, W, C) cost embedding.
        guidance: (T, G) text guidance that all images share, or (B, T, G).
        norm1_weight, norm1_bias, norm2_weight, norm2_bias: (C,).
        q_weight, k_weight: (C, C + G), the first C columns read x and the last G the guidance; v_weight: (C, C);
            biases (C,).
        fc1_weight: (M, C); fc1_bias: (M,); fc2_weight: (C, M); fc2_bias: (C,).
        padding_token: (C,), padding_guidance: (G,): the class that fills a list shorter than `pad_length`. As
            published it takes part as a key and value like any other class, so results for T < `pad_length` depend on
            it.
        heads: attention heads; divides C.
        pooling: side of the average pooling before the layer; its result is resized back bilinearly (corners aligned).
        pad_length: list length up to which classes are padded; 0 pads nothing.
        attention: `"linear"` (as in the released models), or `"full"` for a softmax over the classes.

    Returns:
        (B, T, H, W, C): x plus the layer's output, which holds its own residual (as published).

    Raises:
        TypeError, ValueError: a tensor, `heads`, `pooling`, `pad_length` or `attention` does not fit.
    """
    shared = isinstance(guidance, Tensor) and guidance.dim() == 2
    check_tensors(
        "class_aggregation",
        x=(x, "B T H W C"),
        guidance=(guidance, "T G" if shared else "B T G"),
        norm1_weight=(norm1_weight, "C"),
        norm1_bias=(norm1_bias, "C"),
        q_weight=(q_weight, "C C+G"),
        q_bias=(q_bias, "C"),
        k_weight=(k_weight, "C C+G"),
        k_bias=(k_bias, "C"),
        v_weight=(v_weight, "C C"),
        v_bias=(v_bias, "C"),
        norm2_weight=(norm2_weight, "C"),
        norm2_bias=(norm2_bias, "C"),
        fc1_weight=(fc1_weight, "M C"),
        fc1_bias=(fc1_bias, "M"),
        fc2_weight=(fc2_weight, "C M"),
        fc2_bias=(fc2_bias, "C"),
        padding_token=(padding_token, "C"),
        padding_guidance=(padding_guidance, "G"),
    )
    _, classes, height, width, channels = x.shape
    check_positive("class_aggregation", T=classes, H=height, W=width)
    check_heads("class_aggregation", heads, channels)
    if q_weight.shape[1] != channels + guidance.shape[-1]:
        raise ValueError(
            f"class_aggregation: q_weight must have C + G = {channels + guidance.shape[-1]} columns, "
            f"got {q_weight.shape[1]}."
        )
    if not 1 <= pooling <= min(height, width):
        raise ValueError(f"class_aggregation: pooling must be in 1..min(H, W) = {min(height, width)}, got {pooling}.")

    if pad_length < 0:
        raise ValueError(f"class_aggregation: pad_length must be at least 0, got {pad_length}.")
    if attention not in ("linear", "full"):
        raise ValueError(f"class_aggregation: attention must be 'linear' or 'full', got {attention!r}.")

    tensors = (
        x,
        guidance.unsqueeze(0) if shared else guidance,
        norm1_weight,
        norm1_bias,
        q_weight,
        q_bias,
        k_weight,
        k_bias,
        v_weight,
        v_bias,
        norm2_weight,
        norm2_bias,
        fc1_weight,
        fc1_bias,
        fc2_weight,
        fc2_bias,
        padding_token,
        padding_guidance,
    )
    refusals = {
        "triton": _refusal(channels // heads) or mlp_refusal(x, fc1_weight),
        "cuda": _cuda_refusal(height, width, channels, heads, fc1_weight.shape[0], attention),
    }
    backend = backends.choose("class_aggregation", *tensors, refusals=refusals)
    options: dict[str, Any] = {"heads": heads, "pooling": pooling, "full": attention == "full"}
    options["pads"] = max(pad_length - classes, 0)
    if backend == "torch":
        return _in_pytorch(*tensors, **options)
    return _in_kernels(*registration.autocast(*tensors), **options, backend=backend)


def _in_pytorch(
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
    *others: Tensor,
    heads: int,
    pooling: int,
    pads: int,
    full: bool,
) -> Tensor:
    """`others`: the MLP's six and the padding class's two."""
    *mlp, padding_token, padding_guidance = others
    batch, classes, height, width, channels = x.shape
    wide = (heads, channels // heads)
    # (B or 1, T, 1, C): one row a class for all positions.
    q_guidance = F.linear(guidance, q_weight[:, channels:], q_bias).unsqueeze(2)
    k_guidance = F.linear(guidance, k_weight[:, channels:], k_bias).unsqueeze(2)

    if pads:
        normed = F.layer_norm(padding_token, (channels,), norm1_weight, norm1_bias)
        pad_k = F.linear(torch.cat([normed, padding_guidance]), k_weight, k_bias).view(wide)
        pad_v = F.linear(normed, v_weight, v_bias).view(wide)

    def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, s, heads, T, d): sums over the classes are matrix products at each position and head."""
        q, k = F.elu(q).add(1), F.elu(k).add(1)
        outer = torch.matmul(k.transpose(-1, -2), v)
        total = k.sum(-2)
        if pads:
            pad_sum = pads * F.elu(pad_k).add(1)
            outer, total = outer + pad_sum[:, :, None] * pad_v[:, None, :], total + pad_sum
        return torch.matmul(q, outer) / (torch.matmul(q, total.unsqueeze(-1)) + NORMALISER_EPS)

    def full_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The same; the padding classes are one key, whose score counts them."""
        added = None
        if pads:
            shape = (*k.shape[:3], 1, k.shape[-1])
            k = torch.cat([k, pad_k.to(k.dtype)[:, None].expand(shape)], -2)
            v = torch.cat([v, pad_v.to(v.dtype)[:, None].expand(shape)], -2)
            added = F.pad(q.new_zeros(classes, classes), (0, 1), value=math.log(pads))
        places = q.shape[:2]
        q, k, v = (part.flatten(0, 1) for part in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=added).unflatten(0, places)

    def layer(y: Tensor) -> Tensor:
        """(B, T, s, C) -> the same: the transformer layer at s positions."""
        normed = F.layer_norm(y, (channels,), norm1_weight, norm1_bias)
        q = F.linear(normed, q_weight[:, :channels]) + q_guidance
        k = F.linear(normed, k_weight[:, :channels]) + k_guidance
        v = F.linear(normed, v_weight, v_bias)
        q, k, v = (part.unflatten(-1, wide).permute(0, 2, 3, 1, 4) for part in (q, k, v))
        attended = full_attention(q, k, v) if full else linear_attention(q, k, v)
        y = y + attended.permute(0, 3, 1, 2, 4).flatten(-2)
        return residual_mlp(y, *mlp, activation="relu", backend="torch")

    pooled = average_pool(x, pooling)
    positions = pooled.flatten(2, 3)
    updated = map_tiles(layer, positions, dim=2, size=tile_size(positions.shape[2], batch * classes, x.device))
    return x + resize_aligned(updated.view(pooled.shape), height, width)


def average_pool(x: Tensor, pooling: int) -> Tensor:
    """(B, T, H, W, C) -> (B, T, H // pooling, W // pooling, C); what is left over at the border is dropped."""
    if pooling == 1:
        return x
    maps = F.avg_pool2d(x.flatten(0, 1).permute(0, 3, 1, 2), pooling)
    return maps.permute(0, 2, 3, 1).unflatten(0, x.shape[:2])


def resize_aligned(x: Tensor, height: int, width: int) -> Tensor:
    """(B, T, h, w, C) -> (B, T, height, width, C), bilinear with aligned corners."""
    batch, classes, *size, _ = x.shape
    if tuple(size) == (height, width):
        return x
    maps = x.flatten(0, 1).permute(0, 3, 1, 2)
    maps = F.interpolate(maps, (height, width), mode="bilinear", align_corners=True)
    return maps.permute(0, 2, 3, 1).unflatten(0, (batch, classes))


# --- kernels: pooling and attention, then `residual_mlp`, then resizing and adding ---


def _refusal(head_channels: int) -> str | None:
    """Why the attention kernels do not take heads of this width; None where they do."""
    if head_channels > KERNEL_HEAD_CHANNELS:
        return f"its kernels take heads of up to {KERNEL_HEAD_CHANNELS} channels, not {head_channels}"
    return None


def _cuda_refusal(height: int, width: int, channels: int, heads: int, hidden: int, attention: str) -> str | None:
    """Why the CUDA C++ kernels do not take such a call; None where they do."""
    if attention != "linear":
        return f"its kernel takes linear attention, not {attention}"
    taken = "its kernel takes 128 channels in 4 heads, hidden units in multiples of 32 and maps of up to 2^23 positions"
    fits = max(height, width) <= 2**15 and height * width <= 2**23
    if fits and channels == 128 and heads == 4 and hidden % 32 == 0:
        return None
    if torch.compiler.is_compiling():
        return taken  # sizes may be symbols, which no sentence can name
    return f"{taken}, not {channels} channels in {heads} heads, {hidden} hidden units and a map of {height} x {width}"


def _in_kernels(
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
    *others: Tensor,
    heads: int,
    pooling: int,
    pads: int,
    full: bool,
    backend: str,
) -> Tensor:
    """The padding class is one more row of guidance; the kernels give its key and value the weight `pads`."""
    *mlp, padding_token, padding_guidance = others
    channels = x.shape[-1]
    if pads:
        guidance = torch.cat([guidance, padding_guidance.expand(len(guidance), 1, -1)], 1)
    of_guidance = torch.cat([q_weight[:, channels:], k_weight[:, channels:]])
    terms = F.linear(guidance, of_guidance, torch.cat([q_bias, k_bias]))
    weight = torch.cat([q_weight[:, :channels], k_weight[:, :channels], v_weight])
    if backend == "cuda":
        attention = (x, terms, norm1_weight, norm1_bias, weight, v_bias, padding_token)
        keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*attention, *mlp))
        y = torch.ops.ovseg_fast.class_aggregation(*attention, *mlp, pads, heads, pooling, keep, backend)[0]
        return y if pooling == 1 else torch.ops.ovseg_fast.class_aggregation_resize(x, y, backend)
    y = torch.ops.ovseg_fast.class_aggregation_attention(
        x, terms, norm1_weight, norm1_bias, weight, v_bias, padding_token, pads, heads, pooling, full, backend
    )
    y = residual_mlp(y, *mlp, activation="relu", backend=backend)
    return x + y if pooling == 1 else torch.ops.ovseg_fast.class_aggregation_resize(x, y, backend)


# Attention: x (B, T, H, W, C); terms (B or 1, T or T + 1 with the padding class, 2C), the guidance's share of queries
# and keys; weight (3C, C) -> (B, T, H // pooling, W // pooling, C).


def _attention_fake(x: Tensor, *arguments: Any) -> Tensor:
    batch, classes, height, width, channels = x.shape
    pooling = arguments[-2]
    return x.new_empty(batch, classes, height // pooling, width // pooling, channels)


def _attention_backward_fake(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    x, *others = arguments[:7]
    return x.new_empty(x.shape), *(x.new_empty(other.shape if arguments[-1] else 0) for other in others)


def _attention_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.pads, ctx.heads, ctx.pooling, ctx.full, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _attention_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:7]
    gradients = torch.ops.ovseg_fast.class_aggregation_attention_backward(
        grad, *ctx.saved_tensors, ctx.pads, ctx.heads, ctx.pooling, ctx.full, any(needs[1:]), ctx.backend
    )
    return *(gradient if need else None for gradient, need in zip(gradients, needs, strict=True)), *[None] * 5


def _resize_fake(x: Tensor, y: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _resize_backward_fake(grad: Tensor, low_height: int, low_width: int) -> Tensor:
    batch, classes, _, _, channels = grad.shape
    return grad.new_empty(batch, classes, low_height, low_width, channels)


def _resize_setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: Tensor) -> None:
    _, y, ctx.backend = inputs
    ctx.size = y.shape[2:4]


def _resize_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    need_x, need_y, _ = ctx.needs_input_grad
    y = torch.ops.ovseg_fast.class_aggregation_resize_backward(grad, *ctx.size, ctx.backend) if need_y else None
    return grad if need_x else None, y, None


_TENSORS = (
    "Tensor x, Tensor terms, Tensor norm_weight, Tensor norm_bias, Tensor weight, Tensor v_bias, Tensor padding_token"
)
legacy.define(
    f"class_aggregation_attention({_TENSORS}, SymInt pads, SymInt heads, SymInt pooling, bool full, str backend) "
    "-> Tensor",
    "class_aggregation",
    _attention_fake,
    backward=_attention_backward,
    setup_context=_attention_setup_context,
)
legacy.define(
    f"class_aggregation_attention_backward(Tensor grad, {_TENSORS}, SymInt pads, SymInt heads, SymInt pooling, "
    f"bool full, bool parameters, str backend) -> ({', '.join(['Tensor'] * 7)})",
    "class_aggregation",
    _attention_backward_fake,
)
legacy.define(
    "class_aggregation_resize(Tensor x, Tensor y, str backend) -> Tensor",
    "class_aggregation",
    _resize_fake,
    backward=_resize_backward,
    setup_context=_resize_setup_context,
)
legacy.define(
    "class_aggregation_resize_backward(Tensor grad, SymInt low_height, SymInt low_width, str backend) -> Tensor",
    "class_aggregation",
    _resize_backward_fake,
)


# The layer in one kernel, with x added where pooling is 1: what attention takes, then the MLP's six -> the result, or
# what is resized, and what the attention half gives where `keep`, for the backward, which goes through both halves.


def _layer_fake(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *_, pooling, keep = arguments
    batch, classes, height, width, channels = x.shape
    out = x.new_empty(batch, classes, height // pooling, width // pooling, channels)
    return out, x.new_empty(out.shape if keep else 0)


def _layer_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.pads, ctx.heads, ctx.pooling, _, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])


def _layer_backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, middle = ctx.saved_tensors
    needs = ctx.needs_input_grad[:13]
    need_mlp = needs[7:]
    middle_grad, *mlp_grads = torch.ops.ovseg_fast.residual_mlp_backward(
        grad,
        middle,
        *tensors[7:12],
        "relu",
        any(needs[:7]),
        any(need_mlp[i] for i in (0, 1, 5)),
        any(need_mlp[2:5]),
        ctx.backend,
    )
    grads: list[Any] = [None] * 7
    if any(needs[:7]):
        grads = list(
            torch.ops.ovseg_fast.class_aggregation_attention_backward(
                middle_grad, *tensors[:7], ctx.pads, ctx.heads, ctx.pooling, False, any(needs[1:7]), ctx.backend
            )
        )
        if ctx.pooling == 1:
            grads[0] = grads[0] + grad
    found = (gradient if need else None for gradient, need in zip((*grads, *mlp_grads), needs, strict=True))
    return (*found, *[None] * 5)


legacy.define(
    f"class_aggregation({_TENSORS}, Tensor norm2_weight, Tensor norm2_bias, Tensor fc1_weight, Tensor fc1_bias, "
    "Tensor fc2_weight, Tensor fc2_bias, SymInt pads, SymInt heads, SymInt pooling, bool keep, str backend) "
    "-> (Tensor, Tensor)",
    "class_aggregation",
    _layer_fake,
    backward=_layer_backward,
    setup_context=_layer_setup_context,
)
