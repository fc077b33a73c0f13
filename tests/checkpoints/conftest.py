"""Models to save and load."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from checkpoints.common import TINY, build_random
from ovseg_fast.models import build


@pytest.fixture(params=TINY)
def model(request: pytest.FixtureRequest, rng: torch.Generator) -> nn.Module:
    return build_random(request.param, rng)


@pytest.fixture
def other(model: nn.Module) -> nn.Module:
    """A second model of the same make with other weights."""
    return build(model.preset).eval()
