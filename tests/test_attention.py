"""Plain attention, by PyTorch or by xformers.

xformers' own operators run on GPUs only. A stand-in of the same signature and layout takes their place here: it tells
that tensors are handed over rightly, not that xformers computes the same.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ovseg_fast as ovs
from ovseg_fast import ops
from ovseg_fast.layers.cascade_head import DecoderLayer
from ovseg_fast.models.clip import SplitAttention
from ovseg_fast.ops.common.attention import plain_attention
from samples import Draw, mask_attention
from tolerances import REWRITE_FLOAT32, REWRITE_FLOAT64, relative_error


class LowerTriangularMask:
    """Stands for xformers' mask of the same name."""


class StandIn:
    """`memory_efficient_attention` on (B, N, heads, d), with what its last call was given."""

    def __init__(self) -> None:
        self.calls = 0
        self.bias: Any = None

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, attn_bias: Any = None, p: float = 0.0, scale: float | None = None
    ) -> Tensor:
        self.calls += 1
        self.bias = attn_bias
        causal = isinstance(attn_bias, LowerTriangularMask)
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        if not causal and attn_bias is not None:
            assert attn_bias.shape == (*q.shape[:3], k.shape[2]) and attn_bias.dtype == q.dtype
        bias = None if causal else attn_bias
        attended = F.scaled_dot_product_attention(q, k, v, bias, p, causal, scale=scale)
        return attended.transpose(1, 2).contiguous()


def install(monkeypatch: pytest.MonkeyPatch, attention: Any) -> None:
    """Put a package xformers in place whose `ops` has this attention."""
    package, operators = ModuleType("xformers"), ModuleType("xformers.ops")
    operators.memory_efficient_attention = attention
    operators.LowerTriangularMask = LowerTriangularMask
    package.ops = operators
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", operators)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    attention = StandIn()
    install(monkeypatch, attention)
    return attention


def heads(rng: torch.Generator, queries: int = 7, keys: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    draw = Draw(rng, torch.float64, "cpu")
    return draw(2, 3, queries, 4), draw(2, 3, keys, 4), draw(2, 3, keys, 4)


@pytest.mark.parametrize("causal", [False, True])
def test_xformers_gives_what_pytorch_gives(causal: bool, stand_in: StandIn, rng: torch.Generator) -> None:
    q, k, v = heads(rng)
    expected = plain_attention(q, k, v, causal=causal)
    assert stand_in.calls == 0
    result = plain_attention(q, k, v, causal=causal, attention="xformers")
    assert stand_in.calls == 1
    assert result.shape == expected.shape
    assert relative_error(result, expected) <= REWRITE_FLOAT64


@pytest.mark.parametrize("shape", [(5, 11), (5, 1), (1, 11), (3, 5, 11), (2, 1, 5, 11), (2, 3, 1, 11)])
@pytest.mark.parametrize("kind", ["seen", "added"])
def test_masks_reach_xformers_as_an_aligned_term(
    kind: str, shape: tuple[int, ...], stand_in: StandIn, rng: torch.Generator
) -> None:
    q, k, v = heads(rng, 5, 11)
    mask = torch.randn(shape, generator=rng, dtype=torch.float64)
    if kind == "seen":
        mask = mask > -1 if shape[-1] > 1 else mask > -10
    result = plain_attention(q, k, v, mask=mask, attention="xformers")
    assert relative_error(result, plain_attention(q, k, v, mask=mask)) <= REWRITE_FLOAT64
    assert all(stride % 8 == 0 for stride in stand_in.bias.stride()[:-1])  # as its kernels read it
    assert stand_in.bias.stride(-1) == 1


def test_mask_attention_takes_xformers_for_its_pytorch_form(stand_in: StandIn, rng: torch.Generator) -> None:
    args, keywords = mask_attention(batch=2, classes=5, patches=9)(Draw(rng, torch.float64, "cpu"))
    with ovs.backend("torch"):
        expected = ops.mask_attention(*args, **keywords)
        result = ops.mask_attention(*args, **keywords, attention="xformers")
        nothing = ops.mask_attention(*args, **keywords, attention="xformers", dropout=1.0)
    assert stand_in.calls == 2
    assert relative_error(result, expected) <= REWRITE_FLOAT64
    torch.testing.assert_close(nothing, args[-1].expand_as(nothing))  # dropout is handed over


@pytest.mark.parametrize("name", ["catseg-tiny", "cascade-clip-tiny"])
def test_models_attend_with_what_they_are_built_with(name: str, stand_in: StandIn) -> None:
    plain, model = ovs.build(name).eval(), ovs.build(name, attention="xformers").eval()
    model.load_state_dict(plain.state_dict())
    parts = [module for module in model.modules() if isinstance(module, (SplitAttention, DecoderLayer))]
    assert parts
    assert {part.attention for part in parts} == {"xformers"}
    images = torch.rand(1, 3, 96, 96)
    tokens = torch.randint(1, 49407, (3, 1, 77))
    with torch.no_grad(), ovs.backend("torch"):
        text = plain.encode_text(tokens)
        images_text = (images, text[:, 0] if name.startswith("cascade") else text)
        expected = plain(*images_text)
        assert stand_in.calls == 0
        assert relative_error(model.encode_text(tokens), text) <= REWRITE_FLOAT32
        assert isinstance(stand_in.bias, LowerTriangularMask)
        assert relative_error(model(*images_text), expected) <= REWRITE_FLOAT32
    assert stand_in.bias is None
    assert stand_in.calls > 4


def test_load_hands_the_attention_on(stand_in: StandIn) -> None:
    segmenter = ovs.load("catseg-tiny", weights=None, device="cpu", attention="xformers")
    found = {module.attention for module in segmenter.model.modules() if isinstance(module, SplitAttention)}
    assert found == {"xformers"}


def test_xformers_that_is_not_installed_is_missed_at_once(
    monkeypatch: pytest.MonkeyPatch, rng: torch.Generator
) -> None:
    monkeypatch.setitem(sys.modules, "xformers", None)  # import of it raises ImportError
    for call in (
        lambda: ovs.build("catseg-tiny", attention="xformers"),
        lambda: ovs.load("catseg-vitb", attention="xformers"),  # before anything is downloaded
        lambda: plain_attention(*heads(rng), attention="xformers"),
    ):
        with pytest.raises(ImportError, match=r"attention='xformers' needs .* `pip install xformers` installs it\.$"):
            call()


def test_xformers_without_operators_for_these_tensors_says_so(
    monkeypatch: pytest.MonkeyPatch, rng: torch.Generator
) -> None:
    def refuse(*arguments: Any, **keywords: Any) -> Tensor:
        raise NotImplementedError("No operator found for `memory_efficient_attention_forward` with inputs:\n...")

    install(monkeypatch, refuse)
    with pytest.raises(RuntimeError) as caught:
        plain_attention(*heads(rng), attention="xformers")
    message = str(caught.value)
    assert "float64 tensors of shape (2, 7, 3, 4) on cpu" in message
    assert "compiled operators" in message and "attention='sdpa'" in message and "\n" not in message


def test_bad_arguments_are_refused(rng: torch.Generator) -> None:
    q, k, v = heads(rng)
    with pytest.raises(ValueError, match="attention must be 'sdpa' or 'xformers', got 'flash'"):
        plain_attention(q, k, v, attention="flash")
    with pytest.raises(ValueError, match="attention must be"):
        ovs.build("catseg-tiny", attention="flash")
    with pytest.raises(ValueError, match="mask or causal, not both"):
        plain_attention(q, k, v, mask=torch.ones(7, 7, dtype=torch.bool), causal=True)
