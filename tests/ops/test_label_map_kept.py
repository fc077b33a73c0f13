"""Label maps of classes that few windows kept: the CPU kernels compute only the columns of these windows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import ovseg_fast as ovs
from ovseg_fast import native, ops
from test_kernels import ISAS

LEFTS = [0, 30, 60, 100, 140, 180, 200]  # of windows of 40 columns; no column lies in more than two
NAMES, KEPT = 60, 5


@pytest.fixture(params=ISAS)
def instruction_set(request: pytest.FixtureRequest, cpu_library: Path) -> Iterator[None]:
    library, before = native.library("cpu"), native.isa()
    if library.ovseg_cpu_choose(request.param.encode()):
        pytest.skip("this machine has no such instruction set")
    with ovs.backend("cpu"):
        yield
    library.ovseg_cpu_choose(before.encode())


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("size", [(16, 240), (33, 517), (7, 101), (9, 40)])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("offset", [False, True])
def test_kept_logits_give_what_all_logits_give_on_a_wide_map(
    size: tuple[int, int], whole: bool, offset: bool, rng: torch.Generator
) -> None:
    logits = 3 * torch.randn(len(LEFTS) + 1, KEPT, 5, 9, generator=rng)
    classes = torch.rand(len(logits), NAMES, generator=rng).argsort(1)[:, :KEPT].sort().values
    maps, last = (ops.KeptLogits(logits[part], classes[part], NAMES, -100.0) for part in (slice(-1), slice(-1, None)))
    placement = ops.Placement([(0, left) for left in LEFTS], (16, 40), (16, 240), size)
    lowered = torch.randint(0, 2, (NAMES,), generator=rng) / 8 if offset else None  # their mean is exact
    few = {"whole": last if whole else None, "offset": lowered}
    every = {"whole": last.dense() if whole else None, "offset": lowered}
    assert torch.equal(ops.label_map(maps, placement, **few), ops.label_map(maps.dense(), placement, **every))
    for ours, expected in zip(
        (*ops.top_labels(maps, placement, k=3, **few), ops.score_map(maps, placement, **few)),
        (*ops.top_labels(maps.dense(), placement, k=3, **every), ops.score_map(maps.dense(), placement, **every)),
        strict=True,
    ):
        torch.testing.assert_close(ours, expected)
