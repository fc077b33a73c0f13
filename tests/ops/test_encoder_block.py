"""Encoder block: the literal form, and what it leaves to a block's own modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import ovseg_fast as ovs
import samples
from counterparts import assert_rewrite
from ovseg_fast import ops
from ovseg_fast.models.clip import Block


@settings(max_examples=30)
@given(
    heads=st.integers(1, 4),
    width=st.integers(1, 5),
    sizes=st.fixed_dictionaries(
        {"batch": st.integers(1, 3), "tokens": st.integers(1, 9), "hidden": st.integers(1, 20), "dense": st.booleans()}
    ),
)
def test_rewrite(heads: int, width: int, sizes: dict[str, Any]) -> None:
    assert_rewrite("encoder_block", samples.draw(samples.encoder_block(heads=heads, channels=heads * width, **sizes)))


def test_a_causal_block_does_not_see_what_follows(rng: torch.Generator) -> None:
    (x, weights), options = samples.draw(samples.encoder_block(tokens=7, causal=True))
    changed = x.clone()
    changed[:, 4:] = torch.randn(changed[:, 4:].shape, generator=rng, dtype=x.dtype)
    before, after = (ops.encoder_block(tokens, weights, **options) for tokens in (x, changed))
    assert torch.equal(before[:, :4], after[:, :4]) and not torch.equal(before[:, 4:], after[:, 4:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, "heads must divide the width 16, got heads = 3"),
        ({"activation": "tanh"}, "activation must be one of quick_gelu, gelu, got 'tanh'"),
        ({"attention": "flash"}, "attention must be 'sdpa' or 'xformers', got 'flash'"),
    ],
)
def test_options_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    call, options = samples.draw(samples.encoder_block())
    with pytest.raises(ValueError, match=message):
        ops.encoder_block(*call, **{**options, **change})


def test_weights_that_do_not_fit() -> None:
    (x, weights), options = samples.draw(samples.encoder_block())
    with pytest.raises(TypeError, match="weights must be EncoderBlockWeights, got tuple"):
        ops.encoder_block(x, tuple(weights), **options)
    with pytest.raises(ValueError, match="qkv_bias must have 3 D = 48, got 16"):
        ops.encoder_block(x, weights._replace(qkv_bias=weights.qkv_bias[:16]), **options)


def test_under_autocast_sums_of_residuals_stay_in_float32() -> None:
    """So the CPU kernel, whose output is of the dtype of its products, is left aside."""
    call, options = samples.draw(samples.encoder_block(), torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert ops.encoder_block(*call, **options).dtype == torch.float32
        assert ovs.last_backend("encoder_block") == "torch"
        with ovs.backend("cpu"), pytest.raises(RuntimeError, match=r"encoder_block: the cpu .* under autocast"):
            ops.encoder_block(*call, **options)


# --- CLIP's blocks ---


def block() -> Block:
    return ovs.build("catseg-tiny").eval().clip.visual.transformer.resblocks[0]


def hooked(part: Callable[[Block], nn.Module]) -> Callable[[Block], list[str]]:
    def change(block: Block) -> list[str]:
        seen: list[str] = []
        part(block).register_forward_hook(lambda *_: seen.append("hook"))
        return seen

    return change


def with_adapter(block: Block) -> list[str]:
    seen: list[str] = []

    class Adapter(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append("adapter")
            return super().forward(x)

    old = block.mlp.c_proj
    block.mlp.c_proj = Adapter(old.in_features, old.out_features)
    block.mlp.c_proj.load_state_dict(old.state_dict())
    return seen


def with_own_forward(block: Block) -> list[str]:
    seen: list[str] = []
    forward = block.ln_2.forward
    block.ln_2.forward = lambda x: seen.append("forward") or forward(x)
    return seen


@pytest.mark.parametrize(
    "change",
    [
        hooked(lambda block: block.mlp),
        hooked(lambda block: block.attn),
        hooked(lambda block: block.mlp.gelu),
        with_adapter,
        with_own_forward,
    ],
)
@pytest.mark.parametrize("dense", [False, True])
def test_changed_modules_of_a_block_run(
    change: Callable[[Block], list[str]], dense: bool, rng: torch.Generator
) -> None:
    """Hooks, adapters and replaced functions are called, and the numbers stay."""
    ours, x = block(), torch.randn(1, 7, 64, generator=rng)
    run = ours.dense if dense else ours
    with torch.no_grad():
        expected = run(x)
        seen = change(ours)
        assert torch.allclose(run(x), expected, atol=1e-5)
    assert seen or dense  # value-only blocks never called `attn` itself


def test_a_global_hook_is_called(rng: torch.Generator) -> None:
    seen: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        block()(torch.randn(1, 7, 64, generator=rng))
    finally:
        handle.remove()
    assert {"Linear", "SplitAttention"} <= set(seen)
