"""Spatial pair, whole aggregation layer and decoder: the published numbers with all gradients."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from goldens import AGGREGATOR_RULES, assert_gradients, layer_state
from ovseg_fast.layers.class_aggregation import ClassAggregation
from ovseg_fast.layers.cost_aggregator import AggregationLayer
from ovseg_fast.layers.spatial_aggregation import SpatialAggregation, SpatialBlock
from ovseg_fast.layers.upsampling_decoder import UpsamplingDecoder


def to_tokens(maps: Tensor) -> Tensor:
    """Upstream's (B, C, T, H, W) or (B, C, H, W) -> ours."""
    return maps.movedim(1, -1)


def test_spatial_pair() -> None:
    def pair(leaves: Mapping[str, Tensor]) -> Tensor:
        state = layer_state(AGGREGATOR_RULES, leaves, "layers.0.spatial.")
        inputs = to_tokens(leaves["in.x"]), to_tokens(leaves["in.guidance"])
        return functional_call(SpatialAggregation(128, 128, 4, 12), state, inputs, strict=True).movedim(-1, 1)

    assert_gradients("swin_pair", pair)


@pytest.mark.parametrize(("height", "width"), [(3, 3), (2, 5), (4, 3), (4, 4)])
def test_a_map_no_larger_than_the_window_has_windows_of_its_smaller_side(height: int, width: int) -> None:
    """As published, without shift."""
    block = SpatialBlock(8, 4, heads=2, window=4, shift=2)
    x, guidance = torch.randn(1, 2, height, width, 8), torch.randn(1, height, width, 4)
    expected = SpatialBlock(8, 4, heads=2, window=min(height, width), shift=0)
    expected.load_state_dict(block.state_dict())
    assert torch.equal(block(x, guidance), expected(x, guidance))


def test_whole_layer() -> None:
    def layer(leaves: Mapping[str, Tensor]) -> Tensor:
        state = layer_state(AGGREGATOR_RULES, leaves, "layers.1.")
        inputs = to_tokens(leaves["in.x"]), to_tokens(leaves["in.guidance"]), leaves["in.text_guidance"], 2
        return functional_call(AggregationLayer(128, 128, 4, 12, 256), state, inputs, strict=True).movedim(-1, 1)

    assert_gradients("layer", layer)


@pytest.mark.parametrize("op", ["class_pool2_t7", "class_pool1_t7"])
def test_classes(op: str) -> None:
    def classes(leaves: Mapping[str, Tensor]) -> Tensor:
        state = layer_state(AGGREGATOR_RULES, leaves, "layers.0.classes.")
        inputs = to_tokens(leaves["in.x"]), leaves["in.guidance"], 2 if "pool2" in op else 1
        return functional_call(ClassAggregation(128, 128, 4, 256), state, inputs, strict=True).movedim(-1, 1)

    assert_gradients(op, classes)


@pytest.mark.parametrize("tokens", [2304, 64])
def test_decoder(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All classes at once, and one at a time."""
    monkeypatch.setattr("ovseg_fast.ops.common.tiles.TILE_TOKENS", tokens)

    def decoder(leaves: Mapping[str, Tensor]) -> Tensor:
        state = layer_state(AGGREGATOR_RULES, leaves, "decoder.")
        inputs = to_tokens(leaves["in.x"]), [to_tokens(leaves["in.g1"]), to_tokens(leaves["in.g2"])]
        return functional_call(UpsamplingDecoder(128, (256, 128), (32, 16), (64, 32)), state, inputs, strict=True)

    assert_gradients("decoder", decoder)


def test_untrained_layers_pass_on_what_they_get() -> None:
    """Shapes only: nothing depends on the class count or the map's size."""
    layer = AggregationLayer(8, 4, 2, 3, 5)
    for classes, height, width in ((1, 1, 1), (7, 5, 4), (3, 2, 9)):
        x, guidance = torch.randn(2, classes, height, width, 8), torch.randn(2, height, width, 4)
        assert layer(x, guidance, torch.randn(classes, 4), 1).shape == x.shape
