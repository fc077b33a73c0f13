"""Layer gather, alone and summed over the layers of a stage.

    x̂ = norm(h_l[patch]),  u = a · x̂ + c         LN_shared, which all layers share
    û = norm(u),           y = g_l · û + b_l     LN_l
    z = y · P_l,           f_l = z / n,          n = max(‖z‖, ε)

with norm(x) = (x − mean(x)) / √(var(x) + eps). The layers' maps are stored singly, or Σ_l w_l · f_l alone is (one stage
of Cascade-CLIP, see `gaussian_aggregation`).

Both norms are statistics of a row: u − mean(u) is affine in x, so a program reads its rows for the four numbers first
and normalises them again, a few channels at a time, as they enter the product with P_l. The backward is in
`_layer_gather_backward`.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .common.launch import cdiv, launch, precision
from .layer_gather_backward import gather_backward
from .layer_gather_tokens import LAYERS, aligned, of_layer, padded, project, tiles


@triton.jit
def _gather(
    h0, h1, h2, h3, h4, h5, h6, h7, shared_weight, shared_bias, norm_weight, norm_bias, projection, weights, maps,
    rows, patches, skipped, batch_stride, token_stride, channels, out, shared_eps, norm_eps,
    SUMMED: tl.constexpr, WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr, OUT: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of rows of the weighted sum over SUMMED neighbouring layers."""
    row_tiles = tl.cdiv(rows, ROWS)
    group = tl.program_id(0) // row_tiles
    r = tl.program_id(0) % row_tiles * ROWS + tl.arange(0, ROWS)[:, None]
    place = (r // patches).to(tl.int64) * batch_stride + (skipped + r % patches).to(tl.int64) * token_stride
    e = tl.arange(0, OUT)[None, :]
    total = tl.zeros((ROWS, OUT), tl.float32)
    for i in range(SUMMED):
        layer = group * SUMMED + i
        z, length = project(
            of_layer(layer, h0, h1, h2, h3, h4, h5, h6, h7) + place, r < rows, shared_weight, shared_bias,
            norm_weight + layer * channels, norm_bias + layer * channels, projection + layer * channels * out, maps,
            channels, out, shared_eps, norm_eps, ROWS, OUT, CHANNELS, WIDE, PRECISION, False,
        )  # fmt: skip
        f = z / length
        if WEIGHTED:
            f *= tl.load(weights + layer).to(tl.float32)
        total += f
    target = maps + (group.to(tl.int64) * rows + r) * out + e
    tl.store(target, total, mask=(r < rows) & (e < out))


def gather(
    hidden: Sequence[Tensor], patches: int, shared_weight: Tensor, shared_bias: Tensor, norm_weight: Tensor,
    norm_bias: Tensor, projection: Tensor, weights: Tensor | None, maps: Tensor, summed: int,
    shared_eps: float, norm_eps: float,
) -> None:  # fmt: skip
    """Fill `maps` (layers / summed, B, S, E), each the sum over `summed` layers, weighted by `weights` (L,)."""
    hidden = aligned(hidden)
    batch, tokens, channels = hidden[0].shape
    rows, out = batch * patches, projection.shape[-1]
    tile = tiles(hidden[0], out, sums=1 if weights is None else 2)
    shared = (shared_weight.contiguous(), shared_bias.contiguous())
    norms = (norm_weight.contiguous(), norm_bias.contiguous(), projection.contiguous())
    for first in range(0, len(hidden), LAYERS):
        part = slice(first, min(first + LAYERS, len(hidden)))
        layers = part.stop - first
        launch(
            _gather, (cdiv(layers, summed) * cdiv(rows, tile["ROWS"]),),
            *padded(hidden[part]), *shared, *(tensor[part] for tensor in norms),
            None if weights is None else weights[part], maps[first // summed :],
            rows, patches, tokens - patches, *hidden[0].stride()[:2], channels, out, shared_eps, norm_eps,
            SUMMED=min(summed, layers), WEIGHTED=weights is not None, **tile, PRECISION=precision(),
        )  # fmt: skip


def layer_gather(
    hidden: Sequence[Tensor], patches: int, shared_weight: Tensor, shared_bias: Tensor, norm_weight: Tensor,
    norm_bias: Tensor, projection: Tensor, shared_eps: float, norm_eps: float,
) -> Tensor:  # fmt: skip
    """L tensors (B, N, D), (D,) twice, (L, D) twice and (L, D, E) -> (L, B, S, E)."""
    maps = hidden[0].new_empty(len(hidden), len(hidden[0]), patches, projection.shape[-1])
    gather(
        hidden, patches, shared_weight, shared_bias, norm_weight, norm_bias, projection, None, maps, 1,
        shared_eps, norm_eps,
    )  # fmt: skip
    return maps


def layer_gather_backward(
    grad: Tensor, hidden: Sequence[Tensor], patches: int, shared_weight: Tensor, shared_bias: Tensor,
    norm_weight: Tensor, norm_bias: Tensor, projection: Tensor, shared_eps: float, norm_eps: float,
    need_hidden: bool, need_norms: bool, need_projection: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of the hidden states (L, B, N, D), of the five parameters; an empty tensor where none is needed."""
    return gather_backward(
        grad, hidden, patches, shared_weight, shared_bias, norm_weight, norm_bias, projection, None,
        shared_eps, norm_eps, need_hidden, need_norms, need_projection, False,
    )[:6]  # fmt: skip
