"""Cost volume: golden numbers and the literal form."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import samples
from counterparts import assert_rewrite
from goldens import assert_gradients
from ovseg_fast import ops
from tolerances import REWRITE_FLOAT64, relative_error


@pytest.mark.usefixtures("every_backend")
@pytest.mark.parametrize("op", ["correlation_p1", "correlation_p3"])
def test_golden(op: str) -> None:
    def volume(leaves: Mapping[str, Tensor]) -> Tensor:
        cosines = ops.cost_volume(leaves["in.img"].permute(0, 2, 3, 1), leaves["in.text"])
        return cosines.permute(0, 4, 1, 2, 3)

    assert_gradients(op, volume)


@settings(max_examples=40)
@given(
    sizes=st.fixed_dictionaries(
        {
            "batch": st.integers(1, 3),
            "classes": st.integers(1, 9),
            "prompts": st.integers(1, 4),
            "height": st.integers(1, 7),
            "width": st.integers(1, 7),
            "channels": st.integers(1, 17),
        }
    )
)
def test_rewrite(sizes: dict[str, int]) -> None:
    assert_rewrite("cost_volume", samples.draw(samples.cost_volume(**sizes)))


def test_length_does_not_matter_and_cosines_stay_within_one(rng: torch.Generator) -> None:
    image = torch.randn(2, 4, 5, 8, generator=rng, dtype=torch.float64)
    text = torch.randn(6, 2, 8, generator=rng, dtype=torch.float64)
    volume = ops.cost_volume(image, text)
    assert volume.abs().max() <= 1 + 1e-12
    assert relative_error(ops.cost_volume(1e-3 * image, 1e4 * text), volume) <= REWRITE_FLOAT64


def test_a_vector_without_length_gives_zero_and_a_finite_gradient(rng: torch.Generator) -> None:
    image, text = torch.randn(1, 2, 2, 8, generator=rng), torch.randn(3, 1, 8, generator=rng)
    image[0, 1, 0] = 0
    image.requires_grad_()
    volume = ops.cost_volume(image, text)
    assert torch.equal(volume[0, :, 1, 0], torch.zeros(3, 1))
    volume.sum().backward()
    assert image.grad is not None
    assert image.grad.isfinite().all()
