"""Cost volume.

    cost[b, k, s] = <x_bs, t_k> / (n_bs · m_k),    n = max(‖x‖, ε),  m = max(‖t‖, ε),  k over all prompts of all classes

Both sides are normalised inside: the products and the squares of both sides are summed over the channels in one pass.

Backward, with x̂ = x / n and t̂ = t / m, from the gradient g of cost:

    dx_bs = (Σ_k g[b,k,s] · t̂_k − x̂_bs · Σ_k g[b,k,s] · cost[b,k,s]) / n_bs

and with the sides exchanged, summed over b too, dt. One kernel does both: x gets the gradient, y is summed over.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common.launch import cdiv, launch, precision, sizes
from .common.math import dot

EPS = tl.constexpr(1e-12)  # torch.nn.functional.normalize

# Rows of a tile and channels per step, by bytes of an element. Float32 products without TF32 need more registers.
TILES = {2: {"ROWS": 64, "CHANNELS": 64}, 4: {"ROWS": 32, "CHANNELS": 32}}


@triton.jit
def products(
    a, a_row, a_mask, b, b_row, b_mask, channels,
    A: tl.constexpr, B: tl.constexpr, CHANNELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Products (A, B) of the rows `a_row` of a and `b_row` of b, and the lengths of both, (A,) and (B,)."""
    acc = tl.zeros((A, B), tl.float32)
    a_squares = tl.zeros((A,), tl.float32)
    b_squares = tl.zeros((B,), tl.float32)
    for start in range(0, channels, CHANNELS):
        c = start + tl.arange(0, CHANNELS)
        x = tl.load(a + a_row[:, None] * channels + c, mask=a_mask[:, None] & (c < channels), other=0.0)
        y = tl.load(b + b_row[:, None] * channels + c, mask=b_mask[:, None] & (c < channels), other=0.0)
        acc = dot(x, tl.trans(y), acc, PRECISION)
        a_squares += tl.sum(x.to(tl.float32) * x.to(tl.float32), 1)
        b_squares += tl.sum(y.to(tl.float32) * y.to(tl.float32), 1)
    a_norm = tl.maximum(tl.sqrt(a_squares), EPS, propagate_nan=tl.PropagateNan.ALL)
    return acc, a_norm, tl.maximum(tl.sqrt(b_squares), EPS, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _forward(
    image, text, cost, prompts, patches, channels,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(patches, ROWS) * tl.cdiv(prompts, ROWS)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    k = tile // tl.cdiv(patches, ROWS) * ROWS + tl.arange(0, ROWS)
    s = tile % tl.cdiv(patches, ROWS) * ROWS + tl.arange(0, ROWS)
    image += batch * patches * channels
    acc, text_norm, image_norm = products(
        text, k, k < prompts, image, s, s < patches, channels, ROWS, ROWS, CHANNELS, PRECISION
    )
    acc = acc / text_norm[:, None] / image_norm[None, :]
    cost += batch * prompts * patches
    offset = k[:, None].to(tl.int64) * patches + s[None, :]
    tl.store(cost + offset, acc, mask=(k < prompts)[:, None] & (s < patches)[None, :])


@triton.jit
def _backward(
    grad, cost, x, x_norm, y, y_norm, out, rows, cols, channels, images, row_stride, col_stride, y_rows,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of x's gradient, summed over `cols` rows of y and `images` images; `y_rows` of y lie between two images.
    The strides are those of `grad` and `cost`."""
    row_tiles = tl.cdiv(rows, ROWS)
    channel_tiles = tl.cdiv(channels, CHANNELS)
    batch = (tl.program_id(0) // (row_tiles * channel_tiles)).to(tl.int64)
    tile = tl.program_id(0) % (row_tiles * channel_tiles)
    row = tile // channel_tiles * ROWS + tl.arange(0, ROWS)
    c = tile % channel_tiles * CHANNELS + tl.arange(0, CHANNELS)
    acc = tl.zeros((ROWS, CHANNELS), tl.float32)
    radial = tl.zeros((ROWS,), tl.float32)  # Σ g · cost: the part along x itself
    for i in range(images):
        image = batch * images + i
        for start in range(0, cols, ROWS):
            col = start + tl.arange(0, ROWS)
            offset = row[:, None].to(tl.int64) * row_stride + col[None, :].to(tl.int64) * col_stride
            offset += image * rows * cols
            mask = (row < rows)[:, None] & (col < cols)[None, :]
            g = tl.load(grad + offset, mask=mask, other=0.0).to(tl.float32)
            radial += tl.sum(g * tl.load(cost + offset, mask=mask, other=0.0).to(tl.float32), 1)
            y_row = image * y_rows + col
            length = tl.load(y_norm + y_row, mask=col < cols, other=1.0)
            mask = (col < cols)[:, None] & (c < channels)
            unit = tl.load(y + y_row[:, None] * channels + c, mask=mask, other=0.0).to(tl.float32) / length[:, None]
            # The product is taken in the tensors' own precision, as PyTorch takes it.
            acc = dot(g.to(y.dtype.element_ty), unit.to(y.dtype.element_ty), acc, PRECISION)
    length = tl.load(x_norm + batch * rows + row, mask=row < rows, other=1.0)[:, None]
    mask = (row < rows)[:, None] & (c < channels)
    offset = (batch * rows + row[:, None]) * channels + c
    unit = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32) / length
    tl.store(out + offset, (acc - unit * radial[:, None]) / length, mask=mask)


def cost_volume(image: Tensor, text: Tensor) -> Tensor:
    """(B, H, W, E) and (T, P, E) -> (B, T, P, H, W)."""
    batch, height, width, channels = image.shape
    cost = image.new_empty(batch, *text.shape[:2], height, width)
    patches, prompts = height * width, text.shape[0] * text.shape[1]
    tile = sizes(TILES, image)
    launch(
        _forward, (batch * cdiv(patches, tile["ROWS"]) * cdiv(prompts, tile["ROWS"]),),
        image, text, cost, prompts, patches, channels, **tile, PRECISION=precision(),
    )  # fmt: skip
    return cost


def cost_volume_backward(
    grad: Tensor, cost: Tensor, image: Tensor, text: Tensor, needs: list[bool]
) -> list[Tensor | None]:
    """Gradients of image and text."""
    batch, height, width, channels = image.shape
    patches, prompts = height * width, text.shape[0] * text.shape[1]
    tile = sizes(TILES, image)
    image_norm, text_norm = (
        torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).clamp(min=EPS.value) for x in (image, text)
    )

    def side_grad(x: Tensor, blocks: int, rows: int, *arguments: Tensor | int) -> Tensor:
        out = torch.empty_like(x)
        launch(
            _backward, (blocks * cdiv(rows, tile["ROWS"]) * cdiv(channels, tile["CHANNELS"]),),
            grad, cost, x, *arguments[:3], out, rows, *arguments[3:], **tile, PRECISION=precision(),
        )  # fmt: skip
        return out

    image_side = (image_norm, text, text_norm, prompts, channels, 1, 1, patches, 0)
    text_side = (text_norm, image, image_norm, patches, channels, batch, patches, 1, patches)
    return [
        side_grad(image, batch, patches, *image_side) if needs[0] else None,
        side_grad(text, 1, prompts, *text_side) if needs[1] else None,
    ]
