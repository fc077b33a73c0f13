"""Class aggregation: at every position, a transformer layer with linear, or full, attention over all classes.

    y = average-pool(x)
    n = LN₁(y);   q = φ(W_q [n ; g] + b_q),   k = φ(W_k [n ; g] + b_k),   v = W_v n + b_v,   φ = elu + 1
    y ← y + (q · Σ_t k_t ⊗ v_t) / (q · Σ_t k_t + 1e-6),   or with full attention, where φ(x) = x,
    y ← y + Σ_t softmax_t(q · k_t / √d) v_t
    y ← y + W₂ · ReLU(W₁ LN₂(y) + b₁) + b₂
    out = x + upsample(y)

Exact rewrites: W [n ; g] = Wₙ n + W_g g, with the guidance's term computed once for all positions. The classes that pad
a short list are all alike: they enter both sums as one times their number, the softmax as one key with its logarithm
added to the score.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from .common import registration
from .common.aggregation import Prepare, check_block, cpu_refusal, joint_weight, mlp_weights, need_gradient, prepare_now
from .common.residual_mlp import mlp_backward, mlp_refusal, residual_mlp
from .common.tiles import map_tiles, tile_size

NORMALISER_EPS = 1e-6
KERNEL_HEAD_CHANNELS = 128  # the widest heads of the Triton kernels


class ClassAggregationWeights(NamedTuple):
    """Weights of the layer, of C channels, G guidance channels and M hidden units."""

    norm1_weight: Tensor  # (C,)
    norm1_bias: Tensor
    q_weight: Tensor  # (C, C + G): the first C columns read x, the last G the guidance
    q_bias: Tensor
    k_weight: Tensor  # (C, C + G)
    k_bias: Tensor
    v_weight: Tensor  # (C, C)
    v_bias: Tensor
    norm2_weight: Tensor  # (C,)
    norm2_bias: Tensor
    fc1_weight: Tensor  # (M, C)
    fc1_bias: Tensor
    fc2_weight: Tensor  # (C, M)
    fc2_bias: Tensor
    padding_token: Tensor  # (C,), the class that pads the list
    padding_guidance: Tensor  # (G,)


def class_aggregation(
    x: Tensor,
    guidance: Tensor,
    weights: ClassAggregationWeights,
    *,
    heads: int,
    pooling: int,
    pad_length: int,
    attention: str,
    prepare: Prepare = prepare_now,
) -> Tensor:
    """One transformer layer over the classes, guided by text (CAT-Seg, section 3.3, equation 3).

    Args:
        x: (B, T, H, W, C) cost embedding.
        guidance: (T, G) text guidance that all images share, or (B, T, G).
        heads: attention heads; divides C.
        pooling: side of the average pooling before the layer; its result is resized back bilinearly (corners aligned).
        pad_length: length up to which the padding class, a key and value like any other as published, fills the list.
        attention: `"linear"` (as in the released models), or `"full"` for a softmax over the classes.
        prepare: `prepare(function, *tensors)` gives `function(*tensors)` of weights and guidance alone.

    Returns:
        (B, T, H, W, C): x plus the layer's output, which holds its own residual (as published).

    Raises:
        TypeError, ValueError: a tensor, `heads`, `pooling`, `pad_length` or `attention` does not fit.
    """
    shape = "T G" if isinstance(guidance, Tensor) and guidance.dim() == 2 else "B T G"
    check_block("class_aggregation", ClassAggregationWeights, x, guidance, shape, weights, heads)
    _, classes, height, width, channels = x.shape
    if not 1 <= pooling <= min(height, width):
        raise ValueError(f"class_aggregation: pooling must be in 1..min(H, W) = {min(height, width)}, got {pooling}.")
    if pad_length < 0:
        raise ValueError(f"class_aggregation: pad_length must be at least 0, got {pad_length}.")
    if attention not in ("linear", "full"):
        raise ValueError(f"class_aggregation: attention must be 'linear' or 'full', got {attention!r}.")
    too_wide = None
    if channels // heads > KERNEL_HEAD_CHANNELS:
        too_wide = f"its kernels take heads of up to {KERNEL_HEAD_CHANNELS} channels, not {channels // heads}"
    hidden = weights.fc1_weight.shape[0]
    refusals = {
        "triton": too_wide or mlp_refusal(x, weights.fc1_weight),
        "cuda": _cuda_refusal(height, width, channels, heads, hidden, attention),
        "cpu": _linear_refusal(attention) or cpu_refusal(channels, heads, hidden),
    }
    backend = backends.choose("class_aggregation", x, guidance, *weights, refusals=refusals)
    pads, full = max(pad_length - classes, 0), attention == "full"
    qk = (weights.q_weight, weights.k_weight, weights.q_bias, weights.k_bias)
    padding = (weights.padding_guidance,) if pads else ()
    terms = prepare(guidance_terms, guidance, *qk, *padding)
    if backend == "torch":
        return torch_form(x, terms, weights, pads, heads, pooling, full)
    weight = prepare(joint_weight, weights.q_weight, weights.k_weight, weights.v_weight)
    norm1 = (weights.norm1_weight, weights.norm1_bias)
    tensors = registration.autocast(
        x, terms, *norm1, weight, weights.v_bias, weights.padding_token, *mlp_weights(weights)
    )
    options = (pads, heads, pooling, full, need_gradient(*tensors))
    return torch.ops.ovseg_fast.class_aggregation(*tensors, *options, backend)[0]


def guidance_terms(
    guidance: Tensor, q_weight: Tensor, k_weight: Tensor, q_bias: Tensor, k_bias: Tensor, *padding: Tensor
) -> Tensor:
    """What guidance, (T, G) or (B, T, G), and biases add to queries and keys: (B or 1, T, 2C). With the guidance of the
    padding class as `padding`, (B or 1, T + 1, 2C)."""
    guidance = guidance if guidance.dim() == 3 else guidance.unsqueeze(0)
    for row in padding:
        guidance = torch.cat([guidance, row.expand(len(guidance), 1, -1)], 1)
    channels = len(q_weight)
    return F.linear(guidance, torch.cat([q_weight[:, channels:], k_weight[:, channels:]]), torch.cat([q_bias, k_bias]))


def torch_form(
    x: Tensor, terms: Tensor, weights: ClassAggregationWeights, pads: int, heads: int, pooling: int, full: bool
) -> Tensor:
    """The layer with the `guidance_terms`, where the padding class, if any, counts `pads` times."""
    batch, classes, height, width, channels = x.shape
    wide = (heads, channels // heads)
    norm1 = (weights.norm1_weight, weights.norm1_bias)
    # (B or 1, T, 1, C): one row a class for all positions.
    q_guidance, k_guidance = terms[:, :classes].unsqueeze(2).chunk(2, -1)

    pad_k = pad_v = weights.padding_token  # a compiler wants closures' variables set, even where nothing reads them
    if pads:
        normed = F.layer_norm(weights.padding_token, (channels,), *norm1)
        # The padding class has the same guidance in all images.
        pad_k = (F.linear(normed, weights.k_weight[:, :channels]) + terms[0, classes, channels:]).view(wide)
        pad_v = F.linear(normed, weights.v_weight, weights.v_bias).view(wide)

    def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, s, heads, T, d), q and k with φ: sums over the classes are matrix products at each position and head."""
        # Not kᵀv: so the gradients of q and k are contiguous, as compilers take those that elu's backward reads to be.
        outer = torch.matmul(v.transpose(-1, -2), k)
        total = k.sum(-2)
        if pads:
            pad_sum = pads * F.elu(pad_k).add(1)
            outer, total = outer + pad_v[:, :, None] * pad_sum[:, None, :], total + pad_sum
        return torch.matmul(q, outer.transpose(-1, -2)) / (torch.matmul(q, total.unsqueeze(-1)) + NORMALISER_EPS)

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
        normed = F.layer_norm(y, (channels,), *norm1)
        q = F.linear(normed, weights.q_weight[:, :channels]) + q_guidance
        k = F.linear(normed, weights.k_weight[:, :channels]) + k_guidance
        v = F.linear(normed, weights.v_weight, weights.v_bias)
        if not full:
            q, k = F.elu(q).add(1), F.elu(k).add(1)
        q, k, v = (part.unflatten(-1, wide).permute(0, 2, 3, 1, 4) for part in (q, k, v))
        attended = full_attention(q, k, v) if full else linear_attention(q, k, v)
        y = y + attended.permute(0, 3, 1, 2, 4).flatten(-2)
        return residual_mlp(y, *mlp_weights(weights), activation="relu")

    pooled = average_pool(x, pooling)
    positions = pooled.flatten(2, 3)
    size = tile_size(positions.shape[2], batch * classes, x.device)
    updated = map_tiles(layer, positions, 2, size, terms, *weights)
    return x + resize_aligned(updated.view(pooled.shape), height, width)


def average_pool(x: Tensor, pooling: int) -> Tensor:
    """(B, T, H, W, C) -> (B, T, H // pooling, W // pooling, C); what is left over at the border is dropped."""
    if pooling == 1:
        return x
    maps = F.avg_pool2d(x.flatten(0, 1).permute(0, 3, 1, 2), pooling)
    return maps.permute(0, 2, 3, 1).unflatten(0, x.shape[:2])


def resize_aligned(x: Tensor, height: int, width: int) -> Tensor:
    """(B, T, h, w, C) -> (B, T, height, width, C), bilinear with aligned corners."""
    if tuple(x.shape[2:4]) == (height, width):
        return x
    maps = x.flatten(0, 1).permute(0, 3, 1, 2)
    maps = F.interpolate(maps, (height, width), mode="bilinear", align_corners=True)
    return maps.permute(0, 2, 3, 1).unflatten(0, x.shape[:2])


def _linear_refusal(attention: str) -> str | None:
    return None if attention == "linear" else f"its kernel takes linear attention, not {attention}"


def _cuda_refusal(height: int, width: int, channels: int, heads: int, hidden: int, attention: str) -> str | None:
    """Why the CUDA C++ kernels do not take such a call; None if they do."""
    if reason := _linear_refusal(attention):
        return reason
    taken = "its kernel takes 128 channels in 4 heads, hidden units in multiples of 32 and maps of up to 2^23 positions"
    fits = max(height, width) <= 2**15 and height * width <= 2**23
    if fits and channels == 128 and heads == 4 and hidden % 32 == 0:
        return None
    if torch.compiler.is_compiling():
        return taken  # sizes may be symbols
    return f"{taken}, not {channels} channels in {heads} heads, {hidden} hidden units and a map of {height} x {width}"


def _fake(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    batch, classes, height, width, channels = x.shape
    *_, pooling, _, keep = arguments
    middle = x.new_empty(batch, classes, height // pooling, width // pooling, channels)
    return x.new_empty(x.shape), middle if keep else x.new_empty(0)


def _backward(kernels: Any, grad: Tensor, middle: Tensor, *arguments: Any) -> list[Any]:
    *tensors, pads, heads, pooling, full, _, needs = arguments
    attention, mlp = tensors[:7], tensors[7:]
    need_middle = any(needs[:7])
    y_grad = grad if pooling == 1 else kernels.resize_backward(grad, *middle.shape[2:4])
    middle_grad, *mlp_grads = mlp_backward(kernels, y_grad, middle, mlp, "relu", need_middle, needs[7:])
    if not need_middle:
        return [*[None] * 7, *mlp_grads]

    # A backend's kernels go through attention, norm and pooling, PyTorch takes products with weights and sums.
    x, terms, norm_weight, norm_bias, weight, _, padding_token = attention
    batch, classes, high, wide, channels = middle.shape
    tokens = batch * classes * high * wide
    tokens_grad, pad_grads, normed, statistics = kernels.class_attention_backward(
        middle_grad, *attention, pads, heads, pooling, full
    )
    pad_sums = pad_grads.sum(1)
    if pads:
        tokens_grad[tokens, :channels] = 0
        tokens_grad[tokens, channels:] = pad_sums.sum(0)
    parameters = any(needs[1:7])
    n_grad = tokens_grad @ weight
    x_grad, gain, offset, padding_grad = kernels.tokens_backward(
        n_grad, middle_grad, x, padding_token, norm_weight, norm_bias, statistics, pads, pooling, parameters
    )
    if needs[0]:
        x_grad = x_grad + grad
    if not parameters:
        return [x_grad, *[None] * 6, *mlp_grads]
    by_class = tokens_grad[:tokens].view(batch, classes, high * wide, 3 * channels).sum(2, dtype=torch.float32)
    v_bias_grad = by_class[..., 2 * channels :].sum((0, 1)) + pad_sums[:, channels:].sum(0)
    terms_grad = by_class[..., : 2 * channels]
    if pads:
        terms_grad = torch.cat([terms_grad, F.pad(pad_sums[:, None, :channels], (channels, 0))], 1)
    if len(terms) == 1:
        terms_grad = terms_grad.sum(0, keepdim=True)
    grads = [x_grad, terms_grad.to(x.dtype), gain, offset, tokens_grad.t() @ normed, v_bias_grad.to(x.dtype)]
    return [*grads, padding_grad, *mlp_grads]


# Terms are (B or 1, T, or T + 1 if there are pads, 2C), weight (3C, C). The second output is what the attention half
# gives, (B, T, H // pooling, W // pooling, C), which the backward reads; empty unless `keep`.
registration.define(
    "class_aggregation(Tensor x, Tensor terms, Tensor norm1_weight, Tensor norm1_bias, Tensor weight, Tensor v_bias, "
    "Tensor padding_token, Tensor norm2_weight, Tensor norm2_bias, Tensor fc1_weight, Tensor fc1_bias, "
    "Tensor fc2_weight, Tensor fc2_bias, SymInt pads, SymInt heads, SymInt pooling, bool full, bool keep) "
    "-> (Tensor, Tensor)",
    "class_aggregation",
    _fake,
    backward=_backward,
    saved=(1,),
)
