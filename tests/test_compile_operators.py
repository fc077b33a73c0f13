"""Every operator in PyTorch form as one graph, torch.compile(fullgraph=True): each sample row, forward and backward.

`aot_eager` traces the backward as well, without the code generation, which is PyTorch's and takes minutes. test_kernels
does the same for kernels, models/test_compile for whole models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

import samples
from ovseg_fast import ops
from samples import Sample, floating, map_floating, select, tensors
from test_operators import LABELS, ROWS, row_id
from tolerances import REWRITE_FLOAT64


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def results_and_gradients(row: Sample, run: Callable, call: samples.Call) -> list[torch.Tensor]:
    differentiable = row.function not in LABELS
    leaves = map_floating(lambda tensor: tensor.clone().requires_grad_(differentiable), call)
    results = tensors(run(*leaves[0], **leaves[1]))
    if not differentiable:
        return results
    total = sum(result.square().sum() for result in results)
    return [*results, *torch.autograd.grad(total, floating(leaves), materialize_grads=True)]


def check(row: Sample, rng: torch.Generator, compiler: str, dynamic: bool) -> None:
    """In float64 rounding cannot hide anything, nor carry an input of ReLU to the other side of 0."""
    call, function = row.build(rng, torch.float64), getattr(ops, row.function)
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=compiler)
    found, expected = (results_and_gradients(row, run, call) for run in (compiled, function))
    largest = max((float(truth.detach().abs().max()) for truth in expected if truth.numel()), default=0.0)
    for result, truth in zip(found, expected, strict=True):
        assert torch.allclose(result, truth, rtol=REWRITE_FLOAT64, atol=REWRITE_FLOAT64 * largest)


@pytest.mark.parametrize("row", ROWS, ids=row_id)
def test_compiles_with_fixed_sizes(row: Sample, rng: torch.Generator) -> None:
    check(row, rng, "aot_eager", dynamic=False)


# One row of each kind, which takes seconds; the others are slow together.
QUICK = {"small", "full attention, small"}


@pytest.mark.parametrize(
    "row", [pytest.param(row, id=row.id, marks=[] if row.name in QUICK else pytest.mark.slow) for row in ROWS]
)
def test_compiles_with_dynamic_sizes(row: Sample, rng: torch.Generator) -> None:
    if row.function == "upsampling_decoder" and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
        pytest.skip("torch 2.8 traces no gradient of group_norm with a symbolic number of channels; torch 2.11 does")
    check(row, rng, "aot_eager", dynamic=True)


@pytest.mark.slow
@pytest.mark.parametrize("row", select("small", without=("bench", "wide")), ids=row_id)
def test_the_code_that_the_compiler_generates_is_right(row: Sample, rng: torch.Generator) -> None:
    check(row, rng, "inductor", dynamic=False)
