"""What tests of checkpoints share."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ovseg_fast.checkpoints import CheckpointError
from ovseg_fast.models import build

TINY = ("catseg-tiny", "cascade-clip-tiny")
CATSEG_PREFIX = "sem_seg_head.predictor."
STATE = {"layer.weight": torch.linspace(-1, 1, 4000).view(50, 80), "layer.bias": torch.ones(50)}


def build_empty(name: str) -> nn.Module:
    """A model without the time that random initialisation takes; its weights are whatever lies in the memory."""
    with torch.device("meta"):
        model = build(name)
    return model.to_empty(device="cpu")


def build_random(name: str, rng: torch.Generator) -> nn.Module:
    """A model in which no tensor is constant, so that mixed-up tensors are noticed."""
    model = build(name).eval()
    for tensor in model.state_dict().values():
        tensor.normal_(generator=rng)
    return model


def copy_of(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: tensor.clone() for key, tensor in state.items()}


def assert_same(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(state) == set(expected)
    for key, tensor in expected.items():
        assert state[key].shape == tensor.shape and state[key].dtype == tensor.dtype, key
        assert torch.equal(state[key], tensor), key


def refused(call, *arguments) -> CheckpointError:
    """The error of a call, whose first line is one sentence."""
    with pytest.raises(CheckpointError) as caught:
        call(*arguments)
    sentence = str(caught.value).splitlines()[0]
    assert sentence.endswith(".") and "Traceback" not in sentence and len(sentence) < 400
    return caught.value
