"""What every kernel promises, Triton's and CUDA C++ alike, over the one table of sample inputs.

On a machine with a GPU the kernels run there. Elsewhere Triton's interpreter and the emulator of csrc run them on the
CPU: they tell whether their numbers are right, not whether a GPU takes them, for which see test_resources.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ovseg_fast as ovs
import samples
from layouts import LAYOUTS
from ovseg_fast import backends, ops
from samples import Sample, floating, map_floating, map_tensors, select, tensors
from test_operators import assert_same, gradients
from tolerances import KERNEL, KERNEL_GRADIENT_FACTOR, relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIBRARY_ONLY = {"embed_volume", "guidance_term"}  # a library convolution each, and nothing around it
# Operators whose CUDA C++ kernels take the published widths only.
WIDE_ONLY = {"class_aggregation", "spatial_aggregation"}


def takes(backend: str, row: Sample) -> bool:
    """Whether a backend's kernels are tried on a row: the wide ones cost Triton's interpreter too much."""
    if row.operator not in backends.operators_with_kernels(backend) or row.function in LIBRARY_ONLY:
        return False
    if backend == "triton":
        return DEVICE == "cuda" or "wide" not in row.tags
    return row.operator not in WIDE_ONLY or "wide" in row.tags


# Backend and row.
CASES = [(name, row) for name in ("triton", "cuda") for row in select(without=("bench",)) if takes(name, row)]
FUNCTIONS = sorted({(name, row.function) for name, row in CASES})
DIFFERENTIABLE = {row.function for _, row in CASES if row.operator != "label_map"}


def cases(*tags: str, differentiable: bool = False) -> pytest.MarkDecorator:
    """Runs a test for every case with one of the tags; on demand only for those that have gradients."""
    chosen = [
        pytest.param(name, row, id=f"{name}-{row.id}")
        for name, row in CASES
        if row.tags & set(tags) and (not differentiable or row.function in DIFFERENTIABLE)
    ]
    return pytest.mark.parametrize(("backend", "row"), chosen)


def first_row(backend: str, function: str, tag: str) -> Sample:
    return next(row for name, row in CASES if (name, row.function) == (backend, function) and tag in row.tags)


@pytest.fixture(autouse=True)
def _emulation(request: pytest.FixtureRequest) -> None:
    if request.node.callspec.params["backend"] == "cuda":
        request.getfixturevalue("emulation")


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_every_function_with_kernels_has_cases(backend: str) -> None:
    """An operator without wide rows would drop out of all that follows, and nothing would say so."""
    operators = backends.operators_with_kernels(backend)
    expected = {row.function for row in select() if row.operator in operators} - LIBRARY_ONLY
    assert {function for name, function in FUNCTIONS if name == backend} == expected


# Gradients that are zero in exact arithmetic hold rounding noise, which is compared with another gradient of the call.
# Softmax does not see a bias that all its scores share; one key alone gets all the attention whatever its score. Rows
# by how their ids begin; the last one that fits counts.
CANCELLED = {
    "spatial_aggregation": {"k_bias": "k_weight"},
    "mask_attention": {"k_bias": "k_weight"},
    "class_aggregation-full attention": {"k_bias": "k_weight"},
    **dict.fromkeys(
        ("spatial_aggregation-one patch", "class_aggregation-one class alone"),
        dict.fromkeys(("guidance", "q_weight", "q_bias", "k_weight", "k_bias"), "v_weight"),
    ),
    "mask_attention-one class, one patch": dict.fromkeys(
        ("queries", "q_weight", "q_bias", "k_weight", "k_bias"), "v_weight"
    ),
}

# Operators that take their inputs as they are under autocast, as PyTorch's own losses take them in float32.
WITHOUT_AUTOCAST = {"mask_losses"}

# ReLU has no derivative at 0: where rounding decides the side of an input, either gradient is right. Low precision does
# so often; there a larger bias moves the inputs away from 0.
RELU_BIASES = {"class_aggregation": ("fc1_bias",)}
RELU_DISTANCE = 4.0  # beyond what the standard normal inputs reach except about once in 30,000

# Where rounding carries a number over ReLU's zero, its gradient jumps. The gradients of these operators are compared by
# tests of their own, with ReLU deciding alike on both sides.
DECIDING = {"upsampling_decoder"}


def on(backend: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with its operators forced to one backend."""

    @functools.wraps(function)
    def forced(*arguments: Any, **keywords: Any) -> Any:
        with ovs.backend(backend):
            return function(*arguments, **keywords)

    return forced


@pytest.fixture
def poisoned() -> Any:
    """Memory that a launcher allocates holds NaN until a kernel writes it."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # PyTorch then fills uninitialised memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def build(row: Sample, rng: torch.Generator, dtype: torch.dtype) -> tuple[samples.Call, samples.Call]:
    """A call for the kernel, and the same numbers in float64 for the PyTorch form."""
    call = row.build(rng, dtype, DEVICE)
    if dtype != torch.float32:
        for name in RELU_BIASES.get(row.function, ()):
            bias = samples.arguments(row.function, call)[name]
            bias += RELU_DISTANCE * bias.sign()
            bias[::2] *= bias[::2].sign()  # some are let through
    return call, map_floating(torch.Tensor.double, call)


def layer(name: str, dtype: torch.dtype) -> str:
    """Which gradients are compared as one: in low precision those of a layer's weight and bias, and those of the
    padding class.

    The few numbers of a bias, each a sum over all rows, may happen to nearly vanish, where a relative error says
    nothing. float32 tells the two apart.
    """
    return name if dtype == torch.float32 else re.sub("_(weight|bias|token|guidance)$", "", name)


def check_gradients(
    names: Sequence[str],
    results: Sequence[torch.Tensor],
    truths: Sequence[torch.Tensor],
    dtype: torch.dtype,
    cancelled: Mapping[str, str] = MappingProxyType({}),
) -> None:
    together: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for name, result, truth in zip(names, results, truths, strict=True):
        assert result.shape == truth.shape, name
        assert result.dtype == dtype, name
        together.setdefault(layer(name, dtype), []).append((result.double().flatten(), truth.flatten()))
    parts = {name: [torch.cat(part) for part in zip(*pairs, strict=True)] for name, pairs in together.items()}
    scales = {layer(name, dtype): parts[layer(other, dtype)][1].norm() for name, other in cancelled.items()}
    for name, (result, truth) in parts.items():
        scale = scales.get(name, truth.norm())
        assert float((result - truth).norm()) <= KERNEL_GRADIENT_FACTOR * KERNEL[dtype] * float(scale), name


# In the interpreter the rows of many classes, which are there for the counting, take one precision.
PRECISIONS = [
    pytest.param(name, row, dtype, id=f"{name}-{row.id}-{dtype}")
    for name, row in CASES
    for dtype in (torch.float32, torch.float16, torch.bfloat16)
    if DEVICE == "cuda" or dtype == torch.float32 or "many-classes" not in row.tags
]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("backend", "row", "dtype"), PRECISIONS)
def test_kernel_follows_float64(backend: str, row: Sample, dtype: torch.dtype, rng: torch.Generator) -> None:
    """Results and gradients, out of poisoned memory."""
    call, wide = build(row, rng, dtype)
    with ovs.backend(backend):
        results = row.run(call)
        assert ovs.last_backend(row.operator) == backend
        assert_same(row, wide, results, on("torch", row.run)(wide), KERNEL[dtype])
        if row.function in DIFFERENTIABLE and row.operator not in DECIDING:
            names = [
                f"{name} {place}".removesuffix(" 0")
                for name, value in samples.arguments(row.function, call).items()
                for place, _ in enumerate(floating(value))
            ]
            zero = [names for start, names in CANCELLED.items() if row.id.startswith(start)]
            truths = on("torch", gradients)(row, wide)
            check_gradients(names, gradients(row, call), truths, dtype, *zero[-1:])


@pytest.mark.parametrize("layout", LAYOUTS)
@cases("odd")
def test_layout_of_the_inputs_does_not_matter(backend: str, row: Sample, layout: str, rng: torch.Generator) -> None:
    """But for rounding: PyTorch's own products, which project the guidance, may sum another layout in another order."""
    call, _ = build(row, rng, torch.float32)
    rearranged = map_tensors(LAYOUTS[layout], call)
    with ovs.backend(backend):
        for result, truth in zip(tensors(row.run(rearranged)), tensors(row.run(call)), strict=True):
            if row.operator == "label_map":
                assert torch.equal(result, truth)
            else:
                assert relative_error(result, truth) <= KERNEL[torch.float32]


def expanded(tensor: torch.Tensor) -> torch.Tensor:
    """One number for all elements, as the gradient of a sum is."""
    return tensor.flatten()[0].expand(tensor.shape)


@pytest.mark.parametrize("layout", [*LAYOUTS.values(), expanded])
@pytest.mark.parametrize(("backend", "function"), [case for case in FUNCTIONS if case[1] in DIFFERENTIABLE])
def test_layout_of_the_gradient_does_not_matter(
    backend: str, function: str, layout: Callable[[torch.Tensor], torch.Tensor], rng: torch.Generator
) -> None:
    """But for rounding: PyTorch's own sums, such as those of a bias, may take another layout in another order."""
    row = first_row(backend, function, "small")
    call, _ = build(row, rng, torch.float32)
    leaves = map_floating(lambda tensor: tensor.requires_grad_(), call)
    with ovs.backend(backend):
        outputs = tensors(row.run(leaves))
        grads = [layout(torch.randn(output.shape, generator=rng).to(DEVICE)) for output in outputs]
        results, truths = (
            torch.autograd.grad(outputs, floating(leaves), given, retain_graph=True, materialize_grads=True)
            for given in (grads, [grad.contiguous() for grad in grads])
        )
    largest = max(float(truth.norm()) for truth in truths)
    for result, truth in zip(results, truths, strict=True):
        assert float((result - truth).norm()) <= KERNEL[torch.float32] * largest


@cases("odd")
def test_runs_repeat_bit_by_bit_and_leave_the_inputs_alone(backend: str, row: Sample, rng: torch.Generator) -> None:
    call, _ = build(row, rng, torch.float32)
    before = map_tensors(torch.clone, call)
    with ovs.backend(backend):
        runs = [
            [*tensors(row.run(call)), *(gradients(row, call) if row.function in DIFFERENTIABLE else [])]
            for _ in range(2)
        ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(tensors(call), tensors(before), strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("backend", "function"), [case for case in FUNCTIONS if case[1] != "label_map"])
def test_nan_and_infinity_come_out_where_pytorch_has_them(
    backend: str, function: str, value: float, rng: torch.Generator
) -> None:
    """One element of one argument at a time, at a random place. Labels alone cannot tell, see test_label_map."""
    row = first_row(backend, function, "odd")
    call, _ = build(row, rng, torch.float32)
    came_out = False
    for argument in range(len(floating(call))):
        bad = map_tensors(torch.clone, call)
        target = floating(bad)[argument].view(-1)
        target[torch.randint(target.numel(), (1,), generator=rng)] = value
        results, truths = (tensors(on(name, row.run)(bad)) for name in (backend, "torch"))
        for result, truth in zip(results, truths, strict=True):
            assert torch.equal(result.isfinite(), truth.isfinite()), argument
            came_out |= not bool(truth.isfinite().all())
    assert came_out or not math.isnan(value)


class CustomCalls(TorchDispatchMode):
    """Keeps the arguments of the first call of each custom operator."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[Any, tuple[Any, ...]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        if function.namespace == "ovseg_fast":
            self.calls.setdefault(function, arguments)
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize(("backend", "function"), FUNCTIONS)
def test_custom_operators_pass_opcheck(backend: str, function: str, rng: torch.Generator) -> None:
    """Schema, fake, autograd registration and tracing with dynamic sizes, of forward and backward alike."""
    rows = [row for name, row in CASES if (name, row.function) == (backend, function) and "small" in row.tags]
    with ovs.backend(backend), CustomCalls() as seen:
        for row in rows:  # not all of them need all operators: maps of full size are not resized
            call, _ = build(row, rng, torch.float32)
            if function in DIFFERENTIABLE:
                gradients(row, call)
            else:
                row.run(call)
    assert seen.calls
    assert (function in DIFFERENTIABLE) == any(operator.name().endswith("_backward") for operator in seen.calls)
    for operator, arguments in seen.calls.items():
        differentiable = not operator.name().endswith("_backward") and function in DIFFERENTIABLE
        arguments = map_tensors(torch.Tensor.detach, tuple(arguments))
        for tensor in tensors(arguments):
            tensor.requires_grad_(differentiable and tensor.is_floating_point())
        torch.library.opcheck(operator, arguments, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("backend", "function"), FUNCTIONS)
def test_compiles_as_one_graph_with_dynamic_sizes(backend: str, function: str, rng: torch.Generator) -> None:
    left_out = {"empty", "one-class", "many-classes"}
    rows = [row for case, row in CASES if (case, row.function) == (backend, function) and not row.tags & left_out]
    rows.sort(key=lambda row: "small" not in row.tags)  # they come first
    torch.compiler.reset()
    compiled = torch.compile(getattr(ops, function), fullgraph=True, dynamic=True, backend="aot_eager")

    def results_and_gradients(run: Callable[..., Any], call: samples.Call) -> list[torch.Tensor]:
        leaves = map_floating(lambda tensor: tensor.clone().requires_grad_(function in DIFFERENTIABLE), call)
        results = tensors(run(*leaves[0], **leaves[1]))
        if function not in DIFFERENTIABLE:
            return results
        total = sum(result.square().sum() for result in results)
        return [*results, *torch.autograd.grad(total, floating(leaves), materialize_grads=True)]

    with ovs.backend(backend):
        for row in rows[:2]:
            call, _ = build(row, rng, torch.float32)
            found, expected = (results_and_gradients(run, call) for run in (compiled, getattr(ops, function)))
            for result, truth in zip(found, expected, strict=True):
                assert torch.allclose(result, truth, rtol=1e-5, atol=1e-5 * float(truth.abs().max()))
    assert ovs.last_backend(rows[0].operator) == backend


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@cases("small", differentiable=True)
def test_autocast_gives_what_the_low_precision_gives(
    backend: str, row: Sample, dtype: torch.dtype, rng: torch.Generator
) -> None:
    call, _ = build(row, rng, torch.float32)
    expected_dtype = torch.float32 if row.operator in WITHOUT_AUTOCAST else dtype
    low = map_floating(lambda tensor: tensor.to(expected_dtype), call)
    with ovs.backend(backend):
        expected = row.run(low)
        with torch.autocast(DEVICE, dtype):
            results = row.run(call)
    for result, truth in zip(tensors(results), tensors(expected), strict=True):
        assert result.dtype == expected_dtype
        assert torch.equal(result, truth)


@pytest.mark.parametrize(("backend", "function"), FUNCTIONS)
def test_what_the_kernels_do_not_take_is_refused_where_they_are_forced(
    backend: str, function: str, rng: torch.Generator
) -> None:
    row = first_row(backend, function, "small")
    call = row.build(rng, torch.float64, DEVICE)
    with ovs.backend(backend), pytest.raises(RuntimeError, match=f"{row.operator}: the {backend} backend .* float64"):
        row.run(call)
    with ovs.backend("auto"):
        row.run(call)
    assert ovs.last_backend(row.operator) == "torch"


@pytest.mark.parametrize("backend", ["cuda"])
@pytest.mark.parametrize(
    "row", [row for row in select(without=("bench", "wide")) if row.operator in WIDE_ONLY], ids=lambda row: row.id
)
def test_widths_without_a_kernel_are_refused_where_it_is_forced(
    backend: str, row: Sample, rng: torch.Generator
) -> None:
    """The rows that `takes` leaves out, each for what its kernel does not take."""
    call = row.build(rng, torch.float32, DEVICE)
    expected = "linear attention, not full" if call[1].get("attention") == "full" else "128 channels in 4 heads"
    with ovs.backend(backend), pytest.raises(RuntimeError, match=f"{row.operator}: the cuda .*{expected}"):
        row.run(call)
