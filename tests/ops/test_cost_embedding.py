"""Cost embedding: golden numbers and the literal form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ovseg_fast as ovs
import samples
from counterparts import assert_rewrite
from goldens import assert_gradients
from ovseg_fast import ops

SIZES = {
    "batch": st.integers(1, 3),
    "classes": st.integers(1, 9),
    "prompts": st.integers(1, 4),
    "height": st.integers(1, 9),
    "width": st.integers(1, 9),
    "out": st.integers(1, 9),
    "kernel": st.sampled_from([1, 3, 5, 7]),
}


@pytest.mark.parametrize("op", ["corr_embed_p1", "corr_embed_p3"])
def test_golden(op: str) -> None:
    def embedding(leaves: Mapping[str, Tensor]) -> Tensor:
        volume = leaves["in.x"].permute(0, 2, 3, 4, 1)
        return ops.embed_volume(volume, leaves["conv1.weight"], leaves["conv1.bias"]).permute(0, 4, 1, 2, 3)

    assert_gradients(op, embedding)


@settings(max_examples=30)
@given(sizes=st.fixed_dictionaries({**SIZES, "channels": st.integers(1, 17)}))
def test_rewrite(sizes: dict[str, Any]) -> None:
    assert_rewrite("cost_embedding", samples.draw(samples.cost_embedding(**sizes)))


@settings(max_examples=30)
@given(sizes=st.fixed_dictionaries(SIZES))
def test_rewrite_of_an_existing_volume(sizes: dict[str, int]) -> None:
    assert_rewrite("embed_volume", samples.draw(samples.embed_volume(**sizes)))


def test_classes_do_not_see_each_other(rng: torch.Generator) -> None:
    (image, text, *weights), _ = samples.cost_embedding(classes=5)(samples.Draw(rng, torch.float64, "cpu"))
    together = ops.cost_embedding(image, text, *weights)
    alone = torch.cat([ops.cost_embedding(image, text[t : t + 1], *weights) for t in range(5)], 1)
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_too_large_a_window_is_refused_if_kernels_are_forced(backend: str, rng: torch.Generator) -> None:
    call, _ = samples.cost_embedding(kernel=13)(samples.Draw(rng, torch.float32, "cpu"))
    with ovs.backend(backend), pytest.raises(RuntimeError, match="window of 13 × 13 is larger than 11 × 11"):
        ops.cost_embedding(*call)
