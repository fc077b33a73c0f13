"""What every kernel promises, Triton's, CUDA C++ and those for CPUs alike, over the one table of sample inputs.

On a machine with a GPU the kernels for GPUs run there. Elsewhere Triton's interpreter and the emulator of csrc run them
on the CPU: they tell whether their numbers are right, not whether a GPU takes them, for which see test_resources. The
kernels for CPUs run as they are, on every instruction set that the machine has.
"""

from __future__ import annotations

import functools
import math
import platform
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ovseg_fast as ovs
import samples
from layouts import LAYOUTS
from ovseg_fast import backends, native, ops
from ovseg_fast.ops.upsampling_decoder import logit_map
from samples import Sample, floating, map_floating, map_tensors, select, tensors
from test_operators import assert_same, gradients
from tolerances import KERNEL, KERNEL_GRADIENT_FACTOR, relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIBRARY_ONLY = {"embed_volume", "guidance_term"}  # a library convolution each, and nothing around it
# Operators whose native kernels take some widths only, and the tags of the rows that have them.
SOME_WIDTHS = {"class_aggregation", "spatial_aggregation"}
WIDTHS = {"cuda": {"wide"}, "cpu": {"wide", "sixteens"}}
DTYPES = {"cpu": backends.CPU_DTYPES}  # of a backend; the others take all three
KERNELS = ("triton", "cuda", "cpu")


def takes(backend: str, row: Sample) -> bool:
    """Whether a backend's kernels are tried on a row: the wide ones cost Triton's interpreter too much."""
    if row.operator not in backends.operators_with_kernels(backend) or row.function in LIBRARY_ONLY:
        return False
    if backend == "triton":
        return DEVICE == "cuda" or not row.tags & {"wide", "sixteens"}
    return row.operator not in SOME_WIDTHS or bool(row.tags & WIDTHS[backend])


# Backend and row.
CASES = [(name, row) for name in KERNELS for row in select(without=("bench",)) if takes(name, row)]
FUNCTIONS = sorted({(name, row.function) for name, row in CASES})
CPU_FUNCTIONS = [function for name, function in FUNCTIONS if name == "cpu"]


def differentiable(function: str) -> bool:
    return samples.HELPERS.get(function, function) != "label_map"


def has_gradient(backend: str, function: str) -> bool:
    """Whether the kernels of a backend have the gradient of a function."""
    return backend != "cpu" and differentiable(function)


def device(backend: str) -> str:
    return "cpu" if backend == "cpu" else DEVICE


def cases(*tags: str) -> pytest.MarkDecorator:
    """Runs a test for every case with one of the tags."""
    chosen = [pytest.param(name, row, id=f"{name}-{row.id}") for name, row in CASES if row.tags & set(tags)]
    return pytest.mark.parametrize(("backend", "row"), chosen)


def with_dtypes(*tags: str) -> list[Any]:
    """Every case with one of the tags, or every case, in each dtype that the backend takes. In the interpreter the rows
    of many classes, which are there for the counting, take one precision."""
    return [
        pytest.param(name, row, dtype, id=f"{name}-{row.id}-{dtype}")
        for name, row in CASES
        if not tags or row.tags & set(tags)
        for dtype in DTYPES.get(name, backends.DTYPES)
        if DEVICE == "cuda" or name == "cpu" or dtype == torch.float32 or "many-classes" not in row.tags
    ]


def first_row(backend: str, function: str, tag: str) -> Sample:
    return next(row for name, row in CASES if (name, row.function) == (backend, function) and tag in row.tags)


@pytest.fixture(autouse=True)
def _library(request: pytest.FixtureRequest) -> None:
    backend = request.node.callspec.params.get("backend", "cpu")
    if fixture := {"cuda": "emulation", "cpu": "cpu_library"}.get(backend):
        request.getfixturevalue(fixture)


@pytest.mark.parametrize("backend", KERNELS)
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
# Kernels that are left aside under autocast, which test_encoder_block shows.
REFUSES_AUTOCAST = {("cpu", "encoder_block")}

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


def build(
    row: Sample, rng: torch.Generator, dtype: torch.dtype, backend: str = "triton"
) -> tuple[samples.Call, samples.Call]:
    """A call for the kernel, and the same numbers in float64 for the PyTorch form."""
    call = row.build(rng, dtype, device(backend))
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


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("backend", "row", "dtype"), with_dtypes())
def test_kernel_follows_float64(backend: str, row: Sample, dtype: torch.dtype, rng: torch.Generator) -> None:
    """Results and gradients, out of poisoned memory."""
    call, wide = build(row, rng, dtype, backend)
    with ovs.backend(backend):
        results = row.run(call)
        assert ovs.last_backend(row.operator) == backend
        assert_same(row, wide, results, on("torch", row.run)(wide), KERNEL[dtype])
        if has_gradient(backend, row.function) and row.operator not in DECIDING:
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
    call, _ = build(row, rng, torch.float32, backend)
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
@pytest.mark.parametrize(("backend", "function"), [case for case in FUNCTIONS if has_gradient(*case)])
def test_layout_of_the_gradient_does_not_matter(
    backend: str, function: str, layout: Callable[[torch.Tensor], torch.Tensor], rng: torch.Generator
) -> None:
    """But for rounding: PyTorch's own sums, such as those of a bias, may take another layout in another order."""
    row = first_row(backend, function, "small")
    call, _ = build(row, rng, torch.float32, backend)
    leaves = map_floating(lambda tensor: tensor.requires_grad_(), call)
    with ovs.backend(backend):
        outputs = tensors(row.run(leaves))
        grads = [layout(torch.randn(output.shape, generator=rng).to(output.device)) for output in outputs]
        results, truths = (
            torch.autograd.grad(outputs, floating(leaves), given, retain_graph=True, materialize_grads=True)
            for given in (grads, [grad.contiguous() for grad in grads])
        )
    largest = max(float(truth.norm()) for truth in truths)
    for result, truth in zip(results, truths, strict=True):
        assert float((result - truth).norm()) <= KERNEL[torch.float32] * largest


@cases("odd")
def test_runs_repeat_bit_by_bit_and_leave_the_inputs_alone(backend: str, row: Sample, rng: torch.Generator) -> None:
    call, _ = build(row, rng, torch.float32, backend)
    before = map_tensors(torch.clone, call)
    with ovs.backend(backend):
        runs = [
            [*tensors(row.run(call)), *(gradients(row, call) if has_gradient(backend, row.function) else [])]
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
    call, _ = build(row, rng, torch.float32, backend)
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
    with_gradient = has_gradient(backend, function)
    rows = [row for name, row in CASES if (name, row.function) == (backend, function) and "small" in row.tags]
    with ovs.backend(backend), CustomCalls() as seen:
        for row in rows:  # not all of them need all operators: maps of full size are not resized
            call, _ = build(row, rng, torch.float32, backend)
            if with_gradient:
                gradients(row, call)
            else:
                row.run(call)
    assert seen.calls
    assert with_gradient == any(operator.name().endswith("_backward") for operator in seen.calls)
    for operator, arguments in seen.calls.items():
        needed = with_gradient and not operator.name().endswith("_backward")
        arguments = map_tensors(torch.Tensor.detach, tuple(arguments))
        for tensor in tensors(arguments):
            tensor.requires_grad_(needed and tensor.is_floating_point())
        torch.library.opcheck(operator, arguments, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("backend", "function"), FUNCTIONS)
def test_compiles_as_one_graph_with_dynamic_sizes(backend: str, function: str, rng: torch.Generator) -> None:
    left_out, with_gradient = {"empty", "one-class", "many-classes"}, has_gradient(backend, function)
    rows = [row for case, row in CASES if (case, row.function) == (backend, function) and not row.tags & left_out]
    rows.sort(key=lambda row: "small" not in row.tags)  # they come first
    torch.compiler.reset()
    compiled = torch.compile(getattr(ops, function), fullgraph=True, dynamic=True, backend="aot_eager")

    def results_and_gradients(run: Callable[..., Any], call: samples.Call) -> list[torch.Tensor]:
        leaves = map_floating(lambda tensor: tensor.clone().requires_grad_(with_gradient), call)
        results = tensors(run(*leaves[0], **leaves[1]))
        if not with_gradient:
            return results
        total = sum(result.square().sum() for result in results)
        return [*results, *torch.autograd.grad(total, floating(leaves), materialize_grads=True)]

    with ovs.backend(backend):
        for row in rows[:2]:
            call, _ = build(row, rng, torch.float32, backend)
            found, expected = (results_and_gradients(run, call) for run in (compiled, getattr(ops, function)))
            for result, truth in zip(found, expected, strict=True):
                assert torch.allclose(result, truth, rtol=1e-5, atol=1e-5 * float(truth.abs().max()))
    assert ovs.last_backend(rows[0].operator) == backend


@pytest.mark.parametrize(
    ("backend", "row", "dtype"),
    [
        case
        for case in with_dtypes("small")
        if differentiable(case.values[1].function)
        and case.values[2] != torch.float32
        and (case.values[0], case.values[1].operator) not in REFUSES_AUTOCAST
    ],
)
def test_autocast_gives_what_the_low_precision_gives(
    backend: str, row: Sample, dtype: torch.dtype, rng: torch.Generator
) -> None:
    call, _ = build(row, rng, torch.float32, backend)
    expected_dtype = torch.float32 if row.operator in WITHOUT_AUTOCAST else dtype
    low = map_floating(lambda tensor: tensor.to(expected_dtype), call)
    with ovs.backend(backend):
        expected = row.run(low)
        with torch.autocast(device(backend), dtype):
            results = row.run(call)
    for result, truth in zip(tensors(results), tensors(expected), strict=True):
        assert result.dtype == expected_dtype
        assert torch.equal(result, truth)


@pytest.mark.parametrize(
    ("backend", "function", "dtype"),
    [
        *((*case, torch.float64) for case in FUNCTIONS),
        *(("cpu", function, torch.float16) for function in CPU_FUNCTIONS),
    ],
)
def test_dtypes_without_a_kernel_are_refused_where_it_is_forced(
    backend: str, function: str, dtype: torch.dtype, rng: torch.Generator
) -> None:
    row = first_row(backend, function, "small")
    call = row.build(rng, dtype, device(backend))
    name = str(dtype).removeprefix("torch.")
    with ovs.backend(backend), pytest.raises(RuntimeError, match=f"{row.operator}: the {backend} backend .* {name}"):
        row.run(call)
    with ovs.backend("auto"):
        row.run(call)
    assert ovs.last_backend(row.operator) == "torch"


@pytest.mark.parametrize(
    ("backend", "row"),
    [
        pytest.param(name, row, id=f"{name}-{row.id}")
        for name in ("cuda", "cpu")
        for row in select(without=("bench",))
        if row.operator in SOME_WIDTHS & {*backends.operators_with_kernels(name)} and not takes(name, row)
    ],
)
def test_widths_without_a_kernel_are_refused_where_it_is_forced(
    backend: str, row: Sample, rng: torch.Generator
) -> None:
    """The rows that `takes` leaves out, each for what its kernel does not take."""
    call = row.build(rng, torch.float32, device(backend))
    expected = "128 channels in 4 heads" if backend == "cuda" else "multiples of 16, not"
    if call[1].get("attention") == "full":
        expected = "linear attention, not full"
    with ovs.backend(backend), pytest.raises(RuntimeError, match=f"{row.operator}: the {backend} .*{expected}"):
        row.run(call)
    with ovs.backend("auto"):
        row.run(call)
    assert ovs.last_backend(row.operator) != backend


# --- kernels for CPUs alone ---


class LastConvolution(Sample):
    """Of the decoder; no function of `ops` by itself."""

    def run(self, call: samples.Call) -> torch.Tensor:
        return logit_map(*call[0])


def last_convolution(draw: samples.Draw) -> samples.Call:
    return (draw(2, 3, 5, 7, 16), draw.weight(1, 16, 3, 3), draw(1)), {}


def kept(draw: samples.Draw, **keywords: int) -> samples.Call:
    """Logits of 4 of 9 classes for each of four windows."""
    classes = torch.rand(4, 9, generator=draw.generator).argsort(1)[:, :4]
    positions = [(top, left) for top in (0, 13) for left in (0, 21)]
    placement = ops.Placement(positions, (20, 30), (33, 51), (41, 29))
    return (ops.KeptLogits(draw(4, 4, 5, 7), classes, 9, -3.0), placement), keywords


# What the table has no rows of, as the other backends have no kernels for it.
MORE_ROWS = [
    LastConvolution("upsampling_decoder", "last convolution", last_convolution, frozenset()),
    Sample("label_map", "kept", kept, frozenset()),
    Sample("score_map", "kept", kept, frozenset()),
    Sample("top_labels", "kept", functools.partial(kept, k=3), frozenset()),
]


def cpu_rows(function: str) -> list[Sample]:
    rows = [row for name, row in CASES if name == "cpu"] + MORE_ROWS
    return [row for row in rows if row.function == function]


def check_cpu_rows(function: str, dtype: torch.dtype, rng: torch.Generator) -> None:
    """The kernels follow float64 on all rows of a function."""
    for row in cpu_rows(function):
        call, wide = build(row, rng, dtype, "cpu")
        with ovs.backend("cpu"):
            results = row.run(call)
        assert_same(row, wide, results, on("torch", row.run)(wide), KERNEL[dtype])


@pytest.mark.parametrize("function", [function for function in CPU_FUNCTIONS if differentiable(function)])
def test_a_call_that_needs_a_gradient_goes_to_pytorch(function: str, rng: torch.Generator) -> None:
    """Of any one argument. Where the kernels are forced it is refused, in one sentence."""
    row = first_row("cpu", function, "small")
    call, _ = build(row, rng, torch.float32, "cpu")
    for argument in range(len(floating(call))):
        leaves = map_tensors(torch.clone, call)
        leaf = floating(leaves)[argument].requires_grad_()
        with (
            ovs.backend("cpu"),
            pytest.raises(RuntimeError, match=f"^{row.operator}: the cpu .* gradient[^.]*\\.") as no,
        ):
            row.run(leaves)
        assert "\n" not in str(no.value)
        results = tensors(row.run(leaves))
        assert ovs.last_backend(row.operator) == "torch"
        torch.autograd.grad(sum(result.sum() for result in results), leaf)
        with torch.no_grad():
            row.run(leaves)
        assert ovs.last_backend(row.operator) == "cpu"


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", backends.CPU_DTYPES, ids=str)
@pytest.mark.parametrize("function", CPU_FUNCTIONS)
def test_any_number_of_threads_gives_the_same_bits(function: str, dtype: torch.dtype, rng: torch.Generator) -> None:
    """More than there are tasks or cores, too. Of the kernels alone: PyTorch's own products may depend on it."""
    threads = torch.get_num_threads()
    try:
        for row in cpu_rows(function):
            call, _ = build(row, rng, dtype, "cpu")
            with ovs.backend("cpu"), CustomCalls() as seen:
                row.run(call)
            for operator, arguments in seen.calls.items():
                results = []
                for count in (1, 2, 3, 64):
                    torch.set_num_threads(count)
                    results.append(tensors(operator(*arguments)))
                for others in results[1:]:
                    assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True)), row.id
    finally:
        torch.set_num_threads(threads)


def misaligned(tensor: torch.Tensor) -> torch.Tensor:
    """The same tensor one number further in its storage, between numbers that are NaN or the largest."""
    filler = float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
    storage = tensor.new_full((tensor.numel() + 2,), filler)
    storage[1:-1] = tensor.flatten()
    return storage[1:-1].view(tensor.shape)


@pytest.mark.parametrize("dtype", backends.CPU_DTYPES, ids=str)
@pytest.mark.parametrize("function", CPU_FUNCTIONS)
def test_tensors_may_begin_at_any_number(function: str, dtype: torch.dtype, rng: torch.Generator) -> None:
    for row in cpu_rows(function):
        call, wide = build(row, rng, dtype, "cpu")
        moved = map_tensors(misaligned, call)
        assert all(tensor.is_contiguous() for tensor in tensors(moved))
        with ovs.backend("cpu"):
            results = row.run(moved)
        assert_same(row, wide, results, on("torch", row.run)(wide), KERNEL[dtype])


@pytest.fixture
def chosen_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test on one instruction set."""
    library, name = native.library("cpu"), request.param
    before = native.isa()
    if library.ovseg_cpu_choose(name.encode()):
        pytest.skip(f"this machine lacks {name}")
    yield name
    library.ovseg_cpu_choose(before.encode())


ISAS = [name for name in native.ISAS if (name == "neon") == (platform.machine().lower() in ("aarch64", "arm64"))]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", backends.CPU_DTYPES, ids=str)
@pytest.mark.parametrize("function", CPU_FUNCTIONS)
@pytest.mark.parametrize("chosen_isa", ISAS, indirect=True)
def test_every_instruction_set_follows_float64(
    chosen_isa: str, function: str, dtype: torch.dtype, rng: torch.Generator
) -> None:
    assert native.isa() == chosen_isa
    check_cpu_rows(function, dtype, rng)


@pytest.mark.parametrize("function", [function for function in CPU_FUNCTIONS if differentiable(function)])
@pytest.mark.parametrize("chosen_isa", ISAS, indirect=True)
def test_every_instruction_set_lets_nan_and_infinity_through(
    chosen_isa: str, function: str, rng: torch.Generator
) -> None:
    for value in (float("nan"), float("inf"), float("-inf")):
        test_nan_and_infinity_come_out_where_pytorch_has_them("cpu", function, value, rng)
