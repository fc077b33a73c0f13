"""Upsampling decoder: golden numbers and the literal form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import samples
from counterparts import assert_equal_functions, decoder_stage
from goldens import STAGE, assert_gradients, to_operator
from ovseg_fast import ops


def stage(x: Tensor, guidance: Tensor, up_bias: Tensor, **weights: Any) -> Tensor:
    """One stage from projected guidance."""
    term = ops.guidance_term(guidance, up_bias, weights["conv1_weight"])
    return ops.upsampling_decoder(x, term, **weights, groups=len(weights["norm1_bias"]) // 16)


def draw_stage(
    *, batch: int = 1, classes: int, height: int, width: int, channels: int, up: int, guidance: int, out: int
) -> dict[str, Tensor]:
    """Arguments of `stage`."""
    sizes = {"batch": batch, "height": height, "width": width, "up": up, "guidance": guidance, "out": out}
    (projected, up_bias, _), _ = samples.draw(samples.guidance_term(**sizes))
    call = samples.draw(samples.upsampling_decoder(classes=classes, channels=channels, groups=1, **sizes))
    named = samples.arguments("upsampling_decoder", call)
    del named["term"], named["groups"]
    return {"guidance": projected, "up_bias": up_bias, **named}


def test_golden() -> None:
    """Both stages, with the projections of the guidance before and the convolution to logits after them."""

    def decoded(leaves: Mapping[str, Tensor]) -> Tensor:
        x = leaves["in.x"].permute(0, 2, 3, 4, 1)
        for number in (1, 2):
            name = f"decoder_guidance_projection.{number - 1}.0"
            projected = F.conv2d(leaves[f"in.g{number}"], leaves[f"{name}.weight"], leaves[f"{name}.bias"], padding=1)
            x = stage(x, F.relu(projected).permute(0, 2, 3, 1), **to_operator(STAGE, leaves, f"decoder{number}."))
        logits = F.conv2d(x.flatten(0, 1).permute(0, 3, 1, 2), leaves["head.weight"], leaves["head.bias"], padding=1)
        return logits.squeeze(1).unflatten(0, (2, 3))

    assert_gradients("decoder", decoded)


@settings(max_examples=40)
@given(
    sizes=st.fixed_dictionaries(
        {
            "batch": st.integers(1, 2),
            "classes": st.integers(1, 4),
            "height": st.integers(1, 6),
            "width": st.integers(1, 6),
            "channels": st.integers(1, 9),
            "up": st.integers(1, 9),
            "guidance": st.integers(1, 5),
            "out": st.sampled_from([16, 32, 48]),  # published group norms have a group for 16 channels
        }
    )
)
def test_rewrite(sizes: dict[str, int]) -> None:
    assert_equal_functions(((), draw_stage(**sizes)), stage, lambda **call: decoder_stage(**call).result())


def test_bias_of_the_first_convolution_ends_at_the_border(rng: torch.Generator) -> None:
    """Where the window of the 3 × 3 convolution reaches beyond the map, fewer of its taps see the bias."""
    (guidance, up_bias, weight), _ = samples.guidance_term(height=2, width=2)(samples.Draw(rng, torch.float64, "cpu"))
    term = ops.guidance_term(torch.zeros_like(guidance), up_bias, weight)[0]
    taps = torch.einsum("duij,u->dij", weight[:, : len(up_bias)], up_bias)
    torch.testing.assert_close(term[1, 1], taps.sum((1, 2)))
    torch.testing.assert_close(term[0, 0], taps[:, 1:, 1:].sum((1, 2)))
    torch.testing.assert_close(term[3, 1], taps[:, :2, :].sum((1, 2)))


def test_nan_comes_out_where_the_formula_has_it(rng: torch.Generator) -> None:
    call = draw_stage(batch=2, classes=2, height=3, width=3, channels=4, up=3, guidance=2, out=16)
    for name, tensor in call.items():
        bad = tensor.clone()
        bad.view(-1)[torch.randint(bad.numel(), (1,), generator=rng)] = float("nan")
        result = stage(**{**call, name: bad})
        truth = decoder_stage(**{**call, name: bad}).result()
        assert truth.isnan().any()
        assert torch.equal(result.isnan(), truth.isnan()), name


def test_classes_do_not_see_each_other() -> None:
    call = draw_stage(classes=4, height=3, width=2, channels=5, up=3, guidance=2, out=16)
    x = call.pop("x")
    torch.testing.assert_close(stage(x, **call), torch.cat([stage(x[:, t : t + 1], **call) for t in range(4)], 1))
