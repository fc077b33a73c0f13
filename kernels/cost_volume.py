"""Cost volume.

    cost[b, k, s] = <x_bs, t_k> / (n_bs · m_k),    n = max(‖x‖, ε),  m = max(‖t‖, ε),  k over all prompts of all classes

Both sides are normalised inside: the products and the squares of both sides are summed over the channels in one pass.

Backward, with x̂ = x / n and t̂ = t / m, from the gradient g of cost:

    dx_bs = (Σ_k g[b,k,s] · t̂_k − x̂_bs · Σ_k g[b,k,s] · cost[b,k,s]) / n_bs

and the same with the sides exchanged for dt, summed over b too where all images share the text. One kernel does both:
"rows" are the side whose gradient is wanted, "others" the side that is summed over.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common.launch import cdiv, launch, precision, sizes
from .common.math import dot

EPS = tl.constexpr(1e-12)  # torch.nn.functional.normalize

# Prompts, and patches, that a program works on; channels read at a time. By bytes of an element: float32 products do
# not run on tensor cores unless TF32 is allowed, and their unrolled form needs the registers.
TILES = {2: {"ROWS": 64, "CHANNELS": 64}, 4: {"ROWS": 32, "CHANNELS": 32}}


@triton.jit
def _forward(
    image, text, cost, prompts, patches, channels, text_batch_stride,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(patches, ROWS) * tl.cdiv(prompts, ROWS)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    k = tile // tl.cdiv(patches, ROWS) * ROWS + tl.arange(0, ROWS)
    s = tile % tl.cdiv(patches, ROWS) * ROWS + tl.arange(0, ROWS)
    image += batch * patches * channels
    text += batch * text_batch_stride
    products = tl.zeros((ROWS, ROWS), tl.float32)
    text_squares = tl.zeros((ROWS,), tl.float32)
    image_squares = tl.zeros((ROWS,), tl.float32)
    for start in range(0, channels, CHANNELS):
        c = start + tl.arange(0, CHANNELS)
        t = tl.load(text + k[:, None] * channels + c, mask=(k < prompts)[:, None] & (c < channels), other=0.0)
        x = tl.load(image + s[:, None] * channels + c, mask=(s < patches)[:, None] & (c < channels), other=0.0)
        products = dot(t, tl.trans(x), products, PRECISION)
        text_squares += tl.sum(t.to(tl.float32) * t.to(tl.float32), 1)
        image_squares += tl.sum(x.to(tl.float32) * x.to(tl.float32), 1)
    text_norm = tl.maximum(tl.sqrt(text_squares), EPS, propagate_nan=tl.PropagateNan.ALL)
    image_norm = tl.maximum(tl.sqrt(image_squares), EPS, propagate_nan=tl.PropagateNan.ALL)
    products = products / text_norm[:, None] / image_norm[None, :]
    target = cost + batch * prompts * patches + k[:, None].to(tl.int64) * patches + s[None, :]
    tl.store(target, products, mask=(k < prompts)[:, None] & (s < patches)[None, :])


@triton.jit
def _norms(x, norms, rows, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    squares = tl.zeros((ROWS,), tl.float32)
    for start in range(0, channels, CHANNELS):
        c = start + tl.arange(0, CHANNELS)
        mask = (row < rows)[:, None] & (c < channels)
        value = tl.load(x + row[:, None].to(tl.int64) * channels + c, mask=mask, other=0.0).to(tl.float32)
        squares += tl.sum(value * value, 1)
    tl.store(norms + row, tl.maximum(tl.sqrt(squares), EPS, propagate_nan=tl.PropagateNan.ALL), mask=row < rows)


@triton.jit
def _backward(
    grad, cost, rows_x, rows_norm, others_x, others_norm, out,
    rows, others, channels, sums, row_stride, other_stride, cost_batch, rows_batch, others_batch,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of rows and channels of one side's gradient, summed over `others` and over `sums` images."""
    row_tiles = tl.cdiv(rows, ROWS)
    channel_tiles = tl.cdiv(channels, CHANNELS)
    batch = (tl.program_id(0) // (row_tiles * channel_tiles)).to(tl.int64)
    tile = tl.program_id(0) % (row_tiles * channel_tiles)
    r = tile // channel_tiles * ROWS + tl.arange(0, ROWS)
    c = tile % channel_tiles * CHANNELS + tl.arange(0, CHANNELS)
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    along = tl.zeros((ROWS,), tl.float32)  # Σ g · cost: the part along the row itself
    for image in range(sums):
        at = (batch * sums + image) * cost_batch
        side = (batch * sums + image) * others_batch
        for start in range(0, others, ROWS):
            k = start + tl.arange(0, ROWS)
            offset = at + r[:, None].to(tl.int64) * row_stride + k[None, :].to(tl.int64) * other_stride
            mask = (r < rows)[:, None] & (k < others)[None, :]
            g = tl.load(grad + offset, mask=mask, other=0.0).to(tl.float32)
            along += tl.sum(g * tl.load(cost + offset, mask=mask, other=0.0).to(tl.float32), 1)
            norm = tl.load(
                others_norm + (batch * sums + image) * (others_batch // channels) + k, mask=k < others, other=1.0
            )
            y = tl.load(
                others_x + side + k[:, None].to(tl.int64) * channels + c,
                mask=(k < others)[:, None] & (c < channels), other=0.0,
            ).to(tl.float32)  # fmt: skip
            # The product is taken in the tensors' own precision, as PyTorch takes it.
            scaled = (y / norm[:, None]).to(others_x.dtype.element_ty)
            total = dot(g.to(others_x.dtype.element_ty), scaled, total, PRECISION)
    norm = tl.load(rows_norm + batch * rows + r, mask=r < rows, other=1.0)
    mask = (r < rows)[:, None] & (c < channels)
    place = batch * rows_batch + r[:, None].to(tl.int64) * channels + c
    x = tl.load(rows_x + place, mask=mask, other=0.0).to(tl.float32) / norm[:, None]
    tl.store(out + place, (total - x * along[:, None]) / norm[:, None], mask=mask)


def cost_volume(image: Tensor, text: Tensor) -> Tensor:
    """(B, S, E) and (K, E) or (B, K, E) -> (B, K, S)."""
    batch, patches, channels = image.shape
    prompts = text.shape[-2]
    cost = image.new_empty(batch, prompts, patches)
    tile = sizes(TILES, image)
    launch(
        _forward, (batch * cdiv(patches, tile["ROWS"]) * cdiv(prompts, tile["ROWS"]),),
        image, text, cost, prompts, patches, channels, prompts * channels if text.dim() == 3 else 0,
        **tile, PRECISION=precision(),
    )  # fmt: skip
    return cost


def cost_volume_backward(
    grad: Tensor, cost: Tensor, image: Tensor, text: Tensor, needs: list[bool]
) -> list[Tensor | None]:
    """Gradients of image and text."""
    batch, patches, channels = image.shape
    prompts = text.shape[-2]
    tile = sizes(TILES, image)
    image_norm, text_norm = (_lengths(side, tile) for side in (image, text))
    own = text.dim() == 3
    groups, sums = (batch, 1) if own else (1, batch)
    volume = prompts * patches

    def side_grad(x: Tensor, groups: int, rows: int, *arguments: Any) -> Tensor:
        out = torch.empty_like(x)
        launch(
            _backward, (groups * cdiv(rows, tile["ROWS"]) * cdiv(channels, tile["CHANNELS"]),),
            grad, cost, x, *arguments[:3], out, rows, *arguments[3:], **tile, PRECISION=precision(),
        )  # fmt: skip
        return out

    return [
        side_grad(
            image, batch, patches, image_norm, text, text_norm,
            prompts, channels, 1, 1, patches, volume, patches * channels, prompts * channels if own else 0,
        ) if needs[0] else None,
        side_grad(
            text, groups, prompts, text_norm, image, image_norm,
            patches, channels, sums, patches, 1, volume, prompts * channels, patches * channels,
        ) if needs[1] else None,
    ]  # fmt: skip


def _lengths(x: Tensor, tile: dict[str, int]) -> Tensor:
    """Lengths of the rows of x, in float32."""
    rows = x.numel() // x.shape[-1]
    out = x.new_empty(rows, dtype=torch.float32)
    launch(_norms, (cdiv(rows, tile["ROWS"]),), x, out, rows, x.shape[-1], **tile)
    return out
