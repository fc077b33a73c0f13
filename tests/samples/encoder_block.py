"""Samples of encoder_block: how a call is built from sizes, and the rows."""

from __future__ import annotations

from typing import Any

from ovseg_fast import ops

from ._sample import Build, Call, Draw, row


def encoder_block(
    *,
    batch: int = 1,
    tokens: int = 5,
    channels: int = 16,
    hidden: int = 32,
    heads: int = 2,
    **options: Any,
) -> Build:
    def build(draw: Draw) -> Call:
        qkv = [draw.weight(channels, channels) for _ in range(3)]
        joint_bias, proj = 0.1 * draw(3 * channels), draw.linear(channels, channels)
        mlp = (*draw.linear(hidden, channels), *draw.linear(channels, hidden))
        norms = draw.norm(channels), draw.norm(channels)
        weights = ops.EncoderBlockWeights(*norms[0], *qkv, joint_bias, *proj, *norms[1], *mlp)
        return (draw.tokens(batch, tokens, channels), weights), {"heads": heads, **options}

    return build


PUBLISHED = {"channels": 768, "hidden": 3072, "heads": 12}

ENCODER_BLOCK = [
    row("encoder_block", "small", encoder_block(), "small"),
    row("encoder_block", "odd", encoder_block(batch=3, tokens=37, channels=48, hidden=80, heads=3), "odd", "batch"),
    row("encoder_block", "dense", encoder_block(batch=2, tokens=19, dense=True), "odd", "batch"),
    row("encoder_block", "gelu", encoder_block(tokens=33, heads=4, activation="gelu", eps=(1e-6, 1e-4)), "odd"),
    row("encoder_block", "one token", encoder_block(batch=2, tokens=1), "batch"),
    row("encoder_block", "several tiles", encoder_block(tokens=150, channels=32, hidden=304, heads=1)),
    row("encoder_block", "no image", encoder_block(batch=0), "empty"),
    *(
        row("encoder_block", f"{tokens} tokens", encoder_block(tokens=tokens, **PUBLISHED), "bench")
        for tokens in (577, 1025)
    ),
    row("encoder_block", "577 tokens, dense", encoder_block(tokens=577, dense=True, **PUBLISHED), "bench"),
]
