"""Cascade head: the published head's numbers, and the literal form at other sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call

import literal
from counterparts import assert_equal_functions
from goldens import CASCADE_RULES, DEVICE, cascade_inputs, filled, golden, layer_state, published_state, shapes
from ovseg_fast import ops
from ovseg_fast.layers.cascade_head import CascadeHead, DecoderLayer
from tolerances import GOLDEN_OUTPUT, REWRITE_FLOAT64, relative_error

PREFIX = "decode_head."


def published() -> CascadeHead:
    head = CascadeHead(512, (3, 3, 1), layers=3, heads=8, hidden=2048, dropout=0.1)
    head.load_state_dict(layer_state(CASCADE_RULES, filled("cascade_clip_vitb", PREFIX, "E")))
    return head.eval().to(DEVICE)


def resized(masks: Tensor) -> Tensor:
    """(B, T, S) -> (B, T, 512, 512)."""
    return F.interpolate(masks.unflatten(-1, (32, 32)), (512, 512), mode="bilinear", align_corners=False)


@torch.no_grad()
def test_golden_scores_of_every_layer() -> None:
    case, head = golden("cascade_clip"), published()
    features, image, text = cascade_inputs()
    relation = torch.cat([image[:, None] * text, text.expand(2, -1, -1)], -1)
    for stage, memory in enumerate(head.aggregate(features)):
        queries = head.query_projections[stage](relation)
        for number, layer in enumerate(head.decoders[stage].layers):
            assert isinstance(layer, DecoderLayer)
            scores = layer.scores(queries, memory)
            assert case.error(f"head_eval.stage{stage}.layer{number}.scores", scores) <= GOLDEN_OUTPUT
            queries = layer(queries, memory)


@pytest.mark.slow_in_interpreter
@pytest.mark.usefixtures("every_backend")
@torch.no_grad()
def test_golden_masks() -> None:
    case, head = golden("cascade_clip"), published()
    features, image, text = cascade_inputs()
    stages = head.aggregate(features)
    assert case.error("head_eval.pred_masks", resized(head(stages, image, text))) <= GOLDEN_OUTPUT
    seen = resized(head(stages, image, text[case.facts["seen"]]))
    assert case.error("head_train.pred_masks", seen) <= GOLDEN_OUTPUT


def test_what_the_method_never_reads_gets_no_gradient() -> None:
    """As published: of the last layers only what makes the scores is trained."""
    case, head = golden("cascade_clip"), published()
    features, image, text = cascade_inputs()
    head(head.aggregate(features), image, text[case.facts["seen"]]).sum().backward()
    names = [name.removeprefix(PREFIX) for name in shapes("cascade_clip_vitb") if name.startswith(PREFIX)]
    parameters = published_names(dict(head.named_parameters()), names)
    untrained = {name for name, parameter in parameters.items() if parameter.grad is None}
    ignored = {name for name in case.facts["head_train.grads"]["grad_none"] if ".self_attn." not in name}
    assert untrained == {name for name in ignored if ".norm1." not in name}


def published_names(parameters: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    return published_state(CASCADE_RULES, [name for name in names if "empty_weight" not in name], parameters)


# --- other sizes ---


class AggregatedHead(torch.nn.Module):
    """Aggregation and decoders in one call."""

    def __init__(self, head: CascadeHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, features: Tensor, image: Tensor, text: Tensor) -> Tensor:
        return self.head(self.head.aggregate(features), image, text)


@settings(max_examples=20)
@given(
    sizes=st.fixed_dictionaries(
        {
            "batch": st.integers(1, 2),
            "classes": st.integers(1, 5),
            "height": st.integers(1, 4),
            "width": st.integers(1, 4),
            "heads": st.integers(1, 3),
            "layers": st.integers(1, 3),
        }
    )
)
def test_rewrite(sizes: dict[str, int]) -> None:
    channels = 4 * sizes["heads"]
    head = CascadeHead(channels, (3, 3, 1), sizes["layers"], sizes["heads"], hidden=7, dropout=0.3).double().eval()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, 0.2, 0.5)
    names = [name.removeprefix(PREFIX) for name in shapes("cascade_clip_vitb") if name.startswith(PREFIX)]
    unused = {name: tensor for name, tensor in head.state_dict().items() if ".unused." in name}

    def ours(state: dict[str, Tensor], features: Tensor, image: Tensor, text: Tensor) -> Tensor:
        prefixed = {f"head.{name}": tensor for name, tensor in state.items()}
        return functional_call(AggregatedHead(head), prefixed, (features, image, text))

    def theirs(state: dict[str, Tensor], features: Tensor, image: Tensor, text: Tensor) -> Tensor:
        weights = published_names({**state, **unused}, names)
        maps = [layer.transpose(1, 2).unflatten(2, (sizes["height"], sizes["width"])) for layer in features]
        return literal.cascade_masks(weights, maps, image, text, sizes["heads"]).flatten(2)

    def unit(*shape: int) -> Tensor:
        return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)

    call: dict[str, Any] = {
        "state": {name: parameter.detach() for name, parameter in head.named_parameters()},
        "features": unit(7, sizes["batch"], sizes["height"] * sizes["width"], channels),
        "image": unit(sizes["batch"], channels),
        "text": unit(sizes["classes"], channels),
    }
    assert_equal_functions(((), call), ours, theirs)


def small(dropout: float) -> tuple[CascadeHead, tuple[list[Tensor], Tensor, Tensor]]:
    head = CascadeHead(8, (2, 3, 1), layers=2, heads=2, hidden=16, dropout=dropout).double()
    features = torch.randn(6, 2, 9, 8, dtype=torch.float64)
    return head, (head.aggregate(features), torch.randn(2, 8).double(), torch.randn(4, 8).double())


def test_dropout_works_in_training_only() -> None:
    head, inputs = small(0.5)
    assert relative_error(head(*inputs), head(*inputs)) > 1e-3
    head.eval()
    assert torch.equal(head(*inputs), head(*inputs))
    without, _ = small(0.0)
    without.load_state_dict(head.state_dict())
    assert torch.equal(without.train()(*inputs), head(*inputs))


def test_classes_and_images_do_not_see_each_other() -> None:
    head, (stages, image, text) = small(0.0)
    masks = head(stages, image, text)
    for t in range(4):
        assert relative_error(head(stages, image, text[t : t + 1]), masks[:, t : t + 1]) <= REWRITE_FLOAT64
    second = [maps[1:] for maps in stages]
    assert relative_error(head(second, image[1:], text), masks[1:]) <= REWRITE_FLOAT64


def test_the_last_layers_values_are_never_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    head, inputs = small(0.0)
    calls = []
    whole, scores = ops.mask_attention, ops.mask_scores
    monkeypatch.setattr(ops, "mask_attention", lambda *a, **k: calls.append("whole") or whole(*a, **k))
    monkeypatch.setattr(ops, "mask_scores", lambda *a, **k: calls.append("scores") or scores(*a, **k))
    head(*inputs)
    assert calls == ["whole", "scores"] * 3
